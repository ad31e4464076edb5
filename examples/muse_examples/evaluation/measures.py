# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
From what judges say of pictures to the figures of a row; `docs/columns.md` says what the paper did.

Most functions return a value per picture, of which `mean_estimate` and `estimates_by` make figures with an interval.
Where published scripts compute something else than they mean to, `variant="published"` does as they do, for comparison
with figures that were made by them, and the default, "corrected", as they mean to.
"""

import random
import warnings
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any, NamedTuple, TypeVar
from zipfile import BadZipFile

import numpy as np
import scipy.linalg
import scipy.stats
import torch

from muse_examples.files import whole_file
from muse_examples.metrics import confusion_matrix
from pipeline_muse import MIKELS_WHEEL, POSITIVE_EMOTIONS


Item = TypeVar("Item")
Key = TypeVar("Key", bound=Hashable)

VARIANTS = ("corrected", "published")
# In which EmoGen's script goes through the emotions, and how many pairs of each it looks at.
PUBLISHED_ORDER = ("amusement", "awe", "contentment", "excitement", "anger", "disgust", "fear", "sadness")
PUBLISHED_PAIRS = 10
ELEMENT_PROMPT = "a photo of a {}"  # by which EmoCtrl asks a CLIP for an element
AT_A_TIME = 2**22  # numbers that are resampled at once, which bounds the memory


def check_variant(variant: str) -> None:
    """Raises a `ValueError` for a variant that there is not."""
    if variant not in VARIANTS:
        raise ValueError(f"`variant` has to be one of {', '.join(VARIANTS)}, got {variant!r}.")


# --------------------------------------------------------------------------------------
# Figures with an interval
# --------------------------------------------------------------------------------------


class Estimate(NamedTuple):
    """A mean, and the ends of its 95 % interval: `None` where there is one group only, which tells of no others."""

    value: float
    low: float | None = None
    high: float | None = None


def mean_estimate(
    values: Sequence[float] | np.ndarray,
    groups: Sequence[Hashable] | None = None,
    resamples: int = 2000,
    seed: int = 0,
) -> Estimate | None:
    """
    The mean over pictures with its 95 % bootstrap interval (percentiles).

    Args:
        values (sequence of `float`): One per picture.
        groups (sequence, *optional*): To which group each picture belongs, such as its prompt. Pictures of a group are
            alike, so groups are resampled whole, and the mean is the ratio of sums, as groups differ in size. By
            default each picture is a group.
        resamples (`int`, defaults to 2000): How many.
        seed (`int`, defaults to 0): Of the resampling.

    Returns:
        [`Estimate`] or `None`: `None` of nothing.

    Raises:
        ValueError: If a value is not finite, or there are not as many groups as values.
    """
    each = np.asarray(values, dtype=np.float64)
    groups = range(len(each)) if groups is None else groups
    if len(groups) != len(each):
        raise ValueError(f"There are {len(groups)} `groups` of {len(each)} `values`.")
    if not np.isfinite(each).all():
        raise ValueError("`values` have to be finite.")
    if not len(each):
        return None
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    if len(numbers) == 1:
        return Estimate(float(each.mean()))
    if np.ptp(each) == 0:
        return Estimate(*[float(each[0])] * 3)
    members = np.array([numbers[group] for group in groups])
    sums, sizes = np.bincount(members, each), np.bincount(members).astype(np.float64)
    interval = scipy.stats.bootstrap(
        (sums, sizes),
        lambda sums, sizes, axis=-1: sums.sum(axis=axis) / sizes.sum(axis=axis),
        n_resamples=resamples,
        batch=max(1, AT_A_TIME // len(sums)),
        vectorized=True,
        paired=True,
        method="percentile",
        random_state=seed,
    ).confidence_interval
    return Estimate(float(each.mean()), float(interval.low), float(interval.high))


def estimates_by(
    values: Sequence[float] | np.ndarray,
    keys: Sequence[Key],
    groups: Sequence[Hashable] | None = None,
    **options: Any,
) -> dict[Key, Estimate]:
    """
    The means of parts of the pictures, such as those of each emotion.

    Args:
        values (sequence of `float`): One per picture.
        keys (sequence): To which part each picture belongs.
        groups, options: See [`mean_estimate`].

    Returns:
        `dict[Any, Estimate]`: By part, in the order in which they first occur.
    """
    found = {}
    for key in dict.fromkeys(keys):
        chosen = [number for number, own in enumerate(keys) if own == key]
        kept = None if groups is None else [groups[number] for number in chosen]
        estimate = mean_estimate(np.asarray(values)[chosen], kept, **options)
        if estimate is not None:
            found[key] = estimate
    return found


# --------------------------------------------------------------------------------------
# Emotions
# --------------------------------------------------------------------------------------


def columns_of(names: Sequence[str], labels: Sequence[str]) -> np.ndarray:
    """Where labels stand among a classifier's. Raises a `ValueError` that names those that it does not know."""
    places = {label: number for number, label in enumerate(labels)}
    if unknown := sorted(set(names) - set(places)):
        raise ValueError(f"The classifier knows no {', '.join(unknown)}; its labels are {', '.join(labels)}.")
    return np.array([places[name] for name in names], dtype=np.int64)


