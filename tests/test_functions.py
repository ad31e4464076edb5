"""The pure functions of pipeline_muse, from the emotions to the pixels."""

import copy
import inspect
import itertools
import math
import threading
from dataclasses import fields
from functools import partial

import diffusers
import numpy as np
import PIL.Image
import pytest
import tiny_models
import torch
from diffusers.schedulers import KarrasDiffusionSchedulers
from hypothesis import given, settings
from hypothesis import strategies as st
from modeling_simemo import EMOSET_LABELS
from tiny_models import generator
from torch.nn import functional as F

from pipeline_muse import (
    MIKELS_WHEEL,
    POSITIVE_EMOTIONS,
    GuidanceSettings,
    PixelSpec,
    clip_similarity,
    degrade,
    fit_size,
    fork_generator,
    frozen,
    label_weights,
    muse_loss,
    normalize_emotion,
    predict_x0,
    signal_level,
    to_mask,
    to_rgb,
    wheel_distance,
    wheel_neighbors,
)


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers under NumPy 2


# ---- which ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "label, before, after, same_valence",
    [
        ("amusement", "anger", "contentment", ["contentment"]),
        ("contentment", "amusement", "awe", ["amusement", "awe"]),
        ("awe", "contentment", "excitement", ["contentment", "excitement"]),
        ("excitement", "awe", "fear", ["awe"]),
        ("fear", "excitement", "sadness", ["sadness"]),
        ("sadness", "fear", "disgust", ["fear", "disgust"]),
        ("disgust", "sadness", "anger", ["sadness", "anger"]),
        ("anger", "disgust", "amusement", ["disgust"]),
    ],
)
def test_neighbors_on_mikels_wheel(label, before, after, same_valence):
    assert wheel_neighbors(label, same_valence=False) == [before, after]
    assert wheel_neighbors(label) == same_valence


def test_labels_off_the_wheel_have_no_neighbors():
    assert wheel_neighbors("nostalgia") == wheel_neighbors("nostalgia", same_valence=False) == []


@pytest.mark.parametrize(
    "label, other, steps, polarity_aware",
    [
        ("awe", "awe", 0, 0),
        ("awe", "contentment", 1, 1),
        ("amusement", "excitement", 3, 3),
        ("anger", "amusement", 1, 4),
        ("excitement", "fear", 1, 4),
        ("awe", "anger", 3, 6),
        ("contentment", "sadness", 4, 7),
        ("fear", "anger", 3, 3),
    ],
)
def test_distances_on_mikels_wheel(label, other, steps, polarity_aware):
    assert wheel_distance(label, other) == wheel_distance(other, label) == steps
    assert wheel_distance(label, other, polarity_aware=True) == polarity_aware
    assert wheel_distance(other, label, polarity_aware=True) == polarity_aware


@pytest.mark.parametrize("polarity_aware", [False, True])
def test_wheel_distances_are_a_metric(polarity_aware):
    distance = partial(wheel_distance, polarity_aware=polarity_aware)
    for a, b, c in itertools.product(MIKELS_WHEEL, repeat=3):
        assert (distance(a, b) == 0) == (a == b)
        assert distance(a, b) == distance(b, a)
        assert distance(a, c) <= distance(a, b) + distance(b, c)


def test_opposite_valences_are_further_apart_than_like_ones():
    like, opposite = set(), set()
    for a, b in itertools.product(MIKELS_WHEEL, repeat=2):
        (like if (a in POSITIVE_EMOTIONS) == (b in POSITIVE_EMOTIONS) else opposite).add(wheel_distance(a, b, True))
    assert max(like) < min(opposite)


def test_a_label_off_the_wheel_has_no_distance():
    for pair in (("awe", "nostalgia"), ("nostalgia", "awe")):
        with pytest.raises(ValueError, match="'nostalgia'.* is not on Mikels' wheel"):
            wheel_distance(*pair)


def test_the_wheel_holds_the_eight_emotions_with_places_and_colors_of_their_own():
    assert set(MIKELS_WHEEL) == set(EMOSET_LABELS)
    assert {"amusement", "contentment", "awe", "excitement"} == POSITIVE_EMOTIONS
    assert all(1 <= rating <= 9 for point in MIKELS_WHEEL.values() for rating in (point.valence, point.arousal))
    assert MIKELS_WHEEL["excitement"][:2] == (7.62, 6.21) and MIKELS_WHEEL["sadness"][:2] == (2.40, 2.81)
    assert len({point.color for point in MIKELS_WHEEL.values()}) == 8


