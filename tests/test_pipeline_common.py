"""
What every pipeline of diffusers has to do: the cases of diffusers' `PipelineTesterMixin` (of its older form for
unittest and its newer one for pytest), for the guided call, and the stock one where it may differ.
"""

import io
import json
from contextlib import redirect_stderr

import accelerate
import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from tiny_models import Family, every_family, generator, guide, muse_pipeline, parent_of, preview_vae, quiet, stock


CALLS = {"stock": {"emotion": None}, "guided": {"max_inner_steps": 1}}
PROMPTS = ["a cat", "two dogs in the snow", "a very long story " * 10]


@pytest.fixture(params=["guided"])
def call(request):
    """A short call of a pipeline, which returns latents."""

    def run(pipe: DiffusionPipeline, **arguments):
        return guide(pipe, **{"num_inference_steps": 2, **CALLS[request.param], **arguments})

    run.guides = request.param == "guided"
    return run


every_call = pytest.mark.parametrize("call", CALLS, indirect=True)


def modules_of(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    return {name: one for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}


def load(family: Family, folder, **arguments) -> DiffusionPipeline:
    return quiet(family.pipeline_class.from_pretrained(folder, trust_remote_code=True, **arguments))  # SimEmo's code


def assert_same(output, expected, atol: float = 1e-4) -> None:
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=atol)


# ---- the call ------------------------------------------------------------------------------------------------------
@every_family
@every_call
def test_dict_and_tuple_outputs_are_equal(pipe, call):
    output = call(pipe, output_type="pt")
    parts = call(pipe, output_type="pt", return_dict=False)
    assert torch.equal(parts[0], output.images)
    assert isinstance(parts, tuple) and isinstance(output, pipe_output(pipe))
    if call.guides:
        assert torch.equal(parts[-2], output.emotion_tokens) and parts[-1] == output.trace
    else:
        assert len(parts) == len(parent_of(pipe)("a cat", num_inference_steps=1, return_dict=False))
        assert output.emotion_tokens is output.trace is None


def pipe_output(pipe: DiffusionPipeline) -> type:
    """What the parent returns, which code may check for."""
    return type(parent_of(pipe)("a cat", num_inference_steps=1))


@every_family
@every_call
def test_every_output_type_shows_the_same_picture(pipe, call):
    tensor, array, pictures = (call(pipe, output_type=kind).images for kind in ("pt", "np", "pil"))
    assert tensor.shape[:2] == (1, 3) and 0 <= tensor.min() and tensor.max() <= 1
    np.testing.assert_allclose(array, tensor.permute(0, 2, 3, 1).numpy(), atol=1e-6)
    assert np.array_equal(np.asarray(pictures[0]), (array[0] * 255).round().astype(np.uint8))
    latents = call(pipe).images
    assert latents.shape[1] == pipe.unet.config.in_channels
    assert latents.shape[-1] * pipe.vae_scale_factor == pictures[0].width


@every_family
def test_a_batch_holds_what_single_calls_make(pipe, call):
    """Prompts of different lengths, the last one longer than the text encoder reads."""
    batch = call(pipe, prompt=PROMPTS, generator=[generator(seed) for seed in range(3)]).images
    assert batch.shape[0] == len(PROMPTS)
    for number, prompt in enumerate(PROMPTS):
        single = call(pipe, prompt=prompt, generator=generator(number)).images
        torch.testing.assert_close(batch[number], single[0], rtol=0, atol=1e-4)


@pytest.mark.parametrize("prompts, each", [(1, 2), (2, 2)])
def test_images_per_prompt(pipe, call, prompts, each):
    generators = [generator(seed) for seed in range(prompts * each)]
    output = call(pipe, prompt=PROMPTS[:prompts], num_images_per_prompt=each, generator=generators)
    assert output.images.shape[0] == prompts * each
    if call.guides:
        assert len(output.trace) == output.emotion_tokens.shape[0] == prompts * each
    last = call(pipe, prompt=PROMPTS[prompts - 1], generator=generator(prompts * each - 1))
    torch.testing.assert_close(output.images[-1], last.images[0], rtol=0, atol=1e-4)


