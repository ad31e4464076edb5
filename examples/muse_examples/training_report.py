# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a training says of its classifier: pictures of its mistakes and its calibration, and a model card."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard
from matplotlib.figure import Figure
from modeling_simemo import SimEmoConfig

from muse_examples.classifiers import model_card
from muse_examples.contact_sheets import BAD, FAINT, INK
from muse_examples.metrics import BINS, calibration_bins, calibration_error
from muse_examples.plots import confusion_figure, save_figure


# --------------------------------------------------------------------------------------------------- pictures


def draw_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Draws a confusion matrix in per cent of the true class, with the number of pictures of each class."""
    save_figure(confusion_figure(matrix, names), path, dpi=90)


def draw_reliability(before: torch.Tensor, after: torch.Tensor, labels: torch.Tensor, path: Path) -> None:
    """Draws accuracy by confidence before and after the scaling; where it is calibrated, bars end on the diagonal."""
    figure = Figure(figsize=(9, 4.2), layout="constrained")
    for axes, (title, logits) in zip(figure.subplots(1, 2, sharey=True), {"before": before, "after": after}.items()):
        bins = calibration_bins(logits, labels)
        for index, (count, confidence, accuracy) in enumerate(bins):
            if count:
                axes.bar((index + 0.5) / BINS, accuracy, width=0.94 / BINS, color="#3f7fbf")
                axes.plot([(index + 0.5) / BINS] * 2, [accuracy, confidence], color=BAD, linewidth=2)
                axes.text((index + 0.5) / BINS, 1.02, count, ha="center", fontsize=7, color=FAINT)
        axes.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--")
        error = calibration_error(logits, labels)
        axes.set(xlim=(0, 1), ylim=(0, 1.08), xlabel="confidence", title=f"{title} scaling: ECE {100 * error:.1f} %")
    figure.axes[0].set_ylabel("accuracy (bars), gap to confidence (red)")
    figure.savefig(path, dpi=90)


# -------------------------------------------------------------------------------------------------- model card


def percent(value: float | None) -> str:
    return "–" if value is None else f"{100 * value:.1f}"


def _table(rows: Sequence[Sequence[object]]) -> str:
    """A Markdown table; the first row is the heading."""
    lines = ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


ABOUT = """An emotion classifier on CLIP's vision tower, trained on {data} by the recipe of SimEmo: a guide for MUSE.

## Data

{pictures}

Left out, as they cannot be read: {unreadable}.

## Results on the {split} pictures

{results}

{recall}

![Confusion matrix](confusion.png)

The logits are divided by a temperature of {temperature:.3f}, fitted on the validation pictures and folded into the
last linear layer. {caution}MUSE stops its inner loop once the guide finds the emotion probable enough, and
over-confident guides do so early. Degraded pictures are soft, pale and noisy, like the previews that a guide sees.

![Reliability diagram](reliability.png)

## Training

{recipe}

The best of {epochs} epochs, by the accuracy on the validation pictures, is number {best_epoch}. Training took
{seconds:.0f} s on {device}, validation aside.

## Limits

It knows pictures like those above, and the labels that they have; the figures hold for pictures like those of the
{split} split."""


def training_card(report: dict[str, Any], config: SimEmoConfig) -> ModelCard:
    """
    Writes the model card of a run.

    Args:
        report (`dict[str, Any]`): The content of `metrics.json`.
        config ([`SimEmoConfig`]): The configuration of the classifier.

    Returns:
        `ModelCard`: The card, with the accuracy in its front matter.
    """
    final = report["metrics"]
    counts = [(split, *labels.values(), sum(labels.values())) for split, labels in report["pictures"].items()]
    stages = {
        "as released": final,
        "before temperature scaling": report["metrics_before_scaling"],
        "as released, on degraded pictures": report["metrics_degraded"],
    }
    results = [
        (name, percent(stage["accuracy"]), f"{stage['loss']:.3f}", percent(stage["calibration_error"]))
        for name, stage in stages.items()
    ]
    on_validation = report["split"] == "validation"
    about = ABOUT.format(
        pictures=_table([("split", *report["labels"], "all"), *counts]),
        results=_table([("", "accuracy %", "cross-entropy", "calibration error %"), *results]),
        recall=_table([("label", "recall %"), *((label, percent(share)) for label, share in final["recall"].items())]),
        recipe=_table([("option", "value"), *((f"`{name}`", value) for name, value in report["recipe"].items())]),
        caution="It is these that are measured above, so that is a little too good. " if on_validation else "",
        unreadable=len(report["unreadable"]),
        **{key: report[key] for key in ("data", "split", "temperature", "epochs", "best_epoch", "seconds", "device")},
    )
    card = model_card(config, report["name"], about, report["repository"], report["base_model"])
    front_matter: Any = card.data
    front_matter.datasets = report["datasets"]
    front_matter.metrics = ["accuracy"]
    front_matter.model_name = report["name"]
    result = {"task_type": "image-classification", "dataset_type": "imagefolder", "dataset_name": report["data"]}
    accuracy = EvalResult(metric_type="accuracy", metric_value=round(final["accuracy"], 4), **result)
    front_matter.eval_results = [accuracy]
    return card
