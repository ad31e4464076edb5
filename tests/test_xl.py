"""What only Stable Diffusion XL has: two text encoders, sizes, refiners, a VAE that overflows, few steps."""

import math

import numpy as np
import PIL.Image
import pytest
import tiny_models
import torch
from diffusers import (
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLPipeline,
    TCDScheduler,
)
from tiny_models import STABLE_DIFFUSION_XL, guide, stock

from pipeline_muse_xl import MuseXLPipeline


IMAGE = PIL.Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8))


@pytest.fixture
def pipe() -> MuseXLPipeline:
    return tiny_models.muse_pipeline(STABLE_DIFFUSION_XL)


@pytest.fixture
def parent(pipe) -> StableDiffusionXLPipeline:
    """The stock pipeline around the same modules."""
    components = {name: module for name, module in pipe.components.items() if name in STABLE_DIFFUSION_XL.components()}
    return tiny_models.quiet(StableDiffusionXLPipeline(**components))


def embeds(pipe, prompt: str) -> dict[str, torch.Tensor]:
    """What upstream takes in place of prompts."""
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    with torch.no_grad():
        return dict(zip(names, pipe.encode_prompt(prompt, device="cpu")))


SIZES = {
    "original_size": (64, 48),
    "crops_coords_top_left": (8, 4),
    "target_size": (40, 32),
    "negative_original_size": (16, 16),
    "negative_crops_coords_top_left": (2, 2),
    "negative_target_size": (24, 24),
}
CALLS = {
    "sizes": SIZES,
    "sizes of two images": SIZES | {"prompt": ["a cat", "a dog"]},
    "second prompts": {"prompt_2": "a red house", "negative_prompt": "snow", "negative_prompt_2": "rain"},
    "a list of second prompts": {"prompt": ["a cat", "a dog"], "prompt_2": ["red", "blue"]},
    "one side": {"height": 24},
    "the first part": {"denoising_end": 0.6, "num_inference_steps": 6},
    "no guidance": {"guidance_scale": 0.0},
    "three images": {"num_images_per_prompt": 3, "guidance_rescale": 0.4},
}


@pytest.mark.parametrize("call", CALLS)
def test_upstreams_arguments_are_honoured(pipe, parent, call):
    """While the gate is closed, bit for bit; and they reach the guided call."""
    expected = stock(parent, **CALLS[call])
    assert torch.equal(stock(pipe, **CALLS[call]), expected)
    assert torch.equal(guide(pipe, semantic_threshold=math.inf, **CALLS[call]).images, expected)
    guided = guide(pipe, **CALLS[call])
    assert guided.images.shape == expected.shape and guided.images.isfinite().all()
    assert not torch.equal(guided.images, expected)


def test_embeddings_stand_in_for_prompts(pipe, parent):
    given = embeds(pipe, "a cat")
    expected = stock(parent, prompt=None, **given)
    assert torch.equal(guide(pipe, prompt=None, semantic_threshold=math.inf, **given).images, expected)
    assert torch.equal(guide(pipe, prompt=None, **given).images, guide(pipe).images)


def test_tokens_stand_in_the_wide_embedding_and_the_rest_is_the_prompts(pipe, count_calls):
    calls = count_calls(pipe.unet)
    output = guide(pipe, **SIZES)
    width = pipe.text_encoder.config.hidden_size + pipe.text_encoder_2.config.hidden_size
    assert output.emotion_tokens.shape == (1, 4, width)
    given = embeds(pipe, "a cat")
    for (_, keywords), _ in calls.calls:
        states, added = keywords["encoder_hidden_states"], keywords["added_cond_kwargs"]
        if states.shape[1] > given["prompt_embeds"].shape[1]:  # with tokens
            assert torch.equal(states[:, : given["prompt_embeds"].shape[1]], given["prompt_embeds"])
            assert torch.equal(added["text_embeds"], given["pooled_prompt_embeds"])
            assert added["time_ids"].tolist() == [[64, 48, 8, 4, 40, 32]]
        else:  # the parent's own call: the null prompt, and the prompt behind it
            assert torch.equal(states[1:], given["prompt_embeds"])
            assert torch.equal(added["text_embeds"][:1], given["negative_pooled_prompt_embeds"])
            assert added["time_ids"][:1].tolist() == [[16, 16, 2, 2, 24, 24]]


