# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Make Storybook from nothing: every stage in order, each resumed where it was interrupted.

    python examples/storybook/rebuild.py [--keep | --further] [--xl] [--work_dir DIR] [--device cuda] [--bfloat16]
        [--steps STEPS] [--batch_size SIZE] [--export_to DIR]

A stage that is complete is skipped. `--steps` and `--batch_size` are those of the diffusion model, which takes nearly
all of the time. `--keep` takes tokenizer, CLIP, guide and judges from the repository, where they need no change, and
trains the autoencoder and the diffusion model only. `--further` takes the autoencoder as well, and trains the
repository's diffusion model on, with other noise, in a work folder of its own. `--xl` goes on to the SDXL-shaped
model, which grows out of the other. Only the export writes into the repository, or into `--export_to`; the check
writes into the work folder.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
# name of the stage's output -> the command
TRAINED = {
    "vae": "train_vae.py",
    "clip_model": "train_clip.py",
    "clip_tuned": "train_clip.py --initial clip_model --lock_text --output clip_tuned"
    " --degraded 0.4 --steps 1500 --learning_rate 6e-4",
    "unet": "train_unet.py",
    "vae_decoder": "train_vae.py --decoder --steps 600 --learning_rate 1e-3",
    "guide": "train_classifier.py --model guide",
    "emo_b": "train_classifier.py --model emo_b --steps 1000",
    "emo_c": "train_classifier.py --model emo_c --steps 700",
    "clip_b": "train_clip.py --seed 1 --output clip_b --degraded 0.3 --steps 1500",
    "clip_b_tuned": "train_clip.py --seed 4 --initial clip_b --output clip_b_tuned --degraded 0.3 --steps 3000"
    " --learning_rate 8e-4",
}
TRAINED_XL = {
    "clip_xl": "train_clip.py --xl --seed 2 --output clip_xl --degraded 0.3 --steps 700",
    "unet_xl": "train_unet.py --xl --steps 800 --learning_rate 5e-4 --average_decay 0.99",
}
KEPT = ("clip_model", "clip_tuned", "guide", "emo_b", "emo_c", "clip_b", "clip_b_tuned")  # by --keep
KEPT_FURTHER = (*KEPT, "vae", "vae_decoder")  # by --further
# folder in the work folder -> the repository's that stands for it; the judges are read where they are
COPIED = {
    "tokenizer": "tokenizer",
    "guide": "emotion_classifier",
    "clip_model": "clip_model",
    "clip_tuned": "clip_model",
}
COPIED_FURTHER = {**COPIED, "vae": "vae", "unet_initial": "unet"}


def keep(work_dir: Path, folders: dict[str, str]):
    """Take from the repository what is not trained."""
    for name, folder in folders.items():
        shutil.copytree(HERE.parents[1] / folder, work_dir / name, dirs_exist_ok=True)


def run(stage: str, *options: str):
    script, *own = stage.split()
    subprocess.run([sys.executable, str(HERE / script), *own, *options], check=True)


def train(stages: dict[str, str], args: argparse.Namespace):
    """Run the stages that are not complete, each from where it was interrupted, and note that they are done."""
    for name, stage in stages.items():
        if name == "unet":
            stage += f" --steps {args.steps}" if args.steps else ""
            stage += f" --batch_size {args.batch_size}" if args.batch_size else ""
            stage += " --initial unet_initial --seed 1" if args.further else ""
        note = args.work_dir / f"{name}_done.json"
        if note.exists() and json.loads(note.read_text())["stage"] == stage:
            continue
        options = ["--device", args.device] if args.device else []
        options += ["--bfloat16"] if args.bfloat16 else []
        run(stage, "--work_dir", str(args.work_dir), "--resume", *options)
        note.write_text(json.dumps({"stage": stage}) + "\n")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "storybook")
    parser.add_argument("--export_to", type=Path, default=HERE.parents[1], help="the repository's root by default")
    parser.add_argument("--device", help="passed to the stages that train; they choose by themselves otherwise")
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16: measure whether that is faster")
    parser.add_argument("--steps", type=int, help="of the diffusion model")
    parser.add_argument("--batch_size", type=int, help="of the diffusion model")
    start = parser.add_mutually_exclusive_group()
    start.add_argument("--keep", action="store_true", help="take all but autoencoder and diffusion model as they are")
    start.add_argument("--further", action="store_true", help="train the diffusion model of the repository on")
    parser.add_argument("--xl", action="store_true", help="then make the SDXL-shaped model as well")
    args = parser.parse_args()
    other = args.work_dir / ("vae_done.json" if args.further else "unet_initial")
    if other.exists():  # its latents and checkpoints are of another autoencoder
        parser.error(
            f"give another --work_dir: {other} is of a training {'without' if args.further else 'with'} --further"
        )
    args.work_dir.mkdir(parents=True, exist_ok=True)
    kept: tuple[str, ...] = ()
    if args.further:
        kept = KEPT_FURTHER
        keep(args.work_dir, COPIED_FURTHER)
    elif args.keep:
        kept = KEPT
        keep(args.work_dir, COPIED)
    train({name: stage for name, stage in TRAINED.items() if name not in kept}, args)
    run("calibrate.py", "--work_dir", str(args.work_dir))
    run("export.py", "--work_dir", str(args.work_dir), "--output", str(args.export_to))
    run("check.py", "--root", str(args.export_to), "--output", str(args.work_dir / "check"))
    if args.xl:
        train(TRAINED_XL, args)
        run("calibrate.py --xl", "--work_dir", str(args.work_dir))
        run("export.py --xl", "--work_dir", str(args.work_dir), "--output", str(args.export_to))


if __name__ == "__main__":
    main()
