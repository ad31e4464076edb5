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
Makes many pictures with a `MusePipeline`, on as many processes as accelerate starts, and goes on where a run ended.

Each picture is a file that is there whole or not at all, with its record in it: the folder is all that processes, and
runs, have to know of one another. Batches are those of the whole plan, whoever makes them and whatever is there
already, because the last bits of a picture depend on the batch that it is computed in.
"""

import argparse
import hashlib
import json
import math
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline
from loading import PARTIAL, call_options, emotion_name, generators, load_pipeline, storybook_settings, whole_file
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from sheets import BAD, EMOTION_COLORS, GOOD, INK, Cell, contact_sheet, enlarge

from pipeline_muse import normalize_emotion


RECORD = "muse"  # the text of a PNG that says what it shows
SETTINGS = "run.json"  # what the pictures of a folder were made with
MOST_ON_SHEET = 400  # pictures

Record = dict[str, Any]  # a line of metadata.jsonl


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
        emotion = re.sub(r"[^\w+-]+", "-", emotion_name(self.emotion))
        return f"{self.name}_{emotion}_{self.seed}.png"


# --------------------------------------------------------------------------------------
# Batches
# --------------------------------------------------------------------------------------


def batches(jobs: Sequence[Job], batch_size: int) -> Iterator[list[Job]]:
    """Cuts jobs into batches of at most `batch_size` with one source and mask and, all or none of them, a prompt."""
    for _, group in groupby(jobs, key=lambda job: (job.source, job.mask, job.prompt is None)):
        alike = list(group)
        for start in range(0, len(alike), batch_size):
            yield alike[start : start + batch_size]


def deal(batches: Iterable[list[Job]], process_index: int, num_processes: int) -> list[list[Job]]:
    """
    The batches of one process. As many as there are processes make a round, which is dealt in an order of its own: no
    process gets all pictures of one emotion, and what is left of a plan is as evenly dealt as the whole.
    """
    own = []
    for number, batch in enumerate(batches):
        turn, place = divmod(number, num_processes)
        if random.Random(turn).sample(range(num_processes), num_processes)[place] == process_index:
            own.append(batch)
    return own


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


# --------------------------------------------------------------------------------------
# Pictures and their records
# --------------------------------------------------------------------------------------


def outcome(trace: Any) -> Record:
    """What became of the emotion, as JSON; empty where there is none."""
    if trace is None:
        return {}
    names = ("gate_step", "inner_steps", "target_probability", "inherent_emotion")
    return {name: getattr(trace, name) for name in names}


def verdict(outcome: Record) -> tuple[str, str]:
    """What became of the emotion, in words and in a colour: the probability that the guide gives it at the end."""
    if "gate_step" not in outcome:
        return "", INK
    if outcome["gate_step"] is None:
        return "the gate never opened", BAD
    probability = outcome["target_probability"]
    remark = f"p = {probability:.2f}, {outcome['inner_steps']} inner steps"
    return remark, GOOD if probability >= 0.5 else BAD


def record(job: Job, trace: Any) -> Record:
    """What is worth knowing about a picture, as JSON."""
    entry: Record = {"file": job.file_name, "prompt": job.prompt, "emotion": job.emotion, "seed": job.seed}
    for name in ("source", "mask"):
        if getattr(job, name) is not None:
            entry[name] = str(getattr(job, name))
    return entry | outcome(trace)


def save_picture(image: Image.Image, entry: Record, folder: Path) -> None:
    """Writes a picture with its record in it."""
    text = PngInfo()
    text.add_text(RECORD, json.dumps(entry))
    with whole_file(folder / entry["file"]) as partial:
        image.save(partial, "PNG", pnginfo=text)


def read_records(jobs: Sequence[Job], folder: Path) -> list[Record | None]:
    """The records of the pictures that are there, in the order of the jobs; `None` for those that are to be made."""
    records: list[Record | None] = []
    for job in jobs:
        try:
            with Image.open(folder / job.file_name) as image:
                records.append(json.loads(image.info[RECORD]))
        except (OSError, KeyError):  # there is none, or none of ours
            records.append(None)
    return records


def write_summary(records: Sequence[Record], folder: Path) -> Path:
    """Writes `metadata.jsonl`, the records of all pictures, and a sheet, of the first of them where they are many."""
    with whole_file(folder / "metadata.jsonl") as partial:
        partial.write_text("".join(json.dumps(entry) + "\n" for entry in records), encoding="utf-8")
    cells = []
    for entry in records[:MOST_ON_SHEET]:
        name = emotion_name(entry["emotion"])
        with Image.open(folder / entry["file"]) as file:
            image = enlarge(file.convert("RGB"))  # small at once, as they may be many
        cells.append(Cell(image, name, *verdict(entry), title_color=EMOTION_COLORS.get(name, INK)))
    emotions = len({cell.title for cell in cells})
    heading = f"The first {len(cells)} of {len(records)} pictures" if len(cells) < len(records) else ""
    sheet = contact_sheet(cells, emotions * max(1, round(math.sqrt(len(cells)) / emotions)), heading)
    with whole_file(folder / "sheet.png") as partial:
        sheet.save(partial, "PNG")
    return folder / "sheet.png"


# --------------------------------------------------------------------------------------
# Runs
# --------------------------------------------------------------------------------------


def run_settings(args: argparse.Namespace) -> Record:
    """All that pictures depend on, as JSON: every option but the folder; files by content, the device by its kind."""
    defaults = {"defaults of the base": storybook_settings(args.base), "device": torch.device(args.device).type}
    options = {**vars(args), **defaults}
    del options["output_dir"]
    return json.loads(json.dumps(options, default=lambda path: hashlib.sha256(path.read_bytes()).hexdigest()))


def differences(folder: Path, settings: Record) -> list[str]:
    """In what the run that a folder is of differs from these settings; empty if it is of none yet."""
    path = folder / SETTINGS
    known = json.loads(path.read_text(encoding="utf-8")) if path.exists() else settings
    found = []
    for name in sorted({*known, *settings}):
        old, new = (json.dumps(values.get(name), ensure_ascii=False) for values in (known, settings))
        if old != new:
            found.append(f"{name} (was {old}, is {new})" if len(old + new) < 80 else name)
    return found


def refuse(message: str, state: PartialState) -> NoReturn:
    """Ends the program. All processes see the same: the main one says it, the others leave that to it."""
    raise SystemExit(f"error: {message}" if state.is_main_process else 0)


def check_run(jobs: Sequence[Job], folder: Path, settings: Record, state: PartialState) -> None:
    """Ends the program where pictures would have one name, or the folder is of another run."""
    name, count = Counter(job.file_name.casefold() for job in jobs).most_common(1)[0]
    if count > 1:
        refuse(f"{count} pictures would be called {name!r}; give each --emotion once", state)
    if found := differences(folder, settings):
        what = f"the pictures of a run with another {', '.join(found)}"
        refuse(f"{str(folder)!r} holds {what}. Choose another --output_dir, or delete it.", state)


def prepare(args: argparse.Namespace, jobs: Sequence[Job], settings: Record, state: PartialState) -> DiffusionPipeline:
    """Loads the pipeline, and makes the folder one of this run if the pipeline knows all emotions."""
    if not state.is_local_main_process:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(position=1, leave=False, disable=state.num_processes > 1)
    try:
        for job in jobs:
            normalize_emotion(job.emotion, pipe.emotion_labels)
    except ValueError as error:
        refuse(str(error), state)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    with whole_file(args.output_dir / SETTINGS) as partial:
        partial.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    return pipe


def make_pictures(
    pipe: DiffusionPipeline, batches: Iterable[Sequence[Job]], missing: set[str], folder: Path, **options: Any
) -> Iterator[str]:
    """
    Makes pictures, and writes each as it is done.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline`.
        batches (iterable of sequences of [`Job`]): What to make. Batches of which nothing is missing are left out.
        missing (`set[str]`): The names of the files to write; others are there already.
        folder (`Path`): Where to write.
        options: Further arguments of the pipeline.

    Yields:
        `str`: The name of each file that was written.
    """
    for batch in batches:
        if missing.isdisjoint(job.file_name for job in batch):
            continue
        for job, image, trace in zip(batch, *run_batch(pipe, batch, **options)):
            if job.file_name in missing:
                save_picture(image, record(job, trace), folder)
                yield job.file_name


def throughput(made: int, seconds: float) -> str:
    """What a run tells of its speed; `seconds` are without those of loading."""
    return f"{made} made in {seconds:.1f} s: {60 * made / seconds if made else 0:.1f} images per minute"


def run_share(args: argparse.Namespace, jobs: Sequence[Job], state: PartialState) -> None:
    """Makes what is missing of the pictures of this process; the process that finds all of them there sums them up."""
    folder, settings = args.output_dir, run_settings(args)
    process = f"process {state.process_index + 1} of {state.num_processes}"
    check_run(jobs, folder, settings, state)
    if state.is_main_process:  # the others have models to load before they write
        for left in folder.glob(PARTIAL):
            left.unlink()

    missing = {job.file_name for job, known in zip(jobs, read_records(jobs, folder)) if known is None}
    share = deal(batches(jobs, args.batch_size), state.process_index, state.num_processes)
    names = [job.file_name for batch in share for job in batch]
    waiting = len(missing.intersection(names))
    made, start = 0, time.perf_counter()
    # In a new folder the main process loads in any case: it is the one that says which emotions are unknown.
    if waiting or (state.is_main_process and not (folder / SETTINGS).exists()):
        pipe = prepare(args, jobs, settings, state)
        start = time.perf_counter()
        pictures = make_pictures(pipe, share, missing, folder, **call_options(args, pipe.presets))
        bar = {"total": len(names), "initial": len(names) - waiting, "position": state.local_process_index}
        shown = tqdm(pictures, process, main_process_only=False, disable=not waiting, dynamic_ncols=True, **bar)
        made = sum(1 for _ in shown)
    seconds = time.perf_counter() - start

    if state.num_processes > 1:
        print(f"{process}: {len(names) - waiting} were there, {throughput(made, seconds)}", flush=True)
    records = [known for known in read_records(jobs, folder) if known is not None]
    if len(records) == len(jobs) and (made or state.is_main_process):
        # This process is the last: what was missing when it started has been made since.
        total = f"{len(jobs) - len(missing)} were there, {throughput(len(missing), seconds)}"
        print(f"in all: {total}\nAll {len(jobs)} pictures: {write_summary(records, folder)}", flush=True)


def run_script(args: argparse.Namespace, jobs: Sequence[Job]) -> None:
    """
    Makes the pictures of a script, or what is missing of them, on all processes that accelerate started.

    Args:
        args (`argparse.Namespace`): The options of `loading.script_parser`.
        jobs (sequence of [`Job`]): What to make.

    Raises:
        SystemExit: If the pipeline does not know an emotion, two pictures would have one name, or the folder is of a
            run with other settings; before any picture is made.
    """
    # Unless told of the CPU, accelerate takes each of several processes without a GPU for the only one.
    state = PartialState(cpu=args.device == "cpu")
    if args.device == state.device.type != "cpu":
        args.device = str(state.device)  # a GPU of its own
    try:
        run_share(args, jobs, state)
    finally:
        state.destroy_process_group()
