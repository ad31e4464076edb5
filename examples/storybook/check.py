# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Sample a checkpoint as it is, without MUSE, and let networks that it never saw say how well it draws.

- Samples of each of the 64 contents, ranked among all 64 prompts by the held-out CLIP.
- Eight contents with the cues of each emotion named, and with the word of the emotion, which the judges recognise.
- Samples of captions of held-out drawings against such drawings: the Fréchet distance of the held-out CLIP's features.
  It is biased for few pictures, so compare it at equal `--pictures` only, and to that of as many other drawings.
- The autoencoder on held-out drawings.
- Ten samples between the ten drawings whose captions they follow; the JSON file says which are which.

What the networks say of drawings of the same contents and cues stands beside it: they err as well, and a perfect
diffusion model would get no more.

Writes sheets and a JSON file. With `--xl` the same for the SDXL-shaped checkpoint.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from assemble_xl import assemble
from common import ROOT, frechet_distance, normalise, save_json, scene_of, to_pixels
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    DiffusionPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from judges import load_judge
from muse_examples.metrics import psnr
from PIL import Image
from torch.nn import functional as F
from train_clip import rank_content
from train_vae import reconstructed
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer
from world import (
    CUE_PHRASES,
    CUES,
    EMOTIONS,
    PLACES,
    SUBJECTS,
    Scene,
    caption,
    contact_sheet,
    content_prompt,
    contents,
    render,
)


PAIRS = [(place, subject) for place in PLACES for subject in SUBJECTS]
CONTENTS = contents()
CUE_OF = {phrase: cue for cue, phrases in CUE_PHRASES.items() for phrase in phrases}
BATCH = 32  # pictures at once
BETWEEN = 10  # samples and drawings of the sheet of both