@settings(max_examples=30)
@given(st.dictionaries(st.sampled_from(list(MIKELS_WHEEL)), st.floats(0, 1e6), min_size=1))
def test_mixtures_become_weights_that_sum_to_one(mixture):
    if sum(mixture.values()) == 0:
        with pytest.raises(ValueError, match="`emotion` weights"):
            normalize_emotion(mixture, MIKELS_WHEEL)
        return
    weights = normalize_emotion(mixture, MIKELS_WHEEL)
    assert sum(weights.values()) == pytest.approx(1)
    assert set(weights) <= {label for label, weight in mixture.items() if weight > 0}
    for label, weight in weights.items():
        assert weight == pytest.approx(mixture[label] / sum(mixture.values()))


def test_a_label_weighs_one_and_none_nothing():
    assert normalize_emotion("awe", MIKELS_WHEEL) == {"awe": 1.0}
    assert normalize_emotion(None, MIKELS_WHEEL) == {}


@pytest.mark.parametrize("word", ["Awe", " awe", "AWE ", "a w e"])
def test_labels_are_the_same_whatever_their_case_and_spaces(word):
    assert normalize_emotion(word, MIKELS_WHEEL) == {"awe": 1.0}
    assert normalize_emotion({word: 1, "awe": 2, "fear": 1}, MIKELS_WHEEL) == {"awe": 0.75, "fear": 0.25}
    assert normalize_emotion("awe", ["fear", "Awe"]) == {"Awe": 1.0}


@pytest.mark.parametrize(
    "word, near", [("feer", "fear"), ("Amusment", "amusement"), ("angry", "anger"), ("joyful", None)]
)
def test_a_misspelled_label_is_told_what_was_meant(word, near):
    hint = f"did you mean {near!r}" if near else "`clip_model` or `emotion_prompts`"
    with pytest.raises(ValueError, match=f"`emotion` '{word}'.*{hint}"):
        normalize_emotion(word, MIKELS_WHEEL)


def test_label_weights_follow_the_names():
    weights = label_weights([{"b": 0.25, "c": 0.75}, {}], ["c", "a", "b"])
    assert weights.tolist() == [[0.75, 0, 0.25], [0, 0, 0]]


LOGITS = torch.tensor([[2.0, -1.0, 0.5, 3.0], [0.0, 1.0, -2.0, 0.3]])
ROWS = {
    "target": torch.tensor([[1.0, 0, 0, 0], [0.25, 0.75, 0, 0]]),
    "inherent": torch.tensor([[0, 0, 0, 1.0], [0, 0, 0, 0]]),
    "similar": torch.tensor([[0, 0.5, 0.5, 0], [0, 0, 1.0, 0]]),
}


def test_loss_by_hand():
    def cross_entropy(sample: int, label: int) -> float:
        return -math.log(math.exp(LOGITS[sample, label]) / sum(math.exp(value) for value in LOGITS[sample]))

    first = cross_entropy(0, 0) - 0.3 * cross_entropy(0, 3)
    first -= 0.2 * (cross_entropy(0, 1) + cross_entropy(0, 2)) / 2  # a mean over the similar labels
    second = 0.25 * cross_entropy(1, 0) + 0.75 * cross_entropy(1, 1) - 0.2 * cross_entropy(1, 2)
    loss = muse_loss(LOGITS, **ROWS, inherent_weight=0.3, similar_weight=0.2)
    torch.testing.assert_close(loss, torch.tensor([first, second]))


def test_loss_is_float32_whatever_the_logits():
    weights = {"inherent_weight": 0.3, "similar_weight": 0.2}
    loss = muse_loss(LOGITS.bfloat16(), **ROWS, **weights)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, muse_loss(LOGITS.bfloat16().float(), **ROWS, **weights), rtol=0, atol=0)


def test_loss_goes_below_zero():
    """max(0, ...) around a cross-entropy would do nothing; around the loss it would kill its gradient."""
    assert muse_loss(LOGITS, **ROWS, inherent_weight=0, similar_weight=10).max() < 0


