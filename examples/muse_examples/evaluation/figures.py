# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The paper's figures, of any rows: the inner loop, feature maps, the threshold, and all rows at a glance."""

import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate, cycle
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from muse_examples.contact_sheets import (
    BAD,
    EMOTION_COLORS,
    FAINT,
    GOOD,
    INK,
    PAPER,
    Cell,
    contact_sheet,
    enlarge,
    wrap,
)
from muse_examples.evaluation.measures import Estimate
from muse_examples.evaluation.tables import Column, Number, Table, number
from muse_examples.plots import new_figure, plain_axes
from muse_examples.runs import Record
from pipeline_muse import MuseTrace, wheel_neighbors


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D

ROLES = {"target": GOOD, "inherent": BAD, "similar": EMOTION_COLORS["amusement"], "other": "#c5c8cf"}
STYLES = {"target": "-", "inherent": "--", "similar": ":"}
MARKERS = "osD^vP"
PICTURE = 1.7  # inches, of a picture's side in a figure
QUANTILE = 1.959964  # of the normal distribution, for 95 % intervals


def label_colors(labels: Iterable[str]) -> dict[str, str]:
    """The colour of each label, in the wheel's order; what is not on the wheel takes turns with colours of its own."""
    given, others = list(dict.fromkeys(labels)), cycle(f"C{number}" for number in range(10))
    known = {label: color for label, color in EMOTION_COLORS.items() if label in given}
    return known | {label: next(others) for label in sorted(set(given) - set(known))}


# --------------------------------------------------------------------------------------
# Figure 2: the inner loop
# --------------------------------------------------------------------------------------


def trace_record(trace: MuseTrace) -> Record:
    """What the curves of a picture are drawn from, as JSON: its "trace" in a record. Probabilities have 4 digits."""
    names = ("labels", "emotion", "inherent_emotion", "gate_step", "kept")
    rounded = [[[round(p, 4) for p in iterate] for iterate in step] for step in trace.probabilities]
    return {name: getattr(trace, name) for name in names} | {"probabilities": rounded}


def read_trace(entry: Record) -> MuseTrace:
    """The trace of [`trace_record`], without similarities and losses; "emotion" may be a label."""
    emotion = entry["emotion"]
    return MuseTrace(
        entry["labels"],
        {emotion: 1.0} if isinstance(emotion, str) else emotion,
        gate_step=entry["gate_step"],
        inherent_emotion=entry["inherent_emotion"],
        probabilities=entry["probabilities"],
        kept=entry["kept"],
        inner_steps=sum(len(step) - 1 for step in entry["probabilities"]),
    )


class Curve(NamedTuple):
    """The mean over pictures and the ends of its 95 % interval, arrays of shape `(iterates,)`."""

    mean: np.ndarray
    low: np.ndarray
    high: np.ndarray


def roles_of(trace: MuseTrace) -> dict[str, list[str]]:
    """
    The labels that the loss treats alike.

    Args:
        trace (`MuseTrace`): Of a picture.

    Returns:
        `dict[str, list[str]]`: The labels of the "target", of the "inherent" emotion where that is no target, and
        those "similar" to the target: its neighbours on the wheel that have its valence. A list may be empty, and the
        inherent emotion be a similar one.
    """
    near = {other for label in trace.emotion for other in wheel_neighbors(label)} - set(trace.emotion)
    return {
        "target": list(trace.emotion),
        "inherent": [label for label in [trace.inherent_emotion] if label is not None and label not in trace.emotion],
        "similar": [label for label in trace.labels if label in near],
    }


def role_probabilities(trace: MuseTrace, role: str) -> list[np.ndarray] | None:
    """
    The probability of a role at every iterate.

    Args:
        trace (`MuseTrace`): Of a picture.
        role (`str`): "target" or "inherent", whose labels' probabilities are summed, or "similar", of which the mean.

    Returns:
        `list[np.ndarray]`: One array of shape `(iterates,)` per optimised step; `None` if the role has no label.
    """
    places = [trace.labels.index(label) for label in roles_of(trace)[role] if label in trace.labels]
    if not places:
        return None
    merged = np.mean if role == "similar" else np.sum
    return [merged(np.array(step)[:, places], axis=1) for step in trace.probabilities]


