# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The tables of `examples/evaluate.py` on Storybook, with its own prompts, drawings and judges.

python examples/storybook/evaluate.py
python examples/storybook/evaluate.py --xl    # fewer rows, on the SDXL-shaped checkpoint
accelerate launch --multi_gpu --num_processes 2 examples/storybook/evaluate.py    # on two processes

Emo-A is the classifier that guides, so the honest accuracies are those of the judges Emo-B (another architecture) and
Emo-C (trained on another drawing style), which never guide. CLIP, and all features, are of a CLIP of their own, which
no pipeline sees. The first row are held-out drawings, of which only the judges had none: what they lose by mild
degradations is what an emotion that is there loses. All other options are those of `examples/evaluate.py`.
"""

import argparse
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import repository  # noqa: F401
from assemble_xl import FOLDER as XL
from assemble_xl import assemble
from filelock import FileLock
from muse_examples.evaluation.command import main as evaluate
from muse_examples.options import positive_int
from repository import ROOT
from test_sets import CLIP, JUDGES, SEED, pixels_of, write_drawings, write_prompts, write_references, write_sources


HERE = Path(__file__).resolve().parent
DRAWINGS = "drawings of the emotion, held out"
TABLES = ("generation", "editing", "terms", "thresholds")
FIGURES = ("generation_examples.png", "generation_features.png", "terms_inner_loop.png", "thresholds_curve.png")
COPIED = (*(f"{table}.{kind}" for table in TABLES for kind in ("md", "csv", "png")), *FIGURES)


def parse_args(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and those of `examples/evaluate.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=positive_int, default=8, help="prompts, each with all 8 emotions")
    parser.add_argument("--first_prompt", type=int, default=0, help="of the 62; other prompts are other pictures")
    parser.add_argument(
        "--sources", type=positive_int, default=4, help="drawings to edit, each towards all 8 emotions"
    )
    parser.add_argument("--drawings_of_each", type=positive_int, default=38, help="drawings of each emotion")
    parser.add_argument("--references", type=positive_int, default=1024, help="drawings that FID compares with")
    parser.add_argument("--xl", action="store_true", help="measure the SDXL-shaped checkpoint")
    parser.add_argument("--output_dir", type=Path, help="Default: outputs/evaluation, or outputs/evaluation_xl")
    parser.add_argument("--results_dir", type=Path, help="copy tables and figures there")
    args, rest = parser.parse_known_args(arguments)
    args.output_dir = args.output_dir or Path("outputs/evaluation_xl" if args.xl else "outputs/evaluation")
    return args, rest


def thresholds(xl: bool) -> list[str]:
    """η: always open, around the calibrated one, and never open."""
    index = XL / "index.json" if xl else ROOT / "model_index.json"
    eta = json.loads(index.read_text())["semantic_threshold"]
    between = [] if xl else [round(0.85 * eta, 1), eta, round(1.1 * eta, 1)]
    return [f"{value:g}" for value in (0, *between, float("inf"))]


def options(args: argparse.Namespace) -> list[str]:
    """What `examples/evaluate.py` is asked for."""
    data = args.output_dir / "data"
    base = assemble(args.output_dir / "base") if args.xl else ROOT
    pixels = pixels_of(base)
    rows = ["--edit_strengths", "0.75"] if args.xl else ["--edit_strengths", "0.5", "0.75", "1"]
    rows += ["--table", "generation", "editing", "thresholds"] + ([] if args.xl else ["terms"])
    rows += ["--presets", "full", "fast", "--thresholds", *thresholds(args.xl)]
    rows += [] if args.xl else ["--universal_guidance_weight", "5", "30"]
    asked = {
        "base": base,
        "captions": write_prompts(data / "prompts.txt", args.prompts, args.first_prompt),
        "images": write_sources(data / "sources", args.sources, pixels),
        "folder": f"{DRAWINGS}={write_drawings(data / 'drawings', args.drawings_of_each, pixels)}",
        "fid": f"drawings={write_references(data / 'references', args.references, pixels)}",
        "methods": HERE / "rows.py",
        "scores": CLIP,
        "seed": SEED,
        "batch_size": 16,
        "output_dir": args.output_dir,
    }
    told = [text for name, value in asked.items() for text in (f"--{name}", str(value))]
    return [*told, "--classifier", *JUDGES, *rows]


def main(arguments: Sequence[str] | None = None) -> None:
    args, rest = parse_args(arguments)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with FileLock(args.output_dir / "data.lock"):  # of several processes one draws
        asked = options(args)
    evaluate([*asked, *rest], __doc__)
    if args.results_dir and (args.output_dir / "tables").is_dir():
        for pattern in COPIED:
            for path in (args.output_dir / "tables").glob(pattern):
                args.results_dir.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, args.results_dir / path.name)


if __name__ == "__main__":
    main()
