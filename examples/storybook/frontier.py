# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What MUSE can spare on Storybook: accuracy of judges that never guide against seconds, for many settings.

The rows start from the presets "full" and "fast" of `MusePipeline` and change one thing each, so that what does not
help stands there with its number. They are rows of `examples/evaluate.py`, which makes and judges the pictures; here
their time is compared with the stock pipeline's. No preset was chosen on these prompts. Seconds are taken while the
pictures are made: nothing else should run.

    python examples/storybook/frontier.py
    accelerate launch --multi_gpu --num_processes 2 examples/storybook/frontier.py    # on two processes
    python examples/storybook/frontier.py --library     # build the emotion library anew, and no more
"""

import argparse
import csv
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import repository  # noqa: F401
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler
from muse_examples.emotion_library import make_library, save_library
from muse_examples.evaluation.command import main as evaluate
from muse_examples.evaluation.methods import REGISTERED, Method, Studio, with_word, without_emotion
from muse_examples.files import read_text, write_whole
from muse_examples.runs import Job, Made, run_batch
from repository import ROOT
from safetensors.torch import load_file
from test_sets import CLIP, JUDGES, SEED, prompts, write_prompts
from world import EMOTIONS

from pipeline_muse import MusePipeline


STOCK, WORD, FULL, FAST = "stock", "emotion's word in the prompt", "full", "fast"
STEPS = 20  # of the denoising, unless a row says otherwise
FOLDER = Path(__file__).parent / "fast"  # weights have names that no diffusers download of the checkpoint takes along
LIBRARY = FOLDER / "emotion_library.safetensors"
TICKS = (0.6, 1, 1.3, 2, 3, 4, 6, 12, 24)
TABLE = "methods.csv"  # of evaluate.py: that of the rows of a file

Numbers = dict[str, dict[str, float]]  # of a table, by row and column
Report, Plot = Callable[[Numbers], str], Callable[[Numbers, Path], None]


@dataclass(frozen=True)
class Row:
    """A way to make images: a preset, what is changed of it, and components."""

    name: str
    preset: str | None = None  # `None`: the stock pipeline
    changes: dict[str, Any] = field(default_factory=dict)
    preview_vae: bool = False
    library: bool = False
    scheduler: bool = False  # DPM-Solver++ in place of DDIM
    steps: int = STEPS

    @property
    def group(self) -> str:
        return self.preset or STOCK


def rows() -> list[Row]:
    """All rows of the frontier, in their order."""
    few = {"scheduler": True, "steps": 10}
    return [
        Row(STOCK),
        Row(WORD),
        Row("paper", "paper"),
        Row(FULL, "full"),
        *(Row(f"full, interval {k}", "full", {"update_interval": k}) for k in (2, 4)),
        *(Row(f"full, {k} inner steps", "full", {"max_inner_steps": k}) for k in (1, 2)),
        Row("full, from random tokens", "full", {"emotion_tokens": "random"}),
        Row("full, without degraded copies", "full", {"degraded_copies": 0}),
        Row("full, without a latest start", "full", {"latest_start": 1.0}),
        Row("full, to 97 %", "full", {"loss_threshold": 0.03}),
        Row("full, preview_vae", "full", preview_vae=True),
        Row("full, preview_scale 0.5", "full", {"preview_scale": 0.5}),
        Row("full, library", "full", library=True),
        Row("full, 10 steps of DPM-Solver++", "full", **few),
        Row(FAST, "fast"),
        *(Row(f"fast, interval {k}", "fast", {"update_interval": k}) for k in (1, 3, 4)),
        *(Row(f"fast, {k} inner steps", "fast", {"max_inner_steps": k}) for k in (1, 3)),
        *(Row(f"fast, rate {rate}", "fast", {"emotion_learning_rate": rate}) for rate in (0.1, 0.3)),
        Row("fast, from random tokens", "fast", {"emotion_tokens": "random"}),
        Row("fast, without degraded copies", "fast", {"degraded_copies": 0}),
        Row("fast, without optimisation", "fast", {"max_inner_steps": 0}),
        Row("fast, preview_vae", "fast", preview_vae=True),
        Row("fast, preview_scale 0.5", "fast", {"preview_scale": 0.5}),
        Row("fast, library", "fast", library=True),
        Row("fast, 10 steps of DPM-Solver++", "fast", **few),
    ]


def library_prompts(count: int = 4) -> list[str]:
    """Prompts of the emotion library, none of which the rows are measured on."""
    return prompts(count, start=38)


# --------------------------------------------------------------------------------------
# Making pictures
# --------------------------------------------------------------------------------------


def load_preview_vae() -> AutoencoderTiny:
    """The small decoder of `train_preview_vae.py`, for `preview_vae` of Storybook's pipeline."""
    tiny = AutoencoderTiny.from_config(json.loads((FOLDER / "preview_vae.json").read_text()))
    tiny.load_state_dict(load_file(FOLDER / "preview_vae.safetensors"))
    return tiny.eval()


