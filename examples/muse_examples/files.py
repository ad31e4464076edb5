# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Files that are there whole or not at all."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4


PARTIAL = "muse-*.partial"  # what `whole_file` leaves where it is killed


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the path to write to instead, which becomes `path` at the end; makes the folder if need be."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(PARTIAL.replace("*", uuid4().hex))
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    """Writes a text as UTF-8. Names of files may hold bytes that are no text; they stay what they are."""
    with whole_file(path) as partial:
        partial.write_text(text, encoding="utf-8", errors="surrogateescape", newline="")


def read_text(path: Path) -> str:
    """A text in UTF-8, without the byte order mark that some editors put before it."""
    return path.read_text(encoding="utf-8-sig")
