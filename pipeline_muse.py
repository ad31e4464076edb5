# Copyright 2026 The MUSE pipelines authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""MUSE (https://huggingface.co/papers/2511.21051): an emotion for Stable Diffusion 1.x and 2.x, at test time.

Read from top to bottom: emotions and their loss (WHICH), previews and similarity, the settings, the method itself
(`Guide`: WHEN, HOW, WHICH), and the pipeline, which runs the parent's own call with the guide at its UNet.
"""

import difflib
import inspect
import json
import math
import numbers
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import wraps
from pathlib import Path
from types import MappingProxyType, SimpleNamespace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

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
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import PipelineImageInput, VaeImageProcessor
from diffusers.pipelines.stable_diffusion import StableDiffusionPipelineOutput, StableDiffusionSafetyChecker
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion import rescale_noise_cfg, retrieve_timesteps
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import deprecation_utils, logging
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD


logger = logging.get_logger(__name__)

if TYPE_CHECKING:
    from diffusers import StableDiffusionPipeline as Parent
else:  # diffusers takes the one pipeline class that it finds in a file, so the mixin must not be one
    Parent = object


# ---- The same in both pipeline files: written by `make fix-copies` ----


class EmotionPoint(NamedTuple):
    """Where an emotion lies in the circumplex of affect, and the colour that plots give it."""

    valence: float  # 1 (unhappy) to 9 (happy)
    arousal: float  # 1 (calm) to 9 (excited)
    color: str


# Mikels' wheel, a cycle: each emotion stands beside the two that it is most easily mistaken for. Valence and arousal
# are the mean ratings of these eight words ("V.Mean.Sum" and "A.Mean.Sum") in Warriner, Kuperman & Brysbaert (2013),
# Norms of valence, arousal, and dominance for 13,915 English lemmas, https://doi.org/10.3758/s13428-012-0314-x. The
# ratings as a whole are licensed CC BY-NC-ND 3.0.
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
POSITIVE_EMOTIONS = frozenset(label for label, point in MIKELS_WHEEL.items() if point.valence > 5)

# Keeps gradients of a float16 network out of the range where they round to zero; they are divided by it again.
FLOAT16_LOSS_SCALE = 1024.0

# Tokens started from one hidden state would get one gradient; this share of noise tells them apart.
START_JITTER = 0.1

NUM_EMOTION_TOKENS = 4
TOKEN_STARTS = ("random", "emotion")
MUSE_COMPONENTS = ["clip_model", "emotion_classifier", "preview_vae"]

# What CLIP is asked where it has to do without an emotion classifier: the mean feature of these stands for an emotion.
EMOTION_TEMPLATES = ("a picture that evokes {}", "a scene full of {}", "an image of {}", "this looks like {}")

PIXEL_SETTINGS = ("image_size", "image_mean", "image_std")  # what a classifier's config has to tell of its input
OUTPUT_TYPES = ("pil", "np", "pt", "latent")
PREDICTION_TYPES = ("epsilon", "v_prediction", "sample")
KEEP_DTYPES = object()
DTYPE_ARGUMENT = (
    "dtype" if hasattr(deprecation_utils, "_resolve_dtype") else "torch_dtype"
)  # of diffusers' `from_pipe`
MAX_WEIGHT = 1e6  # learning rates, weights and scales beyond it are mistakes

Emotion: TypeAlias = str | Mapping[str, float] | None
Pictures: TypeAlias = list[PIL.Image.Image] | Tensor
TokenStart: TypeAlias = str | Tensor | Mapping[str, Tensor]


# --------------------------------------------------------------------------------------
# Which: emotions and the loss
# --------------------------------------------------------------------------------------


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
    if not {label, other} <= set(wheel):
        raise ValueError(f"`label` {label!r} or `other` {other!r} is not on Mikels' wheel, which holds {wheel}.")
    steps = abs(wheel.index(label) - wheel.index(other))
    across = (label in POSITIVE_EMOTIONS) != (other in POSITIVE_EMOTIONS)
    return min(steps, len(wheel) - steps) + (3 if polarity_aware and across else 0)


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


def match_label(word: Any, labels: Sequence[str]) -> str | None:
    """The label that `word` is, whatever its case and spaces; `None` where it is none."""
    plain = {"".join(label.casefold().split()): label for label in labels}
    return plain.get("".join(word.casefold().split())) if isinstance(word, str) else None


def near_label(word: Any, labels: Sequence[str]) -> str | None:
    """The label that `word` seems to be a misspelling of."""
    near = difflib.get_close_matches(word.casefold(), labels, n=1, cutoff=0.75) if isinstance(word, str) else []
    return near[0] if near else None


def other_words(entries: Sequence[Emotion], labels: Sequence[str]) -> list[str]:
    """Words of `emotion` entries that are no labels, nor misspellings of some: emotions by words of one's own."""
    words: list[str] = []
    for word in [word for entry in entries for word in (entry if isinstance(entry, Mapping) else [entry])]:
        is_word = isinstance(word, str) and any(map(str.isalpha, word))
        if is_word and not (match_label(word, [*labels, *words]) or near_label(word, labels)):
            words.append(word.strip())
    return words


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
    weights: dict[str, float] = {}
    for word, weight in emotion.items():
        label, near = match_label(word, labels), near_label(word, labels)
        if label is None:
            hint = f"; did you mean {near!r}?" if near else "; other words need a `clip_model` or `emotion_prompts`."
            raise ValueError(f"`emotion` {word!r} is not known to the classifier, which knows {sorted(labels)}{hint}")
        if not (is_number(weight) and 0 <= weight <= MAX_WEIGHT):
            raise ValueError(f"`emotion` weights have to be numbers in [0, {MAX_WEIGHT}]: {word!r} has {weight!r}.")
        weights[label] = weights.get(label, 0.0) + weight
    total = sum(weights.values())
    if total <= 0:
        raise ValueError(f"`emotion` weights have to sum to more than 0, but {dict(emotion)} does not.")
    return {label: weight / total for label, weight in weights.items() if weight > 0}


def label_weights(rows: Iterable[Mapping[str, float]], labels: Sequence[str]) -> Tensor:
    """Rows of label -> weight as a float32 matrix of shape `(len(rows), len(labels))`; absent labels weigh zero."""
    return torch.tensor([[row.get(label, 0.0) for label in labels] for row in rows], dtype=torch.float32)


def emotion_templates(labels: Iterable[str]) -> dict[str, list[str]]:
    """What CLIP is asked about each label."""
    return {label: [template.format(label) for template in EMOTION_TEMPLATES] for label in labels}


EMOTION_PROMPTS = emotion_templates(MIKELS_WHEEL)


def mean_of_labels(table: Mapping[str, Tensor], targets: Sequence[Mapping[str, float]]) -> Tensor:
    """Per target the mean of its labels' entries of `table`, by its weights; zeros where it has no labels."""
    zeros = torch.zeros_like(next(iter(table.values())))
    return torch.stack([sum((w * table[label] for label, w in target.items()), zeros) for target in targets])


def similar_weights(
    similar_emotions: str | Sequence[str] | Mapping[str, Sequence[str]] | None,
    target: Mapping[str, float],
    labels: Sequence[str],
) -> dict[str, float]:
    """The labels to keep away from as weights that sum to one (or none), without those of the target itself."""
    if similar_emotions is None or similar_emotions == "both":
        names = [other for label in target for other in wheel_neighbors(label, similar_emotions is None)]
    elif isinstance(similar_emotions, Mapping):
        names = [other for label in target for other in similar_emotions.get(label, ())]
    else:
        names = list(similar_emotions)
    names = sorted((set(names) & set(labels)) - set(target))
    return dict.fromkeys(names, 1 / len(names)) if names else {}


def muse_loss(
    logits: Tensor,
    target: Tensor,
    inherent: Tensor,
    similar: Tensor,
    inherent_weight: float,
    similar_weight: float,
) -> Tensor:
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


