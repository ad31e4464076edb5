# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What MUSE can spare on Storybook: accuracy of judges that never guide against seconds, for many settings.

The rows start from the presets "full" and "fast" of `MusePipeline` and change one thing each, so that what does not
help stands there with its number. Presets were chosen on these prompts; `--confirm` measures them and the stock
pipeline on other prompts, twice as many. Seconds are of one thread; they are taken apart from the judging, all rows in
turn on the same images, so run `--time` when nothing else runs. Writes JSON, a Markdown table and a plot; what was
measured before is not measured again.

    python examples/storybook/frontier.py                  # judges all rows
    python examples/storybook/frontier.py --time           # and tells their seconds
    python examples/storybook/frontier.py --confirm        # the presets on unseen prompts
    python examples/storybook/frontier.py --xl             # the presets on the SDXL-shaped checkpoint
"""

import argparse
import json
import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import repository  # noqa: F401
import torch
from common import save_json
from diffusers import AutoencoderTiny, DPMSolverMultistepScheduler
from diffusers.models.attention_processor import AttnProcessor
from evaluate import (
    PROCESS,
    items_of_generation,
    load,
    markdown,
    save_sheet,
    shuffled_contents,
    to_pixels,
)
from muse_examples.emotion_library import make_library, save_library
from muse_examples.measuring import processor
from safetensors.torch import load_file
from tqdm import tqdm
from world import EMOTIONS, content_prompt

from pipeline_muse import MusePipeline


STOCK, WORD, FULL, FAST = "stock", "emotion's word in the prompt", "full", "fast"
STEPS = 50  # of the denoising, unless a row says otherwise
FOLDER = Path(__file__).parent / "fast"  # weights have names that no diffusers download of the checkpoint takes along
LIBRARY = FOLDER / "emotion_library.safetensors"
UNSEEN = 16  # prompts of the confirmation
BATCH_SIZE = 16
TICKS = (0.6, 1, 1.3, 2, 3, 4, 6, 12, 24)
TIMED = 8  # images, each of another prompt and another emotion


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
    most_images: int | None = None  # where they take long

    @property
    def group(self) -> str:
        return self.preset or STOCK


def fast(what: str, row: Row = Row(""), **changes: Any) -> Row:
    """A change of the preset "fast" at every 4th step, where most of them were compared; `row` has the components."""
    return replace(row, name=f"fast, interval 4, {what}", preset="fast", changes={"update_interval": 4, **changes})


def rows() -> list[Row]:
    """All rows of the frontier, in their order."""
    few = {"scheduler": True, "steps": 15}
    return [
        Row(STOCK),
        Row(WORD),
        Row("paper (16 images)", "paper", most_images=16),
        Row(FULL, "full"),
        *(Row(f"full, interval {k}", "full", {"update_interval": k}) for k in (5, 10)),
        *(Row(f"full, {k} inner steps", "full", {"max_inner_steps": k}) for k in (1, 2)),
        Row("full, from the emotion's word", "full", {"emotion_tokens": "emotion"}),
        Row("full, preview_vae", "full", preview_vae=True),
        Row("full, preview_scale 0.5", "full", {"preview_scale": 0.5}),
        Row("full, library", "full", library=True),
        Row("full, 15 steps of DPM-Solver++", "full", **few),
        Row(FAST, "fast"),
        *(Row(f"fast, interval {k}", "fast", {"update_interval": k}) for k in (2, 4, 6, 8)),
        fast("rate 0.2", emotion_learning_rate=0.2),
        fast("rate 0.4", emotion_learning_rate=0.4),
        fast("from random tokens", emotion_tokens="random"),
        fast("without optimisation", max_inner_steps=0),
        fast("preview_scale 0.5", preview_scale=0.5),
        fast("preview_vae", Row("", preview_vae=True)),
        fast("preview_vae, η = 10.5", Row("", preview_vae=True), semantic_threshold=10.5),
        fast("library, rate 0.2", Row("", library=True), emotion_learning_rate=0.2),
        fast("library without optimisation", Row("", library=True), max_inner_steps=0),
        Row("fast, interval 2, 15 steps of DPM-Solver++", "fast", {"update_interval": 2}, **few),
        Row("DATE's schedule: 5 normalised steps, random tokens, η = 0", "fast",
            {"update_interval": 10, "emotion_tokens": "random", "semantic_threshold": 0.0}),
    ]  # fmt: skip


def confirmed_rows() -> list[Row]:
    """The rows that are measured on unseen prompts, and on the SDXL-shaped checkpoint."""
    return [row for row in rows() if row.name in (STOCK, FULL, FAST)]


def unseen_items() -> list[dict]:
    """Prompts that no choice was made on, each with the 8 emotions."""
    return items_of_generation(8 + UNSEEN)[8 * len(EMOTIONS) :]


def library_prompts(count: int = 4) -> list[str]:
    """Prompts of the emotion library; neither those of the frontier nor those of the confirmation."""
    return [content_prompt(*content) for content in shuffled_contents()[40 : 40 + count]]


# --------------------------------------------------------------------------------------
# Making and judging images
# --------------------------------------------------------------------------------------


def load_preview_vae() -> AutoencoderTiny:
    """The small decoder of `train_preview_vae.py`, for `preview_vae` of Storybook's pipeline."""
    tiny = AutoencoderTiny.from_config(json.loads((FOLDER / "preview_vae.json").read_text()))
    tiny.load_state_dict(load_file(FOLDER / "preview_vae.safetensors"))
    return tiny.eval()


