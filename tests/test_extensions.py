"""What people add: LoRA, textual inversion, IP-Adapter, FreeU, hooks, compilation. It stays, and it serves."""

import contextlib

import pytest
import torch
from diffusers import UNet2DConditionModel
from tiny_models import FAMILIES, VISION_CONFIG, generator, guide, muse_pipeline, stock
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection


def cross_attentions(network: torch.nn.Module) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in network.named_modules() if name.endswith("attn2")}


def assert_same(output, expected) -> None:
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-3)
    torch.testing.assert_close(output.emotion_tokens, expected.emotion_tokens, rtol=0, atol=1e-3)


# ---- LoRA ----------------------------------------------------------------------------------------------------------

PROJECTIONS = ("to_k", "to_v")


def lora_weights(network: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A LoRA of rank 2 for all cross-attentions, in diffusers' layout."""
    random, weights = generator(3), {}
    for name, attention in cross_attentions(network).items():
        for projection in PROJECTIONS:
            rows, columns = getattr(attention, projection).weight.shape
            weights[f"unet.{name}.{projection}.lora_A.weight"] = torch.randn(2, columns, generator=random) / 4
            weights[f"unet.{name}.{projection}.lora_B.weight"] = torch.randn(rows, 2, generator=random) / 4
    return weights


def merge(pipe, weights: dict[str, torch.Tensor], scale: float):
    """The same pipeline with the LoRA added to the weights themselves."""
    with torch.no_grad():
        for name, attention in cross_attentions(pipe.unet).items():
            for projection in PROJECTIONS:
                down, up = (weights[f"unet.{name}.{projection}.lora_{one}.weight"] for one in "AB")
                getattr(attention, projection).weight += scale * up @ down
    return pipe


@pytest.mark.parametrize("scale", [1.0, 0.5])
def test_a_lora_guides_as_if_merged_into_the_weights(pipe, scale):
    """Also the gradients through it, so the tokens; its scale is the caller's, and it leaves no trace."""
    family = next(family for family in FAMILIES if type(pipe) is family.pipeline_class)
    plain, weights = guide(pipe), lora_weights(pipe.unet)
    pipe.load_lora_weights(dict(weights))
    flags = [weight.requires_grad for weight in pipe.unet.parameters()]
    output = guide(pipe, **({} if scale == 1 else {"cross_attention_kwargs": {"scale": scale}}))
    assert_same(output, guide(merge(muse_pipeline(family), weights, scale)))
    assert (output.images - plain.images).abs().max() > 0.1
    assert [weight.requires_grad for weight in pipe.unet.parameters()] == flags
    assert all(weight.grad is None for weight in pipe.unet.parameters())
    pipe.unload_lora_weights()
    assert torch.equal(guide(pipe).images, plain.images)


def test_a_lora_may_be_fused_and_unfused(pipe):
    pipe.load_lora_weights(lora_weights(pipe.unet))
    expected = guide(pipe)
    pipe.fuse_lora()
    assert_same(guide(pipe), expected)
    pipe.unfuse_lora()
    assert_same(guide(pipe), expected)


# ---- textual inversion ---------------------------------------------------------------------------------------------


def test_a_textual_inversion_may_stand_in_the_prompt():
    """The gate's CLIP, whose vocabulary is its own, reads the prompt without it."""
    pipe = muse_pipeline()
    before = guide(pipe, prompt="a cat in  style", semantic_threshold=float("inf"))
    pipe.load_textual_inversion({"<mood>": 3 * torch.randn(2, 32, generator=generator(4))})  # two vectors
    assert_same(guide(pipe), guide(muse_pipeline()))
    for threshold in (0, 1e-3):
        output = guide(pipe, prompt="a cat in <mood> style", semantic_threshold=threshold)
        assert output.trace[0].loss[0][-1] < output.trace[0].loss[0][0]
    closed = guide(pipe, prompt="a cat in <mood> style", semantic_threshold=float("inf"))
    assert torch.equal(closed.images, stock(pipe, prompt="a cat in <mood> style"))
    assert not torch.equal(closed.images, before.images), "the network reads it"
    asked = guide(pipe, semantic_prompt="a cat in <mood> style", semantic_threshold=float("inf")).trace
    expected = guide(pipe, semantic_prompt="a cat in  style", semantic_threshold=float("inf")).trace
    assert asked[0].similarity == expected[0].similarity, "the gate does not"


# ---- IP-Adapter ----------------------------------------------------------------------------------------------------


def ip_adapter(network: torch.nn.Module, num_tokens: int = 4) -> dict:
    """An IP-Adapter for the network: image tokens, and keys and values for them in each cross-attention."""
    random, width = generator(5), network.config.cross_attention_dim
    features = VISION_CONFIG["projection_dim"]
    weights = {}
    for number, attention in enumerate(cross_attentions(network).values()):
        for one in ("k", "v"):  # numbered as the layers of the network are, of which each second one is such
            shape = attention.to_k.weight.shape
            weights[f"{2 * number + 1}.to_{one}_ip.weight"] = torch.randn(shape, generator=random) / 2
    projection = {
        "proj.weight": torch.randn(num_tokens * width, features, generator=random),
        "proj.bias": torch.zeros(num_tokens * width),
        "norm.weight": torch.ones(width),
        "norm.bias": torch.zeros(width),
    }
    return {"image_proj": projection, "ip_adapter": weights}


@pytest.fixture
def with_adapter(pipe):
    """A pipeline whose IP-Adapter shows it a picture, and that picture."""
    torch.manual_seed(6)
    size = {"height": 32, "width": 32}
    pipe.register_modules(
        image_encoder=CLIPVisionModelWithProjection(CLIPVisionConfig(**VISION_CONFIG)).eval(),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size),
    )
    pipe.load_ip_adapter(ip_adapter(pipe.unet), subfolder=None, weight_name=None)
    return pipe, torch.rand(1, 3, 32, 32, generator=generator(7))