def answers_of(probabilities: np.ndarray, labels: Sequence[str]) -> list[str]:
    """The most probable label of each picture; `probabilities` are of shape `(n, labels)`."""
    return [labels[index] for index in np.asarray(probabilities).argmax(axis=-1)]


def right(answers: Sequence[str], intended: Sequence[str]) -> np.ndarray:
    """1 for each picture whose answer is what was intended, else 0; their mean is the accuracy."""
    return np.array([answer == wish for answer, wish in zip(answers, intended, strict=True)], dtype=np.float64)


def right_of_copies(copies: Sequence[Sequence[str]], intended: Sequence[str]) -> np.ndarray:
    """Of each picture's degraded copies, the share whose answer is what was intended; at least one copy each."""
    return np.array([right(own, [wish] * len(own)).mean() for own, wish in zip(copies, intended, strict=True)])


def right_valence(
    probabilities: np.ndarray, labels: Sequence[str], intended: Sequence[str], variant: str = "corrected"
) -> np.ndarray:
    """
    Whether the answer is at least of the intended emotion's valence.

    Args:
        probabilities (`np.ndarray` of shape `(n, labels)`): What a classifier says.
        labels (sequence of `str`): Its labels.
        intended (sequence of `str`): The emotion of each picture.
        variant (`str`, defaults to `"corrected"`): By the valence of the most probable label; "published" is by the
            more probable valence, which is EmoEdit's accuracy of two classes.

    Returns:
        `np.ndarray` of shape `(n,)`: 1 where the valence is right, else 0.

    Raises:
        ValueError: If a label or an intended emotion is not on Mikels' wheel.
    """
    check_variant(variant)
    if strangers := sorted({*labels, *intended} - MIKELS_WHEEL.keys()):
        raise ValueError(f"Off Mikels' wheel, the valence of {', '.join(strangers)} is not known.")
    positive = np.array([label in POSITIVE_EMOTIONS for label in labels])
    wanted = np.array([wish in POSITIVE_EMOTIONS for wish in intended])
    if variant == "published":
        share = np.asarray(probabilities) @ np.stack([positive, ~positive], axis=1).astype(np.float64)
        return ((share[:, 0] >= share[:, 1]) == wanted).astype(np.float64)
    return (positive[np.asarray(probabilities).argmax(axis=-1)] == wanted).astype(np.float64)


def confusion(probabilities: np.ndarray, labels: Sequence[str], intended: Sequence[str]) -> np.ndarray:
    """
    Counts of shape `(labels, labels)`: rows are what was intended, columns the answers.

    Raises:
        ValueError: If an intended emotion is none of the labels.
    """
    truth = torch.from_numpy(columns_of(intended, labels))
    return confusion_matrix(torch.from_numpy(np.asarray(probabilities)), truth).numpy()


