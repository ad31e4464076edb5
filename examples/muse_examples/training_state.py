# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Where a training run stands, how that is written down, and how a run goes on from it."""

import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.tracking import GeneralTracker


@dataclass
class Progress:
    """Where a run stands. `signature` holds what has to be the same when it goes on."""

    signature: dict[str, Any]
    epoch: int = 0  # that is under way
    batch: int = 0  # batches of it that are done
    step: int = 0  # optimizer steps in all
    best: list[float] = field(default_factory=lambda: [-1.0, -math.inf])  # accuracy, then minus the loss
    best_epoch: int = 0  # counted from 1
    seconds: float = 0.0

    def improves(self, accuracy: float, loss: float) -> bool:
        """Takes note of a validation, and says whether it is the best so far."""
        if [accuracy, -loss] <= self.best:
            return False
        self.best, self.best_epoch = [accuracy, -loss], self.epoch + 1
        return True


class JsonLines(GeneralTracker):
    """A tracker of accelerate that writes one line of JSON per entry."""

    name, requires_logging_directory = "jsonl", False

    def __init__(self, path: Path):
        super().__init__()
        self.path = path

    @property
    def tracker(self) -> Path:
        return self.path

    def log(self, values: dict, step: int | None = None, **kwargs: Any) -> None:
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def forget_after(self, step: int) -> None:
        """Drops the entries of steps that are taken again, and a last line that was cut off."""
        lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True) if self.path.is_file() else []
        kept = [line for line in lines if line.endswith("}\n") and json.loads(line)["step"] <= step]
        self.path.write_text("".join(kept), encoding="utf-8")


def list_checkpoints(folder: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in folder.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdecimal()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("checkpoint-")))


def save_checkpoint(accelerator: Accelerator, folder: Path, progress: Progress, limit: int) -> None:
    """Writes a checkpoint that is there either whole or not at all, and removes the oldest beyond the limit."""
    partial = folder / "partial-checkpoint"
    target = folder / f"checkpoint-{progress.step}"
    if accelerator.is_main_process:
        shutil.rmtree(partial, ignore_errors=True)
    accelerator.wait_for_everyone()
    accelerator.save_state(str(partial))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        if (folder / "best.safetensors").is_file():
            shutil.copyfile(folder / "best.safetensors", partial / "best.safetensors")
        (partial / "progress.json").write_text(json.dumps(asdict(progress)))
        shutil.rmtree(target, ignore_errors=True)
        os.rename(partial, target)
        for old in list_checkpoints(folder)[:-limit]:
            shutil.rmtree(old)
    accelerator.wait_for_everyone()


def resume(accelerator: Accelerator, folder: Path, checkpoint: str | None, progress: Progress) -> Progress:
    """The progress of the checkpoint to go on from, whose state is loaded; `progress` if there is none."""
    found = list_checkpoints(folder)
    if checkpoint == "latest" and not found:
        accelerator.print(f"{folder} holds no checkpoint yet: the run starts at its beginning.")
    if checkpoint is None or (checkpoint == "latest" and not found):
        return progress
    path = found[-1] if checkpoint == "latest" else Path(checkpoint)
    saved = Progress(**json.loads((path / "progress.json").read_text()))
    if saved.signature != progress.signature:
        raise ValueError(f"{str(path)!r} is of another run: {saved.signature}, not {progress.signature}.")
    accelerator.load_state(str(path))
    if accelerator.is_main_process and (path / "best.safetensors").is_file():
        shutil.copyfile(path / "best.safetensors", folder / "best.safetensors")
    accelerator.print(f"Going on from {path}, epoch {saved.epoch + 1}, batch {saved.batch}.")
    return saved
