# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""SimEmo: an emotion classifier on a CLIP vision tower, the guide of MUSE (https://huggingface.co/papers/2511.21051).

One class covers the classifiers that the paper names; they differ in configuration only:

| classifier | `vision_config` | `head_hidden_sizes` | `head_bias` | `normalize_features` | `logit_scale` |
|---|---|---|---|---|---|
| SimEmo | ViT-L/14 (the default) | `[2048]` | `True` | `False` | `None` |
| EmoGen's | ViT-L/14 | `[]` | `True` | `False` | `None` |
| EmoEdit's metric | ViT-B/32 | `[256]` | `True` | `False` | `None` |
| zero-shot CLIP | any | `[]` | `False` | `True` | `100.0` |

The rows of the zero-shot head, `classifier[0].weight`, are normalised text features, one per emotion.

The file stands alone: diffusers loads it as the component `["modeling_simemo", "SimEmoForImageClassification"]` of a
pipeline, transformers as remote code by `AutoModelForImageClassification`.
"""

import copy
import itertools
import math

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoModelForImageClassification,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.modeling_outputs import ImageClassifierOutput


# The class order of EmoSet, and of the checkpoints of EmoGen and EmoEdit.
EMOSET_LABELS = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")

# OpenAI's CLIP ViT-L/14.
VIT_L_14 = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "image_size": 224,
    "projection_dim": 768,
}


def _positive_int(name: str, value: object) -> int:
    """Returns `value` if it is a positive integer, else raises a `ValueError` that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")
    return value


def _channel_values(name: str, values: object, num_channels: int) -> list[float]:
    """Returns `values` as one finite float per image channel, else raises a `ValueError` that names it."""
    if not isinstance(values, (list, tuple)) or len(values) != num_channels:
        raise ValueError(f"`{name}` must be a list of {num_channels} numbers, one per channel, got {values!r}.")
    if not all(isinstance(value, (int, float)) and math.isfinite(value) for value in values):
        raise ValueError(f"`{name}` must hold finite numbers, got {values!r}.")
    return [float(value) for value in values]


def _label_maps(id2label: dict | None, label2id: dict | None) -> tuple[dict[int, str], dict[str, int]]:
    """Returns both label maps, completing the missing one; a `ValueError` says where they are not one numbering."""
    if id2label is None:
        names = label2id or {label: index for index, label in enumerate(EMOSET_LABELS)}
        id2label = {index: label for label, index in names.items()}
    id2label = {int(index): label for index, label in sorted(id2label.items(), key=lambda item: int(item[0]))}
    if not id2label or list(id2label) != list(range(len(id2label))):
        raise ValueError(f"`id2label` must number its labels from 0 without gaps, got the indices {list(id2label)}.")
    inverse = {label: index for index, label in id2label.items()}
    if len(inverse) != len(id2label):
        raise ValueError(f"`id2label` must not name a label twice, got {list(id2label.values())}.")
    if label2id is not None and label2id != inverse:
        raise ValueError(f"`label2id` must be the inverse of `id2label`, got {label2id} for {id2label}.")
    return id2label, inverse