def test_an_ip_adapter_shows_its_picture_in_every_pass(with_adapter, count_calls):
    pipe, picture = with_adapter
    processors = dict(pipe.unet.attn_processors)
    calls = count_calls(pipe.unet)
    arguments = {"ip_adapter_image": picture, "prompt": ["a cat", "two dogs"], "emotion": ["awe", "fear"]}
    output = guide(pipe, **arguments)
    assert all(trace.loss[0][-1] < trace.loss[0][0] for trace in output.trace)
    for (inputs, keywords), _ in calls.calls:
        assert keywords["added_cond_kwargs"]["image_embeds"][0].shape[0] == inputs[0].shape[0]
    assert pipe.unet.attn_processors == processors, "the adapter's processors stay"
    closed = guide(pipe, **arguments, semantic_threshold=float("inf"))
    assert torch.equal(closed.images, stock(pipe, prompt=arguments["prompt"], ip_adapter_image=picture))
    pipe.set_ip_adapter_scale(0.0)
    assert (guide(pipe, **arguments).images - output.images).abs().max() > 1e-3


def test_an_ip_adapter_takes_embeddings(with_adapter):
    pipe, picture = with_adapter
    embeds = pipe.prepare_ip_adapter_image_embeds(picture, None, torch.device("cpu"), 1, True)
    assert_same(guide(pipe, ip_adapter_image_embeds=embeds), guide(pipe, ip_adapter_image=picture))


def test_an_ip_adapter_shows_its_picture_where_tokens_rest(with_adapter):
    """There null prompt and prompt share a pass, the shorter one padded and masked."""
    pipe, picture = with_adapter
    settings = {"ip_adapter_image": picture, "max_inner_steps": 0, "num_inference_steps": 4}
    apart, together = (guide(pipe, **settings, update_interval=interval).images for interval in (1, 4))
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-4)


# ---- FreeU, hooks, replaced functions ------------------------------------------------------------------------------


def test_freeu_is_on_while_it_is_on(pipe):
    plain = guide(pipe)
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)
    output = guide(pipe)
    assert output.trace[0].loss[0][-1] < output.trace[0].loss[0][0]
    assert (output.images - plain.images).abs().max() > 1e-3
    pipe.disable_freeu()
    assert torch.equal(guide(pipe).images, plain.images)


@pytest.mark.parametrize("ends", ["well", "with an error"])
def test_hooks_and_replaced_functions_stay_and_are_called(pipe, ends):
    """As DeepCache and others put them: around the forward of the network, and on its parts."""
    expected, seen = guide(pipe), []
    original = pipe.unet.forward

    def forward(*arguments, **keywords):
        seen.append("forward")
        return original(*arguments, **keywords)

    pipe.unet.forward = forward
    hook = pipe.unet.mid_block.register_forward_hook(lambda module, inputs, output: seen.append("hook"))

    def callback(pipe, step, timestep, values):
        if ends == "with an error":
            raise KeyboardInterrupt
        return {}

    with pytest.raises(KeyboardInterrupt) if ends == "with an error" else contextlib.nullcontext():
        assert torch.equal(guide(pipe, callback_on_step_end=callback).images, expected.images)
    steps = 1 if ends == "with an error" else 3
    assert seen.count("forward") == seen.count("hook") == steps * (1 + 3)
    assert pipe.unet.forward is forward and hook.id in pipe.unet.mid_block._forward_hooks


# ---- compilation ---------------------------------------------------------------------------------------------------


def small_network() -> UNet2DConditionModel:
    """One that is soon compiled."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8,),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
        cross_attention_dim=32,
        attention_head_dim=4,
        norm_num_groups=4,
    ).eval()


def test_a_compiled_network_is_compiled_no_more_after_the_first_call():
    """The number of tokens is constant, so a graph for each kind of pass serves all steps and calls."""
    pipe = muse_pipeline(unet=small_network())
    settings = {"num_inference_steps": 2, "update_interval": 2, "max_inner_steps": 1}
    expected, graphs = [guide(pipe, emotion=emotion, **settings) for emotion in ("awe", "fear")], []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    pipe.unet = torch.compile(pipe.unet, backend=count)
    assert_same(guide(pipe, emotion="awe", **settings), expected[0])
    compiled = len(graphs)
    assert compiled > 0
    assert_same(guide(pipe, emotion="fear", **settings), expected[1])
    assert len(graphs) == compiled
    assert compiled <= 4, "the parent's pass, those with and without gradients, and the one where tokens rest"
    torch.compiler.reset()
