# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Mild degradations of pictures: what no person's answer depends on, and no answer of a judge should.

Lengths are in 64ths of the shorter side, so that a picture loses as much at any size. How much was set on held-out
drawings of Storybook, which `examples/storybook/evaluate.py` measures again: what the degradations cost the judges
there is what they cost an emotion that is plain to see.

The guide looks through others (`pipeline_muse.degrade`), so that it is not optimised against those that it is judged
by.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


COPIES = 8
SIDE = 64  # parts of the shorter side
MOST = {
    "blur": 0.7,  # the standard deviation of a Gaussian, in parts
    "shift": 2.0,  # each way along both axes, in parts
    "gain": 0.12,  # of contrast and of colourfulness, and half as much of each channel
    "offset": 0.08,  # of each channel
    "noise": 0.06,  # a standard deviation
}


def degraded(pixels: Tensor, copies: int = COPIES, generator: torch.Generator | None = None) -> Tensor:
    """
    Makes copies of pictures, each blurred, shifted, recoloured and noisy in a way of its own, which is mild.

    Args:
        pixels (`torch.Tensor` of shape `(n, 3, height, width)`): Pictures of any size, pixels in [-1, 1].
        copies (`int`, defaults to 8): How many of each. All pictures are degraded alike.
        generator (`torch.Generator`, *optional*): The source of what differs from copy to copy, on the CPU. By default
            it is the same in every call.

    Returns:
        `torch.Tensor` of shape `(copies, n, 3, height, width)`, float32, in [-1, 1]. The gradient takes no notice of
        where pixels were cut off there.
    """
    generator = torch.Generator().manual_seed(0) if generator is None else generator
    pixels = pixels.float()
    made = []
    for _ in range(copies):
        picture = shift(blur(pixels, generator), generator)
        picture = recolor(picture, generator) + noise(pixels, generator)
        made.append(picture + (picture.clamp(-1, 1) - picture).detach())
    return torch.stack(made)


def uniform(low: float, high: float, count: int, generator: torch.Generator) -> Tensor:
    """Numbers between `low` and `high`."""
    return low + (high - low) * torch.rand(count, generator=generator)


def blur(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Blurs with a Gaussian, by anything from nothing to the most."""
    sigma = max(uniform(0, MOST["blur"], 1, generator).item() * min(pixels.shape[-2:]) / SIDE, 1e-3)
    radius = min(math.ceil(3 * sigma), min(pixels.shape[-2:]) - 1)
    kernel = torch.arange(-radius, radius + 1).div(sigma).square().div(-2).exp()
    kernel = (kernel / kernel.sum()).to(pixels.device).repeat(3, 1)
    pixels = F.pad(pixels, [radius] * 4, mode="reflect")
    return F.conv2d(F.conv2d(pixels, kernel[:, None, None], groups=3), kernel[:, None, :, None], groups=3)


def shift(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts along both axes; what comes in at a side is mirrored."""
    sides = pixels.shape[:-3:-1]  # width, height
    part = uniform(-MOST["shift"], MOST["shift"], 2, generator) * min(sides) / SIDE
    matrix = torch.eye(2, 3)
    matrix[:, 2] = 2 * part / torch.tensor(sides)  # the sides are from -1 to 1
    matrix = matrix.to(pixels.device).expand(len(pixels), 2, 3)
    grid = F.affine_grid(matrix, list(pixels.shape), align_corners=False)
    return F.grid_sample(pixels, grid, padding_mode="reflection", align_corners=False)


def recolor(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Changes contrast, colourfulness, and brightness channel by channel."""
    most, far = MOST["gain"], MOST["offset"]
    contrast, color = (1 + uniform(-most, most, 2, generator)).tolist()
    gain = contrast * (1 + uniform(-most, most, 3, generator) / 2).view(3, 1, 1).to(pixels.device)
    offset = uniform(-far, far, 3, generator).view(3, 1, 1).to(pixels.device)
    gray = pixels.mean(dim=1, keepdim=True)
    return gain * (gray + color * (pixels - gray)) + offset


def noise(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Noise for pictures of this shape, with grains of one part; the same for all of them."""
    sides = pixels.shape[-2:]
    grains = [max(1, round(SIDE * side / min(sides))) for side in sides]
    strength = uniform(0, MOST["noise"], 1, generator).item()
    grain = strength * torch.randn((1, 3, *grains), generator=generator).to(pixels.device)
    return F.interpolate(grain, sides, mode="bilinear", antialias=True, align_corners=False)