@dataclass(frozen=True)
class PixelSpec:
    """
    What a vision model wants to see. Classifiers carry it in their config, as `image_size`, `image_mean`, and so on.

    Args:
        size (`tuple[int, int]`): Height and width in pixels.
        mean, std (`tuple[float, float, float]`): By which pixels in [0, 1] are normalised, per channel.
        crop (`float`, defaults to 1.0): The share of the sides around the middle that is seen.
        squeeze (`bool`, defaults to `True`): Whether pictures of another shape are squeezed, or cropped to this one.
        channels (`tuple[int, int, int]`): Their order, of red, green and blue.
        resample (`str`, defaults to "bicubic"): "bicubic" or "bilinear".
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    crop: float = 1.0
    squeeze: bool = True
    channels: tuple[int, ...] = (0, 1, 2)
    resample: str = "bicubic"

    @classmethod
    def from_classifier(cls, classifier: PreTrainedModel) -> "PixelSpec":
        """Reads it from the config; `image_size` may be one side. Raises a `ValueError` where something is missing."""
        found = {part.name: getattr(classifier.config, f"image_{part.name}", None) for part in fields(cls)}
        missing = [name for name in PIXEL_SETTINGS if getattr(classifier.config, name, None) is None]
        if missing:
            hint = "load it with `pipe.load_emotion_classifier(model, image_processor=...)`"
            raise ValueError(
                f"`emotion_classifier` {type(classifier).__name__} lacks {missing} in its config: {hint}."
            )
        found["size"] = [found["size"]] * 2 if isinstance(found["size"], int) else found["size"]
        lists = {name: tuple(value) for name, value in found.items() if isinstance(value, list)}
        given: dict[str, Any] = {name: value for name, value in (found | lists).items() if value is not None}
        return cls(**given)

    def write_to(self, classifier: PreTrainedModel) -> None:
        """Writes it into the config, where `from_classifier` reads it."""
        for part in fields(self):
            value = getattr(self, part.name)
            setattr(classifier.config, f"image_{part.name}", list(value) if isinstance(value, tuple) else value)

    @classmethod
    def from_processor(cls, image_processor: Any) -> "PixelSpec":
        """
        Finds out what an image processor of transformers does, by what it makes of plain colours and of ramps.

        Raises:
            ValueError: That names the processor, if it does more than crop, resize and normalise.
        """
        name, side = type(image_processor).__name__, 512

        def see(pixels: Any, width: int = side) -> np.ndarray:
            picture = np.broadcast_to(np.asarray(pixels), (side, width, 3)).astype(np.uint8)
            return np.array(image_processor(PIL.Image.fromarray(picture), return_tensors="np")["pixel_values"][0])

        def seen(width: int) -> float:
            """Of a ramp from left to right, the share that is seen."""
            row = (see(np.linspace(0, 255, width)[None, :, None], width)[0] - black[0]).mean(axis=0) * std[0]
            middle = slice(len(row) // 8, -(len(row) // 8))
            slope = np.polyfit(np.arange(len(row))[middle], row[middle], deg=1)[0]
            return round(float(slope * len(row) * (width - 1) / width), 3)

        try:
            black, white = see(0), see(255)
            std = 1 / (white - black).mean(axis=(1, 2))
            mean = -black.mean(axis=(1, 2)) * std
            primaries = np.stack([see(255 * np.eye(3)[channel]).mean(axis=(1, 2)) for channel in range(3)])
            spec = cls(
                size=black.shape[1:],
                mean=exact(mean, getattr(image_processor, "image_mean", None)),
                std=exact(std, getattr(image_processor, "image_std", None)),
                crop=min(1.0, seen(side)),
                squeeze=seen(2 * side) > 0.75 * seen(side),
                channels=tuple(primaries.argmax(axis=0).tolist()),
                resample="bilinear" if getattr(image_processor, "resample", None) == 2 else "bicubic",
            )
            phases = np.arange(2 * side)[None, :, None] / (30, 40, 50) + np.arange(side)[:, None, None] / 60
            waves = 127.5 + 127.5 * np.sin(phases)
            made = spec.prepare(torch.from_numpy(waves).permute(2, 0, 1)[None] / 127.5 - 1)[0].numpy()
            error = float(np.abs((made - see(waves, 2 * side)) * std[:, None, None]).mean())
        except Exception as failure:  # whatever a processor may raise that wants other things than one picture
            raise ValueError(f"`image_processor` {name} makes no pixels of one size: {failure}") from failure
        if not error < 0.02:
            raise ValueError(
                f"`image_processor` {name} does more than crop, resize and normalise (error {error:.2f})."
            )
        return spec

    @classmethod
    def from_clip(cls, clip_model: CLIPModel) -> "PixelSpec":
        """OpenAI CLIP's normalisation at the size of the model's own vision tower."""
        size = clip_model.config.vision_config.image_size
        return cls((size, size), tuple(OPENAI_CLIP_MEAN), tuple(OPENAI_CLIP_STD))

    def prepare(self, image: Tensor) -> Tensor:
        """
        Crops, resizes (antialiased) and normalises differentiably. Nothing is clamped: a clamp has no gradient.

        Args:
            image (`torch.Tensor` of shape `(batch_size, 3, height, width)`): Pixels in [-1, 1].

        Returns:
            `torch.Tensor` of shape `(batch_size, 3, *size)`, float32.
        """
        image = image.float()[:, list(self.channels)] / 2 + 0.5
        sides = image.shape[-2:]
        seen = [self.crop * side for side in sides]
        if not self.squeeze:
            scale = min(part / side for part, side in zip(seen, self.size))
            seen = [scale * side for side in self.size]
        top, left = (round((side - part) / 2) for side, part in zip(sides, seen))
        image = image[..., top : sides[0] - top, left : sides[1] - left]
        if image.shape[-2:] != self.size:
            image = F.interpolate(image, self.size, mode=self.resample, antialias=True, align_corners=False)
        mean, std = (image.new_tensor(values).view(1, -1, 1, 1) for values in (self.mean, self.std))
        return (image - mean) / std


def exact(measured: np.ndarray, told: Sequence[float] | None) -> tuple[float, ...]:
    """What a config tells, if that is what was measured."""
    close = told is not None and np.shape(told) == measured.shape and np.allclose(measured, told, atol=1e-3)
    return tuple(told if close else measured.tolist())


def check_schedule(scheduler: Any) -> None:
    """Raises a `ValueError` that names a scheduler without a diffusion's noise schedule, as EDM's, flows and IPNDM."""
    is_flow = scheduler.config.get("prediction_type") == "flow_prediction" or scheduler.config.get("use_flow_sigmas")
    if is_flow or not hasattr(scheduler, "alphas_cumprod"):
        name = type(scheduler).__name__
        raise ValueError(f"`scheduler` {name} does not tell the noise level of a timestep; use such as DDIMScheduler.")


def signal_level(scheduler: Any, timestep: Tensor) -> Tensor:
    """
    The cumulative alpha of `timestep`: the share of signal in the network's input. No scheduler state is changed.

    Schedulers with `sigmas` know their own noise level (also for fractional timesteps): alpha = 1 / (1 + sigma**2).

    Raises:
        ValueError: As [`check_schedule`], and for a timestep beyond the scheduler's last.
    """
    check_schedule(scheduler)
    if not getattr(scheduler, "state_in_first_order", True):  # between two sigmas; how it scales its input tells where
        return scheduler.scale_model_input(torch.ones((), dtype=torch.float64), timestep) ** 2
    if hasattr(scheduler, "sigmas") and hasattr(scheduler, "index_for_timestep"):
        index = scheduler.step_index if scheduler.step_index is not None else scheduler.index_for_timestep(timestep)
        return 1 / (1 + scheduler.sigmas[index].double() ** 2)
    if int(timestep) >= len(scheduler.alphas_cumprod):  # an offset on top of as many steps as there are
        raise ValueError(f"`num_inference_steps` leads {type(scheduler).__name__} beyond its last timestep.")
    return scheduler.alphas_cumprod[int(timestep)].double()


def predict_x0(model_input: Tensor, noise_pred: Tensor, alpha_cumprod: float | Tensor, prediction_type: str) -> Tensor:
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


def shrink(latents: Tensor, scale: float) -> Tensor:
    """Latents, shape `(batch_size, channels, height, width)`, at `scale` of their size, each a mean of neighbours."""
    sides = [max(1, round(scale * side)) for side in latents.shape[-2:]]
    return F.interpolate(latents, sides, mode="area")


def check_preview(scheduler: Any, timesteps: Tensor) -> None:
    """Raises a `ValueError` that names the scheduler where [`predict_x0`] cannot be derived for its first timestep."""
    name, prediction = type(scheduler).__name__, scheduler.config.get("prediction_type", "epsilon")
    if prediction not in PREDICTION_TYPES:
        raise ValueError(f"`scheduler` {name} predicts {prediction!r}; MUSE knows {PREDICTION_TYPES}.")
    if signal_level(scheduler, timesteps[0]) == 0 and prediction == "epsilon":
        hint = "whose noise tells nothing of the image; it needs a checkpoint of v_prediction"
        raise ValueError(f"`scheduler` {name} starts from pure noise (zero terminal SNR), {hint}.")


def guide_noise(
    noise_reference: Tensor | None,
    noise_cond: Tensor,
    guidance_scale: float,
    guidance_rescale: float = 0.0,
) -> Tensor:
    """Classifier-free guidance (Eq. 2 of Imagen) away from `noise_reference`; without one the condition alone."""
    if noise_reference is None:
        return noise_cond
    noise_pred = noise_reference + guidance_scale * (noise_cond - noise_reference)
    if guidance_rescale > 0.0:
        noise_pred = rescale_noise_cfg(noise_pred, noise_cond, guidance_rescale=guidance_rescale)
    return noise_pred


def clip_features(clip_model: CLIPModel, image: Tensor, text_inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
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


def clip_similarity(
    clip_model: CLIPModel, image: Tensor, text_inputs: Mapping[str, Tensor], scale: float | None = None
) -> Tensor:
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


def degrade(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """
    A little moved, blurred, recoloured and noisy: what no person's answer depends on.

    Args:
        pixels (`torch.Tensor` of shape `(n, 3, H, W)`): Pictures in about [-1, 1]; all are degraded alike.
        generator (`torch.Generator`): Decides how, on the CPU, so that devices agree.

    Returns:
        `torch.Tensor` of the same shape, float32; differentiable.
    """
    pixels = pixels.float()
    move, zoom, gain, offset, blur = (2 * torch.rand(10, generator=generator) - 1).split([2, 1, 3, 3, 1])
    small = F.interpolate(pixels, scale_factor=0.75 + 0.25 * blur.item(), mode="bilinear", antialias=True)
    matrix = torch.cat([torch.eye(2) * (1 + 0.05 * zoom), 0.06 * move[:, None]], dim=1)
    grid = F.affine_grid(matrix.to(pixels).expand(len(pixels), 2, 3), list(pixels.shape), align_corners=False)
    moved = F.grid_sample(small, grid, padding_mode="border", align_corners=False)
    grain = F.interpolate(torch.randn(1, 3, 64, 64, generator=generator), pixels.shape[-2:], mode="bilinear")
    gain, offset = (change.view(3, 1, 1).to(pixels) for change in (1 + 0.12 * gain, 0.08 * offset))
    return gain * moved + offset + 0.06 * grain.to(pixels)


def to_rgb(image: PIL.Image.Image | np.ndarray, name: str = "image", background: str = "white") -> PIL.Image.Image:
    """
    Any picture as upright 8-bit RGB: EXIF rotation applied, transparency laid on `background`, more bits and floats
    scaled to 8 (white is the least of 1, for floats, 255, 4095 and 65535 that is not exceeded).

    Args:
        image (`PIL.Image.Image` or `np.ndarray`): Arrays are of shape `(H, W)` or `(H, W, 1, 3 or 4)`, and hold uint8,
            uint16, bool, or floats in [0, 1].
        name (`str`): The argument that errors name.
        background (`str`): A colour.

    Raises:
        ValueError: For a picture without pixels, with pixels below 0 or not finite, and for other arrays.
    """
    if isinstance(image, np.ndarray):
        is_float, kind = np.issubdtype(image.dtype, np.floating), image.dtype.name
        if not (image.ndim == 2 or (image.ndim == 3 and image.shape[-1] in (1, 3, 4))) or image.size == 0:
            raise ValueError(
                f"`{name}` arrays have to be of shape (H, W) or (H, W, 1, 3 or 4), but are {image.shape}."
            )
        if not (is_float or kind in ("bool", "uint8", "uint16")) or (is_float and not image.max() <= 1):
            raise ValueError(f"`{name}` arrays have to hold uint8, uint16, bool or floats in [0, 1], but hold {kind}.")
        pixels = image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image
        image = PIL.Image.fromarray(pixels if kind == "uint8" else to_8_bits(pixels, name, is_float or kind == "bool"))
    if 0 in image.size:
        raise ValueError(f"`{name}` has no pixels.")
    try:
        image = PIL.ImageOps.exif_transpose(image)
    except (ValueError, OSError) as error:  # closed, or torn
        raise ValueError(
            f"`{name}` cannot be read: {error}. Open it again with `diffusers.utils.load_image`."
        ) from error
    if image.mode.startswith("I") or image.mode == "F":
        image = PIL.Image.fromarray(to_8_bits(np.asarray(image), name, image.mode == "F"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = PIL.Image.alpha_composite(PIL.Image.new("RGBA", image.size, background), image)
    return image.convert("RGB")


def to_8_bits(pixels: np.ndarray, name: str, may_be_unit: bool) -> np.ndarray:
    """Pixels of more bits, or floats, as uint8; see [`to_rgb`]."""
    pixels = np.array(pixels, dtype=np.float32)
    whites = [white for white in ([1] if may_be_unit else []) + [255, 4095, 65535] if pixels.max() <= white]
    if not (whites and pixels.min() >= 0):
        raise ValueError(f"`{name}` has pixels below 0, beyond 65535 or not finite.")
    return np.round(pixels * (255 / whites[0])).astype(np.uint8)


def to_mask(image: PIL.Image.Image | np.ndarray, name: str = "mask_image") -> PIL.Image.Image:
    """
    A mask as 8-bit grey: transparent is black. Of values up to 1, 1 is white; of black strokes on transparency, the
    strokes are; and of a palette's indices 0 and 1, whatever their colours, 1 is.
    """
    mask = to_rgb(image, name, background="black").convert("L")
    if isinstance(image, PIL.Image.Image) and mask.getextrema()[1] < 255:
        if image.has_transparency_data:
            alpha = image.convert("RGBA").getchannel("A")
            mask = alpha if mask.getextrema()[1] == 0 else mask
        elif image.mode == "P" and image.getextrema()[1] == 1:
            mask = PIL.Image.fromarray(np.asarray(image))
    return mask.point(lambda value: 255 * value) if mask.getextrema()[1] == 1 else mask


def fit_size(
    width: int, height: int, area: int, multiple: int = 8, new_width: int | None = None, new_height: int | None = None
) -> tuple[int, int]:
    """
    The size with the aspect ratio of `(width, height)`, in multiples of `multiple`: of about `area` pixels, or of a
    side that is given.
    """
    scale = (area / (width * height)) ** 0.5
    if new_width or new_height:
        scale = new_width / width if new_width else new_height / height
    fitted = [max(multiple, round(side * scale / multiple) * multiple) for side in (width, height)]
    return new_width or fitted[0], new_height or fitted[1]


# --------------------------------------------------------------------------------------
# Checks and contexts
# --------------------------------------------------------------------------------------


def is_dynamic(module: str) -> bool:
    """Whether diffusers or transformers loaded a module from a checkpoint's own code."""
    return module.split(".")[0] in ("diffusers_modules", "transformers_modules")


def is_number(value: Any) -> bool:
    """True for Python's and NumPy's integers and floats, which PyTorch can take, but not for booleans."""
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def check_number(
    name: str,
    value: Any,
    low: float = -math.inf,
    high: float = math.inf,
    above: float = -math.inf,
    integer: bool = False,
) -> None:
    """Raises an error that names the argument unless it is a number of [low, high], or of (above, high]."""
    if not is_number(value) or (integer and not isinstance(value, numbers.Integral)):
        raise TypeError(f"`{name}` has to be {'an integer' if integer else 'a number'}, but is {value!r}.")
    if not (low <= value <= high and (value > above or above == -math.inf)):
        interval = f"[{low}" if above == -math.inf else f"({above}"
        raise ValueError(f"`{name}` has to lie in {interval}, {high}], but is {value!r}.")


