"""
Bad input gets an error that names the argument, before any network is called, and leaves a working pipeline.

Every argument that MUSE adds to the parent's stands in two tables here: in `bad_calls` with calls that are wrong about
it, and in `ARGUMENTS` with a strategy that makes values near what is right, and an oracle that tells which are right.
Of the parent's, `bad_calls` has those that people get wrong and that the parent finds late, deep in some network.
"""

import difflib
import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from fractions import Fraction
from typing import Any

import diffusers
import numpy as np
import PIL.Image
import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling_simemo import EMOSET_LABELS
from tiny_models import FAMILIES, STABLE_DIFFUSION, STABLE_DIFFUSION_XL, generator, guide
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import ViTConfig, ViTForImageClassification

from pipeline_muse import GONE, GuidanceSettings


IMAGE = PIL.Image.new("RGB", (32, 32), "teal")
TWO_SIZES = [IMAGE, PIL.Image.new("RGB", (32, 48))]
EDIT = {"image": IMAGE}
SETTINGS = {part.name: part for part in fields(GuidanceSettings)}


@pytest.fixture(scope="module")
def pipe(request) -> Iterator[DiffusionPipeline]:
    """One pipeline for all, since bad input must not hurt it."""
    pipe = tiny_models.muse_pipeline(getattr(request, "param", STABLE_DIFFUSION))
    expected = guide(pipe, num_inference_steps=1).images
    yield pipe
    assert torch.equal(guide(pipe, num_inference_steps=1).images, expected)


class NetworkCalled(Exception):
    """The checks were passed, and the work began."""


@contextmanager
def no_network() -> Iterator[None]:
    """Whoever calls any module ends there."""

    def stop(module, arguments):
        raise NetworkCalled

    handle = register_module_forward_pre_hook(stop)
    try:
        yield
    finally:
        handle.remove()


def invert(pipe: DiffusionPipeline, **arguments) -> torch.Tensor:
    return pipe.invert(**{"image": IMAGE, "num_inference_steps": 3, **arguments})


CALLS = {"__call__": guide, "invert": invert}
every_pipe = pytest.mark.parametrize("pipe", FAMILIES, ids=str, indirect=True)


def parameters(pipeline_class: type[DiffusionPipeline]) -> list[str]:
    return [name for name in inspect.signature(pipeline_class.__call__).parameters if name not in ("self", "kwargs")]


PARENTS = parameters(STABLE_DIFFUSION.parent_class)
OURS = [name for name in parameters(STABLE_DIFFUSION.pipeline_class) if name not in PARENTS]


def is_xl(pipe: DiffusionPipeline) -> bool:
    return isinstance(pipe, STABLE_DIFFUSION_XL.pipeline_class)


def width(pipe: DiffusionPipeline) -> int:
    """Of prompt embeddings and tokens."""
    return pipe.unet.config.cross_attention_dim


def embeds(pipe: DiffusionPipeline, prefix: str = "", rows: int = 1) -> dict[str, torch.Tensor]:
    """Embeddings to pass in place of texts; SDXL wants pooled ones too."""
    pooled = {f"{prefix}pooled_prompt_embeds": torch.zeros(rows, 16)} if is_xl(pipe) else {}
    return {f"{prefix}prompt_embeds": torch.zeros(rows, 16, width(pipe)), **pooled}


def no_prompt(pipe: DiffusionPipeline, rows: int = 1) -> dict[str, Any]:
    """Embeddings in place of the prompt."""
    return {"prompt": None, **embeds(pipe, rows=rows)}


