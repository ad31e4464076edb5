# Copyright 2026 The MUSE pipelines authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""
Generates pictures that evoke emotions, with any Stable Diffusion 1.x or 2.x checkpoint.

python examples/generate.py --prompt "a fox at the harbour" --emotion awe fear none
python examples/generate.py --base path/or/id --prompts_file prompts.txt --emotion awe=0.7,sadness=0.3 \
    --dtype float16 --gradient_checkpointing --batch_size 4 --output_dir outputs/generate
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from jobs import Job, run_all
from loading import (
    add_guidance_options,
    add_memory_options,
    add_model_options,
    call_options,
    existing_file,
    load_pipeline,
    parse_emotion,
    positive_int,
)


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", nargs="+", default=[], help="what the pictures show")
    parser.add_argument("--prompts_file", type=existing_file, help="a text file with one prompt per line")
    parser.add_argument(
        "--emotion",
        nargs="+",
        type=parse_emotion,
        required=True,
        help="emotions, mixtures such as awe=0.7,fear=0.3, or none; each prompt is made with each",
    )
    parser.add_argument("--negative_prompt", help="what the pictures should not show")
    parser.add_argument("--num_images", type=positive_int, default=1, help="pictures per prompt and emotion")
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures at a time")
    parser.add_argument("--height", type=positive_int, help="in px, a multiple of 8; default: the base's own")
    parser.add_argument("--width", type=positive_int, help="in px, a multiple of 8; default: the base's own")
    parser.add_argument("--seed", type=int, default=0, help="of the first picture per prompt; the next has the next")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/generate"))
    add_model_options(parser)
    add_guidance_options(parser)
    add_memory_options(parser)
    args = parser.parse_args(arguments)
    if args.prompts_file:
        lines = args.prompts_file.read_text(encoding="utf-8").splitlines()
        args.prompt = args.prompt + [line.strip() for line in lines if line.strip()]
        if not args.prompt:
            parser.error(f"{args.prompts_file} holds no prompts")
    if not args.prompt and None in args.emotion:
        parser.error("give a --prompt for pictures without an emotion")
    for name in ("height", "width"):
        if (getattr(args, name) or 0) % 8:
            parser.error(f"--{name} has to be a multiple of 8")
    return args


def plan(args: argparse.Namespace) -> list[Job]:
    """Every prompt with every emotion, from the same seeds, so that the emotion is all that differs."""
    return [
        Job(prompt, emotion, args.seed + number, name=f"{index:03d}")
        for index, prompt in enumerate(args.prompt or [None])
        for number in range(args.num_images)
        for emotion in args.emotion
    ]


def main() -> None:
    args = parse_args()
    options = call_options(args)
    for name in ("negative_prompt", "height", "width"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    pipe = load_pipeline(args)
    sheet = run_all(pipe, plan(args), args.batch_size, args.output_dir, report=print, **options)
    print(f"All of them: {sheet}")


if __name__ == "__main__":
    main()
