# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Stage 1b: sharpen the autoencoder's decoder on the latents that the diffusion model learns.

The encoder, and with it the latent space, stays as it is. Writes `vae_tuned/` into the work folder.
"""

import copy

import numpy as np
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
from train_unet import load_latents
from train_vae import CROP, CROP_SHARE, reconstruction_loss
from world import contact_sheet


NOISE = 0.05  # on the scaled latents: samples of the diffusion model are never exact


def main():
    args = arguments(__doc__, steps=4000, batch_size=16, learning_rate=8e-4).parse_args()
    torch.manual_seed(args.seed)
    _, pictures = load_set("world", args.work_dir)
    _, held_out = load_set("world_held_out", args.work_dir)
    checkpoint = args.work_dir / "vae_tuned.pt"

    average = AutoencoderKL.from_pretrained(args.work_dir / "vae").to(args.device).eval().requires_grad_(False)
    latents_of = load_latents(args, average, pictures)
    decoder = torch.nn.Sequential(copy.deepcopy(average.post_quant_conv), copy.deepcopy(average.decoder))
    decoder = decoder.train().requires_grad_(True).to(memory_format=torch.channels_last)
    ours = torch.nn.Sequential(average.post_quant_conv, average.decoder)
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    start = 0
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, model=decoder, average=average, optimizer=optimizer)

    def save(step: int):
        save_checkpoint(checkpoint, step, model=decoder, average=average, optimizer=optimizer)
        average.save_pretrained(args.work_dir / "vae_tuned")
        pixels = to_pixels(held_out[:128], args.device)
        with torch.no_grad():
            decoded = average.decode(average.encode(pixels).latent_dist.mean).sample
        psnr = -10 * torch.log10(F.mse_loss(decoded.clamp(-1, 1), pixels) / 4).item()
        rows = [picture for pair in zip(held_out[:32], to_pictures(decoded[:32])) for picture in pair]
        contact_sheet([Image.fromarray(np.array(row)) for row in rows], 16).save(args.work_dir / "vae_tuned.png")
        save_json(args.work_dir / "vae_tuned_log.json", {"step": step, "psnr": psnr})

    bar = progress(start, args.steps, "vae_tuned")
    for step in bar:
        generator = generator_of(args.seed + 11, step)
        chosen = torch.randint(len(pictures), (args.batch_size,), generator=generator)
        pixels, latents = to_pixels(pictures[chosen.numpy()], args.device), latents_of[chosen].float()
        latents = latents + NOISE * torch.randn(latents.shape, generator=generator)
        if step < CROP_SHARE * args.steps:
            factor = pixels.shape[-1] // latents.shape[-1]
            size = CROP // factor
            top, left = torch.randint(latents.shape[-1] - size + 1, (2,), generator=generator).tolist()
            latents = latents[..., top : top + size, left : left + size]
            top, left = top * factor, left * factor
            pixels = pixels[..., top : top + CROP, left : left + CROP]
        latents = (
            (latents / average.config.scaling_factor).to(args.device).contiguous(memory_format=torch.channels_last)
        )
        with autocast(args.device):
            decoded = decoder(latents)
        loss = reconstruction_loss(decoded.float(), pixels)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args.steps, args.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(decoder.parameters(), 1.0)
        optimizer.step()
        update_average(ours, decoder, step, 0.998)
        bar.set_postfix(loss=f"{loss.item():.4f}", refresh=False)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(step + 1)


if __name__ == "__main__":
    main()