@contextmanager
def dressed(pipe: MusePipeline, row: Row):
    """The pipeline with the row's components."""
    before, scheduler = pipe.preview_vae, pipe.scheduler
    pipe.preview_vae = load_preview_vae().to(pipe.unet.dtype) if row.preview_vae else before
    if row.scheduler:
        pipe.scheduler = DPMSolverMultistepScheduler.from_config(scheduler.config)
    try:
        yield pipe
    finally:
        pipe.preview_vae, pipe.scheduler = before, scheduler


def make(pipe: MusePipeline, row: Row, items: list[dict]) -> tuple[list, list]:
    """Images of one batch of items, and their traces (none of the stock pipeline)."""
    prompts = [item["word_prompt" if row.name == WORD else "prompt"] for item in items]
    generators = [torch.Generator().manual_seed(item["seed"]) for item in items]
    call: dict[str, Any] = {"num_inference_steps": row.steps, "generator": generators}
    if row.preset is None:
        return pipe(prompts, **call).images, []
    call |= {"preset": row.preset} | row.changes
    if row.library:
        call["emotion_tokens"] = load_file(LIBRARY)
    output = pipe(prompts, emotion=[item["emotion"] for item in items], **call)
    return output.images, output.trace


@torch.no_grad()
def target_probability(images: list, items: list[dict], name: str) -> float:
    """What a judge gives the target on average; smoother than its accuracy."""
    judges = PROCESS["judges"]
    judge = judges.classifiers[name]
    probabilities = judge(pixel_values=judges.spec.prepare(to_pixels(images))).logits.softmax(dim=-1)
    columns = [judge.config.label2id[item["emotion"]] for item in items]
    return float(probabilities[range(len(items)), columns].mean())


def judge_row(row: Row, items: list[dict], sheets: Path) -> dict[str, Any]:
    """Accuracies, CLIP and what was spent per image."""
    images, traces = [], []
    with dressed(PROCESS["pipe"], row) as pipe:
        for start in range(0, len(items), BATCH_SIZE):
            made, told = make(pipe, row, items[start : start + BATCH_SIZE])
            images, traces = images + made, traces + told
    result: dict[str, Any] = PROCESS["judges"].judge(images, items)
    result["p(target), Emo-B"] = target_probability(images, items, "Emo-B")
    if traces:
        result |= {
            "open": 100 * float(np.mean([trace.gate_step is not None for trace in traces])),
            "looks of the gate": float(np.mean([len(trace.similarity) for trace in traces])),
            "evaluations": float(np.mean([sum(map(len, trace.loss)) for trace in traces])),
            "inner steps": float(np.mean([trace.inner_steps for trace in traces])),
        }
    save_sheet(images[: 6 * len(EMOTIONS)], sheets / f"{row.name.replace(' ', '_')}.png")
    return result


