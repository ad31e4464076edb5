# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
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
import sys
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, groupby
from pathlib import Path
from typing import Any, NoReturn

import diffusers
import torch
import transformers
from accelerate import PartialState
from accelerate.utils import tqdm
from diffusers import DiffusionPipeline
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from muse_examples.contact_sheets import BAD, EMOTION_COLORS, GOOD, INK, Cell, contact_sheet, enlarge
from muse_examples.files import PARTIAL, read_text, whole_file, write_whole
from muse_examples.options import call_options
from muse_examples.pipelines import check_emotions, generators, known_labels, load_pipeline, settings_of
from pipeline_muse import to_rgb


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
    negative_prompt: str | None = None

    @property
    def file_name(self) -> str:
        emotion = re.sub(r"[^\w+-]+", "-", emotion_name(self.emotion))
        return f"{self.name}_{emotion}_{self.seed}.png"

    @property
    def files(self) -> dict[str, Path]:
        """The pictures that it is made of, by what they are to it."""
        return {name: path for name in ("source", "mask") if (path := getattr(self, name)) is not None}


@dataclass(frozen=True)
class Made:
    """
    A picture, the trace of its emotion (`None` without one), whether the safety checker blackened it, and what else
    its record should say, as JSON.
    """

    image: Image.Image
    trace: Any = None
    blackened: bool = False
    notes: Mapping[str, Any] = field(default_factory=dict)


def emotion_name(emotion: str | dict[str, float] | None) -> str:
    """A short name for titles and files, such as `awe`, `awe70+fear30` (per cent), or `stock` for none."""
    if emotion is None:
        return "stock"
    if isinstance(emotion, str):
        return emotion
    total = sum(emotion.values()) or 1
    return "+".join(f"{label}{round(100 * weight / total)}" for label, weight in emotion.items())


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


def run_batch(pipe: DiffusionPipeline, batch: Sequence[Job], **options: Any) -> list[Made]:
    """
    Makes the pictures of one batch.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline`.
        batch (sequence of [`Job`]): Jobs as from `batches`.
        options: Further arguments of the pipeline.

    Returns:
        `list[Made]`: The pictures, in the order of the jobs.
    """
    first, emotions = batch[0], [job.emotion for job in batch]
    if any(emotion is not None for emotion in emotions):
        options["emotion"] = emotions
    if first.source is not None:
        options["image"] = Image.open(first.source)
    if first.mask is not None:
        options["mask_image"] = Image.open(first.mask)
    if first.prompt is not None:
        options["prompt"] = [job.prompt for job in batch]
    if first.negative_prompt is not None:  # a list beside a list: upstream takes no string beside one
        options["negative_prompt"] = [job.negative_prompt for job in batch]
    output = pipe(generator=[generators(job.seed, 1)[0] for job in batch], **options)
    nothing = [None] * len(batch)
    traces = getattr(output, "trace", None) or nothing
    flags = getattr(output, "nsfw_content_detected", None) or nothing
    return [
        Made(image, trace if emotion is not None else None, bool(flag))
        for image, emotion, trace, flag in zip(output.images, emotions, traces, flags)
    ]


# --------------------------------------------------------------------------------------
# Pictures and their records
# --------------------------------------------------------------------------------------


def outcome(made: Made) -> Record:
    """What became of a picture and of its emotion, as JSON."""
    found: Record = {"size": list(made.image.size)}
    if made.blackened:
        found["blackened"] = True
    if made.trace is not None:
        names = ("gate_step", "inner_steps", "target_probability", "inherent_emotion")
        found |= {name: getattr(made.trace, name) for name in names}
        found["highest_similarity"] = max(made.trace.similarity, default=None)
    return {**found, **made.notes}


def verdict(outcome: Record) -> tuple[str, str]:
    """What became of the emotion, in words and in a colour: the probability that the guide gives it at the end."""
    if outcome.get("blackened"):
        return "blackened by the safety checker", BAD
    if "gate_step" not in outcome:
        return "", INK
    probability = outcome["target_probability"]
    if probability is None:
        return "the gate never opened", BAD
    remark = f"p = {probability:.2f}, {outcome['inner_steps']} inner steps"
    return remark, GOOD if probability >= 0.5 else BAD