def both(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Embeddings in place of the prompt and of the negative one."""
    return no_prompt(pipe) | embeds(pipe, "negative_")


# ---- calls that are wrong ------------------------------------------------------------------------------------------


def each(name: str, *values: Any, **beside: Any) -> list[dict[str, Any]]:
    return [{**beside, name: value} for value in values]


def bad_of_parents(pipe: DiffusionPipeline) -> dict[str, list[dict[str, Any]]]:
    """Of the parent's arguments, those that it finds late."""
    d = width(pipe)
    calls = {
        "prompt": [
            *each("prompt", 5, ["a", 3], ("a", "b"), b"a"),
            {"prompt": None, "emotion": [None, "awe"]},
            {"prompt": None, "emotion": None, "image": IMAGE},
            embeds(pipe) | {"prompt": "a cat"},
        ],
        "prompt_embeds": [
            no_prompt(pipe) | {"prompt_embeds": value}
            for value in (
                [[0.0] * d],
                torch.zeros(16, d),
                torch.zeros(1, 16, d + 1),
                torch.zeros(0, 16, d),
                torch.zeros(1, 0, d),
                torch.zeros(1, 16, d, dtype=torch.int64),
                torch.full((1, 16, d), math.nan),
            )
        ],
        "negative_prompt_embeds": [
            both(pipe) | {"negative_prompt_embeds": value}
            for value in (0.0, torch.zeros(16, d), torch.zeros(2, 16, d), torch.zeros(1, 15, d))
        ],
        "height": [*each("height", 33), *each("height", 33, width=32, **EDIT)],
        "width": [*each("width", 33), *each("width", 33, height=32, **EDIT)],
        "num_inference_steps": [
            *each("num_inference_steps", 0, -1, 2.5, "3", None, True, math.nan, 1000, 1001),
            *each("num_inference_steps", 0, 2.5, 1000, 1001, **EDIT),
        ],
        "timesteps": [EDIT | {"timesteps": [500, 1]}],
        "sigmas": [EDIT | {"sigmas": [1.0]}],
        "num_images_per_prompt": each("num_images_per_prompt", 0, -1, 1.5, None),
        "generator": [
            *each("generator", [generator()] * 2, []),
            {"generator": [generator()], "num_images_per_prompt": 2},
        ],
        "latents": [
            *each("latents", torch.zeros(2, 4, 16, 16), torch.zeros(1, 3, 16, 16), torch.zeros(4, 16, 16), [0.0]),
            *each("latents", torch.zeros(1, 4, 0, 16), torch.full((1, 4, 16, 16), math.nan)),
            *each("latents", torch.zeros(1, 4, 16, 16, dtype=torch.int64), np.zeros((1, 4, 16, 16))),
            EDIT | {"latents": torch.zeros(1, 4, 16, 16), "num_images_per_prompt": 2},
            EDIT | {"latents": torch.zeros(1, 4, 16, 8)},
        ],
        "output_type": each("output_type", "jpeg", None, 1, ["pil"]),
        "callback_on_step_end_tensor_inputs": each("callback_on_step_end_tensor_inputs", ["noise"]),
    }
    if is_xl(pipe):
        pooled = (None, 0.0, torch.zeros(1, 15), torch.full((1, 16), math.inf))
        calls["pooled_prompt_embeds"] = [no_prompt(pipe) | {"pooled_prompt_embeds": value} for value in pooled]
        pooled = (None, 0.0, torch.zeros(16))
        calls["negative_pooled_prompt_embeds"] = [
            both(pipe) | {"negative_pooled_prompt_embeds": value} for value in pooled
        ]
        calls["denoising_end"] = [EDIT | {"denoising_end": 0.5}]
    return calls


def bad_pictures(pipe: DiffusionPipeline) -> dict[str, list[dict[str, Any]]]:
    two = {"prompt": ["a", "b"]}
    return {
        "image": [
            *each("image", "photo.jpg", 7, [], [IMAGE, None], IMAGE.tobytes(), {"image": IMAGE}),
            *each(
                "image", [IMAGE] * 3, TWO_SIZES, [torch.zeros(3, 32, 32), IMAGE], [IMAGE, torch.zeros(3, 8, 8)], **two
            ),
            *each("image", [torch.zeros(3, 32, 32), torch.zeros(3, 16, 16)], **two),
            *each("image", torch.zeros(32, 32), torch.zeros(4, 32, 32), torch.zeros(1, 1, 3, 32, 32)),
            *each("image", torch.zeros(3, 0, 32), *(torch.full((3, 32, 32), bad) for bad in (math.nan, 200.0, -1.0))),
            *each("image", torch.full((3, 32, 32), 200, dtype=torch.uint8), np.zeros((3, 32, 32), np.uint8)),
            *each("image", np.full((32, 32, 3), 2.0), np.zeros((32, 32), np.int64), np.array("photo.jpg")),
            *each("image", PIL.Image.new("RGB", (0, 0)), PIL.Image.new("F", (8, 8), math.nan)),
        ],
        "mask_image": [
            {"mask_image": IMAGE},
            {"mask_image": IMAGE, "emotion": None},
            *each(
                "mask_image", "mask.png", [], [IMAGE, IMAGE], torch.zeros(3, 32, 32), np.full((32, 32), -1.0), **EDIT
            ),
            *each("mask_image", torch.full((1, 32, 32), 2.0), PIL.Image.new("F", (8, 8), math.inf), **EDIT),
        ],
        "strength": each("strength", 0, -0.5, 1.5, math.nan, "full", None, True, 0.01, **EDIT),
    }


def bad_emotions(pipe: DiffusionPipeline) -> dict[str, list[dict[str, Any]]]:
    d, two = width(pipe), {"prompt": ["a", "b"]}
    tokens = [torch.zeros(4, d - 1), torch.zeros(d), torch.zeros(0, d), torch.zeros(3, 4, d), [[0.0] * d]]
    tokens += [torch.full((4, d), math.nan), torch.zeros(4, d, dtype=torch.int64), torch.zeros(4, d).numpy()]
    return {
        "emotion": [
            *each("emotion", "feer", ["awe", "fear"], [], {}, 3, [["awe"]], {"feer": 1.0}, {3: 1.0}, True, object()),
            *each("emotion", "", " ", "1", "!"),
            *each("emotion", *({"awe": bad} for bad in (-1.0, math.nan, math.inf, 10**400, "much", True, None))),
            *each("emotion", {"awe": 1e308, "fear": 1e308}, {"awe": 0, "fear": 0}),
            *each("emotion", ["awe", "feer"], ["awe", "fear", "anger"], [{"awe": 1}, {}], **two),
            no_prompt(pipe, rows=2) | {"emotion": ["awe"]},
        ],
        "preset": each("preset", "slow", 1, ["full"], None),
        "emotion_prompts": [
            *each("emotion_prompts", "awe", ["awe"], {}, {"awe": "awe"}, {"awe": "a", 3: "b"}, 3),
            *each("emotion_prompts", *({"awe": "a", "fear": bad} for bad in ([], [1], 3, None, b"b"))),
            {"emotion": None, "emotion_prompts": {"awe": "a", "fear": "b"}},
        ],
        "emotion_tokens": [
            *each("emotion_tokens", *tokens, "zero", 1, ["random"]),
            {"emotion_tokens": torch.zeros(4, d), "emotion": None},
            {"emotion_tokens": torch.zeros(4, d), "emotion": None, "image": IMAGE},
            *each(
                "emotion_tokens", {}, {"fear": tokens[-1]}, *({"awe": bad} for bad in (*tokens, torch.zeros(1, 4, d)))
            ),
            {"emotion_tokens": {"awe": torch.zeros(4, d)}, "emotion": {"awe": 0.5, "fear": 0.5}},
            {
                "emotion_tokens": {"awe": torch.zeros(4, d), "fear": torch.zeros(3, d)},
                "emotion": {"awe": 0.5, "fear": 0.5},
            },
        ],
        "semantic_prompt": [
            *each("semantic_prompt", 5, ["a", "b"], [1], [], ("a",)),
            no_prompt(pipe) | {"semantic_threshold": 3},
        ],
        "similar_emotions": [
            *each("similar_emotions", "all", "awe", ["joy"], [["awe"]], 3, {"awe": ["joy"]}, {"joy": ["awe"]}),
            *each("similar_emotions", {"awe": "fear"}, {"fear": None}, {"awe"}, np.array(["awe", "fear"])),
        ],
        **{name: [*each(name, *bad_numbers(part)), *each(name, "1", emotion=None)] for name, part in SETTINGS.items()},
    }


def bad_numbers(part: Any) -> list[Any]:
    """What a setting cannot be."""
    bad = [math.nan, "1", True, [1], *([] if part.type is float else [1.5])]
    if math.isfinite(part.metadata["low"]):
        bad.append(part.metadata["low"] - 1)
    if math.isfinite(part.metadata["above"]):
        bad += [part.metadata["above"], part.metadata["above"] - 1]
    if math.isfinite(part.metadata["high"]):
        bad += [part.metadata["high"] * 1.1, math.inf, 10**400]
    return bad


def bad_calls(pipe: DiffusionPipeline) -> dict[str, list[dict[str, Any]]]:
    """Name of the argument that the message has to name -> calls that are wrong about it."""
    return bad_of_parents(pipe) | bad_pictures(pipe) | bad_emotions(pipe)


def assert_refused(pipe: DiffusionPipeline, method: str, name: str, call: Mapping[str, Any]) -> None:
    """An error that names the argument, and no network was called."""
    with no_network(), pytest.raises((ValueError, TypeError)) as caught:
        CALLS[method](pipe, **call)
    assert f"`{name}`" in str(caught.value), (call, caught.value)


# Of the parent's; embeddings and tokens of XL have a width of their own
LATE = ["prompt", "prompt_embeds", "negative_prompt_embeds", "height", "width", "num_inference_steps", "timesteps"]
LATE += [
    "sigmas",
    "num_images_per_prompt",
    "generator",
    "latents",
    "output_type",
    "callback_on_step_end_tensor_inputs",
]
ONLY_XL = ["pooled_prompt_embeds", "negative_pooled_prompt_embeds", "denoising_end"]
CASES = [
    *((STABLE_DIFFUSION, name) for name in LATE + OURS),
    *((STABLE_DIFFUSION_XL, name) for name in ["prompt_embeds", "negative_prompt_embeds", "emotion_tokens", *ONLY_XL]),
]


@pytest.mark.parametrize("pipe, name", CASES, ids=lambda case: str(case), indirect=["pipe"])
def test_bad_input_is_named_before_any_work(pipe, name):
    for call in bad_calls(pipe)[name]:
        assert_refused(pipe, "__call__", name, call)


@pytest.mark.parametrize("name", ["image", "strength", "height", "num_inference_steps", "prompt_embeds", "timesteps"])
def test_bad_input_of_an_inversion_is_named_before_any_work(pipe, name):
    known = {"image", "prompt", "height", "width", "num_inference_steps", "strength", "prompt_embeds", "timesteps"}
    calls = [call for call in bad_calls(pipe)[name] if call.keys() <= known]
    assert calls
    for call in calls:
        assert_refused(pipe, "invert", name, call)


def test_every_argument_stands_in_both_tables(pipe):
    """A new argument without bad input, or one that is gone, fails here."""
    assert set(SETTINGS) < set(OURS) and len(OURS) <= 21
    assert set(bad_calls(pipe)) == set(LATE + OURS)
    assert set(ARGUMENTS) == set(OURS)
    for family in FAMILIES:
        signatures = [inspect.signature(one.__call__) for one in (family.pipeline_class, family.parent_class)]
        own, parents = ([one for one in each.parameters.values() if one.name != "kwargs"] for each in signatures)
        assert own[: len(parents)] == parents, "the parent's come first, in its order and with its defaults"
        assert [one.name for one in own[len(parents) :]] == OURS
        assert all(one.kind == one.KEYWORD_ONLY for one in own[len(parents) :])


@pytest.mark.parametrize("emotion", ["awe", None])
@pytest.mark.parametrize("name", ["emotoin", "callback_step"])
def test_unknown_arguments_are_named(pipe, name, emotion):
    with no_network(), pytest.raises(TypeError, match=f"does not know the arguments.*'{name}'"):
        guide(pipe, **{"emotion": emotion, name: 1})


@pytest.mark.parametrize("emotion", ["awe", None])
def test_arguments_of_earlier_releases_are_told_what_replaces_them(pipe, emotion):
    """In one line each."""
    assert len(GONE) == 12 and not GONE.keys() & set(parameters(type(pipe)))
    for name, replacement in GONE.items():
        with no_network(), pytest.raises(TypeError) as caught:
            guide(pipe, **{"emotion": emotion, name: 1})
        message = str(caught.value)
        assert f"`{name}` is gone" in message and replacement in message and "\n" not in message
    for name, words in {"stop_probability": "loss_threshold", "guidance_reference": "negative_prompt"}.items():
        assert words in GONE[name]


# ---- values that nobody thought of ---------------------------------------------------------------------------------


def numbers(*special: float) -> st.SearchStrategy:
    """Numbers of every kind, and what is none."""
    plain = st.floats() | st.integers() | st.floats(-1, 2) | st.integers(-2, 20) | st.sampled_from([*special, 10**400])
    others = [np.float32(0.5), np.int64(1), np.bool_(True), np.array(1.0), torch.tensor(1.0), 1j, Fraction(1, 2)]
    return plain | st.sampled_from([*others, None, True, False, "1"])


@st.composite
def blocks(draw, shapes: st.SearchStrategy) -> np.ndarray | torch.Tensor:
    """An array or a tensor of one value, in any dtype."""
    value = draw(st.sampled_from([0, 1, 0.5, -1, 2, math.nan, math.inf]))
    dtypes = ["float32", "float64", "float16", *(["uint8", "int64", "bool"] if value in (0, 1, 2) else [])]
    block = np.full(draw(shapes), value).astype(draw(st.sampled_from(dtypes)))
    return draw(st.sampled_from([block, torch.from_numpy(block)]))


def one_or_list(values: st.SearchStrategy) -> st.SearchStrategy:
    return values | st.lists(values, max_size=3)


TEXTS = st.text(max_size=3) | st.sampled_from(EMOSET_LABELS)
MODES = st.sampled_from(["RGB", "L", "1", "P", "RGBA", "CMYK", "F", "I", "I;16"])
PICTURES = st.builds(PIL.Image.new, MODES, st.tuples(st.integers(0, 9), st.integers(1, 9)))
SHAPES = st.lists(st.sampled_from([0, 1, 3, 8]), max_size=4).map(tuple)
SCRAPS = numbers() | TEXTS | PICTURES | blocks(SHAPES) | st.builds(generator) | st.sampled_from([print, b"", object()])
JUNK = st.recursive(
    SCRAPS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.tuples(inner) | st.tuples(inner, inner) | st.dictionaries(TEXTS, inner)
    ),
    max_leaves=4,
)


