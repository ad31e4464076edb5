# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The pictures of all rows: a folder per row, on as many processes as accelerate starts, resumed after a kill.

Each picture is a file that is there whole or not at all, with its record in it: what it should show and evoke, the
seconds and the memory that it took, and what became of the emotion. See `muse_examples.runs`.
"""

import argparse
import datetime
import json
import re
import subprocess
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import tqdm

from muse_examples import REPOSITORY
from muse_examples.evaluation.data import Case
from muse_examples.evaluation.figures import trace_record
from muse_examples.evaluation.methods import Method, Studio
from muse_examples.files import PARTIAL, read_text, write_whole
from muse_examples.measuring import processor, versions
from muse_examples.options import CALL_OPTIONS
from muse_examples.pipelines import settings_of
from muse_examples.runs import (
    SETTINGS,
    Job,
    Made,
    Record,
    batches,
    conflict,
    deal,
    digest,
    make_pictures,
    read_records,
    refuse,
)


# What the pictures of all rows depend on, besides the row and the case.
COMMON = ("base", "revision", "variant", "clip", "classifier", "preview_vae", "dtype", "batch_size")


@dataclass(frozen=True)
class Share:
    """What one row still lacks: its batches of one process, and the names of the pictures that are missing."""

    method: Method
    folder: Path
    batches: list[list[Job]]
    missing: set[str]

    @property
    def names(self) -> set[str]:
        """The pictures that this process has to make."""
        return {job.file_name for batch in self.batches for job in batch} & self.missing


def slug(name: str) -> str:
    """The name of a row's folder."""
    return re.sub(r"[^\w.=+-]+", "-", name.replace("η", "eta")).strip("-").lower()


def row_folder(output_dir: Path, name: str) -> Path:
    """Where the pictures of a row lie."""
    return output_dir / "pictures" / slug(name)


def row_settings(args: argparse.Namespace, method: Method) -> Record:
    """What the pictures of a row have in common, as JSON; a folder is of one such row."""
    common = {name: getattr(args, name) for name in COMMON + CALL_OPTIONS if getattr(args, name, None) is not None}
    common |= {"call": settings_of(args.base).get("call", {}), "device": torch.device(args.device).type}
    row = {"row": method.name, "task": method.task, "settings": dict(method.settings)}
    return json.loads(json.dumps(row | common, default=digest))


def share_of(args: argparse.Namespace, method: Method, cases: Sequence[Case], state: PartialState) -> Share:
    """
    What this process has to make of a row.

    Raises:
        SystemExit: If its folder holds pictures of other settings.
    """
    folder = row_folder(args.output_dir, method.name)
    if what := conflict(cases, folder, row_settings(args, method)):
        refuse(f"{str(folder)!r} holds {what}. Choose another --output_dir, or delete that folder.", state)
    missing = {case.file_name for case, entry in zip(cases, read_records(cases, folder)) if entry is None}
    own = deal(batches(cases, args.batch_size), state.process_index, state.num_processes)
    return Share(method, folder, own, missing)


def timed(studio: Studio, method: Method, jobs: Sequence[Job]) -> list[Made]:
    """Makes the pictures of a batch, and notes the seconds and the peak of memory (bytes, on CUDA) that each took."""
    cuda = studio.device.type == "cuda"
    if cuda:
        torch.cuda.reset_peak_memory_stats(studio.device)
    start = time.perf_counter()
    made = method(studio, jobs)  # images, so that the device has done its work
    notes: Record = {"row": method.name, "seconds": (time.perf_counter() - start) / len(jobs)}
    if cuda:
        notes["peak_memory"] = torch.cuda.max_memory_allocated(studio.device)
    return [with_notes(one, notes) for one in made]


def with_notes(made: Made, notes: Mapping[str, Any]) -> Made:
    """The same picture, of which its record says more."""
    curves = {} if made.trace is None else {"trace": trace_record(made.trace)}
    return Made(made.image, made.trace, made.blackened, {**made.notes, **notes, **curves})


