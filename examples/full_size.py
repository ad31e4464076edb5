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
"""Seconds and memory at full size: the real architectures with random weights, so nothing has to be downloaded.

    python examples/full_size.py --architecture sdxl --size 1024 --dtype float16

Makes guided calls whose gate is open, with and without checkpointing and a tiny preview decoder, and writes what one
inner iteration (UNet, decoder and classifier, forth and back) takes. Pictures of random weights show nothing.
"""

import argparse
import gc
import json
import string
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import psutil
import torch
import transformers
from diffusers import AutoencoderKL, AutoencoderTiny, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from loading import DTYPES, REPOSITORY, default_device, positive_int, processor
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


sys.path.append(str(REPOSITORY / "emotion_classifier"))
from modeling_simemo import SimEmoConfig, SimEmoForImageClassification  # noqa: E402


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

# What is compared: arguments of the call; `preview_vae` is a component.
VARIANTS: dict[str, dict[str, bool]] = {
    "plain": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "preview_vae": {"preview_vae": True},
    "both": {"gradient_checkpointing": True, "preview_vae": True},
}


@dataclass
class Cost:
    """What a call cost: `seconds`, and the most `gib` of memory in use at a time, weights included."""

    seconds: float
    gib: float


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


@contextmanager
def measured(device: str) -> Iterator[Cost]:
    """Fills in what the block cost. On a GPU the peak is PyTorch's own; else that of the process, looked at often."""
    cost, process, done = Cost(0.0, 0.0), psutil.Process(), threading.Event()

    def watch() -> None:
        while not done.wait(0.02):
            cost.gib = max(cost.gib, process.memory_info().rss / 2**30)

    gc.collect()
    watcher = threading.Thread(target=watch, daemon=True)
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    else:
        watcher.start()
    start = time.perf_counter()
    try:
        yield cost
    finally:
        if device.startswith("cuda"):
            torch.cuda.synchronize()
            cost.gib = torch.cuda.max_memory_allocated() / 2**30
        cost.seconds = time.perf_counter() - start
        done.set()


def measure(pipe: DiffusionPipeline, size: int, open_steps: int, device: str, **options: Any) -> dict[str, float]:
    """
    Two calls, one with two inner iterations more per step than the other; the difference is what iterations take. The
    call before them warms up.

    Returns:
        `dict[str, float]`: Seconds per inner iteration, and the peak memory of the larger call in GiB.
    """
    costs = []
    for inner_steps in (1, 1, 3):
        generator = torch.Generator().manual_seed(0)
        with measured(device) as cost:
            output = pipe(
                "a cat",
                emotion="awe",
                height=size,
                width=size,
                num_inference_steps=open_steps,
                max_inner_steps=inner_steps,
                loss_threshold=float("-inf"),
                semantic_threshold=0,
                generator=generator,
                output_type="latent",
                **options,
            )
        if any(trace.inner_steps != open_steps * inner_steps for trace in output.trace):
            raise RuntimeError("The inner loop ended early, so there is nothing to measure.")
        costs.append(cost)
    seconds = (costs[-1].seconds - costs[-2].seconds) / (2 * open_steps)
    return {"seconds_per_inner_iteration": round(seconds, 3), "peak_gib": round(costs[-1].gib, 2)}


def hardware(device: str) -> str:
    """The device by name, and how many threads a CPU uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{processor()}, {torch.get_num_threads()} threads"


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=UNETS, default="sdxl")
    parser.add_argument("--size", type=positive_int, default=1024, help="pixels of a side. Default: %(default)s.")
    parser.add_argument("--open_steps", type=positive_int, default=2, help="denoising steps. Default: %(default)s.")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS), help="Default: all.")
    parser.add_argument("--device", default=default_device(), help="Default: %(default)s.")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="Default: %(default)s.")
    parser.add_argument("--output", type=Path, help="JSON file to write")
    args = parser.parse_args(arguments)
    if args.size % 64:
        parser.error(f"--size has to be a multiple of 64, but is {args.size}")
    return args


def main() -> None:
    args = parse_args()
    dtype = DTYPES[args.dtype]
    report: dict[str, Any] = {
        "architecture": args.architecture,
        "size": args.size,
        "dtype": args.dtype,
        "open_steps": args.open_steps,
        "hardware": hardware(args.device),
        "versions": {module.__name__: module.__version__ for module in (torch, diffusers, transformers)},
        "variants": {},
    }
    pipe = build_pipeline(args.architecture, args.device, dtype, with_preview_vae=True)
    preview_vae = pipe.preview_vae
    for name in args.variants:
        options = dict(VARIANTS[name])
        pipe.preview_vae = preview_vae if options.pop("preview_vae", False) else None
        result = measure(pipe, args.size, args.open_steps, args.device, **options)
        report["variants"][name] = result
        print(f"{name:24} {result['seconds_per_inner_iteration']:8.3f} s {result['peak_gib']:7.2f} GiB", flush=True)
        if args.output:  # each time, as the next may run out of memory
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