class SimEmoConfig(PreTrainedConfig):
    r"""
    Configuration of a [`SimEmoForImageClassification`]. The defaults are those of SimEmo: CLIP ViT-L/14, its projected
    feature, one hidden layer of 2048 units, the eight emotions of Mikels in EmoSet's order.

    Args:
        vision_config (`dict` or `CLIPVisionConfig`, *optional*):
            The vision tower. Defaults to that of OpenAI's CLIP ViT-L/14.
        projection_dim (`int`, *optional*):
            Width of the projected image feature. Defaults to that of `vision_config`, and overrides it when given.
        head_hidden_sizes (`list[int]`, *optional*, defaults to `[2048]`):
            Widths of the hidden layers of the head, with a ReLU after each. An empty list makes the head linear.
        head_bias (`bool`, *optional*, defaults to `True`):
            Whether the linear layers of the head have a bias.
        normalize_features (`bool`, *optional*, defaults to `False`):
            Whether the image feature is scaled to unit length before the head.
        logit_scale (`float`, *optional*):
            Factor on the logits, 100 for zero-shot CLIP. `None` leaves them as they are.
        image_size (`int`, *optional*):
            Side of the square input in pixels. Must be that of `vision_config`, which is the default.
        image_mean (`list[float]`, *optional*):
            Per-channel mean, for pixels in [0, 1], by which inputs are normalised. Defaults to CLIP's.
        image_std (`list[float]`, *optional*):
            Per-channel standard deviation by which inputs are normalised. Defaults to CLIP's.
        id2label (`dict[int, str]`, *optional*):
            Names of the classes by index. Defaults to the eight emotions in EmoSet's order.
        label2id (`dict[str, int]`, *optional*):
            The inverse of `id2label`, from which it is derived when missing.
        kwargs:
            Passed on to `PreTrainedConfig`.

    Raises:
        ValueError: If a size is not a positive integer, a mean or a standard deviation is not one finite number per
            channel (the latter positive), `logit_scale` is not positive and finite, `image_size` contradicts
            `vision_config`, or the label maps do not number the labels from 0 without gaps and repetitions.
    """

    model_type = "simemo"
    sub_configs = {"vision_config": CLIPVisionConfig}

    def __init__(
        self,
        vision_config: dict | CLIPVisionConfig | None = None,
        projection_dim: int | None = None,
        head_hidden_sizes: list[int] | tuple[int, ...] = (2048,),
        head_bias: bool = True,
        normalize_features: bool = False,
        logit_scale: float | None = None,
        image_size: int | None = None,
        image_mean: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_MEAN),
        image_std: list[float] | tuple[float, ...] = tuple(OPENAI_CLIP_STD),
        id2label: dict[int, str] | None = None,
        label2id: dict[str, int] | None = None,
        **kwargs,
    ):
        if vision_config is None:
            vision_config = VIT_L_14
        if isinstance(vision_config, CLIPVisionConfig):
            tower = copy.deepcopy(vision_config)
        elif isinstance(vision_config, dict):
            tower = CLIPVisionConfig(**vision_config)
        else:
            raise ValueError(f"`vision_config` must be a dict or a CLIPVisionConfig, got {type(vision_config)}.")
        if projection_dim is not None:
            tower.projection_dim = _positive_int("projection_dim", projection_dim)
        if image_size is not None and image_size != tower.image_size:
            raise ValueError(f"`image_size` must be that of `vision_config`, {tower.image_size}, got {image_size!r}.")
        if not isinstance(head_hidden_sizes, (list, tuple)):
            raise ValueError(f"`head_hidden_sizes` must be a list of integers, got {head_hidden_sizes!r}.")
        if logit_scale is not None and not (isinstance(logit_scale, (int, float)) and 0 < logit_scale < math.inf):
            raise ValueError(f"`logit_scale` must be a positive finite number or None, got {logit_scale!r}.")
        image_std = _channel_values("image_std", image_std, tower.num_channels)
        if min(image_std) <= 0:
            raise ValueError(f"`image_std` must be positive, got {image_std}.")

        self.vision_config = tower
        self.projection_dim = tower.projection_dim
        self.head_hidden_sizes = [_positive_int("head_hidden_sizes", size) for size in head_hidden_sizes]
        self.head_bias = bool(head_bias)
        self.normalize_features = bool(normalize_features)
        self.logit_scale = logit_scale if logit_scale is None else float(logit_scale)
        self.image_size = tower.image_size
        self.image_mean = _channel_values("image_mean", image_mean, tower.num_channels)
        self.image_std = image_std

        num_labels = kwargs.pop("num_labels", None)
        if id2label is None and label2id is None and num_labels not in (None, len(EMOSET_LABELS)):
            id2label = {index: f"LABEL_{index}" for index in range(_positive_int("num_labels", num_labels))}
        id2label, label2id = _label_maps(id2label, label2id)
        if num_labels not in (None, len(id2label)):
            raise ValueError(f"`num_labels` is {num_labels}, but `id2label` names {len(id2label)} labels.")
        super().__init__(id2label=id2label, label2id=label2id, **kwargs)


