"""Tiny models with random weights, made in code, in the shapes that the pipelines expect."""

import json
import shutil
import string
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from modeling_simemo import SimEmoConfig, SimEmoForImageClassification
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedModel,
)

from pipeline_muse import MusePipeline, MusePipelineOutput
from pipeline_muse_xl import MuseXLPipeline


REPOSITORY = Path(__file__).resolve().parent.parent

VISION_CONFIG = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "patch_size": 8,
    "image_size": 32,
    "projection_dim": 16,
}


def tokenizer() -> CLIPTokenizer:
    """A tokenizer of single letters, for sequences of 16 tokens."""
    letters = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    vocabulary = {token: index for index, token in enumerate([*letters, "<|startoftext|>", "<|endoftext|>"])}
    return CLIPTokenizer(vocab=vocabulary, merges=[], model_max_length=16)


def text_config(hidden_size: int = 32) -> CLIPTextConfig:
    """The text half of the tiny CLIP, in step with `tokenizer`."""
    words = tokenizer()
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=hidden_size,
        intermediate_size=64,
        projection_dim=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=words.model_max_length,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def clip_model(seed: int = 0) -> CLIPModel:
    """A CLIP for images of 32 px."""
    torch.manual_seed(seed)
    config = CLIPConfig(text_config=text_config().to_dict(), vision_config=VISION_CONFIG, projection_dim=16)
    return CLIPModel(config).eval()


def emotion_classifier(seed: int = 0, **config) -> SimEmoForImageClassification:
    """A SimEmo for images of 32 px; `config` overrides parts of its configuration."""
    torch.manual_seed(seed)
    config = {"vision_config": VISION_CONFIG, "head_hidden_sizes": [24], **config}
    return SimEmoForImageClassification(SimEmoConfig(**config)).eval()


def sure_classifier(seed: int = 0) -> SimEmoForImageClassification:
    """A classifier that is sure of what it says, and that says different things of different pictures."""
    classifier = emotion_classifier(seed)
    for layer in classifier.classifier[::2]:
        layer.weight.data.mul_(30)
    return classifier


def preview_vae(seed: int = 0) -> AutoencoderTiny:
    """A tiny autoencoder with the latent shape of `stable_diffusion`'s."""
    torch.manual_seed(seed)
    blocks = {"num_encoder_blocks": (1, 1), "num_decoder_blocks": (1, 1)}
    channels = {"encoder_block_out_channels": (8, 8), "decoder_block_out_channels": (8, 8)}
    return AutoencoderTiny(latent_channels=4, upsampling_scaling_factor=2, **channels, **blocks).eval()


def vae(**config) -> AutoencoderKL:
    """An autoencoder that halves the sides of an image of 32 px."""
    return AutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=32,
        **config,
    ).eval()


def unet(cross_attention_dim: int = 32, **config) -> UNet2DConditionModel:
    """A network for latents of 16 px."""
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=16,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=4,
        norm_num_groups=4,
        **config,
    ).eval()


def ddim() -> DDIMScheduler:
    """Stable Diffusion's noise schedule."""
    return DDIMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
    )


def stable_diffusion(seed: int = 0) -> dict:
    """The components of a tiny Stable Diffusion 1.x for images of 32 px (latents of 16), by name."""
    torch.manual_seed(seed)
    return {
        "vae": vae(),
        "text_encoder": CLIPTextModel(text_config()).eval(),
        "tokenizer": tokenizer(),
        "unet": unet(),
        "scheduler": ddim(),
        "safety_checker": None,
        "feature_extractor": None,
    }


def stable_diffusion_xl(seed: int = 0) -> dict:
    """The components of a tiny Stable Diffusion XL for images of 32 px, by name; its text encoders differ in width."""
    torch.manual_seed(seed)
    widths = (32, 24)
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 8}
    sizes_and_text = 6 * added["addition_time_embed_dim"] + text_config().projection_dim
    return {
        "vae": vae(scaling_factor=0.13025, force_upcast=True),
        "text_encoder": CLIPTextModel(text_config(widths[0])).eval(),
        "text_encoder_2": CLIPTextModelWithProjection(text_config(widths[1])).eval(),
        "tokenizer": tokenizer(),
        "tokenizer_2": tokenizer(),
        "unet": unet(sum(widths), projection_class_embeddings_input_dim=sizes_and_text, **added),
        "scheduler": ddim(),
    }


def muse_models() -> dict[str, torch.nn.Module | PreTrainedModel]:
    """The components that MUSE adds to Stable Diffusion, by name."""
    return {"clip_model": clip_model(), "emotion_classifier": emotion_classifier(), "preview_vae": preview_vae()}


def save_base(folder: Path) -> Path:
    """Saves a tiny Stable Diffusion 1.x checkpoint, as anyone has it who never heard of MUSE."""
    StableDiffusionPipeline(**stable_diffusion(), requires_safety_checker=False).save_pretrained(folder)
    return folder