# ---- pixels and similarity -----------------------------------------------------------------------------------------

SPEC = PixelSpec((8, 8), (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))


def test_pixels_are_normalised_per_channel():
    image = torch.rand(2, 3, 8, 8) * 2 - 1
    for channel in range(3):
        expected = ((image[:, channel] + 1) / 2 - SPEC.mean[channel]) / SPEC.std[channel]
        torch.testing.assert_close(SPEC.prepare(image)[:, channel], expected)


@pytest.mark.parametrize("height, width", [(32, 32), (20, 50), (5, 6)])
def test_pixels_are_resized_as_pil_resizes(height, width):
    """Bicubic and antialiased: classifiers were trained on pictures that were scaled down in this way."""
    image = torch.rand(height, width, generator=tiny_models.generator())
    pixels = PixelSpec((8, 8), (0.0,) * 3, (1.0,) * 3).prepare(image.expand(1, 3, height, width) * 2 - 1)
    expected = np.array(PIL.Image.fromarray(image.numpy()).resize((8, 8), PIL.Image.Resampling.BICUBIC))
    torch.testing.assert_close(pixels, torch.from_numpy(expected).expand(1, 3, 8, 8), rtol=0, atol=1e-4)


def test_pixels_out_of_range_keep_their_gradient():
    image = torch.full((1, 3, 12, 12), 3.0, requires_grad=True)
    pixels = SPEC.prepare(image)
    assert pixels.min() > (1 - 0.4) / 0.2, "a clamp would lose how far the image is out"
    assert torch.autograd.grad(pixels.sum(), image)[0].abs().min() > 0


def test_pixels_are_float32():
    assert SPEC.prepare(torch.zeros(1, 3, 16, 16, dtype=torch.bfloat16)).dtype == torch.float32


@pytest.mark.parametrize("scale", [None, 7.0])
def test_similarity_is_the_scaled_cosine(scale):
    clip = tiny_models.clip_model()
    image = torch.rand(2, 3, 32, 32) * 2 - 1
    text = dict(tiny_models.tokenizer()(["a cat", "dogs"], padding="max_length", return_tensors="pt"))
    similarity = clip_similarity(clip, image, text, scale)
    output = clip(pixel_values=PixelSpec.from_clip(clip).prepare(image), **text)
    expected = torch.einsum("bd,bd->b", output.image_embeds, output.text_embeds) * (scale or clip.logit_scale.exp())
    torch.testing.assert_close(similarity, expected)


# ---- the one-step preview ------------------------------------------------------------------------------------------

SCHEDULE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def make_scheduler(name: str, **config):
    """A scheduler that neither clips nor thresholds its prediction, as Stable Diffusion's do not."""
    scheduler_class = getattr(diffusers, name)
    known = inspect.signature(scheduler_class.__init__).parameters
    config = {**SCHEDULE, "clip_sample": False, **config}
    return scheduler_class(**{key: value for key, value in config.items() if key in known})


def preview(scheduler, model_input: torch.Tensor, noise_pred: torch.Tensor, timestep) -> torch.Tensor:
    return predict_x0(model_input, noise_pred, signal_level(scheduler, timestep), scheduler.config.prediction_type)


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize(
    "name",
    [
        "DDIMScheduler",
        "DDPMScheduler",
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "LMSDiscreteScheduler",
    ],
)
def test_preview_is_the_schedulers_own(name, prediction_type):
    if name == "EulerAncestralDiscreteScheduler" and prediction_type == "sample":
        prediction_type = "epsilon"  # it knows no other
    scheduler = make_scheduler(name, prediction_type=prediction_type)
    scheduler.set_timesteps(5)
    generator = tiny_models.generator()
    latents = torch.randn(1, 4, 8, 8, generator=generator) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        noise_pred = torch.randn(latents.shape, generator=generator)
        x0 = preview(scheduler, scheduler.scale_model_input(latents, timestep), noise_pred, timestep)
        output = scheduler.step(noise_pred, timestep, latents)
        own = getattr(output, "pred_original_sample", None)
        torch.testing.assert_close(x0, own, rtol=1e-4, atol=1e-4)
        latents = output.prev_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample"])
