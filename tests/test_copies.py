"""What stands in several files is the same in all: the method to the byte, measured tables in the docs."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from doc_tables import PAGES, RESULTS, table, written
from fix_copies import COPIES, COPY, END, ORIGINAL, START, region
from tiny_models import REPOSITORY


@pytest.mark.parametrize("original, copy, start, end", COPIES, ids=lambda value: getattr(value, "name", ""))
def test_copies_are_the_same_to_the_byte(original, copy, start, end):
    original, copy = (path.read_text(encoding="utf-8") for path in (original, copy))
    assert region(original, start, end) == region(copy, start, end)


def test_the_method_is_in_what_is_copied():
    method = region(ORIGINAL.read_text(encoding="utf-8"))
    for name in ("class Guide:", "class MuseMixin(", "class GuidanceSettings:", "def muse_loss("):
        assert method.count(f"\n{name}") == 1


@pytest.fixture
def clone(tmp_path) -> Path:
    """The files and the scripts, to be changed."""
    shutil.copytree(REPOSITORY / "utils", tmp_path / "utils")
    for path in {path for pair in COPIES for path in pair[:2]}:
        (tmp_path / path.relative_to(REPOSITORY)).parent.mkdir(exist_ok=True)
        shutil.copy(path, tmp_path / path.relative_to(REPOSITORY))
    return tmp_path


def run(clone: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(clone / "utils" / script), *arguments]
    return subprocess.run(command, cwd=clone.parent, capture_output=True, text=True)


@pytest.mark.parametrize("copy", sorted({pair[1] for pair in COPIES}), ids=lambda path: path.name)
def test_a_change_of_a_copy_is_told_and_mended(clone, copy):
    """What stands outside of the regions stays as it is."""
    text, file = copy.read_text(encoding="utf-8"), clone / copy.relative_to(REPOSITORY)
    mine = text.replace("import math\n", "import math  # mine\n")
    broken = mine.replace("START_JITTER = 0.1", "START_JITTER = 0.1  # and more")
    assert region(broken) != region(text) and mine != text
    file.write_text(broken, encoding="utf-8")
    checked = run(clone, "fix_copies.py", "--check")
    assert checked.returncode == 1 and copy.name in checked.stderr and "make fix-copies" in checked.stderr
    assert file.read_text(encoding="utf-8") == broken, "to check is not to write"
    assert run(clone, "fix_copies.py").returncode == 0
    assert file.read_text(encoding="utf-8") == mine
    assert run(clone, "fix_copies.py", "--check").returncode == 0


@pytest.mark.parametrize("broken", ["", START, END, END + START, START + END + END], ids=repr)
def test_marks_that_are_missing_or_stand_twice_are_reported(broken):
    with pytest.raises(ValueError, match="each once"):
        region(f"import math\n{broken}\n")


def test_the_figures_are_printed_for_both_files(clone):
    process = run(clone, "figures.py")
    assert process.returncode == 0, process.stderr
    title, *rows = process.stdout.splitlines()
    assert title.split() == [ORIGINAL.name, COPY.name]
    lines = next(row for row in rows if row.startswith("code lines")).split()[-2:]
    assert all(100 < int(number) < 2000 for number in lines)


@pytest.mark.parametrize("page", sorted(PAGES.glob("storybook*.md")), ids=lambda path: path.name)
def test_tables_of_the_docs_are_those_that_were_measured(page):
    text = page.read_text(encoding="utf-8")
    assert "<!-- table: " in text and written(text) == text, "run python utils/doc_tables.py"


def test_a_figure_that_was_changed_in_the_docs_is_told_and_mended(tmp_path):
    shutil.copytree(REPOSITORY / "utils", tmp_path / "utils")
    shutil.copytree(PAGES, tmp_path / PAGES.relative_to(REPOSITORY))
    shutil.copytree(RESULTS, tmp_path / RESULTS.relative_to(REPOSITORY), ignore=shutil.ignore_patterns("*.png"))
    page = tmp_path / "docs" / "storybook.md"
    text = page.read_text(encoding="utf-8")
    assert text.count("| 12.5 |")
    page.write_text(text.replace("| 12.5 |", "| 21.5 |", 1) + "mine\n", encoding="utf-8")
    checked = run(tmp_path, "doc_tables.py", "--check")
    assert checked.returncode == 1 and "storybook.md" in checked.stderr and "doc_tables.py" in checked.stderr
    assert run(tmp_path, "doc_tables.py").returncode == 0
    assert page.read_text(encoding="utf-8") == text + "mine\n"
    assert run(tmp_path, "doc_tables.py", "--check").returncode == 0


def test_a_table_of_the_docs_leaves_out_what_was_not_measured():
    rows = {"stock": {"Emo-B (%)": "12.5", "at step": "–"}, "MUSE": {"Emo-B (%)": "93.75", "gate open (%)": "100.0"}}
    assert table(rows).splitlines() == [
        "| row | Emo-B | open |",
        "|---|---|---|",
        "| stock | 12.5 | – |",
        "| MUSE | 93.8 | 100 |",
    ]
