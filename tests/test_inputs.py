"""
Bad input gets an error that names the argument, before any network is called, and leaves a working pipeline.

Every argument of `__call__` and `invert` stands in two tables here: in `bad_calls` with calls that are wrong about it,
and in `ARGUMENTS` with a strategy that makes values near what is right, and an oracle that tells which are right.
"""

import inspect
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import PIL.Image
import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline, EDMEulerScheduler, EulerDiscreteScheduler
from diffusers.models.embeddings import ImageProjection, MultiIPAdapterImageProjection
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from modeling_simemo import EMOSET_LABELS
from tiny_models import FAMILIES, STABLE_DIFFUSION_XL, generator, guide
from torch.nn.modules.module import register_module_forward_pre_hook
from transformers import ViTConfig, ViTForImageClassification


IMAGE = PIL.Image.new("RGB", (32, 32), "teal")
TWO_SIZES = [IMAGE, PIL.Image.new("RGB", (32, 48))]
EDIT = {"image": IMAGE}


@pytest.fixture(scope="module")
def pipe(request) -> DiffusionPipeline:
    """One pipeline for all, since bad input must not hurt it."""
    return tiny_models.muse_pipeline(request.param)


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


def parameters(pipeline_class: type[DiffusionPipeline], method: str) -> list[str]:
    return [name for name in inspect.signature(getattr(pipeline_class, method)).parameters if name != "self"]


CASES = [
    (family, method, name)
    for family in FAMILIES
    for method in CALLS
    for name in parameters(family.pipeline_class, method)
]
every_family = pytest.mark.parametrize(
    "pipe", FAMILIES, ids=lambda family: family.pipeline_class.__name__, indirect=True
)


def arguments(cases: list[tuple[tiny_models.Family, str, str]]) -> pytest.MarkDecorator:
    ids = [f"{family.pipeline_class.__name__}.{method}-{name}" for family, method, name in cases]
    return pytest.mark.parametrize("pipe, method, name", cases, ids=ids, indirect=["pipe"])


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


def bad_texts(pipe: DiffusionPipeline) -> dict[str, list[dict[str, Any]]]:
    d, two = width(pipe), {"prompt": ["a", "b"]}
    return {
        "prompt": [
            *each("prompt", 5, [], ["a", 3], ("a", "b"), {"a": 1}, b"a"),
            {"prompt": None, "emotion": [None, "awe"]},
            {"prompt": None, "emotion": None, "image": IMAGE},
            embeds(pipe) | {"prompt": "a cat"},
        ],
        "prompt_2": [*each("prompt_2", 5, [], ["a", "b"], [3]), {"prompt_2": "a", **two}],
        "negative_prompt": [
            *each("negative_prompt", 5, [], [3], ["rain", "snow"], ("rain",)),
            {"negative_prompt": ["rain", "snow", "hail"], **two},
            EDIT | {"guidance_reference": "source", "negative_prompt": "rain"},
            embeds(pipe, "negative_") | {"negative_prompt": "rain"},
            *([] if is_xl(pipe) else [{"negative_prompt": ["rain"]}, {"negative_prompt": "rain", **two}]),
        ],
        "negative_prompt_2": each("negative_prompt_2", 5, [], [3], ["rain", "snow"]),
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
        ]
        + ([] if is_xl(pipe) else [{"prompt": None, "prompt_embeds": torch.zeros(1, 17, d), "guidance_scale": 2.0}]),
        "negative_prompt_embeds": [
            both(pipe) | {"negative_prompt_embeds": value}
            for value in (0.0, torch.zeros(16, d), torch.zeros(2, 16, d), torch.zeros(1, 15, d))
        ]
        + [embeds(pipe, "negative_") | {"negative_prompt_embeds": torch.zeros(1, 9, d)}],
        "pooled_prompt_embeds": [
            no_prompt(pipe) | {"pooled_prompt_embeds": value}
            for value in (None, 0.0, torch.zeros(1, 15), torch.zeros(2, 16), torch.full((1, 16), math.inf))
        ],
        "negative_pooled_prompt_embeds": [
            both(pipe) | {"negative_pooled_prompt_embeds": value} for value in (None, 0.0, torch.zeros(16))
        ],
        "clip_skip": each("clip_skip", -1, 3, 1.0, "1", True),
        "cross_attention_kwargs": each(
            "cross_attention_kwargs", 1.0, "scale", [("scale", 1)], {1: 2}, {"scale": "much"}, {"scale": math.nan}
        ),
    }