@pytest.mark.parametrize("sigmas", ["own", "karras"])
@pytest.mark.parametrize(
    "name",
    [
        "PNDMScheduler",
        "DPMSolverMultistepScheduler",
        "DPMSolverSinglestepScheduler",
        "UniPCMultistepScheduler",
        "DEISMultistepScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",  # every second evaluation stands between two sigmas
    ],
)
def test_preview_finds_the_clean_latents(name, sigmas, prediction_type):
    """With the true noise (or latents) predicted at each step, every solver's path is straight: x0 never changes."""
    if name in ("PNDMScheduler", "KDPM2DiscreteScheduler"):
        prediction_type = "epsilon"  # they know no other
    scheduler = make_scheduler(name, prediction_type=prediction_type, use_karras_sigmas=sigmas == "karras")
    scheduler.set_timesteps(6)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=tiny_models.generator())
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    for timestep in scheduler.timesteps:
        predicted = noise if prediction_type == "epsilon" else clean
        x0 = preview(scheduler, scheduler.scale_model_input(latents, timestep), predicted, timestep)
        torch.testing.assert_close(x0, clean, rtol=1e-4, atol=1e-4)
        latents = scheduler.step(predicted, timestep, latents).prev_sample


def test_preview_of_ancestral_second_order_steps():
    """The first step's two evaluations; then fresh noise bends the path."""
    scheduler = make_scheduler("KDPM2AncestralDiscreteScheduler")
    scheduler.set_timesteps(6)
    clean, noise = torch.randn(2, 1, 4, 8, 8, generator=tiny_models.generator())
    latents = scheduler.add_noise(clean, noise, scheduler.timesteps[:1])
    for timestep in scheduler.timesteps[:2]:
        x0 = preview(scheduler, scheduler.scale_model_input(latents, timestep), noise, timestep)
        torch.testing.assert_close(x0, clean, rtol=1e-4, atol=1e-4)
        latents = scheduler.step(noise, timestep, latents).prev_sample


@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
@pytest.mark.parametrize("name", ["LCMScheduler", "TCDScheduler"])
def test_preview_of_few_step_schedulers_is_the_ddim_one(name, prediction_type):
    """They do not tell their x0 by itself; at the same timestep it is DDIM's."""
    scheduler, ddim = (make_scheduler(one, prediction_type=prediction_type) for one in (name, "DDIMScheduler"))
    scheduler.set_timesteps(4)
    ddim.set_timesteps(4)
    latents, noise_pred = torch.randn(2, 1, 4, 8, 8, generator=tiny_models.generator())
    for timestep in scheduler.timesteps:
        own = ddim.step(noise_pred, timestep, latents).pred_original_sample
        torch.testing.assert_close(preview(scheduler, latents, noise_pred, timestep), own, rtol=1e-4, atol=1e-4)


def same(one, other) -> bool:
    if isinstance(one, torch.Tensor):
        return isinstance(other, torch.Tensor) and torch.equal(one.nan_to_num(), other.nan_to_num())
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return str(one) == str(other)


@pytest.mark.parametrize("name", [scheduler.name for scheduler in KarrasDiffusionSchedulers])
def test_asking_for_the_signal_level_leaves_the_scheduler_alone(name):
    if name in ("DPMSolverSDEScheduler", "EDMEulerScheduler"):  # needs torchsde; is refused
        name = "DDIMScheduler"
    scheduler = make_scheduler(name)
    scheduler.set_timesteps(4)
    latents = torch.randn(1, 4, 2, 2) * scheduler.init_noise_sigma
    for timestep in scheduler.timesteps:
        model_input = scheduler.scale_model_input(latents, timestep)
        before = copy.deepcopy(vars(scheduler))
        signal_level(scheduler, timestep)
        assert same(vars(scheduler), before)
        latents = scheduler.step(model_input, timestep, latents).prev_sample


@pytest.mark.parametrize(
    "scheduler",
    [
        diffusers.FlowMatchEulerDiscreteScheduler(),
        diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction"),
        diffusers.EDMEulerScheduler(),
        diffusers.EDMDPMSolverMultistepScheduler(),
    ],
    ids=lambda scheduler: type(scheduler).__name__,
)
def test_schedulers_of_another_kind_are_refused(scheduler):
    scheduler.set_timesteps(4)
    with pytest.raises(ValueError, match="`scheduler`.*does not tell the noise level"):
        signal_level(scheduler, scheduler.timesteps[0])


