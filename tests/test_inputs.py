"""Bad input gets an error that names the argument, before any work is done, and leaves a working pipeline."""

import math

import numpy as np
import PIL.Image
import pytest
import tiny_models
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tiny_models import generator, guide
from transformers import ViTConfig, ViTForImageClassification


IMAGE = PIL.Image.new("RGB", (32, 32), "teal")
EMBEDS = torch.zeros(1, 16, 32)
TWO_SIZES = [IMAGE, PIL.Image.new("RGB", (32, 48))]
EDIT = {"image": IMAGE}

# name of the argument that the message has to name -> calls that are wrong about it
BAD = {
    "emotion": [
        {"emotion": "joy"},
        {"emotion": ["awe", "joy"], "prompt": ["a", "b"]},
        {"emotion": ["awe", "fear"]},
        {"emotion": ["awe", "fear", "anger"], "prompt": ["a", "b"]},
        {"emotion": []},
        {"emotion": {}},
        {"emotion": {"awe": -1.0}},
        {"emotion": {"awe": math.nan}},
        {"emotion": {"awe": math.inf}},
        {"emotion": {"awe": 1e308, "fear": 1e308}},
        {"emotion": {"awe": 0, "fear": 0}},
        {"emotion": {"awe": "much"}},
        {"emotion": {"awe": True}},
        {"emotion": {"joy": 1.0}},
        {"emotion": 3},
        {"emotion": [["awe"]]},
        {"emotion": ["awe"], "prompt_embeds": EMBEDS.expand(2, -1, -1), "prompt": None},
    ],
    "prompt": [
        {"prompt": 5},
        {"prompt": []},
        {"prompt": None, "emotion": [None, "awe"]},
        {"prompt": None, "emotion": None, "image": IMAGE},
        {"prompt_embeds": EMBEDS},
    ],
    "image": [
        {"image": "photo.jpg"},
        {"image": 7},
        {"image": []},
        {"image": [IMAGE, None]},
        {"image": [IMAGE, IMAGE, IMAGE], "prompt": ["a", "b"]},
        {"image": TWO_SIZES, "prompt": ["a", "b"]},
        {"image": [torch.zeros(3, 32, 32), IMAGE], "prompt": ["a", "b"]},
        {"image": [IMAGE, torch.zeros(3, 32, 32)], "prompt": ["a", "b"]},
        {"image": [torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)], "prompt": ["a", "b"]},
        {"image": torch.zeros(32, 32)},
        {"image": torch.zeros(4, 32, 32)},
        {"image": torch.zeros(1, 1, 3, 32, 32)},
        {"image": torch.zeros(3, 0, 32)},
        {"image": torch.full((3, 32, 32), math.nan)},
        {"image": torch.full((3, 32, 32), 200.0)},
        {"image": torch.full((3, 32, 32), -1.0)},
        {"image": torch.full((3, 32, 32), 200, dtype=torch.uint8)},
        {"image": np.zeros((3, 32, 32), np.uint8)},
        {"image": np.full((32, 32, 3), 2.0)},
        {"image": np.zeros((32, 32), np.int64)},
        {"image": PIL.Image.new("RGB", (0, 0))},
        {"guidance_reference": "source"},
    ],
    "strength": [EDIT | {"strength": value} for value in (0, -0.5, 1.5, math.nan, "full", None, True, 0.01)],
    "num_inference_steps": [
        *({"num_inference_steps": value} for value in (0, -1, 2.5, "3", None, True, math.nan)),
        *(EDIT | {"num_inference_steps": value} for value in (0, 2.5, 1001)),
    ],
    "timesteps": [EDIT | {"timesteps": [500, 1]}],
    "sigmas": [EDIT | {"sigmas": [1.0]}],
    "guidance_reference": [{"guidance_reference": "prompt"}, {"guidance_reference": 1}],
    "negative_prompt": [
        EDIT | {"guidance_reference": "source", "negative_prompt": "rain"},
        {"negative_prompt": ["rain", "snow"]},
    ],
    "emotion_tokens": [
        {"emotion_tokens": torch.zeros(4, 31)},
        {"emotion_tokens": torch.zeros(32)},
        {"emotion_tokens": torch.zeros(0, 32)},
        {"emotion_tokens": torch.zeros(3, 4, 32)},
        {"emotion_tokens": torch.zeros(4, 32), "num_emotion_tokens": 5},
        {"emotion_tokens": torch.full((4, 32), math.nan)},
        {"emotion_tokens": [[0.0] * 32]},
        {"emotion_tokens": torch.zeros(4, 32), "emotion": None},
        {"emotion_tokens": torch.zeros(4, 32), "emotion": None, "image": IMAGE},
    ],
    "num_emotion_tokens": [{"num_emotion_tokens": value} for value in (0, -1, 1.5, "4", True)],
    "emotion_token_init": [{"emotion_token_init": value} for value in ("zero", None, 1)],
    "max_inner_steps": [{"max_inner_steps": value} for value in (-1, 1.5, "10", None, True)],
    "loss_threshold": [{"loss_threshold": value} for value in (math.nan, "low", None)],
    "stop_probability": [{"stop_probability": value} for value in (-0.1, 1.1, math.nan, "high")],
    "semantic_threshold": [{"semantic_threshold": value} for value in (-1, math.nan, "high", True)],
    "semantic_prompt": [
        {"semantic_prompt": 5},
        {"semantic_prompt": ["a", "b"]},
        {"semantic_prompt": [1]},
        {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": EMBEDS, "semantic_threshold": 3},
    ],
    "similar_emotions": [
        {"similar_emotions": "all"},
        {"similar_emotions": ["joy"]},
        {"similar_emotions": {"awe": ["joy"]}},
        {"similar_emotions": 3},
    ],
    "mask_image": [
        {"mask_image": IMAGE},
        {"mask_image": IMAGE, "emotion": None},
        EDIT | {"mask_image": "mask.png"},
        EDIT | {"mask_image": []},
        EDIT | {"mask_image": [IMAGE, IMAGE]},
        EDIT | {"mask_image": torch.zeros(3, 32, 32)},
        EDIT | {"mask_image": torch.full((1, 32, 32), 2.0)},
        EDIT | {"mask_image": np.full((32, 32), -1.0)},
    ],
    "emotion_strength": [{"emotion_strength": value} for value in (0, -1, 1.1, math.nan, "full", None, True)],
    "emotion_prompts": [
        {"emotion_prompts": value}
        for value in (
            "awe",
            ["awe"],
            {},
            {"awe": "awe"},
            {"awe": "a", "fear": []},
            {"awe": "a", "fear": [1]},
            {"awe": "a", "fear": 3},
            {"awe": "a", 3: "b"},
        )
    ]
    + [{"emotion": None, "emotion_prompts": {"awe": "a", "fear": "b"}}],
    "max_inner_batch": [{"max_inner_batch": value} for value in (0, -1, 1.5, "4", True)],
    "gradient_checkpointing": [{"gradient_checkpointing": value} for value in (None, 1, "yes")],
    "guided_preview": [{"guided_preview": 1}],
    "carry_emotion_tokens": [{"carry_emotion_tokens": "yes"}],
    "num_images_per_prompt": [{"num_images_per_prompt": value} for value in (0, -1, 1.5, None)],
    "guidance_scale": [{"guidance_scale": value} for value in (math.nan, math.inf, "7.5", None)],
    "guidance_rescale": [{"guidance_rescale": value} for value in (-0.1, 1.1, math.nan)],
    "generator": [
        {"generator": [generator()] * 2},
        {"generator": []},
        {"generator": 0},
        {"generator": [0]},
        {"generator": [generator()], "num_images_per_prompt": 2},
    ],
    "latents": [
        {"latents": torch.zeros(2, 4, 16, 16)},
        {"latents": torch.zeros(1, 3, 16, 16)},
        {"latents": torch.zeros(4, 16, 16)},
        {"latents": [0.0]},
        EDIT | {"latents": torch.zeros(1, 4, 16, 16), "num_images_per_prompt": 2},
    ],
    "height": [{"height": 33, "width": 32}, EDIT | {"height": 33, "width": 32}],
    "callback_on_step_end_tensor_inputs": [{"callback_on_step_end_tensor_inputs": ["noise"]}],
    "emotoin": [{"emotoin": "awe"}, {"emotion": None, "emotoin": "awe"}],
}
NUMBERS = ["emotion_learning_rate", "inherent_weight", "similar_weight", "max_token_norm", "similarity_scale"]
BAD |= {name: [{name: value} for value in (-1.0, math.nan, math.inf, "0.1", True)] for name in NUMBERS}