def bad_upstream(pipe: DiffusionPipeline) -> dict[str, list[dict[str, Any]]]:
    """Wrong about upstream's other arguments."""
    heights, widths = each("height", 33, 4, 0, -8, 32.0, "32", True), each("width", 33, 4, 0, -8, 32.0, "32", True)
    pairs = [f"{prefix}{name}" for prefix in ("", "negative_") for name in ("original_size", "target_size")]
    crops = ["crops_coords_top_left", "negative_crops_coords_top_left"]
    return {
        "height": [{"width": 32, **beside, **call} for call in heights for beside in ({}, EDIT)],
        "width": [{"height": 32, **beside, **call} for call in widths for beside in ({}, EDIT)],
        "num_inference_steps": [
            *each("num_inference_steps", 0, -1, 2.5, "3", None, True, math.nan, 1000, 1001),
            *each("num_inference_steps", 0, 2.5, 1000, 1001, **EDIT),
        ],
        "timesteps": [EDIT | {"timesteps": [500, 1]}, {"timesteps": [500, 1]}, {"timesteps": "all"}],
        "sigmas": [EDIT | {"sigmas": [1.0]}, {"sigmas": [1.0]}, {"sigmas": 1.0}],
        "denoising_end": [*each("denoising_end", -0.1, 0, 0.1, 1.1, math.nan, "end"), EDIT | {"denoising_end": 0.5}],
        "guidance_scale": each("guidance_scale", math.nan, math.inf, "7.5", None, True),
        "guidance_rescale": each("guidance_rescale", -0.1, 1.1, math.nan, None),
        "num_images_per_prompt": each("num_images_per_prompt", 0, -1, 1.5, None),
        "eta": each("eta", -0.1, 1.1, math.nan, "0", None),
        "generator": [
            *each("generator", [generator()] * 2, [], 0, [0], (generator(),)),
            {"generator": [generator()], "num_images_per_prompt": 2},
        ],
        "latents": [
            *each("latents", torch.zeros(2, 4, 16, 16), torch.zeros(1, 3, 16, 16), torch.zeros(4, 16, 16), [0.0]),
            *each("latents", torch.zeros(1, 4, 0, 16), torch.full((1, 4, 16, 16), math.nan)),
            *each("latents", torch.zeros(1, 4, 16, 16, dtype=torch.int64), np.zeros((1, 4, 16, 16))),
            EDIT | {"latents": torch.zeros(1, 4, 16, 16), "num_images_per_prompt": 2},
            EDIT | {"latents": torch.zeros(1, 4, 16, 8)},
        ],
        "ip_adapter_image": each("ip_adapter_image", IMAGE, [IMAGE], 3, []),
        "ip_adapter_image_embeds": each("ip_adapter_image_embeds", [torch.zeros(2, 1, 8)], 3, []),
        "output_type": each("output_type", "jpeg", None, 1, ["pil"]),
        "return_dict": each("return_dict", None, 1, "yes"),
        "callback_on_step_end": each("callback_on_step_end", 3, "print", [print]),
        "callback_on_step_end_tensor_inputs": [
            *each("callback_on_step_end_tensor_inputs", ["noise"], "latents", 3, [3], {"latents": 1}),
            {"callback_on_step_end_tensor_inputs": None, "callback_on_step_end": lambda *seen: {}},
        ],
        "kwargs": [{"emotoin": "awe"}, {"emotion": None, "emotoin": "awe"}, {"callback_steps": 1}],
        **{name: each(name, 32, (32,), (32, 32, 3), [32, 32], ("32", 32), (math.nan, 1)) for name in pairs + crops},
    }


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
            {"guidance_reference": "source"},
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
        "guidance_reference": each("guidance_reference", "prompt", 1, None, ["null"], np.array(["null"] * 2)),
    }


