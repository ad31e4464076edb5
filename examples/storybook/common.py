# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""What the training stages share: cached pictures, checkpoints, averages of weights, the tokenizer.

Every random choice of step k is drawn from generators seeded by (seed, k). A run that is interrupted and resumed
therefore ends exactly as an unbroken one would, with nothing but the weights and the optimizer in its checkpoint.
"""

import argparse
import json
import math
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tokenizers import pre_tokenizers
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers import CLIPTokenizer
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from world import EMOTIONS, Scene, render, sample_mixed_scene, sample_scene, vocabulary


MAX_LENGTH = 32  # tokens of a prompt, begin and end included
SIZE = 128  # pixels of a picture
JUDGED_SIZE = 64  # pixels that CLIP, guide and judges see
CHANNELS = 8  # of a latent
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
    parser.add_argument("--save_every", type=int, default=500, help="steps between looks at the result")
    parser.add_argument("--save_minutes", type=float, default=4, help="between checkpoints of the long stages")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bfloat16", action="store_true", help="compute in bfloat16: measure whether that is faster")
    return parser


def scene_of(split: str, index: int) -> Scene:
    """Scene number `index` of a set: a pure function of both."""
    _, kinds, style = SETS[split]
    rng = random.Random(f"storybook/{split}/{index}")
    kind = rng.choices(tuple(kinds), tuple(kinds.values()))[0]
    if kind == "mixed":
        return sample_mixed_scene(rng, style=style)
    return sample_scene(rng, emotion="any" if kind == "emotion" else None, style=style)


def _render_range(split: str, size: int, start: int, stop: int) -> np.ndarray:
    return np.stack([np.asarray(render(scene_of(split, k), size)) for k in range(start, stop)])


def load_set(
    split: str, work_dir: Path, size: int = JUDGED_SIZE, count: int | None = None
) -> tuple[list[Scene], np.ndarray]:
    """Scenes and pictures (count, size, size, 3) of a set, or of its first ones, drawn on first use and kept."""
    count, whole = count or SETS[split][0], count is None
    path = work_dir / f"{split}_{size}{'' if whole else f'_{count}'}.npy"
    if not path.exists():
        work_dir.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial.npy")
        pictures = np.lib.format.open_memmap(partial, "w+", np.uint8, (count, size, size, 3))
        starts = range(0, count, 500)
        with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
            jobs = [pool.submit(_render_range, split, size, k, min(k + 500, count)) for k in starts]
            for start, job in zip(starts, tqdm(jobs, desc=f"drawing {split}", mininterval=20)):
                pictures[start : start + 500] = job.result()
        pictures.flush()
        os.replace(partial, path)
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


def generator_of(seed: int, step: int, device: str = "cpu") -> torch.Generator:
    """The source of the noise of one training step."""
    return torch.Generator(device).manual_seed(1_000_003 * (seed + 1) + step)


def numbers_of(seed: int, step: int) -> np.random.Generator:
    """What chooses the pictures of one training step."""
    return np.random.default_rng((seed, step))


def learning_rate_at(step: int, steps: int, peak: float, warmup: int = 200) -> float:
    """Linear warm-up, then a cosine down to 2 % of the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return peak * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))