def mean_curves(traces: Sequence[MuseTrace]) -> tuple[dict[str, Curve], list[int]]:
    """
    The probabilities over the inner loop, averaged over pictures, all optimised steps one after the other.

    Pictures are aligned where their gates opened and again where each optimised step starts: step k of one is averaged
    with step k of the others since the gate. A step is as long as its longest inner loop; a picture whose loop ended
    earlier counts for the rest of the step with its kept iterate, whose noise the step used. The curves end with the
    last step that at least half of the pictures reach; beyond, they would be those of the few whose gate opened first.

    Args:
        traces (sequence of `MuseTrace`): Of the pictures. Those whose gate never opened have no part.

    Returns:
        `tuple[dict[str, Curve], list[int]]`: By role the curve of the pictures that have such labels (see
        [`roles_of`]; a role that none has is missing), and the iterate with which each step starts.
    """
    opened = [trace for trace in traces if trace.probabilities]
    lengths = sorted((len(trace.probabilities) for trace in opened), reverse=True)
    steps = lengths[(len(lengths) - 1) // 2] if opened else 0
    widths = [max(len(t.probabilities[k]) for t in opened if len(t.probabilities) > k) for k in range(steps)]
    curves = {}
    for role in STYLES:
        found = [(trace, values) for trace in opened if (values := role_probabilities(trace, role)) is not None]
        if found:
            curves[role] = mean_curve(np.stack([laid_out(values, trace.kept, widths) for trace, values in found]))
    return curves, [0, *accumulate(widths)][:steps]


def laid_out(values: Sequence[np.ndarray], kept: Sequence[int], widths: Sequence[int]) -> np.ndarray:
    """The values of a picture's steps, each as long as its width, in a row; not a number where it has no such step."""
    parts = []
    for step, width in enumerate(widths):
        own = values[step] if step < len(values) else np.full(width, np.nan)
        rest = own[kept[step]] if len(own) < width else np.nan
        parts.append(np.concatenate([own, np.full(width - len(own), rest)]))
    return np.concatenate(parts)


def mean_curve(values: np.ndarray) -> Curve:
    """The mean over the first axis of values of shape `(pictures, iterates)`, of those that are numbers."""
    counts = np.sum(~np.isnan(values), axis=0)
    mean = np.nansum(values, axis=0) / np.maximum(counts, 1)
    spread = np.sqrt(np.nansum((values - mean) ** 2, axis=0) / np.maximum(counts - 1, 1))
    half = QUANTILE * spread / np.sqrt(np.maximum(counts, 1))
    mean = np.where(counts, mean, np.nan)
    return Curve(mean, np.clip(mean - half, 0, 1), np.clip(mean + half, 0, 1))


def role_shares(records: Sequence[Record], answers: Sequence[str]) -> dict[str, float]:
    """
    How often a judge names which role in final pictures.

    Args:
        records (sequence of mappings): Of the pictures; with "emotion", and "inherent_emotion" where that is known.
        answers (sequence of `str`): The label that the judge gives each.

    Returns:
        `dict[str, float]`: The shares of "target", "inherent", "similar" and "other" answers. One that is several
        counts as the first.
    """
    counts = Counter(role_of(entry, answer) for entry, answer in zip(records, answers))
    return {role: counts[role] / max(1, len(answers)) for role in ROLES}


def role_of(entry: Record, answer: str) -> str:
    """What an answer is to a picture: "target", "inherent", "similar" or "other"."""
    emotion = entry["emotion"]
    trace = MuseTrace([answer], {emotion: 1.0} if isinstance(emotion, str) else emotion or {})
    trace.inherent_emotion = entry.get("inherent_emotion") or (entry.get("trace") or {}).get("inherent_emotion")
    return next((role for role, labels in roles_of(trace).items() if answer in labels), "other")


def inner_loop_figure(
    rows: Mapping[str, Sequence[Record]], answers: Mapping[str, Sequence[str]] | None = None, judge: str = "the judge"
) -> "Figure":
    """
    Draws the paper's Figure 2: what guides see over the inner loop, and what a judge sees in the end.

    Args:
        rows (mapping): The records of each row's pictures. Those with a "trace" (see [`trace_record`]) make a panel of
            curves, which [`mean_curves`] tells; a row without any has none.
        answers (mapping, *optional*): The label that a judge gives each picture, in the order of the row's records. A
            panel below tells what these are, see [`role_shares`]. The inherent emotion of pictures without a trace is
            known only where their record's "inherent_emotion" tells it.
        judge (`str`, defaults to `"the judge"`): The judge's name.

    Returns:
        `Figure`: The figure.

    Raises:
        ValueError: If there is nothing to draw, or a row has another number of answers than records.
    """
    traces = {
        name: [read_trace(entry["trace"]) for entry in records if entry.get("trace")] for name, records in rows.items()
    }
    shown = {name: own for name, own in traces.items() if own}
    answers = answers or {}
    for name, own in answers.items():
        if len(own) != len(rows[name]):
            raise ValueError(f"The row {name!r} has {len(rows[name])} pictures but {len(own)} answers of {judge}.")
    if not shown and not answers:
        raise ValueError("No picture has a trace, and there are no answers.")
    lines, columns = panels(len(shown))
    heights = [3.4 * lines] * bool(shown) + [1.5 + 0.42 * len(answers)] * bool(answers)
    figure = new_figure(max(8.0, 4.4 * columns), sum(heights))
    parts: list[Any] = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False).flat)
    if shown:
        draw_panels(parts[0], shown, lines, columns)
    if answers:
        shares = {name: role_shares(rows[name], own) for name, own in answers.items()}
        draw_shares(parts[-1], shares, f"Final pictures, as {judge} sees them")
    return figure


