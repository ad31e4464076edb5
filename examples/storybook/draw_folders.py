# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Draws labelled scenes of Storybook as image folders, `<split>/<emotion>/*.png` with captions in `metadata.jsonl`:
data for `examples/train_emotion_classifier.py`, or for any other program that trains on image folders."""

import argparse
import json
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from tqdm import tqdm
from world import EMOTIONS, STYLES, caption, render, sample_scene


def draw(folder: Path, split: str, emotion: str, count: int, style: str) -> None:
    """Draws the scenes of one emotion; which, only split, emotion, style and their number decide."""
    target = folder / split / emotion
    target.mkdir(parents=True, exist_ok=True)
    lines = []
    for number in range(count):
        rng = random.Random(f"storybook/folders/{split}/{emotion}/{style}/{number}")
        scene = sample_scene(rng, emotion=emotion, style=style)
        name = f"{emotion}_{number:05}.png"
        render(scene).save(target / name)
        lines.append(json.dumps({"file_name": name, "caption": caption(scene, rng, kind="full")}) + "\n")
    (target / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--train", type=int, default=300, help="scenes per emotion. Default: %(default)s")
    parser.add_argument("--validation", type=int, default=60, help="scenes per emotion. Default: %(default)s")
    parser.add_argument("--test", type=int, default=60, help="scenes per emotion. Default: %(default)s")
    parser.add_argument("--style", choices=STYLES, default=STYLES[0])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    counts = {"train": args.train, "validation": args.validation, "test": args.test}
    with ProcessPoolExecutor(args.workers) as pool:
        jobs = [
            pool.submit(draw, args.output_dir, split, emotion, count, args.style)
            for split, count in counts.items()
            if count > 0
            for emotion in EMOTIONS
        ]
        for job in tqdm(jobs, desc="drawing"):
            job.result()


if __name__ == "__main__":
    main()