def orthogonal(matrices: torch.Tensor, steps: int = 5) -> torch.Tensor:
    """Matrices (..., rows, columns) with their singular values brought near 1, by Newton and Schulz's iteration.

    The polynomial is that of Muon (https://kellerjordan.github.io/posts/muon), which bfloat16 is precise enough for.
    """
    if matrices.shape[-2] > matrices.shape[-1]:
        return orthogonal(matrices.mT, steps).mT
    matrices = matrices / (matrices.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(steps):
        gram = matrices @ matrices.mT
        polynomial = -4.7750 * gram + 2.0315 * gram @ gram
        polynomial.diagonal(dim1=-2, dim2=-1).add_(3.4445)
        matrices = polynomial @ matrices
    return matrices


def is_matrix(parameter: torch.Tensor) -> bool:
    """Whether Muon is for it: weights of linear layers and convolutions that are not too narrow."""
    return parameter.ndim > 1 and min(parameter.flatten(1).shape) > 8


class Muon(torch.optim.Optimizer):
    """Muon for the weights of linear layers and convolutions, Adam for all else, at one learning rate.

    Muon's steps are scaled to the usual size of Adam's (https://huggingface.co/papers/2502.16982).

    Args:
        module: whose parameters are trained; those that need no gradient are left out.
        lr: the learning rate.
        weight_decay: of the matrices.
        pool: threads that the matrices are spread over.
        dtype: that the matrices' steps are computed in.
    """

    momentum, betas, epsilon = 0.95, (0.9, 0.99), 1e-8

    def __init__(self, module: torch.nn.Module, lr: float, weight_decay: float = 0.01, pool=None, dtype=None):
        trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
        matrices = [parameter for parameter in trained if is_matrix(parameter)]
        rest = [parameter for parameter in trained if not is_matrix(parameter)]
        super().__init__([{"params": matrices, "weight_decay": weight_decay}, {"params": rest}], {"lr": lr})
        self.map, self.dtype = pool.map if pool else map, dtype
        for parameter in matrices:
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
        for parameter in rest:
            zeros = {name: torch.zeros_like(parameter) for name in ("first", "second")}
            self.state[parameter] = {**zeros, "step": torch.zeros(())}
        # A GPU takes matrices of one shape together, as it waits for each operation to be launched.
        groups: dict[object, list[torch.Tensor]] = {}
        for parameter in matrices:
            groups.setdefault(parameter.shape if parameter.is_cuda else parameter, []).append(parameter)
        self.groups = list(groups.values())

    @torch.no_grad()
    def _muon(self, parameters: list[torch.Tensor], lr: float, weight_decay: float):
        momenta = [self.state[parameter]["momentum"] for parameter in parameters]
        gradients = [parameter.grad for parameter in parameters]
        torch._foreach_lerp_(momenta, gradients, 1 - self.momentum)
        updates = torch.stack(torch._foreach_lerp(gradients, momenta, self.momentum)).flatten(2)
        updates = orthogonal(updates.to(dtype=self.dtype)).to(parameters[0].dtype)
        size = 0.2 * max(updates.shape[1:]) ** 0.5
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        torch._foreach_add_(parameters, list(updates.view(-1, *parameters[0].shape)), alpha=-lr * size)

    @torch.no_grad()
    def _adam(self, parameters: list[torch.Tensor], lr: float):
        states, gradients = [self.state[parameter] for parameter in parameters], [p.grad for p in parameters]
        steps, first, second = ([state[name] for state in states] for name in ("step", "first", "second"))
        torch._foreach_add_(steps, 1)
        torch._foreach_lerp_(first, gradients, 1 - self.betas[0])
        torch._foreach_lerp_(second, torch._foreach_mul(gradients, gradients), 1 - self.betas[1])
        first_share, second_share = (1 - beta ** steps[0].item() for beta in self.betas)
        size = torch._foreach_sqrt(torch._foreach_div(second, second_share))
        torch._foreach_add_(size, self.epsilon)
        torch._foreach_addcdiv_(parameters, first, size, value=-lr / first_share)

    def step(self):
        matrices, rest = self.param_groups
        list(self.map(lambda group: self._muon(group, matrices["lr"], matrices["weight_decay"]), self.groups))
        if rest["params"]:
            self._adam(rest["params"], rest["lr"])


def held_learning_rate(step: int, steps: int, peak: float, warmup: int = 200, fall: float = 0.2) -> float:
    """Linear warm-up, the peak, and a straight way down in the last part: averages are of use all along."""
    return peak * min(1.0, (step + 1) / warmup, max(0.02, (steps - step) / (fall * steps)))


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


class Steps(Dataset):
    """`draw(step)` as item number `step`."""

    def __init__(self, draw: Callable[[int], Any]):
        self.draw = draw

    def __getitem__(self, step: int) -> Any:
        return self.draw(step)


def drawn_ahead(draw: Callable[[int], Any], start: int, steps: int, device: str) -> DataLoader:
    """`draw(step)` of all steps from `start` on; beside a GPU, which would wait for it, other processes draw ahead."""
    workers = 0 if device == "cpu" else max(1, (os.cpu_count() or 1) // 2)
    return DataLoader(
        Steps(draw),
        sampler=range(start, steps),
        batch_size=None,
        collate_fn=lambda drawn: drawn,
        num_workers=workers,
        multiprocessing_context="fork" if workers else None,
    )


class Clock:
    """Says when the next checkpoint is due."""

    def __init__(self, minutes: float):
        self.seconds, self.last = 60 * minutes, time.monotonic()

    def due(self) -> bool:
        if time.monotonic() - self.last < self.seconds:
            return False
        self.last = time.monotonic()
        return True


def autocast(device: str, enabled: bool = True) -> torch.autocast:
    return torch.autocast(device.split(":")[0], torch.bfloat16, enabled=enabled)


class Halves:
    """Computes the gradient of a batch in parts, one for each thread.

    On a CPU one thread for each half of a batch is faster than two threads for each operation. On other devices the
    batch stays whole.
    """

    def __init__(self, device: str, batch_size: int):
        self.count = torch.get_num_threads() if device == "cpu" else 1
        self.size = -(-batch_size // self.count)
        if self.count > 1:
            torch.set_num_threads(1)
        initial = {"initializer": torch.set_num_threads, "initargs": (1,)} if self.count > 1 else {}
        self.pool = ThreadPoolExecutor(self.count, **initial)

    def descend(self, loss_of: Callable[[slice], torch.Tensor], model, twin, *inputs: torch.Tensor) -> torch.Tensor:
        """Set the gradients of `model`, clipped, to those of `twin`, a copy of it; returns the loss.

        Args:
            loss_of: the share that a slice of the batch has in the loss, as computed by `twin`.
            inputs: what the loss is computed from and whose gradients are wanted as well.
        """
        parameters = [parameter for parameter in twin.parameters() if parameter.requires_grad]

        def part(number: int) -> tuple[torch.Tensor, ...]:
            loss = loss_of(slice(number * self.size, (number + 1) * self.size))
            return loss.detach(), *torch.autograd.grad(loss, [*parameters, *inputs])

        (loss, *gradients), *others = self.pool.map(part, range(self.count))
        for other_loss, *other_gradients in others:
            loss = loss + other_loss
            torch._foreach_add_(gradients, other_gradients)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter) if parameter.grad is None else parameter.grad
        torch._foreach_copy_([parameter.grad for parameter in trained], gradients[: len(trained)])
        for value, gradient in zip(inputs, gradients[len(trained) :]):
            value.grad = gradient
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        return loss


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


def show_loss(bar: tqdm, step: int, loss: torch.Tensor):
    """Tell the bar the loss, now and then: reading it waits for the device."""
    if step % 20 == 0:
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)


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


def frechet_distance(first: torch.Tensor, second: torch.Tensor) -> float:
    """Between Gaussians fitted to two sets of features (n, D), https://huggingface.co/papers/1706.08500 (eq. 6)."""
    first, second = first.double(), second.double()
    cov_first, cov_second = first.T.cov(), second.T.cov()
    roots = torch.linalg.eigvals(cov_first @ cov_second).real.clamp(min=0).sqrt()
    shift = (first.mean(0) - second.mean(0)).square().sum()
    return float(shift + cov_first.trace() + cov_second.trace() - 2 * roots.sum())


def random_like(pixels: torch.Tensor, shape: tuple[int, ...], generator: torch.Generator, kind=torch.rand):
    """Random values beside the pictures, drawn where the generator is."""
    return kind(shape, generator=generator, device=generator.device).to(pixels.device)


def degrade(pixels: torch.Tensor, generator: torch.Generator, share: float = 0.6) -> torch.Tensor:
    """Turn a share of the pictures into what early previews of a diffusion model look like: soft, pale, noisy.

    Args:
        pixels: (batch, 3, height, width) in [-1, 1].
        generator: the source of randomness.
        share: the probability of each picture to be degraded at all.
    """

    def uniform(low: float, high: float) -> torch.Tensor:
        return low + (high - low) * random_like(pixels, (len(pixels), 1, 1, 1), generator)

    size = pixels.shape[-1]
    soft = [pixels]
    for factor in (2, 4, 8):
        small = F.avg_pool2d(pixels, factor)
        soft.append(F.interpolate(small, size=(size, size), mode="bilinear", align_corners=False))
    levels = (len(soft) * random_like(pixels, (len(pixels),), generator)).long()
    blurred = torch.stack(soft)[levels, torch.arange(len(pixels), device=pixels.device)]
    mixture = uniform(0.2, 1.0)
    result = mixture * blurred + (1 - mixture) * pixels
    pale = uniform(0.45, 1.1)
    result = pale * result + (1 - pale) * result.mean(dim=(2, 3), keepdim=True) * uniform(0.7, 1.0)
    coarse = random_like(pixels, (len(pixels), 3, size // 4, size // 4), generator, torch.randn)
    fine = random_like(pixels, pixels.shape, generator, torch.randn)
    coarse = F.interpolate(coarse, size=(size, size), mode="bilinear", align_corners=False)
    result = result + uniform(0, 0.3) * coarse + uniform(0, 0.15) * fine
    return torch.where(uniform(0, 1) < share, result, pixels)


def normalise(pixels: torch.Tensor) -> torch.Tensor:
    """[-1, 1] -> the units of CLIP's vision towers, and the size of those of this world."""
    if pixels.shape[-1] != JUDGED_SIZE:
        pixels = F.interpolate(pixels, size=(JUDGED_SIZE, JUDGED_SIZE), mode="area")
    mean = torch.tensor(OPENAI_CLIP_MEAN, device=pixels.device).view(3, 1, 1)
    std = torch.tensor(OPENAI_CLIP_STD, device=pixels.device).view(3, 1, 1)
    return (pixels * 0.5 + 0.5 - mean) / std


def mirror(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Flip half of the pictures."""
    chosen = random_like(pixels, (len(pixels), 1, 1, 1), generator) < 0.5
    return torch.where(chosen, pixels.flip(-1), pixels)
