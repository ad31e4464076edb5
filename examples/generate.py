# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Generates pictures that evoke emotions, with any Stable Diffusion checkpoint, 1.x, 2.x or XL.

python examples/generate.py --prompt "a fox at the harbour" --emotion awe fear none
accelerate launch examples/generate.py --prompts prompts.txt --base path/or/id --emotion awe=0.7,sadness=0.3 \
    --dtype float16 --gradient_checkpointing --batch_size 4 --output_dir outputs/generate

Each process that accelerate starts makes its share, on a GPU of its own; the folder is common to all of them, on all
machines. Several processes on a CPU are started by `accelerate launch --multi_gpu --num_processes 2`, where there is
no GPU or with `--device cpu` (accelerate's own `--cpu` starts but one). After a kill the same command, on as many
processes as you like, makes what is missing, and ends with the pictures of an unbroken run. A folder is of one run:
other options get the next one, outputs/generate-2 and so on, and are refused where --output_dir names it.
`metadata.jsonl` and `sheet.png` are written once all is there.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from muse_examples.options import (
    PROMPTS_HELP,
    check_size,
    many_pictures_parser,
    one_line_errors,
    positive_int,
    prompts_file,
)
from muse_examples.runs import Job, run_script


FOLDER = Path("outputs/generate")


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = many_pictures_parser(__doc__, FOLDER)
    parser.add_argument("--prompt", nargs="+", default=[], help="what the pictures show")
    parser.add_argument("--prompts", type=prompts_file, default=[], help=PROMPTS_HELP)
    parser.add_argument("--negative_prompt", help="what the pictures should not show")
    parser.add_argument("--num_images", type=positive_int, default=1, help="pictures per prompt and emotion")
    args = parser.parse_args(arguments)
    args.prompt = args.prompt + args.prompts
    del args.prompts
    if not args.prompt and None in args.emotion:
        parser.error("give a --prompt for pictures without an emotion")
    check_size(parser, args)
    return args


def plan(args: argparse.Namespace) -> list[Job]:
    """Every prompt with every emotion, from the same seeds, so that the emotion is all that differs."""
    return [
        Job(prompt, emotion, args.seed + number, name=f"{index:03d}", negative_prompt=args.negative_prompt)
        for index, prompt in enumerate(args.prompt or [None])
        for number in range(args.num_images)
        for emotion in args.emotion
    ]


@one_line_errors
def main() -> None:
    args = parse_args()
    run_script(args, plan(args), FOLDER)


if __name__ == "__main__":
    main()