def test_classifier_free_guidance_can_be_switched_off(pipe, call, count_calls):
    calls = count_calls(pipe.unet)
    without = call(pipe, guidance_scale=1.0).images
    assert {arguments[0].shape[0] for (arguments, _), _ in calls.calls} == {1}, "no null prompt"
    assert not pipe.do_classifier_free_guidance
    guided = call(pipe, guidance_scale=7.5).images
    assert guided.shape == without.shape and (guided - without).abs().max() > 1e-3
    assert pipe.do_classifier_free_guidance and pipe.guidance_scale == 7.5


@every_family
@every_call
def test_the_same_latents_give_the_same_image(pipe, call):
    """Given instead of drawn, and of a size that is not the native one."""
    latents = torch.randn(1, pipe.unet.config.in_channels, 8, 24, generator=generator())
    tokens = {"emotion_tokens": torch.randn(4, pipe.unet.config.cross_attention_dim)} if call.guides else {}
    size = {"height": 8 * pipe.vae_scale_factor, "width": 24 * pipe.vae_scale_factor}
    given = call(pipe, latents=latents, **size, **tokens)
    assert_same(given, call(pipe, **size, **tokens), atol=0)


# ---- prompts without the rest, and the rest without prompts --------------------------------------------------------
@every_family
def test_prompts_are_encoded_in_isolation(family, call):
    """By a pipeline that has nothing but text encoders; another one, without them, takes what they said."""
    pipe = muse_pipeline(family)
    expected = call(pipe, negative_prompt="rain")
    is_text = {name: "text_encoder" in name or "tokenizer" in name for name in pipe.components}
    encoder, rest = (
        quiet(
            family.pipeline_class(
                **{name: one if is_text[name] == wanted else None for name, one in pipe.components.items()},
                **family.settings,
            )
        )
        for wanted in (True, False)
    )
    with torch.no_grad():
        encoded = encoder.encode_prompt(
            prompt="a cat",
            device="cpu",
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
            negative_prompt="rain",
        )
    assert_same(call(rest, prompt=None, **dict(zip(family.encoded, encoded, strict=True))), expected, atol=0)


# ---- callbacks -----------------------------------------------------------------------------------------------------


@every_family
@every_call
def test_callbacks_get_what_they_ask_for(pipe, call):
    names = pipe._callback_tensor_inputs
    steps = []

    def callback(seen, step, timestep, values):
        assert seen is pipe and set(values) == set(names)
        assert all(values[name] is not None for name in parent_of(pipe)._callback_tensor_inputs if name in names)
        assert "emotion_tokens" not in names or (values["emotion_tokens"] is not None) == call.guides
        steps.append(step)
        return values

    output = call(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names)
    assert steps == [0, 1] and pipe.num_timesteps == 2
    assert_same(output, call(pipe), atol=0)


@every_call
def test_latents_that_a_callback_returns_are_used(pipe, call):
    def callback(pipe, step, timestep, values):
        last = step == pipe.num_timesteps - 1
        return {"latents": values["latents"] * (0 if last else 0.9)}

    assert call(pipe, callback_on_step_end=callback).images.abs().max() == 0

    def shrink(pipe, step, timestep, values):
        return {"latents": values["latents"] * 0.9}

    never = guide(pipe, semantic_threshold=float("inf"), callback_on_step_end=shrink).images
    expected = stock(pipe, callback_on_step_end=shrink)
    assert torch.equal(never, expected) and not torch.equal(expected, stock(pipe))


def test_a_callback_may_change_the_guidance_scale(pipe, call):
    def callback(pipe, step, timestep, values):
        pipe._guidance_scale += 1.0
        return values

    output = call(pipe, guidance_scale=2.0, callback_on_step_end=callback)
    assert pipe.guidance_scale == 2.0 + pipe.num_timesteps
    assert (output.images - call(pipe, guidance_scale=2.0).images).abs().max() > 1e-4