def time_row(row: Row, items: list[dict], batch_size: int) -> float:
    """Seconds of one thread per image."""
    with dressed(PROCESS["pipe"], row) as pipe:
        make(pipe, row, items[:1])  # warms up
        start = time.process_time()
        for first in range(0, len(items), batch_size):
            make(pipe, row, items[first : first + batch_size])
        return (time.process_time() - start) / len(items)


def prepare(dtype: str, xl: bool = False) -> None:
    """Loads, once per process, pipeline and judges."""
    load(dtype, threads=1, xl=xl)
    PROCESS["pipe"].unet.set_attn_processor(AttnProcessor())


def build_library(dtype: str) -> None:
    """Mean tokens of each emotion over the images of `library_prompts` whose gate opened, in one safetensors file."""
    prepare(dtype)
    prompts, call = library_prompts(), {"num_inference_steps": STEPS, "preset": "full"}
    library = make_library(PROCESS["pipe"], prompts, EMOTIONS, seed=5000, batch_size=8, **call)
    save_library(library, LIBRARY, base="Storybook")


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


def report(record: dict[str, Any], names: list[str], part: str = "rows") -> str:
    """The rows as a Markdown table, with times as multiples of the stock pipeline's."""
    table = {name: dict(record[part][name]) for name in names if name in record[part]}
    for name, row in table.items():
        if name in record["seconds"] and part != "xl":
            row["seconds"] = record["seconds"][name]
            row["x stock"] = row["seconds"] / record["seconds"][STOCK]
    judged = ["Emo-A", "Emo-B", "Emo-C", "Emo-B degraded", "Emo-C degraded", "CLIP"]
    spent = ["open", "looks of the gate", "evaluations", "inner steps", "seconds", "x stock"]
    return markdown(table, [*judged, *spent])