def bad_emotions(pipe: DiffusionPipeline) -> dict[str, list[dict[str, Any]]]:
    d, two = width(pipe), {"prompt": ["a", "b"]}
    tokens = [torch.zeros(4, d - 1), torch.zeros(d), torch.zeros(0, d), torch.zeros(3, 4, d), [[0.0] * d]]
    tokens += [torch.full((4, d), math.nan), torch.zeros(4, d, dtype=torch.int64), torch.zeros(4, d).numpy()]
    return {
        "emotion": [
            *each("emotion", "joy", ["awe", "fear"], [], {}, 3, [["awe"]], {"joy": 1.0}, {3: 1.0}, True, object()),
            *each("emotion", *({"awe": bad} for bad in (-1.0, math.nan, math.inf, 10**400, "much", True, None))),
            *each("emotion", {"awe": 1e308, "fear": 1e308}, {"awe": 0, "fear": 0}),
            *each("emotion", ["awe", "joy"], ["awe", "fear", "anger"], [{"awe": 1}, {}], **two),
            no_prompt(pipe, rows=2) | {"emotion": ["awe"]},
        ],
        "emotion_strength": each("emotion_strength", 0, -1, 1.1, math.nan, "full", None, True),
        "emotion_prompts": [
            *each("emotion_prompts", "awe", ["awe"], {}, {"awe": "awe"}, {"awe": "a", 3: "b"}, 3),
            *each("emotion_prompts", *({"awe": "a", "fear": bad} for bad in ([], [1], 3, None, b"b"))),
            {"emotion": None, "emotion_prompts": {"awe": "a", "fear": "b"}},
        ],
        "emotion_tokens": [
            *each("emotion_tokens", *tokens),
            {"emotion_tokens": torch.zeros(4, d), "num_emotion_tokens": 5},
            {"emotion_tokens": torch.zeros(4, d), "emotion": None},
            {"emotion_tokens": torch.zeros(4, d), "emotion": None, "image": IMAGE},
            *each(
                "emotion_tokens", {}, {"fear": tokens[-1]}, *({"awe": bad} for bad in (*tokens, torch.zeros(1, 4, d)))
            ),
            {"emotion_tokens": {"awe": torch.zeros(4, d)}, "num_emotion_tokens": 5},
            {"emotion_tokens": {"awe": torch.zeros(4, d)}, "emotion": {"awe": 0.5, "fear": 0.5}},
            {
                "emotion_tokens": {"awe": torch.zeros(4, d), "fear": torch.zeros(3, d)},
                "emotion": {"awe": 0.5, "fear": 0.5},
            },
        ],
        "num_emotion_tokens": each("num_emotion_tokens", 0, -1, 1.5, "4", True),
        "emotion_token_init": each("emotion_token_init", "zero", None, 1, ["random"]),
        "semantic_prompt": [
            *each("semantic_prompt", 5, ["a", "b"], [1], [], ("a",)),
            no_prompt(pipe) | {"semantic_threshold": 3},
        ],
        "similar_emotions": [
            *each("similar_emotions", "all", "awe", ["joy"], [["awe"]], 3, {"awe": ["joy"]}, {"joy": ["awe"]}),
            *each("similar_emotions", {"awe": "fear"}, {"fear": None}, {"awe"}, np.array(["awe", "fear"])),
        ],
        "max_inner_steps": each("max_inner_steps", -1, 1.5, "10", None, True),
        "max_inner_batch": each("max_inner_batch", 0, -1, 1.5, "4", True),
        "patience": each("patience", 0, -1, 1.5, "4", True),
        "update_interval": each("update_interval", 0, -1, 1.5, "4", None, True),
        "emotion_optimizer": each("emotion_optimizer", "sgd", None, 1, ["adam"], torch.optim.Adam),
        "preview_scale": each("preview_scale", 0, -0.5, 1.1, math.nan, "half", None, True),
        "loss_threshold": each("loss_threshold", math.nan, "low", None),
        "stop_probability": each("stop_probability", -0.1, 1.1, math.nan, "high"),
        "semantic_threshold": each("semantic_threshold", -1, math.nan, "high", True),
        **{name: each(name, None, 1, "yes") for name in FLAGS},
        **{name: each(name, -1.0, math.nan, math.inf, 1e7, "0.1", True) for name in WEIGHTS},
    }


FLAGS = ["guided_preview", "carry_emotion_tokens", "keep_best", "gradient_checkpointing"]
WEIGHTS = ["emotion_learning_rate", "inherent_weight", "similar_weight", "max_token_norm", "similarity_scale"]