@every_call
def test_an_interrupted_call_ends_with_what_it_has(pipe, call, count_calls):
    calls, seen = count_calls(pipe.unet), []

    def callback(pipe, step, timestep, values):
        seen.append(values["latents"])
        pipe._interrupt = True
        return {}

    output = call(pipe, num_inference_steps=3, callback_on_step_end=callback)
    assert len(seen) == 1 and torch.equal(output.images, seen[0])
    assert len(calls) == (1 + 2 if call.guides else 1)
    assert not call.guides or len(output.trace[0].loss) == 1
    calls.calls.clear()
    call(pipe, num_inference_steps=3)
    assert len(calls) == (3 * (1 + 2) if call.guides else 3), "the next call starts afresh"


def test_the_progress_bar_is_configured_as_upstream(pipe, call):
    for disable in (True, False):
        screen = io.StringIO()
        pipe.set_progress_bar_config(disable=disable, desc="denoising")
        with redirect_stderr(screen):
            call(pipe)
        assert ("denoising: 100%" in screen.getvalue()) == (not disable)


# ---- components ----------------------------------------------------------------------------------------------------
@every_family
def test_components_make_the_same_pipeline_again(family, pipe, call):
    assert set(pipe.components) == set(parent_of(pipe).components) | family.extra_components
    again = quiet(family.pipeline_class(**pipe.components, **family.settings))
    assert_same(call(again), call(pipe), atol=0)


@every_family
def test_from_pipe_both_ways(family, pipe, call):
    expected, settings = call(pipe), dict(pipe.config)
    parent = parent_of(pipe)
    assert type(parent) is family.parent_class and parent.unet is pipe.unet
    assert torch.equal(stock(parent), stock(pipe))
    extra = {name: pipe.components[name] for name in family.extra_components}
    again = quiet(family.pipeline_class.from_pipe(parent, **extra))
    assert_same(call(again), expected, atol=0)
    assert again.config.semantic_threshold == settings["semantic_threshold"]
    assert torch.equal(stock(parent), stock(pipe)), "and the parent is as before"
    bare = family.pipeline_class.from_pipe(parent)
    assert all(bare.components[name] is None for name in family.extra_components)


def test_from_pipe_carries_everything_to_its_like(family, pipe):
    pipe.register_to_config(semantic_threshold=3.0)
    again = family.pipeline_class.from_pipe(pipe)
    assert {name: id(one) for name, one in again.components.items()} == {
        name: id(one) for name, one in pipe.components.items()
    }
    assert again.config.semantic_threshold == 3.0


@pytest.mark.parametrize("wanted", [None, torch.float32], ids=["as they are", "asked for"])
def test_from_pipe_keeps_dtypes(family, wanted):
    """Modules are shared, so a cast here would be one of the caller's pipeline; upstream's own casts to float32."""
    base = quiet(family.parent_class(**family.components(), **family.settings)).to(torch.bfloat16)
    base.vae.to(torch.float32)
    asked = {} if wanted is None else {"torch_dtype": wanted}
    pipe = family.pipeline_class.from_pipe(base, **asked)
    expected = torch.bfloat16 if wanted is None else wanted
    assert pipe.unet is base.unet and pipe.unet.dtype == pipe.text_encoder.dtype == expected
    assert pipe.vae.dtype == torch.float32
    assert stock(base).dtype == expected, "the caller's pipeline works as before"


def test_to_converts_and_moves_every_module(pipe):
    assert {module.dtype for module in modules_of(pipe).values()} == {torch.float32}
    pipe.to(torch.float16)
    assert {module.dtype for module in modules_of(pipe).values()} == {torch.float16}
    pipe.to("meta")
    assert {module.device.type for module in modules_of(pipe).values()} == {"meta"}
    assert pipe.device.type == "meta"