def closing_words(outcomes: Sequence[Record]) -> str:
    """What a run has to say of pictures that are not as they were asked for, line by line; empty where all are."""
    guided = [entry for entry in outcomes if "gate_step" in entry]
    closed = [entry for entry in guided if entry["gate_step"] is None]
    blackened = sum(entry.get("blackened", False) for entry in outcomes)
    lines = []
    if closed:
        seen = [entry["highest_similarity"] for entry in closed if entry["highest_similarity"] is not None]
        reached = f" Their previews were similar to the prompt by up to {max(seen):.1f}." if seen else ""
        lines += [
            f"No emotion was added to {len(closed)} of {len(guided)} pictures: their gate never opened, so they are as"
            f" they are without one.{reached} Take a lower --semantic_threshold, or let guidance start in any case:"
            " --latest_start 0.3, after 30 % of the steps."
        ]
    if blackened:
        lines.append(f"The base's safety checker blackened {blackened} of {len(outcomes)} pictures.")
    return "\n".join(lines)


def digest(path: Path) -> str:
    """Tells files apart by their content."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def request(job: Job) -> Record:
    """What a picture was asked to be, as JSON: what its record begins with, and is known by."""
    asked: Record = {"file": job.file_name, "prompt": job.prompt, "emotion": job.emotion, "seed": job.seed}
    if job.negative_prompt is not None:
        asked["negative_prompt"] = job.negative_prompt
    return asked | {f"{name}_sha256": digest(path) for name, path in job.files.items()}


def record(job: Job, made: Made) -> Record:
    """What is worth knowing about a picture, as JSON."""
    return request(job) | {name: str(path) for name, path in job.files.items()} | outcome(made)


def save_picture(image: Image.Image, entry: Record, folder: Path) -> None:
    """Writes a picture with its record in it."""
    text = PngInfo()
    text.add_text(RECORD, json.dumps(entry))
    with whole_file(folder / entry["file"]) as partial:
        image.save(partial, "PNG", pnginfo=text)


def read_record(path: Path) -> Record | None:
    """The record in a picture; `None` where there is no picture, or none of ours."""
    try:
        with Image.open(path) as image:
            return json.loads(image.info[RECORD])
    except (OSError, KeyError):
        return None


def read_metadata(path: Path) -> dict[str, Record]:
    """The records in a `metadata.jsonl`, by file; empty where there is none. A last line may be torn."""
    text = read_text(path) if path.is_file() else ""
    try:
        entries = [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]
    except ValueError as error:
        raise ValueError(f"{str(path)!r} is not JSON, line by line: {error}") from error
    return {entry["file"]: entry for entry in entries if "file" in entry}


def read_records(jobs: Sequence[Job], folder: Path) -> list[Record | None]:
    """The records of the pictures that are there, in the order of the jobs; `None` for those that are to be made."""
    return [read_record(folder / job.file_name) for job in jobs]


def write_summary(records: Sequence[Record], folder: Path) -> Path:
    """Writes `metadata.jsonl`, the records of all pictures, and a sheet, of the first of them where they are many."""
    write_whole(folder / "metadata.jsonl", "".join(json.dumps(entry) + "\n" for entry in records))
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


def run_settings(args: argparse.Namespace, per_picture: Collection[str] = ()) -> Record:
    """
    All that the pictures of a run have in common, as JSON: every option but the folder and those of single pictures,
    which their records tell. Files are known by content, the device by its kind.
    """
    defaults = {"defaults of the base": settings_of(args.base), "device": torch.device(args.device).type}
    options = {name: value for name, value in vars(args).items() if name not in {"output_dir", *per_picture}}
    return json.loads(json.dumps(options | defaults, default=digest))


def differences(folder: Path, settings: Record) -> list[str]:
    """In what the run that a folder is of differs from these settings; empty if it holds no picture of any yet."""
    path = folder / SETTINGS
    if not path.exists() or all(read_record(picture) is None for picture in folder.glob("*.png")):
        return []
    known, found = json.loads(read_text(path)), []
    for name in sorted({*known, *settings}):
        old, new = (json.dumps(values.get(name), ensure_ascii=False) for values in (known, settings))
        if old != new:
            found.append(f"{name} (was {old}, is {new})" if len(old + new) < 80 else name)
    return found


def unreadable(jobs: Sequence[Job]) -> dict[Path, str]:
    """The pictures that jobs are made of and that cannot be decoded to their end, with the reason."""
    problems = {}
    for path in dict.fromkeys(path for job in jobs for path in job.files.values()):
        try:
            with Image.open(path) as image:
                to_rgb(image)
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            problems[path] = str(error)
    return problems


def refuse(message: str, state: PartialState) -> NoReturn:
    """Ends the program. All processes see the same: the main one says it, the others leave that to it."""
    raise SystemExit(f"error: {message}" if state.is_main_process else 0)


def conflict(jobs: Sequence[Job], folder: Path, settings: Record) -> str:
    """Which pictures a folder holds that jobs would overwrite or be mixed with; empty if none."""
    if found := differences(folder, settings):
        return f"the pictures of a run with another {', '.join(found)}"
    for job, entry in zip(jobs, read_records(jobs, folder)):
        if entry and (other := [name for name, value in request(job).items() if entry.get(name) != value]):
            return f"{job.file_name!r} of another {', '.join(other)}"
    return ""


def check_run(args: argparse.Namespace, jobs: Sequence[Job], settings: Record, state: PartialState) -> None:
    """Ends the program where pictures would have one name, the folder holds others, or an emotion is unknown."""
    name, times = Counter(job.file_name.casefold() for job in jobs).most_common(1)[0]
    if times > 1:
        refuse(f"{times} pictures would be called {name!r}; give each --emotion once", state)
    if what := conflict(jobs, args.output_dir, settings):
        refuse(f"{str(args.output_dir)!r} holds {what}. Choose another --output_dir, or delete it.", state)
    check_emotions([job.emotion for job in jobs], known_labels(args))


def prepare(args: argparse.Namespace, jobs: Sequence[Job], settings: Record, state: PartialState) -> DiffusionPipeline:
    """Loads the pipeline, and makes the folder one of this run if the pipeline knows all emotions."""
    if not state.is_local_main_process:
        diffusers.utils.logging.disable_progress_bar()
        transformers.utils.logging.disable_progress_bar()
    pipe = load_pipeline(args)
    pipe.set_progress_bar_config(position=1, leave=False, disable=state.num_processes > 1)
    check_emotions([job.emotion for job in jobs], pipe.emotion_labels)
    write_whole(args.output_dir / SETTINGS, json.dumps(settings, indent=2) + "\n")
    return pipe


def make_pictures(
    make: Callable[[Sequence[Job]], Sequence[Made]],
    batches: Iterable[Sequence[Job]],
    missing: set[str],
    folder: Path,
) -> Iterator[str]:
    """
    Makes pictures, and writes each as it is done.

    Args:
        make (function): Makes the pictures of one batch, in its order.
        batches (iterable of sequences of [`Job`]): What to make. Batches of which nothing is missing are left out.
        missing (`set[str]`): The names of the files to write; others are there already.
        folder (`Path`): Where to write.

    Yields:
        `str`: The name of each file that was written.
    """
    for batch in batches:
        if missing.isdisjoint(job.file_name for job in batch):
            continue
        for job, made in zip(batch, make(batch)):
            if job.file_name in missing:
                save_picture(made.image, record(job, made), folder)
                yield job.file_name


def throughput(made: int, seconds: float) -> str:
    """What a run tells of its speed; `seconds` are without those of loading."""
    return f"{made} made in {seconds:.1f} s: {60 * made / seconds if made else 0:.1f} images per minute"


def run_share(args: argparse.Namespace, jobs: Sequence[Job], settings: Record, state: PartialState) -> None:
    """Makes what is missing of the pictures of this process; the process that finds all of them there sums them up."""
    folder = args.output_dir
    process = f"process {state.process_index + 1} of {state.num_processes}"
    check_run(args, jobs, settings, state)
    if state.is_main_process:  # the others have models to load before they write
        for left in folder.glob(PARTIAL):
            left.unlink()

    missing = {job.file_name for job, entry in zip(jobs, read_records(jobs, folder)) if entry is None}
    share = deal(batches(jobs, args.batch_size), state.process_index, state.num_processes)
    names = [job.file_name for batch in share for job in batch]
    waiting = len(missing.intersection(names))
    made, start = 0, time.perf_counter()
    # In a new folder the main process loads in any case: it is the one that says which emotions are unknown.
    if waiting or (state.is_main_process and not (folder / SETTINGS).exists()):
        pipe = prepare(args, jobs, settings, state)
        start = time.perf_counter()
        pictures = make_pictures(partial(run_batch, pipe, **call_options(args)), share, missing, folder)
        bar = {"total": len(names), "initial": len(names) - waiting, "position": state.local_process_index}
        shown = tqdm(pictures, process, main_process_only=False, disable=not waiting, dynamic_ncols=True, **bar)
        made = sum(1 for _ in shown)
    seconds = time.perf_counter() - start

    if state.num_processes > 1:
        print(f"{process}: {len(names) - waiting} were there, {throughput(made, seconds)}", flush=True)
    records = [entry for entry in read_records(jobs, folder) if entry is not None]
    if len(records) == len(jobs) and (made or state.is_main_process):
        # This process is the last: what was missing when it started has been made since.
        print(f"in all: {len(jobs) - len(missing)} were there, {throughput(len(missing), seconds)}")
        sizes = ", ".join(sorted({"{} x {}".format(*entry["size"]) for entry in records}))
        lines = [f"All {len(jobs)} pictures, {sizes} px: {write_summary(records, folder)}", closing_words(records)]
        print(*filter(None, lines), sep="\n", flush=True)


def own_folder(jobs: Sequence[Job], default: Path, settings: Record) -> Path:
    """
    The first of `default`, `default-2`, … that holds no pictures but those of this run. Every process finds the same,
    even when others have begun, and so does the same command after a kill.
    """
    names = {job.file_name for job in jobs}
    for number in count(1):
        folder = default if number == 1 else default.with_name(f"{default.name}-{number}")
        strangers = (path for path in folder.glob("*.png") if path.name not in names and read_record(path))
        if not (conflict(jobs, folder, settings) or any(strangers)):
            return folder
    raise AssertionError("there is always another number")


def run_script(
    args: argparse.Namespace, jobs: Sequence[Job], default: Path, per_picture: Collection[str] = ()
) -> None:
    """
    Makes the pictures of a script, or what is missing of them, on all processes that accelerate started.

    Args:
        args (`argparse.Namespace`): The options of `options.many_pictures_parser`.
        jobs (sequence of [`Job`]): What to make; those whose source or mask is torn are left out and named at the end.
        default (`Path`): Where to write if no folder is named; see [`own_folder`].
        per_picture (collection of `str`): Options that say what single pictures are made of; see [`run_settings`].

    Raises:
        SystemExit: If the pipeline does not know an emotion, two pictures would have one name, or the folder is of a
            run with other settings; before any picture is made. At the end, if pictures were left out.
    """
    # Unless told of the CPU, accelerate takes each of several processes without a GPU for the only one.
    state = PartialState(cpu=args.device == "cpu")
    if args.device == state.device.type != "cpu":
        args.device = str(state.device)  # a GPU of its own
    problems = unreadable(jobs)
    whole = [job for job in jobs if problems.keys().isdisjoint(job.files.values())]
    told = "; ".join(f"{str(path)!r} ({reason})" for path, reason in problems.items())
    try:
        if problems and state.is_main_process:
            print(f"Left out, as it cannot be read: {told}", file=sys.stderr, flush=True)
        if whole:
            settings = run_settings(args, per_picture)
            args.output_dir = args.output_dir or own_folder(whole, default, settings)
            run_share(args, whole, settings, state)
        if problems:
            refuse(f"{len(jobs) - len(whole)} of {len(jobs)} pictures were not made, for want of {told}", state)
    finally:
        state.destroy_process_group()
