# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""What the training stages share: cached pictures, checkpoints, averages of weights, the tokenizer.

Every random choice of step k is drawn from a generator seeded by (seed, k). A run that is interrupted and resumed
therefore ends exactly as an unbroken one would, with nothing but the weights and the optimizer in its checkpoint.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from world import EMOTIONS, Scene, render, sample_mixed_scene, sample_scene, vocabulary


MAX_LENGTH = 32  # tokens of a prompt, begin and end included
ROOT = Path(__file__).resolve().parents[2]
# name -> (number of scenes, kinds and their shares, style); "held_out" sets are never trained on
SETS = {
    "world": (48000, {"neutral": 0.2, "emotion": 0.5, "mixed": 0.3}, "painted"),
    "world_held_out": (2048, {"neutral": 0.2, "emotion": 0.5, "mixed": 0.3}, "painted"),
    "emotion": (24000, {"emotion": 1.0}, "painted"),
    "emotion_validation": (2000, {"emotion": 1.0}, "painted"),
    "emotion_held_out": (2000, {"emotion": 1.0}, "painted"),
    "inked": (16000, {"emotion": 1.0}, "inked"),
    "inked_held_out": (2000, {"emotion": 1.0}, "inked"),
}


def arguments(description: str, steps: int, batch_size: int, learning_rate: float, seed: int = 0):
    """The options that all stages have; a stage adds its own and calls `parse_args`."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "storybook")
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--batch_size", type=int, default=batch_size)
    parser.add_argument("--learning_rate", type=float, default=learning_rate)
    parser.add_argument("--seed", type=int, default=seed)
    parser.add_argument("--save_every", type=int, default=500)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def scene_of(split: str, index: int) -> Scene:
    """Scene number `index` of a set: a pure function of both."""
    _, kinds, style = SETS[split]
    rng = random.Random(f"storybook/{split}/{index}")
    kind = rng.choices(tuple(kinds), tuple(kinds.values()))[0]
    if kind == "mixed":
        return sample_mixed_scene(rng, style=style)
    return sample_scene(rng, emotion="any" if kind == "emotion" else None, style=style)


def _render_range(split: str, start: int, stop: int) -> np.ndarray:
    return np.stack([np.asarray(render(scene_of(split, k))) for k in range(start, stop)])


def load_set(split: str, work_dir: Path, workers: int = 2) -> tuple[list[Scene], np.ndarray]:
    """Scenes and pictures (count, 64, 64, 3) of a set, drawn on first use and kept in `work_dir`."""
    count, path = SETS[split][0], work_dir / f"{split}.npy"
    if not path.exists():
        work_dir.mkdir(parents=True, exist_ok=True)
        starts = range(0, count, 500)
        with ProcessPoolExecutor(workers) as pool:
            jobs = [pool.submit(_render_range, split, k, min(k + 500, count)) for k in starts]
            pictures = np.concatenate([job.result() for job in tqdm(jobs, desc=f"drawing {split}")])
        save_array(path, pictures)
    return [scene_of(split, k) for k in range(count)], np.load(path, mmap_mode="r")


def labels_of(scenes: list[Scene]) -> torch.Tensor:
    """Class indices of scenes that all have an emotion."""
    return torch.tensor([EMOTIONS.index(scene.emotion) for scene in scenes])


def to_pixels(pictures: np.ndarray, device: str = "cpu") -> torch.Tensor:
    """uint8 (batch, height, width, 3) -> float in [-1, 1], (batch, 3, height, width)."""
    pixels = torch.from_numpy(np.array(pictures)).to(device)
    return pixels.permute(0, 3, 1, 2).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)


def to_pictures(pixels: torch.Tensor) -> np.ndarray:
    """The inverse of `to_pixels`, clamped."""
    return pixels.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()


def generator_of(seed: int, step: int) -> torch.Generator:
    """The source of all randomness of one training step."""
    return torch.Generator().manual_seed(1_000_003 * (seed + 1) + step)


def learning_rate_at(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


@torch.no_grad()
def update_average(average: torch.nn.Module, model: torch.nn.Module, step: int, decay: float):
    """Exponential moving average whose memory grows with the steps taken."""
    decay = min(decay, (1 + step) / (10 + step))
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)
    for ours, theirs in zip(average.buffers(), model.buffers()):
        ours.copy_(theirs)


def save_array(path: Path, array: np.ndarray):
    """Write an array so that the file is either complete or absent."""
    partial = path.with_suffix(".partial.npy")
    np.save(partial, array)
    os.replace(partial, path)


def save_json(path: Path, values: dict):
    """Write JSON that ends with a newline, completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(values, indent=2) + "\n")
    os.replace(partial, path)


