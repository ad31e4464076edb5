# Copyright 2026 The MUSE pipelines authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Keeps the method in `pipeline_muse_xl.py` in step with `pipeline_muse.py`: diffusers loads each file by itself.

What stands between the two marks is one region, the same to the byte in both files; it is edited in the first only.
`--check` tells whether the copy is out of step, and writes nothing.
"""

import argparse
import sys
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent
ORIGINAL, COPY = (REPOSITORY / name for name in ("pipeline_muse.py", "pipeline_muse_xl.py"))
START, END = (
    "# ---- The same in both pipeline files: written by `make fix-copies` ----\n",
    "# ---- End of the same ----\n",
)


def region(source: str) -> str:
    """What stands between the marks, which have to be there once; raises a `ValueError` where they are not."""
    if source.count(START) != 1 or source.count(END) != 1 or source.index(START) > source.index(END):
        raise ValueError(
            f"a pipeline file needs the lines {START.strip()!r} and {END.strip()!r}, each once, in this order"
        )
    return source[source.index(START) : source.index(END)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Only tell whether the copy is out of step.")
    args = parser.parse_args()
    copy = COPY.read_text(encoding="utf-8")
    fixed = copy.replace(region(copy), region(ORIGINAL.read_text(encoding="utf-8")))
    if args.check:
        sys.exit(f"{COPY.name} is out of step; run `make fix-copies`" if fixed != copy else 0)
    COPY.write_text(fixed, encoding="utf-8")


if __name__ == "__main__":
    main()
