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
"""How good and how well calibrated a classifier is: figures, the temperature that mends it, pictures, a model card."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import EvalResult, ModelCard, ModelCardData
from matplotlib.figure import Figure
from sheets import BAD, FAINT, INK
from torch import nn
from torch.nn import functional as F


BINS = 15  # of confidence, for the calibration error
TEMPERATURES = (0.1, 10.0)  # without bounds, a validation set without errors would ask for endless confidence


def confusion_matrix(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Counts of shape (classes, classes): rows are the truth, columns the answers."""
    classes = logits.shape[-1]
    pairs = labels * classes + logits.argmax(dim=-1)
    return torch.bincount(pairs, minlength=classes**2).view(classes, classes)


def calibration_bins(logits: torch.Tensor, labels: torch.Tensor) -> list[tuple[int, float, float]]:
    """
    Sorts answers by their confidence into bins of equal width.

    Args:
        logits (`torch.Tensor` of shape `(n, classes)`): The logits.
        labels (`torch.Tensor` of shape `(n,)`): The classes that are right.

    Returns:
        `list[tuple[int, float, float]]`: Per bin the number of answers, their mean confidence and their accuracy.
    """
    confidence, answers = logits.double().softmax(dim=-1).max(dim=-1)
    right = (answers == labels).double()
    number = (confidence * BINS).long().clamp(max=BINS - 1)
    bins = []
    for index in range(BINS):
        chosen = number == index
        count = int(chosen.sum())
        bins.append((count, confidence[chosen].mean().item(), right[chosen].mean().item()) if count else (0, 0.0, 0.0))
    return bins