def is_real(value: Any) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def is_list(value: Any, of: type = object, kinds: type | tuple = (list, tuple)) -> bool:
    return isinstance(value, kinds) and all(isinstance(one, of) for one in value)


def is_text(value: Any) -> bool:
    """A string, or a list of one."""
    return isinstance(value, str) or (is_list(value, str, list) and len(value) == 1)


def is_label(value: Any) -> bool:
    return isinstance(value, str) and value in EMOSET_LABELS


def is_word(value: Any) -> bool:
    """A label whatever its case and spaces, or another word that is no misspelling of one: CLIP is there."""
    if not isinstance(value, str):
        return False
    is_near = difflib.get_close_matches(value.casefold(), EMOSET_LABELS, cutoff=0.75)
    return "".join(value.casefold().split()) in EMOSET_LABELS or (any(map(str.isalpha, value)) and not is_near)


def is_emotion(value: Any) -> bool:
    if not isinstance(value, dict):
        return is_word(value)
    weights = value.values()
    right = all(map(is_word, value)) and all(is_real(weight) and 0 <= weight <= 1e6 for weight in weights)
    return right and any(weight > 0 for weight in weights)


def is_similar(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(is_label, value)) and all(is_list(names) and is_similar(names) for names in value.values())
    if is_list(value):
        return all(map(is_label, value))
    return value is None or (isinstance(value, str) and value == "both")


