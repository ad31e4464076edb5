# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""An emotion library: for each emotion the mean of the tokens that earlier pictures ended with."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from safetensors.torch import save_file
from tqdm.auto import tqdm

from muse_examples.pipelines import generators


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
