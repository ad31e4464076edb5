# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Distils a tiny decoder from the VAE of this repository's checkpoint, for previews: `preview_vae` of `MusePipeline`.

It is fitted to the VAE's own pictures of three kinds of latents, in equal parts: of drawings, of drawings with noise,
and one-step previews as the inner loop decodes them. Writes `preview_vae/`, an `AutoencoderTiny` whose encoder is left
untrained since no preview needs it, and a sheet of the VAE's pictures above its own.
"""

import copy
import random

import numpy as np
import repository  # noqa: F401
import torch
from common import (
    CHANNELS,
    ROOT,
    arguments,
    autocast,
    generator_of,
    learning_rate_at,
    load_checkpoint,
    numbers_of,
    progress,
    save_checkpoint,
    save_json,
    scene_of,
    show_loss,
    to_pictures,
    to_pixels,
    update_average,
)
from diffusers import AutoencoderTiny
from muse_examples.metrics import psnr
from PIL import Image
from train_vae import reconstruction_loss
from world import caption, contact_sheet, render

from pipeline_muse import MusePipeline, predict_x0, signal_level


KINDS = ("drawings", "noisy drawings", "previews")
STEPS, GUIDANCE = 20, 7.5  # of the runs that the previews are from
HELD_OUT = 64  # latents of each kind
WIDTH = 24


def build_preview_vae() -> AutoencoderTiny:
    """Latents come as the UNet has them, so the scaling factor is 1, as TAESD's."""
    channels = (WIDTH,) * 4
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(2, 2, 1, 1),
        latent_channels=CHANNELS,
        scaling_factor=1.0,
    )


def drawn_latents(pipe: MusePipeline, indices: range) -> torch.Tensor:
    """Latents of the world's drawings, (count, channels, 16, 16), as the UNet has them."""
    size = pipe.vae.config.sample_size
    pixels = to_pixels(
        np.stack([np.asarray(render(scene_of("world", index), size)) for index in indices]), pipe.device
    )
    means = [pipe.vae.encode(part).latent_dist.mean for part in pixels.split(64)]
    return torch.cat(means) * pipe.vae.config.scaling_factor


def preview_latents(pipe: MusePipeline, indices: range) -> torch.Tensor:
    """One-step previews of all steps of stock runs, (count * STEPS, channels, 16, 16), with captions of the world."""
    prompts = [caption(scene_of("world", index), random.Random(index)) for index in indices]
    embeds, null_embeds = pipe.encode_prompt(prompts, pipe.device, 1, True)
    shape = (len(prompts), pipe.unet.config.in_channels, 16, 16)
    latents = torch.randn(shape, generator=generator_of(0, indices.start)).to(embeds)
    pipe.scheduler.set_timesteps(STEPS, device=pipe.device)
    previews = []
    for t in pipe.scheduler.timesteps:
        noise = pipe.unet(torch.cat([latents] * 2), t, torch.cat([null_embeds, embeds])).sample
        noise = torch.lerp(*noise.chunk(2), GUIDANCE)
        previews.append(predict_x0(latents, noise, signal_level(pipe.scheduler, t), "epsilon"))
        latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return torch.stack(previews, dim=1).flatten(0, 1)


@torch.no_grad()
def examples_of(pipe: MusePipeline, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Latents (kinds, count, channels, 16, 16), and the VAE's pictures of them (kinds, count, 3, size, size)."""
    drawn = drawn_latents(pipe, range(count))
    generator = generator_of(0, 0)
    levels = 0.6 * torch.rand((count, 1, 1, 1), generator=generator)
    noisy = drawn + (levels * torch.randn(drawn.shape, generator=generator)).to(drawn)
    runs = [preview_latents(pipe, range(k, min(k + 16, count // STEPS))) for k in range(0, count // STEPS, 16)]
    latents = torch.stack([drawn, noisy, torch.cat(runs)])
    pixels = [
        pipe.vae.decode(part / pipe.vae.config.scaling_factor).sample for part in latents.flatten(0, 1).split(64)
    ]
    return latents, torch.cat(pixels).unflatten(0, latents.shape[:2])


def main():
    parser = arguments(__doc__, steps=1200, batch_size=16, learning_rate=3e-3)
    parser.add_argument("--examples", type=int, default=1280, help=f"latents of each kind, a multiple of {STEPS}")
    args = parser.parse_args()
    if args.examples % STEPS or args.examples <= HELD_OUT:
        parser.error(f"--examples has to be a multiple of {STEPS} above {HELD_OUT}, but is {args.examples}")
    args.work_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pipe = MusePipeline.from_pretrained(ROOT, trust_remote_code=True).to(args.device)
    latents, pixels = examples_of(pipe, args.examples)
    held_out, shown = latents[:, -HELD_OUT:], pixels[:, -HELD_OUT:]
    latents, pixels = (values[:, :-HELD_OUT].flatten(0, 1) for values in (latents, pixels))

    tiny = build_preview_vae().to(args.device, memory_format=torch.channels_last)
    average = copy.deepcopy(tiny).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(tiny.decoder.parameters(), lr=args.learning_rate, betas=(0.9, 0.99))
    folder, checkpoint = args.work_dir / "preview_vae", args.work_dir / "preview_vae.checkpoint"
    start = 0
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, model=tiny, average=average, optimizer=optimizer)

    def save(step: int):
        save_checkpoint(checkpoint, step, model=tiny, average=average, optimizer=optimizer)
        average.save_pretrained(folder)
        with torch.no_grad():
            decoded = torch.stack([average.decode(part).sample for part in held_out])
        save_json(
            args.work_dir / "preview_vae_log.json",
            {"step": step, "psnr": {kind: psnr(*pair) for kind, *pair in zip(KINDS, decoded, shown)}},
        )
        rows = [row for kind in range(len(KINDS)) for row in (shown[kind, ::4], decoded[kind, ::4])]
        pictures = [Image.fromarray(picture) for row in rows for picture in to_pictures(row)]
        contact_sheet(pictures, HELD_OUT // 4, scale=1).save(args.work_dir / "preview_vae.png")

    bar = progress(start, args.steps, "preview_vae")
    for step in bar:
        chosen = numbers_of(args.seed, step).integers(len(latents), size=args.batch_size)
        with autocast(args.device):
            decoded = tiny.decode(latents[chosen]).sample
        loss = reconstruction_loss(decoded.float(), pixels[chosen])
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args.steps, args.learning_rate, warmup=100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(tiny.decoder.parameters(), 1.0)
        optimizer.step()
        update_average(average, tiny, step, 0.99)
        show_loss(bar, step, loss)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(step + 1)


if __name__ == "__main__":
    main()