def make_rows(
    args: argparse.Namespace, studio: Studio, rows: Collection[tuple[Method, list[Case]]], state: PartialState
) -> int:
    """
    Makes what is missing of all rows, this process its share.

    Returns:
        `int`: How many pictures it made.

    Raises:
        SystemExit: If a folder holds pictures of other settings, before any picture is made.
    """
    shares = [share_of(args, method, cases, state) for method, cases in rows]
    waiting = sum(len(share.names) for share in shares)
    for share in shares:
        if state.is_main_process:
            for left in share.folder.glob(PARTIAL):
                left.unlink()
            write_whole(share.folder / SETTINGS, json.dumps(row_settings(args, share.method), indent=2) + "\n")
    if not waiting:
        return 0
    studio.load()  # so that it is not in the time of the first picture
    place = {"position": state.local_process_index, "main_process_only": False, "dynamic_ncols": True}
    with tqdm(total=waiting, desc=f"process {state.process_index + 1}", **place) as bar:
        for share in shares:
            bar.set_postfix_str(share.method.name)
            make = partial(timed, studio, share.method)
            for _ in make_pictures(make, share.batches, share.missing, share.folder):
                bar.update()
    return waiting


# --------------------------------------------------------------------------------------
# The plan
# --------------------------------------------------------------------------------------


def seconds_per_picture(studio: Studio, share: Share, cases: Sequence[Case]) -> float:
    """The median of what its pictures took that are there; else of the first batch, which is made and let go of."""
    known = [entry["seconds"] for entry in read_records(cases, share.folder) if entry and "seconds" in entry]
    if not known:
        studio.load()
        known = [made.notes["seconds"] for made in timed(studio, share.method, share.batches[0])]
    return sorted(known)[len(known) // 2]


def plan_table(
    args: argparse.Namespace, studio: Studio, rows: Collection[tuple[Method, list[Case]]], state: PartialState
) -> str:
    """
    What a run would do, as a table: pictures, network calls per picture, and hours on so many processes.

    Network calls are forward passes of one picture through the UNet, of which so many have a backward pass; those of
    MUSE are the most that there can be. Hours are estimated from a batch of each row.
    """
    lines = [f"{'row':<44}{'pictures':>9}{'there':>8}{'calls':>8}{'backward':>9}{'s each':>8}{'hours':>8}"]
    total = 0.0
    for method, cases in rows:
        share = share_of(args, method, cases, state)
        calls, backward = method.calls(studio.steps, studio.settings) if method.calls else ("–", "–")
        seconds = seconds_per_picture(studio, share, cases)
        hours = seconds * len(share.missing) / 3600 / state.num_processes
        total += hours
        there = len(cases) - len(share.missing)
        lines.append(f"{method.name:<44}{len(cases):>9}{there:>8}{calls:>8}{backward:>9}{seconds:>8.1f}{hours:>8.2f}")
    lines.append(f"In all about {total:.1f} hours on {state.num_processes} process{'es' * (state.num_processes > 1)}.")
    return "\n".join(lines)


# --------------------------------------------------------------------------------------
# What a folder was made with
# --------------------------------------------------------------------------------------


def commit() -> str | None:
    """The commit of this clone, with a `+` where files were changed since; `None` where it is no clone."""
    try:
        output = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            cwd=REPOSITORY,
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return output.stdout.strip()


def device_name(device: str) -> str:
    """The name of the GPU or the CPU."""
    return torch.cuda.get_device_name(device) if torch.device(device).type == "cuda" else processor()


def note_run(args: argparse.Namespace, state: PartialState) -> None:
    """Adds to `run.json` when and with what this run was started: its arguments, versions, commit and device."""
    path = args.output_dir / "run.json"
    known = json.loads(read_text(path))["runs"] if path.exists() else []
    entry = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "arguments": {name: value for name, value in vars(args).items() if value is not None},
        "versions": versions(),
        "commit": commit(),
        "device": device_name(args.device),
        "processes": state.num_processes,
    }
    write_whole(path, json.dumps({"runs": [*known, entry]}, indent=1, default=str) + "\n")
