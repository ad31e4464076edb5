"""Editing: inversion, masks, what guidance leads away from, and pictures of every kind."""

import math

import diffusers
import numpy as np
import PIL.Image
import pytest
import tiny_models
import torch
from diffusers import DDIMScheduler, DiffusionPipeline
from tiny_models import every_family, guide


SIZE = 32


def picture(width: int = SIZE, height: int = SIZE, seed: int = 0) -> PIL.Image.Image:
    """A smooth picture of random colours."""
    colors = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return PIL.Image.fromarray(colors).resize((width, height), PIL.Image.Resampling.BICUBIC)


def edit(pipe, **arguments) -> torch.Tensor:
    """The latents of a short edit; without an emotion it reconstructs, led away from the source's own prompt."""
    defaults = {"emotion": None, "image": picture(), "generator": None, "max_inner_steps": 1}
    defaults["negative_prompt"] = arguments.get("prompt", "a cat")
    return guide(pipe, **{**defaults, **arguments}).images


@torch.no_grad()
def encode(pipe, prompt: str, with_null: bool = False) -> tuple[torch.Tensor | None, ...]:
    """The embeddings of a prompt, and of the null prompt, as `encode_prompt` returns them."""
    return pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=with_null)


def source_latents(pipe, image: PIL.Image.Image) -> torch.Tensor:
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        return pipe.vae.encode(pixels).latent_dist.mode() * pipe.vae.config.scaling_factor


@pytest.fixture
def smooth(pipe) -> DiffusionPipeline:
    """
    A random network is anything but smooth, and DDIM inversion needs neighbouring steps to predict similar noise:
    noise that hardly depends on the latents makes the path one that can be walked both ways.
    """
    pipe.unet.conv_out.weight.data.mul_(0.002)
    pipe.unet.conv_out.bias.data = torch.tensor([1.0, -0.5, 0.3, -1.2])
    return pipe


# ---- there and back ------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(
    "spacing, strength", [("leading", 1.0), ("leading", 0.5), ("trailing", 0.5), ("linspace", 1.0)]
)
def test_what_was_inverted_is_found_again(smooth, spacing, strength):
    smooth.scheduler = DDIMScheduler.from_config(smooth.scheduler.config, timestep_spacing=spacing)
    latents = smooth.invert(picture(), "a cat", num_inference_steps=10, strength=strength)
    found = edit(smooth, num_inference_steps=10, strength=strength, latents=latents)
    source = source_latents(smooth, picture())
    assert (latents - source).norm() > 0.5 * source.norm(), "there has to be a path"
    assert (found - source).norm() < 0.02 * source.norm(), "the path back has to be the path there"


def test_what_was_inverted_with_velocities_is_found_again(smooth):
    """Velocities that hardly change make no straight path: inversion is exact in the limit of small steps only."""
    smooth.unet.conv_out.bias.data.zero_()
    smooth.scheduler = DDIMScheduler.from_config(smooth.scheduler.config, prediction_type="v_prediction")
    source = source_latents(smooth, picture())
    coarse, fine = ((edit(smooth, num_inference_steps=steps) - source).norm() / source.norm() for steps in (10, 40))
    assert fine < 0.35 * coarse and fine < 0.1


def test_inversion_goes_all_the_way_to_noise(smooth):
    """At the last timestep little of the source is left: latents are sqrt(alpha) of it plus predicted noise."""
    latents = smooth.invert(picture(), "a cat", num_inference_steps=10)
    alpha = smooth.scheduler.alphas_cumprod[901]
    noise = smooth.unet.conv_out.bias.view(1, 4, 1, 1)
    expected = alpha.sqrt() * source_latents(smooth, picture()) + (1 - alpha).sqrt() * noise
    torch.testing.assert_close(latents, expected.detach(), rtol=0, atol=0.1)
    assert not latents.requires_grad


@every_family
def test_inversion_follows_the_caption_at_guidance_one(pipe, count_calls):
    calls = count_calls(pipe.unet)
    pipe.invert(picture(), "a cat", num_inference_steps=3)
    prompt = encode(pipe, "a cat")[0]
    assert len(calls) == 3
    for (_, keywords), _ in calls.calls:
        assert torch.equal(keywords["encoder_hidden_states"], prompt)


@every_family
def test_inversion_needs_no_caption(pipe, family):
    latents = pipe.invert(picture(), num_inference_steps=2)
    assert torch.equal(latents, pipe.invert(picture(), "", num_inference_steps=2))
    embeds = {name: value for name, value in zip(family.encoded, encode(pipe, "")) if value is not None}
    assert torch.equal(latents, pipe.invert(picture(), **embeds, num_inference_steps=2))