def bad_calls(pipe: DiffusionPipeline) -> dict[str, list[dict[str, Any]]]:
    """Name of the argument that the message has to name -> calls that are wrong about it."""
    return bad_texts(pipe) | bad_upstream(pipe) | bad_pictures(pipe) | bad_emotions(pipe)


def assert_refused(pipe: DiffusionPipeline, method: str, name: str, call: Mapping[str, Any]) -> None:
    """An error that names the argument, and no network was called."""
    with no_network(), pytest.raises((ValueError, TypeError)) as caught:
        CALLS[method](pipe, **call)
    wanted = call.keys() - {"emotion"} if name == "kwargs" else {name}
    assert any(f"`{one}`" in str(caught.value) or f"'{one}'" in str(caught.value) for one in wanted), caught.value


@arguments(CASES)
def test_bad_input_is_named_before_any_work(pipe, method, name):
    taken = parameters(type(pipe), method)
    calls = [call for call in bad_calls(pipe)[name] if method == "__call__" or call.keys() <= set(taken)]
    assert calls, "each argument needs one"
    for call in calls:
        assert_refused(pipe, method, name, call)


@every_family
def test_every_argument_stands_in_both_tables(pipe):
    """A new argument without bad input, or one that is gone, fails here."""
    names = {name for _, _, name in CASES}
    assert set(bad_calls(pipe)) == names
    assert set(ARGUMENTS) == names - {"kwargs"}


@every_family
def test_the_pipeline_works_right_after(pipe):
    expected = guide(pipe, num_inference_steps=1).images
    for name in parameters(type(pipe), "__call__"):
        for call in bad_calls(pipe)[name]:
            with pytest.raises((ValueError, TypeError)):
                guide(pipe, **call)
    assert torch.equal(guide(pipe, num_inference_steps=1).images, expected)


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


def is_text(value: Any, most: int = 1) -> bool:
    """A string, or a list of up to `most` of them."""
    return isinstance(value, str) or (is_list(value, str, list) and 1 <= len(value) <= most)


def is_label(value: Any) -> bool:
    return isinstance(value, str) and value in EMOSET_LABELS


def is_emotion(value: Any) -> bool:
    if not isinstance(value, dict):
        return is_label(value)
    weights = value.values()
    right = all(map(is_label, value)) and all(is_real(weight) and 0 <= weight <= 1e6 for weight in weights)
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


def is_falling(value: Any, kinds: tuple[type, ...], least: int, most: float) -> bool:
    """At least so many numbers up to `most`, each less than the one before."""
    if not (is_list(value) or (isinstance(value, np.ndarray) and value.ndim == 1)) or len(value) < least:
        return value is None
    right = all(is_real(one) and isinstance(one, kinds) and 0 <= one <= most for one in value)
    return right and list(value) == sorted(set(value), reverse=True)


def is_pair(value: Any) -> bool:
    return is_list(value, kinds=tuple) and len(value) == 2 and all(is_real(one) and abs(one) <= 1e6 for one in value)


@dataclass(frozen=True)
class Argument:
    """What an argument takes: values near what is right, which of them are, and what the call needs beside."""

    near: Callable[[DiffusionPipeline], st.SearchStrategy]
    is_right: Callable[[DiffusionPipeline, Any], bool]
    beside: Callable[[DiffusionPipeline, Any], dict[str, Any]] = lambda pipe, value: {}
    can_run: bool = True  # whether what is right is also small, and upstream is up to it


def number(low: float, high: float, integer: bool = False, optional: bool = False, **beside: Any) -> Argument:
    def is_right(pipe, value):
        if value is None:
            return optional
        return is_real(value) and low <= value <= high and not (integer and isinstance(value, (float, np.floating)))

    return Argument(lambda pipe: numbers(low, high), is_right, lambda pipe, value: beside, can_run=False)


def choice(*values: Any, **beside: Any) -> Argument:
    near, kind = st.sampled_from([*values, "", None, 1]), type(values[0])
    right = lambda pipe, value: isinstance(value, kind) and value in values  # noqa: E731
    return Argument(lambda pipe: near, right, lambda pipe, value: beside)


def text(most: int = 1) -> Argument:
    return Argument(lambda pipe: one_or_list(TEXTS), lambda pipe, value: value is None or is_text(value, most))