def test_unknown_predictions_are_refused():
    with pytest.raises(ValueError, match="`prediction_type` has to be .* 'flow'"):
        predict_x0(torch.zeros(1), torch.zeros(1), 0.5, "flow")


def test_preview_is_float32_for_half_precision_networks():
    latents, noise = torch.randn(2, 1, 4, 8, 8).bfloat16()
    x0 = predict_x0(latents, noise, 0.01, "epsilon")
    expected = (latents.double() - 0.99**0.5 * noise.double()) / 0.1
    assert x0.dtype == torch.float32
    torch.testing.assert_close(x0, expected.float(), rtol=1e-4, atol=1e-4)


# ---- pictures ------------------------------------------------------------------------------------------------------


def gradient_image(size: int = 4) -> PIL.Image.Image:
    """Bright on the right, dark on the left."""
    return PIL.Image.fromarray(np.tile(np.linspace(0, 255, size).astype(np.uint8), (size, 1)))


def test_gray_and_palette_pictures_become_rgb():
    gray = gradient_image()
    for image in (gray, gray.convert("P"), gray.convert("LA"), gray.convert("RGB"), gray.convert("CMYK")):
        assert to_rgb(image).mode == "RGB"
        assert np.abs(np.asarray(to_rgb(image)).astype(int) - np.asarray(gray)[..., None]).max() <= 1, image.mode
    assert np.asarray(to_rgb(gray.convert("1", dither=0))).max() == 255


@pytest.mark.parametrize("bits", [12, 16])
def test_white_is_the_least_that_is_not_exceeded(bits):
    """Of 255, 4095 and 65535: cameras' 12 bits come in 16."""
    white = 2**bits - 1
    pixels = np.array([[0, white // 2, white]], dtype=np.uint16)
    for image in (pixels, PIL.Image.fromarray(pixels)):
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 127, 255]


@pytest.mark.parametrize("dtype, mode", [(np.uint16, "I;16"), (np.int32, "I")])
def test_sixteen_bits_are_scaled_by_their_range_not_by_the_brightest_pixel(dtype, mode):
    image = PIL.Image.fromarray(np.array([[0, 16384, 32896]], dtype=dtype))
    assert image.mode == mode
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 64, 128]


def test_thirty_two_bit_modes_may_hold_eight_bit_values():
    for dtype in (np.int32, np.float32):
        image = PIL.Image.fromarray(np.array([[0, 100, 255]], dtype=dtype))
        assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 100, 255]
        with pytest.raises(ValueError, match="`image` has pixels below 0"):
            to_rgb(PIL.Image.fromarray(np.array([[-5, 100]], dtype=dtype)))


def test_pictures_of_floats_may_lie_in_zero_to_one_and_have_to_be_finite():
    image = PIL.Image.fromarray(np.array([[0, 0.2, 1]], dtype=np.float32))
    assert np.asarray(to_rgb(image))[0, :, 0].tolist() == [0, 51, 255]
    with pytest.raises(ValueError, match="`mask_image` has pixels .*not finite"):
        to_rgb(PIL.Image.fromarray(np.array([[0, np.nan]], dtype=np.float32)), "mask_image")


def test_transparency_is_laid_on_white():
    image = PIL.Image.new("RGBA", (2, 1), (10, 20, 30, 255))
    image.putpixel((1, 0), (10, 20, 30, 0))
    assert np.asarray(to_rgb(image)).tolist() == [[[10, 20, 30], [255, 255, 255]]]
    palette = PIL.Image.new("P", (1, 1), 0)
    palette.info["transparency"] = 0
    assert to_rgb(palette).getpixel((0, 0)) == (255, 255, 255)


def test_exif_rotation_is_applied():
    image = PIL.Image.new("RGB", (3, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    image.getexif()[0x0112] = 6  # the camera was turned: the top left corner belongs at the top right
    upright = to_rgb(image)
    assert upright.size == (2, 3)
    assert upright.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 1), (4, 6, 3), (4, 6, 4)], ids=str)
@pytest.mark.parametrize("dtype", [np.uint8, np.float32, np.float64])
def test_arrays_become_pictures(shape, dtype):
    array = np.full(shape, 51 if dtype == np.uint8 else 0.2, dtype)
    if shape[-1] == 4:
        array[..., 3] = 255 if dtype == np.uint8 else 1
    image = to_rgb(array)
    assert (image.mode, image.size) == ("RGB", (6, 4))
    assert np.unique(np.asarray(image)).tolist() == [51]