@pytest.mark.parametrize("strength, steps", [(1.0, 4), (0.5, 2), (0.25, 1), (0.6, 2)])
def test_strength_is_the_share_of_the_path_that_is_walked(pipe, count_calls, strength, steps):
    calls = count_calls(pipe.unet)
    output = guide(pipe, image=picture(), num_inference_steps=4, strength=strength, max_inner_steps=0)
    timesteps = [int(arguments[1]) for (arguments, _), _ in calls.calls]
    there, back = timesteps[:steps], timesteps[steps::2]  # on the way back, without and with tokens
    assert there == [1, 251, 501, 751][:steps]
    assert back == there[::-1]
    assert len(timesteps) == 3 * steps
    assert len(output.trace[0].loss) == steps == pipe.num_timesteps


def test_less_strength_keeps_more_of_the_source(pipe):
    source = source_latents(pipe, picture())
    settings = {"emotion": "awe", "num_inference_steps": 4, "emotion_learning_rate": 0.3}
    distances = [(edit(pipe, strength=strength, **settings) - source).norm() for strength in (0.25, 0.5, 1.0)]
    assert distances[0] < distances[1] < distances[2]


@every_family
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_an_inversion_can_be_shared(pipe, count_calls, strength):
    settings = {"num_inference_steps": 4, "strength": strength}
    latents = pipe.invert(picture(), "a cat", **settings)
    before = latents.clone()
    expected = edit(pipe, emotion="awe", **settings)
    encoder = count_calls(pipe.vae.encoder)
    assert torch.equal(edit(pipe, emotion="awe", latents=latents, **settings), expected)
    assert len(encoder) == 0, "nothing is inverted again"
    assert torch.equal(latents, before)


# ---- masks ---------------------------------------------------------------------------------------------------------


