# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Edits pictures towards emotions, with any Stable Diffusion checkpoint, 1.x, 2.x or XL.

python examples/edit.py --image park.png --prompt "a bench in the park" --emotion contentment sadness
python examples/edit.py --image park.png --mask sky.png --prompt "a bench in the park" --emotion fear
python examples/edit.py --base path/or/id --image photos/*.jpg --prompt "a street" "a dog on a sofa" \
    --emotion awe=0.5,fear=0.5 --strength 0.8 --dtype float16 --output_dir outputs/edit

As with generate.py, `accelerate launch` shares the work among processes, and the same command goes on after a kill.
Pictures may be added to a command or left out of it. One that cannot be read is named at the end; the rest is made.
Instead of a --prompt, a --caption_model can say what the pictures show; it is printed, and --prompt corrects it.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from muse_examples.captions import CAPTION_HELP, caption_pictures
from muse_examples.options import check_size, many_pictures_parser, one_line_errors, picture_file, share
from muse_examples.runs import Job, run_script, unreadable
from PIL import Image


FOLDER = Path("outputs/edit")
PER_PICTURE = ("image", "prompt", "mask", "negative_prompt")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = many_pictures_parser(__doc__, FOLDER)
    parser.add_argument("--image", nargs="+", type=picture_file, required=True, help="the pictures to edit")
    parser.add_argument(
        "--prompt",
        nargs="+",
        help="what the pictures show: one text for all of them, or one for each",
    )
    parser.add_argument("--caption_model", help=f"where there is no --prompt: {CAPTION_HELP}")
    parser.add_argument(
        "--mask",
        nargs="+",
        type=picture_file,
        default=[None],
        help="where the emotion acts, white on black: one for all pictures, or one for each. Default: everywhere.",
    )
    parser.add_argument("--strength", type=share, help="share of the way to noise that is gone back, in (0, 1]")
    parser.add_argument(
        "--negative_prompt",
        nargs="+",
        default=[None],
        help="what guidance leads away from: one text for all, or one for each. Default: the null prompt, as in the "
        "paper; the picture's own prompt keeps more of the picture.",
    )
    args = parser.parse_args(arguments)
    check_size(parser, args)
    if not (args.prompt or args.caption_model):
        parser.error("say what the pictures show with --prompt, or name a --caption_model that does")
    args.prompt = args.prompt or [None]
    for name in PER_PICTURE[1:]:
        values = getattr(args, name)
        if len(values) not in (1, len(args.image)):
            parser.error(f"{len(values)} {name}s for {len(args.image)} pictures; give one, or one for each")
        if len(values) == 1:
            setattr(args, name, values * len(args.image))
    return args


def plan(args: argparse.Namespace) -> list[Job]:
    """Every picture with every emotion."""
    stems = Counter(path.stem.casefold() for path in args.image)
    jobs = []
    for index, (path, prompt, mask, negative_prompt) in enumerate(zip(*(getattr(args, name) for name in PER_PICTURE))):
        name = f"{index:03d}_{path.stem}" if stems[path.stem.casefold()] > 1 else path.stem
        jobs += [Job(prompt, emotion, args.seed, path, mask, name, negative_prompt) for emotion in args.emotion]
    return jobs


def caption(args: argparse.Namespace) -> None:
    """Has the caption model say what the pictures show, where nobody did; those that cannot be read stay without."""
    if args.prompt[0] is None:
        problems = unreadable(plan(args))
        known = [path for path in dict.fromkeys(args.image) if path not in problems]
        captions = caption_pictures(args.caption_model, map(Image.open, known), args.device)
        told = dict(zip(known, captions))
        args.prompt = [told.get(path) for path in args.image]
        for path, words in told.items():
            print(f"{path} shows “{words}”", flush=True)


@one_line_errors
def main() -> None:
    args = parse_args()
    caption(args)
    run_script(args, plan(args), FOLDER, (*PER_PICTURE, "caption_model"))


if __name__ == "__main__":
    main()
