# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Test sets: captions, pictures with captions, and folders of pictures that other programs made.

The paper takes COCO captions, 700 pictures per emotion for generation and 200 per emotion for editing. Here each
caption is made with every emotion from one seed, so that the emotion is all that differs.
"""

import json
import random
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from muse_examples.evaluation.measures import ELEMENT_PROMPT
from muse_examples.files import read_text
from muse_examples.intentions import PICTURES, intended_emotion
from muse_examples.runs import Job, Record, read_metadata, read_record


CAPTION_KEYS = ("caption", "captions", "text", "prompt")
FILE_KEYS = ("file_name", "file")


class Content(NamedTuple):
    """What a picture shows: a text, the picture that is edited, and whether the text is EmoCtrl's "element"."""

    prompt: str
    source: Path | None = None
    element: bool = False


@dataclass(frozen=True)
class Case(Job):
    """A picture that every row has to make. Those of one `content` (a number) show the same."""

    content: int = 0
    element: bool = False


@dataclass(frozen=True)
class Shown:
    """
    A picture of a row, to be judged.

    Args:
        path (`Path`): Where it is.
        emotion (`str`): What it is meant to evoke.
        prompt (`str`, *optional*): What it is meant to show; not known of every foreign picture.
        source (`Path`, *optional*): The picture that was edited.
        content (`str` or `int`): What pictures that show the same have in common.
        element (`bool`): Whether the prompt is an element of EmoCtrl's test set.
        record (`dict`): What is known of how it was made.
    """

    path: Path
    emotion: str
    prompt: str | None
    source: Path | None
    content: str | int
    element: bool
    record: Record


# --------------------------------------------------------------------------------------
# Captions
# --------------------------------------------------------------------------------------


def read_contents(path: Path, seed: int = 0) -> list[Content]:
    """
    Reads what pictures should show.

    Args:
        path (`Path`): COCO's annotations (JSON with "images" and "annotations"), EmoCtrl's test set (JSON with
            "element" and "caption"), JSON lines or a JSON list of objects with a "caption", "captions", "text" or
            "prompt", or a text with one caption per line, without blank lines and `#` comments.
        seed (`int`, defaults to 0): Of the order of COCO's images and of which of its captions each has.

    Returns:
        `list[Content]`: One per image of COCO's, in a random order; else in the order of the file, each once.

    Raises:
        ValueError: If it is none of these, or holds no caption.
    """
    try:
        text = read_text(path)
        data = parse(text, path.suffix.lower())
    except ValueError as error:
        raise ValueError(f"{str(path)!r} cannot be read: {error}") from error
    if isinstance(data, dict) and "annotations" in data:
        contents = [Content(one_of(captions, seed, name)) for name, captions in coco_captions(data, seed).items()]
    elif isinstance(data, dict) and {"element", "caption"} <= data.keys():
        contents = [Content(ELEMENT_PROMPT.format(name), element=True) for name in data["element"]]
        contents += [Content(caption) for caption in data["caption"]]
    elif isinstance(data, list):
        contents = [Content(one_of(captions_of(entry, path), seed, str(k))) for k, entry in enumerate(data)]
    else:
        raise ValueError(f"{str(path)!r} is neither COCO's nor EmoCtrl's format, nor a list of captions.")
    contents = list(dict.fromkeys(content for content in contents if content.prompt))
    if not contents:
        raise ValueError(f"{str(path)!r} holds no captions.")
    return contents


def parse(text: str, suffix: str) -> Any:
    """The data of a file: of JSON, JSON lines, or the lines of a text."""
    if suffix == ".json":
        return json.loads(text)
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if suffix == ".jsonl":
        return [json.loads(line) for line in lines]
    return [{"caption": line} for line in lines if not line.startswith("#")]


def coco_captions(data: Mapping[str, Any], seed: int) -> dict[str, list[str]]:
    """The captions of COCO's images by file name, images in the order of a seed."""
    names = {image["id"]: image["file_name"] for image in data["images"]}
    captions: dict[str, list[str]] = {}
    for entry in sorted(data["annotations"], key=lambda entry: entry["id"]):
        captions.setdefault(names[entry["image_id"]], []).append(clean(entry["caption"]))
    order = random.Random(seed).sample(sorted(captions), len(captions))
    return {name: captions[name] for name in order}


def captions_of(entry: Any, path: Path) -> list[str]:
    """The captions of one object of a list."""
    if isinstance(entry, str):
        return [clean(entry)]
    found = next((entry[key] for key in CAPTION_KEYS if isinstance(entry, dict) and entry.get(key)), None)
    if found is None:
        raise ValueError(f"{str(path)!r} has an entry without a caption: {entry!r}.")
    return [clean(caption) for caption in ([found] if isinstance(found, str) else found)]


def one_of(captions: Sequence[str], seed: int, name: str) -> str:
    """One of an image's captions, by chance but the same for the same seed and name."""
    return random.Random(f"{seed}/{name}").choice(list(captions))


def clean(caption: str) -> str:
    """A caption in one line."""
    return " ".join(caption.split())


# --------------------------------------------------------------------------------------
# Pictures with captions
# --------------------------------------------------------------------------------------