def half_mask(**arguments) -> PIL.Image.Image:
    """White on the left, black on the right."""
    mask = PIL.Image.new("L", (SIZE, SIZE), 0)
    mask.paste(255, (0, 0, SIZE // 2, SIZE))
    return mask


@every_family
def test_outside_of_the_mask_is_the_source(pipe):
    source = source_latents(pipe, picture())
    edited = edit(pipe, emotion="awe", mask_image=half_mask(), emotion_learning_rate=0.3)
    changed = (edited - source).abs().amax(dim=(0, 1, 2))  # per column of latents
    assert changed[8:].max() < 1e-6 and changed[:8].min() > 0.01


def test_a_white_mask_is_none_and_a_black_one_leaves_the_source(pipe):
    white, black = (PIL.Image.new("L", (SIZE, SIZE), value) for value in (255, 0))
    assert torch.equal(edit(pipe, emotion="awe", mask_image=white), edit(pipe, emotion="awe"))
    unchanged = edit(pipe, emotion="awe", mask_image=black)
    torch.testing.assert_close(unchanged, source_latents(pipe, picture()), rtol=0, atol=1e-6)


def test_every_step_returns_to_the_inversions_path(pipe):
    steps = {"num_inference_steps": 4}
    path = [pipe.invert(picture(), "a cat", strength=strength, **steps) for strength in (0.75, 0.5, 0.25)]
    seen = []

    def callback(pipe, step, timestep, values):
        seen.append(values["latents"])
        return {}

    edit(pipe, emotion="awe", mask_image=half_mask(), callback_on_step_end=callback, **steps)
    for latents, expected in zip(seen[:-1], path):
        torch.testing.assert_close(latents[..., 8:], expected[..., 8:], rtol=0, atol=1e-6)


def test_the_emotion_is_judged_on_what_will_come_out(pipe):
    """With all of it masked no token can change the preview."""
    black = PIL.Image.new("L", (SIZE, SIZE), 0)
    settings = {"emotion": "awe", "image": picture(), "emotion_learning_rate": 0.3}
    losses = guide(pipe, mask_image=black, **settings).trace[0].loss
    assert max(map(max, losses)) - min(map(min, losses)) < 1e-5
    losses = guide(pipe, mask_image=half_mask(), **settings).trace[0].loss
    assert losses[0][0] - losses[0][-1] > 1e-3


def test_masks_are_soft_and_have_the_size_of_the_result(pipe):
    grey = PIL.Image.new("L", (7, 300), 128)
    source, whole = source_latents(pipe, picture()), edit(pipe, emotion="awe", num_inference_steps=1)
    part = edit(pipe, emotion="awe", num_inference_steps=1, mask_image=grey, max_inner_steps=0)
    none = edit(pipe, emotion="awe", num_inference_steps=1, max_inner_steps=0)
    torch.testing.assert_close(part, torch.lerp(source, none, 128 / 255), rtol=0, atol=1e-5)
    assert not torch.equal(whole, part)


def test_masks_come_in_every_form_one_for_all_or_one_for_each(pipe):
    mask = half_mask()
    settings = {"emotion": "awe", "num_inference_steps": 1, "max_inner_steps": 0}
    expected = edit(pipe, mask_image=mask, **settings)
    array = np.array(mask)
    forms = [array, array / 255, torch.from_numpy(array)[None] / 255, mask.convert("RGB"), mask.convert("1"), [mask]]
    for form in forms:
        torch.testing.assert_close(edit(pipe, mask_image=form, **settings), expected, rtol=0, atol=1e-6)
    both = edit(
        pipe,
        prompt=["a cat"] * 2,
        mask_image=[mask, PIL.Image.new("L", (SIZE, SIZE), 0)],
        generator=[tiny_models.generator() for _ in range(2)],
        **settings,
    )
    single = edit(pipe, mask_image=mask, generator=tiny_models.generator(), **settings)
    torch.testing.assert_close(both[:1], single, rtol=0, atol=1e-3)
    torch.testing.assert_close(both[1:], source_latents(pipe, picture()), rtol=0, atol=1e-6)


def test_a_shared_inversion_serves_with_a_mask(pipe):
    settings = {"num_inference_steps": 4, "mask_image": half_mask(), "emotion": "awe"}
    latents = pipe.invert(picture(), "a cat", num_inference_steps=4)
    assert torch.equal(edit(pipe, latents=latents, **settings), edit(pipe, **settings))


# ---- what guidance leads away from ---------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [1.0, 7.5])
def test_away_from_the_source_prompt_a_closed_gate_reconstructs(pipe, guidance_scale):
    """Before the gate opens there is nothing to guide: the path is the inversion's own, at any guidance scale."""
    reconstruction = edit(pipe, guidance_scale=1.0)
    closed = edit(pipe, emotion="awe", semantic_threshold=math.inf, guidance_scale=guidance_scale)
    for latents in (edit(pipe, guidance_scale=guidance_scale), closed):
        torch.testing.assert_close(latents, reconstruction, rtol=0, atol=1e-3)


def test_what_guidance_leads_away_from_makes_a_difference(pipe):
    """The null prompt by default; inversion, at guidance 1, knows nothing of it."""
    settings = {"emotion": "awe", "max_inner_steps": 0}
    source, rain, null = (edit(pipe, negative_prompt=text, **settings) for text in ("a cat", "rain", None))
    assert torch.equal(edit(pipe, negative_prompt="", **settings), null)
    assert not torch.equal(source, null) and not torch.equal(null, rain)
    assert torch.equal(*(pipe.invert(picture(), num_inference_steps=2, negative_prompt=one) for one in ("rain", None)))


@every_family
@pytest.mark.parametrize("negative", ["a cat", None], ids=["source", "null"])
def test_guidance_leads_away_from_the_negative_prompt(pipe, count_calls, negative):
    """eps(negative) + w (eps(P, S) - eps(negative)), at the first step, by hand."""
    calls = count_calls(pipe.unet)
    seen = []

    def callback(pipe, step, timestep, values):
        seen.append(values["latents"])
        return {}

    latents = pipe.invert(picture(), "a cat", num_inference_steps=3)
    calls.calls.clear()
    settings = {"negative_prompt": negative, "guidance_scale": 3.0, "max_inner_steps": 0}
    edit(pipe, emotion="awe", latents=latents, callback_on_step_end=callback, **settings)
    ((_, first), (asked,)), ((_, second), (cond,)) = calls.calls[:2]
    prompt, null = encode(pipe, "a cat", with_null=True)[:2]
    assert torch.equal(first["encoder_hidden_states"], torch.cat([prompt if negative else null, prompt]))
    assert second["encoder_hidden_states"].shape[:2] == (1, 16 + 4)
    base = asked[:1]
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=False)
    ddim.set_timesteps(3)
    expected = ddim.step(base + 3.0 * (cond - base), ddim.timesteps[0], latents).prev_sample
    torch.testing.assert_close(seen[0], expected, rtol=0, atol=1e-5)


# ---- schedulers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["EulerAncestralDiscreteScheduler", "DPMSolverMultistepScheduler", "PNDMScheduler", "LCMScheduler"]
)
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
def test_an_edit_walks_ddims_path_whatever_the_scheduler(pipe, name):
    expected = edit(pipe, emotion="awe")
    scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    scheduler.set_timesteps(7)
    state = str(vars(scheduler))
    pipe.scheduler = scheduler
    torch.testing.assert_close(edit(pipe, emotion="awe"), expected, rtol=0, atol=1e-5)
    assert pipe.scheduler is scheduler and str(vars(scheduler)) == state


