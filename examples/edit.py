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
Edits pictures towards emotions, with any Stable Diffusion 1.x or 2.x checkpoint.

python examples/edit.py --image park.png --prompt "a bench in the park" --emotion contentment sadness
python examples/edit.py --base path/or/id --image photos/*.jpg --prompt "a street" "a dog on a sofa" \
    --emotion awe=0.5,fear=0.5 --strength 0.8 --dtype float16 --output_dir outputs/edit
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
    parser.add_argument("--image", nargs="+", type=existing_file, required=True, help="the pictures to edit")
    parser.add_argument(
        "--prompt",
        nargs="+",
        required=True,
        help="what the pictures show: one text for all of them, or one for each",
    )
    parser.add_argument(
        "--emotion",
        nargs="+",
        type=parse_emotion,
        required=True,
        help="emotions, mixtures such as awe=0.7,fear=0.3, or none for a reconstruction",
    )
    parser.add_argument("--strength", type=float, help="share of the way to noise that is gone back, in (0, 1]")
    parser.add_argument(
        "--guidance_reference",
        choices=("null", "source"),
        help="what guidance leads away from: the null prompt, as in the paper, or the picture's own prompt",
    )
    parser.add_argument("--batch_size", type=positive_int, default=1, help="emotions of one picture at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/edit"))
    add_model_options(parser)
    add_guidance_options(parser)
    add_memory_options(parser)
    args = parser.parse_args(arguments)
    if len(args.prompt) not in (1, len(args.image)):
        parser.error(f"{len(args.prompt)} prompts for {len(args.image)} pictures; give one, or one for each")
    if args.strength is not None and not 0 < args.strength <= 1:
        parser.error(f"--strength has to lie in (0, 1], but is {args.strength}")
    return args


def plan(args: argparse.Namespace) -> list[Job]:
    """Every picture with every emotion."""
    prompts = args.prompt * len(args.image) if len(args.prompt) == 1 else args.prompt
    return [
        Job(prompt, emotion, args.seed, source=path, name=f"{index:03d}_{path.stem}")
        for index, (path, prompt) in enumerate(zip(args.image, prompts))
        for emotion in args.emotion
    ]


def main() -> None:
    args = parse_args()
    options = call_options(args)
    for name in ("strength", "guidance_reference"):
        if getattr(args, name) is not None:
            options[name] = getattr(args, name)
    pipe = load_pipeline(args)
    sheet = run_all(pipe, plan(args), args.batch_size, args.output_dir, report=print, **options)
    print(f"All of them: {sheet}")


if __name__ == "__main__":
    main()