@pytest.mark.parametrize("shape", [(4, 6), (4, 6, 3)], ids=str)
def test_sixteen_bit_arrays_become_pictures(shape):
    assert np.unique(np.asarray(to_rgb(np.full(shape, 32896, np.uint16)))).tolist() == [128]


def test_booleans_are_black_and_white():
    for function in (to_rgb, to_mask):
        assert np.asarray(function(np.array([[False, True]])).convert("L")).tolist() == [[0, 255]]


@pytest.mark.parametrize(
    "array",
    [
        np.zeros((3, 4, 6), np.uint8),
        np.zeros((4, 6, 2), np.uint8),
        np.zeros(5, np.uint8),
        np.zeros((0, 4, 3), np.uint8),
        np.zeros((4, 6), np.int64),
        np.full((4, 6), 1.5),
        np.full((4, 6), -0.1),
        np.full((4, 6), np.nan),
        np.full((4, 6), "x"),
    ],
    ids=["channels first", "two channels", "one axis", "empty", "int64", "above", "below", "nan", "text"],
)
def test_other_arrays_are_refused(array):
    with pytest.raises(ValueError, match="`image` "):
        to_rgb(array)


def test_transparent_parts_of_a_mask_are_black():
    image = PIL.Image.new("LA", (2, 1), (200, 255))
    image.putpixel((1, 0), (200, 0))
    assert np.asarray(to_mask(image)).tolist() == [[200, 0]]


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.float32])
def test_masks_of_ones_are_white_there(dtype):
    ones = np.array([[0, 1]], dtype=dtype)
    for mask in (ones, PIL.Image.fromarray(ones)):
        assert np.asarray(to_mask(mask)).tolist() == [[0, 255]]
    if dtype != np.float32:
        assert np.asarray(to_mask(np.array([[0, 1, 255]], dtype=dtype))).tolist() == [[0, 1, 255]]


@settings(max_examples=30)
@given(st.integers(1, 5000), st.integers(1, 5000))
def test_fitted_sizes_keep_area_and_aspect(width, height):
    fitted = fit_size(width, height, area=512 * 512)
    assert all(side % 8 == 0 and side >= 8 for side in fitted)
    exact = [(512 * 512 * a / b) ** 0.5 for a, b in ((width, height), (height, width))]
    for side, wanted in zip(fitted, exact):
        assert side == max(8, side) and abs(side - wanted) <= max(4, 8 - wanted) + 1e-6


# ---- contexts and records ------------------------------------------------------------------------------------------


def test_forked_generators_draw_the_same_and_leave_theirs_alone():
    generator, untouched = tiny_models.generator(), tiny_models.generator()
    copied = torch.randn(5, generator=fork_generator(generator))
    expected = torch.randn(5, generator=untouched)
    assert torch.equal(copied, expected)
    assert torch.equal(torch.randn(5, generator=generator), expected)
    forks = fork_generator([tiny_models.generator(1), tiny_models.generator(2)])
    assert torch.equal(torch.randn(5, generator=forks[1]), torch.randn(5, generator=tiny_models.generator(2)))


def test_without_a_generator_the_global_one_is_forked():
    torch.manual_seed(3)
    copied = torch.randn(5, generator=fork_generator(None))
    assert torch.equal(copied, torch.randn(5))


def test_frozen_restores_every_flag():
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Dropout(), torch.nn.Linear(2, 2))
    module.train()
    module[1].eval()
    module[0].weight.requires_grad_(False)
    flags = [True, False, True]
    with pytest.raises(KeyboardInterrupt):
        with frozen(module):
            assert not any(weight.requires_grad for weight in module.parameters())
            assert not any(part.training for part in module.modules())
            raise KeyboardInterrupt
    assert [part.training for part in module] == flags and module.training
    assert [weight.requires_grad for weight in module.parameters()] == [False, True, True, True]