class SimEmoForImageClassification(PreTrainedModel):
    r"""
    An emotion classifier on the projected feature of a CLIP vision tower: pixels in, logits out, names in
    `config.id2label`. The guide of MUSE (https://huggingface.co/papers/2511.21051, "SimEmo").

    The vision tower can be taken from any CLIP checkpoint, which leaves the head to be trained:
    `SimEmoForImageClassification.from_pretrained(clip_path, config=SimEmoConfig(...))`.

    Args:
        config ([`SimEmoConfig`]): The configuration.
    """

    config_class = SimEmoConfig
    base_model_prefix = "clip"
    main_input_name = "pixel_values"
    input_modalities = ("image",)
    supports_gradient_checkpointing = True
    _no_split_modules = ["CLIPVisionEmbeddings", "CLIPEncoderLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True

    def __init__(self, config: SimEmoConfig):
        super().__init__(config)
        self.clip = CLIPVisionModelWithProjection._from_config(config.vision_config)
        sizes = [config.projection_dim, *config.head_hidden_sizes, config.num_labels]
        layers: list[nn.Module] = []
        for size_in, size_out in itertools.pairwise(sizes):
            layers += [nn.Linear(size_in, size_out, bias=config.head_bias), nn.ReLU()]
        self.classifier = nn.Sequential(*layers[:-1])  # no ReLU after the logits
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.clip.get_input_embeddings()

    def forward(
        self,
        pixel_values: torch.Tensor,
        labels: torch.Tensor | None = None,
        return_dict: bool | None = None,
    ) -> ImageClassifierOutput | tuple[torch.Tensor, ...]:
        r"""
        Classifies images. Gradients reach `pixel_values`; in eval mode the result is deterministic.

        Args:
            pixel_values (`torch.Tensor` of shape `(batch, channels, image_size, image_size)`):
                Images in [0, 1], less `config.image_mean`, divided by `config.image_std`.
            labels (`torch.Tensor` of shape `(batch,)`, *optional*):
                Class indices; with them the mean cross-entropy, computed in float32, is returned as `loss`.
            return_dict (`bool`, *optional*):
                Whether to return an `ImageClassifierOutput` instead of a tuple. Defaults to that of the config.

        Returns:
            `ImageClassifierOutput` or `tuple`: `loss` (a scalar, with `labels` only) and `logits` of shape
            `(batch, num_labels)` in the dtype of the weights.

        Raises:
            ValueError: If `pixel_values` is not of the shape above, or `labels` not of shape `(batch,)`.
        """
        size = (self.config.vision_config.num_channels, self.config.image_size, self.config.image_size)
        if pixel_values.ndim != 4 or tuple(pixel_values.shape[1:]) != size:
            raise ValueError(f"`pixel_values` must be of shape (batch, *{size}), got {tuple(pixel_values.shape)}.")
        if labels is not None and labels.shape != pixel_values.shape[:1]:
            raise ValueError(
                f"`labels` must be of shape ({pixel_values.shape[0]},), one class index per image, "
                f"got {tuple(labels.shape)}."
            )

        features = self.clip(pixel_values=pixel_values, return_dict=True).image_embeds  # (batch, projection_dim)
        if self.config.normalize_features:
            # In float16 the squares underflow, and so does the epsilon.
            exact = features.to(torch.promote_types(features.dtype, torch.float32))
            features = F.normalize(exact, dim=-1).to(features.dtype)
        logits = self.classifier(features)  # (batch, num_labels)
        if self.config.logit_scale is not None:
            logits = logits * self.config.logit_scale

        loss = None if labels is None else F.cross_entropy(logits.float(), labels)
        if return_dict is None:
            return_dict = self.config.return_dict
        if not return_dict:
            return (logits,) if loss is None else (loss, logits)
        return ImageClassifierOutput(loss=loss, logits=logits)


# Loaded from a checkpoint's code it has to leave the name to the checkpoints: the code of another one, or of another
# revision, would give way to this one.
if not __name__.startswith(("diffusers_modules", "transformers_modules")):
    AutoConfig.register(SimEmoConfig.model_type, SimEmoConfig, exist_ok=True)
AutoModelForImageClassification.register(SimEmoConfig, SimEmoForImageClassification, exist_ok=True)
SimEmoConfig.register_for_auto_class()
SimEmoForImageClassification.register_for_auto_class("AutoModelForImageClassification")
