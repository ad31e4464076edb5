# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Sample the exported model as it is, without MUSE, and let the judges say how well it follows its prompts.

One sample for each of the 64 contents, ranked among all 64 prompts by the held-out CLIP; then eight contents with the
cues of each emotion named, and with the word of the emotion, which the judges are to recognise. Writes two sheets and
a JSON file. With `--xl` the same for the SDXL-shaped checkpoint.
"""

import argparse
import json
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from assemble_xl import assemble
from common import ROOT, normalise, save_json, to_pixels
from diffusers import DiffusionPipeline
from judges import load_judge
from train_clip import rank_content
from world import CUES, EMOTIONS, PLACES, SUBJECTS, contact_sheet, content_prompt


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent / "results")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's own by default: 7.5, of XL 5.0")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--xl", action="store_true", help="check the SDXL-shaped checkpoint")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        base = assemble(Path(scratch) / "xl") if args.xl else ROOT
        pipe = DiffusionPipeline.from_pretrained(base, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    suffix = "_xl" if args.xl else ""

    def sample(prompts: list[str], seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        options = {} if args.guidance_scale is None else {"guidance_scale": args.guidance_scale}
        return pipe(prompts, generator=generator, num_inference_steps=args.steps, **options).images

    def pixels_of(images: list) -> torch.Tensor:
        return to_pixels(np.stack([np.asarray(image) for image in images]))

    contents = [content_prompt(place, subject) for place in PLACES for subject in SUBJECTS]
    images = sample(contents, args.seed)
    contact_sheet(images, 8, scale=1).save(args.output / f"samples{suffix}.png", optimize=True)
    ranks = {}
    for name, model in (("held_out_clip", load_judge("clip")), ("clip", pipe.clip_model)):
        ranks[name] = (rank_content(model, pipe.tokenizer, pixels_of(images)).argmax(1) == torch.arange(64)).float()

    rng = random.Random(args.seed)
    chosen = [content_prompt(place, subject) for place, subject in zip(PLACES, rng.sample(tuple(SUBJECTS), 8))]
    result = {name: {"first_of_64": values.mean().item()} for name, values in ranks.items()}
    result["held_out_clip"]["by_subject"] = {
        subject: ranks["held_out_clip"].view(8, 8).mean(0)[k].item() for k, subject in enumerate(SUBJECTS)
    }
    truth = torch.arange(8).repeat_interleave(8)
    judges = {"guide": pipe.emotion_classifier, "emo_b": load_judge("emo_b"), "emo_c": load_judge("emo_c")}
    for kind in ("cue", "word"):
        prompts = [
            f"{content} {rng.choice(CUES[emotion])}" if kind == "cue" else f"{content}, {emotion}"
            for emotion in EMOTIONS
            for content in chosen
        ]
        images = sample(prompts, args.seed + 1)
        if kind == "cue":
            contact_sheet(images, 8, scale=1).save(args.output / f"samples_with_cues{suffix}.png", optimize=True)
        with torch.no_grad():
            answers = {name: judge(normalise(pixels_of(images))).logits.argmax(1) for name, judge in judges.items()}
        result[f"emotion_by_{kind}"] = {name: (a == truth).float().mean().item() for name, a in answers.items()}
    save_json(args.output / f"check{suffix}.json", result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
