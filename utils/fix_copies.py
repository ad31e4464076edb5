# Copyright 2026 The MUSE pipelines authors.
# Licensed under the Apache License, Version 2.0: http://www.apache.org/licenses/LICENSE-2.0
"""Keeps what several files share in step: diffusers loads each pipeline, and the modular block, by itself.

What stands between two marks is one region, the same to the byte wherever it stands, and edited in its original only.
`--check` tells which copies are out of step, and writes nothing.
"""

import argparse
import sys
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parent.parent


ORIGINAL, COPY, BLOCK = (REPOSITORY / name for name in ("pipeline_muse.py", "pipeline_muse_xl.py", "modular/block.py"))
START, END = (
    "# ---- The same in both pipeline files: written by `make fix-copies` ----\n",
    "# ---- End of the same ----\n",
)
XL_START, XL_END = (
    "# ---- Stable Diffusion XL's own, in its modular block too: written by `make fix-copies` ----\n",
    "# ---- End of Stable Diffusion XL's own ----\n",
)
COPIES = [(ORIGINAL, COPY, START, END), (ORIGINAL, BLOCK, START, END), (COPY, BLOCK, XL_START, XL_END)]


def region(source: str, start: str = START, end: str = END) -> str:
    """What stands between the marks, which have to be there once; raises a `ValueError` where they are not."""
    if source.count(start) != 1 or source.count(end) != 1 or source.index(start) > source.index(end):
        raise ValueError(f"a file needs the lines {start.strip()!r} and {end.strip()!r}, each once, in this order")
    return source[source.index(start) : source.index(end)]


def fixed() -> dict[Path, str]:
    """What the files that hold copies should hold."""
    texts = {path: path.read_text(encoding="utf-8") for path in (ORIGINAL, COPY, BLOCK) if path.exists()}
    for original, copy, *marks in COPIES:
        if copy in texts:
            texts[copy] = texts[copy].replace(region(texts[copy], *marks), region(texts[original], *marks))
    return texts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="Only tell which copies are out of step.")
    args = parser.parse_args()
    stale = {path: text for path, text in fixed().items() if text != path.read_text(encoding="utf-8")}
    if args.check:
        names = " and ".join(path.name for path in stale)
        sys.exit(f"out of step: {names}; run `make fix-copies`" if stale else 0)
    for path, text in stale.items():
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