def are_emotion_prompts(value: Any) -> bool:
    if not isinstance(value, dict):
        return value is None
    return len(value) > 1 and all(
        isinstance(one, str) or (is_list(one, str) and len(one) > 0) for one in value.values()
    )


def is_tensor(value: Any, *shape: int | None) -> bool:
    """Finite floats in a shape of which `None` is any size."""
    if not isinstance(value, torch.Tensor) or not value.dtype.is_floating_point or len(value.shape) != len(shape):
        return False
    fits = all(size > 0 and wanted in (None, size) for size, wanted in zip(value.shape, shape))
    return fits and bool(value.isfinite().all())


def is_picture(value: Any, channels: int) -> bool:
    if isinstance(value, PIL.Image.Image):
        return min(value.size) > 0
    if not isinstance(value, (np.ndarray, torch.Tensor)) or 0 in value.shape:
        return False
    lies_in_unit = bool(((value >= 0) & (value <= 1)).all())
    if isinstance(value, torch.Tensor):
        shape = value.shape[1:] if len(value.shape) == 4 and len(value) == 1 else value.shape
        return value.dtype.is_floating_point and lies_in_unit and len(shape) == 3 and shape[0] == channels
    fits = value.ndim == 2 or (value.ndim == 3 and value.shape[2] in (1, 3, 4))
    return fits and (value.dtype in (np.uint8, np.bool_) or (value.dtype.kind == "f" and lies_in_unit))