@contextmanager
def dressed(pipe: MusePipeline, row: Row) -> Iterator[MusePipeline]:
    """The pipeline with the row's components."""
    before, scheduler = pipe.preview_vae, pipe.scheduler
    pipe.preview_vae = load_preview_vae().to(pipe.unet.dtype) if row.preview_vae else before
    if row.scheduler:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    try:
        yield pipe
    finally:
        pipe.preview_vae, pipe.scheduler = before, scheduler


def as_method(row: Row) -> Method:
    """The row as one of `examples/evaluate.py`."""

    def make(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
        call = {**studio.call, "num_inference_steps": row.steps}
        if row.preset is None:
            asked = [without_emotion(job, with_word(job) if row.name == WORD else None) for job in jobs]
            return run_batch(studio.pipe, asked, **call)
        call |= studio.settings | {"preset": row.preset} | row.changes
        if row.library:
            call["emotion_tokens"] = load_file(LIBRARY)
        with dressed(studio.pipe, row) as pipe:
            return run_batch(pipe, jobs, **call)

    told = {name: value for name, value in vars(row).items() if name != "name"}
    return Method(row.name, make, settings=told)


REGISTERED += [as_method(row) for row in rows()]


def build_library() -> None:
    """Mean tokens of each emotion over the images of `library_prompts` whose gate opened, in one safetensors file."""
    pipe = MusePipeline.from_pretrained(ROOT, trust_remote_code=True)
    call = {"num_inference_steps": STEPS, "preset": "full"}
    library = make_library(pipe, library_prompts(), EMOTIONS, seed=5000, batch_size=8, **call)
    save_library(library, LIBRARY, base="Storybook")


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


def read_table(path: Path) -> Numbers:
    """The numbers of each row of evaluate.py's table, by the headings of its columns."""
    lines = csv.DictReader(read_text(path).splitlines())
    return {
        line["method"]: {name: float(text) for name, text in line.items() if name != "method" and text}
        for line in lines
    }


def times_stock(table: Numbers) -> dict[str, float]:
    """The time of each row, as a multiple of the stock pipeline's."""
    seconds = column(table, "seconds")
    return {row: told / seconds[STOCK] for row, told in seconds.items()}


def column(table: Numbers, name: str) -> dict[str, float]:
    """The numbers of a column, by row; its heading is the name, or has a unit behind it."""
    found = [key for key in next(iter(table.values())) if key == name or key.startswith(f"{name} (")]
    return {row: told[found[0]] for row, told in table.items()}


def report(table: Numbers) -> str:
    """Accuracy of both judges, content and time as a Markdown table."""
    times, columns = times_stock(table), {name: column(table, name) for name in ("Emo-B", "Emo-C", "CLIP")}
    lines = [f"| row | {' | '.join(columns)} | × stock |", "|---|" + "---:|" * (len(columns) + 1)]
    for row in table:
        told = " | ".join(f"{values[row]:.1f}" for values in columns.values())
        lines.append(f"| {row} | {told} | {times[row]:.2f} |")
    return "\n".join(lines) + "\n"


def plot(table: Numbers, path: Path) -> None:
    """The frontier: accuracy of Emo-B, and CLIP, against the time as a multiple of the stock pipeline's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    times = times_stock(table)
    shown = [row for row in rows() if row.name in table]
    colors = {STOCK: "#555555", "paper": "#c8372d", "full": "#3f7fbf", "fast": "#e0912f"}
    figure, axes = plt.subplots(1, 3, figsize=(17, 7.5), layout="constrained", width_ratios=(5, 5, 4))
    for axis, name, title in zip(axes, ("Emo-B", "CLIP"), ("Emo-B accuracy [%]", "CLIP (content kept)")):
        values = column(table, name)
        for number, row in enumerate(shown, start=1):
            place = times[row.name], values[row.name]
            size = {"s": 190, "marker": "*"} if row.name in (FULL, FAST) else {"s": 30, "marker": "o"}
            axis.scatter(*place, color=colors[row.group], zorder=3, **size)
            axis.annotate(str(number), place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", xlabel="time, as a multiple of the stock pipeline's", title=title)
        axis.minorticks_off()
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        for goal in (1.3, 6):
            axis.axvline(goal, color="#cccccc", linestyle="--", zorder=0)
    accuracy = column(table, "Emo-B")
    best = frontier({row.name: (times[row.name], accuracy[row.name]) for row in shown})
    axes[0].plot(*zip(*best), color="#999999", linewidth=1, zorder=1)
    axes[2].axis("off")
    for number, row in enumerate(shown, start=1):
        text = f"{number}  {row.name}"
        axes[2].text(0, 1 - number / (len(shown) + 1), text, color=colors[row.group], transform=axes[2].transAxes)
    figure.suptitle(f"Storybook, {STEPS} steps; the line: what nothing beats in both; dashed: the goals")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def frontier(points: dict[str, tuple[float, float]]) -> list[tuple[float, float]]:
    """The (time, accuracy) of the rows that none beats in both."""
    best, highest = [], float("-inf")
    for seconds, accuracy in sorted(points.values(), key=lambda point: (point[0], -point[1])):
        if accuracy > highest:
            best.append((seconds, accuracy))
            highest = accuracy
    return best


def publish(args: argparse.Namespace, file: Path, name: str, report: Report, plot: Plot) -> None:
    """Prints evaluate.py's table and writes it and its plot where they are asked for, if pictures were judged.

    Above the table stands what evaluate.py says of it: pictures, hardware, versions and commit.
    """
    if file.exists():
        table = read_table(file)
        made_on = read_text(file.with_suffix(".md")).splitlines()[0]
        text = f"{made_on}\n\n{report(table)}"
        print(text)
        for folder in filter(None, (args.output_dir, args.results_dir)):
            write_whole(folder / f"{name}.md", text)
            plot(table, folder / f"{name}.png")


def parse_args(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and those of `examples/evaluate.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts, each with all 8 emotions")
    parser.add_argument("--library", action="store_true", help="build the emotion library anew, and no more")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/frontier"))
    parser.add_argument("--results_dir", type=Path, help="write table and plot there, too")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args, rest = parse_args(arguments)
    if args.library:
        build_library()
        return
    given = ["--captions", str(write_prompts(args.output_dir / "prompts.txt", args.prompts)), "--seed", str(SEED)]
    given += ["--batch_size", "8", "--classifier", *JUDGES, "--scores", CLIP, "--table", "methods"]
    evaluate([*given, "--methods", __file__, "--output_dir", str(args.output_dir), *rest], __doc__)
    publish(args, args.output_dir / "tables" / TABLE, "frontier", report, plot)


if __name__ == "__main__":
    main()