def check_choice(name: str, value: Any, choices: Sequence[str]) -> None:
    """Raises a `ValueError` that names the argument unless it is one of `choices`."""
    if not (isinstance(value, str) and value in choices):
        raise ValueError(f"`{name}` has to be one of {list(choices)}, but is {value!r}.")


def check_tensor(name: str, value: Any, *shape: int | None) -> None:
    """Raises an error that names the argument unless it holds finite floats in `shape`; `None` is any size but 0."""
    if not (isinstance(value, Tensor) and value.is_floating_point()):
        raise TypeError(f"`{name}` has to be a tensor of floats, but is {getattr(value, 'dtype', type(value))}.")
    sizes = tuple(value.shape)
    if len(sizes) != len(shape) or any(size != (wanted or max(1, size)) for size, wanted in zip(sizes, shape)):
        wanted = ", ".join(str(size or "n") for size in shape)
        raise ValueError(f"`{name}` has to have shape ({wanted}), but has {sizes}.")
    if not torch.isfinite(value).all():
        raise ValueError(f"`{name}` has to be finite, but holds infinite values or NaN.")


def check_texts(name: str, value: Any, count: int) -> list[str]:
    """One text for each of `count` prompts, or an error that names the argument."""
    texts = value if isinstance(value, list) else [value] * count
    if not all(isinstance(text, str) for text in texts):
        raise TypeError(f"`{name}` has to be a string or a list of strings, but is {value!r}.")
    if len(texts) != count:
        raise ValueError(f"`{name}` has {len(texts)} entries for {count} prompts; give one for each.")
    return texts


def check_finite(name: str, values: Tensor) -> None:
    """Raises a `ValueError` rather than letting a black image pass."""
    if not torch.isfinite(values).all():
        hint = "float16 overflows in some VAEs; use bfloat16, or a VAE that was fixed for float16"
        raise ValueError(f"The {name} of the call came out infinite or NaN: {hint}.")


def check_gradients(**outputs: Tensor) -> None:
    """Raises a `ValueError` that names the first network whose output does not depend on the tokens."""
    for name, output in outputs.items():
        if not output.requires_grad:
            raise ValueError(f"`{name}` passes no gradient on, which `emotion` needs: its forward detaches.")


def refuse(reason: str, **arguments: Any) -> None:
    """Raises a `ValueError` that names the first of `arguments` that was given."""
    for name, value in arguments.items():
        if value is not None:
            raise ValueError(f"`{name}` cannot be given {reason}.")


def check_prompt_table(name: str, table: Any) -> dict[str, list[str]]:
    """Two labels or more with a list of texts for each, or an error that names the argument."""
    items = table.items() if isinstance(table, Mapping) else ()
    lists = {label: [texts] if isinstance(texts, str) else texts for label, texts in items}
    are_lists = all(isinstance(texts, (list, tuple)) and texts for texts in lists.values())
    if not (
        are_lists
        and all(isinstance(text, str) for text in [*lists, *(one for part in lists.values() for one in part)])
    ):
        raise TypeError(f"`{name}` has to map labels to a prompt or a list of them, but is {table!r}.")
    if len(lists) < 2:
        raise ValueError(f"`{name}` needs two labels to tell apart, but is {table!r}.")
    return {label: list(texts) for label, texts in lists.items()}


def check_similar(similar: Any, labels: list[str]) -> None:
    """Raises unless `similar` is None, "both", a list of labels, or a table of labels with a list for each."""
    lists = [list(similar), *similar.values()] if isinstance(similar, Mapping) else [similar]
    are_lists = all(isinstance(names, (list, tuple)) and all(name in labels for name in names) for names in lists)
    if not (similar is None or are_lists or (isinstance(similar, str) and similar == "both")):
        raise ValueError(f"`similar_emotions` has to be 'both', or lists of {sorted(labels)}, but is {similar!r}.")


def check_pictures(name: str, pictures: Any, count: int, channels: int) -> Pictures:
    """One picture, or one for each of `count` prompts: upright RGB, or a tensor `(n, channels, H, W)` in [0, 1]."""
    if isinstance(pictures, np.ndarray):
        pictures = list(pictures) if pictures.ndim == 4 else pictures
    pictures = list(pictures) if isinstance(pictures, (list, tuple)) else [pictures]
    kinds = {Tensor if isinstance(one, Tensor) else type(one) for one in pictures}
    result: Any
    if kinds == {Tensor} and len({one.shape for one in pictures}) == 1:
        result = torch.cat(pictures) if pictures[0].ndim == 4 else torch.stack(pictures)
        check_tensor(name, result, None, channels, None, None)
        if result.min() < 0 or result.max() > 1:
            raise ValueError(f"`{name}` tensors have to hold floats in [0, 1].")
    elif pictures and all(issubclass(kind, (PIL.Image.Image, np.ndarray)) for kind in kinds):
        result = [(to_rgb if channels == 3 else to_mask)(one, name) for one in pictures]
    else:
        what = "PIL images, arrays, or tensors of one shape; `diffusers.utils.load_image` opens files"
        raise TypeError(f"`{name}` holds {sorted(kind.__name__ for kind in kinds)}, but has to hold {what}.")
    if len(result) not in (1, count):
        raise ValueError(f"`{name}` holds {len(result)} pictures for {count} prompts; give one, or one for each.")
    return result


def check_classifier(classifier: PreTrainedModel) -> None:
    """Raises a `ValueError` unless a classifier tells one of several labels, and which pixels it wants."""
    PixelSpec.from_classifier(classifier)
    labels, kind = list(classifier.config.id2label.values()), getattr(classifier.config, "problem_type", None)
    if len(labels) < 2 or kind not in (None, "single_label_classification"):
        raise ValueError(f"`emotion_classifier` has to tell one of several labels, but is {kind} of {labels}.")


def check_channels(unet: UNet2DConditionModel, vae: AutoencoderKL | AutoencoderTiny) -> None:
    """Raises a `ValueError` for networks that want more than latents, as for inpainting and InstructPix2Pix."""
    wanted, channels = unet.config.in_channels, vae.config.latent_channels
    if wanted != channels:
        raise ValueError(f"`unet` takes {wanted} channels, not the {channels} of latents; use a text-to-image base.")


def check_differentiable(module: torch.nn.Module) -> None:
    """Raises a `ValueError` that names a network of which it is known that gradients do not pass."""
    processors = [type(one).__name__ for one in getattr(module, "attn_processors", {}).values()]
    casts = [part._diffusers_hook.hooks for part in module.modules() if hasattr(part, "_diffusers_hook")]
    obstacles = {
        "xFormers: call `pipe.disable_xformers_memory_efficient_attention()`": "XFormers" in "".join(processors),
        "layerwise casting": any("layerwise_casting" in hooks for hooks in casts),
        "weights loaded in `torch.inference_mode()`": any(weight.is_inference() for weight in module.parameters()),
    }
    for obstacle in [name for name, is_there in obstacles.items() if is_there]:
        raise ValueError(f"`emotion` needs gradients, so {type(module).__name__} has to go without {obstacle}.")


def accepted_arguments(function: Callable, **arguments: Any) -> dict[str, Any]:
    """Those of `arguments` that `function` has parameters for."""
    return {name: value for name, value in arguments.items() if name in inspect.signature(function).parameters}


def repeat_each(values: list, times: int) -> list:
    """`[a, b]` -> `[a, a, b, b]`, the order in which upstream lays out several images per prompt."""
    return [value for value in values for _ in range(times)]


def chunks(values: list, size: int | None) -> list[list]:
    """`values` in runs of at most `size`; in one run where `size` is `None`."""
    size = size or max(1, len(values))
    return [values[start : start + size] for start in range(0, len(values), size)]


_lock = threading.Lock()  # pipelines of several threads may share modules, whose flags and hooks are no one's own
_frozen: dict[torch.nn.Module, list] = {}  # by module: how many calls freeze it, and the flags that it had before


@contextmanager
def frozen(*modules: torch.nn.Module) -> Iterator[None]:
    """
    Modules in eval mode whose weights need no gradient. Every flag returns to what it was, whatever happens, once the
    last call that freezes a module is done: pipelines of several threads may share it.
    """
    with _lock:
        for module in modules:
            if module not in _frozen:
                weights = [(name, weight.requires_grad) for name, weight in module.named_parameters()]
                _frozen[module] = [0, weights, [(part, part.training) for part in module.modules()]]
                module.requires_grad_(False).eval()
            _frozen[module][0] += 1
    try:
        yield
    finally:
        with _lock:
            for module in reversed(modules):  # they may share parts
                _frozen[module][0] -= 1
                if _frozen[module][0] == 0:
                    _, weights, training = _frozen.pop(module)
                    for name, requires_grad in weights:  # by name: offloading replaces weights
                        module.get_parameter(name).requires_grad_(requires_grad)
                    for part, mode in training:
                        part.training = mode


def fork_generator(generator: torch.Generator | list[torch.Generator] | None):
    """A copy that draws what `generator` would draw next and leaves it where it is, so stock noise stays stock."""
    if isinstance(generator, list):
        return [fork_generator(one) for one in generator]
    source = torch.default_generator if generator is None else generator
    return torch.Generator(device=source.device).set_state(source.get_state())


# --------------------------------------------------------------------------------------
# Settings: one table, from which checks and messages come
# --------------------------------------------------------------------------------------


def setting(default: Any, low: float = -math.inf, high: float = math.inf, above: float = -math.inf) -> Any:
    """A field of [`GuidanceSettings`]: its default and its range, (above, high] or [low, high]."""
    return field(default=default, metadata={"low": low, "high": high, "above": above})


@dataclass(frozen=True)
class GuidanceSettings:
    """
    The settings of the method: name, type, default (the paper's) and range. They are arguments of the pipelines, where
    a preset fills in what is not given; their meaning: [`MuseMixin.__call__`].
    """

    emotion_strength: float = setting(1.0, above=0, high=1)
    semantic_threshold: float = setting(18.0, low=0)
    latest_start: float = setting(1.0, low=0, high=1)
    update_interval: int = setting(1, low=1)
    max_inner_steps: int = setting(10, low=0)
    max_inner_batch: int | None = setting(None, low=1)
    loss_threshold: float = setting(1e-4)
    emotion_learning_rate: float = setting(0.01, low=0, high=MAX_WEIGHT)
    inherent_weight: float = setting(0.0005, low=0, high=MAX_WEIGHT)
    similar_weight: float = setting(0.0015, low=0, high=MAX_WEIGHT)
    degraded_copies: int = setting(0, low=0)
    preview_scale: float = setting(1.0, above=0, high=1)

    def __post_init__(self):
        for part in fields(self):
            value = getattr(self, part.name)
            if value is not None or part.default is not None:
                check_number(part.name, value, integer=part.type is not float, **part.metadata)


# --------------------------------------------------------------------------------------
# The method: WHEN, HOW and WHICH
# --------------------------------------------------------------------------------------


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