def are_pictures(value: Any, channels: int = 3) -> bool:
    """One picture, by itself or in a list."""
    if is_list(value) or (isinstance(value, np.ndarray) and value.ndim == 4):
        return len(value) == 1 and is_picture(value[0], channels)
    return value is None or is_picture(value, channels)


@dataclass(frozen=True)
class Argument:
    """What an argument takes: values near what is right, which of them are, and what the call needs beside."""

    near: Callable[[DiffusionPipeline], st.SearchStrategy]
    is_right: Callable[[DiffusionPipeline, Any], bool]
    beside: Callable[[DiffusionPipeline, Any], dict[str, Any]] = lambda pipe, value: {}
    can_run: bool = True  # whether what is right is also small


def number(low: float, high: float, integer: bool = False, optional: bool = False, **beside: Any) -> Argument:
    def is_right(pipe, value):
        if value is None:
            return optional
        return is_real(value) and low <= value <= high and not (integer and isinstance(value, (float, np.floating)))

    return Argument(lambda pipe: numbers(low, high), is_right, lambda pipe, value: beside, can_run=False)


def setting(part: Any) -> Argument:
    """As the table says; `None` is the preset's."""
    low = max(part.metadata["low"], math.nextafter(part.metadata["above"], math.inf))
    return number(low, part.metadata["high"], integer=part.type is not float, optional=True)