def calibration_error(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The expected calibration error: by how much confidence and accuracy differ, on average over the answers."""
    bins = calibration_bins(logits, labels)
    return sum(count * abs(confidence - accuracy) for count, confidence, accuracy in bins) / max(1, len(labels))


def measure(logits: torch.Tensor, labels: torch.Tensor, names: Sequence[str]) -> dict[str, Any]:
    """
    The figures of a classifier.

    Args:
        logits (`torch.Tensor` of shape `(n, classes)`): The logits.
        labels (`torch.Tensor` of shape `(n,)`): The classes that are right.
        names (sequence of `str`): The names of the classes.

    Returns:
        `dict[str, Any]`: "accuracy", "loss" (mean cross-entropy), "calibration_error", "recall" by name (`None` for
        classes that do not occur) and "confusion" (rows are the truth).
    """
    matrix = confusion_matrix(logits, labels)
    totals = matrix.sum(dim=1)
    recall = [right / total if total else None for right, total in zip(matrix.diag().tolist(), totals.tolist())]
    return {
        "accuracy": matrix.diag().sum().item() / len(labels),
        "loss": F.cross_entropy(logits.double(), labels).item(),
        "calibration_error": calibration_error(logits, labels),
        "recall": dict(zip(names, recall)),
        "confusion": matrix.tolist(),
    }


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """
    The temperature by which logits, divided by it, give the true labels the highest likelihood.

    Args:
        logits (`torch.Tensor` of shape `(n, classes)`): Logits of pictures that were not trained on.
        labels (`torch.Tensor` of shape `(n,)`): The classes that are right.

    Returns:
        `float`: The temperature, within `TEMPERATURES`. Above 1 the classifier was over-confident.
    """
    logits = logits.double()
    low, high = (1 / temperature for temperature in reversed(TEMPERATURES))
    # The loss is convex in the inverse temperature: golden-section search.
    ratio = (math.sqrt(5) - 1) / 2
    for _ in range(60):
        left, right = high - ratio * (high - low), low + ratio * (high - low)
        if F.cross_entropy(logits * left, labels) < F.cross_entropy(logits * right, labels):
            high = right
        else:
            low = left
    return 2 / (low + high)


@torch.no_grad()
def fold_temperature(head: nn.Sequential, temperature: float) -> None:
    """Divides the last linear layer of a head, and so the logits, by a temperature."""
    last = [layer for layer in head if isinstance(layer, nn.Linear)][-1]
    for parameter in last.parameters():
        parameter.div_(temperature)


# --------------------------------------------------------------------------------------------------- pictures


def draw_confusion(matrix: Sequence[Sequence[int]], names: Sequence[str], path: Path) -> None:
    """Draws a confusion matrix in per cent of the true class, with the number of pictures of each class."""
    counts = torch.tensor(matrix, dtype=torch.float64)
    totals = counts.sum(dim=1)
    shares = 100 * counts / totals.clamp(min=1)[:, None]
    side = 2.4 + 0.55 * len(names)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right")
    axes.set_yticks(range(len(names)), [f"{name} ({int(total)})" for name, total in zip(names, totals)])
    axes.set(xlabel="answer", ylabel="truth (pictures)", title="answers in % of the truth")
    for row, column in ((i, j) for i in range(len(names)) for j in range(len(names))):
        share = shares[row, column].item()
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 55 else INK)
    figure.savefig(path, dpi=90)


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


CARD = """---
{front_matter}
---

# {name}: SimEmo, trained on {labels} labels of {data}

An emotion classifier on a CLIP vision tower: pixels in, logits out, names in `config.id2label`. It is meant as the
guide of [MUSE](https://huggingface.co/papers/2511.21051), which makes or edits a picture until this classifier finds
an emotion in it.

```python
from transformers import AutoModelForImageClassification

classifier = AutoModelForImageClassification.from_pretrained("{repository}", trust_remote_code=True)
```

or, in a MUSE pipeline, `pipe.load_emotion_classifier("{repository}", trust_remote_code=True)`. `pixel_values` are
images in [0, 1] of {size} px, less `config.image_mean`, divided by `config.image_std`.

## Data

{data_table}

{skipped}

## Results on the {split} pictures

{results_table}

{recall_table}

![Confusion matrix](confusion.png)

Calibration: the logits are divided by a temperature of {temperature:.3f}, fitted on the validation pictures and folded
into the last linear layer. {calibration_note}MUSE stops its inner loop once the emotion is probable enough: a guide
that is over-confident stops it early.

![Reliability diagram](reliability.png)

## Training

{recipe_table}

Best after epoch {best_epoch} of {epochs} (validation accuracy); {seconds:.0f} s on {device}.

## Limits

- It knows pictures like those it was trained on, and their labels. It measures nobody's feelings; do not use it to
  judge people.
- The figures hold for pictures like those of the {split} split. Degraded pictures stand for a guide's early previews.
- A classifier that guided a picture is no judge of it: measure with one that did not guide.
- Check the licences of the data and of the CLIP before passing the weights on; this card states none.
"""


def model_card(report: dict[str, Any]) -> ModelCard:
    """
    Writes the model card of a run.

    Args:
        report (`dict[str, Any]`): As in `metrics.json`.

    Returns:
        `ModelCard`: The card, with front matter that the Hub understands.
    """
    final, recipe, name = report["metrics"], report["recipe"], report["name"]
    result = {"task_type": "image-classification", "dataset_type": "imagefolder", "dataset_name": report["data"]}
    front_matter = ModelCardData(
        model_name=name,
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["emotion", "clip", "simemo", "muse"],
        base_model=report["base_model"],
        datasets=report["datasets"],
        metrics=["accuracy"],
        eval_results=[EvalResult(metric_type="accuracy", metric_value=round(final["accuracy"], 4), **result)],
    )
    rows = [(split, *counts.values(), sum(counts.values())) for split, counts in report["pictures"].items()]
    own_test = report["split"] == "test"
    text = CARD.format(
        front_matter=front_matter.to_yaml(),
        name=name,
        data=report["data"],
        labels=len(report["labels"]),
        repository=report["repository"],
        size=report["image_size"],
        data_table=_table([("split", *report["labels"], "all"), *rows]),
        skipped=f"Left out because they cannot be read: {len(report['unreadable'])}.",
        split=report["split"],
        results_table=_table(
            [
                ("", "accuracy %", "cross-entropy", "calibration error %"),
                *(
                    (title, percent(m["accuracy"]), f"{m['loss']:.3f}", percent(m["calibration_error"]))
                    for title, m in {
                        "as released": final,
                        "before temperature scaling": report["metrics_before_scaling"],
                        "as released, on degraded pictures": report["metrics_degraded"],
                    }.items()
                ),
            ]
        ),
        recall_table=_table([("label", "recall %"), *((k, percent(v)) for k, v in final["recall"].items())]),
        temperature=report["temperature"],
        calibration_note=""
        if own_test
        else "The error after scaling is on these same pictures, so it is a little too good. ",
        recipe_table=_table(
            [("option", "value"), *((f"`{key}`", value) for key, value in recipe.items() if value is not None)]
        ),
        **{key: report[key] for key in ("best_epoch", "epochs", "seconds", "device")},
    )
    return ModelCard(text)