# ---- saving and loading --------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("missing", [(), ("clip_model", "preview_vae"), "all"], ids=["nothing", "some", "all"])
def test_saved_pipelines_load_again(family, tmp_path, missing):
    """Whichever of the optional components are there; without a classifier CLIP serves."""
    missing = family.extra_components if missing == "all" else missing
    pipe = muse_pipeline(family, **{"preview_vae": preview_vae(), **dict.fromkeys(missing)})
    pipe.register_to_config(semantic_threshold=3.5)
    pipe.save_pretrained(tmp_path)
    again = load(family, tmp_path)
    assert again.config.semantic_threshold == 3.5
    for name, component in pipe.components.items():
        assert (getattr(again, name) is None) == (component is None)
    torch.testing.assert_close(stock(again), stock(pipe), rtol=0, atol=1e-4)
    if "emotion_classifier" not in missing:
        torch.testing.assert_close(guide(again).emotion_tokens, guide(pipe).emotion_tokens, rtol=0, atol=1e-4)


def test_half_precision_is_saved_and_loaded(pipe, family, call, tmp_path):
    pipe.to(torch.float16).save_pretrained(tmp_path)
    again = load(family, tmp_path, dtype=torch.float16)
    assert {module.dtype for module in modules_of(again).values()} == {torch.float16}
    assert_same(call(again), call(pipe), atol=1e-2)


def test_components_are_loaded_in_dtypes_of_their_own(pipe, family, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = load(family, tmp_path, dtype={"unet": torch.bfloat16, "default": torch.float16})
    for name, module in modules_of(again).items():
        assert module.dtype == (torch.bfloat16 if name == "unet" else torch.float16), name


def test_variants_are_saved_and_loaded(pipe, family, call, tmp_path):
    pipe.save_pretrained(tmp_path, variant="fp16")
    for name in modules_of(pipe):
        weights = [file.name for file in (tmp_path / name).iterdir() if file.suffix == ".safetensors"]
        assert weights and all(".fp16." in file for file in weights)
    assert_same(call(load(family, tmp_path, variant="fp16")), call(pipe))


def test_a_variant_that_is_not_there_is_refused(pipe, family, tmp_path):
    pipe.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="variant=fp16"):
        load(family, tmp_path, variant="fp16")


def test_a_device_map_is_taken(pipe, family, call, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = load(family, tmp_path, device_map="cpu")
    assert again.hf_device_map == "cpu"
    assert_same(call(again), call(pipe))


def test_the_index_names_every_component(pipe, family, tmp_path):
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == family.pipeline_class.__name__
    assert set(pipe.components) <= set(index)


# ---- memory and speed ----------------------------------------------------------------------------------------------
@every_family
def test_models_are_offloaded(pipe, call):
    """With the CPU as the device that they are brought to; a second call, and a second time, changes nothing."""
    expected = call(pipe)
    for _ in range(2):
        pipe.enable_model_cpu_offload(device="cpu")
        assert all(isinstance(module._hf_hook, accelerate.hooks.CpuOffload) for module in modules_of(pipe).values())
        for _ in range(2):
            assert_same(call(pipe), expected, atol=0)


def test_modules_are_offloaded_one_after_another(pipe, call):
    """
    What `enable_sequential_cpu_offload` installs; itself it wants an accelerator. Weights are on the meta device
    between the passes of their layer, also while the inner loop awaits its gradients.
    """
    expected = call(pipe)
    for module in modules_of(pipe).values():
        weights = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        has_own = len(module._parameters) > 0
        accelerate.cpu_offload(module, torch.device("cpu"), offload_buffers=has_own, state_dict=weights)
    flags = [weight.requires_grad for module in modules_of(pipe).values() for weight in module.parameters()]
    assert all(flags)
    assert_same(call(pipe), expected, atol=0)
    assert {module.device.type for module in modules_of(pipe).values()} == {"meta"}
    assert flags == [weight.requires_grad for module in modules_of(pipe).values() for weight in module.parameters()]
    pipe.unet.enable_gradient_checkpointing()
    pipe.vae.enable_gradient_checkpointing()
    assert_same(call(pipe), expected)


@pytest.mark.parametrize("settings", [{"offload_type": "block_level", "num_blocks_per_group": 1}, {}])
def test_groups_of_layers_are_offloaded(pipe, call, settings):
    expected = call(pipe)
    settings = {"offload_type": "leaf_level", **settings}
    pipe.enable_group_offload(onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), **settings)
    assert_same(call(pipe), expected, atol=0)