def tensor(shape: Callable, beside: Callable = lambda pipe, value: {}, optional: bool = True) -> Argument:
    """A tensor of the shape that the pipeline tells, in which `None` is any size."""

    def near(pipe):
        sizes = [st.integers(1, 3) if size is None else st.just(size) for size in shape(pipe)]
        return blocks(st.tuples(*sizes)) | blocks(st.tuples(st.integers(0, 2), *sizes[1:]))

    def is_right(pipe, value):
        return (optional and value is None) or is_tensor(value, *shape(pipe))

    return Argument(near, is_right, beside)


def simple(near: st.SearchStrategy, is_right: Callable[[Any], bool], **beside: Any) -> Argument:
    """Where neither depends on the pipeline."""
    return Argument(lambda pipe: near, lambda pipe, value: is_right(value), lambda pipe, value: beside)


def none_but(near: st.SearchStrategy) -> Argument:
    """What the pipelines here have no use for."""
    return Argument(lambda pipe: near, lambda pipe, value: value is None, can_run=False)


def one_or_library(near: st.SearchStrategy) -> st.SearchStrategy:
    """A value, or a table that may have one for "awe", the emotion of `guide`."""
    return near | st.dictionaries(st.sampled_from(["awe", "fear"]), near, max_size=2)


def rows(value: Any) -> int:
    return value.shape[0] if isinstance(value, torch.Tensor) and value.ndim > 0 else 1


def callback(*seen: Any) -> dict:
    return {}


SIZE = simple(st.tuples(numbers(), numbers()), lambda value: value is None or is_pair(value))
CORNER = simple(st.tuples(numbers(), numbers()), is_pair)


def side(**beside: int) -> Argument:
    """Of the result, in pixels."""

    def is_right(pipe, value):
        return value is None or (
            is_real(value) and isinstance(value, (int, np.integer)) and value >= 8 and value % 8 == 0
        )

    return Argument(lambda pipe: numbers(8, 32, 36, 32.0), is_right, lambda pipe, value: beside, can_run=False)