def emo_s(before: np.ndarray, after: np.ndarray, labels: Sequence[str], targets: Sequence[str]) -> np.ndarray:
    """
    EmoEdit's Emo-S: by how much editing raises the probability of the target.

    Args:
        before, after (`np.ndarray` of shape `(n, labels)`): What a classifier says of each source and of its edit.
        labels (sequence of `str`): Its labels.
        targets (sequence of `str`): The emotion of each edit.

    Returns:
        `np.ndarray` of shape `(n,)`, in [-1, 1].

    Raises:
        ValueError: If a target is none of the labels.
    """
    column = columns_of(targets, labels)[:, None]
    return (np.take_along_axis(after, column, axis=1) - np.take_along_axis(before, column, axis=1))[:, 0]


# --------------------------------------------------------------------------------------
# Content
# --------------------------------------------------------------------------------------


def unit(features: np.ndarray) -> np.ndarray:
    """Features of shape `(n, D)` on the unit sphere, in float64; zeros stay zeros."""
    features = np.asarray(features, dtype=np.float64)
    return features / np.maximum(np.linalg.norm(features, axis=-1, keepdims=True), np.finfo(np.float64).tiny)


def cosine(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The cosines of pairs of features, `(n, D)` each: of edits and their sources the CLIP image similarity."""
    return (unit(first) * unit(second)).sum(axis=-1)


def is_element(prompt: str) -> bool:
    """Whether a prompt asks for one of EmoCtrl's elements."""
    return prompt.startswith(ELEMENT_PROMPT.format(""))


def right_content(
    image: np.ndarray,
    text: np.ndarray,
    prompts: Sequence[str],
    elements: Mapping[str, np.ndarray] | None = None,
    top_k: int = 5,
    threshold: float = 0.15,
) -> np.ndarray:
    """
    Whether pictures show what they should, as EmoCtrl (https://huggingface.co/papers/2512.22437) decides it: an
    element, if it is among the `top_k` of all elements that resemble the picture most; a caption, if its cosine is
    above the threshold. Where this and the emotion are right, both are: their product is the joint accuracy's.

    Args:
        image, text (`np.ndarray` of shape `(n, D)`): A CLIP's features of the pictures and of their prompts.
        prompts (sequence of `str`): Of the form `ELEMENT_PROMPT` for elements; all others are captions.
        elements (mapping, *optional*): The features, of shape `(D,)`, of the prompts of all elements of the test set.
            By default those that occur among the prompts.
        top_k (`int`, defaults to 5): Among how many elements.
        threshold (`float`, defaults to 0.15): Of the cosine.

    Returns:
        `np.ndarray` of shape `(n,)`: 1 where the content is right, else 0.

    Raises:
        ValueError: If a prompt's element is not among the elements.
    """
    chosen = np.array([is_element(prompt) for prompt in prompts], dtype=bool)
    correct = cosine(image, text) > threshold
    if chosen.any():
        if elements is None:
            elements = {prompt: own for prompt, own in zip(prompts, text) if is_element(prompt)}
        if unknown := sorted({prompt for prompt in prompts if is_element(prompt)} - set(elements)):
            raise ValueError(f"`elements` lack {', '.join(unknown)}.")
        places = {prompt: number for number, prompt in enumerate(elements)}
        likeness = unit(np.asarray(image)[chosen]) @ unit(np.stack(list(elements.values()))).T
        own = np.array([[places[prompt]] for prompt in prompts if is_element(prompt)])
        better = likeness > np.take_along_axis(likeness, own, axis=1)
        correct[chosen] = better.sum(axis=1) < top_k
    return correct.astype(np.float64)


# --------------------------------------------------------------------------------------
# The Frechet distance
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """
    A Gaussian fitted to features.

    Args:
        mean (`np.ndarray` of shape `(D,)`): Their mean.
        covariance (`np.ndarray` of shape `(D, D)`): Their covariance, divided by `count - 1`.
        count (`int`, *optional*): How many they are, where that is known.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int | None = None

    @property
    def few(self) -> bool:
        """Whether they are too few to span their space, so that distances depend on how many there are."""
        return self.count is not None and self.count <= len(self.mean)

    @classmethod
    def of(cls, batches: np.ndarray | Iterable[np.ndarray]) -> "Statistics":
        """
        Of features, all at once or in batches of any size, of which only one is held.

        Args:
            batches (`np.ndarray` of shape `(n, D)`, or an iterable of these): The features.

        Raises:
            ValueError: If there are less than two.
        """
        count, mean, scatter = 0, np.zeros(1), np.zeros((1, 1))
        for batch in [batches] if isinstance(batches, np.ndarray) else batches:
            if not len(batch):
                continue
            batch = np.asarray(batch, dtype=np.float64)
            own, total = batch.mean(axis=0), count + len(batch)
            shift, centered = own - mean, batch - own
            scatter = scatter + centered.T @ centered + np.outer(shift, shift) * (count * len(batch) / total)
            mean, count = mean + shift * (len(batch) / total), total
        if count < 2:
            raise ValueError(f"A covariance takes two pictures at least, got {count}.")
        return cls(mean, scatter / (count - 1), count)

    @classmethod
    def load(cls, path: Path) -> "Statistics":
        """
        From an `.npz` file with "mu" and "sigma", as pytorch-fid and its kin save, and "count" where there is one.

        Raises:
            ValueError: If it holds no such things.
        """
        try:
            with open(path, "rb") as file, np.load(file) as saved:
                mean, covariance = saved["mu"], saved["sigma"]
                count = int(saved["count"]) if "count" in saved else None
        except (KeyError, AttributeError, EOFError, TypeError, ValueError, BadZipFile) as error:
            raise ValueError(f"{str(path)!r} is no `.npz` file with statistics, `mu` and `sigma`.") from error
        if mean.ndim != 1 or covariance.shape != (len(mean),) * 2:
            raise ValueError(f"{str(path)!r} holds `mu` {mean.shape} and `sigma` {covariance.shape}.")
        return cls(mean.astype(np.float64), covariance.astype(np.float64), count)

    def save(self, path: Path, **notes: Any) -> None:
        """Writes what `load` reads, and `notes` beside it, whole."""
        known: dict[str, Any] = {} if self.count is None else {"count": self.count}
        with whole_file(path) as partial, open(partial, "wb") as file:
            np.savez(file, mu=self.mean, sigma=self.covariance, **known, **notes)


def frechet_distance(first: Statistics, second: Statistics) -> float:
    """
    Between two Gaussians (https://huggingface.co/papers/1706.08500, Eq. 6): of Inception's features the FID. Warns
    where one of them is of too few pictures: then it is good for comparing rows of as many pictures, and no more.

    Raises:
        ValueError: If the statistics are of features of different dimensions.
    """
    if first.mean.shape != second.mean.shape:
        raise ValueError(f"Statistics of {len(first.mean)} and {len(second.mean)} dimensions cannot be compared.")
    for one in (first, second):
        if one.few:
            told = (
                f"{one.count} pictures are too few for {len(one.mean)} dimensions: the distance depends on how many."
            )
            warnings.warn(told, stacklevel=2)
    shift = first.mean - second.mean
    # The trace of the root of the product, by a symmetric matrix with the same eigenvalues: they stay real.
    values, vectors = scipy.linalg.eigh(first.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    middle = root @ second.covariance @ root
    cross = np.sqrt(scipy.linalg.eigvalsh((middle + middle.T) / 2).clip(min=0)).sum()
    return max(0.0, float(shift @ shift + np.trace(first.covariance) + np.trace(second.covariance) - 2 * cross))


# --------------------------------------------------------------------------------------
# Diversity
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PerEmotion:
    """A figure of each emotion, and their mean."""

    by_emotion: dict[str, float]

    @property
    def value(self) -> float | None:
        """The mean over emotions, however many pictures each has; `None` without any."""
        return sum(self.by_emotion.values()) / len(self.by_emotion) if self.by_emotion else None


def numbers_by(emotions: Sequence[str]) -> dict[str, list[int]]:
    """The pictures of each emotion that has two or more, in the order of EmoGen's script, then that of occurrence."""
    order = [emotion for emotion in PUBLISHED_ORDER if emotion in emotions]
    found = {
        emotion: [number for number, own in enumerate(emotions) if own == emotion]
        for emotion in dict.fromkeys([*order, *emotions])
    }
    return {emotion: numbers for emotion, numbers in found.items() if len(numbers) > 1}


def pair_diversity(
    items: Sequence[Item],
    emotions: Sequence[str],
    distance: Callable[[Item, Item], float],
    variant: str = "corrected",
    pairs: int | None = None,
    seed: int = 0,
) -> PerEmotion:
    """
    The mean distance of pairs of pictures of one emotion.

    Args:
        items (sequence): The pictures, or what stands for them.
        emotions (sequence of `str`): The emotion of each; those of a single picture are left out.
        distance (function): Of two items.
        variant (`str`, defaults to `"corrected"`): "published" does as EmoGen's script, which never empties its list
            of pictures: the pairs of an emotion are of all pictures of this emotion and of those before it.
        pairs (`int`, *optional*): How many to draw for each emotion. By default all that there are, each once; where
            published, 10.
        seed (`int`, defaults to 0): Of the draw. The script has none.

    Returns:
        [`PerEmotion`]: The mean distances.
    """
    check_variant(variant)
    source, seen, found = random.Random(seed), list[int](), {}
    for emotion, numbers in numbers_by(emotions).items():
        seen += numbers
        if variant == "published":
            drawn = [tuple(source.sample(seen, 2)) for _ in range(pairs or PUBLISHED_PAIRS)]
        else:
            drawn = list(combinations(numbers, 2))
            drawn = drawn if pairs is None or pairs >= len(drawn) else source.sample(drawn, pairs)
        distances = [distance(items[first], items[second]) for first, second in drawn]
        found[emotion] = float(np.mean(distances))
    return PerEmotion(found)


def cosine_distance(first: np.ndarray, second: np.ndarray) -> float:
    """One less the cosine of two features."""
    return 1 - float(cosine(first, second))


def feature_distance(first: np.ndarray, second: np.ndarray) -> float:
    """The mean squared difference of two features."""
    return float(np.mean(np.square(np.subtract(first, second, dtype=np.float64))))


def semantic_diversity(
    features: np.ndarray,
    emotions: Sequence[str],
    measure: str = "cosine",
    variant: str = "corrected",
    pairs: int | None = None,
    seed: int = 0,
) -> PerEmotion:
    """
    EmoGen's semantic diversity (https://huggingface.co/papers/2401.04608): how far apart a CLIP finds pictures of one
    emotion.

    Args:
        features (`np.ndarray` of shape `(n, D)`): The CLIP's features of pictures, not normalised.
        emotions (sequence of `str`): The emotion of each; those of a single picture are left out.
        measure (`str`, defaults to `"cosine"`): `1 - cos`, or "mse", the mean squared difference.
        variant (`str`, defaults to `"corrected"`): All pairs of one emotion, exactly. "published": see
            [`pair_diversity`], to which `pairs` and `seed` go.

    Returns:
        [`PerEmotion`]: The mean distances.

    Raises:
        ValueError: If the measure is none of the two.
    """
    check_variant(variant)
    if measure not in ("cosine", "mse"):
        raise ValueError(f"`measure` has to be 'cosine' or 'mse', got {measure!r}.")
    if variant == "published":
        distance = cosine_distance if measure == "cosine" else feature_distance
        return pair_diversity(list(features), emotions, distance, variant, pairs, seed)
    # Over all pairs the mean of |a - b|^2 is twice the variance; on the unit sphere 1 - cos is half of |a - b|^2.
    points = unit(features) if measure == "cosine" else np.asarray(features, dtype=np.float64)
    factor = 1.0 if measure == "cosine" else 2 / points.shape[1]
    numbers = numbers_by(emotions)
    return PerEmotion({name: factor * scatter(points[own]) / (len(own) - 1) for name, own in numbers.items()})


def scatter(points: np.ndarray) -> float:
    """The sum of squared distances to the mean; `points` are of shape `(n, D)`."""
    return float(np.square(points - points.mean(axis=0)).sum())


def intra_class_variance(features: np.ndarray, emotions: Sequence[str]) -> PerEmotion:
    """
    How far pictures of one emotion are from their middle (Figure 4 of the paper): the mean squared distance of
    features on the unit sphere to their mean.

    Args:
        features (`np.ndarray` of shape `(n, D)`): A CLIP's features of pictures.
        emotions (sequence of `str`): The emotion of each; those of a single picture are left out.
    """
    points = unit(features)
    return PerEmotion({name: scatter(points[own]) / len(own) for name, own in numbers_by(emotions).items()})


# --------------------------------------------------------------------------------------
# Pixels
# --------------------------------------------------------------------------------------


def network_pixels(picture: np.ndarray, variant: str = "corrected") -> np.ndarray:
    """
    A picture as LPIPS is given it.

    Args:
        picture (`np.ndarray` of shape `(height, width, 3)`): In 8 bits.
        variant (`str`, defaults to `"corrected"`): In [-1, 1], which LPIPS wants; "published" in [0, 1], as the
            scripts of EmoGen, EmoEdit and EmoCtrl do.

    Returns:
        `np.ndarray` of shape `(3, height, width)`, float32.
    """
    check_variant(variant)
    pixels = picture.transpose(2, 0, 1).astype(np.float32) / 255
    return pixels if variant == "published" else 2 * pixels - 1


def perceptual_distance(
    edit: np.ndarray,
    source: np.ndarray,
    distance: Callable[[np.ndarray, np.ndarray], float],
    variant: str = "corrected",
) -> float:
    """
    How different two pictures of one size look.

    Args:
        edit, source (`np.ndarray` of shape `(height, width, 3)`): In 8 bits.
        distance (function): Of two pictures as from [`network_pixels`], such as `judges.lpips_distance()`.
        variant (`str`, defaults to `"corrected"`): See [`network_pixels`].
    """
    check_sizes(edit, source)
    return distance(network_pixels(edit, variant), network_pixels(source, variant))


def perceptual_diversity(
    pictures: Sequence[np.ndarray],
    emotions: Sequence[str],
    distance: Callable[[np.ndarray, np.ndarray], float],
    variant: str = "corrected",
    pairs: int | None = None,
    seed: int = 0,
) -> PerEmotion:
    """
    EmoGen's LPIPS: how different pictures of one emotion look.

    Args:
        pictures (sequence of `np.ndarray` of shape `(height, width, 3)`): In 8 bits, of one size; such as
            `judges.Pictures`, which holds none of them in memory.
        distance, variant: See [`perceptual_distance`]; where published, also the pairs are: see [`pair_diversity`].
        emotions, pairs, seed: See [`pair_diversity`]. All pairs of 700 pictures are 244,650: draw some.
    """
    return pair_diversity(
        pictures,
        emotions,
        lambda first, second: perceptual_distance(first, second, distance, variant),
        variant,
        pairs,
        seed,
    )


def squared_error(edit: np.ndarray, source: np.ndarray, variant: str = "corrected") -> float:
    """
    The mean squared difference of two pictures of one size, in squared levels of 256.

    Args:
        edit, source (`np.ndarray` of shape `(height, width, 3)`): In 8 bits.
        variant (`str`, defaults to `"corrected"`): "published" does as EmoEdit's script, whose differences and squares
            are in 8 bits and wrap around.
    """
    check_variant(variant)
    check_sizes(edit, source)
    kind = np.uint8 if variant == "published" else np.float64
    return float(np.mean(np.square(edit.astype(kind) - source.astype(kind))))


def check_sizes(first: np.ndarray, second: np.ndarray) -> None:
    """Raises a `ValueError` for pictures of different sizes."""
    if first.shape != second.shape:
        raise ValueError(f"Pictures of {first.shape} and {second.shape} cannot be compared.")
