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
Edits pictures towards emotions, with any Stable Diffusion checkpoint, 1.x, 2.x or XL.

python examples/edit.py --image park.png --prompt "a bench in the park" --emotion contentment sadness
python examples/edit.py --image park.png --mask sky.png --prompt "a bench in the park" --emotion fear
python examples/edit.py --base path/or/id --image photos/*.jpg --prompt "a street" "a dog on a sofa" \
    --emotion awe=0.5,fear=0.5 --strength 0.8 --dtype float16 --output_dir outputs/edit

As with generate.py, `accelerate launch` shares the work among processes, and the same command goes on after a kill.
"""

import argparse
from collections.abc import Sequence

from jobs import Job, run_script
from loading import picture_file, script_parser, share


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = script_parser(__doc__, "outputs/edit")
    parser.add_argument("--image", nargs="+", type=picture_file, required=True, help="the pictures to edit")
    parser.add_argument(
        "--prompt",
        nargs="+",
        required=True,
        help="what the pictures show: one text for all of them, or one for each",
    )
    parser.add_argument(
        "--mask",
        nargs="+",
        type=picture_file,
        default=[None],
        help="where the emotion acts, white on black: one for all pictures, or one for each. Default: everywhere.",
    )
    parser.add_argument("--strength", type=share, help="share of the way to noise that is gone back, in (0, 1]")
    parser.add_argument(
        "--guidance_reference",
        choices=("null", "source"),
        help="what guidance leads away from: the null prompt, as in the paper, or the picture's own prompt",
    )
    args = parser.parse_args(arguments)
    for name in ("prompt", "mask"):
        values = getattr(args, name)
        if len(values) not in (1, len(args.image)):
            parser.error(f"{len(values)} {name}s for {len(args.image)} pictures; give one, or one for each")
        if len(values) == 1:
            setattr(args, name, values * len(args.image))
    return args


def plan(args: argparse.Namespace) -> list[Job]:
    """Every picture with every emotion."""
    return [
        Job(prompt, emotion, args.seed, source=path, mask=mask, name=f"{index:03d}_{path.stem}")
        for index, (path, prompt, mask) in enumerate(zip(args.image, args.prompt, args.mask))
        for emotion in args.emotion
    ]


def main() -> None:
    args = parse_args()
    run_script(args, plan(args))


if __name__ == "__main__":
    main()
