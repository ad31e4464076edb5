# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Stage 1: the autoencoder, 64 px pictures <-> 16 x 16 x 4 latents. Writes `vae/` into the work folder."""

import copy

import torch
from common import (
    arguments,
    autocast,
    generator_of,
    learning_rate_at,
    load_checkpoint,
    load_set,
    progress,
    save_checkpoint,
    save_json,
    to_pictures,
    to_pixels,
    update_average,
)
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional as F
from world import contact_sheet


KL_WEIGHT = 1e-6
CROP, CROP_SHARE = 32, 0.65  # the first steps see crops: without attention the network can, at a quarter of the cost


def build_vae() -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(24, 48, 80),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        mid_block_add_attention=False,
        sample_size=64,
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
def latent_std(vae: AutoencoderKL, pixels: torch.Tensor) -> float:
    return torch.cat([vae.encode(chunk).latent_dist.mean for chunk in pixels.split(128)]).std().item()


def main():
    args = arguments(__doc__, steps=4500, batch_size=16, learning_rate=1e-3).parse_args()
    torch.manual_seed(args.seed)
    _, pictures = load_set("world", args.work_dir)
    _, held_out = load_set("world_held_out", args.work_dir)
    folder, checkpoint = args.work_dir / "vae", args.work_dir / "vae.checkpoint"

    vae = build_vae().to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(vae).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    start = 0
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, model=vae, average=average, optimizer=optimizer)

    def save(step: int):
        save_checkpoint(checkpoint, step, model=vae, average=average, optimizer=optimizer)
        pixels = to_pixels(held_out[:512], args.device)
        average.register_to_config(scaling_factor=round(1 / latent_std(average, pixels), 5))
        average.save_pretrained(folder)
        with torch.no_grad():
            decoded = average.decode(average.encode(pixels[:32]).latent_dist.mean).sample
        psnr = -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1), pixels[:32]) / 4).item()
        rows = [
            Image.fromarray(row[k])
            for s in (0, 16)
            for row in (held_out[s : s + 16], to_pictures(decoded[s : s + 16]))
            for k in range(16)
        ]
        contact_sheet(rows, 16, scale=1).save(args.work_dir / "vae.png")
        save_json(
            args.work_dir / "vae_log.json",
            {"step": step, "psnr": psnr, "scaling_factor": average.config.scaling_factor},
        )

    bar = progress(start, args.steps, "vae")
    for step in bar:
        generator = generator_of(args.seed, step)
        chosen = torch.randint(len(pictures), (args.batch_size,), generator=generator).numpy()
        pixels = to_pixels(pictures[chosen], args.device)
        if step < CROP_SHARE * args.steps:
            top, left = torch.randint(pixels.shape[-1] - CROP + 1, (2,), generator=generator).tolist()
            pixels = pixels[..., top : top + CROP, left : left + CROP].contiguous(memory_format=torch.channels_last)
        with autocast(args.device):
            posterior = vae.encode(pixels).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(args.device)
            decoded = vae.decode(posterior.mean + posterior.std * noise).sample
        loss = reconstruction_loss(decoded.float(), pixels) + KL_WEIGHT * posterior.kl().mean()
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args.steps, args.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        update_average(average, vae, step, 0.998)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(step + 1)


if __name__ == "__main__":
    main()