def panels(count: int) -> tuple[int, int]:
    """Lines and columns, three at most, for so many panels."""
    lines = math.ceil(count / 3)
    return lines, math.ceil(count / max(1, lines))


def draw_panels(part: Any, traces: Mapping[str, Sequence[MuseTrace]], lines: int, columns: int) -> None:
    """Draws a panel of mean curves per row, with one legend and scale for all."""
    for place, (name, own) in enumerate(traces.items()):
        axes = part.add_subplot(lines, columns, place + 1)
        draw_curves(axes, name, own)
        axes.set_ylabel("" if place % columns else "probability, as the guide sees it")
    handles = max((axes.get_legend_handles_labels()[0] for axes in part.axes), key=len)
    part.axes[0].legend(handles=handles, fontsize=9, frameon=False, loc="center right")


def draw_curves(axes: "Axes", title: str, traces: Sequence[MuseTrace]) -> None:
    """Draws the mean curves of a row's pictures."""
    curves, starts = mean_curves(traces)
    opened = sum(bool(trace.probabilities) for trace in traces)
    for role, curve in curves.items():
        iterates = np.arange(len(curve.mean))
        axes.plot(iterates, curve.mean, color=ROLES[role], linestyle=STYLES[role], linewidth=1.7, label=role)
        axes.fill_between(iterates, curve.low, curve.high, color=ROLES[role], alpha=0.15, linewidth=0)
    for start in starts:
        axes.axvline(start, color=FAINT, linewidth=0.5, alpha=0.25, zorder=0)
    if not curves:
        axes.text(0.5, 0.5, "no gate ever opened", transform=axes.transAxes, ha="center", color=FAINT)
    end = len(next(iter(curves.values())).mean) if curves else 1
    ticks = spread_ticks(starts, end / 12)
    axes.set_xticks([starts[step] for step in ticks], [str(step + 1) for step in ticks])
    axes.set(ylim=(0, 1), xlabel="optimised step since the gate opened")
    told = f"{opened} pictures" if opened == len(traces) else f"the gate opened in {opened} of {len(traces)} pictures"
    axes.set_title(f"{textwrap.fill(title, 44)}\n({told})", fontsize=11)
    plain_axes(axes)


def spread_ticks(places: Sequence[int], least: float) -> list[int]:
    """The numbers of places, from the first on, of which none is nearer to the one before than `least`."""
    chosen: list[int] = []
    for index, place in enumerate(places):
        if not chosen or place - places[chosen[-1]] >= least:
            chosen.append(index)
    return chosen