MODULES = ["text_encoder", "unet", "vae", "clip_model", "emotion_classifier"]


@pytest.fixture(scope="module")
def counted():
    """One pipeline for all, since bad input must not hurt it, and the count of its modules' calls."""
    from conftest import CallCounter

    pipe = tiny_models.muse_pipeline()
    return pipe, CallCounter(*(getattr(pipe, name) for name in MODULES))


@pytest.fixture(scope="module")
def expected(counted):
    return guide(counted[0], num_inference_steps=1).images


@pytest.mark.parametrize(
    "name, call", [(name, call) for name, calls in BAD.items() for call in calls], ids=lambda value: str(value)[:60]
)
def test_bad_input_is_named_before_any_work(counted, name, call):
    pipe, calls = counted
    before = len(calls)
    with pytest.raises((ValueError, TypeError), match=rf"\b{name}\b"):
        guide(pipe, **call)
    assert len(calls) == before


def test_the_pipeline_works_right_after(counted, expected):
    pipe, _ = counted
    for calls in BAD.values():
        for call in calls:
            with pytest.raises((ValueError, TypeError)):
                guide(pipe, **call)
    assert torch.equal(guide(pipe, num_inference_steps=1).images, expected)


NUMERIC = {
    "strength": (1e-9, 1),
    "num_inference_steps": (1, 1000),
    "max_inner_steps": (0, math.inf),
    "stop_probability": (0, 1),
    "semantic_threshold": (0, math.inf),
    "num_emotion_tokens": (1, math.inf),
    "num_images_per_prompt": (1, math.inf),
    "guidance_rescale": (0, 1),
    "emotion_strength": (5e-324, 1),
    "max_inner_batch": (1, math.inf),
    "guidance_scale": (-1e6, 1e6),
    **dict.fromkeys(NUMBERS, (0, 1e6)),
}


