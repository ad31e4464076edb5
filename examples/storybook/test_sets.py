# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Storybook's test sets, as files that `examples/evaluate.py` reads: prompts, and held-out drawings."""

import itertools
import json
import random
from collections.abc import Iterable
from pathlib import Path

import repository  # noqa: F401
from muse_examples.files import write_whole
from PIL import Image
from repository import ROOT
from world import EMOTIONS, PLACES, SUBJECTS, Scene, content_prompt, render, sample_scene


JUDGES = (f"Emo-A={ROOT / 'emotion_classifier'}", "Emo-B=emo_b", "Emo-C=emo_c")  # the guide, and who never guides
CLIP = "CLIP=storybook_clip"  # which no pipeline sees
SEED = 1000  # of the first prompt
TUNED_ON = 2  # prompts that served to choose the settings, so they are not measured on


def pixels_of(base: Path) -> int:
    """Pixels of a side of a checkpoint's pictures."""
    return json.loads((base / "vae" / "config.json").read_text())["sample_size"]


PIXELS = pixels_of(ROOT)


def prompts(count: int, start: int = 0) -> list[str]:
    """So many prompts, spread over the world, none of which settings were chosen on; 62 are there."""
    contents = [(place, subject) for place in PLACES for subject in SUBJECTS]
    random.Random(0).shuffle(contents)
    return [content_prompt(*content) for content in contents[TUNED_ON:][start : start + count]]


def write_prompts(path: Path, count: int, start: int = 0) -> Path:
    """Writes [`prompts`], one a line."""
    write_whole(path, "".join(f"{prompt}\n" for prompt in prompts(count, start)))
    return path


def drawing_name(number: int) -> str:
    """The file name of a drawing in its folder."""
    return f"drawing{number:04d}.png"


def write_pictures(folder: Path, scenes: Iterable[Scene], size: int, sources: Iterable[str] = ()) -> Path:
    """
    Draws scenes, with what they show and evoke in `metadata.jsonl`, and for edits their sources. Drawings that are
    there are not drawn again.
    """
    lines = []
    folder.mkdir(parents=True, exist_ok=True)
    for number, (scene, source) in enumerate(itertools.zip_longest(scenes, sources)):
        name = drawing_name(number)
        shown = {"file": name, "prompt": content_prompt(scene.place, scene.subject), "emotion": scene.emotion}
        lines.append(json.dumps(shown | ({"source": source} if source else {})) + "\n")
        if not is_picture(folder / name, size):
            render(scene, size).save(folder / name)
    write_whole(folder / "metadata.jsonl", "".join(lines))
    return folder


def is_picture(path: Path, size: int) -> bool:
    """Whether a drawing of that size is there, whole."""
    try:
        with Image.open(path) as image:
            image.load()
            return image.size == (size, size)
    except OSError:
        return False


def scenes(kind: str, count: int, emotions: Iterable[str | None] | None = None) -> list[Scene]:
    """Scenes that nothing was trained on, with these emotions in turn, or any."""
    wanted = None if emotions is None else list(emotions)
    found = []
    for number in range(count):
        source = random.Random(f"evaluate/{kind}/{number}")
        found.append(sample_scene(source, **({} if wanted is None else {"emotion": wanted[number % len(wanted)]})))
    return found


def write_sources(folder: Path, count: int, size: int) -> Path:
    """Drawings without an emotion, to be edited."""
    return write_pictures(folder, scenes("edit", count, [None]), size)


def write_drawings(folder: Path, count_of_each: int, size: int) -> Path:
    """Drawings of each emotion: what judges make of an emotion that is there."""
    return write_pictures(folder, scenes("drawing", count_of_each * len(EMOTIONS), EMOTIONS), size)


def write_references(folder: Path, count: int, size: int) -> Path:
    """Drawings of all kinds, to compare distributions with."""
    return write_pictures(folder, scenes("reference", count), size)