def test_the_gate_reads_the_prompt_through_the_first_tokenizer(pipe, count_calls):
    before = guide(pipe, semantic_threshold=1e6).trace[0].similarity
    pipe.tokenizer_2.padding_side = "left"
    clip = count_calls(pipe.clip_model)
    other = guide(pipe, semantic_threshold=1e6, prompt_2="a dog").trace[0].similarity
    (_, asked), _ = clip.calls[0]
    assert asked["input_ids"][0].tolist() == pipe.tokenizer("a cat", padding="max_length").input_ids
    assert before != other, "the image has changed"


# ---- refiners and few steps ----------------------------------------------------------------------------------------


def test_a_refiner_takes_over(pipe):
    components = {name: part for name, part in pipe.components.items() if name in STABLE_DIFFUSION_XL.components()}
    refiner = tiny_models.quiet(StableDiffusionXLImg2ImgPipeline(**components))
    steps = []

    def callback(pipe, step, timestep, values):
        steps.append(int(timestep))
        return {}

    settings = {"num_inference_steps": 10, "callback_on_step_end": callback}
    latents = guide(pipe, denoising_end=0.7, **settings).images
    there = list(steps)
    image = refiner("a cat", image=latents, denoising_start=0.7, output_type="np", **settings).images
    assert there and np.isfinite(image).all()
    assert sorted(steps, reverse=True) == steps == pipe.scheduler.timesteps.tolist(), "each step is made once"


@pytest.mark.parametrize(
    "scheduler, steps",
    [(EulerAncestralDiscreteScheduler, 1), (EulerDiscreteScheduler, 4), (LCMScheduler, 4), (TCDScheduler, 1)],
)
def test_distilled_models_take_few_steps_without_guidance(pipe, parent, scheduler, steps):
    """As SDXL-Turbo and Lightning do."""
    for one in (pipe, parent):
        one.scheduler = scheduler.from_config(one.scheduler.config, timestep_spacing="trailing")
    settings = {"guidance_scale": 0.0, "num_inference_steps": steps}
    assert torch.equal(guide(pipe, semantic_threshold=math.inf, **settings).images, stock(parent, **settings))
    output = guide(pipe, emotion_learning_rate=0.1, max_inner_steps=3, **settings)
    assert output.images.isfinite().all()
    assert output.trace[0].loss[0][-1] < output.trace[0].loss[0][0]


# ---- the VAE -------------------------------------------------------------------------------------------------------


@pytest.fixture
def overflowing() -> MuseXLPipeline:
    """In float16, with a VAE whose activations are beyond it, as SDXL's are."""
    pipe = tiny_models.muse_pipeline(STABLE_DIFFUSION_XL)
    with torch.no_grad():
        pipe.vae.decoder.conv_in.weight.mul_(2e5)  # below 65504 itself
    return pipe.to(torch.float16)


def test_the_vae_works_in_float32_where_float16_overflows(overflowing):
    dtypes = set()
    overflowing.vae.decoder.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    overflowing.vae.encoder.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    for settings in ({}, {"image": IMAGE}):
        output = guide(overflowing, output_type="np", **settings)
        assert np.isfinite(output.images).all() and np.isfinite(output.trace[0].loss[0]).all()
    overflowing.invert(IMAGE, num_inference_steps=1)
    assert dtypes == {torch.float32}
    assert overflowing.vae.dtype == torch.float16 and overflowing.unet.dtype == torch.float16


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
def test_the_vae_is_float16_again_whatever_happens(overflowing, error):
    def fail(*arguments):
        raise error

    with pytest.raises(type(error)):
        guide(overflowing, callback_on_step_end=fail)
    assert overflowing.vae.dtype == torch.float16


def test_black_images_are_errors(overflowing):
    """A VAE that claims to be fixed for float16, and is not."""
    overflowing.vae.register_to_config(force_upcast=False)
    with pytest.raises(ValueError, match="images.*float16"):
        guide(overflowing, output_type="np", max_inner_steps=0)


def test_latents_that_are_not_finite_are_errors(pipe):
    def callback(pipe, step, timestep, values):
        return {"latents": values["latents"] * math.nan}

    for output_type, name in (("latent", "latents"), ("np", "images")):
        with pytest.raises(ValueError, match=f"The {name} of the call came out infinite or NaN"):
            guide(pipe, callback_on_step_end=callback, output_type=output_type)