def draw_shares(part: Any, shares: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Draws a bar per row, from the first down, that the shares of its roles divide."""
    axes, names = part.add_subplot(), [textwrap.fill(name, 40) for name in shares]
    left = np.zeros(len(names))
    for role, color in ROLES.items():
        widths = np.array([100 * own[role] for own in shares.values()])
        axes.barh(range(len(names)), widths, left=left, color=color, height=0.7, label=role)
        for place, width in enumerate(widths):
            if width >= 4:
                ink = INK if role == "other" else "white"
                axes.text(left[place] + width / 2, place, f"{width:.0f}", ha="center", va="center", color=ink)
        left += widths
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set(xlim=(0, 100), xlabel="% of the pictures")
    part.suptitle(title, fontsize=11)
    axes.legend(ncols=4, loc="lower right", bbox_to_anchor=(1, 1), fontsize=9, frameon=False)
    plain_axes(axes)


# --------------------------------------------------------------------------------------
# Figure 4: features
# --------------------------------------------------------------------------------------


def tsne(features: Any, seed: int = 0) -> np.ndarray:
    """
    Lays out features in the plane by t-SNE, so that what is near stays near.

    Args:
        features (array of shape `(n, D)`): At least 4 of them.
        seed (`int`, defaults to 0): Of the layout.

    Returns:
        `np.ndarray` of shape `(n, 2)`: The places, in units of no meaning. The perplexity is 30, or a third of the
        others where they are few.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are fewer than 4 features.
    """
    try:
        from sklearn.manifold import TSNE
    except ImportError as error:
        raise ImportError("Feature maps need scikit-learn: pip install scikit-learn") from error
    points = np.asarray(features, dtype=np.float32)
    if len(points) < 4:
        raise ValueError(f"A feature map needs 4 pictures, got {len(points)}.")
    perplexity = min(30.0, (len(points) - 1) / 3)
    return TSNE(perplexity=perplexity, init="pca", random_state=seed).fit_transform(points)


def feature_map_figure(
    rows: Mapping[str, tuple[Any, Sequence[str]]], variances: Mapping[str, Number] | None = None, seed: int = 0
) -> "Figure":
    """
    Draws the paper's Figure 4: where the pictures of each emotion lie among all.

    The pictures of all rows are laid out together, so that a place means the same in every panel; those of other rows
    are in pale grey.

    Args:
        rows (mapping): Per row its pictures' features, an array of shape `(n, D)`, and their intended emotions.
        variances (mapping, *optional*): The intra-class variance of each row, for its title.
        seed (`int`, defaults to 0): Of the layout.

    Returns:
        `Figure`: The figure.

    Raises:
        ImportError: If scikit-learn is not installed.
        ValueError: If there are fewer than 4 pictures in all.
    """
    arrays = [np.asarray(features) for features, _ in rows.values()]
    places = tsne(np.concatenate(arrays) if arrays else arrays, seed)
    colors = label_colors(emotion for _, emotions in rows.values() for emotion in emotions)
    middle, reach = (places.max(axis=0) + places.min(axis=0)) / 2, 0.54 * np.ptp(places, axis=0).max()
    sides = [(center - reach, center + reach) for center in middle]
    lines, columns = panels(len(rows))
    figure = new_figure(max(7.0, 3.9 * columns), 4.3 * lines + 0.8)
    ends = [0, *accumulate(len(array) for array in arrays)]
    for place, (name, (_, emotions)) in enumerate(rows.items()):
        axes = figure.add_subplot(lines, columns, place + 1)
        own = places[ends[place] : ends[place + 1]]
        axes.scatter(places[:, 0], places[:, 1], color="#e4e3de", s=10, linewidths=0)
        axes.scatter(own[:, 0], own[:, 1], color=[colors[emotion] for emotion in emotions], s=22, linewidths=0)
        told = f"\nintra-class variance {number(variances.get(name), Column('', digits=3))}" if variances else ""
        axes.set_title(textwrap.fill(name, 38) + told, fontsize=11)
        axes.set(xticks=[], yticks=[], xlim=sides[0], ylim=sides[1], facecolor=PAPER, aspect="equal")
        axes.spines[:].set_color("#d8d6cf")
    handles = [figure.axes[0].scatter([], [], color=color, s=40, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=8 if columns > 2 else 4, frameon=False)
    return figure


# --------------------------------------------------------------------------------------
# Figure 5: the threshold
# --------------------------------------------------------------------------------------


def threshold_figure(
    rows: Mapping[float, Mapping[str, Number]],
    accuracy: Column,
    content: Column,
    pictures: Mapping[float, Image.Image] | None = None,
    heading: str = "",
) -> "Figure":
    """
    Draws the paper's Figure 5: what the threshold of the gate trades, and one picture as it makes it.

    Args:
        rows (mapping): The figures of each threshold; infinity is one that never opens.
        accuracy (`Column`): Which figure is drawn on the left axis.
        content (`Column`): Which figure is drawn on the right axis.
        pictures (mapping, *optional*): The picture of each threshold, of one prompt, emotion and seed. Some may lack.
        heading (`str`, *optional*): What stands above the plot.

    Returns:
        `Figure`: The figure. Thresholds are in order and evenly spaced.

    Raises:
        ValueError: If there are no rows.
    """
    if not rows:
        raise ValueError("There are no thresholds to draw.")
    values, pictures = sorted(rows), pictures or {}
    side = max((image.height / image.width for image in pictures.values()), default=0.0) * PICTURE
    left, right, top, between = 0.85, 0.85, 0.55, 0.45
    width = left + max(3, len(values)) * (PICTURE + 0.15) + right
    height = top + 3.0 + between + side + 0.15
    figure = new_figure(width, height, constrained=False)
    axes = figure.add_axes((left / width, 1 - (top + 3.0) / height, 1 - (left + right) / width, 3.0 / height))
    other = axes.twinx()
    curves = [
        draw_estimates(axis, [rows[value].get(column.name) for value in values], column, color, style)
        for axis, column, color, style in ((axes, accuracy, GOOD, "o-"), (other, content, "#3f7fbf", "s--"))
    ]
    axes.set_xticks(range(len(values)), [threshold_name(value) for value in values])
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.legend(handles=curves, loc="lower right", bbox_to_anchor=(1, 1), ncols=2, fontsize=9, frameon=False)
    if heading:
        figure.text(left / width, 1 - 0.3 / height, heading, fontsize=11, va="center", color=INK)
    step = (1 - (left + right) / width) / len(values)
    for place, value in enumerate(values):
        if value in pictures:
            share = PICTURE / width
            box = (left / width + (place + 0.5) * step - share / 2, 0.12 / height, share, side / height)
            below = figure.add_axes(box, anchor="N")
            below.imshow(pictures[value].convert("RGB"))
            below.set_axis_off()
    return figure


def threshold_name(threshold: float) -> str:
    """How a threshold is called below its place."""
    return "never (η = ∞)" if threshold == math.inf else f"η = {threshold:g}"


def draw_estimates(axes: "Axes", numbers: Sequence[Number], column: Column, color: str, style: str) -> "Line2D":
    """Draws numbers in a row, with the intervals of those that have one, and returns the line; none is left out."""
    places = [place for place, value in enumerate(numbers) if value is not None]
    points = [point_of(numbers[place], column) for place in places]
    heights = [value for value, _, _ in points]
    bars = [[value - low for value, low, _ in points], [high - value for value, _, high in points]]
    axes.errorbar(places, heights, yerr=bars, color=color, elinewidth=1, capsize=3, fmt="none")
    (line,) = axes.plot(places, heights, style, color=color, label=column.heading, linewidth=1.7)
    axes.set_ylabel(column.heading, color=color, fontsize=11)
    axes.tick_params(axis="y", colors=color)
    axes.spines[["top"]].set_visible(False)
    axes.set_facecolor(PAPER)
    return line


class Point(NamedTuple):
    """A number in the unit of its column, and the ends of its interval, which are the number itself without one."""

    value: float
    low: float
    high: float


def point_of(value: Number, column: Column) -> Point:
    """A number as it is drawn; not a number where there is none."""
    ends = value if isinstance(value, Estimate) else Estimate(math.nan if value is None else value)
    return Point(*(column.factor * (ends.value if end is None else end) for end in ends))


# --------------------------------------------------------------------------------------
# All rows
# --------------------------------------------------------------------------------------


def scatter_figure(table: Table, x: Column, y: Column, title: str = "") -> "Figure":
    """
    Draws two figures of all rows against each other, such as accuracy and what is kept of the content.

    Args:
        table (mapping): The rows; those that lack either figure are left out.
        x, y (`Column`): The figures.
        title (`str`, *optional*): What stands above the plot.

    Returns:
        `Figure`: The plot, with the intervals of estimates as bars, and the rows' names beside it.

    Raises:
        ValueError: If no row has both figures.
    """
    both = {name: (point_of(row.get(x.name), x), point_of(row.get(y.name), y)) for name, row in table.items()}
    both = {name: own for name, own in both.items() if not math.isnan(own[0].value + own[1].value)}
    if not both:
        raise ValueError(f"No row has both {x.heading!r} and {y.heading!r}.")
    figure = new_figure(10.5, max(5.2, 0.27 * len(both) + 1.2))
    axes = figure.add_subplot()
    colors = list(EMOTION_COLORS.values())
    for place, (name, (across, up)) in enumerate(both.items()):
        color, marker = colors[place % len(colors)], MARKERS[place // len(colors) % len(MARKERS)]
        bar: dict[str, Any] = {"color": color, "linewidth": 0.9, "alpha": 0.45, "zorder": 1}
        axes.plot([across.low, across.high], [up.value] * 2, **bar)
        axes.plot([across.value] * 2, [up.low, up.high], **bar)
        label = textwrap.fill(f"{place + 1}  {name}", 44, subsequent_indent="    ")
        axes.scatter(across.value, up.value, color=color, marker=marker, s=60, label=label, zorder=2)
    axes.set(xlabel=x.heading, ylabel=y.heading, title=title)
    plain_axes(axes)
    figure.legend(loc="outside right upper", fontsize=9, frameon=False)
    figure.draw_without_rendering()  # settles where points lie
    where = axes.transData.transform([(across.value, up.value) for across, up in both.values()]) * 72 / figure.dpi
    for place, ((across, up), offset) in enumerate(zip(both.values(), label_offsets(where))):
        text: dict[str, Any] = {"textcoords": "offset points", "ha": "center", "va": "center", "fontsize": 8}
        axes.annotate(str(place + 1), (across.value, up.value), offset, color=colors[place % len(colors)], **text)
    return figure


def label_offsets(points: np.ndarray) -> list[tuple[float, float]]:
    """
    Where to write a number beside each point, so that it is far from other points and numbers.

    Args:
        points (`np.ndarray` of shape `(n, 2)`): The points, in typographic points.

    Returns:
        `list[tuple[float, float]]`: The middle of each number, from its point, 9 or 15 points away.
    """
    ways = [(math.cos(k * math.pi / 4), math.sin(k * math.pi / 4)) for k in (1, 3, 7, 5, 0, 2, 4, 6)]
    offsets = [(radius * x, radius * y) for radius in (9.0, 15.0) for x, y in ways]
    taken, chosen = [np.asarray(point) for point in points], []
    for point in points:

        def crowd(offset: tuple[float, float], point: np.ndarray = point) -> float:
            distances = [math.dist(point + offset, other) for other in taken]
            return sum(max(0.0, 11 - distance) ** 2 for distance in distances) + 0.1 * math.hypot(*offset)

        chosen.append(min(offsets, key=crowd))
        taken.append(point + chosen[-1])
    return chosen


def example_sheet(
    rows: Mapping[str, Sequence[Image.Image | Path | None]], asked: Sequence[tuple[str | None, str | None]]
) -> Image.Image:
    """
    Arranges pictures of several methods, a row per method and a column per prompt and emotion.

    Args:
        rows (mapping): Per method its pictures, one per column; `None` leaves a place empty.
        asked (sequence of `tuple[str, str]`): The prompt and the emotion of each column; either may be `None`.

    Returns:
        `PIL.Image.Image`: The sheet, RGB: above each column its prompt, below each picture its emotion.

    Raises:
        ValueError: If there are no pictures, or a row has not one per column.
    """
    for name, own in rows.items():
        if len(own) != len(asked):
            raise ValueError(f"The row {name!r} has {len(own)} pictures of {len(asked)}.")
    opened = [open_rgb(picture) for own in rows.values() for picture in own]
    there = [picture for picture in opened if picture is not None]
    if not there:
        raise ValueError("There are no pictures to show.")
    empty = Image.new("RGB", there[0].size, PAPER)
    names = [name if not column else "" for name in rows for column in range(len(asked))]
    cells = []
    for title, picture, (_, emotion) in zip(names, opened, cycle(asked)):
        color = EMOTION_COLORS.get(emotion or "", INK)
        cells.append(Cell(picture or empty, title, emotion or "" if picture else "", remark_color=color))
    return below_prompts(contact_sheet(cells, len(asked)), [prompt or "" for prompt, _ in asked])


def open_rgb(picture: Image.Image | Path | None) -> Image.Image | None:
    """A picture, or that of a file, in the size in which a sheet shows it."""
    if picture is None:
        return None
    if isinstance(picture, Image.Image):
        return enlarge(picture.convert("RGB"))
    with Image.open(picture) as image:
        return enlarge(image.convert("RGB"))


def below_prompts(sheet: Image.Image, prompts: Sequence[str], margin: int = 20) -> Image.Image:
    """A sheet of `contact_sheet` of that margin with a prompt above each column."""
    font = ImageFont.load_default(15)
    step = (sheet.width - margin) // len(prompts)
    lines = [wrap(prompt, step - margin, font) for prompt in prompts]
    top = 19 * max(map(len, lines)) + 14
    whole = Image.new("RGB", (sheet.width, sheet.height + top), PAPER)
    whole.paste(sheet, (0, top))
    draw = ImageDraw.Draw(whole)
    for column, own in enumerate(lines):
        for place, line in enumerate(own):
            draw.text((margin + column * step, 14 + 19 * place), line, INK, font)
    return whole