def read_pairs(folder: Path, captions: Path | None = None, seed: int = 0) -> list[Content]:
    """
    Reads pictures to edit, each with a caption.

    Args:
        folder (`Path`): The pictures. Those without a caption are left out.
        captions (`Path`, *optional*): For a folder that brings none, COCO's annotations, or a JSON list or JSON lines
            of objects with a "file_name" or "file" and a caption. A folder's own are `metadata.jsonl`,
            `captions.json`, or a text beside each picture, `photo.txt` of `photo.jpg`.
        seed (`int`, defaults to 0): Of their order and of which of several captions each has.

    Returns:
        `list[Content]`: The pairs in a random order.

    Raises:
        ValueError: If there are none.
    """
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in PICTURES)
    own = next((folder / name for name in ("metadata.jsonl", "captions.json") if (folder / name).exists()), None)
    texts = [path for path in pictures if path.with_suffix(".txt").exists()]
    file = own or (None if texts else captions)
    told = {path.name: [clean(read_text(path.with_suffix(".txt")))] for path in texts}
    if file is not None:
        told = captions_by_file(file)
    pairs = [Content(one_of(told[path.name], seed, path.name), path) for path in pictures if told.get(path.name)]
    if not pairs:
        raise ValueError(f"{str(folder)!r} holds no picture with a caption{f' in {str(file)!r}' if file else ''}.")
    return random.Random(seed).sample(pairs, len(pairs))


def captions_by_file(path: Path) -> dict[str, list[str]]:
    """The captions of pictures, by file name."""
    data = parse(read_text(path), path.suffix.lower())
    if isinstance(data, dict) and "annotations" in data:
        return coco_captions(data, seed=0)
    found = {}
    for entry in data:
        name = next((entry[key] for key in FILE_KEYS if isinstance(entry, dict) and entry.get(key)), None)
        if name is None:
            raise ValueError(f"{str(path)!r} has an entry without a file name: {entry!r}.")
        found[Path(name).name] = captions_of(entry, path)
    return found


# --------------------------------------------------------------------------------------
# What every row has to make, and what there is to judge
# --------------------------------------------------------------------------------------


def plan(contents: Sequence[Content], emotions: Sequence[str], per_emotion: int | None, seed: int = 0) -> list[Case]:
    """
    Every content with every emotion.

    Args:
        contents (sequence of [`Content`]): What to show.
        emotions (sequence of `str`): What to evoke.
        per_emotion (`int`, *optional*): Pictures per emotion; of the first contents, or of all of them again and
            again, with other seeds. By default each content once.
        seed (`int`, defaults to 0): Of the first content; the following ones count on.

    Returns:
        `list[Case]`: Content by content.
    """
    cases = []
    for number in range(per_emotion or len(contents)):
        content = contents[number % len(contents)]
        for emotion in emotions:
            cases.append(
                Case(
                    content.prompt,
                    emotion,
                    seed + number,
                    source=content.source,
                    name=f"{number:05d}",
                    content=number % len(contents),
                    element=content.element,
                )
            )
    return cases


def shown_of(cases: Iterable[Case], folder: Path) -> list[Shown]:
    """The pictures of a row that evaluate.py made; those that are missing are left out."""
    found = []
    for case in cases:
        record = read_record(folder / case.file_name)
        if record is not None:
            path = folder / case.file_name
            emotion = str(case.emotion)
            found.append(Shown(path, emotion, case.prompt, case.source, case.content, case.element, record))
    return found


def shown_elsewhere(folder: Path, cases: Sequence[Case], emotions: Sequence[str]) -> list[Shown]:
    """
    The pictures that another program made.

    What one is meant to evoke stands in its record, its `metadata.jsonl`, its name, or the name of its folder. What it
    is meant to show is known where its record says so, or names the "source" that was edited, or where its name begins
    with that of a case, `00017_…`.

    Args:
        folder (`Path`): The pictures, in it or in folders of it.
        cases (sequence of [`Case`]): The test set.
        emotions (sequence of `str`): What they may be meant to evoke.

    Raises:
        ValueError: If the intention of none is known.
    """
    by_name = {case.name: case for case in cases}
    by_prompt = {case.prompt: case for case in cases}
    by_source = {case.source.name: case for case in cases if case.source}
    found = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES):
        records = read_metadata(path.parent / "metadata.jsonl")
        record = records.get(path.name) or read_record(path) or {}
        intentions = {path.name: record["emotion"]} if "emotion" in record else {}
        emotion = intended_emotion(path, emotions, intentions)
        if emotion is None:
            continue
        case = by_source.get(Path(record.get("source") or "").name) or by_prompt.get(record.get("prompt"))
        case = case or by_name.get(path.stem.split("_")[0])
        prompt = record.get("prompt") or (case.prompt if case else None)
        source = case.source if case else None
        content: str | int = case.content if case else str(path)
        found.append(Shown(path, emotion, prompt, source, content, bool(case and case.element), record))
    if not found:
        raise ValueError(f"Of no picture in {str(folder)!r} is known which of {', '.join(emotions)} it should evoke.")
    return found
