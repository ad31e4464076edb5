# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Shows what gate and classifier would see of pictures at several `preview_scale`, and how far that is from the picture.

    python examples/preview_check.py photo.jpg another.jpg --vae madebyollin/taesd --output_dir outputs/previews

Each picture is cropped to a square, encoded, and decoded from latents of each size, as the pipelines decode their
previews. The PSNR is that at the size which classifiers see. Writes a sheet of all of them, and prints their means.
"""

import argparse
import statistics
from collections.abc import Sequence
from pathlib import Path

import torch
from diffusers import AutoModel
from diffusers.image_processor import VaeImageProcessor
from muse_examples.contact_sheets import Cell, contact_sheet, save
from muse_examples.metrics import psnr
from muse_examples.options import one_line_errors, output_folder, picture_file, positive_int, share
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from pipeline_muse import shrink, to_rgb


def seen(pixels: Tensor, size: int) -> Tensor:
    """Pixels as a classifier sees them."""
    return F.interpolate(pixels, (size, size), mode="bicubic", antialias=True).clamp(-1, 1)


def latents_of(vae: torch.nn.Module, pixels: Tensor) -> Tensor:
    """The latents of pictures, from Stable Diffusion's autoencoder or a tiny one."""
    encoded = vae.encode(pixels)
    return encoded.latent_dist.mode() if hasattr(encoded, "latent_dist") else encoded.latents


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pictures", nargs="+", type=picture_file)
    parser.add_argument("--vae", default="madebyollin/taesd", help="folder or Hub id of an autoencoder")
    parser.add_argument("--preview_scale", type=share, nargs="+", default=[1, 0.75, 0.5])
    parser.add_argument("--size", type=positive_int, default=512, help="of the pictures, px. Default: %(default)s.")
    parser.add_argument("--seen", type=positive_int, default=224, help="by a classifier, px. Default: %(default)s.")
    parser.add_argument("--output_dir", type=output_folder, default=Path("outputs/previews"))
    args = parser.parse_args(arguments)

    vae = AutoModel.from_pretrained(args.vae).eval().requires_grad_(False)
    processor = VaeImageProcessor(resample="bicubic")
    square = {"height": args.size, "width": args.size, "resize_mode": "crop"}
    cells: list[Cell] = []
    told: dict[float, list[float]] = {scale: [] for scale in args.preview_scale}
    for path in args.pictures:
        pixels = processor.preprocess(to_rgb(Image.open(path)), **square)
        picture, latents = seen(pixels, args.seen), latents_of(vae, pixels)
        cells.append(Cell(processor.postprocess(picture)[0], path.stem))
        for scale, values in told.items():
            shown = seen(vae.decode(shrink(latents, scale)).sample, args.seen)
            values.append(psnr(shown, picture))
            cells.append(Cell(processor.postprocess(shown)[0], f"{scale:g}: {values[-1]:.1f} dB"))
    for scale, values in told.items():
        print(f"preview_scale {scale:g}: {statistics.mean(values):.1f} dB")
    print(save(contact_sheet(cells, 1 + len(told)), args.output_dir / "previews.png"))


if __name__ == "__main__":
    main()