def test_a_fixed_vae_stays_in_float16():
    pipe = tiny_models.muse_pipeline(STABLE_DIFFUSION_XL).to(torch.float16)
    pipe.vae.register_to_config(force_upcast=False)
    dtypes = set()
    pipe.vae.decoder.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    assert np.isfinite(guide(pipe, output_type="np").images).all()
    assert dtypes == {torch.float16}


def test_a_preview_vae_spares_the_loop_the_large_one():
    pipe = tiny_models.muse_pipeline(STABLE_DIFFUSION_XL, preview_vae=tiny_models.preview_vae()).to(torch.float16)
    dtypes = set()
    pipe.preview_vae.decoder.register_forward_hook(lambda _, __, output: dtypes.add((pipe.vae.dtype, output.dtype)))
    assert guide(pipe).trace[0].inner_steps > 0
    assert dtypes == {(torch.float16, torch.float16)}


def test_latents_are_normalised_by_mean_and_deviation(pipe, parent):
    pipe.vae.register_to_config(latents_mean=[0.1, -0.2, 0.3, 0.0], latents_std=[2.0, 0.5, 1.0, 1.5])
    expected = stock(parent, output_type="np")
    assert np.array_equal(guide(pipe, semantic_threshold=math.inf, output_type="np").images, expected)
    pixels, decoded = torch.from_numpy(np.array(IMAGE)).permute(2, 0, 1)[None] / 127.5 - 1, []
    with torch.no_grad():
        source = pipe.vae.encode(pixels).latent_dist.mode()
    mean, std = (
        tensor.view(1, 4, 1, 1) for tensor in (torch.tensor([0.1, -0.2, 0.3, 0.0]), torch.tensor([2.0, 0.5, 1.0, 1.5]))
    )
    expected = (source - mean) * pipe.vae.config.scaling_factor / std
    black = PIL.Image.new("L", (32, 32), 0)
    edited = guide(pipe, emotion=None, image=IMAGE, mask_image=black)
    torch.testing.assert_close(edited.images, expected, rtol=0, atol=1e-5)
    pipe.vae.post_quant_conv.register_forward_hook(lambda _, inputs, __: decoded.append(inputs[0]))
    guide(pipe, image=IMAGE, mask_image=black, num_inference_steps=1, max_inner_steps=0)
    torch.testing.assert_close(decoded[-1], source, rtol=0, atol=1e-5)  # previews show the source


def test_a_preview_vae_knows_nothing_of_mean_and_deviation():
    pipe, decoded = tiny_models.muse_pipeline(STABLE_DIFFUSION_XL, preview_vae=tiny_models.preview_vae()), []
    pipe.vae.register_to_config(latents_mean=[5.0] * 4, latents_std=[2.0] * 4)
    pipe.preview_vae.register_forward_hook(lambda *_: None)
    decode = pipe.preview_vae.decoder.register_forward_hook(lambda _, inputs, __: decoded.append(inputs[0]))
    black = PIL.Image.new("L", (32, 32), 0)
    guide(pipe, image=IMAGE, mask_image=black, num_inference_steps=1, max_inner_steps=0)
    decode.remove()
    latents = guide(pipe, emotion=None, image=IMAGE, mask_image=black).images
    torch.testing.assert_close(decoded[-1], latents / pipe.preview_vae.config.scaling_factor, rtol=0, atol=1e-5)


# ---- LoRA ----------------------------------------------------------------------------------------------------------


def test_loras_in_the_network_and_both_encoders_reach_the_guided_call(pipe):
    from peft import LoraConfig

    plain = guide(pipe)
    for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        names = ["to_k", "to_v"] if module is pipe.unet else ["q_proj", "v_proj"]
        module.add_adapter(LoraConfig(r=2, target_modules=names, init_lora_weights=False), adapter_name="mood")
    for module in (pipe.unet, pipe.text_encoder, pipe.text_encoder_2):
        before = {name: weight.requires_grad for name, weight in module.named_parameters()}
        output = guide(pipe)
        assert {name: weight.requires_grad for name, weight in module.named_parameters()} == before
    assert not torch.equal(output.images, plain.images)
    assert output.trace[0].loss[0][-1] < output.trace[0].loss[0][0]
    weak = guide(pipe, cross_attention_kwargs={"scale": 0.0})
    torch.testing.assert_close(weak.images, plain.images, rtol=0, atol=1e-3)
