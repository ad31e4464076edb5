# Copyright 2026 The MUSE pipelines authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Writes the measured tables into the docs, from the files that `examples/storybook/evaluate.py` left in `results/`.

A table stands between `<!-- table: generation -->`, which names its file, and `<!-- end of table -->`. `--check` tells
which pages are out of step, and writes nothing.
"""

import argparse
import re
import sys
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
PAGES, RESULTS = REPOSITORY / "docs", REPOSITORY / "examples" / "storybook" / "results"
# heading in the docs, column in the results, decimals
COLUMNS = (
    ("Emo-A", "Emo-A (%)", 1),
    ("Emo-B", "Emo-B (%)", 1),
    ("Emo-C", "Emo-C (%)", 1),
    ("B degraded", "Emo-B degraded (%)", 1),
    ("C degraded", "Emo-C degraded (%)", 1),
    ("CLIP", "CLIP", 1),
    ("FID", "FID drawings, CLIP", 1),
    ("image similarity", "image similarity", 2),
    ("open", "gate open (%)", 0),
    ("at step", "at step", 1),
    ("inner steps", "inner steps", 1),
    ("seconds", "seconds", 2),
)
MARKED = re.compile(r"(<!-- table: (\S+) -->\n).*?(<!-- end of table -->)", re.DOTALL)


def cells_of(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def read_rows(text: str) -> dict[str, dict[str, str]]:
    """The rows of all tables of a Markdown file by their names; arrows and intervals are left out."""
    rows: dict[str, dict[str, str]] = {}
    heads: list[str] = []
    for line in text.splitlines():
        if not line.startswith("|"):
            heads = []
        elif not heads:
            heads = [head.rstrip(" ↑↓") for head in cells_of(line)]
        elif not line.startswith("|---"):
            name, *cells = cells_of(line)
            rows.setdefault(name, {}).update(zip(heads[1:], (re.sub(r" \[.*\]", "", cell) for cell in cells)))
    return rows


def table(rows: dict[str, dict[str, str]]) -> str:
    """The columns that a reader compares, as far as they were measured."""
    columns = [column for column in COLUMNS if any(row.get(column[1], "–") != "–" for row in rows.values())]
    lines = ["| row | " + " | ".join(heading for heading, _, _ in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        values = [(row.get(column, "–"), decimals) for _, column, decimals in columns]
        cells = [value if value == "–" else f"{float(value):.{decimals}f}" for value, decimals in values]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def written(text: str) -> str:
    """A page with its tables as they should be."""

    def fill(match: re.Match[str]) -> str:
        source = (RESULTS / f"{match[2]}.md").read_text(encoding="utf-8")
        return match[1] + table(read_rows(source)) + match[3]

    return MARKED.sub(fill, text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Only tell which pages are out of step.")
    args = parser.parse_args()
    pages = {path: path.read_text(encoding="utf-8") for path in sorted(PAGES.glob("*.md"))}
    stale = {path: written(text) for path, text in pages.items() if written(text) != text}
    if args.check:
        names = " and ".join(path.name for path in stale)
        sys.exit(f"out of step: {names}; run `python utils/doc_tables.py`" if stale else 0)
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