@pytest.mark.parametrize("name", NUMERIC)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(value=st.floats() | st.integers() | st.text(max_size=3) | st.booleans() | st.binary(max_size=2))
def test_numbers_out_of_range_are_refused_whatever_they_are(counted, name, value):
    low, high = NUMERIC[name]
    if isinstance(value, (int, float)) and not isinstance(value, bool) and low <= value <= high:
        return  # fine, or too small a fraction of the steps; the table has those
    pipe, calls = counted
    before = len(calls)
    with pytest.raises((ValueError, TypeError), match=rf"`{name}`"):
        guide(pipe, **(EDIT if name == "strength" else {}), **{name: value})
    assert len(calls) == before


def test_an_unknown_emotion_is_told_which_are_known(counted):
    with pytest.raises(ValueError, match="'joy'.*'amusement', 'anger', 'awe', 'contentment', 'disgust'"):
        guide(counted[0], emotion="joy")


def test_without_a_classifier_it_says_how_to_get_one():
    pipe = tiny_models.muse_pipeline(emotion_classifier=None)
    pipe.clip_model = None
    assert pipe.emotion_labels == []
    with pytest.raises(ValueError, match="emotion_classifier.*load_emotion_classifier"):
        guide(pipe)
    assert guide(pipe, emotion=None).images.isfinite().all()


def test_a_classifier_without_a_pixel_format_is_told_how_to_load_it():
    config = ViTConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=32, num_labels=2
    )
    pipe = tiny_models.muse_pipeline(emotion_classifier=ViTForImageClassification(config))
    with pytest.raises(ValueError, match="image_mean.*load_emotion_classifier"):
        guide(pipe, emotion="LABEL_0")


@pytest.mark.parametrize("threshold", [3.0, None])
def test_a_gate_without_clip_is_refused(threshold):
    pipe = tiny_models.muse_pipeline(clip_model=None)
    with pytest.raises(ValueError, match="semantic_threshold.*clip_model"):
        guide(pipe, semantic_threshold=threshold)


def test_inference_mode_is_refused(counted):
    pipe, calls = counted
    before = len(calls)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        guide(pipe)
    assert len(calls) == before
    with torch.inference_mode():
        assert guide(pipe, emotion=None).images.isfinite().all(), "stock needs no gradients"
    with torch.no_grad():
        assert guide(pipe, num_inference_steps=1).trace[0].inner_steps == 2


def test_weights_made_in_inference_mode_are_refused():
    with torch.inference_mode():
        pipe = tiny_models.muse_pipeline()
    with pytest.raises(ValueError, match="inference_mode"):
        guide(pipe)


def test_schedulers_without_a_noise_level_are_refused(counted):
    import diffusers

    pipe = tiny_models.muse_pipeline()
    pipe.scheduler = diffusers.EDMEulerScheduler()
    with pytest.raises(ValueError, match="`scheduler` EDMEulerScheduler"):
        guide(pipe)


@pytest.mark.parametrize(
    "call, name",
    [
        ({"image": "photo.jpg"}, "image"),
        ({"strength": 0}, "strength"),
        ({"num_inference_steps": 0}, "num_inference_steps"),
        ({"num_inference_steps": 5000}, "num_inference_steps"),
        ({"prompt": ["a", "b"], "image": [IMAGE] * 3}, "image"),
        ({"prompt": 7}, "prompt"),
        ({"height": 33, "width": 32}, "height"),
    ],
    ids=str,
)
def test_inversion_checks_its_input(counted, call, name):
    pipe, calls = counted
    before = len(calls)
    with pytest.raises((ValueError, TypeError), match=rf"`{name}`"):
        pipe.invert(**{"image": IMAGE, **call})
    assert len(calls) == before