ARGUMENTS = {
    "prompt": text(most=3),
    "prompt_2": text(),
    "negative_prompt": Argument(
        lambda pipe: one_or_list(TEXTS),
        lambda pipe, value: value is None or is_text(value, most=1 if is_xl(pipe) else 0),
    ),
    "negative_prompt_2": text(),
    "prompt_embeds": tensor(
        lambda pipe: (None, None, width(pipe)),
        lambda pipe, value: no_prompt(pipe, rows(value)) if value is not None else {},
    ),
    "negative_prompt_embeds": tensor(lambda pipe: (1, 16, width(pipe)), lambda pipe, value: embeds(pipe, "negative_")),
    "pooled_prompt_embeds": tensor(lambda pipe: (1, 16), lambda pipe, value: no_prompt(pipe), optional=False),
    "negative_pooled_prompt_embeds": tensor(lambda pipe: (1, 16), lambda pipe, value: both(pipe), optional=False),
    "height": side(width=32),
    "width": side(height=32),
    "num_inference_steps": number(1, 999, integer=True),
    "timesteps": simple(
        st.lists(st.integers(0, 999), max_size=4) | st.sampled_from([[900, 500, 1], (999, 0), np.array([7, 3])]),
        lambda value: is_falling(value, (int, np.integer), least=1, most=999),
    ),
    "sigmas": simple(
        st.lists(st.floats(0, 20), max_size=3) | st.sampled_from([[14.6, 3.0, 0.5], (5, 1), np.array([7.0, 3.0])]),
        lambda value: is_falling(value, (int, float, np.number), least=2, most=1e6),
    ),
    "denoising_end": Argument(
        lambda pipe: numbers(0, 1),
        lambda pipe, value: value is None or (is_real(value) and 0 <= value <= 1 and round((1 - value) * 1000) <= 667),
        can_run=False,
    ),
    "guidance_scale": number(-1e6, 1e6),
    "guidance_rescale": number(0, 1),
    "num_images_per_prompt": number(1, math.inf, integer=True),
    "eta": number(0, 1),
    "generator": simple(
        one_or_list(st.builds(generator)),
        lambda value: (
            value is None
            or isinstance(value, torch.Generator)
            or (is_list(value, torch.Generator, list) and len(value) == 1)
        ),
    ),
    "latents": tensor(lambda pipe: (1, pipe.unet.config.in_channels, None, None)),
    "ip_adapter_image": none_but(one_or_list(PICTURES)),
    "ip_adapter_image_embeds": none_but(one_or_list(blocks(SHAPES))),
    "output_type": choice("pil", "np", "pt", "latent"),
    "return_dict": choice(True, False),
    "cross_attention_kwargs": simple(
        st.dictionaries(st.sampled_from(["scale", "other"]), st.floats(-2, 2)),
        lambda value: (
            value is None
            or (
                isinstance(value, dict)
                and is_list(list(value), str)
                and is_real(value.get("scale", 1))
                and abs(value.get("scale", 1)) <= 1e6
            )
        ),
    ),
    "original_size": SIZE,
    "crops_coords_top_left": CORNER,
    "target_size": SIZE,
    "negative_original_size": SIZE,
    "negative_crops_coords_top_left": CORNER,
    "negative_target_size": SIZE,
    "clip_skip": Argument(
        lambda pipe: st.integers(-1, 3) | numbers(),
        lambda pipe, value: (
            value is None
            or (is_real(value) and isinstance(value, (int, np.integer)) and 0 <= value <= (1 if is_xl(pipe) else 2))
        ),
        can_run=False,  # upstream and transformers 5 disagree about where the text encoder has its last layer
    ),
    "callback_on_step_end": simple(
        st.sampled_from([callback, None, 3]), lambda value: value is None or callable(value)
    ),
    "callback_on_step_end_tensor_inputs": Argument(
        lambda pipe: st.lists(st.sampled_from([*pipe._callback_tensor_inputs, "noise"]), max_size=3),
        lambda pipe, value: is_list(value, str) and set(value) <= set(pipe._callback_tensor_inputs),
        lambda pipe, value: {"callback_on_step_end": callback},
    ),
    "emotion": simple(
        one_or_list(TEXTS | st.dictionaries(TEXTS, numbers(), max_size=3)),
        lambda value: (
            value is None
            or is_emotion(value)
            or (is_list(value) and len(value) == 1 and (value[0] is None or is_emotion(value[0])))
        ),
    ),
    "emotion_strength": number(5e-324, 1),
    "emotion_prompts": Argument(
        lambda pipe: st.dictionaries(TEXTS, one_or_list(TEXTS), max_size=3),
        lambda pipe, value: are_emotion_prompts(value),
        lambda pipe, value: {"emotion": next(iter(value))} if isinstance(value, dict) and value else {},
    ),
    "image": simple(one_or_list(PICTURES | blocks(SHAPES)) | blocks(st.just((1, 3, 8, 8))), are_pictures),
    "mask_image": simple(
        one_or_list(PICTURES | blocks(SHAPES)) | blocks(st.just((1, 8, 8))),
        lambda value: are_pictures(value, channels=1),
        **EDIT,
    ),
    "strength": number(0.5001 / 3, 1, **EDIT),
    "guidance_reference": choice("null", "source", **EDIT),
    "num_emotion_tokens": number(1, math.inf, integer=True, optional=True),
    "emotion_tokens": Argument(
        lambda pipe: one_or_library(
            blocks(st.sampled_from([(4, width(pipe)), (1, 2, width(pipe)), (2, 4, width(pipe)), (4, 5)]))
        ),
        lambda pipe, value: (
            value is None
            or is_tensor(value, None, width(pipe))
            or is_tensor(value, 1, None, width(pipe))
            or (isinstance(value, dict) and is_tensor(value.get("awe"), None, width(pipe)))
        ),
    ),
    "emotion_token_init": choice("random", "emotion"),
    "max_inner_steps": number(0, math.inf, integer=True),
    "max_inner_batch": number(1, math.inf, integer=True, optional=True),
    "patience": number(1, math.inf, integer=True, optional=True),
    "update_interval": number(1, math.inf, integer=True),
    "emotion_optimizer": choice("adam", "normalized"),
    "preview_scale": number(5e-324, 1),
    "loss_threshold": number(-math.inf, math.inf),
    "stop_probability": number(0, 1, optional=True),
    "semantic_threshold": number(0, math.inf, optional=True),
    "semantic_prompt": text(),
    "similar_emotions": simple(
        one_or_list(TEXTS) | st.dictionaries(TEXTS, st.lists(TEXTS, max_size=2), max_size=2) | st.just("both"),
        is_similar,
    ),
    **{name: number(0, 1e6, optional=name in ("max_token_norm", "similarity_scale")) for name in WEIGHTS},
    **{name: choice(True, False) for name in FLAGS},
}


