# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The real architectures with random weights, so nothing has to be downloaded: their pictures show nothing."""

import string
from collections.abc import Callable
from typing import Any

import torch
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from modeling_simemo import SimEmoConfig, SimEmoForImageClassification
from tqdm.auto import tqdm
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
)

from pipeline_muse import MusePipeline
from pipeline_muse_xl import MuseXLPipeline


LETTERS = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]

# The configurations of the released checkpoints, where they are not the defaults of the classes.
VAE: dict[str, Any] = {
    "block_out_channels": (128, 256, 512, 512),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 2,
}
UNETS: dict[str, dict[str, Any]] = {
    "sd15": {"sample_size": 64, "cross_attention_dim": 768, "attention_head_dim": 8},
    "sdxl": {
        "sample_size": 128,
        "cross_attention_dim": 2048,
        "block_out_channels": (320, 640, 1280),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "attention_head_dim": (5, 10, 20),
        "transformer_layers_per_block": (1, 2, 10),
        "use_linear_projection": True,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": 256,
        "projection_class_embeddings_input_dim": 2816,
    },
}
VAES = {"sd15": VAE | {"sample_size": 512}, "sdxl": VAE | {"sample_size": 1024, "scaling_factor": 0.13025}}
CLIP_L_TEXT: dict[str, Any] = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_attention_heads": 12,
    "projection_dim": 768,
}
CLIP_L_VISION: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "patch_size": 14,
    "projection_dim": 768,
}
CLIP_BIG_G_TEXT: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "num_hidden_layers": 32,
    "num_attention_heads": 20,
    "projection_dim": 1280,
}


def random_module(build: Callable[[], torch.nn.Module], device: str, dtype: torch.dtype) -> torch.nn.Module:
    """A module of small random weights, made in place: never is there a second, larger copy of them."""
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device).eval()
    with torch.no_grad():
        for name, weight in module.named_parameters():
            is_scale = weight.ndim == 1 and name.endswith("weight")
            weight.fill_(1.0) if is_scale else weight.normal_(0, 0.02)
    for buffer in module.buffers():  # positions of CLIP
        buffer.copy_(torch.arange(buffer.numel()).view_as(buffer))
    return module.requires_grad_(False)


def tokenizer() -> CLIPTokenizer:
    """A tokenizer of single letters, of CLIP's length; random text encoders need no better."""
    vocabulary = {token: index for index, token in enumerate([*LETTERS, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=77)


def network_builders(architecture: str) -> dict[str, Callable[[], torch.nn.Module]]:
    """What makes each network of "sd15" or "sdxl", with CLIP ViT-L/14, SimEmo and TAESD, by the component's name."""
    builders: dict[str, Callable[[], torch.nn.Module]] = {
        "vae": lambda: AutoencoderKL(**VAES[architecture]),
        "unet": lambda: UNet2DConditionModel(**UNETS[architecture]),
        "text_encoder": lambda: CLIPTextModel(CLIPTextConfig(**CLIP_L_TEXT)),
        "clip_model": lambda: CLIPModel(
            CLIPConfig(text_config=CLIP_L_TEXT, vision_config=CLIP_L_VISION, projection_dim=768)
        ),
        "emotion_classifier": lambda: SimEmoForImageClassification(SimEmoConfig()),
        "preview_vae": AutoencoderTiny,
    }
    if architecture == "sdxl":
        builders["text_encoder_2"] = lambda: CLIPTextModelWithProjection(CLIPTextConfig(**CLIP_BIG_G_TEXT))
    return builders


def build_pipeline(architecture: str, device: str, dtype: torch.dtype, with_preview_vae: bool) -> DiffusionPipeline:
    """
    A MUSE pipeline of the real size: Stable Diffusion 1.5 or XL, CLIP ViT-L/14, and SimEmo.

    Args:
        architecture (`str`): "sd15" or "sdxl".
        device (`str`): Where the weights are made.
        dtype (`torch.dtype`): Theirs; in float16 the pipeline of XL decodes in float32, as upstream.
        with_preview_vae (`bool`): Whether TAESD's architecture decodes previews.
    """
    builders = network_builders(architecture)
    if not with_preview_vae:
        del builders["preview_vae"]
    components: dict[str, Any] = {"tokenizer": tokenizer(), "preview_vae": None, "feature_extractor": None}
    if architecture == "sdxl":
        components["tokenizer_2"] = tokenizer()
    else:
        components |= {"safety_checker": None, "requires_safety_checker": False}
    bar = tqdm(builders.items(), desc="random weights", leave=False)
    components |= {name: random_module(build, device, dtype) for name, build in bar}
    components["scheduler"] = DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )
    pipe = (MuseXLPipeline if architecture == "sdxl" else MusePipeline)(**components)
    if device == "cpu":
        pipe.unet.set_attn_processor(AttnProcessor())
        pipe.emotion_classifier.set_attn_implementation("eager")
    pipe.set_progress_bar_config(leave=False)
    return pipe
