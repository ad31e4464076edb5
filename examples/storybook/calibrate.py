# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Choose the threshold of the semantic gate for this world's CLIP.

Samples neutral prompts as the stock pipeline does (DDIM, guidance 7.5; with `--xl` 5.0), measures the similarity of
the prompt and the one-step preview of x0 at each step, `logit_scale.exp() * cos`, and picks the value that most
samples pass within a given share of the steps. Writes `calibration.json` (`calibration_xl.json`) and a plot of the
curves.
"""

import argparse
import tempfile
from pathlib import Path

import matplotlib
import torch
from common import encode, normalise, save_json
from diffusers import AutoencoderKL, UNet2DConditionModel
from torch.nn import functional as F
from train_clip import text_features
from train_unet import TIME_IDS, Conditions, ConditionsXL, build_scheduler, second_tokenizer, text_encoder_of
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from world import PLACES, SUBJECTS, content_prompt


matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402


@torch.no_grad()
def similarity_curves(work_dir: Path, prompts: list[str], steps: int, xl: bool, device: str = "cpu") -> torch.Tensor:
    """Similarities of the previews with their prompts, (steps, prompts)."""
    unet = UNet2DConditionModel.from_pretrained(work_dir / ("unet_xl" if xl else "unet")).to(device).eval()
    vae = AutoencoderKL.from_pretrained(work_dir / "vae").to(device).eval()
    clip = CLIPModel.from_pretrained(work_dir / "clip_tuned").to(device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(work_dir / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(work_dir / "text_encoder").to(device).eval()
    scheduler = build_scheduler()
    guidance, added = 7.5, None
    if xl:
        tokenizer_2 = second_tokenizer(work_dir / "tokenizer")
        clip_xl = CLIPModel.from_pretrained(work_dir / "clip_xl").to(device)
        encoder_2 = text_encoder_of(clip_xl, CLIPTextModelWithProjection).to(device)
        conditions = ConditionsXL(tokenizer, encoder, tokenizer_2, encoder_2, device, 0.0)
        states, pooled = conditions.encoded(conditions.ids(prompts))
        states, pooled = (torch.cat([torch.zeros_like(values), values]) for values in (states, pooled))
        time_ids = torch.tensor([TIME_IDS] * len(pooled), device=device)
        guidance, added = 5.0, {"text_embeds": pooled, "time_ids": time_ids}
    else:
        states = Conditions(tokenizer, encoder, device, 0.0).hidden([""] * len(prompts) + prompts)
    words = text_features(clip, encode(tokenizer, prompts))
    latents = torch.randn((len(prompts), unet.config.in_channels, 16, 16), generator=torch.Generator().manual_seed(0))
    latents = latents.to(device)
    scheduler.set_timesteps(steps, device=device)
    curves = []
    for t in scheduler.timesteps:
        null, conditional = unet(torch.cat([latents] * 2), t, states, added_cond_kwargs=added).sample.chunk(2)
        noise = null + guidance * (conditional - null)
        alpha = scheduler.alphas_cumprod[t]
        preview = (latents - (1 - alpha).sqrt() * noise) / alpha.sqrt()
        image = vae.decode(preview / vae.config.scaling_factor).sample.clamp(-1, 1)
        features = F.normalize(clip.get_image_features(normalise(image)).pooler_output, dim=-1)
        curves.append(clip.logit_scale.exp() * (features * words).sum(-1))
        latents = scheduler.step(noise, t, latents).prev_sample
    return torch.stack(curves).cpu()


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "storybook")
    parser.add_argument(
        "--share", type=float, default=0.3, help="share of the steps by which most gates are to be open"
    )
    parser.add_argument("--open", type=float, default=0.75, help="how many gates are most")
    parser.add_argument("--xl", action="store_true", help="for the SDXL-shaped model")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    name = "calibration_xl" if args.xl else "calibration"
    prompts = [
        content_prompt(place, subject)
        for k, place in enumerate(PLACES)
        for j, subject in enumerate(SUBJECTS)
        if (j + k) % 2 == 0
    ]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    thresholds = {}
    for axis, steps in zip(axes, (20, 50)):
        curves = similarity_curves(args.work_dir, prompts, steps, args.xl, args.device)
        # The gate latches, so what counts is the highest similarity so far.
        reached = curves.cummax(0).values[: max(1, round(args.share * steps))]
        thresholds[steps] = reached[-1].quantile(1 - args.open).item()
        axis.plot(curves, color="#3a6ea5", alpha=0.15, linewidth=0.8)
        axis.plot(curves.median(1).values, color="#b03a2e", linewidth=2)
        axis.axvline(args.share * steps, color="grey", linestyle=":")
        axis.set(title=f"{steps} steps", xlabel="step")
    threshold = round(sum(thresholds.values()) / len(thresholds), 1)
    for axis in axes:
        axis.axhline(threshold, color="grey", linestyle="--")
    axes[0].set_ylabel("similarity of preview and prompt")
    figure.tight_layout()
    figure.savefig(args.work_dir / f"{name}.png", dpi=90)
    save_json(args.work_dir / f"{name}.json", {"semantic_threshold": threshold, "by_steps": thresholds})


if __name__ == "__main__":
    main()