def load_stock(root: Path, xl: bool = False) -> tuple[DiffusionPipeline, torch.nn.Module, CLIPModel]:
    """The stock pipeline of a checkpoint, its guide and its CLIP."""
    if xl:
        with tempfile.TemporaryDirectory() as scratch:
            muse = DiffusionPipeline.from_pretrained(assemble(Path(scratch) / "xl"), trust_remote_code=True)
        return StableDiffusionXLPipeline.from_pipe(muse), muse.emotion_classifier, muse.clip_model
    from train_classifier import SimEmoForImageClassification

    pipe = StableDiffusionPipeline(
        AutoencoderKL.from_pretrained(root / "vae"),
        CLIPTextModel.from_pretrained(root / "text_encoder"),
        CLIPTokenizer.from_pretrained(root / "tokenizer"),
        UNet2DConditionModel.from_pretrained(root / "unet"),
        DDIMScheduler.from_pretrained(root / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    guide = SimEmoForImageClassification.from_pretrained(root / "emotion_classifier").eval()
    return pipe, guide, CLIPModel.from_pretrained(root / "clip_model").eval()


def pixels_of(images: list[Image.Image], device: torch.device) -> torch.Tensor:
    return to_pixels(np.stack([np.asarray(image) for image in images]), device)


@torch.no_grad()
def features_of(clip: CLIPModel, images: list[Image.Image]) -> torch.Tensor:
    """CLIP's features of pictures on the unit sphere, (count, dim)."""
    pixels = pixels_of(images, clip.device)
    return F.normalize(clip.get_image_features(normalise(pixels)).pooler_output, dim=-1).cpu()


def held_out(indices: range, size: int) -> list[Image.Image]:
    return [render(scene_of("world_held_out", k), size) for k in indices]


def captions(indices: range) -> list[str]:
    """Captions of content and cues of held-out scenes."""
    return [caption(scene_of("world_held_out", k), random.Random(f"check/{k}"), "full") for k in indices]


def drawn(place: str, subject: str, rng: random.Random, size: int, phrase: str | None = None) -> Image.Image:
    """A drawing of nothing but what a prompt names: a content, and the cue that `phrase` stands for."""
    cues = ((CUE_OF[phrase], rng.uniform(0.6, 1)),) if phrase else ()
    colour = rng.choice(SUBJECTS[subject][1])
    return render(Scene(place, subject, colour, cues=cues, seed=rng.getrandbits(32)), size)


def shares(right: torch.Tensor) -> dict:
    """How many samples of contents, (rounds * 64) in the order of CONTENTS, are right: in all and by subject."""
    by_subject = right.float().view(-1, len(PLACES), len(SUBJECTS)).mean((0, 1)).tolist()
    return {"first_of_64": right.float().mean().item(), "by_subject": dict(zip(SUBJECTS, by_subject))}


def mixed_sheet(drawings: list[Image.Image], samples: list[Image.Image]) -> tuple[Image.Image, list[int]]:
    """Drawings and samples in one sheet, in disorder, and the places of the samples, counted from 1."""
    order = random.Random(0).sample(range(len(drawings) + len(samples)), len(drawings) + len(samples))
    images = [(drawings + samples)[k] for k in order]
    return contact_sheet(images, 5, scale=1), [k + 1 for k, n in enumerate(order) if n >= len(drawings)]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the checkpoint to check")
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's own by default: 7.5, of XL 5.0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=2, help="samples of each content")
    parser.add_argument("--pictures", type=int, default=256, help="samples for the Fréchet distance")
    parser.add_argument("--reconstructed", type=int, default=256, help="drawings for the autoencoder")
    parser.add_argument("--xl", action="store_true", help="check the SDXL-shaped checkpoint")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    pipe, guide, clip = load_stock(args.root, args.xl)
    pipe.to(args.device).set_progress_bar_config(disable=True)
    suffix, size = "_xl" if args.xl else "", pipe.unet.config.sample_size * pipe.vae_scale_factor
    args.output.mkdir(parents=True, exist_ok=True)
    held_out_clip, result = load_judge("clip").to(args.device), {}

    def sample(prompts: list[str], seed: int) -> list[Image.Image]:
        generator = torch.Generator().manual_seed(seed)
        options = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
        parts = [prompts[k : k + BATCH] for k in range(0, len(prompts), BATCH)]
        return [
            image
            for part in parts
            for image in pipe(part, generator=generator, num_inference_steps=args.steps, **options).images
        ]

    rng, draw_rng = random.Random(args.seed), random.Random(args.seed)
    images = sample(CONTENTS * args.rounds, args.seed)
    contact_sheet(images[: len(CONTENTS)], 8, scale=1).save(args.output / f"samples{suffix}.png", optimize=True)
    drawings = [drawn(*pair, draw_rng, size) for pair in PAIRS * args.rounds]
    for name, model in (("held_out_clip", held_out_clip), ("clip", clip.to(args.device))):
        result[name] = {}
        for kind, values in (("samples", images), ("drawings", drawings)):
            first = rank_content(model, pipe.tokenizer, pixels_of(values, args.device)).argmax(1).cpu()
            result[name][kind] = shares(first == torch.arange(len(CONTENTS)).repeat(args.rounds))

    judges = {"guide": guide, "emo_b": load_judge("emo_b"), "emo_c": load_judge("emo_c")}
    judges = {name: judge.to(args.device) for name, judge in judges.items()}

    def recognised(images: list[Image.Image]) -> dict[str, float]:
        """How often each judge names the emotion of pictures in the order of the emotions."""
        truth = torch.arange(len(EMOTIONS)).repeat_interleave(len(images) // len(EMOTIONS))
        pixels = normalise(pixels_of(images, args.device))
        with torch.no_grad():
            answers = {name: judge(pixels).logits.argmax(1).cpu() for name, judge in judges.items()}
        return {name: (answer == truth).float().mean().item() for name, answer in answers.items()}

    chosen = list(zip(PLACES, rng.sample(tuple(SUBJECTS), len(PLACES))))
    asked = [(pair, rng.choice(CUES[emotion])) for emotion in EMOTIONS for pair in chosen]
    images = sample([f"{content_prompt(*pair)} {phrase}" for pair, phrase in asked], args.seed + 1)
    contact_sheet(images, 8, scale=1).save(args.output / f"samples_with_cues{suffix}.png", optimize=True)
    drawings = [drawn(*pair, draw_rng, size, phrase) for pair, phrase in asked]
    result["emotion_by_cue"] = {"samples": recognised(images), "drawings": recognised(drawings)}
    images = sample([f"{content_prompt(*pair)}, {emotion}" for emotion in EMOTIONS for pair in chosen], args.seed + 1)
    result["emotion_by_word"] = {"samples": recognised(images)}

    count = args.pictures
    images = sample(captions(range(max(count, BETWEEN))), args.seed + 2)
    sheet, places = mixed_sheet(held_out(range(BETWEEN), size), images[:BETWEEN])
    sheet.save(args.output / f"samples_between_drawings{suffix}.png", optimize=True)
    result["samples_between_drawings"] = places
    if count:
        truth = features_of(held_out_clip, held_out(range(count, 1024 + count), size))
        candidates = {"samples": images[:count], "drawings": held_out(range(count), size)}
        result["frechet_distance"] = {"pictures": count} | {
            name: 100 * frechet_distance(features_of(held_out_clip, values), truth)
            for name, values in candidates.items()
        }
    if args.reconstructed:
        pixels = pixels_of(held_out(range(args.reconstructed), size), args.device)
        result["autoencoder_psnr"] = psnr(reconstructed(pipe.vae, pixels)[1], pixels)
    save_json(args.output / f"check{suffix}.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
