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
Makes an emotion library: for each emotion the mean of the tokens that earlier pictures ended with, in one small file.

python examples/make_emotion_library.py --prompts prompts.txt --output library.safetensors

A call that starts from it, `pipe(prompt, emotion="awe", emotion_tokens=load_file("library.safetensors"))`, needs fewer
inner steps than one that starts from noise. It belongs to its base: others have other embeddings.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from loading import (
    add_guidance_options,
    add_memory_options,
    add_model_options,
    call_options,
    generators,
    load_pipeline,
    positive_int,
    prompts_file,
)
from safetensors.torch import save_file
from tqdm.auto import tqdm


def make_library(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    emotions: Sequence[str],
    seed: int = 0,
    batch_size: int = 1,
    **options: Any,
) -> dict[str, torch.Tensor]:
    """
    The mean final tokens of each emotion, over the pictures whose gate opened.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline`.
        prompts, emotions (sequences of `str`): A picture of each prompt is made with each emotion.
        seed (`int`): Of the first picture; each has its own.
        batch_size (`int`): Pictures at a time.
        options: Further arguments of the pipeline.

    Returns:
        `dict[str, torch.Tensor]`: For each emotion tokens of shape `(num_emotion_tokens, embedding_dim)`, float32.

    Raises:
        ValueError: If the gate opened for no picture of an emotion.
    """
    jobs = [(prompt, emotion) for prompt in prompts for emotion in emotions]
    tokens: dict[str, list[torch.Tensor]] = {emotion: [] for emotion in emotions}
    for start in tqdm(range(0, len(jobs), batch_size), desc="library", unit="batch"):
        batch = jobs[start : start + batch_size]
        output = pipe(
            [prompt for prompt, _ in batch],
            emotion=[emotion for _, emotion in batch],
            generator=generators(seed + start, len(batch)),
            output_type="latent",
            **options,
        )
        for (_, emotion), final, trace in zip(batch, output.emotion_tokens.cpu(), output.trace):
            if trace.gate_step is not None:
                tokens[emotion].append(final)
    if missing := [emotion for emotion in emotions if not tokens[emotion]]:
        raise ValueError(f"The gate never opened for {missing}: take more prompts, or a lower `semantic_threshold`.")
    return {emotion: torch.stack(found).mean(dim=0) for emotion, found in tokens.items()}


def save_library(library: dict[str, torch.Tensor], path: Path, base: str) -> None:
    """Writes the library as safetensors, with the base that it belongs to in the metadata."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({label: tokens.contiguous() for label, tokens in library.items()}, path, metadata={"base": base})


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=prompts_file, required=True, help="a text file with one prompt per line")
    parser.add_argument("--emotion", nargs="+", help="the emotions; default: all that the pipeline knows")
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("outputs/emotion_library.safetensors"))
    add_model_options(parser)
    add_guidance_options(parser)
    add_memory_options(parser)
    return parser.parse_args(arguments)


def main() -> None:
    args = parse_args()
    pipe = load_pipeline(args)
    emotions = args.emotion or pipe.emotion_labels
    try:
        library = make_library(
            pipe, args.prompts, emotions, args.seed, args.batch_size, **call_options(args, pipe.presets)
        )
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    save_library(library, args.output, args.base)
    print(f"{args.output}: {', '.join(library)}")


if __name__ == "__main__":
    main()
