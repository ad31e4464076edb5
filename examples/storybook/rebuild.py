# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Make Storybook from nothing: every stage in order, each resumed where it was interrupted.

    python examples/storybook/rebuild.py [--xl] [--work_dir DIR] [--device cuda]

A stage that is complete is skipped. Only the last ones, export and check, write into the repository. `--xl` goes on to
the SDXL-shaped model, which grows out of the other.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path


HERE = Path(__file__).resolve().parent
# name of the stage's output -> (command, whether it takes the options of training)
STAGES = {
    "vae": ("train_vae.py", True),
    "clip_model": ("train_clip.py", True),
    "clip_tuned": (
        "train_clip.py --initial clip_model --lock_text --output clip_tuned"
        " --degraded 0.4 --steps 1500 --learning_rate 6e-4",
        True,
    ),
    "unet": ("train_unet.py", True),
    "guide": ("train_classifier.py --model guide", True),
    "emo_b": ("train_classifier.py --model emo_b --steps 1000", True),
    "emo_c": ("train_classifier.py --model emo_c --steps 700", True),
    "clip_b": ("train_clip.py --seed 1 --output clip_b --degraded 0.3 --steps 1500", True),
    "calibration": ("calibrate.py", False),
    "export": ("export.py", False),
    "check": ("check.py", False),
}
STAGES_XL = {
    "clip_xl": ("train_clip.py --xl --seed 2 --output clip_xl --degraded 0.3 --steps 700", True),
    "unet_xl": ("train_unet.py --xl --steps 1200 --learning_rate 5e-4 --average_decay 0.99", True),
    "calibration_xl": ("calibrate.py --xl", False),
    "export_xl": ("export.py --xl", False),
    "check_xl": ("check.py --xl", False),
}


def is_complete(work_dir: Path, name: str, stage: str) -> bool:
    """Whether a training stage has left its note that it is done."""
    note = work_dir / f"{name}_done.json"
    return note.exists() and json.loads(note.read_text())["stage"] == stage


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "storybook")
    parser.add_argument("--device", help="passed to the stages that train; they choose by themselves otherwise")
    parser.add_argument("--xl", action="store_true", help="then make the SDXL-shaped model as well")
    args = parser.parse_args()
    args.work_dir.mkdir(parents=True, exist_ok=True)
    for name, (stage, trains) in (STAGES | (STAGES_XL if args.xl else {})).items():
        if trains and is_complete(args.work_dir, name, stage):
            continue
        script, *options = stage.split()
        command = [sys.executable, str(HERE / script), *options]
        if script != "check.py":  # it looks at what was exported
            command += ["--work_dir", str(args.work_dir)]
        if trains:
            command += ["--resume", *(["--device", args.device] if args.device else [])]
        subprocess.run(command, check=True)
        if trains:
            (args.work_dir / f"{name}_done.json").write_text(json.dumps({"stage": stage}) + "\n")


if __name__ == "__main__":
    main()
