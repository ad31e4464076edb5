# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tables as Markdown, CSV and LaTeX: a table has a row per method, and in it a number, or none, per column."""

import csv
import io
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from muse_examples.evaluation.measures import Estimate
from muse_examples.files import write_whole


Number = Estimate | float | int | None
Table = Mapping[str, Mapping[str, Number]]  # by the row's name, then by the column's

ARROWS = {"higher": "↑", "lower": "↓", None: ""}  # what is better
NONE = "–"  # where there is no number

MARKDOWN = str.maketrans({character: f"\\{character}" for character in "\\|*`<"} | {"\n": " ", "\r": " "})
LATEX = str.maketrans(
    {character: f"\\{character}" for character in "&%$#_{}"}
    | {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "\n": " ", "\r": " "}
    | {"<": "$<$", ">": "$>$", "|": "$|$"}
    | {"–": "--", "—": "---", "“": "``", "”": "''", "…": r"\dots{}", "·": r"$\cdot$", "×": r"$\times$"}
    | {"±": r"$\pm$", "≤": r"$\le$", "≥": r"$\ge$", "∞": r"$\infty$", "→": r"$\to$", "η": r"$\eta$", "λ": r"$\lambda$"}
    | {"↑": r"$\uparrow$", "↓": r"$\downarrow$"}
)


@dataclass(frozen=True)
class Column:
    """
    A column of a table.

    Args:
        name (`str`): The key of its numbers in each row.
        title (`str`, *optional*): What is shown above it; by default the name.
        unit (`str`, *optional*): The unit in which it is shown, in brackets after the title.
        factor (`float`, defaults to 1): By what numbers are multiplied to be in that unit, such as 100 for shares.
        digits (`int`, defaults to 1): How many are shown after the point.
        better (`str`, *optional*): "higher" or "lower"; without it no row is best.

    Raises:
        ValueError: If `better` is neither.
    """

    name: str
    title: str = ""
    unit: str = ""
    factor: float = 1.0
    digits: int = 1
    better: str | None = None

    def __post_init__(self) -> None:
        if self.better not in ARROWS:
            raise ValueError(f'`better` has to be "higher", "lower" or `None`, got {self.better!r}.')

    @property
    def heading(self) -> str:
        """The title with the unit."""
        return (self.title or self.name) + (f" ({self.unit})" if self.unit else "")


def percent_column(name: str, title: str = "", better: str | None = "higher", digits: int = 1) -> Column:
    """A column of shares within 0 and 1, which are shown in per cent."""
    return Column(name, title, "%", 100.0, digits, better)


def emotion_columns(emotions: Iterable[str]) -> list[Column]:
    """The columns of a table with the accuracy of each emotion, by its name, as shares, shown in per cent."""
    return [Column(emotion, factor=100.0, better="higher") for emotion in emotions]


# --------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------


def shown(value: Number, column: Column) -> float | None:
    """A number in the column's unit and with its digits; `None` where there is none or it is not a number."""
    plain = value.value if isinstance(value, Estimate) else value
    if plain is None or math.isnan(plain):
        return None
    return round(plain * column.factor, column.digits) + 0.0  # no minus before zero


def number(value: Number, column: Column) -> str:
    """A number as it is read, `–` for none."""
    plain = shown(value, column)
    if plain is None or math.isinf(plain):
        return NONE if plain is None else "∞" if plain > 0 else "−∞"
    return f"{plain:.{column.digits}f}"


def interval(value: Number, column: Column) -> str:
    """`[low, high]` of an estimate; empty for other numbers, and where it has no ends or one is not a number."""
    if not isinstance(value, Estimate) or any(end is None or math.isnan(end) for end in value):
        return ""
    return f"[{number(value.low, column)}, {number(value.high, column)}]"


def best(table: Table, column: Column) -> float | None:
    """The best number of a column as it is shown; `None` where no direction is better, or nothing to be compared."""
    values = [plain for row in table.values() if (plain := shown(row.get(column.name), column)) is not None]
    if column.better is None or len(values) < 2:
        return None
    return max(values) if column.better == "higher" else min(values)


# --------------------------------------------------------------------------------------
# Texts
# --------------------------------------------------------------------------------------


def markdown(table: Table, columns: Sequence[Column], intervals: bool = False, first: str = "method") -> str:
    """
    A table in GitHub's Markdown.

    Args:
        table (mapping): The rows.
        columns (sequence of [`Column`]): Which of their numbers to show, in this order. Rows may lack some.
        intervals (`bool`, defaults to `False`): Show those of estimates.
        first (`str`, defaults to `"method"`): What stands above the names of the rows.

    Returns:
        `str`: The table, without a newline at its end.
    """

    def line(cells: Iterable[str]) -> str:
        return f"| {' | '.join(cells)} |"

    def cell(value: Number, column: Column) -> str:
        return f"{number(value, column)} {interval(value, column) if intervals else ''}".rstrip()

    headings = [f"{column.heading} {ARROWS[column.better]}".rstrip().translate(MARKDOWN) for column in columns]
    lines = [line([first.translate(MARKDOWN), *headings]), "|---|" + "---:|" * len(columns)]
    for name, row in table.items():
        lines.append(line([name.translate(MARKDOWN), *(cell(row.get(column.name), column) for column in columns)]))
    return "\n".join(lines)