def plot(record: dict[str, Any], path: Path) -> None:
    """The frontier: accuracy of Emo-B, and CLIP, against the time as a multiple of the stock pipeline's."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    seconds = {name: value / record["seconds"][STOCK] for name, value in record["seconds"].items()}
    shown = [row for row in rows() if row.name in record["rows"] and row.name in seconds]
    colors = {STOCK: "#555555", "paper": "#c8372d", "full": "#3f7fbf", "fast": "#e0912f"}
    figure, axes = plt.subplots(1, 3, figsize=(17, 7.5), layout="constrained", width_ratios=(5, 5, 4))
    for axis, column, title in zip(axes, ("Emo-B", "CLIP"), ("Emo-B accuracy [%]", "CLIP (content kept)")):
        for number, row in enumerate(shown, start=1):
            place = seconds[row.name], record["rows"][row.name][column]
            size = {"s": 190, "marker": "*"} if row.name in (FULL, FAST) else {"s": 30, "marker": "o"}
            axis.scatter(*place, color=colors[row.group], zorder=3, **size)
            axis.annotate(str(number), place, xytext=(4, 4), textcoords="offset points", fontsize=8)
        axis.set(xscale="log", xlabel="time, as a multiple of the stock pipeline's", title=title)
        axis.minorticks_off()
        axis.set_xticks(TICKS, [f"{tick:g}" for tick in TICKS])
        for goal in (1.3, 6):
            axis.axvline(goal, color="#cccccc", linestyle="--", zorder=0)
    best = frontier({row.name: (seconds[row.name], record["rows"][row.name]["Emo-B"]) for row in shown})
    axes[0].plot(*zip(*best), color="#999999", linewidth=1, zorder=1)
    axes[2].axis("off")
    for number, row in enumerate(shown, start=1):
        text = f"{number}  {row.name}"
        axes[2].text(0, 1 - number / (len(shown) + 1), text, color=colors[row.group], transform=axes[2].transAxes)
    figure.suptitle(f"Storybook, {STEPS} steps, one thread; the line: what nothing beats in both; dashed: the goals")
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


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts, each with all 8 emotions")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of UNet and decoder")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="rows at a time")
    parser.add_argument("--only", nargs="+", help="names of rows; default: all")
    parser.add_argument("--time", action="store_true", help="tell the seconds of rows, too")
    parser.add_argument(
        "--time_alone", action="store_true", help="tell the seconds of images that are made one by one"
    )
    parser.add_argument("--confirm", action="store_true", help="the presets on unseen prompts")
    parser.add_argument("--xl", action="store_true", help="the presets on the SDXL-shaped checkpoint, and only that")
    parser.add_argument("--library", action="store_true", help="build the emotion library anew")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sheets_dir", type=Path, default=Path("outputs/frontier"), help="for contact sheets")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    path = args.results_dir / "frontier.json"
    empty: dict[str, Any] = {"rows": {}, "seconds": {}, "seconds alone": {}, "confirmed": {}, "xl": {}}
    record = empty | (json.loads(path.read_text()) if path.exists() else {})
    record["hardware"] = f"{os.cpu_count()} cores of an {processor()}, torch {torch.__version__}, {args.dtype}"
    if args.library:
        build_library(args.dtype)
        return
    chosen = [row for row in rows() if args.only is None or row.name in args.only]
    items = items_of_generation(args.prompts)
    parts = {"xl": (confirmed_rows(), items)} if args.xl else {"rows": (chosen, items)}
    if args.confirm:
        parts["confirmed"] = (confirmed_rows(), unseen_items())
    pool = ProcessPoolExecutor(
        args.workers, multiprocessing.get_context("spawn"), initializer=prepare, initargs=(args.dtype, args.xl)
    )
    with pool:
        jobs = {
            pool.submit(judge_row, row, asked[: row.most_images], args.sheets_dir / part): (part, row)
            for part, (wanted, asked) in parts.items()
            for row in wanted
            if row.name not in record[part]
        }
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="rows"):
            part, row = jobs[job]
            record |= json.loads(path.read_text()) if path.exists() else {}  # others may be at work
            record[part][row.name] = job.result()
            tqdm.write(f"{part}, {row.name}: " + ", ".join(f"{k} {v:.2f}" for k, v in job.result().items()))
            save_json(path, record)
        timed = [items[(len(EMOTIONS) + 1) * k % len(items)] for k in range(TIMED)]
        for part, batch_size, is_wanted in (("seconds", TIMED, args.time), ("seconds alone", 1, args.time_alone)):
            if is_wanted:
                waiting = {row.name: pool.submit(time_row, row, timed, batch_size) for row in chosen}
                record[part] |= {name: job.result() for name, job in tqdm(waiting.items(), desc=part)}
                save_json(path, record)
    names = [row.name for row in rows()]
    text = (
        f"Measured by `examples/storybook/frontier.py` on {record['hardware']}: {args.prompts} prompts x 8 emotions,"
        f" {STEPS} DDIM steps unless named, guidance 7.5. Seconds are of one thread per image, in a batch of"
        f" {TIMED}.\n\n{report(record, names)}\n"
    )
    for part, heading in (
        ("confirmed", f"On {UNSEEN} prompts that no choice was made on, x 8 emotions"),
        ("xl", "The SDXL-shaped checkpoint, on the first table's prompts"),
    ):
        text += f"\n{heading}:\n\n{report(record, names, part)}\n" if record[part] else ""
    path.with_suffix(".md").write_text(text)
    if STOCK in record["seconds"]:
        plot(record, path.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