def tensors_of(part: torch.nn.Module | torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """The state of a module, or of an optimizer less its options, as flat tensors."""
    if isinstance(part, torch.nn.Module):
        return part.state_dict()
    states = part.state_dict()["state"]
    return {f"{index}/{name}": value for index, state in states.items() for name, value in state.items()}


def save_checkpoint(path: Path, step: int, **parts: torch.nn.Module | torch.optim.Optimizer):
    """Write the states of modules and optimizers as safetensors, completely or not at all."""
    partial = path.with_name(path.name + ".partial")
    tensors = {
        f"{name}/{key}": value.clone() for name, part in parts.items() for key, value in tensors_of(part).items()
    }
    save_file({key: value.contiguous() for key, value in tensors.items()}, partial, metadata={"step": str(step)})
    os.replace(partial, path)


def load_checkpoint(path: Path, **parts: torch.nn.Module | torch.optim.Optimizer) -> int:
    """Restore what `save_checkpoint` wrote; returns the step to go on from."""
    with safe_open(path, framework="pt") as file:
        step = int(file.metadata()["step"])
    tensors = load_file(path)
    for name, part in parts.items():
        state = {key.removeprefix(f"{name}/"): value for key, value in tensors.items() if key.startswith(f"{name}/")}
        if isinstance(part, torch.optim.Optimizer):
            whole = part.state_dict()
            whole["state"] = {}
            for key, value in state.items():
                index, entry = key.split("/")
                whole["state"].setdefault(int(index), {})[entry] = value
            state = whole
        part.load_state_dict(state)
    return step


def autocast(device: str) -> torch.autocast:
    return torch.autocast(device.split(":")[0], torch.bfloat16)


def progress(start: int, steps: int, description: str) -> tqdm:
    """A bar that is quiet in log files."""
    return tqdm(
        range(start, steps),
        initial=start,
        total=steps,
        desc=description,
        mininterval=1 if sys.stderr.isatty() else 20,
        dynamic_ncols=True,
    )


def merges_of(words: list[str]) -> list[tuple[str, str]]:
    """Byte-pair merges by which each word ends as one token; made in order, so they are the same on every machine."""
    merges: dict[tuple[str, str], int] = {}
    for word in words:
        symbols = [*word[:-1], word[-1] + "</w>"]
        while len(symbols) > 1:
            pairs = list(zip(symbols, symbols[1:]))
            k = min(range(len(pairs)), key=lambda index: merges.get(pairs[index], len(merges)))
            merges.setdefault(pairs[k], len(merges))
            symbols[k : k + 2] = [symbols[k] + symbols[k + 1]]
    return list(merges)


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """A byte-level BPE in CLIP's format that knows each word of the world as one token and spells all others."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = merges_of(vocabulary())
    tokens = [*alphabet, *(symbol + "</w>" for symbol in alphabet), *(left + right for left, right in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    vocab = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = CLIPTokenizer(
        vocab=vocab,
        merges=merges,
        bos_token="<|startoftext|>",
        eos_token="<|endoftext|>",
        unk_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        model_max_length=MAX_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    for file in Path(folder).glob("*.json"):
        file.write_text(file.read_text().rstrip() + "\n")
    return tokenizer


def encode(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids (batch, MAX_LENGTH), padded as diffusers pads prompts."""
    return tokenizer(
        texts, padding="max_length", max_length=MAX_LENGTH, truncation=True, return_tensors="pt"
    ).input_ids


def degrade(pixels: torch.Tensor, generator: torch.Generator, share: float = 0.6) -> torch.Tensor:
    """Turn a share of the pictures into what early previews of a diffusion model look like: soft, pale, noisy.

    Args:
        pixels: (batch, 3, height, width) in [-1, 1].
        generator: the source of randomness, on the CPU.
        share: the probability of each picture to be degraded at all.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        values = low + (high - low) * torch.rand((len(pixels), 1, 1, 1), generator=generator)
        return values.to(pixels.device)

    size = pixels.shape[-1]
    soft = [pixels]
    for factor in (2, 4, 8):
        small = F.avg_pool2d(pixels, factor)
        soft.append(F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False))
    levels = torch.randint(len(soft), (len(pixels),), generator=generator).to(pixels.device)
    blurred = torch.stack(soft)[levels, torch.arange(len(pixels), device=pixels.device)]
    mixture = uniform(0.2, 1.0)
    result = mixture * blurred + (1 - mixture) * pixels
    pale = uniform(0.45, 1.1)
    result = pale * result + (1 - pale) * result.mean(dim=(2, 3), keepdim=True) * uniform(0.7, 1.0)
    coarse = torch.randn((len(pixels), 3, size // 4, size // 4), generator=generator).to(pixels.device)
    fine = torch.randn(pixels.shape, generator=generator).to(pixels.device)
    coarse = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    result = result + uniform(0, 0.3) * coarse + uniform(0, 0.15) * fine
    return torch.where(uniform(0, 1) < share, result, pixels)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> the units of CLIP's vision towers."""
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, device=pixels.device).view(3, 1, 1)
    return (pixels * 0.5 + 0.5 - mean) / std


def mirror(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the pictures."""
    chosen = torch.rand((len(pixels), 1, 1, 1), generator=generator).to(pixels.device) < 0.5
    return torch.where(chosen, pixels.flip(-1), pixels)
