# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What the demo and the app show of a picture: what a judge sees in it, and the inner loop that made it."""

import argparse
import math
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import matplotlib
from diffusers import DiffusionPipeline
from transformers import PreTrainedModel

from muse_examples import REPOSITORY
from muse_examples.contact_sheets import BAD, EMOTION_COLORS, FAINT, GOOD, INK, PAPER
from muse_examples.pipelines import read_model, settings_of


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402


PROMPT = "a house in the park"
PICTURE = REPOSITORY / "examples" / "picture.png"
CAPTION = "a boat in the harbour"  # what it shows


def load_judge(pipe: DiffusionPipeline, args: argparse.Namespace) -> PreTrainedModel | None:
    """A classifier that says what a picture evokes, and that did not guide; `None` for bases that bring none."""
    judge = settings_of(args.base).get("judge")
    return read_model(REPOSITORY / judge).to(pipe.device) if judge else None


def remark(probabilities: dict[str, float], wanted: str | None) -> tuple[str, str]:
    """What the judge sees in a picture, such as `judge: fear 87%`, in the colour of its agreement with `wanted`."""
    label = max(probabilities, key=probabilities.__getitem__)
    color = FAINT if wanted is None else GOOD if label == wanted else BAD
    return f"judge: {label} {probabilities[label]:.0%}", color


def plot_inner_loop(traces: Sequence[Any], threshold: float, path: Path) -> Path:
    """
    Draws the paper's Figure 2: when the gate opens, and what the optimisation does from there.

    Args:
        traces (sequence of `MuseTrace`): One per emotion, of pictures that share prompt and seed.
        threshold (`float`): The similarity that opens the gate.
        path (`Path`): Where to write the plot.

    Returns:
        `Path`: The same.
    """
    figure, (gate, loss, probability) = plt.subplots(1, 3, figsize=(13, 3.9), facecolor=PAPER, layout="constrained")
    longest = max(traces, key=lambda trace: len(trace.similarity)).similarity
    gate.plot(range(len(longest)), longest, color=INK, marker="o", markersize=4)
    gate.set_xlim(-0.5, max(1.5, len(longest) - 0.5))  # whole steps, where the gate is open at the first one too
    if longest and threshold < math.inf:
        gate.axhline(threshold, color=BAD, linestyle="--", linewidth=1)
        gate.annotate("threshold", (0, threshold), (2, 4), textcoords="offset points", color=BAD)
    elif not longest:
        gate.text(0.5, 0.5, "open from the first step", transform=gate.transAxes, ha="center", color=FAINT)
    gate.set(title="When: similarity of preview and prompt", xlabel="denoising step", ylabel="logit scale · cos")
    for trace in traces:
        label = next(iter(trace.emotion))
        targets = [trace.labels.index(name) for name in trace.emotion]
        reached = [[sum(iterate[index] for index in targets) for iterate in step] for step in trace.probabilities]
        style: dict[str, Any] = {"color": EMOTION_COLORS.get(label, INK), "label": label, "linewidth": 1.4}
        loss.plot([value for step in trace.loss for value in step], **style)
        probability.plot([value for step in reached for value in step], **style)
        for end in list(accumulate(len(step) for step in trace.loss))[:-1] if len(traces) == 1 else []:
            for axes in (loss, probability):
                axes.axvline(end - 0.5, color=FAINT, linewidth=0.5, alpha=0.5)
    loss.set(title="How: loss", xlabel="inner iteration, all steps in a row")
    probability.set(title="How: probability of the emotion", xlabel="inner iteration, all steps in a row", ylim=(0, 1))
    probability.legend(fontsize=8, frameon=False, loc="lower right", ncols=2)
    for axes in (gate, loss, probability):
        axes.set_facecolor(PAPER)
        axes.spines[["top", "right"]].set_visible(False)
        axes.xaxis.get_major_locator().set_params(integer=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path
