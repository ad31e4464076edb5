# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
One scene told in eight emotions, one picture edited towards them, and the inner loop that does it, in two minutes.

python examples/quickstart.py
python examples/quickstart.py --prompt "a cat on the beach" --emotion fear
python examples/quickstart.py --image my.png --caption "a house in the park"
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from muse_examples.classifiers import label_probabilities, picture_pixels
from muse_examples.contact_sheets import EMOTION_COLORS, INK, Cell, contact_sheet, save
from muse_examples.demo import CAPTION, PICTURE, PROMPT, load_judge, plot_inner_loop, remark
from muse_examples.options import add_guidance_options, add_model_options, call_options, one_line_errors, picture_file
from muse_examples.pipelines import check_emotions, known_labels, load_pipeline
from muse_examples.runs import Job, Made, closing_words, outcome, run_batch, verdict
from PIL import Image

from pipeline_muse import PixelSpec, to_rgb


EMOTIONS, EDITS, INNER_LOOP = "emotions.png", "edits.png", "inner_loop.png"  # what it writes


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", default=PROMPT, help="the scene to tell. Default: %(default)s.")
    parser.add_argument("--emotion", help="edit towards this emotion only. Default: towards each.")
    parser.add_argument("--image", type=picture_file, help="the picture to edit. Default: one that is bundled.")
    parser.add_argument("--caption", help="what --image shows. Default: the prompt.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/quickstart"), help="Default: %(default)s.")
    add_model_options(parser)
    add_guidance_options(parser)
    args = parser.parse_args(arguments)
    if args.caption and not args.image:
        parser.error("--caption says what --image shows; give both")
    if args.image:
        args.caption = args.caption or args.prompt
    else:
        args.image, args.caption = PICTURE, CAPTION
    return args


def sheet_of(
    pipe: DiffusionPipeline,
    judge: Any,
    pictures: Sequence[Made],
    emotions: Sequence[str | None],
    first: str,
    heading: str,
) -> Image.Image:
    """
    Arranges pictures, each under its emotion and above a verdict.

    Args:
        pipe (`DiffusionPipeline`): The `MusePipeline` that made them.
        judge (`PreTrainedModel` or `None`): The classifier that gives the verdicts. `None`: whatever guided, at last.
        pictures (sequence of `Made`): The pictures, with what the guide saw.
        emotions (sequence of `str` or `None`): What each should evoke.
        first (`str`): The title of those that should evoke nothing.
        heading (`str`): The text above them all.

    Returns:
        `PIL.Image.Image`: The sheet.
    """
    remarks = [verdict(outcome(made)) for made in pictures]
    if judge is not None:
        spec = PixelSpec.from_classifier(pipe.emotion_classifier)  # the judge was trained on the same pixels
        seen = label_probabilities(judge, torch.cat([picture_pixels(made.image, spec) for made in pictures]))
        remarks = [remark(probabilities, emotion) for probabilities, emotion in zip(seen, emotions)]
    cells = [
        Cell(made.image, emotion or first, *told, title_color=EMOTION_COLORS.get(emotion or "", INK))
        for made, emotion, told in zip(pictures, emotions, remarks)
    ]
    return contact_sheet(cells, columns=min(len(cells), 3 if len(cells) % 3 == 0 else 5), heading=heading)


def tell(pipe: DiffusionPipeline, judge: Any, args: argparse.Namespace, options: dict) -> list[Made]:
    """One prompt and one seed: without an emotion, then with each. Writes the sheet and the plot of the inner loop."""
    emotions = [None, *pipe.emotion_labels]
    pictures = run_batch(pipe, [Job(args.prompt, emotion, args.seed) for emotion in emotions], **options)
    save(sheet_of(pipe, judge, pictures, emotions, "stock", f"“{args.prompt}”"), args.output / EMOTIONS)
    traces = [made.trace for made in pictures[1:]]
    chosen = [trace for trace in traces if args.emotion in trace.emotion]
    threshold = options.get("semantic_threshold", pipe.config.semantic_threshold)
    plot_inner_loop(chosen or traces, threshold, args.output / INNER_LOOP)
    return pictures


def edit(pipe: DiffusionPipeline, judge: Any, args: argparse.Namespace, options: dict) -> list[Made]:
    """One picture, edited towards the emotion that was asked for, or towards each. Writes the sheet."""
    emotions = [args.emotion] if args.emotion else pipe.emotion_labels
    pictures = run_batch(pipe, [Job(args.caption, emotion, args.seed, args.image) for emotion in emotions], **options)
    source = to_rgb(Image.open(args.image)).resize(pictures[0].image.size, Image.Resampling.LANCZOS)
    shown = [Made(source), *pictures]
    save(sheet_of(pipe, judge, shown, [None, *emotions], "source", f"“{args.caption}”, edited"), args.output / EDITS)
    return pictures


@one_line_errors
def main() -> None:
    args = parse_args()
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    check_emotions([args.emotion], known_labels(args))
    pipe = load_pipeline(args)
    check_emotions([args.emotion], pipe.emotion_labels)
    judge, options = load_judge(pipe, args), call_options(args)
    told, edited = tell(pipe, judge, args, options), edit(pipe, judge, args, options)
    print(f"Done in {time.perf_counter() - start:.0f} s. Look at")
    print(f"  {args.output / EMOTIONS}  one scene without an emotion, then in each")
    print(f"  {args.output / EDITS}  one picture, edited")
    print(f"  {args.output / INNER_LOOP}  when the gate opened, and how the optimisation went")
    for what, pictures in (("The scenes", told), ("The edits", edited)):
        if words := closing_words([outcome(made) for made in pictures]):
            print(f"{what}: {words}")


if __name__ == "__main__":
    main()