class GuidedImage:
    """One image on its way: where it shall go (WHICH), whether its gate is open (WHEN), and its tokens S (HOW)."""

    def __init__(self, labels: list[str], emotion: dict[str, float], similar: dict[str, float], device: torch.device):
        self.trace = MuseTrace(labels, emotion)  # a report, from which nothing is read
        self.target, self.similar = label_weights([emotion, similar], labels).to(device)  # (C,); zeros: none
        self.inherent = torch.zeros_like(self.target)
        self.entropy = torch.special.entr(self.target).sum().item()  # no loss of a mixture is below it
        self.is_open = False
        self.has_settled = False  # S stays as it is for good
        self.previous_preview: Tensor | None = None  # (3, H, W)
        self.tokens: Tensor | None = None  # S, (n, D), float32

    @property
    def is_waiting(self) -> bool:
        """Whether guidance has yet to start; images without an emotion never wait."""
        return not self.is_open and bool(self.target.any())

    def open_gate(self, step: int, logits: Tensor) -> None:
        """Starts guidance; what evoked `logits`, shape `(C,)`, until now is the image's inherent emotion."""
        label = int(logits.argmax())
        self.is_open, self.previous_preview = True, None
        self.trace.gate_step, self.trace.inherent_emotion = step, self.trace.labels[label]
        if self.target[label] == 0:  # else target and inherent terms would cancel
            self.inherent[label] = 1.0

    def start_loop(self, learning_rate: float) -> None:
        """A fresh optimiser for the inner loop of one denoising step; S carries over."""
        self.tokens = self.tokens.clone().requires_grad_()
        self.optimizer = torch.optim.Adam([self.tokens], lr=learning_rate)
        self.least_loss, self.best = math.inf, (self.tokens, None)
        self.trace.loss.append([])
        self.trace.probabilities.append([])
        self.trace.kept.append(0)

    def record(self, loss: float, probabilities: Tensor, noise: Tensor, threshold: float) -> bool:
        """Notes one evaluation of S, the best of which is kept, and returns whether S has further to go."""
        self.trace.loss[-1].append(loss)
        self.trace.probabilities[-1].append(probabilities.tolist())
        if not math.isfinite(loss):
            logger.warning(f"A loss is {loss}; its tokens stay at their last finite value.")
        if self.best[1] is None or loss < self.least_loss:
            self.least_loss = loss if math.isfinite(loss) else math.inf
            self.best = (self.tokens.detach().clone(), noise)
            self.trace.kept[-1] = len(self.trace.loss[-1]) - 1
        return math.isfinite(loss) and loss - self.entropy >= threshold

    def descend(self, gradient: Tensor) -> bool:
        """One step of S down its loss; returns whether it could be taken."""
        if not torch.isfinite(gradient).all():
            logger.warning("A gradient is not finite; its tokens stay at their last finite value.")
            return False
        self.tokens.grad = gradient
        self.optimizer.step()
        self.trace.inner_steps += 1
        return True

    def end_loop(self) -> Tensor:
        """S is the best that was seen; returns its noise."""
        self.tokens, noise = self.best
        return noise


@dataclass
class Guide:
    """
    MUSE (Fig. 1): decides what noise each denoising step of B images is taken with.

    Args:
        images (`list[GuidedImage]`): One per row of the batch; those without an emotion stay stock.
        settings (`GuidanceSettings`): Their meaning: [`MuseMixin.__call__`].
        classify (`Callable`): Pixels `(b, 3, H, W)` in about [-1, 1] to logits `(b, C)`, float32; differentiable.
        similarity (`Callable`, *optional*): Pixels of images `list[int]` to 100 * cos with their prompts, `(b,)`.
        start (`Callable`): The prompts' embeddings `(B, L, D)` to the tokens `(B, n, D)` that S starts as.
    """

    images: list[GuidedImage]
    settings: GuidanceSettings
    classify: Callable[[Tensor], Tensor]
    similarity: Callable[[Tensor, list[int]], Tensor] | None
    start: Callable[[Tensor], Tensor]
    index: int = 0  # of the denoising step, i in the paper
    is_busy: bool = False

    @property
    def tokens(self) -> Tensor | None:
        """S of all images, shape `(B, n, D)`, float32; `None` before the first step."""
        tokens = [image.tokens for image in self.images]
        return None if tokens[0] is None else torch.stack([one.detach() for one in tokens])

    @tokens.setter
    def tokens(self, tokens: Tensor) -> None:
        for image, own in zip(self.images, tokens):
            image.tokens = own.detach().clone()

    @contextmanager
    def at_work(self) -> Iterator[None]:
        """Whoever calls the network in here, it is not the parent's loop."""
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False

    @property
    def looks(self) -> bool:
        """Whether gate and inner loop work at this step."""
        return self.index % self.settings.update_interval == 0

    def rests(self, image: GuidedImage) -> bool:
        """Whether S of an image with an open gate is taken as it is at this step."""
        return image.is_open and (image.has_settled or not self.looks)

    @property
    def all_rest(self) -> bool:
        """Whether one call of the network, with S behind the prompts, is all that this step needs."""
        return self.settings.emotion_strength == 1 and all(map(self.rests, self.images))

    def __call__(self, step: "DenoisingStep") -> Tensor:
        """
        The noise that a step is taken with, shape `(B, channels, h, w)`: eps(P) where the gate is closed, and
        eps(P) + emotion_strength (eps(P, S) - eps(P)) where it is open. Guidance away from the null prompt follows.
        """
        if self.index == 0:
            self.tokens = self.start(step.prompt_embeds)
        if self.looks:
            self.open_gates(step)
        resting = [b for b, image in enumerate(self.images) if self.rests(image)]
        moving = [b for b, image in enumerate(self.images) if image.is_open and b not in resting]

        noise = step.noise.clone()
        for samples in chunks(moving, self.settings.max_inner_batch):
            noise[samples] = self.optimize(step, samples)
        if resting:
            noise[resting] = step.predict(resting, self.tokens[resting])
        return torch.lerp(step.noise, noise, self.settings.emotion_strength)

    def open_gates(self, step: "DenoisingStep") -> None:
        """WHEN (Eq. 9, 10): opens the gate of each image whose preview resembles its prompt, or whose time is up."""
        waiting = [b for b, image in enumerate(self.images) if image.is_waiting]
        threshold, asks = self.settings.semantic_threshold, self.similarity is not None
        is_late = threshold < math.inf and self.index >= self.settings.latest_start * step.total
        if not waiting or not (asks or is_late or threshold == 0):
            return
        previews = step.preview(waiting, step.noise[waiting])
        similarities = self.similarity(previews, waiting).tolist() if asks else [0.0] * len(waiting)
        for b, preview, similarity in zip(waiting, previews, similarities):
            image = self.images[b]
            if asks:
                image.trace.similarity.append(similarity)
            if similarity >= threshold or is_late:
                before = preview if image.previous_preview is None else image.previous_preview
                image.open_gate(self.index, self.classify(before[None])[0])
            else:
                image.previous_preview = preview

    def optimize(self, step: "DenoisingStep", samples: list[int]) -> Tensor:
        """
        HOW (Eq. 7, 8): moves S of the images `samples` down the loss of their one-step previews.

        After the last inner step S is evaluated once more; the best is kept, whose noise is then at hand.

        Returns:
            `torch.Tensor` of shape `(len(samples), channels, h, w)`: eps(P, S).
        """
        learning_rate = self.settings.emotion_learning_rate * max(0.0, 1 - self.index / 100)
        inner_steps = self.settings.max_inner_steps if learning_rate > 0 else 0
        for b in samples:
            self.images[b].start_loop(learning_rate)

        active = samples
        for k in range(inner_steps + 1):
            with torch.set_grad_enabled(k < inner_steps):
                noise = step.predict(active, torch.stack([self.images[b].tokens for b in active]))  # eps(P, S)
                previews = step.preview(active, noise)  # the decoded x0
                logits = self.judge(previews, k)
                loss = self.loss(logits, active)
            going = self.record(active, loss, logits, noise)
            if k == 0 and self.settings.update_interval > 1:
                for b in active:
                    self.images[b].has_settled = b not in going
            if k == inner_steps or not going:
                break
            check_gradients(unet=noise, vae=previews, emotion_classifier=logits)
            scale = FLOAT16_LOSS_SCALE if noise.dtype == torch.float16 else 1.0
            # Of the sum, as a mean would make each image's gradient depend on its batch
            tokens = [self.images[b].tokens for b in going]
            gradients = torch.autograd.grad(loss, tokens, torch.full_like(loss, scale))
            active = [b for b, gradient in zip(going, gradients) if self.images[b].descend(gradient / scale)]
            if not active:
                break
        return torch.stack([self.images[b].end_loop() for b in samples])

    def judge(self, previews: Tensor, k: int) -> Tensor:
        """What the classifier makes of previews, or of their `degraded_copies`, at the k-th evaluation of a step."""
        copies = self.settings.degraded_copies
        if copies == 0:
            return self.classify(previews)
        generator = torch.Generator().manual_seed(1000 * self.index + k)
        seen = torch.cat([degrade(previews, generator) for _ in range(copies)])
        return self.classify(seen).log_softmax(dim=-1).unflatten(0, (copies, -1)).mean(dim=0)

    def record(self, samples: list[int], loss: Tensor, logits: Tensor, noise: Tensor) -> list[int]:
        """Notes an evaluation of S of the images `samples`, and returns those whose S has further to go."""
        losses, probabilities = loss.detach().tolist(), logits.detach().softmax(dim=-1)
        rows, threshold = zip(samples, losses, probabilities, noise.detach()), self.settings.loss_threshold
        return [b for b, value, p, eps in list(rows) if self.images[b].record(value, p, eps, threshold)]

    def loss(self, logits: Tensor, samples: list[int]) -> Tensor:
        """WHICH (Eq. 11-13): towards the target, away from the inherent and the similar emotions; shape `(b,)`."""
        images, settings = [self.images[b] for b in samples], self.settings
        target, inherent, similar = (
            torch.stack(rows) for rows in zip(*((one.target, one.inherent, one.similar) for one in images))
        )
        return muse_loss(logits, target, inherent, similar, settings.inherent_weight, settings.similar_weight)

    def summary(self) -> dict[str, str]:
        """The state of the loop for the progress bar."""
        traces = [image.trace for image in self.images if image.is_open]
        postfix = {"gate": f"{len(traces)}/{sum(bool(image.target.any()) for image in self.images)}"}
        if traces:
            postfix["inner"] = str(sum(trace.inner_steps for trace in traces))
            postfix["p"] = f"{sum(trace.target_probability for trace in traces) / len(traces):.2f}"
        return postfix


@dataclass
class SourceRegion:
    """Where an edit may act, and what it has to put back elsewhere."""

    mask: Tensor  # (B, 1, h, w), 1 where the emotion acts, 0 where the source stays
    path: list[Tensor]  # latents (B, channels, h, w) of the inversion, from the source to noise

    def restore(self, latents: Tensor, steps_left: int, samples: Any = slice(None)) -> Tensor:
        """The latents of `samples` with the source's own, as the inversion met them, outside of the mask."""
        mask, source = self.mask[samples], self.path[steps_left][samples]
        return (mask * latents + (1 - mask) * source).to(latents.dtype)


