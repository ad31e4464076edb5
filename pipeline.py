# Copyright 2026 The MUSE pipelines authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""The entry point of `custom_pipeline="your-namespace/muse"`: MUSE on any Stable Diffusion 1.x, 2.x or XL checkpoint.

diffusers loads one file of this name and the one pipeline class in it, before it knows what the base checkpoint is.
The class below therefore only says which components a base may have, and builds the pipeline that fits those it has.

diffusers finds the files to fetch by reading this one for relative imports at the start of a line, and every file so
named has to exist. That is why the imports stand below as statements, inside a function: a second pipeline class in
the namespace of this module would be one too many.
"""

import inspect
import sys

from diffusers import AutoencoderKL, AutoencoderTiny, DiffusionPipeline, UNet2DConditionModel
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from diffusers.schedulers import KarrasDiffusionSchedulers
from transformers import (
    CLIPImageProcessor,
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    CLIPVisionModelWithProjection,
    PreTrainedModel,
)


# diffusers executes this file anew for each folder that it loads it from, in one module, but Python would remember the
# siblings of the folder before.
for _sibling in ("pipeline_muse", "pipeline_muse_xl"):
    sys.modules.pop(f"{__package__}.{_sibling}", None)


def _muse_pipeline_class() -> type[DiffusionPipeline]:
    """Returns the pipeline for bases with one text encoder: Stable Diffusion 1.x and 2.x."""
    from .pipeline_muse import MusePipeline

    return MusePipeline


def _muse_xl_pipeline_class() -> type[DiffusionPipeline]:
    """Returns the pipeline for bases with two text encoders: Stable Diffusion XL."""
    from .pipeline_muse_xl import MuseXLPipeline

    return MuseXLPipeline


class AutoMusePipeline(DiffusionPipeline):
    r"""
    Builds a `MusePipeline` (Stable Diffusion 1.x, 2.x) or a `MuseXLPipeline` (Stable Diffusion XL), whichever the
    components call for: the latter where there is a `text_encoder_2`. No object of this class itself ever exists.

    The three components that MUSE adds, and those that only some bases have, may be `None`.

    Args:
        vae (`AutoencoderKL`): Decodes latents to images, and encodes images to be edited.
        text_encoder (`CLIPTextModel` or `None`): Encodes prompts. The refiner of Stable Diffusion XL has none.
        text_encoder_2 (`CLIPTextModelWithProjection` or `None`): The second encoder of Stable Diffusion XL.
        tokenizer (`CLIPTokenizer` or `None`): The tokenizer of `text_encoder`, and of `clip_model`.
        tokenizer_2 (`CLIPTokenizer` or `None`): The tokenizer of `text_encoder_2`.
        unet (`UNet2DConditionModel`): Predicts the noise.
        scheduler (`KarrasDiffusionSchedulers`): Steps from noise to images.
        safety_checker (`StableDiffusionSafetyChecker` or `None`): Marks images that may be unsafe.
        feature_extractor (`CLIPImageProcessor` or `None`): Prepares images for `safety_checker`.
        image_encoder (`CLIPVisionModelWithProjection` or `None`): Encodes the images of an IP-Adapter.
        clip_model (`CLIPModel` or `None`): Decides when emotional guidance sets in.
        emotion_classifier (`PreTrainedModel` or `None`): Guides towards the emotion; names in `config.id2label`.
        preview_vae (`AutoencoderTiny` or `None`): A faster decoder for the images that guide.
        semantic_threshold (`float`, *optional*): The similarity (CLIP cosine times logit scale) that opens the gate.
        requires_safety_checker (`bool`, *optional*): Stable Diffusion 1.x and 2.x only.
        force_zeros_for_empty_prompt (`bool`, *optional*): Stable Diffusion XL only.
        add_watermarker (`bool`, *optional*): Stable Diffusion XL only.

    Raises:
        TypeError: If a component is given that the pipeline of this base does not know.
    """

    # Components by this list and required in the signature, as upstream's `safety_checker`: with a default of `None`
    # diffusers would load the checkpoint's component over the caller's.
    _optional_components = [
        "text_encoder",
        "text_encoder_2",
        "tokenizer",
        "tokenizer_2",
        "safety_checker",
        "feature_extractor",
        "image_encoder",
        "clip_model",
        "emotion_classifier",
        "preview_vae",
    ]

    def __new__(cls, **components) -> DiffusionPipeline:
        """Builds the pipeline that fits; as it is none of this class, Python does not call `__init__`."""
        has_two_encoders = components.get("text_encoder_2") is not None
        pipeline_class = _muse_xl_pipeline_class() if has_two_encoders else _muse_pipeline_class()
        components = {**dict.fromkeys(cls._optional_components), **components}
        known = inspect.signature(pipeline_class.__init__).parameters
        return pipeline_class(**{k: v for k, v in components.items() if k in known or v is not None})

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        text_encoder_2: CLIPTextModelWithProjection,
        tokenizer: CLIPTokenizer,
        tokenizer_2: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        safety_checker: StableDiffusionSafetyChecker,
        feature_extractor: CLIPImageProcessor,
        image_encoder: CLIPVisionModelWithProjection,
        clip_model: CLIPModel,
        emotion_classifier: PreTrainedModel,
        preview_vae: AutoencoderTiny,
        semantic_threshold: float = 18.0,
        requires_safety_checker: bool = True,
        force_zeros_for_empty_prompt: bool = True,
        add_watermarker: bool | None = None,
    ):
        # diffusers reads this signature to learn what to load; `__new__` does the work.
        super().__init__()