def save_muse(folder: Path, semantic_threshold: float = 21.5) -> Path:
    """Saves a tiny checkpoint in the layout of this repository: a base, the models of MUSE, and the code."""
    save_base(folder)
    for name, model in muse_models().items():
        model.save_pretrained(folder / name)
    for source in REPOSITORY.glob("pipeline*.py"):
        shutil.copy(source, folder)
    index = json.loads((folder / "model_index.json").read_text())
    index |= {
        "_class_name": ["pipeline_muse", "MusePipeline"],
        "clip_model": ["transformers", "CLIPModel"],
        "emotion_classifier": ["modeling_simemo", "SimEmoForImageClassification"],
        "preview_vae": ["diffusers", "AutoencoderTiny"],
        "semantic_threshold": semantic_threshold,
    }
    (folder / "model_index.json").write_text(json.dumps(index, indent=2))
    return folder


@dataclass(frozen=True)
class Family:
    """A pipeline class and what tests have to know about it, so that one suite runs over all of them."""

    pipeline_class: type[DiffusionPipeline]
    parent_class: type[DiffusionPipeline]
    components: Callable[[], dict[str, Any]]  # the parent's
    settings: dict[str, Any] = field(default_factory=dict)  # the parent's other arguments
    encoded: tuple[str, ...] = ("prompt_embeds", "negative_prompt_embeds")  # what `encode_prompt` returns

    def __str__(self) -> str:
        return self.pipeline_class.__name__

    @property
    def extra_components(self) -> set[str]:
        """The components that the parent does not have."""
        return set(self.pipeline_class._optional_components) - set(self.parent_class._optional_components)


STABLE_DIFFUSION = Family(
    MusePipeline, StableDiffusionPipeline, stable_diffusion, settings={"requires_safety_checker": False}
)
STABLE_DIFFUSION_XL = Family(
    MuseXLPipeline,
    StableDiffusionXLPipeline,
    stable_diffusion_xl,
    encoded=(
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ),
)
FAMILIES = [STABLE_DIFFUSION, STABLE_DIFFUSION_XL]

# For tests of the fixture `pipe`: the method is one region, the same to the byte in both files, so that most are
# for Stable Diffusion alone; these are of conditions, decoding, dtypes and the parents' calls.
every_family = pytest.mark.parametrize("family", FAMILIES, ids=str)
only_stable_diffusion = pytest.mark.parametrize("family", [STABLE_DIFFUSION], ids=str)  # as without a mark


def muse_pipeline(family: Family = STABLE_DIFFUSION, **overrides) -> DiffusionPipeline:
    """
    A tiny MUSE pipeline; `overrides` replace components. Random weights hardly react to a few tokens: the layers
    that tokens, prompts and emotions pass through are amplified, so that effects stand far above rounding errors.
    """
    components = {**family.components(), **muse_models(), "preview_vae": None, **overrides}
    with torch.no_grad():
        for name, weight in components["unet"].named_parameters():
            if "attn2" in name and name.endswith("weight"):
                weight.mul_(3)
        if isinstance(components["emotion_classifier"], SimEmoForImageClassification):
            for layer in components["emotion_classifier"].classifier[::2]:
                layer.weight.mul_(30)
    return quiet(family.pipeline_class(**components, **family.settings))


def quiet(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline without a progress bar."""
    pipe.set_progress_bar_config(disable=True)
    return pipe


def storybook(folder: Path = REPOSITORY) -> DiffusionPipeline:
    """A bundled checkpoint with the attention whose backward pass is fast on a CPU."""
    pipe = quiet(DiffusionPipeline.from_pretrained(folder, trust_remote_code=True))
    pipe.unet.set_attn_processor(AttnProcessor())
    return pipe


def parent_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The stock pipeline around the same modules."""
    family = next(family for family in FAMILIES if type(pipe) is family.pipeline_class)
    return quiet(family.parent_class.from_pipe(pipe))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stock(pipe: DiffusionPipeline, **arguments) -> torch.Tensor:
    """The latents that a short call makes; `arguments` override its own."""
    defaults = {"prompt": "a cat", "num_inference_steps": 3, "output_type": "latent", "generator": generator()}
    return pipe(**(defaults | arguments)).images


def guide(pipe: DiffusionPipeline, **arguments) -> MusePipelineOutput:
    """The output of a short guided call by the paper's settings, whose gate opens at once; `arguments` override."""
    defaults = {
        "prompt": "a cat",
        "emotion": "awe",
        "preset": "paper",
        "num_inference_steps": 3,
        "max_inner_steps": 2,
        "semantic_threshold": 0,
        "output_type": "latent",
        "generator": generator(),
    }
    return pipe(**(defaults | arguments))