# Of what both classes have, one is enough: their checks are copies. `test_copies.py` proves that.
KNOWN = set(parameters(FAMILIES[0].pipeline_class, "__call__"))
ONCE = [case for case in CASES if case[2] != "kwargs" and (case[0] is FAMILIES[0] or case[2] not in KNOWN)]


@arguments(ONCE)
@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_whatever_comes_is_right_or_refused_by_its_name(pipe, method, name, data):
    argument = ARGUMENTS[name]
    value = data.draw(argument.near(pipe) | JUNK)
    call = {**argument.beside(pipe, value), name: value}
    call = {name: one for name, one in call.items() if name in parameters(type(pipe), method)}
    is_right = argument.is_right(pipe, value) and not (method == "invert" and name == "image" and value is None)
    with scheduler_of(pipe, name):
        if is_right:
            with no_network(), pytest.raises(NetworkCalled):
                CALLS[method](pipe, **call)
        else:
            assert_refused(pipe, method, name, call)


@contextmanager
def scheduler_of(pipe: DiffusionPipeline, name: str) -> Iterator[None]:
    """One that takes steps of the caller's own, where these are the argument."""
    before = pipe.scheduler
    if name in ("timesteps", "sigmas"):
        pipe.scheduler = EulerDiscreteScheduler.from_config(before.config)
    try:
        yield
    finally:
        pipe.scheduler = before


@arguments([case for case in ONCE if case[1] == "__call__" and case[2] in ARGUMENTS and ARGUMENTS[case[2]].can_run])
@settings(max_examples=3, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_what_is_right_can_be_run(pipe, method, name, data):
    argument = ARGUMENTS[name]
    value = data.draw(argument.near(pipe).filter(lambda value: argument.is_right(pipe, value)))
    with scheduler_of(pipe, name):
        output = guide(
            pipe, **{"num_inference_steps": 1, "max_inner_steps": 1, **argument.beside(pipe, value), name: value}
        )
    assert len(output[0] if isinstance(output, tuple) else output.images) > 0


# ---- what a pipeline or its surroundings lack ----------------------------------------------------------------------


def test_an_unknown_emotion_is_told_which_are_known():
    with pytest.raises(ValueError, match="'joy'.*'amusement', 'anger', 'awe', 'contentment', 'disgust'"):
        guide(tiny_models.muse_pipeline(), emotion="joy")


@every_family
def test_ip_adapters_get_one_entry_each(pipe, monkeypatch):
    adapters = MultiIPAdapterImageProjection([ImageProjection(8, width(pipe), 2) for _ in range(2)])
    monkeypatch.setattr(pipe.unet, "encoder_hid_proj", adapters)
    pair = [torch.zeros(2, 1, 8)] * 2
    bad = {
        "ip_adapter_image": [IMAGE, [IMAGE], [IMAGE] * 3, [IMAGE, "photo.jpg"], 3],
        "ip_adapter_image_embeds": [pair[:1], [*pair[:1], 3], [torch.zeros(1, 1, 8)] * 2, [torch.zeros(2, 8)] * 2],
    }
    for name, values in bad.items():
        for call in each(name, *values):
            assert_refused(pipe, "__call__", name, call)
    assert_refused(
        pipe, "__call__", "ip_adapter_image", {"ip_adapter_image": [IMAGE] * 2, "ip_adapter_image_embeds": pair}
    )
    for call in each("ip_adapter_image", [IMAGE] * 2) + each("ip_adapter_image_embeds", pair):
        with no_network(), pytest.raises(NetworkCalled):
            guide(pipe, **call)


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


def test_schedulers_without_a_noise_level_are_refused():
    pipe = tiny_models.muse_pipeline()
    pipe.scheduler = EDMEulerScheduler()
    with no_network(), pytest.raises(ValueError, match="`scheduler` EDMEulerScheduler"):
        guide(pipe)