def simple(near: st.SearchStrategy, is_right: Callable[[Any], bool], can_run: bool = True, **beside: Any) -> Argument:
    """Where neither depends on the pipeline."""
    return Argument(lambda pipe: near, lambda pipe, value: is_right(value), lambda pipe, value: beside, can_run)


def one_or_library(near: st.SearchStrategy) -> st.SearchStrategy:
    """A value, or a table that may have one for "awe", the emotion of `guide`."""
    return near | st.dictionaries(st.sampled_from(["awe", "fear"]), near, max_size=2)


ARGUMENTS = {
    "emotion": simple(
        one_or_list(TEXTS | st.dictionaries(TEXTS, numbers(), max_size=3)),
        lambda value: (
            value is None
            or is_emotion(value)
            or (is_list(value) and len(value) == 1 and (value[0] is None or is_emotion(value[0])))
        ),
        can_run=False,  # words that the tiny tokenizer does not know read alike
    ),
    "preset": simple(
        st.sampled_from(["paper", "full", "fast", ""]),
        lambda value: isinstance(value, str) and value in ("paper", "full", "fast"),
    ),
    "emotion_prompts": Argument(
        lambda pipe: st.dictionaries(TEXTS, one_or_list(TEXTS), max_size=3),
        lambda pipe, value: are_emotion_prompts(value),
        lambda pipe, value: {"emotion": next(iter(value))} if isinstance(value, dict) and value else {},
        can_run=False,
    ),
    "image": simple(one_or_list(PICTURES | blocks(SHAPES)) | blocks(st.just((1, 3, 8, 8))), are_pictures),
    "mask_image": simple(
        one_or_list(PICTURES | blocks(SHAPES)) | blocks(st.just((1, 8, 8))),
        lambda value: are_pictures(value, channels=1),
        **EDIT,
    ),
    "strength": number(0.5001 / 3, 1, **EDIT),
    "emotion_tokens": Argument(
        lambda pipe: one_or_library(
            blocks(st.sampled_from([(4, width(pipe)), (1, 2, width(pipe)), (2, 4, width(pipe)), (4, 5)]))
        ),
        lambda pipe, value: (
            value is None
            or (isinstance(value, str) and value in ("random", "emotion"))
            or is_tensor(value, None, width(pipe))
            or is_tensor(value, 1, None, width(pipe))
            or (isinstance(value, dict) and is_tensor(value.get("awe"), None, width(pipe)))
        ),
    ),
    "semantic_prompt": simple(one_or_list(TEXTS), lambda value: value is None or is_text(value)),
    "similar_emotions": simple(
        one_or_list(TEXTS) | st.dictionaries(TEXTS, st.lists(TEXTS, max_size=2), max_size=2) | st.just("both"),
        is_similar,
    ),
    **{name: setting(part) for name, part in SETTINGS.items()},
}