def take_rows(value: Any, rows: list[int]) -> Any:
    """Rows of what the network is told, in nested dicts and lists too."""
    if isinstance(value, Tensor):
        return value[rows]
    if isinstance(value, dict):
        return {key: take_rows(part, rows) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [take_rows(part, rows) for part in value]
    return value


def append_tokens(conditions: dict[str, Any], tokens: Tensor) -> dict[str, Any]:
    """
    The keywords of a call of the UNet with `tokens`, shape `(B, n, D)`, behind the embeddings of its last B rows
    (Eq. 7); rows before those, the null prompts', see none.
    """
    embeds, mask = conditions["encoder_hidden_states"], conditions.get("encoder_attention_mask")  # (rows, L, D)
    first, length = embeds.shape[0] - tokens.shape[0], embeds.shape[1]
    if first:
        tokens = torch.cat([tokens.new_zeros(first, *tokens.shape[1:]), tokens])
        mask = embeds.new_ones(embeds.shape[0], length + tokens.shape[1])
        mask[:first, length:] = 0
    embeds = torch.cat([embeds, tokens.to(embeds.dtype)], dim=1)  # (rows, L + n, D)
    return {**conditions, "encoder_hidden_states": embeds, "encoder_attention_mask": mask}


class DenoisingStep:
    """
    One denoising step as the parent's loop asks it of the UNet, which the guide can ask again with tokens. Upstream
    stacks the null prompts' rows, if there is guidance, before the prompts': the last B are the prompts'.

    Args:
        pipe (`DiffusionPipeline`): Whose networks and scheduler are asked.
        asked (`tuple`): The UNet's positional arguments: scaled latents `(B or 2 B, channels, h, w)` and the timestep.
        conditions (`dict`): Its keyword arguments.
        answer (`torch.Tensor` of shape `(B or 2 B, channels, h, w)`): What it answered.
        batch_size (`int`): B.
        region (`SourceRegion`, *optional*): Where an edit may act.
    """

    def __init__(
        self,
        pipe: Any,
        asked: tuple,
        conditions: dict[str, Any],
        answer: Tensor,
        batch_size: int,
        region: SourceRegion | None,
    ):
        self.first = answer.shape[0] - batch_size
        if self.first not in (0, batch_size):
            raise RuntimeError(f"The UNet was called with {answer.shape[0]} rows for {batch_size} images.")
        self.pipe, (self.latents, self.timestep), self.conditions = pipe, asked, conditions
        self.null = answer[: self.first] if self.first else None  # eps of the null prompts, (B, channels, h, w)
        self.noise = answer[self.first :]  # eps(P), (B, channels, h, w)
        self.region, self.preview_scale = region, 1.0
        self.total = pipe.num_timesteps

    @property
    def prompt_embeds(self) -> Tensor:
        """Of the prompts, shape `(B, L, D)`."""
        return self.conditions["encoder_hidden_states"][self.first :]

    def predict(self, samples: list[int], tokens: Tensor) -> Tensor:
        """eps(P, S) of images with their `tokens`, shape `(b, n, D)`; differentiable (Eq. 7)."""
        rows = [self.first + b for b in samples]
        shared = ("cross_attention_kwargs", "return_dict")
        own = {name: value if name in shared else take_rows(value, rows) for name, value in self.conditions.items()}
        return self.pipe.unet(self.latents[rows], self.timestep, **append_tokens(own, tokens))[0]

    def preview(self, samples: list[int], noise: Tensor) -> Tensor:
        """The decoded one-step x0 (Eq. 6) of images whose prompts' noise is `noise`; pixels in about [-1, 1]."""
        pipe, scheduler = self.pipe, self.pipe.scheduler
        if self.null is not None:
            noise = guide_noise(self.null[samples], noise, pipe.guidance_scale, pipe.guidance_rescale)
        latents = self.latents[[self.first + b for b in samples]]
        alpha_cumprod = signal_level(scheduler, self.timestep)
        x0 = predict_x0(latents, noise, alpha_cumprod, scheduler.config.get("prediction_type", "epsilon"))
        if self.region is not None:
            x0 = self.region.restore(x0, 0, samples)
        if self.preview_scale < 1:
            x0 = shrink(x0, self.preview_scale)
        return pipe._decode_preview(x0)

    def with_noise(self, noise: Tensor) -> Tensor:
        """The answer as the parent expects it, with `noise` in the prompts' rows."""
        return noise if self.null is None else torch.cat([self.null, noise])


# --------------------------------------------------------------------------------------
# What both pipelines are
# --------------------------------------------------------------------------------------

# Arguments of earlier releases, and what does the same now.
GONE = {
    "stop_probability": "`loss_threshold`, in units of the loss: -log(probability), 0.03 for 97 %",
    "emotion_token_init": "`emotion_tokens='random'` or `emotion_tokens='emotion'`",
    "num_emotion_tokens": "`emotion_tokens`, a tensor of as many rows",
    "guidance_reference": "`negative_prompt`: that of the source leads away from the source's own path",
    "similarity_scale": "`semantic_threshold`, in the scale of `clip_model`",
    "patience": "`update_interval`: beyond 1, images that are where they should be keep their tokens",
    "keep_best": "nothing: the best tokens are kept",
    "emotion_optimizer": "nothing: it is Adam",
    "gradient_checkpointing": "`pipe.unet.enable_gradient_checkpointing()`, which acts in the inner loop only",
    **dict.fromkeys(
        ("max_token_norm", "guided_preview", "carry_emotion_tokens"), "nothing: no other value did better"
    ),
}


def passes_on(parent: Callable) -> Callable[[Callable], Callable]:
    """Decorates a `__call__` that takes all of `parent`'s arguments: its signature shows those, and the settings."""

    def decorate(call: Callable) -> Callable:
        theirs = [one for one in inspect.signature(parent).parameters.values() if one.kind != one.VAR_KEYWORD]
        own = inspect.signature(call).parameters
        kind = inspect.Parameter.KEYWORD_ONLY
        settings = [inspect.Parameter(part.name, kind, default=None) for part in fields(GuidanceSettings)]

        @wraps(call)
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return call(*args, **kwargs)

        ours = [one for one in own.values() if one.kind == kind]
        setattr(wrapper, "__signature__", inspect.Signature([*theirs, *ours, *settings, own["kwargs"]]))  # noqa: B010
        return wrapper

    return decorate


def read_only(presets: Mapping[str, Mapping[str, Any]]) -> Mapping[str, Mapping[str, Any]]:
    """Presets that nobody can change for all pipelines at once."""
    return MappingProxyType({name: MappingProxyType(preset) for name, preset in presets.items()})


@dataclass(frozen=True)
class Wish:
    """What a call is asked to evoke, checked; lists have one entry per prompt."""

    labels: list[str]
    targets: list[dict[str, float]]
    similar: list[dict[str, float]]
    emotion_prompts: dict[str, list[str]] | None  # where CLIP classifies, zero-shot
    semantic_prompts: list[str] | None  # where the gate asks CLIP
    settings: GuidanceSettings


@dataclass(frozen=True)
class Edit:
    """What a call is asked to edit, checked."""

    image: Pictures
    mask: Pictures | None
    steps: int  # how many of the denoising steps are walked


def editing_scheduler(scheduler: Any, steps: int, inverse: bool) -> DDIMScheduler | DDIMInverseScheduler:
    """DDIM on the noise schedule of `scheduler`, of whose path between image and noise `steps` are walked."""
    spacing = scheduler.config.get("timestep_spacing", "leading")
    ddim = (DDIMInverseScheduler if inverse else DDIMScheduler).from_config(
        scheduler.config,
        clip_sample=False,
        thresholding=False,
        set_alpha_to_one=False,
        timestep_spacing="trailing" if spacing == "trailing" else "leading",
    )
    set_all_timesteps = ddim.set_timesteps

    def set_timesteps(*args: Any, **kwargs: Any) -> None:
        set_all_timesteps(*args, **kwargs)
        ddim.timesteps = ddim.timesteps[:steps] if inverse else ddim.timesteps[-steps:]

    ddim.set_timesteps, ddim.steps = set_timesteps, steps
    return ddim


def warn_of_gates(traces: list[MuseTrace], threshold: float) -> None:
    """Tells to which images no emotion was given, or late, as they did not resemble their prompt; and what would."""
    parts = []
    for what, has_started in (("never started, so there is no emotion", False), ("started late", True)):
        images = []
        for b, trace in enumerate(traces):
            reached = max(trace.similarity, default=threshold if has_started else 0)
            if trace.emotion and (trace.gate_step is not None) == has_started and reached < threshold:
                images.append(f"{b} (reached {reached:.1f})")
        parts += [f"{what} in the images {', '.join(images)}"] if images else []
    if parts:
        hint = f"`semantic_threshold` is {threshold:g}; pass a lower one, or a `latest_start` such as 0.2"
        logger.warning(f"Guidance {'; it '.join(parts)}: {hint}.")


class MuseMixin(Parent):
    """What MUSE adds to a Stable Diffusion pipeline: guidance, edits, a classifier, saving with the code."""

    scheduler: Any
    presets: Mapping[str, Mapping[str, Any]]  # by name, what a call takes where nothing else is given
    # What `save_config` writes. Read at once, as diffusers puts the file of each revision that it loads in one place.
    _source = Path(__file__).read_bytes() if is_dynamic(__name__) else None

    @torch.no_grad()
    def __call__(
        self,
        *args: Any,
        emotion: Emotion | list[Emotion] = None,
        preset: str = "full",
        image: PipelineImageInput | None = None,
        mask_image: PipelineImageInput | None = None,
        strength: float = 1.0,
        emotion_prompts: Mapping[str, str | list[str]] | None = None,
        emotion_tokens: TokenStart | None = None,
        semantic_prompt: str | list[str] | None = None,
        similar_emotions: str | list[str] | Mapping[str, list[str]] | None = None,
        **kwargs: Any,
    ) -> Any:
        r"""
        Generates images that evoke `emotion`, or edits `image` towards it (MUSE, Fig. 1 and Eq. 7-13).

        All arguments of the parent's `__call__` are taken by its names, in its order, with its meaning and defaults;
        with neither `emotion` nor `image` the result is the parent's, bit for bit. Below, B is the number of images,
        D the width of the prompt embeddings.

        Args:
            prompt (`str` or `list[str]`, *optional*): May be left out with an `emotion`; it is then
                "an image of {emotion}". When editing, the caption of the source.
            emotion (`str`, `dict[str, float]` or a list of these and `None`, *optional*): What the image should
                evoke: a label of the classifier (`pipe.emotion_labels`, whatever the case), or a mixture as label ->
                weight (>= 0, normalised to sum to one). Any other word is left to `clip_model`, which then tells it
                from the labels and "neutral". A list has one entry per prompt; an entry `None` leaves its image stock.
            preset (`str`, defaults to "full"): "paper", "full" or "fast": where the settings below that are not given
                come from (`pipe.presets`).
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*): The source to edit;
                one for all prompts, or one per prompt. It is inverted with DDIM ([`~MuseMixin.invert`]) and denoised
                with DDIM, whatever `scheduler` is. Arrays are uint8 or in [0, 1]; tensors are in [0, 1], of shape
                `(3, H, W)` or `(n, 3, H, W)`. The result has its aspect ratio unless `height` and `width` are given;
                the progress bar says it. `latents` from `invert` (same prompt, steps and strength) save the inversion.
                With `negative_prompt` equal to `prompt` guidance leads away from the source's own path: what is not
                emotion is reconstructed.
            mask_image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them, *optional*): Where the
                emotion acts: white there, black where the source stays, grey in between. One for all prompts, or one
                per prompt; tensors are in [0, 1], of shape `(1, H, W)` or `(n, 1, H, W)`. Outside of it the latents
                return to the inversion's own path at every step, and in the end to the source's; the decoder, which
                sees the whole picture, may carry a little of the change over. The gate sees mostly the source, so it
                may open late: see `semantic_threshold`.
            strength (`float`, defaults to 1.0): In (0, 1]: the share of the path from image to noise that an edit
                walks back. Less keeps more of the source.
            emotion_prompts (`dict[str, str or list[str]]`, *optional*): Labels of your own, each with the texts that
                describe it, for `emotion` to choose from: `clip_model` then classifies zero-shot, in place of the
                classifier. Without a classifier `EMOTION_PROMPTS` serves.
            emotion_tokens (`str`, `torch.Tensor` or `dict[str, torch.Tensor]`, *optional*): Where the tokens S start.
                "random": 4 tokens of noise with the standard deviation of the prompt embedding, as in the paper;
                "emotion": the hidden state of the emotion's word plus a tenth of that noise; a tensor of shape
                `(n, D)` or `(B, n, D)`, such as an earlier call returned; or for each label tokens of shape `(n, D)`,
                an emotion library as `safetensors.torch.load_file` reads it. Mixtures start from the mean of their
                labels. Noise is drawn from a copy of each image's generator.
            semantic_prompt (`str` or `list[str]`, *optional*): The gate's text, `prompt` by default. Without either
                there is no content to wait for: guidance starts at the first step.
            similar_emotions (`"both"`, `list[str]` or `dict[str, list[str]]`, *optional*): Which emotions are
                similar, for all targets or per target. By default the wheel's neighbours of the same valence;
                "both": both neighbours. `[]`: none.
            emotion_strength (`float`): In (0, 1]: how far each step goes from the noise of the prompt alone to that of
                the prompt with S, `eps = eps(P) + emotion_strength (eps(P, S) - eps(P))`. Towards 0 the image becomes
                the one without an emotion.
            semantic_threshold (`float`): Guidance starts, for good, when 100 cos(preview, prompt), in CLIP's own
                scale, reaches this value. 0: at the first step; `float("inf")`: never. Defaults to
                `pipe.config.semantic_threshold`.
            latest_start (`float`): In [0, 1]: the share of the steps after which guidance starts whatever the
                similarity, unless `semantic_threshold` is infinite. 1: never.
            update_interval (`int`): Gate and inner loop work at every so many denoising steps, starting with the
                first; at those in between, images with an open gate take their tokens as they are, for the price of a
                plain step. Beyond 1, an image that needs no inner step at an update keeps its tokens for good.
            max_inner_steps (`int`): Steps of Adam per denoising step at most; the best of the tokens seen is kept. 0:
                tokens stay as they start.
            max_inner_batch (`int`): At most so many images share a pass of the inner loop, which bounds its memory;
                all of them by default.
            loss_threshold (`float`): The inner loop of an image ends when its loss falls below; for a mixture, when it
                is less than this above the least that its weights allow, their entropy. A target's probability p is a
                loss of -log(p).
            emotion_learning_rate (`float`): Falls as `lr * (1 - i / 100)` with the index i of the denoising step.
            inherent_weight (`float`): lambda_1, away from what the image evokes by itself.
            similar_weight (`float`): lambda_2, away from the target's similar emotions.
            degraded_copies (`int`): If positive, the classifier sees so many copies of each preview in its place,
                each a little moved, blurred, recoloured and noisy, and the loss is of their mean log-probabilities:
                an emotion that this classifier alone sees does not survive that. All images are degraded alike, anew
                for each evaluation. Beyond the first, each copy costs a pass of the classifier.
            preview_scale (`float`): In (0, 1]: the size at which previews are decoded for gate and classifier; 0.5
                halves both sides.

        Returns:
            [`MusePipelineOutput`] or [`MuseXLPipelineOutput`]; with `return_dict=False` a tuple: the parent's, and
            with `emotion` or `image` also `emotion_tokens` and `trace`.

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
        # 1. Check everything before any work is done
        settings, stock = self._take_settings(preset, kwargs), self._stock_arguments(args, kwargs)
        if image is None:
            refuse("without an `image`", mask_image=mask_image)
        if emotion is None:
            refuse("without an `emotion`", emotion_prompts=emotion_prompts, emotion_tokens=emotion_tokens)
        if emotion is None and image is None:
            output = super().__call__(**vars(self._with_callback(stock)))
            return self._output_class(**vars(output)) if stock.return_dict else output
        wish = edit = guide = region = None
        if emotion is not None:
            wish = self._resolve_wish(stock, settings, emotion, emotion_prompts, similar_emotions, semantic_prompt)
            tokens = self._resolve_tokens(stock, wish, preset, emotion_tokens)
        if image is not None:
            edit = self._resolve_edit(stock, image, mask_image, strength)
        self._check_stock(stock, edit)

        with frozen(*self._guidance_chain):
            # 2. An edit starts from the noise that its source is inverted to
            if edit is not None:
                region = self._start_edit(stock, edit)
            # 3. The parent's own call, with the guide at its UNet: see `Guide` for WHEN, HOW and WHICH
            if wish is not None:
                guide = self._make_guide(stock, wish, tokens)
            arguments = vars(self._with_callback(stock, guide, region))
            tensors = {"output_type": "latent" if stock.output_type == "latent" else "pt", "return_dict": True}
            with self._path(edit), self._guided(guide, region):
                output = super().__call__(**{**arguments, **tensors})
        return self._output(output, stock, guide)

    # ---- arguments -------------------------------------------------------------------------------------------------

    def _take_settings(self, preset: str, kwargs: dict[str, Any]) -> GuidanceSettings:
        """Takes the settings out of `kwargs`; those that are not given are the preset's, or the checkpoint's own."""
        check_choice("preset", preset, list(self.presets))
        for name in GONE.keys() & kwargs.keys():
            raise TypeError(f"`{name}` is gone; use {GONE[name]}.")
        names = [part.name for part in fields(GuidanceSettings)]
        given = {name: value for name in names if (value := kwargs.pop(name, None)) is not None}
        preset_settings = {name: value for name, value in self.presets[preset].items() if name in names}
        return GuidanceSettings(**{"semantic_threshold": self.config.semantic_threshold, **preset_settings, **given})

    def _stock_arguments(self, args: tuple, kwargs: dict[str, Any]) -> SimpleNamespace:
        """The parent's arguments by attribute, its defaults included; raises a `TypeError` for any others."""
        signature = inspect.signature(super().__call__)
        unknown = kwargs.keys() - signature.parameters.keys() - {"callback", "callback_steps"}
        if unknown:
            raise TypeError(f"{type(self).__name__} does not know the arguments {sorted(unknown)}.")
        bound = signature.bind(*args, **kwargs)
        bound.apply_defaults()
        deprecated = bound.arguments.pop("kwargs", {})
        return SimpleNamespace(**bound.arguments, **deprecated)

    def _resolve_wish(
        self,
        stock: SimpleNamespace,
        settings: GuidanceSettings,
        emotion: Emotion | list[Emotion],
        emotion_prompts: Mapping[str, str | list[str]] | None,
        similar_emotions: str | list[str] | Mapping[str, list[str]] | None,
        semantic_prompt: str | list[str] | None,
    ) -> Wish:
        """Checks what to evoke; where there are only emotions, the prompts become "an image of {emotion}"."""
        has_prompt = stock.prompt is not None or stock.prompt_embeds is not None
        if not has_prompt and semantic_prompt is None and settings.semantic_threshold < math.inf:
            settings = replace(settings, semantic_threshold=0)  # there is no content to wait for
        is_list = isinstance(emotion, (list, tuple))
        entries: list[Any] = list(emotion) if is_list else [emotion]
        if emotion_prompts is None and self.clip_model is not None:
            words = other_words(entries, self.emotion_labels)
            if words or self.emotion_classifier is None:
                neutral = ["neutral"] if words and match_label("neutral", words) is None else []
                emotion_prompts = emotion_templates([*self.emotion_labels, *words, *neutral])
        table = None if emotion_prompts is None else check_prompt_table("emotion_prompts", emotion_prompts)
        self._check_guidance(settings, is_zero_shot=table is not None or self.emotion_classifier is None)
        labels = self.emotion_labels if table is None else list(table)
        targets = [normalize_emotion(entry, labels) for entry in entries]
        if not has_prompt:
            if not targets or not all(targets):
                raise ValueError("`prompt` has to be given where `emotion` is None.")
            prompts = [f"an image of {' and '.join(target)}" for target in targets]
            stock.prompt = prompts if is_list else prompts[0]
        count = self._count_prompts(stock)
        if is_list and len(targets) != count:
            raise ValueError(f"`emotion` has {len(targets)} entries for {count} prompts; give one for each.")
        targets = targets if is_list else targets * count

        texts = stock.prompt if semantic_prompt is None else semantic_prompt
        if texts is None and 0 < settings.semantic_threshold < math.inf:
            raise ValueError("`semantic_prompt` has to be given with `prompt_embeds`, or `semantic_threshold=0`.")
        name = "prompt" if semantic_prompt is None else "semantic_prompt"
        texts = None if texts is None else check_texts(name, texts, count)
        asks_clip = self.clip_model is not None and settings.semantic_threshold > 0
        check_similar(similar_emotions, labels)
        similar = [similar_weights(similar_emotions, target, labels) for target in targets]
        return Wish(labels, targets, similar, table, texts if asks_clip else None, settings)

    def _resolve_tokens(
        self, stock: SimpleNamespace, wish: Wish, preset: str, emotion_tokens: TokenStart | None
    ) -> TokenStart:
        """Where S starts, by the preset unless it is given, checked for every image."""
        if emotion_tokens is None:
            return self.presets[preset]["emotion_tokens"]
        width = self._token_width
        if isinstance(emotion_tokens, Mapping):
            shape = (None, width)
            for label in sorted({label for target in wish.targets for label in target}):
                if label not in emotion_tokens:
                    raise ValueError(f"`emotion_tokens` has no tokens of {label!r}, only of {list(emotion_tokens)}.")
                check_tensor("emotion_tokens", emotion_tokens[label], *shape)
                shape = emotion_tokens[label].shape  # all alike
        elif isinstance(emotion_tokens, Tensor):
            batch_size = len(wish.targets) * stock.num_images_per_prompt
            rows = [] if emotion_tokens.ndim == 2 else [1 if emotion_tokens.shape[:1] == (1,) else batch_size]
            check_tensor("emotion_tokens", emotion_tokens, *rows, None, width)
        else:
            check_choice("emotion_tokens", emotion_tokens, TOKEN_STARTS)
        return emotion_tokens

    def _resolve_edit(
        self, stock: SimpleNamespace, image: PipelineImageInput, mask_image: PipelineImageInput | None, strength: float
    ) -> Edit:
        """Checks what to edit, and settles the size of the result."""
        refuse("with an `image`: an edit walks DDIM's own path", timesteps=stock.timesteps, sigmas=stock.sigmas)
        refuse("with an `image`: an edit is whole", denoising_end=getattr(stock, "denoising_end", None))
        most = self.scheduler.config.num_train_timesteps - self.scheduler.config.get("steps_offset", 0)
        check_number("num_inference_steps", stock.num_inference_steps, 1, most, integer=True)
        check_number("strength", strength, above=0, high=1)
        steps = round(strength * stock.num_inference_steps)
        if steps < 1:
            raise ValueError(f"`strength` {strength} leaves none of {stock.num_inference_steps} steps to walk.")
        count = self._count_prompts(stock)
        image = check_pictures("image", image, count, channels=3)
        mask = None if mask_image is None else check_pictures("mask_image", mask_image, count, channels=1)
        sizes = {one.size for one in image} if isinstance(image, list) else {tuple(image.shape[:1:-1])}
        if not (stock.height and stock.width):
            if len(sizes) > 1:
                raise ValueError(f"`image` holds pictures of sizes {sorted(sizes)}; give `height` and `width`.")
            native_height, native_width = self._native_size()
            width, height = sizes.pop()
            new = {"new_width": stock.width, "new_height": stock.height}
            stock.width, stock.height = fit_size(width, height, native_height * native_width, **new)
        return Edit(image, mask, steps)

    def _count_prompts(self, stock: SimpleNamespace) -> int:
        if stock.prompt is None and stock.prompt_embeds is None:
            raise ValueError("`prompt` has to be given: the caption of `image`.")
        if stock.prompt is None:
            check_tensor("prompt_embeds", stock.prompt_embeds, None, None, self._token_width)
            return stock.prompt_embeds.shape[0]
        return len(stock.prompt) if isinstance(stock.prompt, list) else 1

    def _check_guidance(self, settings: GuidanceSettings, is_zero_shot: bool) -> None:
        """Raises a `ValueError` that says what is missing for guidance."""
        asks = 0 < settings.semantic_threshold < math.inf and settings.latest_start == 1
        if is_zero_shot and self.clip_model is None:
            hint = "call `pipe.load_emotion_classifier(model_or_id)`, or load the pipeline with `clip_model=`"
            raise ValueError(f"`emotion` needs an `emotion_classifier`, or a `clip_model` in its place: {hint}.")
        if asks and self.clip_model is None:
            hint = "load the pipeline with `clip_model=`, or pass `semantic_threshold=0` to guide from the first step"
            raise ValueError(f"`semantic_threshold` {settings.semantic_threshold} needs a `clip_model`: {hint}.")
        if not is_zero_shot:
            check_classifier(self.emotion_classifier)
        if settings.max_inner_steps > 0 and torch.is_inference_mode_enabled():
            raise ValueError(
                "`emotion` needs gradients, which `torch.inference_mode()` forbids; use `torch.no_grad()`."
            )
        judge = self.clip_model if is_zero_shot else self.emotion_classifier
        for module in (self.unet, self._preview_decoder, judge) if settings.max_inner_steps > 0 else ():
            check_differentiable(module)

    def _check_stock(self, stock: SimpleNamespace, edit: Edit | None) -> None:
        """Raises for what the parent finds too late, deep in some network, or not at all."""
        check_number("num_inference_steps", stock.num_inference_steps, 1, integer=True)
        check_number("num_images_per_prompt", stock.num_images_per_prompt, 1, integer=True)
        check_choice("output_type", stock.output_type, OUTPUT_TYPES)
        batch_size = self._count_prompts(stock) * stock.num_images_per_prompt
        for name, shape in self._embeds_shapes.items():
            if getattr(stock, name) is not None:
                check_tensor(name, getattr(stock, name), *shape)
        if isinstance(stock.generator, list) and len(stock.generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(stock.generator)} for {batch_size} images.")
        height, width = self._native_size()
        if stock.height or stock.width:  # of which upstream would drop one that is given alone
            stock.height, stock.width = height, width = stock.height or height, stock.width or width
        if stock.latents is not None:
            sides = [side // self.vae_scale_factor for side in (height, width)] if edit else [None, None]
            check_tensor("latents", stock.latents, batch_size, self.unet.config.in_channels, *sides)
        names = {**vars(stock), "height": height, "width": width, "callback_steps": None}
        names["callback_on_step_end_tensor_inputs"] = self._callback_names(stock)
        self.check_inputs(**accepted_arguments(self.check_inputs, **names))
        check_schedule(self.scheduler)
        if edit is None:
            schedule = (stock.num_inference_steps, "cpu", stock.timesteps, stock.sigmas)
            check_preview(self.scheduler, retrieve_timesteps(self.scheduler, *schedule)[0])

    # ---- editing ---------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def invert(
        self,
        image: PipelineImageInput,
        prompt: str | list[str] | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        strength: float = 1.0,
        **kwargs: Any,
    ) -> Tensor:
        """
        DDIM inversion at guidance 1: the noise from which deterministic DDIM with the same prompt finds `image` again.

        Args:
            image (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a list of them): One source, or one per prompt.
                Arrays are uint8 or in [0, 1], tensors of shape `(3, H, W)` or `(n, 3, H, W)` in [0, 1].
            prompt (`str` or `list[str]`, *optional*, defaults to ""): The source's caption.
            height, width (`int`, *optional*): Multiples of 8 in pixels; default to the source's aspect ratio at the
                checkpoint's native area.
            num_inference_steps (`int`, defaults to 50): Steps of the full path.
            strength (`float`, defaults to 1.0): In (0, 1]: the share of the path that is walked.
            kwargs: Other arguments of the parent's call, such as `prompt_embeds` in place of `prompt`.

        Returns:
            `torch.Tensor` of shape `(batch_size, channels, h, w)`: Latents to pass on as `latents=` together with
            `image=`, so that several emotions share one inversion.

        Raises:
            TypeError, ValueError: For an image that is not one, a `strength` outside (0, 1], or a bad size.
        """
        if prompt is None and kwargs.get("prompt_embeds") is None:
            prompt = ""
        own = {"height": height, "width": width, "num_inference_steps": num_inference_steps}
        stock = self._stock_arguments((), {"prompt": prompt, **own, **kwargs})
        edit = self._resolve_edit(stock, image, None, strength)
        self._check_stock(stock, edit)
        with frozen(self.unet, self.vae):
            return self._invert(stock, edit)[-1]

    def _invert(self, stock: SimpleNamespace, edit: Edit) -> list[Tensor]:
        """The latents `(B, channels, h, w)` on the way from source to noise: the parent's call at guidance 1."""
        path = [self._encode_image(stock, edit.image)]

        def note(pipe, step, timestep, values):
            path.append(values["latents"])
            return {}

        adapters = stock.ip_adapter_image_embeds
        if adapters is not None and stock.guidance_scale > 1:  # without guidance there are no rows of the null image
            adapters = [embeds.chunk(2)[1] for embeds in adapters]
        names = ("negative_prompt", "negative_prompt_2", "negative_prompt_embeds", "negative_pooled_prompt_embeds")
        alone: dict[str, Any] = {name: None for name in names if hasattr(stock, name)}
        alone |= {"guidance_scale": 1.0, "eta": 0.0, "ip_adapter_image_embeds": adapters, "output_type": "latent"}
        alone |= {"callback_on_step_end": note, "callback_on_step_end_tensor_inputs": ["latents"], "return_dict": True}
        with self._path(edit, inverse=True):
            super().__call__(**{**vars(stock), **alone, "latents": path[0]})
        return path

    def _start_edit(self, stock: SimpleNamespace, edit: Edit) -> SourceRegion | None:
        """Sets the latents that an edit starts from, and returns what its mask protects, if there is one."""
        if stock.latents is not None and edit.mask is None:
            return None
        path = self._invert(stock, edit)
        stock.latents = path[-1] if stock.latents is None else stock.latents.to(path[-1])
        return None if edit.mask is None else SourceRegion(self._encode_mask(edit.mask, path[0], stock), path)

    @contextmanager
    def _path(self, edit: Edit | None, inverse: bool = False) -> Iterator[None]:
        """Deterministic DDIM on this checkpoint's noise schedule in place of the scheduler, as far as an edit goes."""
        scheduler: Any = self.scheduler
        try:
            if edit is not None:
                self.scheduler = editing_scheduler(scheduler, edit.steps, inverse)
            yield
        finally:
            self.scheduler = scheduler

    # ---- the parent's call with a guide at its UNet ----------------------------------------------------------------

    def _make_guide(self, stock: SimpleNamespace, wish: Wish, tokens: TokenStart) -> Guide:
        """The guide of a call, one image per row: upstream lays several images of one prompt out side by side."""
        device, times = self._execution_device, stock.num_images_per_prompt
        targets, similar = repeat_each(wish.targets, times), repeat_each(wish.similar, times)
        images = [GuidedImage(wish.labels, *pair, device) for pair in zip(targets, similar)]
        texts = wish.semantic_prompts and self._tokenize(repeat_each(wish.semantic_prompts, times))

        def similarity(previews: Tensor, samples: list[int]) -> Tensor:
            return clip_similarity(self.clip_model, previews, take_rows(texts, samples))

        classify = self._zero_shot_classifier(wish.emotion_prompts) if wish.emotion_prompts else self._classify
        start = self._token_start(stock, targets, tokens)
        return Guide(images, wish.settings, classify, similarity if texts else None, start)

    def _token_start(
        self, stock: SimpleNamespace, targets: list[dict[str, float]], tokens: TokenStart
    ) -> Callable[[Tensor], Tensor]:
        """Where S starts, given the prompts' embeddings: see `emotion_tokens`."""
        labels = sorted({label for target in targets for label in target})
        if not (labels or isinstance(tokens, Tensor)):
            tokens = "random"
        if isinstance(tokens, str) and tokens == "emotion":
            words = {label: self._emotion_word(label, stock.clip_skip) for label in labels}

        def start(prompt_embeds: Tensor) -> Tensor:
            embeds = prompt_embeds.float()
            if isinstance(tokens, Mapping):
                return mean_of_labels({label: tokens[label].to(embeds) for label in labels}, targets)
            if isinstance(tokens, Tensor):
                return tokens.to(embeds).expand(len(targets), -1, -1)
            shape = (len(targets), NUM_EMOTION_TOKENS, embeds.shape[-1])
            noise = randn_tensor(shape, generator=fork_generator(stock.generator), device=embeds.device)
            noise = embeds.std(dim=(1, 2), keepdim=True) * noise
            return noise if tokens == "random" else mean_of_labels(words, targets)[:, None] + START_JITTER * noise

        return start

    @contextmanager
    def _guided(self, guide: Guide | None, region: SourceRegion | None) -> Iterator[None]:
        """While the parent's call runs in here, the UNet answers it with the noise that `guide` decides on."""
        if guide is None:
            yield
            return
        thread = threading.get_ident()

        def asks() -> bool:
            """Whether it is the parent: not the guide, a callback, or another thread that shares the network."""
            return not guide.is_busy and threading.get_ident() == thread

        @torch.compiler.disable
        def before(unet, asked, conditions=None):
            if asks() and guide.all_rest:
                return asked, append_tokens(conditions, guide.tokens)

        @torch.compiler.disable
        def after(unet, asked, *rest):
            if not asks():  # torch may give less to a hook that is removed while another thread's call is under way
                return None
            conditions, answer = rest
            if not guide.all_rest:
                step = DenoisingStep(self, asked, conditions, answer[0], len(guide.images), region)
                step.preview_scale = guide.settings.preview_scale
                with guide.at_work(), self._upcast(self._preview_decoder):
                    answer = (step.with_noise(guide(step)), *answer[1:])
            guide.index += 1
            return answer

        with _lock:  # torch numbers hooks without one, and one of the same number takes another's place
            hooks = [self.unet.register_forward_pre_hook(before, with_kwargs=True)]
            hooks.append(self.unet.register_forward_hook(after, with_kwargs=True))
        try:
            yield
        finally:
            with _lock:
                for hook in hooks:
                    hook.remove()

    def _with_callback(
        self, stock: SimpleNamespace, guide: Guide | None = None, region: SourceRegion | None = None
    ) -> SimpleNamespace:
        """
        The parent's arguments with MUSE's part at the end of each step: the source returns outside of the mask, the
        caller's callback sees S and may replace it, and the progress bar tells the state of the loop.
        """
        callback, names = stock.callback_on_step_end, self._callback_names(stock)
        theirs = [name for name in names if name != "emotion_tokens"]
        if guide is None and region is None and theirs == names:
            return SimpleNamespace(**vars(stock))

        def on_step_end(pipe, step, timestep, values):
            if region is not None:
                values = {**values, "latents": region.restore(values["latents"], pipe.num_timesteps - 1 - step)}
            returned = {"latents": values["latents"]}
            if callback is not None:
                seen = {**values, "emotion_tokens": None if guide is None else guide.tokens}
                with nullcontext() if guide is None else guide.at_work():
                    returned |= callback(pipe, step, timestep, {name: seen[name] for name in names})
            tokens = returned.pop("emotion_tokens", None)
            if guide is not None:
                guide.tokens = guide.tokens if tokens is None else tokens
                self._bar.set_postfix(guide.summary(), refresh=False)
            return returned

        ours = {"callback_on_step_end": on_step_end, "callback_on_step_end_tensor_inputs": ["latents", *theirs]}
        return SimpleNamespace(**{**vars(stock), **ours})

    @staticmethod
    def _callback_names(stock: SimpleNamespace) -> list[str]:
        """The tensors that the caller's callback wants; upstream's classes of callbacks say so themselves."""
        return list(getattr(stock.callback_on_step_end, "tensor_inputs", stock.callback_on_step_end_tensor_inputs))

    def progress_bar(self, iterable: Iterable | None = None, total: int | None = None) -> Any:
        """As upstream; it shows the state of the loop, and of an edit the steps that are walked."""
        steps = getattr(self.scheduler, "steps", None)
        self._bar = super().progress_bar(iterable, total if total is None or steps is None else steps)
        return self._bar

    def _output(self, output: Any, stock: SimpleNamespace, guide: Guide | None) -> Any:
        """The parent's output, checked and in the form that the caller wants, with what the guide knows."""
        check_finite("latents" if stock.output_type == "latent" else "images", output.images)
        if stock.output_type in ("pil", "np"):
            as_they_are = [False] * len(output.images)  # in [0, 1], as the parent made them
            output.images = self.image_processor.postprocess(output.images, stock.output_type, as_they_are)
        traces = None if guide is None else [image.trace for image in guide.images]
        if traces and math.isfinite(guide.settings.semantic_threshold):
            warn_of_gates(traces, guide.settings.semantic_threshold)
        tokens = None if guide is None else guide.tokens
        output = self._output_class(**vars(output), emotion_tokens=tokens, trace=traces)
        return output if stock.return_dict else tuple(getattr(output, part.name) for part in fields(output))

    # ---- networks --------------------------------------------------------------------------------------------------

    @property
    def _guidance_chain(self) -> list[torch.nn.Module]:
        """The modules that work in the loop."""
        modules = (self.unet, self.vae, self.preview_vae, self.clip_model, self.emotion_classifier)
        return [module for module in modules if module is not None]

    @property
    def _token_width(self) -> int:
        """D, of prompt embeddings and tokens."""
        return self.unet.config.cross_attention_dim

    @property
    def _preview_decoder(self) -> AutoencoderKL | AutoencoderTiny:
        return self.vae if self.preview_vae is None else self.preview_vae

    def _decode_preview(self, latents: Tensor) -> Tensor:
        """Pixels in about [-1, 1], through `preview_vae` if there is one; differentiable."""
        vae = self._preview_decoder
        return vae.decode(self._unscale_latents(latents, vae).to(vae.dtype), return_dict=False)[0]

    def _native_size(self) -> tuple[int, int]:
        """Height and width in pixels that the network was trained for."""
        size = self.unet.config.sample_size
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.vae_scale_factor, width * self.vae_scale_factor

    def _encode_image(self, stock: SimpleNamespace, images: Pictures) -> Tensor:
        """Latents of the sources, shape `(B, channels, h, w)`: the mode of the posterior, so no noise."""
        pixels = self.image_processor.preprocess(images, height=stock.height, width=stock.width)
        with self._upcast(self.vae):
            pixels = pixels.to(self._execution_device, self.vae.dtype)
            latents = self._scale_latents(self.vae.encode(pixels).latent_dist.mode())
        batch_size = self._count_prompts(stock) * stock.num_images_per_prompt
        return latents.repeat_interleave(batch_size // latents.shape[0], dim=0).to(self.unet.dtype)

    def _encode_mask(self, mask: Pictures, latents: Tensor, stock: SimpleNamespace) -> Tensor:
        """The mask at the size of `latents`, shape `(B, 1, h, w)`, in [0, 1]; soft where it cuts a cell."""
        processor = VaeImageProcessor(self.vae_scale_factor, do_normalize=False, do_convert_grayscale=True)
        pixels = processor.preprocess(mask, height=stock.height, width=stock.width).to(latents)  # (n, 1, H, W)
        cells = F.interpolate(pixels, latents.shape[-2:], mode="area")
        return cells.repeat_interleave(latents.shape[0] // cells.shape[0], dim=0)

    def _tokenize(self, prompts: list[str]) -> dict[str, Tensor]:
        """Texts as CLIP's text tower wants them, which knows nothing of the words of textual inversions."""
        config = self.clip_model.config.text_config
        added = [word for word, index in self.tokenizer.get_added_vocab().items() if index >= config.vocab_size]
        for word in sorted(added, key=len, reverse=True):
            prompts = [prompt.replace(word, "") for prompt in prompts]
        length = min(self.tokenizer.model_max_length, config.max_position_embeddings)
        tokens = self.tokenizer(
            prompts, padding="max_length", truncation=True, max_length=length, return_tensors="pt"
        ).to(self._execution_device)
        return {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}

    def _emotion_word(self, label: str, clip_skip: int | None) -> Tensor:
        """The mean hidden state, shape `(D,)`, of a label's own tokens in "an image of {label}"."""
        states = self.encode_prompt(
            prompt=f"an image of {label}",
            device=self._execution_device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
        )[0]
        first = 1 + len(self.tokenizer("an image of", add_special_tokens=False).input_ids)
        length = len(self.tokenizer(label, add_special_tokens=False).input_ids)
        return states[0, first : first + length].float().mean(dim=0)

    def _classify(self, image: Tensor) -> Tensor:
        """Logits, shape `(n, num_labels)`, float32, of pixels in [-1, 1]; differentiable."""
        pixels = PixelSpec.from_classifier(self.emotion_classifier).prepare(image)
        logits = self.emotion_classifier(pixel_values=pixels.to(self.emotion_classifier.dtype)).logits.float()
        if not torch.is_grad_enabled() and (logits >= 0).all() and (logits.sum(dim=-1) - 1).abs().max() < 1e-3:
            raise ValueError(
                "`emotion_classifier` has to return logits, but returns probabilities: take its softmax off."
            )
        return logits

    def _zero_shot_classifier(self, emotion_prompts: Mapping[str, list[str]]) -> Callable[[Tensor], Tensor]:
        """
        `_classify` by CLIP alone: logits are the scaled cosines of the image with the mean feature of each emotion's
        prompts, taken on the unit sphere.
        """
        blank = torch.zeros(1, 3, 8, 8, device=self._execution_device)  # CLIP's forward wants an image and a text
        text_inputs = [self._tokenize(prompts) for prompts in emotion_prompts.values()]
        features = [clip_features(self.clip_model, blank, inputs)[1].mean(dim=0) for inputs in text_inputs]
        emotion_features = F.normalize(torch.stack(features), dim=-1)  # (C, projection_dim)
        alike = ((emotion_features @ emotion_features.T) > 0.9999).triu(diagonal=1).nonzero().tolist()
        if alike:
            pair = [list(emotion_prompts)[index] for index in alike[0]]
            raise ValueError(
                f"`emotion_prompts` of {pair[0]!r} and {pair[1]!r} read alike to CLIP, which can't tell them."
            )
        text = {name: value[:1] for name, value in text_inputs[0].items()}
        scale = self.clip_model.logit_scale.float().exp()
        return lambda image: scale * clip_features(self.clip_model, image, text)[0] @ emotion_features.T

    # ---- loading and saving ----------------------------------------------------------------------------------------

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "MuseMixin":
        """
        As upstream; the components that only MUSE has are `None` where neither `pipeline` nor `kwargs` has them.
        Modules keep their dtypes, as `pipeline` shares them, unless a `dtype` is given.
        """
        ours = {name: None for name in MUSE_COMPONENTS if name not in pipeline.components}
        known = inspect.signature(cls.__init__).parameters
        lost = [name for name, part in pipeline.components.items() if part is not None and name not in known]
        if lost:
            logger.warning(f"{cls.__name__} has no place for {lost} of {type(pipeline).__name__}, and goes without.")
        if kwargs.keys() & {"dtype", "torch_dtype"}:
            return super().from_pipe(pipeline, **ours | kwargs)
        return super().from_pipe(pipeline, **ours | {DTYPE_ARGUMENT: KEEP_DTYPES} | kwargs)

    def to(self, *args: Any, **kwargs: Any) -> "MuseMixin":
        """As upstream, which knows no way to leave dtypes alone in `from_pipe`."""
        return self if kwargs.get("dtype") is KEEP_DTYPES else super().to(*args, **kwargs)

    def _add_components(
        self,
        clip_model: CLIPModel | None,
        emotion_classifier: PreTrainedModel | None,
        preview_vae: AutoencoderTiny | None,
        semantic_threshold: float,
    ) -> None:
        """What `__init__` does after the parent's."""
        if self.unet is not None and self.vae is not None:
            check_channels(self.unet, self.vae)
        self.register_modules(clip_model=clip_model, emotion_classifier=emotion_classifier, preview_vae=preview_vae)
        self.register_to_config(semantic_threshold=semantic_threshold)

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
        source = {"revision": revision or "main", "trust_remote_code": trust_remote_code}
        model: Any = classifier
        if isinstance(classifier, (str, os.PathLike)):
            model = AutoModelForImageClassification.from_pretrained(classifier, dtype=self.dtype, **source).eval()
            if image_processor is None and not all(hasattr(model.config, name) for name in PIXEL_SETTINGS):
                image_processor = AutoImageProcessor.from_pretrained(classifier, **source)
        elif not isinstance(classifier, PreTrainedModel):
            raise TypeError(f"`classifier` has to be a PreTrainedModel, an id or a folder, but is {type(classifier)}.")
        elif revision is not None or trust_remote_code:
            raise ValueError("`revision` and `trust_remote_code` are for an id or a folder, not for a loaded model.")
        if image_processor is not None:
            PixelSpec.from_processor(image_processor).write_to(model)
        check_classifier(model)
        self.register_modules(emotion_classifier=model.to(self._execution_device))

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

    def save_config(self, save_directory: str | os.PathLike, push_to_hub: bool = False, **kwargs: Any) -> None:
        """Saves the index as upstream does, and beside it this file, if that was loaded from a checkpoint's code."""
        if is_dynamic(type(self).__module__):
            Path(save_directory).mkdir(parents=True, exist_ok=True)
            Path(save_directory, Path(__file__).name).write_bytes(self._source)
        super().save_config(save_directory, push_to_hub, **kwargs)

    # ---- checks --------------------------------------------------------------------------------------------------


# ---- End of the same ----


# --------------------------------------------------------------------------------------
# Stable Diffusion 1.x and 2.x
# --------------------------------------------------------------------------------------


@dataclass
class MusePipelineOutput(StableDiffusionPipelineOutput):
    """
    Output of [`MusePipeline`].

    Args:
        images (`list[PIL.Image.Image]`, `np.ndarray` or `torch.Tensor`): As upstream.
        nsfw_content_detected (`list[bool]`, *optional*): As upstream.
        emotion_tokens (`torch.Tensor` of shape `(batch_size, n, embedding_dim)`, *optional*): The optimised tokens,
            float32; pass them as `emotion_tokens=` to start from them. `None` without an emotion.
        trace (`list[MuseTrace]`, *optional*): One per image. `None` without an emotion.
    """

    emotion_tokens: Tensor | None = None
    trace: list[MuseTrace] | None = None


class MusePipeline(MuseMixin, StableDiffusionPipeline):
    """
    Text-to-image generation and photo editing that evoke an emotion, with Stable Diffusion 1.x and 2.x.

    Derives from [`StableDiffusionPipeline`] and does exactly what it does unless `emotion` or `image` is given.
    Components as upstream, plus three optional ones and one setting:

    Args:
        clip_model (`CLIPModel`): Opens the semantic gate; reads the prompt through the pipeline's own tokenizer.
            `None` is fine while `semantic_threshold` is 0 or infinite.
        emotion_classifier (`PreTrainedModel`): Pixels in, logits out, names in `config.id2label`; `image_size`,
            `image_mean` and `image_std` in its config. Where it is `None`, `clip_model` serves, zero-shot.
        preview_vae (`AutoencoderTiny`): Decodes previews and the guidance image in place of `vae`. May be `None`.
        semantic_threshold (`float`, defaults to 18.0): The gate's threshold for this checkpoint's CLIP, in units of
            `clip_model.logit_scale.exp() * cos`. 18 is the paper's, for OpenAI's ViT-L/14.
    """

    # Guidance sends gradients back through unet, vae and classifier: whatever comes after the unet has to stay put,
    # so the chain of modules that push each other out ends there.
    model_cpu_offload_seq = "text_encoder->image_encoder->unet"
    _optional_components = StableDiffusionPipeline._optional_components + MUSE_COMPONENTS
    _callback_tensor_inputs = StableDiffusionPipeline._callback_tensor_inputs + ["emotion_tokens"]
    _output_class = MusePipelineOutput
    presets = read_only(
        {
            "paper": {"emotion_tokens": "random"},
            # From the emotion's word, by larger steps, and none where the emotion is already there
            "full": {
                "emotion_tokens": "emotion",
                "max_inner_steps": 5,
                "emotion_learning_rate": 0.05,
                "loss_threshold": 0.1,
                "latest_start": 0.2,
                "degraded_copies": 2,
            },
            # Up to two larger steps at every 2nd denoising step, until none is needed
            "fast": {
                "emotion_tokens": "emotion",
                "update_interval": 2,
                "max_inner_steps": 2,
                "emotion_learning_rate": 0.2,
                "loss_threshold": 0.1,
                "latest_start": 0.2,
                "degraded_copies": 2,
            },
        }
    )

    __call__ = passes_on(StableDiffusionPipeline.__call__)(MuseMixin.__call__)

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection = None,
        requires_safety_checker: bool = True,
        *,
        clip_model: CLIPModel,
        emotion_classifier: PreTrainedModel,
        preview_vae: AutoencoderTiny,
        semantic_threshold: float = 18.0,
    ):
        super().__init__(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            safety_checker=safety_checker,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            requires_safety_checker=requires_safety_checker,
        )
        self._add_components(clip_model, emotion_classifier, preview_vae, semantic_threshold)

    @property
    def _embeds_shapes(self) -> dict[str, tuple[int | None, ...]]:
        """Arguments that hold embeddings, and their shapes."""
        return dict.fromkeys(("prompt_embeds", "negative_prompt_embeds"), (None, None, self._token_width))

    def _upcast(self, vae: AutoencoderKL | AutoencoderTiny) -> AbstractContextManager:
        """How a VAE has to stand while it works: as it is."""
        return nullcontext()

    def _scale_latents(self, latents: Tensor) -> Tensor:
        """The VAE's latents as the network sees them."""
        return latents * self.vae.config.scaling_factor

    def _unscale_latents(self, latents: Tensor, vae: AutoencoderKL | AutoencoderTiny) -> Tensor:
        """The network's latents as `vae` decodes them."""
        return latents / vae.config.scaling_factor
