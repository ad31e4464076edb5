# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Makes an emotion library: for each emotion the mean of the tokens that earlier pictures ended with, in one small file.

python examples/make_emotion_library.py --prompts prompts.txt --output library.safetensors

A call that starts from it, `pipe(prompt, emotion="awe", emotion_tokens=load_file("library.safetensors"))`, needs fewer
inner steps than one that starts from noise. It belongs to its base: others have other embeddings.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from muse_examples.emotion_library import make_library, save_library
from muse_examples.options import (
    PROMPTS_HELP,
    add_guidance_options,
    add_memory_options,
    add_model_options,
    call_options,
    one_line_errors,
    positive_int,
    prompts_file,
)
from muse_examples.pipelines import check_emotions, known_labels, load_pipeline


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=prompts_file, required=True, help=PROMPTS_HELP)
    parser.add_argument("--emotion", nargs="+", help="the emotions; default: all that the pipeline knows")
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/emotion_library.safetensors"))
    add_model_options(parser)
    add_guidance_options(parser)
    add_memory_options(parser)
    return parser.parse_args(arguments)


@one_line_errors
def main() -> None:
    args = parse_args()
    check_emotions(args.emotion or [], known_labels(args))
    pipe = load_pipeline(args)
    emotions = args.emotion or pipe.emotion_labels
    check_emotions(emotions, pipe.emotion_labels)
    library = make_library(pipe, args.prompts, emotions, args.seed, args.batch_size, **call_options(args))
    save_library(library, args.output, args.base)
    print(f"{args.output}: {', '.join(library)}")


if __name__ == "__main__":
    main()
