"""The method stands in both pipeline files, the same to the byte; what tells so, and what tells how large they are."""

import shutil
import subprocess
import sys
from pathlib import Path

import fix_copies
import pytest
from fix_copies import END, START, region
from tiny_models import REPOSITORY


ORIGINAL, COPY = (path.read_text(encoding="utf-8") for path in (fix_copies.ORIGINAL, fix_copies.COPY))


def test_the_method_is_the_same_to_the_byte_in_both_files():
    assert region(ORIGINAL) == region(COPY)
    assert len(region(COPY)) > len(COPY) / 2, "else most of it is something else"
    for name in ("class Guide:", "class MuseMixin(", "class GuidanceSettings:", "def muse_loss("):
        assert COPY.count(f"\n{name}") == region(COPY).count(f"\n{name}") == 1


@pytest.fixture
def clone(tmp_path) -> Path:
    """Both files and the scripts, to be changed."""
    shutil.copytree(REPOSITORY / "utils", tmp_path / "utils")
    for path in (fix_copies.ORIGINAL, fix_copies.COPY):
        shutil.copy(path, tmp_path)
    return tmp_path


def run(clone: Path, script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(clone / "utils" / script), *arguments]
    return subprocess.run(command, cwd=clone.parent, capture_output=True, text=True)


def test_a_change_of_either_file_is_told_and_mended(clone):
    """What stands outside of the region stays as it is."""
    copy = clone / fix_copies.COPY.name
    assert run(clone, "fix_copies.py", "--check").returncode == 0
    for change in ("START_JITTER = 0.2", "START_JITTER = 0.1  # and more"):
        broken = COPY.replace("START_JITTER = 0.1", change).replace("import math\n", "import math  # mine\n")
        assert region(broken) != region(COPY)
        copy.write_text(broken, encoding="utf-8")
        checked = run(clone, "fix_copies.py", "--check")
        assert checked.returncode == 1 and "make fix-copies" in checked.stderr
        assert copy.read_text(encoding="utf-8") == broken, "to check is not to write"
        assert run(clone, "fix_copies.py").returncode == 0
        assert copy.read_text(encoding="utf-8") == COPY.replace("import math\n", "import math  # mine\n")


@pytest.mark.parametrize("broken", ["", START, END, END + START, START + END + END], ids=repr)
def test_marks_that_are_missing_or_stand_twice_are_reported(broken):
    with pytest.raises(ValueError, match="each once"):
        region(f"import math\n{broken}\n")


def test_the_figures_are_printed_for_both_files(clone):
    process = run(clone, "figures.py")
    assert process.returncode == 0, process.stderr
    title, *rows = process.stdout.splitlines()
    assert title.split() == [fix_copies.ORIGINAL.name, fix_copies.COPY.name]
    lines = next(row for row in rows if row.startswith("code lines")).split()[-2:]
    assert all(100 < int(number) < 2000 for number in lines)