def csv_text(table: Table, columns: Sequence[Column], first: str = "method") -> str:
    """
    A table as CSV, in the columns' units but not rounded to their digits; nothing stands where there is no number.

    Args:
        table (mapping): The rows.
        columns (sequence of [`Column`]): Which of their numbers to write. `X` with an estimate in any row is followed
            by `X low` and `X high`, the ends of its interval.
        first (`str`, defaults to `"method"`): The heading of the rows' names.

    Returns:
        `str`: Lines that end in a newline.
    """

    def plain(value: float | None, column: Column) -> str:
        return "" if value is None or math.isnan(value) else f"{value * column.factor:.12g}"

    def cells(value: Number, column: Column) -> list[str]:
        numbers = value if isinstance(value, Estimate) else (value, None, None)
        return [plain(one, column) for one in numbers[: len(ends[column])]]

    estimated = [c for c in columns if any(isinstance(row.get(c.name), Estimate) for row in table.values())]
    ends = {column: ("", " low", " high") if column in estimated else ("",) for column in columns}
    lines = [[first, *(column.heading + end for column in columns for end in ends[column])]]
    for name, row in table.items():
        lines.append([name, *(text for column in columns for text in cells(row.get(column.name), column))])
    return csv_lines(lines)


def csv_lines(rows: Iterable[Sequence[object]]) -> str:
    """Rows as CSV, each of which ends in a newline."""
    buffer = io.StringIO()
    csv.writer(buffer, lineterminator="\n").writerows(rows)
    return buffer.getvalue()


def latex(
    table: Table,
    columns: Sequence[Column],
    intervals: bool = False,
    first: str = "method",
    caption: str = "",
    label: str = "",
) -> str:
    r"""
    A table in LaTeX, for a document with `\usepackage{booktabs}`. Arrows tell what is better, and the best of each
    column is bold: all rows that are best as they are shown.

    Args:
        table (mapping): The rows.
        columns (sequence of [`Column`]): Which of their numbers to show, in this order. Rows may lack some.
        intervals (`bool`, defaults to `False`): Show those of estimates, in small brackets.
        first (`str`, defaults to `"method"`): What stands above the names of the rows.
        caption, label (`str`, *optional*): With a caption the `tabular` stands in a `table`. It is text, not LaTeX.

    Returns:
        `str`: Lines that end in a newline.
    """
    bests = {column: best(table, column) for column in columns}

    def cell(value: Number, column: Column) -> str:
        text = number(value, column).translate(LATEX)
        if bests[column] is not None and shown(value, column) == bests[column]:
            text = rf"\textbf{{{text}}}"
        ends = interval(value, column).translate(LATEX) if intervals else ""
        return text + (rf" {{\scriptsize {ends}}}" if ends else "")

    def line(name: str, cells: Iterable[str]) -> str:
        guard = "{}" if name.startswith(("[", "*")) else ""  # these would belong to the \\ before them
        return " & ".join([guard + name.translate(LATEX), *cells]) + r" \\"

    headings = [f"{column.heading} {ARROWS[column.better]}".rstrip().translate(LATEX) for column in columns]
    lines = [rf"\begin{{tabular}}{{l{'r' * len(columns)}}}", r"\toprule", line(first, headings)]
    lines.append(r"\midrule")
    for name, row in table.items():
        lines.append(line(name, [cell(row.get(column.name), column) for column in columns]))
    lines += [r"\bottomrule", r"\end{tabular}"]
    if caption:
        head = [r"\begin{table}", r"\centering", rf"\caption{{{caption.translate(LATEX)}}}"]
        lines = [*head, *([rf"\label{{{label}}}"] if label else []), *lines, r"\end{table}"]
    return "\n".join(lines) + "\n"


def confusion_csv(counts: Sequence[Sequence[int]], meant: Sequence[str], named: Sequence[str] | None = None) -> str:
    """
    A confusion matrix as CSV.

    Args:
        counts (sequence of sequences of `int`): Rows are what was meant, columns what was named.
        meant, named (sequences of `str`): The labels of rows and columns; by default both have the same.

    Returns:
        `str`: Lines that end in a newline.
    """
    return csv_lines([["meant, named", *(named or meant)], *([label, *row] for label, row in zip(meant, counts))])


def write_table(
    table: Table,
    columns: Sequence[Column],
    stem: Path,
    intervals: bool = True,
    first: str = "method",
    caption: str = "",
) -> list[Path]:
    """
    Writes a table as `stem.md`, `stem.csv` and `stem.tex`.

    Args:
        table (mapping), columns (sequence of [`Column`]), first (`str`), caption (`str`): See [`latex`].
        stem (`Path`): The files' path without what tells their kind.
        intervals (`bool`, defaults to `True`): Whether Markdown and LaTeX show the intervals of estimates.

    Returns:
        `list[Path]`: The files.
    """
    texts = {
        "md": markdown(table, columns, intervals, first) + "\n",
        "csv": csv_text(table, columns, first),
        "tex": latex(table, columns, intervals, first, caption, f"tab:{stem.name}"),
    }
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in texts]
    for path, text in zip(paths, texts.values()):
        write_whole(path, text)
    return paths
