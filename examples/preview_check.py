# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Shows what gate and classifier would see of pictures at several `preview_scale`, and how far that is from the picture.

    python examples/preview_check.py photo.jpg another.jpg --vae madebyollin/taesd --output_dir outputs/previews

Each picture is cropped to a square, encoded, and decoded from latents of each size, as the pipelines decode their
previews. The PSNR is that at the size which classifiers see. Writes a sheet of all of them, and prints their means.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoModel
from muse_examples.contact_sheets import Cell, contact_sheet, save
from muse_examples.options import number, one_line_errors, output_folder, picture_file, positive_int
from PIL import Image, ImageOps
from torch import Tensor
from torch.nn import functional as F


def to_pixels(path: Path, size: int) -> Tensor:
    """The middle of a picture as pixels in [-1, 1], shape `(1, 3, size, size)`."""
    picture = ImageOps.fit(ImageOps.exif_transpose(Image.open(path)).convert("RGB"), (size, size))
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 127.5 - 1


def to_picture(pixels: Tensor) -> Image.Image:
    """The inverse."""
    return Image.fromarray(pixels[0].add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())


def seen(pixels: Tensor, size: int) -> Tensor:
    """Pixels as a classifier sees them."""
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


@torch.no_grad()
def preview(vae: torch.nn.Module, pixels: Tensor, scale: float) -> Tensor:
    """What the pipelines would decode of a picture's latents with this `preview_scale`."""
    encoded = vae.encode(pixels)
    latents = encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents
    sides = [max(1, round(scale * side)) for side in latents.shape[-2:]]
    return vae.decode(F.interpolate(latents, sides, mode="area")).sample


def psnr(pixels: Tensor, other: Tensor) -> float:
    """Peak signal-to-noise ratio of pixels in [-1, 1], dB."""
    return float(10 * torch.log10(4 / (pixels - other).pow(2).mean()))


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=picture_file)
    parser.add_argument("--vae", default="madebyollin/taesd", help="folder or Hub id of an autoencoder")
    parser.add_argument("--preview_scale", type=number(0, 1, low_included=False), nargs="+", default=[1, 0.75, 0.5])
    parser.add_argument("--size", type=positive_int, default=512, help="of the pictures, px. Default: %(default)s.")
    parser.add_argument("--seen", type=positive_int, default=224, help="px that a classifier sees. Default: 224.")
    parser.add_argument("--output_dir", type=output_folder, default=Path("outputs/previews"))
    args = parser.parse_args(arguments)

    vae = AutoModel.from_pretrained(args.vae).eval()
    cells: list[Cell] = []
    told: dict[float, list[float]] = {scale: [] for scale in args.preview_scale}
    for path in args.pictures:
        pixels = to_pixels(path, args.size)
        picture = seen(pixels, args.seen)
        cells.append(Cell(to_picture(picture), path.stem))
        for scale in told:
            shown = seen(preview(vae, pixels, scale), args.seen)
            told[scale].append(psnr(shown, picture))
            cells.append(Cell(to_picture(shown), f"{scale:g}: {told[scale][-1]:.1f} dB"))
    for scale, values in told.items():
        print(f"preview_scale {scale:g}: {np.mean(values):.1f} dB")
    print(save(contact_sheet(cells, 1 + len(told)), args.output_dir / "previews.png"))


if __name__ == "__main__":
    main()
