# Copyright 2026 The MUSE pipelines authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""MUSE (https://huggingface.co/papers/2511.21051): an emotion for Stable Diffusion XL, at test time.

The method is that of `pipeline_muse.py`, and so is most of the code: diffusers loads each file by itself, so what both
need stands in both, under `# Copied from`, kept in step by `make fix-copies`. Different are conditioning (two text
encoders, sizes), decoding (a VAE that overflows in float16) and defaults.
"""

import inspect
import json
import math
import numbers
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import PIL.Image
import PIL.ImageOps
import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMInverseScheduler,
    DDIMScheduler,
    DiffusionPipeline,
    ModelMixin,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.stable_diffusion_xl import StableDiffusionXLPipelineOutput
from diffusers.pipelines.stable_diffusion_xl.pipeline_stable_diffusion_xl import (
    rescale_noise_cfg,
    retrieve_timesteps,
)
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


logger = logging.get_logger(__name__)


# Copied from pipeline_muse.EmotionPoint
class EmotionPoint(NamedTuple):
    """Where an emotion lies in the circumplex of affect, and the colour that plots give it."""

    valence: float  # 1 (unhappy) to 9 (happy)
    arousal: float  # 1 (calm) to 9 (excited)
    color: str


# Mikels' wheel, a cycle: each emotion stands beside the two that it is most easily mistaken for. Valence and arousal
# are the mean ratings of these eight words ("V.Mean.Sum" and "A.Mean.Sum") in Warriner, Kuperman & Brysbaert (2013),
# Norms of valence, arousal, and dominance for 13,915 English lemmas, https://doi.org/10.3758/s13428-012-0314-x. The
# ratings as a whole are licensed CC BY-NC-ND 3.0.
# Copied from pipeline_muse.MIKELS_WHEEL
MIKELS_WHEEL = {
    "amusement": EmotionPoint(7.00, 4.82, "#e0912f"),
    "contentment": EmotionPoint(6.62, 4.60, "#4f9d69"),
    "awe": EmotionPoint(6.85, 3.83, "#7a5bc7"),
    "excitement": EmotionPoint(7.62, 6.21, "#e0559a"),
    "fear": EmotionPoint(2.93, 6.14, "#34495e"),
    "sadness": EmotionPoint(2.40, 2.81, "#3f7fbf"),
    "disgust": EmotionPoint(3.32, 5.00, "#7d8b2c"),
    "anger": EmotionPoint(2.50, 5.93, "#c8372d"),
}
# Copied from pipeline_muse.POSITIVE_EMOTIONS
POSITIVE_EMOTIONS = frozenset(label for label, point in MIKELS_WHEEL.items() if point.valence > 5)

# Keeps gradients of a float16 network out of the range where they round to zero; they are divided by it again.
# Copied from pipeline_muse.FLOAT16_LOSS_SCALE
FLOAT16_LOSS_SCALE = 1024.0

# Tokens started from one hidden state would get one gradient; this share of noise tells them apart.
# Copied from pipeline_muse.START_JITTER
START_JITTER = 0.1

# Copied from pipeline_muse.NUM_EMOTION_TOKENS
NUM_EMOTION_TOKENS = 4

# What CLIP is asked where it has to do without an emotion classifier: the mean feature of these stands for an emotion.
# Copied from pipeline_muse.EMOTION_TEMPLATES
EMOTION_TEMPLATES = ("a picture that evokes {}", "a scene full of {}", "an image of {}", "this looks like {}")
# Copied from pipeline_muse.EMOTION_PROMPTS
EMOTION_PROMPTS = {label: [template.format(label) for template in EMOTION_TEMPLATES] for label in MIKELS_WHEEL}

# Copied from pipeline_muse.PIXEL_SETTINGS
PIXEL_SETTINGS = ("image_size", "image_mean", "image_std")  # what a classifier's config tells of its input
# Copied from pipeline_muse.TEXTS
TEXTS = ("prompt", "prompt_2", "negative_prompt", "negative_prompt_2", "semantic_prompt")
# Copied from pipeline_muse.NEGATIVE_PROMPTS
NEGATIVE_PROMPTS = ("negative_prompt", "negative_prompt_2", "negative_prompt_embeds")
# Copied from pipeline_muse.OUTPUT_TYPES
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
# Copied from pipeline_muse.PREDICTION_TYPES
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
# Copied from pipeline_muse.EMOTION_OPTIMIZERS
EMOTION_OPTIMIZERS = ("adam", "normalized")
# Copied from pipeline_muse.MAX_WEIGHT
MAX_WEIGHT = 1e6  # learning rates, weights and scales beyond it are mistakes

# Copied from pipeline_muse.Emotion
Emotion = str | Mapping[str, float] | None


# --------------------------------------------------------------------------------------
# Which: emotions and the loss
# --------------------------------------------------------------------------------------


# Copied from pipeline_muse.wheel_distance
def wheel_distance(label: str, other: str, polarity_aware: bool = False) -> int:
    """
    How far apart two emotions are on Mikels' wheel.

    Args:
        label, other (`str`): Emotions of `MIKELS_WHEEL`.
        polarity_aware (`bool`, defaults to `False`): Add 3 between emotions of opposite valence, so that they are
            always further apart than emotions of the same. This is Eq. 1 of "To err like human: Affective
            bias-inspired measures for visual emotion recognition evaluation" (NeurIPS 2024,
            https://openreview.net/forum?id=nLSLbJgL7f) with its C = 4, less the 1 that stands in every distance there.

    Returns:
        `int`: Steps along the cycle, 0 to 4; polarity-aware 0 to 3 within a valence, 4 to 7 across.

    Raises:
        ValueError: For a label that is not on the wheel.
    """
    wheel = list(MIKELS_WHEEL)
    for name in (label, other):
        if name not in wheel:
            raise ValueError(f"`label` {name!r} is not on Mikels' wheel, which holds {wheel}.")
    steps = abs(wheel.index(label) - wheel.index(other))
    across = (label in POSITIVE_EMOTIONS) != (other in POSITIVE_EMOTIONS)
    return min(steps, len(wheel) - steps) + (3 if polarity_aware and across else 0)


# Copied from pipeline_muse.wheel_neighbors
def wheel_neighbors(label: str, same_valence: bool = True) -> list[str]:
    """
    The emotions next to `label` on Mikels' wheel.

    Args:
        label (`str`): An emotion. One that is not on the wheel has no neighbours.
        same_valence (`bool`, defaults to `True`): Keep only neighbours at a polarity-aware distance of 1, that is of
            the same valence; see [`wheel_distance`].

    Returns:
        `list[str]`: Up to two labels.
    """
    wheel = list(MIKELS_WHEEL)
    if label not in wheel:
        return []
    neighbors = [wheel[(wheel.index(label) + step) % len(wheel)] for step in (-1, 1)]
    return [other for other in neighbors if wheel_distance(label, other, polarity_aware=same_valence) == 1]


# Copied from pipeline_muse.normalize_emotion
def normalize_emotion(emotion: Emotion, labels: Sequence[str]) -> dict[str, float]:
    """
    Turns one `emotion` entry into weights that sum to one; `None` has none.

    Args:
        emotion (`str`, `Mapping[str, float]` or `None`): A label, or a mixture as label -> weight (>= 0).
        labels (`Sequence[str]`): The labels that the classifier knows.

    Raises:
        ValueError: For a label that the classifier does not know, and for weights that are negative, beyond
            `MAX_WEIGHT` or all zero.
        TypeError: For anything that is neither a label, a mapping nor `None`.
    """
    if emotion is None:
        return {}
    if isinstance(emotion, str):
        emotion = {emotion: 1.0}
    if not isinstance(emotion, Mapping):
        raise TypeError(
            f"`emotion` has to be a label, a mapping from labels to weights, or a list of them, but is {emotion!r}."
        )
    for label, weight in emotion.items():
        if label not in labels:
            raise ValueError(f"`emotion` {label!r} is not known to the classifier, which knows {sorted(labels)}.")
        if not (is_number(weight) and 0 <= weight <= MAX_WEIGHT):
            raise ValueError(f"`emotion` weights have to be numbers in [0, {MAX_WEIGHT}]: {label!r} has {weight!r}.")
    total = sum(emotion.values())
    if total <= 0:
        raise ValueError(f"`emotion` weights have to sum to more than 0, but {dict(emotion)} does not.")
    return {label: weight / total for label, weight in emotion.items() if weight > 0}


# Copied from pipeline_muse.label_weights
def label_weights(rows: Iterable[Mapping[str, float]], labels: Sequence[str]) -> torch.Tensor:
    """Rows of label -> weight as a float32 matrix of shape `(len(rows), len(labels))`; absent labels weigh zero."""
    return torch.tensor([[row.get(label, 0.0) for label in labels] for row in rows], dtype=torch.float32)


# Copied from pipeline_muse.muse_loss
def muse_loss(
    logits: torch.Tensor,
    target: torch.Tensor,
    inherent: torch.Tensor,
    similar: torch.Tensor,
    inherent_weight: float,
    similar_weight: float,
) -> torch.Tensor:
    """
    The multi-emotion loss (Eq. 11-13), one value per sample, in float32:
    `CE(target) - inherent_weight * CE(inherent) - similar_weight * CE(similar)`.

    Args:
        logits (`torch.Tensor` of shape `(batch_size, num_labels)`): The classifier's output.
        target, inherent, similar (`torch.Tensor` of shape `(batch_size, num_labels)`): Weights over the labels; a row
            sums to one (a mean of cross-entropies), or is zero where a sample has no such label.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    cross_entropy = -logits.float().log_softmax(dim=-1)  # against every label at once
    weights = target - inherent_weight * inherent - similar_weight * similar
    return (weights * cross_entropy).sum(dim=-1)


# --------------------------------------------------------------------------------------
# Pixels, previews and similarity
# --------------------------------------------------------------------------------------


# Copied from pipeline_muse.PixelSpec
@dataclass(frozen=True)
class PixelSpec:
    """What a vision model wants to see: `size` (height, width) pixels, normalised by `mean` and `std` per channel."""

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]

    @classmethod
    def from_classifier(cls, classifier: PreTrainedModel) -> "PixelSpec":
        """Reads `image_size` (a side, or height and width), `image_mean` and `image_std` from the config."""
        missing = [name for name in PIXEL_SETTINGS if not hasattr(classifier.config, name)]
        if missing:
            raise ValueError(
                f"`emotion_classifier` {type(classifier).__name__} lacks {missing} in its config: load it with"
                " `pipe.load_emotion_classifier(model, image_processor=...)`, which writes them there."
            )
        config = classifier.config
        size = config.image_size if isinstance(config.image_size, (list, tuple)) else [config.image_size] * 2
        return cls(tuple(size), tuple(config.image_mean), tuple(config.image_std))

    @classmethod
    def from_processor(cls, image_processor: Any) -> "PixelSpec":
        """Reads what an image processor makes of square pictures; it may crop others, which `prepare` never does."""
        size = getattr(image_processor, "crop_size", None) or image_processor.size
        height, width = (size.get(side) or size["shortest_edge"] for side in ("height", "width"))
        return cls((height, width), tuple(image_processor.image_mean), tuple(image_processor.image_std))

    @classmethod
    def from_clip(cls, clip_model: CLIPModel) -> "PixelSpec":
        """OpenAI CLIP's normalisation at the size of the model's own vision tower."""
        size = clip_model.config.vision_config.image_size
        return cls((size, size), tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))

    def prepare(self, image: torch.Tensor) -> torch.Tensor:
        """
        Resizes (bicubic, antialiased) and normalises differentiably. Nothing is clamped: a clamp has no gradient.

        Args:
            image (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Pixels in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(batch_size, 3, *size)`, float32.
        """
        image = image.float() / 2 + 0.5
        if image.shape[-2:] != self.size:
            image = F.interpolate(image, self.size, mode="bicubic", antialias=True, align_corners=False)
        mean, std = (image.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


# Copied from pipeline_muse.signal_level
def signal_level(scheduler: Any, timestep: torch.Tensor) -> torch.Tensor:
    """
    The cumulative alpha of `timestep`: the share of signal in the network's input. No scheduler state is changed.

    Schedulers with `sigmas` know their own noise level (also for fractional timesteps): alpha = 1 / (1 + sigma**2).

    Raises:
        ValueError: If the scheduler has no `alphas_cumprod`, as EDM's, or is a flow-matching one, or for a timestep
            beyond its last.
    """
    config = scheduler.config
    is_flow = config.get("use_flow_sigmas", False) or config.get("prediction_type") == "flow_prediction"
    if is_flow or not hasattr(scheduler, "alphas_cumprod"):
        raise ValueError(
            f"`scheduler` {type(scheduler).__name__} does not tell the noise level of a timestep, which MUSE's"
            " one-step preview needs. Use a diffusion scheduler such as DDIMScheduler."
        )
    if not getattr(scheduler, "state_in_first_order", True):  # between two sigmas; how it scales its input tells where
        return scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep) ** 2
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "index_for_timestep"):
        index = scheduler.step_index if scheduler.step_index is not None else scheduler.index_for_timestep(timestep)
        return 1 / (1 + scheduler.sigmas[index].double() ** 2)
    if int(timestep) >= len(scheduler.alphas_cumprod):  # an offset on top of as many steps as there are
        raise ValueError(
            f"`num_inference_steps` leads {type(scheduler).__name__} beyond its last timestep; take fewer."
        )
    return scheduler.alphas_cumprod[int(timestep)].double()


# Copied from pipeline_muse.predict_x0
def predict_x0(
    model_input: torch.Tensor, noise_pred: torch.Tensor, alpha_cumprod: float | torch.Tensor, prediction_type: str
) -> torch.Tensor:
    """
    One-step estimate of the clean latents (Eq. 6), in float32: `(z - sqrt(1 - a) eps) / sqrt(a)` for noise prediction.

    Args:
        model_input (`torch.Tensor` of shape `(batch_size, channels, height, width)`): The latents as the network sees
            them, that is after `scheduler.scale_model_input`, so that one formula serves every scheduler.
        noise_pred (`torch.Tensor`, same shape): The network's (guided) output.
        alpha_cumprod (`float` or scalar tensor): See [`signal_level`].
        prediction_type (`str`): One of `PREDICTION_TYPES`.
    """
    signal, noise = float(alpha_cumprod) ** 0.5, (1 - float(alpha_cumprod)) ** 0.5
    if prediction_type == "epsilon":
        return (model_input.float() - noise * noise_pred.float()) / signal
    if prediction_type == "v_prediction":
        return signal * model_input.float() - noise * noise_pred.float()
    if prediction_type == "sample":
        return noise_pred.float()
    raise ValueError(f"`prediction_type` has to be one of {PREDICTION_TYPES}, but is {prediction_type!r}.")


