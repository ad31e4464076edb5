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
"""Runs many pictures through a `MusePipeline` in batches, and keeps what came of each."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from loading import call_options, emotion_name, generators, load_pipeline
from PIL import Image
from sheets import BAD, EMOTION_COLORS, GOOD, INK, Cell, contact_sheet, save

from pipeline_muse import normalize_emotion


@dataclass(frozen=True)
class Job:
    """One picture to be made: what it shows, what it should evoke, its seed, and the picture to edit and where."""

    prompt: str | None
    emotion: str | dict[str, float] | None
    seed: int
    source: Path | None = None
    mask: Path | None = None
    name: str = ""

    @property
    def file_name(self) -> str:
        return f"{self.name}_{emotion_name(self.emotion)}_{self.seed}.png"


def batches(jobs: Sequence[Job], batch_size: int) -> Iterator[list[Job]]:
    """Cuts jobs into batches of at most `batch_size` with one source and mask and, all or none of them, a prompt."""
    for _, group in groupby(jobs, key=lambda job: (job.source, job.mask, job.prompt is None)):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def run_batch(pipe: DiffusionPipeline, batch: Sequence[Job], **options: Any) -> tuple[list[Image.Image], list[Any]]:
    """
    Makes the pictures of one batch.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline`.
        batch (sequence of [`Job`]): Jobs as from `batches`.
        options: Further arguments of the pipeline.

    Returns:
        `tuple[list[PIL.Image.Image], list]`: The pictures, and the trace of each (`None` where there is no emotion).
    """
    emotions = [job.emotion for job in batch]
    if any(emotion is not None for emotion in emotions):
        options["emotion"] = emotions
    if batch[0].source is not None:
        options["image"] = Image.open(batch[0].source)
    if batch[0].mask is not None:
        options["mask_image"] = Image.open(batch[0].mask)
    if batch[0].prompt is not None:
        options["prompt"] = [job.prompt for job in batch]
    seeds = [generators(job.seed, 1)[0] for job in batch]
    output = pipe(generator=seeds, **options)
    traces = getattr(output, "trace", None) or [None] * len(batch)
    return output.images, [trace if emotion is not None else None for trace, emotion in zip(traces, emotions)]


def verdict(trace: Any) -> tuple[str, str]:
    """What became of the emotion, in words and in a colour: the probability that the guide gives it at the end."""
    if trace is None:
        return "", INK
    if trace.gate_step is None:
        return "the gate never opened", BAD
    probability = trace.target_probability
    remark = f"p = {probability:.2f}, {trace.inner_steps} inner steps"
    return remark, GOOD if probability >= 0.5 else BAD


def record(job: Job, trace: Any, path: Path) -> dict[str, Any]:
    """What is worth knowing about a picture, as JSON."""
    entry: dict[str, Any] = {"file": path.name, "prompt": job.prompt, "emotion": job.emotion, "seed": job.seed}
    for name in ("source", "mask"):
        if getattr(job, name) is not None:
            entry[name] = str(getattr(job, name))
    if trace is not None:
        entry |= {
            "gate_step": trace.gate_step,
            "inner_steps": trace.inner_steps,
            "target_probability": trace.target_probability,
            "inherent_emotion": trace.inherent_emotion,
        }
    return entry


def run_all(
    pipe: DiffusionPipeline,
    jobs: Sequence[Job],
    batch_size: int,
    folder: Path,
    report: Callable[[str], None],
    **options: Any,
) -> Path:
    """
    Makes all pictures, and writes each as it is done, with a line in `metadata.jsonl`, and a sheet of all at the end.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline`.
        jobs (sequence of [`Job`]): What to make.
        batch_size (`int`): Pictures per call of the pipeline, at most.
        folder (`Path`): Where to write; made if need be.
        report (callable): Told the path and the size of each picture.
        options: Further arguments of the pipeline.

    Returns:
        `Path`: The sheet.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cells = []
    with open(folder / "metadata.jsonl", "a", encoding="utf-8") as metadata:
        for batch in batches(jobs, batch_size):
            images, traces = run_batch(pipe, batch, **options)
            for job, image, trace in zip(batch, images, traces):
                path = save(image, folder / job.file_name)
                metadata.write(json.dumps(record(job, trace, path)) + "\n")
                metadata.flush()
                report(f"{path} ({image.width}x{image.height})")
                name = emotion_name(job.emotion)
                cells.append(Cell(image, name, *verdict(trace), title_color=EMOTION_COLORS.get(name, INK)))
    columns = len({emotion_name(job.emotion) for job in jobs})
    return save(contact_sheet(cells, max(columns, min(len(cells), 4))), folder / "sheet.png")


def run_script(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """
    Makes the pictures of a script, and prints where they are.

    Args:
        args (`argparse.Namespace`): The options of `loading.script_parser`.
        jobs (sequence of [`Job`]): What to make.

    Raises:
        SystemExit: If the pipeline does not know an emotion, before any picture is made.
    """
    pipe = load_pipeline(args)
    try:
        for job in jobs:
            normalize_emotion(job.emotion, pipe.emotion_labels)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from error
    sheet = run_all(pipe, jobs, args.batch_size, args.output_dir, report=print, **call_options(args))
    print(f"All of them: {sheet}")