@pytest.mark.parametrize("method, name", [("__call__", name) for name in ARGUMENTS] + [("invert", "image")])
@settings(max_examples=10, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_comes_is_right_or_refused_by_its_name(pipe, method, name, data):
    argument = ARGUMENTS[name]
    value = data.draw(argument.near(pipe) | JUNK)
    call = {**argument.beside(pipe, value), name: value}
    if argument.is_right(pipe, value) and not (method == "invert" and value is None):
        with no_network(), pytest.raises(NetworkCalled):
            CALLS[method](pipe, **call)
    else:
        assert_refused(pipe, method, name, call)


@pytest.mark.parametrize("name", [name for name, argument in ARGUMENTS.items() if argument.can_run])
@settings(max_examples=3, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_right_can_be_run(pipe, name, data):
    argument = ARGUMENTS[name]
    value = data.draw(argument.near(pipe).filter(lambda value: argument.is_right(pipe, value)))
    call = {"num_inference_steps": 1, "max_inner_steps": 1, **argument.beside(pipe, value), name: value}
    assert len(guide(pipe, **call).images) > 0


# ---- what a pipeline or its surroundings lack ----------------------------------------------------------------------


def test_a_misspelled_emotion_is_told_what_was_meant(pipe):
    with no_network(), pytest.raises(ValueError, match="`emotion` 'feer'.*'amusement', 'anger', 'awe'.*'fear'"):
        guide(pipe, emotion="feer")


def test_without_a_classifier_it_says_how_to_get_one():
    pipe = tiny_models.muse_pipeline(emotion_classifier=None, clip_model=None)
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


WAYS = {
    "guided": lambda pipe: guide(pipe),
    "edit": lambda pipe: guide(pipe, image=IMAGE),
    "reconstruction": lambda pipe: guide(pipe, image=IMAGE, emotion=None),
    "inversion": lambda pipe: invert(pipe),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "name, config",
    [
        ("EDMEulerScheduler", {}),
        ("FlowMatchEulerDiscreteScheduler", {}),
        ("DPMSolverMultistepScheduler", {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}),
        ("IPNDMScheduler", {}),
    ],
    ids=lambda value: str(value) if isinstance(value, str) else "",
)
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
def test_schedulers_without_a_noise_level_are_refused(way, name, config):
    """Also where DDIM would walk in their place: their networks predict something else."""
    pipe = tiny_models.muse_pipeline(scheduler=getattr(diffusers, name)(**config))
    with no_network(), pytest.raises(ValueError, match=f"`scheduler` {name}"):
        WAYS[way](pipe)


@pytest.mark.parametrize("channels", [8, 9])
def test_networks_of_other_tasks_are_refused(channels):
    """InstructPix2Pix's sees the source beside the latents, an inpainting one the mask too."""
    network, pipe = tiny_models.unet(in_channels=channels), tiny_models.muse_pipeline()
    with pytest.raises(ValueError, match=f"`unet` takes {channels} channels"):
        tiny_models.muse_pipeline(unet=network)
    parent = tiny_models.parent_of(pipe)
    parent.unet = network
    with pytest.raises(ValueError, match=f"`unet` takes {channels} channels"):
        type(pipe).from_pipe(parent)
