# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Stage 1: the autoencoder, 128 px pictures <-> 16 x 16 x 8 latents. Writes `vae/` into the work folder.

Stable Diffusion's factor of 8, with twice its channels, that hold confetti, rain and twigs. A quarter of the steps
decode latents of half the size to pictures of half the size: it makes latents smooth, which a diffusion model learns
faster (https://huggingface.co/papers/2502.09509).

It learns from crops. With `--decoder` the decoder then goes on alone, on whole pictures. Latents stay what they are,
so this may run before or after the training of the diffusion model.
"""

import copy

import numpy as np
import repository  # noqa: F401
import torch
from common import (
    CHANNELS,
    SIZE,
    Clock,
    Halves,
    Muon,
    arguments,
    autocast,
    generator_of,
    learning_rate_at,
    load_checkpoint,
    load_set,
    numbers_of,
    progress,
    save_checkpoint,
    save_json,
    show_loss,
    to_pictures,
    to_pixels,
    update_average,
)
from diffusers import AutoencoderKL
from muse_examples.metrics import psnr
from PIL import Image
from torch.nn import functional as F
from world import contact_sheet


KL_WEIGHT = 1e-6
CROP = 64  # pixels of a crop: without attention the network can learn from a quarter of a picture, at that cost
HALVED = 4  # one step in so many decodes latents of half the size
SHOWN = 96  # held-out pictures that a look at the result takes


def build_vae(widths: tuple[int, ...] = (16, 32, 96, 128)) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * len(widths),
        up_block_types=("UpDecoderBlock2D",) * len(widths),
        layers_per_block=1,
        latent_channels=CHANNELS,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=SIZE,
    )


def edges(pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Differences between neighbouring pixels, downwards and to the right."""
    return pixels[..., 1:, :] - pixels[..., :-1, :], pixels[..., 1:] - pixels[..., :-1]


def reconstruction_loss(decoded: torch.Tensor, pixels: torch.Tensor) -> torch.Tensor:
    """L1 + MSE on pixels and L1 on edges, at full and half size: sharp without a perceptual network."""
    loss = F.l1_loss(decoded, pixels) + F.mse_loss(decoded, pixels)
    for _ in range(2):
        loss = loss + 0.5 * sum(F.l1_loss(a, b) for a, b in zip(edges(decoded), edges(pixels)))
        decoded, pixels = F.avg_pool2d(decoded, 2), F.avg_pool2d(pixels, 2)
    return loss


@torch.no_grad()
def reconstructed(vae: AutoencoderKL, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents of pictures, not scaled, and what the decoder makes of them."""
    latents = torch.cat([vae.encode(part).latent_dist.mean for part in pixels.split(16)])
    return latents, torch.cat([vae.decode(part).sample for part in latents.split(16)])


def main():
    parser = arguments(__doc__, steps=4000, batch_size=16, learning_rate=2e-3)
    parser.add_argument(
        "--decoder", action="store_true", help="only train the decoder of the autoencoder that is there"
    )
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    _, pictures = load_set("world", args.work_dir, SIZE)
    _, held_out = load_set("world_held_out", args.work_dir, SIZE)
    name = "vae_decoder" if args.decoder else "vae"
    folder, checkpoint = args.work_dir / "vae", args.work_dir / f"{name}.checkpoint"

    vae = AutoencoderKL.from_pretrained(folder) if args.decoder else build_vae()
    # A CPU's bfloat16 convolutions are a third faster in PyTorch's own layout, all others in channels_last.
    layout = torch.contiguous_format if args.bfloat16 and args.device == "cpu" else torch.channels_last
    vae.to(args.device, memory_format=layout)
    for part in (vae.encoder, vae.quant_conv):
        part.requires_grad_(not args.decoder)
    average = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = Muon(vae, lr=args.learning_rate, dtype=torch.bfloat16 if args.bfloat16 else None)
    start = 0
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, model=vae, average=average, optimizer=optimizer)

    def save(step: int):
        save_checkpoint(checkpoint, step, model=vae, average=average, optimizer=optimizer)
        pixels = to_pixels(held_out[:SHOWN], args.device)
        latents, decoded = reconstructed(average, pixels)
        average.register_to_config(scaling_factor=round(1 / latents.std().item(), 5))
        average.save_pretrained(folder)
        rows = np.concatenate(
            [part for k in (0, 8, 16) for part in (held_out[k : k + 8], to_pictures(decoded[k : k + 8]))]
        )
        contact_sheet([Image.fromarray(row) for row in rows], 8, scale=1).save(args.work_dir / f"{name}.png")
        values = {"step": step, "psnr": psnr(decoded, pixels), "scaling_factor": average.config.scaling_factor}
        save_json(args.work_dir / f"{name}_log.json", values)
        print(values, flush=True)

    halves, clock = Halves(args.device, args.batch_size), Clock(args.save_minutes)
    bar = progress(start, args.steps, name)
    for step in bar:
        numbers, generator = numbers_of(args.seed, step), generator_of(args.seed, step, args.device)
        chosen = numbers.integers(len(pictures), size=args.batch_size)
        pixels = to_pixels(pictures[chosen], args.device)
        if not args.decoder:
            top, left = numbers.integers(SIZE - CROP + 1, size=2)
            pixels = pixels[..., top : top + CROP, left : left + CROP]
        pixels = pixels.contiguous(memory_format=layout)
        shape = (len(pixels), CHANNELS, *(s // 8 for s in pixels.shape[2:]))
        noise = torch.randn(shape, generator=generator, device=args.device)
        halved = step % HALVED == HALVED - 1 and not args.decoder

        def loss_of(part: slice, pixels=pixels, noise=noise, halved=halved) -> torch.Tensor:
            with autocast(args.device, args.bfloat16):
                posterior, target = vae.encode(pixels[part]).latent_dist, pixels[part]
                latents = posterior.mean + posterior.std * noise[part]
                if halved:
                    latents, target = F.avg_pool2d(latents, 2), F.avg_pool2d(target, 2)
                decoded = vae.decode(latents).sample
            loss = reconstruction_loss(decoded.float(), target) + KL_WEIGHT * posterior.kl().mean()
            return loss * len(target) / len(pixels)

        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args.steps, args.learning_rate)
        loss = halves.descend(loss_of, vae, vae)
        optimizer.step()
        update_average(average, vae, step, 0.998)
        show_loss(bar, step, loss)
        if clock.due() or step + 1 == args.steps:
            save(step + 1)


if __name__ == "__main__":
    main()
