"""Tables as Markdown, CSV and LaTeX."""

import csv
import io
import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from muse_examples.evaluation.measures import Estimate
from muse_examples.evaluation.tables import (
    Column,
    best,
    confusion_csv,
    csv_text,
    emotion_columns,
    latex,
    markdown,
    number,
    percent_column,
    write_table,
)


COLUMNS = [
    percent_column("emo_b", "Emo-B"),
    Column("clip", "CLIP", digits=2, better="higher"),
    Column("fid", "FID", better="lower"),
    Column("pictures", digits=0),
]
TABLE = {
    "stock | word": {"emo_b": Estimate(0.125, 0.05, 0.2), "clip": 26.004, "fid": 12.0, "pictures": 64},
    "MUSE_A & 100 % #1": {"emo_b": Estimate(0.8126, 0.7, 0.9), "clip": 25.996, "fid": None, "pictures": 64},
    "[x] η = ∞ {\\z}": {"emo_b": None, "clip": math.nan, "fid": 11.96, "pictures": 8},
}


def cells_of(line) -> list[str]:
    """The cells of a line of a Markdown table, as a parser splits them: not at escaped pipes."""
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def rows_of(text) -> list[list[str]]:
    """The cells of the lines of a LaTeX table: of a document they are split at ampersands that are not escaped."""
    return [re.split(r"(?<!\\) & ", line.removesuffix(r" \\")) for line in text.splitlines() if line.endswith(r"\\")]


def is_balanced(text) -> bool:
    depth = 0
    for brace in re.findall(r"(?<!\\)[{}]", text.replace("\\\\", "")):
        depth += 1 if brace == "{" else -1
        if depth < 0:
            return False
    return depth == 0


def test_numbers_as_they_are_read():
    percent = percent_column("share")
    assert [number(value, percent) for value in (0.5, Estimate(0.8126, 0, 1), None, math.nan, -0.0001, 1)] == [
        *("50.0", "81.3", "–", "–", "0.0", "100.0")
    ]
    assert number(math.inf, Column("eta")) == "∞" and number(64, Column("n", digits=0)) == "64"
    with pytest.raises(ValueError, match="got 'up'"):
        Column("share", better="up")


def test_markdown():
    lines = markdown(TABLE, COLUMNS, intervals=True).splitlines()
    assert cells_of(lines[0]) == ["method", "Emo-B (%) ↑", "CLIP ↑", "FID ↓", "pictures"]
    assert lines[1] == "|---|---:|---:|---:|---:|"
    assert cells_of(lines[2]) == [r"stock \| word", "12.5 [5.0, 20.0]", "26.00", "12.0", "64"]
    assert cells_of(lines[4])[1:] == ["–", "–", "12.0", "8"]
    assert cells_of(markdown(TABLE, COLUMNS[:1]).splitlines()[2])[1:] == ["12.5"]
    assert {len(cells_of(line)) for line in lines} == {5}


def test_csv_is_read_back():
    header, *rows = csv.reader(io.StringIO(csv_text(TABLE, COLUMNS)))
    assert header == ["method", "Emo-B (%)", "Emo-B (%) low", "Emo-B (%) high", "CLIP", "FID", "pictures"]
    assert [row[0] for row in rows] == list(TABLE)
    assert [float(text) for text in rows[1][1:5]] == [81.26, 70, 90, 25.996] and rows[1][5:] == ["", "64"]
    assert rows[2][1:] == ["", "", "", "", "11.96", "8"]
    mixed = {"a": {"x": 0.25}, "b": {"x": Estimate(0.5, 0.25, 0.75)}}
    assert csv_text(mixed, [Column("x")]) == "method,x,x low,x high\na,0.25,,\nb,0.5,0.25,0.75\n"


def test_the_best_as_shown_is_bold():
    assert [best(TABLE, column) for column in COLUMNS] == [81.3, 26.0, 12.0, None]
    assert best({"alone": {"fid": 1.0}}, COLUMNS[2]) is None
    bold = [[r"\textbf" in cell for cell in row[1:]] for row in rows_of(latex(TABLE, COLUMNS))[1:]]
    assert bold == [[False, True, True, False], [True, True, False, False], [False, False, True, False]]


def test_latex():
    text = latex(TABLE, COLUMNS, intervals=True, caption="Of 100 % & more", label="tab:a_b")
    header, first, second, third = rows_of(text)
    assert header == ["method", r"Emo-B (\%) $\uparrow$", r"CLIP $\uparrow$", r"FID $\downarrow$", "pictures"]
    assert first[:2] == ["stock $|$ word", r"12.5 {\scriptsize [5.0, 20.0]}"]
    assert second[0] == r"MUSE\_A \& 100 \% \#1" and second[1].startswith(r"\textbf{81.3} {\scriptsize ")
    assert third[:2] == [r"{}[x] $\eta$ = $\infty$ \{\textbackslash{}z\}", "--"]
    assert text.startswith("\\begin{table}\n\\centering\n\\caption{Of 100 \\% \\& more}\n\\label{tab:a_b}\n")
    assert r"\begin{tabular}{lrrrr}" in text and is_balanced(text)
    opened, closed = re.findall(r"\\begin\{(\w+)\}", text), re.findall(r"\\end\{(\w+)\}", text)
    assert opened == closed[::-1] == ["table", "tabular"]
    assert r"\begin{table}" not in latex(TABLE, COLUMNS)


NAMES = st.text(st.characters(exclude_categories=("Cc", "Cs")), max_size=20)


@given(NAMES, NAMES)
def test_names_of_any_characters_break_no_table(name, title):
    table, columns = {name: {"x": 1.0}, "other": {"x": 2.0}}, [Column("x", title, better="higher")]
    lines = markdown(table, columns).split("\n")
    assert len(lines) == 4 and {len(cells_of(line)) for line in lines} == {2}
    text = latex(table, columns)
    assert is_balanced(text) and text.count("\n") == 8
    assert not re.search(r"(?<!\\)[%#_^~]", text) and text.count("$") % 2 == text.count(r"\$") % 2
    assert [row[0] for row in csv.reader(io.StringIO(csv_text(table, columns), newline=""))] == [
        *("method", name, "other")
    ]


def test_emotions_and_confusions():
    block = {"MUSE": {"awe": Estimate(0.75, 0.5, 0.9), "fear": None}}
    assert markdown(block, emotion_columns(["awe", "fear"])).splitlines()[-1] == "| MUSE | 75.0 | – |"
    rows = list(
        csv.reader(io.StringIO(confusion_csv([[3, 1, 0], [0, 4, 2]], ["awe", "fear"], ["awe", "fear", "joy"])))
    )
    assert rows == [["meant, named", "awe", "fear", "joy"], ["awe", "3", "1", "0"], ["fear", "0", "4", "2"]]


def test_files_of_a_table(tmp_path):
    paths = write_table(TABLE, COLUMNS, tmp_path / "new" / "table.1", caption="Accuracy")
    assert [path.name for path in paths] == ["table.1.md", "table.1.csv", "table.1.tex"]
    texts = [path.read_text(encoding="utf-8") for path in paths]
    assert texts[0] == markdown(TABLE, COLUMNS, True) + "\n" and texts[1] == csv_text(TABLE, COLUMNS)
    assert r"\label{tab:table.1}" in texts[2] and "[5.0, 20.0]" in texts[0]
