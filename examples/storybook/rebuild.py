# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Make Storybook from nothing: every stage in order, each resumed where it was interrupted.

    python examples/storybook/rebuild.py [--keep | --further] [--xl] [--work_dir DIR] [--device cuda] [--bfloat16]
        [--large] [--steps STEPS] [--batch_size SIZE] [--jobs JOBS] [--export_to DIR]

A stage that is complete is skipped. `--large` is for a GPU: more steps, of larger batches. `--steps` and
`--batch_size` are those of the diffusion model, which takes nearly all of the time. `--jobs` stages run at once, each
as soon as those that it builds on are complete; a GPU has room for all. `--keep` takes tokenizer, CLIP, guide and
judges from the repository, where they need no change, and trains the autoencoder and the diffusion model only.
`--further` takes the autoencoder as well, and trains the repository's diffusion model on, with other noise, in a work
folder of its own. `--xl` goes on to the SDXL-shaped model, which grows out of the other. Only the export writes into
the repository, or into `--export_to`; the check writes into the work folder.
"""

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path


HERE = Path(__file__).resolve().parent
# name of the stage's output -> the command, and the stages that it builds on
TRAINED = {
    "pictures": ("draw_pictures.py", ()),
    "vae": ("train_vae.py", ("pictures",)),
    "clip_model": ("train_clip.py", ("pictures",)),
    "clip_b": ("train_clip.py --seed 1 --output clip_b --degraded 0.3 --steps 1500", ("pictures",)),
    "unet": ("train_unet.py", ("vae", "clip_model")),
    "vae_decoder": ("train_vae.py --decoder --steps 600 --learning_rate 1e-3", ("vae",)),
    "clip_tuned": (
        "train_clip.py --initial clip_model --lock_text --output clip_tuned --degraded 0.4 --steps 1500"
        " --learning_rate 6e-4",
        ("clip_model",),
    ),
    "clip_b_tuned": (
        "train_clip.py --seed 4 --initial clip_b --output clip_b_tuned --degraded 0.3 --steps 3000"
        " --learning_rate 8e-4",
        ("clip_b",),
    ),
    "emo_c": ("train_classifier.py --model emo_c --steps 700", ("clip_model",)),
    "guide": ("train_classifier.py --model guide", ("unet", "vae_decoder")),
    "emo_b": ("train_classifier.py --model emo_b --steps 1000", ("guide",)),  # on its previews
}
TRAINED_XL = {
    "clip_xl": ("train_clip.py --xl --seed 2 --output clip_xl --degraded 0.3 --steps 700", ("pictures",)),
    "unet_xl": ("train_unet.py --xl --steps 800 --learning_rate 5e-4 --average_decay 0.99", ("unet", "clip_xl")),
}
# stage -> what it is trained with instead where `--large` is given
LARGE = {
    "vae": "--steps 3000 --batch_size 128",
    "clip_model": "--steps 2200 --batch_size 256 --save_every 2500",
    "unet": "--steps 5000 --batch_size 512 --save_every 5000",
    "clip_tuned": "--batch_size 256 --save_every 1500",
    "clip_b": "--batch_size 128",
    "clip_b_tuned": "--batch_size 128",
    "emo_c": "--steps 1500",
    "vae_decoder": "--steps 1500 --batch_size 64",
    "clip_xl": "--steps 1500 --batch_size 128",
    "unet_xl": "--steps 1200 --batch_size 512 --average_decay 0.995 --save_every 1200",
}
KEPT = ("pictures", "clip_model", "clip_tuned", "guide", "emo_b", "emo_c", "clip_b", "clip_b_tuned")  # by --keep
KEPT_FURTHER = (*KEPT, "vae", "vae_decoder")  # by --further
# folder in the work folder -> the repository's that stands for it; the judges are read where they are
COPIED = {
    "tokenizer": "tokenizer",
    "guide": "emotion_classifier",
    "clip_model": "clip_model",
    "clip_tuned": "clip_model",
}
COPIED_FURTHER = {**COPIED, "vae": "vae", "unet_initial": "unet", "text_encoder_initial": "text_encoder"}


def keep(work_dir: Path, folders: dict[str, str]):
    """Take from the repository what is not trained."""
    for name, folder in folders.items():
        shutil.copytree(HERE.parents[1] / folder, work_dir / name, dirs_exist_ok=True)


def run(stage: str, *options: str):
    script, *own = stage.split()
    subprocess.run([sys.executable, str(HERE / script), *own, *options], check=True)


def command_of(name: str, stage: str, args: argparse.Namespace) -> str:
    """The command of a stage as the options want it; of an option given twice, the last counts."""
    stage += f" {LARGE[name]}" if args.large and name in LARGE else ""
    if name == "unet":
        stage += f" --steps {args.steps}" if args.steps else ""
        stage += f" --batch_size {args.batch_size}" if args.batch_size else ""
        stage += " --initial unet_initial --seed 1" if args.further else ""
    return stage


def train(stages: dict[str, tuple[str, tuple[str, ...]]], args: argparse.Namespace, *options: str):
    """Run the stages that are not complete, each from where it was interrupted, and note that they are done."""

    def stage_after(name: str, stage: str, before: list[Future]):
        for other in before:
            other.result()  # raises what went wrong there
        note = args.work_dir / f"{name}_done.json"
        if note.exists() and json.loads(note.read_text())["stage"] == stage:
            return
        run(stage, "--work_dir", str(args.work_dir), "--resume", *options)
        note.write_text(json.dumps({"stage": stage}) + "\n")

    # Stages come after those that they build on, so that however few run at once, one of them can.
    begun: dict[str, Future] = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for name, (stage, needs) in stages.items():
            before = [begun[need] for need in needs if need in begun]
            begun[name] = pool.submit(stage_after, name, command_of(name, stage, args), before)
        for stage in begun.values():
            stage.result()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "storybook")
    parser.add_argument("--export_to", type=Path, default=HERE.parents[1], help="the repository's root by default")
    parser.add_argument("--device", help="passed to the stages that train; they choose by themselves otherwise")
    parser.add_argument("--bfloat16", action="store_true", help="train in bfloat16: measure whether that is faster")
    parser.add_argument("--steps", type=int, help="of the diffusion model")
    parser.add_argument("--batch_size", type=int, help="of the diffusion model")
    parser.add_argument("--large", action="store_true", help="train longer with larger batches, on a GPU")
    parser.add_argument("--jobs", type=int, default=1, help="stages at once")
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
    stages = TRAINED | (TRAINED_XL if args.xl else {})
    device = ("--device", args.device) if args.device else ()
    precision = ("--bfloat16",) if args.bfloat16 else ()
    train({name: stage for name, stage in stages.items() if name not in kept}, args, *device, *precision)
    for xl in ("", " --xl") if args.xl else ("",):
        run(f"calibrate.py{xl}", "--work_dir", str(args.work_dir), *device)
        run(f"export.py{xl}", "--work_dir", str(args.work_dir), "--output", str(args.export_to))
    run("check.py", "--root", str(args.export_to), "--output", str(args.work_dir / "check"), *device)


if __name__ == "__main__":
    main()