def test_attention_may_be_sliced(pipe, call):
    expected = call(pipe)
    for size in ("auto", "max", 1):
        pipe.enable_attention_slicing(size)
        assert_same(call(pipe), expected, atol=1e-3)
    pipe.disable_attention_slicing()
    assert_same(call(pipe), expected, atol=0)


def test_attention_processors_are_all_the_same_to_it(pipe, call):
    expected = call(pipe)
    pipe.fuse_qkv_projections()
    assert_same(call(pipe), expected, atol=1e-3)
    pipe.unfuse_qkv_projections()
    assert_same(call(pipe), expected, atol=0)
    pipe.unet.set_attn_processor(AttnProcessor())
    assert_same(call(pipe), expected, atol=1e-3)
    assert all(type(one) is AttnProcessor for one in pipe.unet.attn_processors.values()), "and stay in place"


def test_the_decoder_may_work_in_slices(pipe, call):
    """A picture at a time; the preview of a batch then too."""
    arguments = {"prompt": PROMPTS[:2], "output_type": "pt"}
    expected = call(pipe, **arguments)
    pipe.vae.enable_slicing()
    assert_same(call(pipe, **arguments), expected)


def test_the_decoder_may_work_in_tiles(pipe, call):
    """Tiles that overlap by half: borders change the picture a little, and gradients pass."""
    expected = call(pipe, output_type="pt", max_inner_steps=2)
    pipe.vae.tile_sample_min_size = 16
    pipe.vae.tile_latent_min_size = 16 // pipe.vae_scale_factor
    pipe.vae.enable_tiling()
    tiled = call(pipe, output_type="pt", max_inner_steps=2)
    assert 0 < (tiled.images - expected.images).abs().mean() < 0.1
    if call.guides:
        assert tiled.trace[0].loss[0][-1] < tiled.trace[0].loss[0][0]


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("image", [None, torch.full((3, 32, 32), 0.3)], ids=["generation", "edit"])
def test_half_precision_guides_as_float32_does(pipe, dtype, image):
    """Similarity and losses agree; in the first step, far from the image, tokens go about the same way."""
    start = torch.randn(4, pipe.unet.config.cross_attention_dim, generator=generator())
    arguments = {"emotion_tokens": start, "image": image, "semantic_threshold": 1e-3, "num_inference_steps": 2}

    def keep_tokens(pipe, step, timestep, values):
        moves.setdefault((pipe.dtype, step), (values["emotion_tokens"] - start).flatten())
        return {}

    moves: dict = {}
    arguments |= {"callback_on_step_end": keep_tokens, "callback_on_step_end_tensor_inputs": ["emotion_tokens"]}
    expected, half = guide(pipe, **arguments), guide(pipe.to(dtype), **arguments)
    assert half.images.dtype == dtype and half.images.isfinite().all()
    assert half.emotion_tokens.dtype == torch.float32
    losses, similarities = (
        [torch.tensor(getattr(output.trace[0], name)) for output in (half, expected)]
        for name in ("loss", "similarity")
    )
    torch.testing.assert_close(*losses, rtol=0.05, atol=0.05)
    torch.testing.assert_close(*similarities, rtol=0.05, atol=0.05)
    assert torch.nn.functional.cosine_similarity(moves[dtype, 0], moves[torch.float32, 0], dim=0) > 0.8
