# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What pictures were meant to evoke, as far as their records, names and folders tell."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from muse_examples.runs import read_metadata


# The suffixes of pictures that Pillow reads.
PICTURES = frozenset((".avif", ".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"))


def read_intentions(path: Path) -> dict[str, Any]:
    """The emotion of each file in a `metadata.jsonl` of `generate.py` or `edit.py`; empty where there is none."""
    return {file: entry.get("emotion") for file, entry in read_metadata(path).items()}


def words(text: str) -> str:
    """`Sea-at dawn` -> `_sea_at_dawn_`, in which `_dawn_` is found as a whole word."""
    return "_".join(["", *re.findall(r"[^\W_]+", text.lower()), ""])


def intended_emotion(path: Path, labels: Sequence[str], intentions: Mapping[str, Any]) -> str | None:
    """
    What a picture was meant to evoke.

    Args:
        path (`Path`): The picture.
        labels (sequence of `str`): The labels of the classifier.
        intentions (`Mapping[str, Any]`): Of the picture's folder, from `read_intentions`. A picture that is not among
            them is meant to evoke the label that its name holds as a word, or else that of its folder.

    Returns:
        `str` or `None`: A label. `None` if nothing is known, or it is none of the labels, or several.
    """
    if path.name in intentions:
        emotion = intentions[path.name]
        return emotion if isinstance(emotion, str) and emotion in labels else None
    for text in (path.stem, path.resolve().parent.name):
        named = [label for label in labels if words(label) in words(text)]
        if named:
            return named[0] if len(named) == 1 else None
    return None
