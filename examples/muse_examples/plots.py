# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What plots have in common, and the plot of a confusion matrix. matplotlib is imported where something is drawn."""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from muse_examples.contact_sheets import INK, PAPER
from muse_examples.files import whole_file


if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(width: float, height: float, constrained: bool = True) -> "Figure":
    """An empty figure of so many inches, whose layout is constrained or left to whoever draws."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    layout = ConstrainedLayoutEngine(w_pad=0.1, h_pad=0.1) if constrained else None
    return Figure(figsize=(width, height), facecolor=PAPER, layout=layout)


def save_figure(figure: "Figure", path: Path, dpi: int = 120) -> Path:
    """Writes a figure in the format that the path's suffix names, such as `.png` or `.pdf`, and returns the path."""
    with whole_file(path) as partial:
        figure.savefig(partial, dpi=dpi, format=path.suffix.removeprefix("."), facecolor=figure.get_facecolor())
    return path


def plain_axes(axes: "Axes") -> None:
    """Leaves of a plot's frame what has ticks."""
    axes.set_facecolor(PAPER)
    axes.spines[["top", "right"]].set_visible(False)


def confusion_figure(
    counts: Sequence[Sequence[int]],
    meant: Sequence[str],
    named: Sequence[str] | None = None,
    title: str = "answers in % of the truth",
) -> "Figure":
    """
    Draws a confusion matrix in per cent of what was meant.

    Args:
        counts (sequence of sequences of `int`): Rows are what was meant, columns what was named.
        meant, named (sequences of `str`): The labels of rows and columns; by default both have the same.
        title (`str`, defaults to `"answers in % of the truth"`): What stands above.

    Returns:
        `Figure`: The figure, with the number of pictures of each row.
    """
    named, matrix = named or meant, np.asarray(counts, dtype=float)
    totals = matrix.sum(axis=1)
    shares = 100 * matrix / np.maximum(totals, 1)[:, None]
    figure = new_figure(2.6 + 0.55 * len(named), 2.4 + 0.55 * len(meant))
    axes = figure.add_subplot()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=100)
    axes.set_xticks(range(len(named)), named, rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(meant)), [f"{label} ({total:.0f})" for label, total in zip(meant, totals)])
    axes.set(xlabel="answer", ylabel="truth (pictures)")
    axes.set_title(textwrap.fill(title, 18 + 6 * len(named)), fontsize=11)
    for (row, column), share in np.ndenumerate(shares):
        axes.text(column, row, f"{share:.0f}", ha="center", va="center", color="white" if share > 55 else INK)
    return figure
