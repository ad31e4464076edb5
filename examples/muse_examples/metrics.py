# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""How good, how well calibrated and how wrong a classifier is, the temperature that calibrates it, and the PSNR."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from pipeline_muse import wheel_distance


BINS = 15  # of confidence, for the calibration error
TEMPERATURES = (0.1, 10.0)  # without bounds, a validation set without errors would ask for endless confidence


def wilson_interval(hits: int, total: int, z: float = 1.959964) -> tuple[float, float]:
    """
    Wilson's interval of a share, which stays within 0 and 1 for few trials and for shares near either.

    Args:
        hits, total (`int`): How many of how many.
        z (`float`, defaults to 1.96): The quantile of the normal distribution; by default that of a 95 % interval.

    Returns:
        `tuple[float, float]`: Its ends; all there is, (0, 1), where nothing was tried.
    """
    if not total:
        return 0.0, 1.0
    share, spread = hits / total, z * z / total
    middle = (share + spread / 2) / (1 + spread)
    half = math.sqrt(share * (1 - share) * spread + spread * spread / 4) / (1 + spread)
    return max(0.0, middle - half), min(1.0, middle + half)


def psnr(pixels: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB, of all pictures as one; pixels are clamped to [-1, 1]."""
    return -10 * torch.log10(F.mse_loss(pixels.clamp(-1, 1), reference.clamp(-1, 1)) / 4).item()


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


def ecc_emc(answers: Iterable[tuple[str, str]]) -> tuple[float, float]:
    """
    Two measures of "To err like human" (NeurIPS 2024), Eq. 3 and 4, on its polarity-aware distance.

    Args:
        answers (iterable of `tuple[str, str]`): Pairs of the true and the predicted emotion, both on the wheel.

    Returns:
        `tuple[float, float]`: Emotion confusion confidence, in which a mistake counts the less the further it is off
        (1 if there is none), and emotional misclassification confidence, the same among mistakes only (1 if all are
        beside the truth; not a number if there are none).

    Raises:
        ValueError: If there are no answers, or one is off the wheel.
    """
    distances = [wheel_distance(truth, answer, polarity_aware=True) for truth, answer in answers]
    if not distances:
        raise ValueError("`answers` has to hold at least one pair of emotions.")
    mistakes = [distance for distance in distances if distance > 0]
    ecc = sum(1 / (1 + distance) for distance in distances) / len(distances)
    return ecc, sum(1 / distance for distance in mistakes) / len(mistakes) if mistakes else math.nan