# Copied from pipeline_muse.check_preview
def check_preview(scheduler: Any, timesteps: torch.Tensor) -> None:
    """Raises a `ValueError` that names the scheduler where [`predict_x0`] cannot be derived for its first timestep."""
    signal = signal_level(scheduler, timesteps[0])
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type not in PREDICTION_TYPES:
        raise ValueError(
            f"`scheduler` {type(scheduler).__name__} predicts {prediction_type!r}; MUSE knows {PREDICTION_TYPES}."
        )
    if prediction_type == "epsilon" and signal == 0:
        raise ValueError(
            f"`scheduler` {type(scheduler).__name__} starts from pure noise (zero terminal SNR), in which the"
            " predicted noise says nothing about the image. It needs a checkpoint that predicts v_prediction."
        )


# Copied from pipeline_muse.guide_noise
def guide_noise(
    noise_reference: torch.Tensor | None,
    noise_cond: torch.Tensor,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> torch.Tensor:
    """Classifier-free guidance (Eq. 2 of Imagen) away from `noise_reference`; without one the condition alone."""
    if noise_reference is None:
        return noise_cond
    noise_pred = noise_reference + guidance_scale * (noise_cond - noise_reference)
    if guidance_rescale > 0.0:
        noise_pred = rescale_noise_cfg(noise_pred, noise_cond, guidance_rescale=guidance_rescale)
    return noise_pred


# Copied from pipeline_muse.clip_features
def clip_features(
    clip_model: CLIPModel, image: torch.Tensor, text_inputs: Mapping[str, torch.Tensor]
) -> tuple[torch.Tensor, torch.Tensor]:
    """
    CLIP's features of images and texts, on the unit sphere, in float32; differentiable.

    Args:
        clip_model (`CLIPModel`): Its `forward` is called, so that offloading hooks see it.
        image (`torch.Tensor` of shape `(num_images, 3, height, width)`): Pixels in [-1, 1].
        text_inputs (`Mapping[str, torch.Tensor]`): `input_ids` and `attention_mask`, shape `(num_texts, length)`.

    Returns:
        `tuple`: Tensors of shape `(num_images, projection_dim)` and `(num_texts, projection_dim)`.
    """
    pixels = PixelSpec.from_clip(clip_model).prepare(image).to(clip_model.dtype)
    output = clip_model(pixel_values=pixels, **text_inputs)
    return F.normalize(output.image_embeds.float(), dim=-1), F.normalize(output.text_embeds.float(), dim=-1)


# Copied from pipeline_muse.clip_similarity
def clip_similarity(
    clip_model: CLIPModel, image: torch.Tensor, text_inputs: Mapping[str, torch.Tensor], scale: float | None = None
) -> torch.Tensor:
    """
    `scale * cos(image, text)` (Eq. 10) of each sample, in float32.

    Args:
        clip_model, image, text_inputs: See [`clip_features`]; as many texts as images.
        scale (`float`, *optional*): Defaults to CLIP's own logit scale, 100 in the released models.

    Returns:
        `torch.Tensor` of shape `(batch_size,)`.
    """
    image_features, text_features = clip_features(clip_model, image, text_inputs)
    scale = clip_model.logit_scale.float().exp() if scale is None else scale
    return scale * (image_features * text_features).sum(dim=-1)


# Copied from pipeline_muse.to_rgb
def to_rgb(image: PIL.Image.Image, name: str = "image") -> PIL.Image.Image:
    """
    Any photograph as upright 8-bit RGB: EXIF rotation applied, 16 bits and floats (of which 1, 255 or 65535 is white)
    scaled to 8, transparency laid on white.
    """
    image = PIL.ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.array(image, dtype=np.float32)
        most = pixels.max()
        if not np.isfinite(most):
            raise ValueError(f"`{name}` has pixels that are not finite.")
        white = 65535 if image.mode.startswith("I;") or most > 255 else 255
        pixels *= 255 / (1 if image.mode == "F" and most <= 1 else white)
        image = PIL.Image.fromarray(pixels.round(out=pixels).clip(0, 255, out=pixels).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


# Copied from pipeline_muse.array_to_rgb
def array_to_rgb(array: np.ndarray, name: str = "image") -> PIL.Image.Image:
    """An array of shape `(H, W)` or `(H, W, 1, 3 or 4)`, uint8, uint16, bool or floats in [0, 1], as a picture."""
    if array.ndim == 3 and array.shape[-1] == 1:
        array = array[..., 0]
    if array.ndim != 2 and (array.ndim != 3 or array.shape[-1] not in (3, 4)) or array.size == 0:
        raise ValueError(f"`{name}` arrays have to be of shape (H, W) or (H, W, 3 or 4), but are {array.shape}.")
    if np.issubdtype(array.dtype, np.floating):
        if not (np.isfinite(array).all() and array.min() >= 0 and array.max() <= 1):
            raise ValueError(f"`{name}` arrays of floats have to lie in [0, 1].")
        array = (array * 255).round().astype(np.uint8)
    if array.dtype == np.uint16:
        array = (array / 257).round().astype(np.uint8)
    if array.dtype == bool:
        array = array.astype(np.uint8) * 255
    if array.dtype != np.uint8:
        raise ValueError(f"`{name}` arrays have to hold uint8, uint16, bool or floats, but hold {array.dtype}.")
    return to_rgb(PIL.Image.fromarray(array))


# Copied from pipeline_muse.fit_size
def fit_size(width: int, height: int, area: int, multiple: int = 8) -> tuple[int, int]:
    """The size of about `area` pixels with the aspect ratio of `(width, height)`, in multiples of `multiple`."""
    scale = (area / (width * height)) ** 0.5
    return tuple(max(multiple, round(side * scale / multiple) * multiple) for side in (width, height))


# --------------------------------------------------------------------------------------
# Checks, contexts and records
# --------------------------------------------------------------------------------------


# Copied from pipeline_muse.is_dynamic
def is_dynamic(module: str) -> bool:
    """Whether diffusers or transformers loaded a module from a checkpoint's own code."""
    return module.split(".")[0] in ("diffusers_modules", "transformers_modules")


# Copied from pipeline_muse.is_number
def is_number(value: Any) -> bool:
    """True for Python's and NumPy's integers and floats, which PyTorch can take, but not for booleans."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


# Copied from pipeline_muse.check_range
def check_range(name: str, value: Any, low: float, high: float = math.inf, integer: bool = False) -> None:
    """Raises a `TypeError` or `ValueError` that names the argument unless `low <= value <= high`."""
    if not is_number(value) or (integer and not isinstance(value, numbers.Integral)):
        raise TypeError(f"`{name}` has to be {'an integer' if integer else 'a number'}, but is {value!r}.")
    if not low <= value <= high:
        raise ValueError(f"`{name}` has to lie in [{low}, {high}], but is {value!r}.")


# Copied from pipeline_muse.check_choice
def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises a `ValueError` that names the argument unless it is one of `choices`."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"`{name}` has to be one of {list(choices)}, but is {value!r}.")


# Copied from pipeline_muse.check_flag
def check_flag(name: str, value: Any) -> None:
    """Raises a `TypeError` that names the argument unless it is a boolean."""
    if not isinstance(value, bool):
        raise TypeError(f"`{name}` has to be True or False, but is {value!r}.")


# Copied from pipeline_muse.check_texts
def check_texts(name: str, value: Any) -> None:
    """Raises an error that names the argument unless it is a string or a list of some strings."""
    if isinstance(value, list) and not value:
        raise ValueError(f"`{name}` is an empty list; give at least one string.")
    if not all(isinstance(text, str) for text in (value if isinstance(value, list) else [value])):
        raise TypeError(f"`{name}` has to be a string or a list of strings, but is {value!r}.")


# Copied from pipeline_muse.check_tensor
def check_tensor(name: str, value: Any, *shape: int | None) -> None:
    """Raises an error that names the argument unless it holds finite floats in `shape`; `None` is any size but 0."""
    if not (isinstance(value, torch.Tensor) and value.is_floating_point()):
        raise TypeError(f"`{name}` has to be a tensor of floats, but is {getattr(value, 'dtype', type(value))}.")
    sizes = tuple(value.shape)
    if len(sizes) != len(shape) or any(size != (wanted or max(1, size)) for size, wanted in zip(sizes, shape)):
        wanted = ", ".join(str(size or "n") for size in shape)
        raise ValueError(f"`{name}` has to have shape ({wanted}), but has {sizes}.")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` has to be finite, but holds infinite values or NaN.")


# Copied from pipeline_muse.check_finite
def check_finite(name: str, values: torch.Tensor) -> None:
    """Raises a `ValueError` rather than letting a black image pass."""
    if not torch.isfinite(values).all():
        raise ValueError(
            f"The {name} of the call came out infinite or NaN. Half precision overflows in some networks, above all in"
            " VAEs: use bfloat16 or float32, or a VAE that was fixed for float16."
        )


# Copied from pipeline_muse.steps_of_strength
def steps_of_strength(strength: float, num_inference_steps: int) -> int:
    """How many of the denoising steps an edit of this strength walks."""
    return round(strength * num_inference_steps)


# Copied from pipeline_muse.check_strength
def check_strength(strength: Any, num_inference_steps: int) -> None:
    """Raises unless `strength` lies in (0, 1] and leaves at least one step."""
    check_range("strength", strength, 0, 1)
    if steps_of_strength(strength, num_inference_steps) < 1:
        raise ValueError(
            f"`strength` has to lie in (0, 1] and leave a step to walk, but is {strength} of {num_inference_steps}."
        )


# Copied from pipeline_muse.accepted_arguments
def accepted_arguments(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that `function` has parameters for; schedulers differ in what `step` takes."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


# Copied from pipeline_muse.repeat_each
def repeat_each(values: list, times: int) -> list:
    """`[a, b]` -> `[a, a, b, b]`, the order in which upstream lays out several images per prompt."""
    return [value for value in values for _ in range(times)]


# Copied from pipeline_muse.chunks
def chunks(values: list, size: int | None) -> list[list]:
    """`values` in runs of at most `size`; in one run where `size` is `None`."""
    size = size or max(1, len(values))
    return [values[start : start + size] for start in range(0, len(values), size)]


# Copied from pipeline_muse.checkpointed
@contextmanager
def checkpointed(*modules: ModelMixin) -> Iterator[None]:
    """Models that recompute activations in the backward pass; every flag returns to what it was, whatever happens."""
    parts = [part for module in modules for part in module.modules() if hasattr(part, "gradient_checkpointing")]
    flags = [part.gradient_checkpointing for part in parts]
    try:
        for module in modules:
            module.enable_gradient_checkpointing()
        yield
    finally:
        for part, flag in zip(parts, flags):
            part.gradient_checkpointing = flag


# Copied from pipeline_muse.frozen
@contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """Modules in eval mode whose weights need no gradient; every flag returns to what it was, whatever happens."""
    weights = [(module, name, one.requires_grad) for module in modules for name, one in module.named_parameters()]
    training = [(part, part.training) for module in modules for part in module.modules()]
    try:
        for module in modules:
            module.requires_grad_(False).eval()
        yield
    finally:
        for module, name, requires_grad in weights:
            module.get_parameter(name).requires_grad_(requires_grad)  # by name: offloading replaces weights
        for part, mode in training:
            part.training = mode


# Copied from pipeline_muse.fork_generator
def fork_generator(generator: torch.Generator | list[torch.Generator] | None):
    """A copy that draws what `generator` would draw next and leaves it where it is, so stock noise stays stock."""
    if isinstance(generator, list):
        return [fork_generator(one) for one in generator]
    source = torch.default_generator if generator is None else generator
    return torch.Generator(device=source.device).set_state(source.get_state())


def latents_statistics(vae: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> list[torch.Tensor]:
    """Mean and standard deviation per channel by which this VAE's latents are normalised; 0 and 1 if they are not."""
    mean, std = vae.config.get("latents_mean"), vae.config.get("latents_std")
    values = (mean, std) if mean is not None and std is not None else ([0.0], [1.0])
    return [torch.tensor(value, dtype=latents.dtype, device=latents.device).view(1, -1, 1, 1) for value in values]


@contextmanager
def upcast(vae: AutoencoderKL) -> Iterator[None]:
    """In float32, as upstream decodes, a VAE that overflows in float16; back in float16 whatever happens."""
    overflows = vae.dtype == torch.float16 and vae.config.force_upcast
    try:
        if overflows:
            vae.to(torch.float32)
        yield
    finally:
        if overflows:
            vae.to(torch.float16)


# Copied from pipeline_muse.Iterate
@dataclass
class Iterate:
    """One point of the inner loop that was evaluated: its loss, the noise it leads to, and the tokens themselves."""

    loss: float
    noise_pred: torch.Tensor  # (channels, h, w)
    tokens: torch.Tensor  # (n, D)
    index: int


# Copied from pipeline_muse.InnerLoop
@dataclass
class InnerLoop:
    """The optimisation of one denoising step, by sample: the tokens as they move, and the best so far."""

    tokens: dict[int, torch.Tensor]  # each (n, D), float32
    optimizer: torch.optim.Optimizer
    best: dict[int, Iterate] = field(default_factory=dict)


# Copied from pipeline_muse.SourceRegion
@dataclass
class SourceRegion:
    """Where an edit may act, and what it has to put back elsewhere."""

    mask: torch.Tensor  # (B, 1, h, w), 1 where the emotion acts, 0 where the source stays
    path: list[torch.Tensor]  # latents (B, channels, h, w) of the inversion, from the source to noise

    def restore(
        self, latents: torch.Tensor, steps_left: int, samples: list[int] | slice = slice(None)
    ) -> torch.Tensor:
        """The latents of `samples` with the source's own, as the inversion met them, outside of the mask."""
        mask, source = self.mask[samples], self.path[steps_left][samples]
        return (mask * latents + (1 - mask) * source).to(latents.dtype)


# Copied from pipeline_muse.select_rows
def select_rows(value: Any, null: list[int], cond: list[int], batch_size: int) -> Any:
    """
    Rows of conditioning for the null prompt of the samples `null` and the prompt of the samples `cond`, in nested
    dicts and lists too. Upstream stacks null rows first, so prompt rows are always the last `batch_size`.
    """
    if isinstance(value, torch.Tensor):
        first = value.shape[0] - batch_size
        return value[null + [first + sample for sample in cond]]
    if isinstance(value, dict):
        return {key: select_rows(part, null, cond, batch_size) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [select_rows(part, null, cond, batch_size) for part in value]
    return value


# Copied from pipeline_muse.Conditioning
@dataclass
class Conditioning:
    """All that the network is told besides latents and timestep, for `batch_size` images."""

    batch_size: int
    prompt_embeds: torch.Tensor  # (2 * batch_size, L, D) with the null prompt first, or (batch_size, L, D)
    added_cond_kwargs: dict[str, Any] | None = None
    timestep_cond: torch.Tensor | None = None
    cross_attention_kwargs: dict[str, Any] | None = None

    @property
    def has_null(self) -> bool:
        return self.prompt_embeds.shape[0] > self.batch_size


# Copied from pipeline_muse.GuidanceSettings with MusePipeline->MuseXLPipeline
@dataclass(frozen=True)
class GuidanceSettings:
    """The switches of the method, checked. Their meaning: [`MuseXLPipeline.__call__`]."""

    semantic_threshold: float
    max_inner_steps: int
    loss_threshold: float
    stop_probability: float | None
    emotion_learning_rate: float
    inherent_weight: float
    similar_weight: float
    similarity_scale: float | None
    max_token_norm: float | None
    guided_preview: bool
    carry_emotion_tokens: bool
    emotion_strength: float
    update_interval: int
    patience: int | None
    emotion_optimizer: str
    keep_best: bool
    preview_scale: float
    max_inner_batch: int | None
    gradient_checkpointing: bool

    def __post_init__(self):
        check_range("emotion_strength", self.emotion_strength, 0, 1)
        if self.emotion_strength == 0:
            raise ValueError("`emotion_strength` has to lie in (0, 1], but is 0; use `emotion=None` for no emotion.")
        check_range("update_interval", self.update_interval, 1, integer=True)
        check_choice("emotion_optimizer", self.emotion_optimizer, EMOTION_OPTIMIZERS)
        check_range("preview_scale", self.preview_scale, 0, 1)
        if self.preview_scale == 0:
            raise ValueError("`preview_scale` has to lie in (0, 1], but is 0; 0.5 halves both sides of a preview.")
        for name in ("max_inner_batch", "patience"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 1, integer=True)
        check_range("semantic_threshold", self.semantic_threshold, 0)
        check_range("max_inner_steps", self.max_inner_steps, 0, integer=True)
        check_range("loss_threshold", self.loss_threshold, -math.inf)
        if self.stop_probability is not None:
            check_range("stop_probability", self.stop_probability, 0, 1)
        for name in ("max_token_norm", "similarity_scale"):
            if getattr(self, name) is not None:
                check_range(name, getattr(self, name), 0, MAX_WEIGHT)
        for name in ("emotion_learning_rate", "inherent_weight", "similar_weight"):
            check_range(name, getattr(self, name), 0, MAX_WEIGHT)
        for name in ("guided_preview", "carry_emotion_tokens", "keep_best", "gradient_checkpointing"):
            check_flag(name, getattr(self, name))

    def learning_rate(self, step: int) -> float:
        """`lr * (1 - i / 100)` for the 0-based index i of the denoising step; zero from the 101st step on."""
        return self.emotion_learning_rate * max(0.0, 1 - step / 100)

    def optimizer(self, tokens: Iterable[torch.Tensor], step: int) -> torch.optim.Optimizer:
        """A fresh one for each denoising step; for normalised steps the gradients come normalised."""
        kind = torch.optim.Adam if self.emotion_optimizer == "adam" else torch.optim.SGD
        return kind(tokens, lr=self.learning_rate(step))


# Copied from pipeline_muse.Request
@dataclass
class Request:
    """One call, checked and completed; what stands in lists has one entry per prompt."""

    given: dict[str, Any]  # the arguments by name, with prompt, source, mask and size as they will be used
    settings: GuidanceSettings
    labels: list[str]
    targets: list[dict[str, float]]
    similar: list[dict[str, float]]
    emotion_prompts: dict[str, list[str]] | None  # where CLIP classifies zero-shot
    semantic_prompts: list[str] | None  # where the gate asks CLIP
    leads_from_source: bool  # guidance leads away from the source prompt instead of the null prompt


# Copied from pipeline_muse.MuseTrace
@dataclass
class MuseTrace:
    """
    What happened to one image; with it the paper's Figure 2 can be drawn.

    Args:
        labels (`list[str]`): The classifier's labels, in the order of `probabilities`.
        emotion (`dict[str, float]`): The target, as weights that sum to one; empty without an emotion.
        gate_step (`int`, *optional*): Index of the denoising step at which guidance started; `None`: it never did.
        similarity (`list[float]`): 100 * cos of preview and prompt (in CLIP's own scale) at each step up to that one.
        inherent_emotion (`str`, *optional*): What the preview evoked before the gate opened.
        loss (`list[list[float]]`): Per guided step whose tokens were optimised (every `update_interval`-th), the loss
            of each iterate of the tokens that was evaluated, the start included.
        probabilities (`list[list[list[float]]]`): Per such step and iterate, the probability of each label.
        kept (`list[int]`): Per such step, the iterate with the least loss, whose noise was used.
        inner_steps (`int`): Optimisation steps spent in total.
    """

    labels: list[str]
    emotion: dict[str, float]
    gate_step: int | None = None
    similarity: list[float] = field(default_factory=list)
    inherent_emotion: str | None = None
    loss: list[list[float]] = field(default_factory=list)
    probabilities: list[list[list[float]]] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    inner_steps: int = 0

    @property
    def target_probability(self) -> float | None:
        """Probability of the target labels at the last kept iterate."""
        if not self.kept:
            return None
        kept = self.probabilities[-1][self.kept[-1]]
        return sum(p for label, p in zip(self.labels, kept) if label in self.emotion)


# Copied from pipeline_muse.GuidanceState
@dataclass
class GuidanceState:
    """What MUSE knows about the images of a batch while it denoises: B images, C labels, n tokens of width D."""

    target: torch.Tensor  # (B, C), rows sum to 1, or to 0 without an emotion
    similar: torch.Tensor  # (B, C)
    inherent: torch.Tensor  # (B, C), zero until the gate opens
    traces: list[MuseTrace]
    classify: Callable[[torch.Tensor], torch.Tensor]  # pixels (b, 3, H, W) in [-1, 1] -> logits (b, C), float32
    start_tokens: torch.Tensor | None = None  # (B, n, D), float32
    tokens: torch.Tensor | None = None  # (B, n, D), float32
    norm_limit: torch.Tensor | None = None  # (B,)
    text_inputs: dict[str, torch.Tensor] | None = None  # the gate's text, each of shape (B, length)
    calm: dict[int, int] = field(default_factory=dict)  # by sample, how many updates in a row needed no inner step
    previous_preview: dict[int, torch.Tensor] = field(default_factory=dict)

    @property
    def closed(self) -> list[int]:
        """Samples that are denoised without tokens."""
        return [b for b, trace in enumerate(self.traces) if trace.gate_step is None]

    @property
    def waiting(self) -> list[int]:
        """Samples whose gate may still open."""
        return [b for b in self.closed if self.traces[b].emotion]

    @property
    def opened(self) -> list[int]:
        return [b for b, trace in enumerate(self.traces) if trace.gate_step is not None]

    def resting(self, looks: bool, patience: int | None) -> list[int]:
        """Open samples that keep their tokens: all of them between updates, and those that have settled."""
        return [b for b in self.opened if not looks or (patience and self.calm.get(b, 0) >= patience)]

    def open_gate(self, sample: int, step: int, logits: torch.Tensor) -> None:
        """Starts guidance of a sample whose preview evoked `logits` before; that emotion is its inherent one."""
        trace = self.traces[sample]
        label = int(logits.argmax())
        trace.gate_step, trace.inherent_emotion = step, trace.labels[label]
        self.inherent[sample] = 0.0
        if self.target[sample, label] == 0:  # else target and inherent terms would cancel
            self.inherent[sample, label] = 1.0

    def mean_of_labels(self, table: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Per sample, its labels' entries of `table` weighted as in its target; zeros without an emotion."""
        zeros = torch.zeros_like(next(iter(table.values())))
        means = [sum((w * table[label] for label, w in trace.emotion.items()), zeros) for trace in self.traces]
        return torch.stack(means)

    def bounded(self, sample: int, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens of shape `(n, D)`, each within the sample's norm limit."""
        return tokens if self.norm_limit is None else tokens.renorm(2, 0, float(self.norm_limit[sample]))

    def summary(self) -> dict[str, str]:
        """The loop's state for the postfix of the progress bar."""
        guided = [self.traces[b] for b in self.opened]
        postfix = {"gate": f"{len(guided)}/{sum(bool(trace.emotion) for trace in self.traces)}"}
        if guided:
            postfix["inner"] = str(sum(trace.inner_steps for trace in guided))
            postfix["p"] = f"{sum(trace.target_probability for trace in guided) / len(guided):.2f}"
        return postfix


@dataclass
class MuseXLPipelineOutput(StableDiffusionXLPipelineOutput):
    """
    Output of [`MuseXLPipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): As upstream.
        emotion_tokens (`torch.Tensor` of shape `(batch_size, num_emotion_tokens, embedding_dim)`, *optional*): The
            optimised tokens, float32; pass them as `emotion_tokens=` to start from them. `None` without an emotion.
        trace (`list[MuseTrace]`, *optional*): One per image. `None` without an emotion.
    """

    emotion_tokens: torch.Tensor | None = None
    trace: list[MuseTrace] | None = None


# --------------------------------------------------------------------------------------
# The pipeline
# --------------------------------------------------------------------------------------


class MuseXLPipeline(StableDiffusionXLPipeline):
    """
    Text-to-image generation and photo editing that evoke an emotion, with Stable Diffusion XL.

    Derives from [`StableDiffusionXLPipeline`] and does exactly what it does unless `emotion` or `image` is given.
    Components as upstream, plus three optional ones and one setting:

    Args:
        clip_model (`CLIPModel`): Opens the semantic gate; reads the prompt through the pipeline's first tokenizer.
            `None` is fine while `semantic_threshold` is 0 or infinite.
        emotion_classifier (`PreTrainedModel`): Pixels in, logits out, names in `config.id2label`; `image_size`,
            `image_mean` and `image_std` in its config. Where it is `None`, `clip_model` serves, zero-shot.
        preview_vae (`AutoencoderTiny`): Decodes previews and the guidance image in place of `vae`. May be `None`.
        semantic_threshold (`float`, defaults to 18.0): The gate's threshold for this checkpoint's CLIP, in units of
            `clip_model.logit_scale.exp() * cos`. 18 is the paper's, for OpenAI's ViT-L/14.
    """

    # Guidance sends gradients back through unet, vae and classifier: whatever comes after the unet has to stay put,
    # so the chain of modules that push each other out ends there.
    model_cpu_offload_seq = "text_encoder->text_encoder_2->image_encoder->unet"
    # Copied from pipeline_muse.MusePipeline._optional_components with StableDiffusion->StableDiffusionXL
    _optional_components = StableDiffusionXLPipeline._optional_components + [
        "clip_model",
        "emotion_classifier",
        "preview_vae",
    ]
    _callback_tensor_inputs = StableDiffusionXLPipeline._callback_tensor_inputs + [
        "negative_prompt_embeds",
        "emotion_tokens",
    ]
    # Arguments of `__call__` by name: `pipe(prompt, emotion="awe", **pipe.presets["fast"])`.
    presets = {
        # The paper's, and the defaults
        "paper": {
            "max_inner_steps": 10,
            "emotion_learning_rate": 0.01,
            "loss_threshold": 1e-4,
            "stop_probability": None,
        },
        # Larger steps (than `MusePipeline`'s too: no layer norm scales XL's embeddings), and none where it is there
        "full": {"max_inner_steps": 5, "emotion_learning_rate": 0.15, "stop_probability": 0.97},
        # One normalised step at every 3rd denoising step, from the emotion's word on, until one is not needed
        "fast": {
            "emotion_token_init": "emotion",
            "update_interval": 3,
            "patience": 1,
            "max_inner_steps": 1,
            "emotion_optimizer": "normalized",
            "emotion_learning_rate": 0.5,
            "keep_best": False,
            "stop_probability": 0.97,
        },
    }  # type: dict[str, dict[str, Any]]
    # What `save_config` writes. Read at once, as diffusers puts the file of each revision that it loads in one place.
    # Copied from pipeline_muse.MusePipeline._source
    _source = Path(__file__).read_bytes() if is_dynamic(__name__) else None

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        image_encoder: CLIPVisionModelWithProjection = None,
        feature_extractor: CLIPImageProcessor = None,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
        *,
        clip_model: CLIPModel,
        emotion_classifier: PreTrainedModel,
        preview_vae: AutoencoderTiny,
        semantic_threshold: float = 18.0,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            text_encoder_2=text_encoder_2,
            tokenizer=tokenizer,
            tokenizer_2=tokenizer_2,
            unet=unet,
            scheduler=scheduler,
            image_encoder=image_encoder,
            feature_extractor=feature_extractor,
            force_zeros_for_empty_prompt=force_zeros_for_empty_prompt,
            add_watermarker=add_watermarker,
        )
        self.register_modules(clip_model=clip_model, emotion_classifier=emotion_classifier, preview_vae=preview_vae)
        self.register_to_config(semantic_threshold=semantic_threshold)

    # Copied from pipeline_muse.MusePipeline.from_pipe with MusePipeline->MuseXLPipeline
    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "MuseXLPipeline":
        """As upstream; the components that only MUSE has are `None` where neither `pipeline` nor `kwargs` has them."""
        ours = ("clip_model", "emotion_classifier", "preview_vae")
        return super().from_pipe(pipeline, **{name: None for name in ours if name not in pipeline.components} | kwargs)

    # Copied from pipeline_muse.MusePipeline.load_emotion_classifier
    def load_emotion_classifier(
        self,
        classifier: str | os.PathLike | PreTrainedModel,
        image_processor: Any = None,
        revision: str | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        """
        Makes `classifier` the one that guides, and the one that `save_pretrained` saves.

        Args:
            classifier (`str`, `os.PathLike` or `PreTrainedModel`): Any image classifier of transformers, or a
                [`SimEmoForImageClassification`]: the model, or its id on the Hub or its folder, from which it is
                loaded in the pipeline's dtype. It is moved to the pipeline's device.
            image_processor (*optional*): The classifier's own image processor; its size, mean and std are written
                into the classifier's config, where the pipeline reads them. Not needed if they stand there already;
                for an id or a folder it is found there too.
            revision (`str`, *optional*): The branch, tag or commit of an id on the Hub.
            trust_remote_code (`bool`, defaults to `False`): Whether code of an id or a folder, as SimEmo's, may run.

        Raises:
            TypeError: If `classifier` is none of these.
            ValueError: If size, mean or std are known from nowhere, or `revision` or `trust_remote_code` come with a
                model that is loaded already.
        """
        if isinstance(classifier, (str, os.PathLike)):
            source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
            model = AutoModelForImageClassification.from_pretrained(classifier, dtype=self.dtype, **source).eval()
            if image_processor is None and not all(hasattr(model.config, name) for name in PIXEL_SETTINGS):
                image_processor = AutoImageProcessor.from_pretrained(classifier, **source)
        elif not isinstance(classifier, PreTrainedModel):
            raise TypeError(
                "`classifier` has to be a transformers PreTrainedModel, an id on the Hub or a folder, but is"
                f" {type(classifier)}."
            )
        elif revision is not None or trust_remote_code:
            raise ValueError("`revision` and `trust_remote_code` are for an id or a folder, not for a loaded model.")
        else:
            model = classifier
        if image_processor is not None:
            spec = PixelSpec.from_processor(image_processor)
            height, width = spec.size
            model.config.image_size = height if height == width else [height, width]
            model.config.image_mean, model.config.image_std = list(spec.mean), list(spec.std)
        PixelSpec.from_classifier(model)
        self.register_modules(emotion_classifier=model.to(self._execution_device))

    # Copied from pipeline_muse.MusePipeline.emotion_labels
    @property
    def emotion_labels(self) -> list[str]:
        """
        The labels that `emotion` may name: the classifier's, in its order; without one those that `clip_model` is
        asked for (`EMOTION_PROMPTS`); empty without either.
        """
        if self.emotion_classifier is None:
            return [] if self.clip_model is None else list(EMOTION_PROMPTS)
        id2label = self.emotion_classifier.config.id2label
        return [id2label[index] for index in sorted(id2label)]

    # ---- saving ----------------------------------------------------------------------------------------------------

    # Copied from pipeline_muse.MusePipeline.to_json_string
    def to_json_string(self) -> str:
        """
        The index as JSON. Where this class or a component was loaded from a checkpoint's own code, it is named as
        `[module, class]`, by which a fresh process finds it again; upstream names modules of this process' cache.
        """
        index = json.loads(super().to_json_string())
        if is_dynamic(type(self).__module__):
            index["_class_name"] = [type(self).__module__.rpartition(".")[2], type(self).__name__]
        for value in index.values():
            if isinstance(value, list) and isinstance(value[0], str) and is_dynamic(value[0]):
                value[0] = value[0].rpartition(".")[2]
        return json.dumps(index, indent=2, sort_keys=True) + "\n"

    # Copied from pipeline_muse.MusePipeline.save_config
    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the index as upstream does, and beside it this file, if that was loaded from a checkpoint's code."""
        if is_dynamic(type(self).__module__):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            Path(save_directory, Path(__file__).name).write_bytes(self._source)
        super().save_config(save_directory, push_to_hub, **kwargs)

    # ---- checks --------------------------------------------------------------------------------------------------

    # Copied from pipeline_muse.MusePipeline._check_guidance
    def _check_guidance(self, given: Mapping[str, Any], settings: GuidanceSettings) -> None:
        """Raises a `ValueError` that says what is missing for guidance."""
        if given["mask_image"] is not None and given["image"] is None:
            raise ValueError("`mask_image` needs an `image` to edit.")
        if given["emotion"] is None:
            for name in ("emotion_tokens", "emotion_prompts"):
                if given[name] is not None:
                    raise ValueError(f"`{name}` need an `emotion`; without one there is nothing to guide.")
            return
        is_zero_shot = given["emotion_prompts"] is not None or self.emotion_classifier is None
        if is_zero_shot and self.clip_model is None:
            raise ValueError(
                "`emotion` needs an `emotion_classifier`, or at least a `clip_model` to classify zero-shot: call"
                " `pipe.load_emotion_classifier(model_or_id)`, or pass `clip_model=` to `from_pretrained`."
            )
        if not is_zero_shot:
            PixelSpec.from_classifier(self.emotion_classifier)
        if self.clip_model is None and 0 < settings.semantic_threshold < math.inf:
            raise ValueError(
                f"`semantic_threshold` {settings.semantic_threshold} needs a `clip_model` to measure the similarity"
                " of preview and prompt: pass `clip_model=` to `from_pretrained`, or `semantic_threshold=0` to guide"
                " from the first step."
            )
        if settings.max_inner_steps > 0 and torch.is_inference_mode_enabled():
            raise ValueError(
                "`emotion` needs gradients, which `torch.inference_mode()` forbids. Call the pipeline outside of it,"
                " or under `torch.no_grad()`."
            )
        chain = (self.unet, self._preview_decoder, self.clip_model if is_zero_shot else self.emotion_classifier)
        processors = [one for module in chain for one in getattr(module, "attn_processors", {}).values()]
        if settings.max_inner_steps > 0 and any("XFormers" in type(one).__name__ for one in processors):
            raise ValueError(
                "`emotion` needs gradients, which xFormers' attention lacks for some widths of heads. Use PyTorch's:"
                " call `pipe.disable_xformers_memory_efficient_attention()`."
            )
        if any(weight.is_inference() for module in chain for weight in module.parameters()):
            raise ValueError("`emotion` needs weights that were not loaded inside `torch.inference_mode()`.")

    # Copied from pipeline_muse.MusePipeline._resolve_emotion_prompts
    def _resolve_emotion_prompts(
        self, emotion_prompts: Mapping[str, str | Sequence[str]] | None
    ) -> dict[str, list[str]] | None:
        """The texts that stand for each emotion where CLIP classifies zero-shot; `None` where a classifier does."""
        if emotion_prompts is None:
            return EMOTION_PROMPTS if self.emotion_classifier is None else None
        if not isinstance(emotion_prompts, Mapping):
            raise TypeError(f"`emotion_prompts` has to map labels to prompts, but is {emotion_prompts!r}.")
        if len(emotion_prompts) < 2:
            raise ValueError(f"`emotion_prompts` needs two labels to tell apart, but has {list(emotion_prompts)}.")
        table = {name: [texts] if isinstance(texts, str) else texts for name, texts in emotion_prompts.items()}
        for label, texts in table.items():
            is_list = isinstance(texts, (list, tuple)) and len(texts) > 0
            if not (isinstance(label, str) and is_list and all(isinstance(text, str) for text in texts)):
                raise TypeError(
                    f"`emotion_prompts` has to give {label!r} a prompt or a list of them, but has {texts!r}."
                )
        return {label: list(texts) for label, texts in table.items()}

    # Copied from pipeline_muse.MusePipeline._resolve_prompts
    def _resolve_prompts(
        self,
        prompt: str | list[str] | None,
        prompt_embeds: torch.Tensor | None,
        emotion: Emotion | list[Emotion],
        labels: list[str],
    ) -> tuple[str | list[str] | None, list[dict[str, float]]]:
        """
        One target per prompt, and prompts where there are only emotions: "an image of {emotion}".

        Returns:
            `tuple`: The prompt (`None` if there are `prompt_embeds`), and per prompt the target as label -> weight.
        """
        entries: list[Any] | None = list(emotion) if isinstance(emotion, (list, tuple)) else None
        if entries == []:
            raise ValueError("`emotion` is an empty list; give one entry per prompt.")
        targets = [normalize_emotion(entry, labels) for entry in (entries or [emotion])]
        if prompt is None and prompt_embeds is None:
            if not all(targets):
                raise ValueError("`prompt` has to be given where `emotion` is None.")
            prompt = [f"an image of {' and '.join(target)}" for target in targets]
            return (prompt if entries else prompt[0]), targets
        batch_size = self._count_prompts(prompt, prompt_embeds)
        if entries is None:
            return prompt, targets * batch_size
        if len(entries) != batch_size:
            raise ValueError(f"`emotion` has {len(entries)} entries for {batch_size} prompts; give one for each.")
        return prompt, targets

    # Copied from pipeline_muse.MusePipeline._count_prompts
    @staticmethod
    def _count_prompts(prompt: str | list[str] | None, prompt_embeds: torch.Tensor | None) -> int:
        if prompt is None:
            return prompt_embeds.shape[0]
        return len(prompt) if isinstance(prompt, list) else 1

    # Copied from pipeline_muse.MusePipeline._check_similar
    @staticmethod
    def _check_similar(similar_emotions: Any, labels: list[str]) -> None:
        """Raises unless `similar_emotions` is None, "both", a list of labels, or labels with a list for each."""
        if similar_emotions is None or (isinstance(similar_emotions, str) and similar_emotions == "both"):
            return
        is_table = isinstance(similar_emotions, Mapping)
        rows = [list(similar_emotions), *similar_emotions.values()] if is_table else [similar_emotions]
        if not all(isinstance(names, (list, tuple)) for names in rows):
            raise TypeError(
                "`similar_emotions` has to be None, 'both', a list of labels or a mapping from labels to lists of"
                f" labels, but is {similar_emotions!r}."
            )
        unknown = [name for names in rows for name in names if not (isinstance(name, str) and name in labels)]
        if unknown:
            raise ValueError(f"`similar_emotions` {unknown} are not among {sorted(labels)}.")

    # Copied from pipeline_muse.MusePipeline._resolve_similar
    @staticmethod
    def _resolve_similar(
        similar_emotions: str | Sequence[str] | Mapping[str, Sequence[str]] | None,
        target: dict[str, float],
        labels: list[str],
    ) -> dict[str, float]:
        """The labels to keep away from as weights that sum to one (or none), without those of the target itself."""
        if similar_emotions is None or similar_emotions == "both":
            same_valence = similar_emotions is None
            names = [other for label in target for other in wheel_neighbors(label, same_valence)]
            names = [name for name in names if name in labels]
        elif isinstance(similar_emotions, Mapping):
            names = [other for label in target for other in similar_emotions.get(label, ())]
        else:
            names = list(similar_emotions)
        names = sorted(set(names) - set(target))
        return dict.fromkeys(names, 1 / len(names)) if names else {}

    # Copied from pipeline_muse.MusePipeline._check_tokens
    def _check_tokens(self, given: Mapping[str, Any], targets: Sequence[Mapping[str, float]]) -> None:
        """Raises unless the start of the tokens is defined for every image."""
        check_range("num_images_per_prompt", given["num_images_per_prompt"], 1, integer=True)
        batch_size = len(targets) * given["num_images_per_prompt"]
        emotion_token_init, emotion_tokens = given["emotion_token_init"], given["emotion_tokens"]
        num_emotion_tokens = given["num_emotion_tokens"]
        check_choice("emotion_token_init", emotion_token_init, ("random", "emotion"))
        if num_emotion_tokens is not None:
            check_range("num_emotion_tokens", num_emotion_tokens, 1, integer=True)
        shape: list[int | None] = [num_emotion_tokens, self.unet.config.cross_attention_dim]
        if isinstance(emotion_tokens, Mapping):
            for label in sorted({label for target in targets for label in target}):
                if label not in emotion_tokens:
                    raise ValueError(f"`emotion_tokens` has no tokens of {label!r}, only of {list(emotion_tokens)}.")
                check_tensor("emotion_tokens", emotion_tokens[label], *shape)
                shape = list(emotion_tokens[label].shape)  # all alike
        elif emotion_tokens is not None:
            sizes = getattr(emotion_tokens, "shape", ())
            rows = [] if len(sizes) == 2 else [1 if sizes[:1] == (1,) else batch_size]
            check_tensor("emotion_tokens", emotion_tokens, *rows, *shape)

    # Copied from pipeline_muse.MusePipeline._resolve_semantic_prompts
    def _resolve_semantic_prompts(
        self,
        semantic_prompt: str | list[str] | None,
        prompt: str | list[str] | None,
        num_prompts: int,
        settings: GuidanceSettings,
    ) -> list[str] | None:
        """The gate's text for each prompt; `None` where the gate asks no CLIP."""
        text = prompt if semantic_prompt is None else semantic_prompt
        texts = text if isinstance(text, list) else [text] * num_prompts
        if len(texts) != num_prompts:
            raise ValueError(f"`semantic_prompt` has {len(texts)} entries for {num_prompts} prompts.")
        if self.clip_model is None or settings.semantic_threshold <= 0:
            return None
        if text is None and settings.semantic_threshold < math.inf:
            raise ValueError("`semantic_prompt` has to be given with `prompt_embeds`, or `semantic_threshold=0`.")
        return texts if text is not None else None

    # Copied from pipeline_muse.MusePipeline._resolve_reference
    @staticmethod
    def _resolve_reference(given: Mapping[str, Any]) -> bool:
        """Whether guidance leads away from the source prompt instead of the null prompt."""
        guidance_reference = given["guidance_reference"]
        check_choice("guidance_reference", guidance_reference, ("null", "source"))
        if guidance_reference == "null":
            return False
        if given["image"] is None:
            raise ValueError("`guidance_reference='source'` needs an `image` to edit.")
        for name in NEGATIVE_PROMPTS:
            if given.get(name) is not None:
                raise ValueError(f"`{name}` has no place with `guidance_reference='source'`; use 'null'.")
        return True

    # ---- images in and out ---------------------------------------------------------------------------------------

    # Copied from pipeline_muse.MusePipeline._resolve_image
    def _resolve_image(
        self, given: Mapping[str, Any], num_prompts: int
    ) -> tuple[list[PIL.Image.Image] | torch.Tensor | None, int, int]:
        """The source, if there is one, and the height and width of the result."""
        image, height, width = given["image"], given["height"], given["width"]
        self._check_size(height, width)
        if image is None:
            return None, *self._default_size(height, width)
        self._check_path(given["strength"], given["num_inference_steps"])
        image = self._check_image(image, num_prompts)
        return image, *self._image_size(image, height, width)

    # Copied from pipeline_muse.MusePipeline._check_image
    def _check_image(
        self, image: PipelineImageInput, batch_size: int, name: str = "image", channels: int = 3
    ) -> list[PIL.Image.Image] | torch.Tensor:
        """Sources, or masks, as upright RGB pictures (one, or `batch_size`), or as a tensor `(n, channels, H, W)`."""
        if isinstance(image, np.ndarray):
            image = list(image) if image.ndim == 4 else image
        images = list(image) if isinstance(image, (list, tuple)) else [image]
        if not images or not all(isinstance(one, (PIL.Image.Image, np.ndarray, torch.Tensor)) for one in images):
            kinds = sorted({type(one).__name__ for one in images}) or "an empty list"
            raise TypeError(f"`{name}` has to be a PIL image, an array, a tensor or a list of them, but is {kinds}.")
        if len({one.shape if isinstance(one, torch.Tensor) else None for one in images}) > 1:
            raise ValueError(f"`{name}` has to hold tensors of one shape, or no tensors.")
        if isinstance(images[0], torch.Tensor):
            batch = torch.cat(images) if images[0].ndim == 4 else torch.stack(images)
            if batch.ndim != 4 or batch.shape[1] != channels or batch.numel() == 0:
                raise ValueError(
                    f"`{name}` tensors have to be of shape ({channels}, H, W), but are {tuple(batch.shape[1:])}."
                )
            if not (batch.is_floating_point() and batch.min() >= 0 and batch.max() <= 1):
                raise ValueError(f"`{name}` tensors have to hold floats in [0, 1].")
            count, result = batch.shape[0], batch
        else:
            if any(isinstance(one, PIL.Image.Image) and 0 in one.size for one in images):
                raise ValueError(f"`{name}` has no pixels.")
            result = [
                to_rgb(one, name) if isinstance(one, PIL.Image.Image) else array_to_rgb(one, name) for one in images
            ]
            count = len(result)
        if count not in (1, batch_size):
            raise ValueError(f"`{name}` holds {count} pictures for {batch_size} prompts; give one, or one for each.")
        return result

    # Copied from pipeline_muse.MusePipeline._check_path
    def _check_path(self, strength: float, num_inference_steps: int) -> None:
        """Raises unless there is a path of that many steps, of which `strength` leaves some to walk."""
        most = self.scheduler.config.num_train_timesteps - self.scheduler.config.get("steps_offset", 0)
        check_range("num_inference_steps", num_inference_steps, 1, most, integer=True)
        check_strength(strength, num_inference_steps)

    # Copied from pipeline_muse.MusePipeline._check_size
    @staticmethod
    def _check_size(height: Any, width: Any) -> None:
        """Raises unless these are sides that a picture can have; of what they are multiples upstream checks."""
        for name, side in (("height", height), ("width", width)):
            if side is not None:
                check_range(name, side, 8, integer=True)

    # Copied from pipeline_muse.MusePipeline._image_size
    def _image_size(
        self, images: list[PIL.Image.Image] | torch.Tensor, height: int | None, width: int | None
    ) -> tuple[int, int]:
        """Height and width for editing: the source's aspect ratio at the checkpoint's native number of pixels."""
        if height and width:
            return height, width
        sizes = {image.size for image in images} if isinstance(images, list) else {tuple(images.shape[:1:-1])}
        if len(sizes) > 1:
            raise ValueError(f"`image` holds pictures of sizes {sorted(sizes)}; give `height` and `width` for them.")
        native_height, native_width = self._native_size()
        source_width, source_height = sizes.pop()
        width, height = fit_size(source_width, source_height, area=native_height * native_width)
        return height, width

    def _default_size(self, height: int | None, width: int | None) -> tuple[int, int]:
        """Height and width where there is no source, as upstream."""
        native_height, native_width = self._native_size()
        return height or native_height, width or native_width

    # Copied from pipeline_muse.MusePipeline._native_size
    def _native_size(self) -> tuple[int, int]:
        """Height and width in pixels that the network was trained for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    # Copied from pipeline_muse.MusePipeline._encode_image
    def _encode_image(
        self, images: list[PIL.Image.Image] | torch.Tensor, height: int, width: int, batch_size: int
    ) -> torch.Tensor:
        """Latents of the source, shape `(batch_size, channels, h, w)`: the mode of the posterior, so no noise."""
        pixels = self.image_processor.preprocess(images, height=height, width=width)
        pixels = pixels.to(self._execution_device, self.vae.dtype)
        latents = self._scale_latents(self.vae.encode(pixels).latent_dist.mode())
        return latents.repeat_interleave(batch_size // latents.shape[0], dim=0)

    # Copied from pipeline_muse.MusePipeline._encode_mask
    def _encode_mask(
        self, mask: list[PIL.Image.Image] | torch.Tensor, height: int, width: int, latents: torch.Tensor
    ) -> torch.Tensor:
        """The mask at the size of `latents`, shape `(batch_size, 1, h, w)`, in [0, 1]; soft where it cuts a cell."""
        processor = VaeImageProcessor(self.vae_scale_factor, do_normalize=False, do_convert_grayscale=True)
        pixels = processor.preprocess(mask, height=height, width=width).to(latents)  # (n, 1, H, W)
        cells = F.interpolate(pixels, latents.shape[-2:], mode="area")
        return cells.repeat_interleave(latents.shape[0] // cells.shape[0], dim=0)

    # Copied from pipeline_muse.MusePipeline._preview_decoder
    @property
    def _preview_decoder(self) -> AutoencoderKL | AutoencoderTiny:
        return self.vae if self.preview_vae is None else self.preview_vae

    # Copied from pipeline_muse.MusePipeline._decode_preview
    def _decode_preview(self, latents: torch.Tensor) -> torch.Tensor:
        """Pixels in about [-1, 1], through `preview_vae` if there is one; differentiable."""
        vae = self._preview_decoder
        return vae.decode(self._unscale_latents(latents, vae).to(vae.dtype), return_dict=False)[0]

    def _scale_latents(self, latents: torch.Tensor) -> torch.Tensor:
        """The VAE's latents as the network sees them."""
        mean, std = latents_statistics(self.vae, latents)
        return (latents - mean) * self.vae.config.scaling_factor / std

    def _unscale_latents(self, latents: torch.Tensor, vae: AutoencoderKL | AutoencoderTiny) -> torch.Tensor:
        """The network's latents as `vae` decodes them."""
        mean, std = latents_statistics(vae, latents)
        return latents * std / vae.config.scaling_factor + mean

    def _decode_output(self, latents: torch.Tensor, given: Mapping[str, Any]) -> Any:
        """Images in the wanted form, as upstream."""
        check_finite("latents", latents)
        output_type = given["output_type"]
        if output_type == "latent":
            return latents
        latents = self._unscale_latents(latents.to(self.vae.dtype), self.vae)
        image = self.vae.decode(latents, return_dict=False)[0]
        check_finite("decoded image", image)
        if self.watermark is not None:
            image = self.watermark.apply_watermark(image)
        return self.image_processor.postprocess(image, output_type=output_type)

    # ---- conditioning --------------------------------------------------------------------------------------------

    def _encode_conditioning(self, given: Mapping[str, Any], with_null: bool) -> Conditioning:
        """Upstream's encoding and size conditions, with the null prompt's rows first if `with_null`."""
        prompt_embeds, null_embeds, pooled_embeds, null_pooled_embeds = self._encode_texts(given, with_null)
        batch_size = prompt_embeds.shape[0]
        conditioning = Conditioning(batch_size, prompt_embeds, {"text_embeds": pooled_embeds})
        time_ids = self._time_ids(given, pooled_embeds)
        if with_null:
            conditioning.prompt_embeds = torch.cat([null_embeds, prompt_embeds])
            conditioning.added_cond_kwargs = {"text_embeds": torch.cat([null_pooled_embeds, pooled_embeds])}
            time_ids = torch.cat([self._time_ids(given, pooled_embeds, "negative_"), time_ids])
        # Upstream's order of rows, which for several images is not that of the embeddings; mostly all are the same
        conditioning.added_cond_kwargs["time_ids"] = time_ids.repeat(batch_size, 1)
        return self._complete_conditioning(conditioning, given, with_null)

    def _time_ids(self, given: Mapping[str, Any], pooled_embeds: torch.Tensor, prefix: str = "") -> torch.Tensor:
        """Upstream's size conditions, shape `(1, 6)`: the size of the original, its crop, and the size to make."""
        sizes = [given.get(prefix + name) for name in ("original_size", "target_size")]
        if prefix and None in sizes:
            return self._time_ids(given, pooled_embeds)
        original_size, target_size = (size or (given["height"], given["width"]) for size in sizes)
        crop = given.get(f"{prefix}crops_coords_top_left", (0, 0))
        time_ids = self._get_add_time_ids(
            original_size, crop, target_size, pooled_embeds.dtype, text_encoder_projection_dim=pooled_embeds.shape[-1]
        )
        return time_ids.to(pooled_embeds.device)

    # Copied from pipeline_muse.MusePipeline._encode_texts
    def _encode_texts(self, given: Mapping[str, Any], with_null: bool) -> tuple[torch.Tensor, ...]:
        """What upstream's `encode_prompt` returns."""
        settings = {"device": self._execution_device, "do_classifier_free_guidance": with_null}
        settings["lora_scale"] = (self.cross_attention_kwargs or {}).get("scale")
        return self.encode_prompt(**accepted_arguments(self.encode_prompt, **{**given, **settings}))

    # Copied from pipeline_muse.MusePipeline._complete_conditioning
    def _complete_conditioning(
        self, conditioning: Conditioning, given: Mapping[str, Any], with_null: bool
    ) -> Conditioning:
        """Adds the images of an IP-Adapter, and the guidance scale for networks that want to know it."""
        device, batch_size = self._execution_device, conditioning.batch_size
        conditioning.cross_attention_kwargs = self.cross_attention_kwargs
        adapter = {name: given.get(name) for name in ("ip_adapter_image", "ip_adapter_image_embeds")}
        if any(value is not None for value in adapter.values()):
            image_embeds = self.prepare_ip_adapter_image_embeds(*adapter.values(), device, batch_size, with_null)
            conditioning.added_cond_kwargs = {**(conditioning.added_cond_kwargs or {}), "image_embeds": image_embeds}
        if self.unet.config.time_cond_proj_dim is not None:
            scale = torch.tensor(self.guidance_scale - 1).repeat(batch_size)
            conditioning.timestep_cond = self.get_guidance_scale_embedding(
                scale, embedding_dim=self.unet.config.time_cond_proj_dim
            ).to(device, conditioning.prompt_embeds.dtype)
        return conditioning

    # Copied from pipeline_muse.MusePipeline._tokenize_gate
    def _tokenize_gate(self, prompts: list[str]) -> dict[str, torch.Tensor]:
        """The prompts as CLIP's text tower wants them, which knows nothing of the words of textual inversions."""
        config = self.clip_model.config.text_config
        added = [word for word, index in self.tokenizer.get_added_vocab().items() if index >= config.vocab_size]
        for word in sorted(added, key=len, reverse=True):
            prompts = [prompt.replace(word, "") for prompt in prompts]
        length = min(self.tokenizer.model_max_length, config.max_position_embeddings)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self._execution_device)
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    # Copied from pipeline_muse.MusePipeline._emotion_word_state
    def _emotion_word_state(self, label: str) -> torch.Tensor:
        """The mean hidden state, shape `(D,)`, of a label's own tokens in "an image of {label}"."""
        states = self.encode_prompt(
            prompt=f"an image of {label}",
            device=self._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=self.clip_skip,
        )[0]
        first = 1 + len(self.tokenizer("an image of", add_special_tokens=False).input_ids)
        length = len(self.tokenizer(label, add_special_tokens=False).input_ids)
        return states[0, first : first + length].float().mean(dim=0)

    # Copied from pipeline_muse.MusePipeline._start_tokens
    def _start_tokens(self, state: GuidanceState, conditioning: Conditioning, request: Request) -> None:
        """
        Sets where the optimisation starts, shape `(B, n, D)`, float32: the caller's tokens, or noise of the prompt
        embedding's standard deviation, or the hidden state of the emotion's word with a little of that noise.
        """
        given, emotion_tokens = request.given, request.given["emotion_tokens"]
        batch_size = conditioning.batch_size
        prompt_embeds = conditioning.prompt_embeds[-batch_size:].float()
        labels = {label for trace in state.traces for label in trace.emotion}
        if isinstance(emotion_tokens, Mapping):
            emotion_tokens = state.mean_of_labels({label: emotion_tokens[label].float() for label in labels})
        if emotion_tokens is not None:
            tokens = emotion_tokens.to(prompt_embeds.device, torch.float32).expand(batch_size, -1, -1)
        else:
            shape = (batch_size, given["num_emotion_tokens"] or NUM_EMOTION_TOKENS, prompt_embeds.shape[-1])
            noise = randn_tensor(shape, generator=fork_generator(given["generator"]), device=prompt_embeds.device)
            tokens = prompt_embeds.std(dim=(1, 2), keepdim=True) * noise
        if emotion_tokens is None and given["emotion_token_init"] == "emotion":
            words = state.mean_of_labels({label: self._emotion_word_state(label) for label in labels})
            tokens = words[:, None] + START_JITTER * tokens
        state.start_tokens = tokens.contiguous()
        state.tokens = state.start_tokens.clone()
        if request.settings.max_token_norm is not None:
            state.norm_limit = request.settings.max_token_norm * prompt_embeds.norm(dim=-1).mean(dim=-1)

    # Copied from pipeline_muse.MusePipeline._preview
    def _preview(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        scheduler: Any,
        region: SourceRegion | None,
        scale: float,
        samples: list[int],
        noise_pred: torch.Tensor,
    ) -> torch.Tensor:
        """The decoded one-step x0 of `samples`, whose noise `noise_pred` is, at `scale`; pixels in about [-1, 1]."""
        alpha_cumprod = signal_level(scheduler, timestep)
        prediction_type = scheduler.config.get("prediction_type", "epsilon")
        latents = predict_x0(model_input[samples], noise_pred, alpha_cumprod, prediction_type)
        if region is not None:
            latents = region.restore(latents, 0, samples)
        if scale < 1:
            sides = [max(1, round(scale * side)) for side in latents.shape[-2:]]
            latents = F.interpolate(latents, sides, mode="area")
        return self._decode_preview(latents)

    # ---- one denoising step --------------------------------------------------------------------------------------

    # Copied from pipeline_muse.MusePipeline._predict_noise
    def _predict_noise(
        self,
        model_input: torch.Tensor,
        timestep: torch.Tensor,
        conditioning: Conditioning,
        null: list[int],
        cond: list[int],
        tokens: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The network's output for the null prompt of samples `null`, then the prompt (and tokens) of `cond`."""
        select = partial(select_rows, null=null, cond=cond, batch_size=conditioning.batch_size)
        embeds, mask = select(conditioning.prompt_embeds), None  # (rows, L, D)
        if tokens is not None:
            length, blank = embeds.shape[1], tokens.new_zeros(len(null), *tokens.shape[1:])
            embeds = torch.cat([embeds, torch.cat([blank, tokens]).to(embeds.dtype)], dim=1)  # (rows, L + n, D)
            if null:  # which have no tokens, and see none
                mask = embeds.new_ones(embeds.shape[:2])
                mask[: len(null), length:] = 0
        return self.unet(
            model_input[null + cond],
            timestep,
            encoder_hidden_states=embeds,
            encoder_attention_mask=mask,
            timestep_cond=select(conditioning.timestep_cond),
            cross_attention_kwargs=conditioning.cross_attention_kwargs,
            added_cond_kwargs=select(conditioning.added_cond_kwargs),
            return_dict=False,
        )[0]

    # Copied from pipeline_muse.MusePipeline._predict_stock
    def _predict_stock(
        self,
        predict: Callable[..., torch.Tensor],
        conditioning: Conditioning,
        alone: list[int],
        leads_from_source: bool,
        model_input: torch.Tensor,
    ) -> tuple[torch.Tensor | None, torch.Tensor]:
        """
        The noise of the samples `alone` without tokens (the paper's "void placeholder"), in at most one network call.

        Returns:
            `tuple`: What guidance leads away from (`None` without guidance), and the noise of the samples `alone`;
            the rows of others are placeholders.
        """
        everyone = list(range(conditioning.batch_size))
        if leads_from_source and self.do_classifier_free_guidance:
            noise = predict([], everyone)
            return noise, noise.clone()
        null = everyone if conditioning.has_null and self.do_classifier_free_guidance else []
        if not null + alone:
            return None, torch.zeros_like(model_input)
        noise_null, noise_cond = predict(null, alone).split([len(null), len(alone)])
        noise_reference = noise_null if null else None
        noise_pred = noise_null.clone() if null else torch.zeros_like(model_input, dtype=noise_cond.dtype)
        if alone:
            reference = noise_null[alone] if null else None
            noise_pred[alone] = guide_noise(reference, noise_cond, self.guidance_scale, self.guidance_rescale)
        return noise_reference, noise_pred

    # Copied from pipeline_muse.MusePipeline._predict_together
    def _predict_together(
        self, predict: Callable[..., torch.Tensor], samples: list[int], tokens: torch.Tensor
    ) -> torch.Tensor:
        """The guided noise of `samples` with their `tokens` in one network call, as upstream has it for every step."""
        noise_null, noise_cond = predict(samples, samples, tokens).chunk(2)
        return guide_noise(noise_null, noise_cond, self.guidance_scale, self.guidance_rescale)

    # Copied from pipeline_muse.MusePipeline._predict_guided
    def _predict_guided(
        self,
        predict: Callable[..., torch.Tensor],
        noise_reference: torch.Tensor | None,
        samples: list[int],
        tokens: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The noise of `samples` with their `tokens`, shape `(len(samples), n, D)`: conditional, and guided."""
        noise_cond = predict([], samples, tokens)
        reference = None if noise_reference is None else noise_reference[samples]
        return noise_cond, guide_noise(reference, noise_cond, self.guidance_scale, self.guidance_rescale)

    # Copied from pipeline_muse.MusePipeline._classify
    def _classify(self, image: torch.Tensor) -> torch.Tensor:
        """Logits, shape `(n, num_labels)`, float32, of pixels in [-1, 1]; differentiable."""
        pixels = PixelSpec.from_classifier(self.emotion_classifier).prepare(image)
        return self.emotion_classifier(pixel_values=pixels.to(self.emotion_classifier.dtype)).logits.float()

    # Copied from pipeline_muse.MusePipeline._zero_shot_classifier
    def _zero_shot_classifier(
        self, emotion_prompts: Mapping[str, list[str]]
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """
        `_classify` by CLIP alone: logits are the scaled cosines of the image with the mean feature of each emotion's
        prompts, taken on the unit sphere.
        """
        blank = torch.zeros(1, 3, 8, 8, device=self._execution_device)  # CLIP's forward wants an image and a text
        text_inputs = [self._tokenize_gate(prompts) for prompts in emotion_prompts.values()]
        features = [clip_features(self.clip_model, blank, inputs)[1].mean(dim=0) for inputs in text_inputs]
        emotion_features = F.normalize(torch.stack(features), dim=-1)  # (C, projection_dim)
        text = {name: value[:1] for name, value in text_inputs[0].items()}
        scale = self.clip_model.logit_scale.float().exp()
        return lambda image: scale * clip_features(self.clip_model, image, text)[0] @ emotion_features.T

    # Copied from pipeline_muse.MusePipeline._open_gates
    def _open_gates(
        self,
        state: GuidanceState,
        step: int,
        preview: Callable[[list[int], torch.Tensor], torch.Tensor],
        noise_pred: torch.Tensor,
        settings: GuidanceSettings,
    ) -> None:
        """WHEN (Eq. 9, 10): opens the gate of each waiting sample whose preview resembles its prompt, for good."""
        waiting, threshold = state.waiting, settings.semantic_threshold
        if not waiting or (state.text_inputs is None and threshold > 0):
            return
        images = preview(waiting, noise_pred[waiting])
        passes = [True] * len(waiting)
        if threshold > 0:
            text_inputs = {name: value[waiting] for name, value in state.text_inputs.items()}
            similarities = clip_similarity(self.clip_model, images, text_inputs, settings.similarity_scale).tolist()
            for b, similarity in zip(waiting, similarities):
                state.traces[b].similarity.append(similarity)
            passes = [similarity >= threshold for similarity in similarities]
        for b, image, passed in zip(waiting, images, passes):
            if passed:
                before = state.previous_preview.pop(b, image)
                state.open_gate(b, step, state.classify(before[None])[0])
            else:
                state.previous_preview[b] = image

    # Copied from pipeline_muse.MusePipeline._optimize_tokens
    def _optimize_tokens(
        self,
        state: GuidanceState,
        samples: list[int],
        step: int,
        predict: Callable[..., torch.Tensor],
        preview: Callable[[list[int], torch.Tensor], torch.Tensor],
        noise_reference: torch.Tensor | None,
        settings: GuidanceSettings,
    ) -> torch.Tensor:
        """
        HOW (Eq. 7, 8): a fresh Adam moves the tokens of open samples down the loss of their one-step previews.

        Each sample is its own parameter, so Adam leaves one alone that is done (no gradient, no momentum). The loss is
        summed, never averaged: a sample's gradient does not depend on its batch. With `keep_best` the tokens are
        evaluated once more after the last Adam step, so the noise of whichever iterate is best is already at hand.

        Returns:
            `torch.Tensor` of shape `(len(samples), channels, h, w)`: The noise of each sample's best iterate.
        """
        inner_steps = settings.max_inner_steps if settings.learning_rate(step) > 0 else 0
        start = state.tokens if settings.carry_emotion_tokens else state.start_tokens
        tokens = {b: state.bounded(b, start[b]).clone().requires_grad_() for b in samples}
        loop = InnerLoop(tokens, settings.optimizer(tokens.values(), step))
        active = samples
        for b in samples:
            state.traces[b].loss.append([])
            state.traces[b].probabilities.append([])

        evaluate = partial(self._inner_step, state, loop, predict, preview, noise_reference, settings)
        recomputed = (self.unet, self._preview_decoder) if settings.gradient_checkpointing else ()
        with checkpointed(*recomputed):
            for k in range(max(1, inner_steps + settings.keep_best)):
                parts = chunks(active, settings.max_inner_batch)
                active = [b for part in parts for b in evaluate(part, descend=k < inner_steps)]

        state.tokens = state.tokens.clone()  # callbacks may have kept the old ones
        for b, iterate in loop.best.items():
            state.tokens[b] = iterate.tokens if settings.keep_best else loop.tokens[b].detach()
            state.traces[b].kept.append(iterate.index)
        return torch.stack([loop.best[b].noise_pred for b in samples])

    # Copied from pipeline_muse.MusePipeline._inner_step
    def _inner_step(
        self,
        state: GuidanceState,
        loop: InnerLoop,
        predict: Callable[..., torch.Tensor],
        preview: Callable[[list[int], torch.Tensor], torch.Tensor],
        noise_reference: torch.Tensor | None,
        settings: GuidanceSettings,
        active: list[int],
        descend: bool,
    ) -> list[int]:
        """Evaluates the tokens of the samples `active` and, if told to, moves them; returns those that moved."""
        with torch.set_grad_enabled(descend):
            tokens = torch.stack([loop.tokens[b] for b in active])
            noise_cond, noise_pred = self._predict_guided(predict, noise_reference, active, tokens)
            logits = state.classify(preview(active, noise_pred if settings.guided_preview else noise_cond))
            loss = muse_loss(
                logits,
                state.target[active],
                state.inherent[active],
                state.similar[active],
                settings.inherent_weight,
                settings.similar_weight,
            )
        going = self._record_iterates(state, loop, active, loss, logits, noise_pred, settings)
        if not (going and descend):
            return []
        return self._descend(state, loop, loss, [b in going for b in active], going, settings)

    # Copied from pipeline_muse.MusePipeline._record_iterates
    def _record_iterates(
        self,
        state: GuidanceState,
        loop: InnerLoop,
        active: list[int],
        loss: torch.Tensor,
        logits: torch.Tensor,
        noise_pred: torch.Tensor,
        settings: GuidanceSettings,
    ) -> list[int]:
        """Writes one evaluation into the traces, keeps the best iterates, and returns who goes on."""
        going = []
        target, probabilities = state.target[active], logits.detach().softmax(dim=-1)
        # A mixture has reached its goal where each of its labels has, and its loss is never below its entropy
        reached = (probabilities / target).where(target > 0, math.inf).amin(dim=-1).tolist()
        excess = (loss.detach() - torch.special.entr(target).sum(dim=-1)).tolist()
        for row, (b, value) in enumerate(zip(active, loss.detach().tolist())):
            trace = state.traces[b]
            trace.loss[-1].append(value)
            trace.probabilities[-1].append(probabilities[row].tolist())
            finite = math.isfinite(value)
            if not finite:
                logger.warning(f"Sample {b}: the loss is {value}; the tokens stay at their last finite value.")
            if b not in loop.best or (finite and value < loop.best[b].loss):
                index = len(trace.loss[-1]) - 1
                loop.best[b] = Iterate(
                    value if finite else math.inf, noise_pred[row].detach(), loop.tokens[b].detach().clone(), index
                )
            done = excess[row] < settings.loss_threshold
            done = done or (settings.stop_probability is not None and reached[row] >= settings.stop_probability)
            if len(trace.loss[-1]) == 1:
                state.calm[b] = state.calm.get(b, 0) + 1 if finite and done else 0
            if finite and not done:
                going.append(b)
        return going

    # Copied from pipeline_muse.MusePipeline._descend
    def _descend(
        self,
        state: GuidanceState,
        loop: InnerLoop,
        loss: torch.Tensor,
        rows: list[bool],
        going: list[int],
        settings: GuidanceSettings,
    ) -> list[int]:
        """One step of the tokens of the samples `going`, the `rows` of `loss`; returns those that moved."""
        scale = FLOAT16_LOSS_SCALE if self.unet.dtype == torch.float16 else 1.0
        # Weighting by `rows` and not averaging is the sum over them
        gradients = torch.autograd.grad(loss, [loop.tokens[b] for b in going], loss.new_tensor(rows) * scale)
        loop.optimizer.zero_grad(set_to_none=True)
        moved = []
        for b, gradient in zip(going, gradients):
            if torch.isfinite(gradient).all():
                gradient = gradient / scale
                if settings.emotion_optimizer == "normalized":  # so that the mean square of its entries is one
                    gradient = gradient * (gradient.numel() ** 0.5 / gradient.norm().clamp(min=1e-12))
                loop.tokens[b].grad = gradient
                state.traces[b].inner_steps += 1
                moved.append(b)
            else:
                logger.warning(f"Sample {b}: the gradient is not finite; the tokens stay at their last finite value.")
        loop.optimizer.step()
        for b in moved:
            loop.tokens[b].data = state.bounded(b, loop.tokens[b].data)
        return moved

    # ---- editing -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def invert(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        strength: float = 1.0,
        prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        cross_attention_kwargs: dict[str, Any] | None = None,
        clip_skip: int | None = None,
    ) -> torch.Tensor:
        """
        DDIM inversion at guidance 1: the noise from which deterministic DDIM with the same prompt finds `image` again.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): One source, or one per prompt.
                Arrays are uint8 or in [0, 1], tensors of shape `(3, H, W)` or `(n, 3, H, W)` in [0, 1].
            prompt (`str` or `list[str]`, *optional*, defaults to ""): The source's caption.
            prompt_2 (`str` or `list[str]`, *optional*): For the second text encoder; `prompt` by default.
            height, width (`int`, *optional*): Multiples of 8 in pixels; default to the source's aspect ratio at the
                checkpoint's native area.
            num_inference_steps (`int`, defaults to 50): Steps of the full path.
            strength (`float`, defaults to 1.0): In (0, 1]: the share of the path that is walked.
            prompt_embeds (`torch.Tensor` of shape `(batch_size, L, D)`, *optional*): In place of `prompt`.
            pooled_prompt_embeds (`torch.Tensor` of shape `(batch_size, P)`, *optional*): With `prompt_embeds`.
            cross_attention_kwargs, clip_skip: As upstream.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, h, w)`: Latents to pass on as `latents=` together with
            `image=`, so that several emotions share one inversion.

        Raises:
            TypeError, ValueError: For an image that is not one, a `strength` outside (0, 1], or a bad size.
        """
        given = dict(locals())
        with upcast(self.vae):
            return self._invert(given)

    # Copied from pipeline_muse.MusePipeline._invert
    def _invert(self, given: dict[str, Any]) -> torch.Tensor:
        """`invert`, whose arguments by name `given` are."""
        if given["prompt"] is None and given["prompt_embeds"] is None:
            given["prompt"] = ""
        given["num_images_per_prompt"] = 1
        self._check_encoding(given)
        self._check_size(given["height"], given["width"])
        self._check_path(given["strength"], given["num_inference_steps"])
        batch_size = self._count_prompts(given["prompt"], given["prompt_embeds"])
        self._check_conditioning(given, batch_size)
        image = self._check_image(given["image"], batch_size)
        given["height"], given["width"] = self._image_size(image, given["height"], given["width"])
        self.check_inputs(**accepted_arguments(self.check_inputs, **given, callback_steps=None))
        self._guidance_scale, self._guidance_rescale, self._clip_skip = 1.0, 0.0, given["clip_skip"]
        self._cross_attention_kwargs = given["cross_attention_kwargs"]
        conditioning = self._encode_conditioning(given, with_null=False)
        latents = self._encode_image(image, given["height"], given["width"], batch_size)
        path = self._invert_latents(latents, conditioning, given["num_inference_steps"], given["strength"])
        self.maybe_free_model_hooks()
        return path[-1]

    # Copied from pipeline_muse.MusePipeline._invert_latents
    def _invert_latents(
        self, latents: torch.Tensor, conditioning: Conditioning, num_inference_steps: int, strength: float
    ) -> list[torch.Tensor]:
        """The latents on the first `strength` of the DDIM path from the image towards noise, both ends included."""
        inverse = DDIMInverseScheduler.from_config(self._editing_scheduler().config)
        inverse.set_timesteps(num_inference_steps, device=latents.device)
        timesteps = inverse.timesteps[: steps_of_strength(strength, num_inference_steps)]
        everyone = list(range(conditioning.batch_size))
        path = [latents.to(conditioning.prompt_embeds.dtype)]
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for t in timesteps:
                noise_pred = self._predict_noise(path[-1], t, conditioning, [], everyone)
                path.append(inverse.step(noise_pred, t, path[-1], return_dict=False)[0])
                progress_bar.update()
        return path

    # Copied from pipeline_muse.MusePipeline._editing_scheduler
    def _editing_scheduler(self) -> DDIMScheduler:
        """Deterministic DDIM on this checkpoint's noise schedule: the path that can be walked both ways."""
        spacing = self.scheduler.config.get("timestep_spacing", "leading")
        return DDIMScheduler.from_config(
            self.scheduler.config,
            clip_sample=False,
            set_alpha_to_one=False,
            timestep_spacing="trailing" if spacing == "trailing" else "leading",
        )

    # ---- the call ------------------------------------------------------------------------------------------------

    # Copied from pipeline_muse.MusePipeline._resolve_request
    def _resolve_request(self, arguments: Mapping[str, Any], settings: GuidanceSettings) -> Request:
        """Checks the arguments of a call that needs more than upstream does, and completes them."""
        given = dict(arguments)
        self._check_encoding(given)
        emotion_prompts = self._resolve_emotion_prompts(given["emotion_prompts"])
        labels = self.emotion_labels if emotion_prompts is None else list(emotion_prompts)
        prompt, targets = self._resolve_prompts(given["prompt"], given["prompt_embeds"], given["emotion"], labels)
        num_prompts, given["prompt"] = len(targets), prompt
        self._check_similar(given["similar_emotions"], labels)
        request = Request(
            given=given,
            settings=settings,
            labels=labels,
            targets=targets,
            similar=[self._resolve_similar(given["similar_emotions"], target, labels) for target in targets],
            emotion_prompts=emotion_prompts,
            semantic_prompts=self._resolve_semantic_prompts(given["semantic_prompt"], prompt, num_prompts, settings),
            leads_from_source=self._resolve_reference(given),
        )
        self._check_tokens(given, targets)
        if given["mask_image"] is not None:
            given["mask_image"] = self._check_image(given["mask_image"], num_prompts, "mask_image", channels=1)
        given["image"], given["height"], given["width"] = self._resolve_image(given, num_prompts)
        callback = given["callback_on_step_end"]
        if isinstance(callback, (PipelineCallback, MultiPipelineCallbacks)):
            given["callback_on_step_end_tensor_inputs"] = callback.tensor_inputs
        self._check_options(given)
        self._check_schedule(given)
        self._check_conditioning(given, num_prompts)
        self._check_ip_adapter(given)
        self._check_samples(given, num_prompts)
        self.check_inputs(**accepted_arguments(self.check_inputs, **given, callback_steps=None))
        return request

    # What upstream checks late, deep in some network, or not at all

    # Copied from pipeline_muse.MusePipeline._check_encoding
    def _check_encoding(self, given: Mapping[str, Any]) -> None:
        """Raises unless prompts are texts, and `prompt_embeds` and the settings of the encoder fit the networks."""
        for name in TEXTS:
            if given.get(name) is not None:
                check_texts(name, given[name])
        if given["prompt_embeds"] is not None:
            check_tensor("prompt_embeds", given["prompt_embeds"], None, None, self.unet.config.cross_attention_dim)
        if given["clip_skip"] is not None:
            check_range("clip_skip", given["clip_skip"], 0, self._most_clip_skip, integer=True)
        attention = given["cross_attention_kwargs"]
        if attention is not None and not (
            isinstance(attention, dict) and all(isinstance(key, str) for key in attention)
        ):
            raise TypeError(f"`cross_attention_kwargs` has to be a dict with names as keys, but is {attention!r}.")
        if attention and "scale" in attention:
            check_range("cross_attention_kwargs", attention["scale"], -MAX_WEIGHT, MAX_WEIGHT)

    @property
    def _most_clip_skip(self) -> float:
        """How many layers of the text encoders can be left out; the last is anyway."""
        encoders = [encoder for encoder in (self.text_encoder, self.text_encoder_2) if encoder is not None]
        return min((encoder.config.num_hidden_layers - 1 for encoder in encoders), default=math.inf)

    def _check_conditioning(self, given: Mapping[str, Any], num_prompts: int) -> None:
        """Checks the arguments that only Stable Diffusion XL has."""
        prompt_2 = [given["prompt_2"]] if isinstance(given["prompt_2"], str) else given["prompt_2"]
        if prompt_2 is not None and len(prompt_2) != num_prompts:
            raise ValueError(f"`prompt_2` has {len(prompt_2)} entries for {num_prompts} prompts; give one for each.")
        pooled_width = self.unet.config.projection_class_embeddings_input_dim
        pooled_width -= 6 * self.unet.config.addition_time_embed_dim  # the size conditions
        for name in ("pooled_prompt_embeds", "negative_pooled_prompt_embeds"):
            if given.get(name) is not None:
                check_tensor(name, given[name], num_prompts, pooled_width)
        if given.get("denoising_end") is not None:
            check_range("denoising_end", given["denoising_end"], 0, 1)
            if given["image"] is not None:
                raise ValueError("`denoising_end` cannot be given with `image`: an edit walks its whole path back.")
        for name in ("original_size", "crops_coords_top_left", "target_size"):
            for argument in (name, f"negative_{name}"):
                size = given.get(argument, (0, 0))
                if size is None and name != "crops_coords_top_left":
                    continue
                if not (isinstance(size, tuple) and len(size) == 2):
                    raise TypeError(f"`{argument}` has to be a tuple of two numbers, but is {size!r}.")
                for side in size:
                    check_range(argument, side, -MAX_WEIGHT, MAX_WEIGHT)

    # Copied from pipeline_muse.MusePipeline._leads_from_null
    @staticmethod
    def _leads_from_null(given: Mapping[str, Any]) -> bool:
        """Whether guidance leads away from a null prompt; networks that are told the guidance scale have none."""
        return given.get("guidance_scale", 1.0) > 1 and given["guidance_reference"] == "null"

    # Copied from pipeline_muse.MusePipeline._check_options
    def _check_options(self, given: Mapping[str, Any]) -> None:
        """Raises for numbers out of their range, unknown choices, callbacks that are none, and misspelt arguments."""
        self._check_unexpected(given["kwargs"])
        check_range("num_inference_steps", given["num_inference_steps"], 1, integer=True)
        check_range("guidance_scale", given["guidance_scale"], -MAX_WEIGHT, MAX_WEIGHT)
        check_range("guidance_rescale", given["guidance_rescale"], 0, 1)
        check_range("eta", given["eta"], 0, 1)
        check_choice("output_type", given["output_type"], OUTPUT_TYPES)
        check_flag("return_dict", given["return_dict"])
        callback, names = given["callback_on_step_end"], given["callback_on_step_end_tensor_inputs"]
        if callback is not None and not callable(callback):
            raise TypeError(f"`callback_on_step_end` has to be callable, but is {callback!r}.")
        if not isinstance(names, (list, tuple)) and (callback is not None or names is not None):
            raise TypeError(f"`callback_on_step_end_tensor_inputs` has to be a list of names, but is {names!r}.")

    # Copied from pipeline_muse.MusePipeline._check_schedule
    def _check_schedule(self, given: Mapping[str, Any]) -> None:
        """Raises unless the scheduler can walk the caller's own `timesteps` or `sigmas`, if there are any."""
        for name, most in (("timesteps", self.scheduler.config.num_train_timesteps - 1), ("sigmas", MAX_WEIGHT)):
            values = given[name]
            if values is None:
                continue
            if given["image"] is not None:
                raise ValueError(f"`{name}` cannot be given with `image`: an edit walks DDIM's own path.")
            if name not in inspect.signature(self.scheduler.set_timesteps).parameters:
                raise ValueError(f"`{name}` cannot be given with {type(self.scheduler).__name__}, which sets its own.")
            if not isinstance(values, (list, tuple)) and getattr(values, "ndim", 0) != 1:
                raise TypeError(f"`{name}` has to be a list of numbers, but is {values!r}.")
            for value in values:
                check_range(name, value, 0, most, integer=name == "timesteps")
            least = 2 if name == "sigmas" else 1  # the last sigma is where the last step ends
            if len(values) < least or any(after >= before for before, after in zip(values, values[1:])):
                raise ValueError(f"`{name}` has to hold {least} or more falling numbers, but is {values!r}.")

    # Copied from pipeline_muse.MusePipeline._check_ip_adapter
    def _check_ip_adapter(self, given: Mapping[str, Any]) -> None:
        """Raises unless there is one entry of `ip_adapter_image` or of its embeddings for each IP-Adapter."""
        adapters = getattr(self.unet.encoder_hid_proj, "image_projection_layers", ())
        for name in ("ip_adapter_image", "ip_adapter_image_embeds"):
            entries = given[name] if isinstance(given[name], list) else [given[name]]
            if given[name] is None:
                continue
            if len(adapters) == 0:
                raise ValueError(f"`{name}` needs an IP-Adapter: call `pipe.load_ip_adapter(...)` first.")
            if len(entries) != len(adapters):
                raise ValueError(f"`{name}` has {len(entries)} entries for {len(adapters)} IP-Adapters.")
            for entry in entries:
                if name == "ip_adapter_image_embeds":  # the null image's row comes first
                    axes = 4 if getattr(entry, "ndim", 3) == 4 else 3
                    check_tensor(name, entry, 2 if self._leads_from_null(given) else 1, *[None] * (axes - 1))
                elif not isinstance(entry, (PIL.Image.Image, np.ndarray, torch.Tensor)):
                    raise TypeError(f"`{name}` has to be an image or a list of them, but is {given[name]!r}.")

    # Copied from pipeline_muse.MusePipeline._check_samples
    def _check_samples(self, given: Mapping[str, Any], num_prompts: int) -> None:
        """Raises unless what is given per prompt or per image is there for each of them."""
        generator, width = given["generator"], self.unet.config.cross_attention_dim
        for name in ("negative_prompt", "negative_prompt_2"):
            if isinstance(given.get(name), list) and len(given[name]) != num_prompts:
                raise ValueError(f"`{name}` has {len(given[name])} entries for {num_prompts} prompts.")
        if given["negative_prompt_embeds"] is not None:
            prompt_embeds = given["prompt_embeds"]
            length = self.tokenizer.model_max_length if prompt_embeds is None else prompt_embeds.shape[1]
            check_tensor("negative_prompt_embeds", given["negative_prompt_embeds"], num_prompts, length, width)
        images = num_prompts * given["num_images_per_prompt"]
        generators = generator if isinstance(generator, list) else [generator]
        if generator is not None and not all(isinstance(one, torch.Generator) for one in generators):
            raise TypeError(f"`generator` has to be a torch.Generator or a list of them, but is {generator!r}.")
        if isinstance(generator, list) and len(generator) != images:
            raise ValueError(f"`generator` is a list of {len(generator)} for {images} images; give one for each.")
        if given["latents"] is not None:
            sides = [given[name] // self.vae_scale_factor for name in ("height", "width")]
            free = given["image"] is None  # upstream takes latents of any size for those of the image to make
            check_tensor(
                "latents", given["latents"], images, self.unet.config.in_channels, *[None, None] if free else sides
            )

    # Copied from pipeline_muse.MusePipeline._check_unexpected
    def _check_unexpected(self, names: Iterable[str]) -> None:
        """Raises a `TypeError` for arguments that do not exist; upstream would pass over a misspelt `emotion`."""
        if names:
            raise TypeError(f"{type(self).__name__} does not know the arguments {sorted(names)}.")

    # Copied from pipeline_muse.MusePipeline._call_stock with MusePipeline->MuseXLPipeline
    def _call_stock(self, arguments: dict[str, Any], extra: dict[str, Any]) -> MuseXLPipelineOutput | tuple:
        """No emotion and no image: the parent's own call, bit for bit."""
        self._check_unexpected(extra.keys() - {"callback", "callback_steps"})
        callback = arguments["callback_on_step_end"]
        names = getattr(callback, "tensor_inputs", arguments["callback_on_step_end_tensor_inputs"])
        if callback is not None and "emotion_tokens" in names:  # which the parent does not know; here they are None
            arguments = arguments | {
                "callback_on_step_end": lambda *seen: callback(*seen[:-1], seen[-1] | {"emotion_tokens": None}),
                "callback_on_step_end_tensor_inputs": [name for name in names if name != "emotion_tokens"],
            }
        output = super().__call__(**arguments, **extra)
        if not arguments["return_dict"]:
            return output
        return MuseXLPipelineOutput(**vars(output))

    # Copied from pipeline_muse.MusePipeline._resolve_timesteps
    def _resolve_timesteps(self, given: Mapping[str, Any]) -> tuple[Any, torch.Tensor]:
        """The scheduler and its timesteps; for an edit DDIM and the part of its path that is walked back."""
        num_inference_steps, device = given["num_inference_steps"], self._execution_device
        if given["image"] is None:
            scheduler, custom = self.scheduler, (given["timesteps"], given["sigmas"])
            timesteps, _ = retrieve_timesteps(scheduler, num_inference_steps, device, *custom)
        else:
            scheduler = self._editing_scheduler()
            scheduler.set_timesteps(num_inference_steps, device=device)
            timesteps = scheduler.timesteps[-steps_of_strength(given["strength"], num_inference_steps) :]
        check_preview(scheduler, timesteps)
        return scheduler, timesteps

    # Copied from pipeline_muse.MusePipeline._guidance_chain
    @property
    def _guidance_chain(self) -> list[torch.nn.Module]:
        """The modules that work in the loop."""
        modules = (self.unet, self.vae, self.preview_vae, self.clip_model, self.emotion_classifier)
        return [module for module in modules if module is not None]

    # Copied from pipeline_muse.MusePipeline._start_latents
    def _start_latents(
        self, given: Mapping[str, Any], conditioning: Conditioning
    ) -> tuple[torch.Tensor, SourceRegion | None]:
        """Noise as upstream's, or the noise of the source, shape `(B, channels, h, w)`; and what a mask protects."""
        latents, mask, size = given["latents"], given["mask_image"], (given["height"], given["width"])
        dtype, device, batch_size = conditioning.prompt_embeds.dtype, self._execution_device, conditioning.batch_size
        latents = latents if latents is None else latents.to(device, dtype)
        if given["image"] is None:
            channels, generator = self.unet.config.in_channels, given["generator"]
            return self.prepare_latents(batch_size, channels, *size, dtype, device, generator, latents), None
        if latents is not None and mask is None:
            return latents, None
        source = self._encode_image(given["image"], *size, batch_size)
        path = self._invert_latents(source, conditioning, given["num_inference_steps"], given["strength"])
        latents = path[-1] if latents is None else latents
        return latents, None if mask is None else SourceRegion(self._encode_mask(mask, *size, latents), path)

    # Copied from pipeline_muse.MusePipeline._prepare_state
    def _prepare_state(self, request: Request, conditioning: Conditioning) -> GuidanceState:
        """What is known before denoising, one row per image, on the pipeline's device."""
        device = self._execution_device
        repeat = partial(repeat_each, times=request.given["num_images_per_prompt"])
        is_guided, texts = any(request.targets), request.semantic_prompts
        is_zero_shot = is_guided and request.emotion_prompts is not None
        weights = label_weights(repeat(request.targets), request.labels).to(device)
        state = GuidanceState(
            target=weights,
            similar=label_weights(repeat(request.similar), request.labels).to(device),
            inherent=torch.zeros_like(weights),
            traces=[MuseTrace(request.labels, target) for target in repeat(request.targets)],
            classify=self._zero_shot_classifier(request.emotion_prompts) if is_zero_shot else self._classify,
            text_inputs=self._tokenize_gate(repeat(texts)) if texts else None,
        )
        if is_guided:
            self._start_tokens(state, conditioning, request)
        return state

    # Copied from pipeline_muse.MusePipeline._denoise
    def _denoise(
        self,
        latents: torch.Tensor,
        scheduler: Any,
        timesteps: torch.Tensor,
        conditioning: Conditioning,
        state: GuidanceState,
        region: SourceRegion | None,
        request: Request,
    ) -> torch.Tensor:
        """The loop of MUSE (Fig. 1): latents of shape `(B, channels, h, w)` from noise to image."""
        given, preview_scale = request.given, request.settings.preview_scale
        step_kwargs = accepted_arguments(scheduler.step, eta=given["eta"], generator=given["generator"])
        self._num_timesteps = len(timesteps)
        with self.progress_bar(total=math.ceil(len(timesteps) / scheduler.order)) as progress_bar:
            for i, t in enumerate(timesteps):
                if self.interrupt:
                    continue
                model_input = scheduler.scale_model_input(latents, t)
                predict = partial(self._predict_noise, model_input, t, conditioning)
                preview = partial(self._preview, model_input, t, scheduler, region, preview_scale)
                noise_pred = self._predict_step(state, i, predict, preview, model_input, conditioning, request)
                latents = scheduler.step(noise_pred, t, latents, **step_kwargs, return_dict=False)[0]
                if region is not None:
                    latents = region.restore(latents, len(timesteps) - 1 - i)

                if given["callback_on_step_end"] is not None:
                    latents = self._run_callback(given, i, t, latents, conditioning, state)
                if i == len(timesteps) - 1 or (i + 1) % scheduler.order == 0:
                    progress_bar.set_postfix({"size": f"{given['width']}x{given['height']}", **state.summary()})
                    progress_bar.update()
        return latents

    # Copied from pipeline_muse.MusePipeline._predict_step
    def _predict_step(
        self,
        state: GuidanceState,
        step: int,
        predict: Callable[..., torch.Tensor],
        preview: Callable[[list[int], torch.Tensor], torch.Tensor],
        model_input: torch.Tensor,
        conditioning: Conditioning,
        request: Request,
    ) -> torch.Tensor:
        """The noise that one denoising step is taken with, shape `(B, channels, h, w)`."""
        settings, everyone = request.settings, list(range(conditioning.batch_size))
        looks = step % settings.update_interval == 0
        is_whole = settings.emotion_strength == 1
        has_null = conditioning.has_null and self.do_classifier_free_guidance
        if has_null and is_whole and state.resting(looks, settings.patience) == everyone:
            return self._predict_together(predict, everyone, state.tokens)

        # The prompt alone, for whatever is not guided, or not to the full
        noise_reference, noise_pred = self._predict_stock(
            predict, conditioning, state.closed if is_whole else everyone, request.leads_from_source, model_input
        )
        # WHEN
        if looks:
            self._open_gates(state, step, preview, noise_pred, settings)
        # HOW and WHICH
        resting = state.resting(looks, settings.patience)
        moving = [b for b in state.opened if b not in resting]
        guided = noise_pred.clone()
        if moving:
            guided[moving] = self._optimize_tokens(state, moving, step, predict, preview, noise_reference, settings)
        if resting:
            guided[resting] = self._predict_guided(predict, noise_reference, resting, state.tokens[resting])[1]
        return torch.lerp(noise_pred, guided, settings.emotion_strength)

    # Copied from pipeline_muse.MusePipeline._run_callback
    def _run_callback(
        self,
        given: Mapping[str, Any],
        step: int,
        timestep: torch.Tensor,
        latents: torch.Tensor,
        conditioning: Conditioning,
        state: GuidanceState,
    ) -> torch.Tensor:
        """Upstream's `callback_on_step_end`: under guidance embeddings have the null prompt's rows first."""
        null_embeds = conditioning.prompt_embeds[: conditioning.batch_size] if conditioning.has_null else None
        added = conditioning.added_cond_kwargs or {}
        offered = {
            "latents": latents,
            "prompt_embeds": conditioning.prompt_embeds,
            "negative_prompt_embeds": null_embeds,
            "add_text_embeds": added.get("text_embeds"),
            "add_time_ids": added.get("time_ids"),
            "emotion_tokens": state.tokens,
        }
        names = given["callback_on_step_end_tensor_inputs"]
        returned = given["callback_on_step_end"](self, step, timestep, {name: offered[name] for name in names})
        conditioning.prompt_embeds = returned.pop("prompt_embeds", conditioning.prompt_embeds)
        replaced = returned.pop("negative_prompt_embeds", null_embeds)
        if replaced is not null_embeds and conditioning.has_null:
            prompt_embeds = conditioning.prompt_embeds[-conditioning.batch_size :]
            conditioning.prompt_embeds = torch.cat([replaced, prompt_embeds])
        for name, key in (("add_text_embeds", "text_embeds"), ("add_time_ids", "time_ids")):
            if name in returned:
                added[key] = returned.pop(name)
        state.tokens = returned.pop("emotion_tokens", state.tokens)
        return returned.pop("latents", latents)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] = None,
        prompt_2: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        timesteps: list[int] = None,
        sigmas: list[float] = None,
        denoising_end: float | None = None,
        guidance_scale: float = 5.0,
        negative_prompt: str | list[str] | None = None,
        negative_prompt_2: str | list[str] | None = None,
        num_images_per_prompt: int | None = 1,
        eta: float = 0.0,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        prompt_embeds: torch.Tensor | None = None,
        negative_prompt_embeds: torch.Tensor | None = None,
        pooled_prompt_embeds: torch.Tensor | None = None,
        negative_pooled_prompt_embeds: torch.Tensor | None = None,
        ip_adapter_image: PipelineImageInput | None = None,
        ip_adapter_image_embeds: list[torch.Tensor] | None = None,
        output_type: str | None = "pil",
        return_dict: bool = True,
        cross_attention_kwargs: dict[str, Any] | None = None,
        guidance_rescale: float = 0.0,
        original_size: tuple[int, int] | None = None,
        crops_coords_top_left: tuple[int, int] = (0, 0),
        target_size: tuple[int, int] | None = None,
        negative_original_size: tuple[int, int] | None = None,
        negative_crops_coords_top_left: tuple[int, int] = (0, 0),
        negative_target_size: tuple[int, int] | None = None,
        clip_skip: int | None = None,
        callback_on_step_end: Callable[[int, int], None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: list[str] = ["latents"],  # noqa: B006 (upstream's signature)
        emotion: Emotion | list[Emotion] = None,
        emotion_strength: float = 1.0,
        emotion_prompts: Mapping[str, str | list[str]] | None = None,
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float = 1.0,
        guidance_reference: str = "null",
        num_emotion_tokens: int | None = None,
        emotion_tokens: torch.Tensor | None = None,
        emotion_token_init: str = "random",
        max_inner_steps: int = 10,
        loss_threshold: float = 1e-4,
        stop_probability: float | None = None,
        emotion_learning_rate: float = 0.01,
        semantic_threshold: float | None = None,
        semantic_prompt: str | list[str] | None = None,
        similarity_scale: float | None = None,
        inherent_weight: float = 0.0005,
        similar_weight: float = 0.0015,
        similar_emotions: str | list[str] | dict[str, list[str]] | None = None,
        max_token_norm: float | None = None,
        guided_preview: bool = True,
        carry_emotion_tokens: bool = True,
        update_interval: int = 1,
        patience: int | None = None,
        emotion_optimizer: str = "adam",
        keep_best: bool = True,
        preview_scale: float = 1.0,
        max_inner_batch: int | None = None,
        gradient_checkpointing: bool = False,
        **kwargs: Any,
    ) -> MuseXLPipelineOutput | tuple:
        r"""
        Generates images that evoke `emotion`, or edits `image` towards it (MUSE, Fig. 1 and Eq. 7-13).

        Everything up to `callback_on_step_end_tensor_inputs` is [`StableDiffusionXLPipeline.__call__`]'s, with its
        meaning and defaults; with neither `emotion` nor `image` the result is the parent's, bit for bit. Below, B is
        the number of images, D the width of the prompt embeddings.

        Args:
            prompt (`str` or `list[str]`, *optional*): May be left out with an `emotion`; it is then
                "an image of {emotion}". When editing, the caption of the source.
            emotion (`str`, `dict[str, float]` or a list of these and `None`, *optional*): What the image should
                evoke: a label of the classifier (`pipe.emotion_labels`), or a mixture as label -> weight (>= 0,
                normalised to sum to one). A list has one entry per prompt; an entry `None` leaves its image stock.
            emotion_strength (`float`, defaults to 1.0): In (0, 1]: how far each step goes from the noise of the prompt
                alone to that of the prompt with S, `eps = eps(P) + emotion_strength (eps(P, S) - eps(P))`. Towards 0
                the image becomes the one without an emotion.
            emotion_prompts (`dict[str, str or list[str]]`, *optional*): Labels of your own, each with the texts that
                describe it, for `emotion` to choose from: `clip_model` then classifies zero-shot, in place of the
                classifier. Without a classifier `EMOTION_PROMPTS` serves.
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*): The source to edit;
                one for all prompts, or one per prompt. It is inverted with DDIM ([`~MuseXLPipeline.invert`]) and
                denoised with DDIM, whatever `scheduler` is. Arrays are uint8 or in [0, 1]; tensors are in [0, 1], of
                shape `(3, H, W)` or `(n, 3, H, W)`. The result has its aspect ratio unless `height` and `width` are
                given; the progress bar says it. `latents` from `invert` (same prompt, steps and strength) save the
                inversion.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*): Where the
                emotion acts: white there, black where the source stays, grey in between. One for all prompts, or one
                per prompt; tensors are in [0, 1], of shape `(1, H, W)` or `(n, 1, H, W)`. Outside of it the latents
                return to the inversion's own path at every step, and in the end to the source's; the decoder, which
                sees the whole picture, may carry a little of the change over. The gate sees mostly the source, so it
                may open late: see `semantic_threshold`.
            strength (`float`, defaults to 1.0): In (0, 1]: the share of the path from image to noise that an edit
                walks back. Less keeps more of the source.
            guidance_reference (`str`, defaults to "null"): What guidance leads away from. "null": the null (or
                negative) prompt, as in the paper. "source", for editing: the source prompt itself,
                `eps = eps(P) + w (eps(P, S) - eps(P))`, which retraces the inversion until the gate opens, and then
                scales the emotion alone.
            num_emotion_tokens (`int`, defaults to 4): How many tokens S are appended to the prompt.
            emotion_tokens (`torch.Tensor` of shape `(n, D)` or `(B, n, D)`, or `dict[str, torch.Tensor]`, *optional*):
                Tokens to start from, such as those that an earlier call returned; or for each label tokens of shape
                `(n, D)`, an emotion library as `safetensors.torch.load_file` reads it. Mixtures start from the mean.
            emotion_token_init (`str`, defaults to "random"): Where S starts otherwise. "random": noise with the
                standard deviation of the prompt embedding, as in the paper; "emotion": the hidden state of the
                emotion's word plus a tenth of that noise. The noise is drawn from a copy of each sample's generator.
            max_inner_steps (`int`, defaults to 10): Adam steps per denoising step at most; 0 uses the tokens as they
                start.
            loss_threshold (`float`, defaults to 1e-4): The inner loop of a sample ends when its loss falls below; for
                a mixture, when it is less than this above the least that its weights allow, their entropy.
            stop_probability (`float`, *optional*): It also ends when the target's probability reaches this value; of
                a mixture, when each label reaches this share of its weight.
            emotion_learning_rate (`float`, defaults to 0.01): Adam's; falls as `lr * (1 - i / 100)` with the index i
                of the denoising step.
            semantic_threshold (`float`, *optional*): Guidance starts, for good, when
                `similarity_scale * cos(preview, prompt)` reaches this value. 0: at the first step; `float("inf")`:
                never. Defaults to `pipe.config.semantic_threshold`.
            semantic_prompt (`str` or `list[str]`, *optional*): The gate's text, `prompt` by default.
            similarity_scale (`float`, *optional*): Defaults to `clip_model.logit_scale.exp()`, 100 in OpenAI's models.
            inherent_weight (`float`, defaults to 0.0005): lambda_1, away from what the image evokes by itself.
            similar_weight (`float`, defaults to 0.0015): lambda_2, away from the target's similar emotions.
            similar_emotions (`"both"`, `list[str]` or `dict[str, list[str]]`, *optional*): Overrides which emotions
                are similar, for all targets or per target. By default the wheel's neighbours of the same valence;
                "both": both neighbours. `[]`: none.
            max_token_norm (`float`, *optional*): Bounds the norm of each token, as a multiple of the mean norm of the
                prompt's token embeddings.
            guided_preview (`bool`, defaults to `True`): Whether the x0 that is classified comes from the guided noise
                or from the conditional one alone.
            carry_emotion_tokens (`bool`, defaults to `True`): Whether S goes on from one denoising step to the next or
                starts anew.
            update_interval (`int`, defaults to 1): Gate and inner loop work at every so many denoising steps, starting
                with the first; at those in between open samples take their tokens as they are, for the price of a
                plain step.
            patience (`int`, *optional*): After so many updates in a row at which a sample had reached
                `loss_threshold` or `stop_probability` without an inner step, its tokens stay as they are for good.
            emotion_optimizer (`str`, defaults to "adam"): "adam"; or "normalized": plain gradient steps, each of which
                moves the tokens' entries by `emotion_learning_rate` in the root mean square, whatever the gradient's
                size (as DATE's, https://huggingface.co/papers/2510.23974).
            keep_best (`bool`, defaults to `True`): Whether the tokens are evaluated once more after the last inner
                step, and the best that were seen are kept. `False` spares this: the tokens go on as the last inner
                step left them, and the denoising step is taken with the best noise before it.
            preview_scale (`float`, defaults to 1.0): In (0, 1]: the size at which previews are decoded for gate and
                classifier; 0.5 halves both sides.
            max_inner_batch (`int`, *optional*): At most so many samples share a pass of the inner loop, which bounds
                its memory; all of them by default.
            gradient_checkpointing (`bool`, defaults to `False`): Whether the UNet and the preview's decoder recompute
                activations in the inner loop, and only there: much less memory for about a third more time.

        Returns:
            [`MuseXLPipelineOutput`], or with `return_dict=False` a tuple: upstream's `(images,)`,
            and with `emotion` or `image` also `emotion_tokens` and `trace`.

        Raises:
            ValueError, TypeError: For bad input, before any work is done; the message names the argument.

        Examples:

        ```py
        >>> import torch
        >>> from diffusers import DiffusionPipeline

        >>> pipe = DiffusionPipeline.from_pretrained("path/to/muse", trust_remote_code=True)
        >>> image = pipe("a cat in the park", emotion="awe", generator=torch.Generator().manual_seed(0)).images[0]
        ```
        """
        semantic_threshold = self.config.semantic_threshold if semantic_threshold is None else semantic_threshold
        arguments = dict(locals())

        # 1. Check everything before any work is done
        settings = GuidanceSettings(**{part.name: arguments[part.name] for part in fields(GuidanceSettings)})
        self._check_guidance(arguments, settings)
        if emotion is None and image is None:
            return self._call_stock({name: arguments[name] for name in STOCK_ARGUMENTS}, kwargs)
        request = self._resolve_request(arguments, settings)
        scheduler, timesteps = self._resolve_timesteps(request.given)
        if denoising_end is not None:  # the rest is a refiner's
            cutoff = round((1 - denoising_end) * scheduler.config.num_train_timesteps)
            timesteps = timesteps[: int((timesteps >= cutoff).sum())]
            if len(timesteps) == 0:
                raise ValueError(f"`denoising_end` {denoising_end} leaves no step to walk.")

        # 2. Encode the prompts; S is appended later, so without it this is upstream's conditioning
        self._guidance_scale, self._guidance_rescale = guidance_scale, guidance_rescale
        self._clip_skip, self._cross_attention_kwargs = clip_skip, cross_attention_kwargs
        self._denoising_end, self._interrupt = denoising_end, False
        with_null = self.do_classifier_free_guidance and not request.leads_from_source
        conditioning = self._encode_conditioning(request.given, with_null)

        with frozen(*self._guidance_chain), upcast(self.vae):
            # 3. Start from noise, or from the noise of the source, and the emotional tokens from their own
            latents, region = self._start_latents(request.given, conditioning)
            state = self._prepare_state(request, conditioning)
            # 4. Denoise; see there for WHEN, HOW and WHICH
            latents = self._denoise(latents, scheduler, timesteps, conditioning, state, region, request)
            # 5. Decode
            images = self._decode_output(latents, request.given)

        self.maybe_free_model_hooks()
        output = MuseXLPipelineOutput(images, state.tokens, state.traces if emotion is not None else None)
        return output if return_dict else tuple(getattr(output, part.name) for part in fields(output))


# Copied from pipeline_muse.STOCK_ARGUMENTS with StableDiffusion->StableDiffusionXL
STOCK_ARGUMENTS = frozenset(inspect.signature(StableDiffusionXLPipeline.__call__).parameters) - {"self", "kwargs"}