@pytest.mark.parametrize("setting", ["clip_sample", "thresholding"])
def test_latents_are_not_clipped_on_the_way(pipe, setting):
    """Made for pixels; a clipped path cannot be walked back."""
    expected = edit(pipe)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **{setting: True})
    assert torch.equal(edit(pipe), expected)
    assert pipe.scheduler.config[setting] is True


def test_an_edit_is_deterministic(pipe):
    torch.manual_seed(1)
    first = edit(pipe)
    torch.manual_seed(2)
    assert torch.equal(edit(pipe), first)


# ---- pictures ------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(
    "width, height, expected",
    [(32, 32, (32, 32)), (64, 32, (48, 24)), (30, 60, (24, 48)), (400, 40, (104, 8))],
)
def test_an_edit_has_the_aspect_ratio_of_its_source(pipe, width, height, expected):
    output = pipe("a cat", image=picture(width, height), num_inference_steps=1)
    assert output.images[0].size == expected
    assert pipe.invert(picture(width, height), num_inference_steps=1).shape[2:] == (expected[1] // 2, expected[0] // 2)


def test_the_size_may_be_named(pipe):
    """Or one side of it, which the other follows."""
    for side in ({"height": 16}, {"width": 40}):
        assert pipe("a cat", image=picture(80, 32), num_inference_steps=1, **side).images[0].size == (40, 16)
    assert pipe("a cat", image=picture(), num_inference_steps=1, height=16, width=40).images[0].size == (40, 16)


def test_pictures_arrays_and_tensors_are_the_same_to_it(pipe):
    image = picture()
    array = np.array(image)
    tensor = torch.from_numpy(array).permute(2, 0, 1) / 255
    expected = edit(pipe, image=image, num_inference_steps=1)
    variants = [array, array[None], array / 255, [image], [array], tensor, tensor[None], [tensor], [tensor[None]]]
    for variant in variants:
        torch.testing.assert_close(edit(pipe, image=variant, num_inference_steps=1), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "I", "F", "I;16"])
def test_pictures_of_every_mode_can_be_edited(pipe, mode):
    gray = picture().convert("L")
    if mode == "I;16":
        image = PIL.Image.fromarray(np.array(gray).astype(np.uint16) * 257)
    else:
        image = gray.convert(mode)
    assert image.mode == mode
    latents = edit(pipe, image=image, num_inference_steps=1)
    if mode not in ("1", "CMYK"):  # these change the colours
        torch.testing.assert_close(latents, edit(pipe, image=gray, num_inference_steps=1), rtol=0, atol=0.05)


def test_rotated_photographs_are_edited_upright(pipe):
    image = picture(48, 24)
    image.getexif()[0x0112] = 6
    expected = picture(48, 24).transpose(PIL.Image.Transpose.ROTATE_270)
    assert torch.equal(edit(pipe, image=image), edit(pipe, image=expected))


def test_one_source_serves_all_prompts_or_each_has_its_own(pipe):
    first, second = picture(seed=1), picture(seed=2)
    prompts = {"prompt": ["a cat", "two dogs"], "emotion": ["awe", None], "num_images_per_prompt": 2}
    together = edit(pipe, image=[first, second], **prompts)
    assert together.shape[0] == 4
    for row, image, prompt, emotion in ((0, first, "a cat", "awe"), (3, second, "two dogs", None)):
        single = edit(pipe, image=image, prompt=prompt, emotion=emotion)
        if emotion is None:
            torch.testing.assert_close(together[row], single[0], rtol=0, atol=1e-4)
    shared = edit(pipe, image=first, prompt=["a cat", "two dogs"])
    torch.testing.assert_close(shared[1], edit(pipe, image=first, prompt="two dogs")[0], rtol=0, atol=1e-4)


@every_family
def test_reconstruction_needs_neither_classifier_nor_clip(family):
    pipe = tiny_models.muse_pipeline(family, emotion_classifier=None, clip_model=None)
    output = guide(pipe, emotion=None, image=picture(), semantic_threshold=None)
    assert output.images.isfinite().all()
    assert output.emotion_tokens is output.trace is None