def test_what_several_threads_froze_thaws_with_the_last_of_them():
    """And what only one of them froze, with that one."""
    shared, mine, others = (torch.nn.Linear(2, 2).train() for _ in range(3))
    entered, leave = threading.Event(), threading.Event()

    def other():
        with frozen(shared, others):
            entered.set()
            leave.wait(10)

    thread = threading.Thread(target=other)
    with frozen(mine, shared):
        thread.start()
        assert entered.wait(10)
    assert mine.training and mine.weight.requires_grad
    assert not (shared.training or shared.weight.requires_grad), "the other is still at work"
    leave.set()
    thread.join()
    assert all(module.training and module.weight.requires_grad for module in (shared, others))


# ---- settings ------------------------------------------------------------------------------------------------------


def test_the_table_of_settings_tells_the_range_of_each():
    """What it says is right is taken, what it says is not is refused by name; scripts make their options of it."""
    for part in fields(GuidanceSettings):
        low, high = part.metadata["low"], part.metadata["high"]
        assert low <= part.default <= high if part.default is not None else "None" in str(part.type), part.name
        for bad in (low - 1, high + 1):
            if math.isfinite(bad):
                with pytest.raises(ValueError, match=f"`{part.name}` has to lie in .*{bad}"):
                    GuidanceSettings(**{part.name: bad})
        for bad in ("1", True, *([] if part.type is float else [1.5])):
            with pytest.raises(TypeError, match=f"`{part.name}` has to be a"):
                GuidanceSettings(**{part.name: bad})


def test_the_papers_numbers_are_the_defaults():
    paper = {"max_inner_steps": 10, "emotion_learning_rate": 0.01, "loss_threshold": 1e-4, "update_interval": 1}
    paper |= {"inherent_weight": 0.0005, "similar_weight": 0.0015, "semantic_threshold": 18.0}
    neutral = {"emotion_strength": 1.0, "latest_start": 1.0, "max_inner_batch": None, "preview_scale": 1.0}
    neutral |= {"degraded_copies": 0}
    assert {part.name: part.default for part in fields(GuidanceSettings)} == paper | neutral


def test_masks_are_what_was_drawn_whatever_their_colours():
    strokes = np.array([[0, 255]], dtype=np.uint8)
    black, alpha = PIL.Image.new("L", (2, 1)), PIL.Image.fromarray(strokes)
    segments = PIL.Image.fromarray(strokes // 255).convert("P")
    segments.putpalette([0, 0, 0, 128, 0, 0])  # as segmenters colour their classes
    inverted = PIL.Image.fromarray(strokes // 255).convert("P")
    inverted.putpalette([255, 255, 255, 0, 0, 0])
    masks = {"strokes": PIL.Image.merge("LA", [black, alpha]), "segments": segments, "inverted": inverted}
    seen = {name: np.asarray(to_mask(mask)).tolist() for name, mask in masks.items()}
    assert seen == {"strokes": [[0, 255]], "segments": [[0, 255]], "inverted": [[255, 0]]}


def test_a_closed_picture_is_named(tmp_path):
    PIL.Image.new("RGB", (4, 4)).save(tmp_path / "picture.png")
    picture = PIL.Image.open(tmp_path / "picture.png")
    picture.close()
    with pytest.raises(ValueError, match="`image` cannot be read.*load_image"):
        to_rgb(picture)


def test_degraded_pictures_are_another_look_at_the_same():
    """Not far off, alike for all of a batch, another for another draw, and with gradients everywhere."""
    pixels = F.interpolate(torch.randn(2, 3, 8, 8, generator=generator()), size=64, mode="bicubic").clamp(-1, 1)
    pixels.requires_grad_()
    first, same, other = (degrade(pixels, generator(seed)) for seed in (1, 1, 2))
    assert first.shape == pixels.shape and torch.equal(first, same) and not torch.equal(first, other)
    torch.testing.assert_close(first[:1], degrade(pixels[:1], generator(1)), rtol=0, atol=1e-5)
    for one in (first, other):
        change = (one - pixels).abs().mean().item()
        assert 0.02 < change < 0.35, "mean of two"
        correlation = torch.corrcoef(torch.stack([one.flatten(), pixels.flatten()]))[0, 1]
        assert correlation > 0.7
    (gradient,) = torch.autograd.grad(first.square().sum(), pixels)
    assert gradient.isfinite().all() and (gradient != 0).float().mean() > 0.8
    assert degrade(torch.zeros(1, 3, 24, 40, dtype=torch.float16), generator()).shape == (1, 3, 24, 40)
