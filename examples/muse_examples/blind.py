# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Sheets and forms that ask people about pictures without telling what these were meant to evoke, and their key."""

import base64
import hashlib
import html
import io
import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from muse_examples.contact_sheets import Cell, contact_sheet, save
from muse_examples.files import write_whole
from muse_examples.runs import read_metadata, read_record
from pipeline_muse import MIKELS_WHEEL, to_rgb


KEYS = "1234567890abcdefghijklmnopqrstuvwxyz"  # of the form's choices
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the pictures of a question of ranks
SIZE = (512, 512)  # px, the most that a form shows


@dataclass(frozen=True)
class Picture:
    """A picture of a method, what it was meant to evoke, and whether its gate opened (`None`: it has none)."""

    method: str
    file: str
    emotion: str
    opened: bool | None
    content: str  # what pictures of several methods that can be compared have in common
    prompt: str


class RaterSheets(NamedTuple):
    """What was written: the numbers of pictures to guess, of comparisons to rank, and of pictures left out."""

    pictures: int
    comparisons: int
    left_out: int


# --------------------------------------------------------------------------------------
# The pictures, and their order
# --------------------------------------------------------------------------------------


def read_pictures(folder: Path, method: str) -> tuple[list[Picture], int]:
    """The pictures of a folder with one emotion each, by name, and how many records name none, or several."""
    records = read_metadata(folder / "metadata.jsonl")
    records |= {path.name: entry for path in folder.glob("*.png") if (entry := read_record(path)) is not None}
    found, others = [], 0
    for file, entry in sorted(records.items()):
        if not isinstance(emotion := entry.get("emotion"), str):
            others += 1
            continue
        opened = entry["gate_step"] is not None if "gate_step" in entry else None
        content = json.dumps([entry.get(name) for name in ("prompt", "emotion", "seed", "source_sha256")])
        found.append(Picture(method, file, emotion, opened, content, entry.get("prompt") or ""))
    return found, others


def choices_of(pictures: Sequence[Picture], choices: Sequence[str] | None = None) -> list[str]:
    """
    The emotions to choose from.

    Args:
        pictures (sequence of [`Picture`]): What is asked about.
        choices (sequence of `str`, *optional*): The emotions. Default: the eight of Mikels' wheel if all that are
            meant are among them, so that nobody can tell which occur, else those that are meant.

    Raises:
        ValueError: If an emotion that is meant is no choice, or there are more choices than keys.
    """
    meant = sorted({picture.emotion for picture in pictures})
    chosen = list(dict.fromkeys(choices or (MIKELS_WHEEL if set(meant) <= set(MIKELS_WHEEL) else meant)))
    if missing := [emotion for emotion in meant if emotion not in chosen]:
        raise ValueError(f"Pictures are meant to evoke {', '.join(missing)}: add that to --choices.")
    if len(chosen) > len(KEYS):
        raise ValueError(f"There are {len(chosen)} emotions to choose from; a form has keys for {len(KEYS)}.")
    return chosen


def shuffled(pictures: Sequence[Picture], seed: int, count: int | None = None) -> list[Picture]:
    """The pictures, or so many of them, in the order of a seed."""
    return random.Random(seed).sample(pictures, min(count or len(pictures), len(pictures)))


def rank_questions(pictures: Sequence[Picture], seed: int) -> list[list[Picture]]:
    """The pictures of one content, one of each method, in random order, where every method has one; shuffled."""
    methods = {picture.method for picture in pictures}
    groups: dict[str, dict[str, Picture]] = {}
    for picture in pictures:
        groups.setdefault(picture.content, {}).setdefault(picture.method, picture)
    whole = [list(group.values()) for group in groups.values() if len(group) == len(methods) > 1]
    source = random.Random(f"ranks {seed}")
    return [source.sample(group, len(group)) for group in source.sample(whole, len(whole))]


# --------------------------------------------------------------------------------------
# Sheets, form and key
# --------------------------------------------------------------------------------------


FORM = """<!doctype html>
<html lang="en"><meta charset="utf-8"><title>{title}</title>
<meta name="viewport" content="width=device-width">
<style>
body {{ font: 18px sans-serif; max-width: 60rem; margin: 1rem auto; text-align: center; background: #fbfaf7 }}
img {{ width: 320px; max-width: 90vw; margin: .5rem }}
figure {{ display: inline-block; margin: 0 }}
button {{ font: inherit; margin: .2rem; padding: .3rem .7rem }}
.chosen {{ background: #cfe3d6 }}
</style>
<h1>{title}</h1><p>{task}</p>
<p id="text"></p><div id="pictures"></div><div id="choices"></div>
<p><button id="back">← back</button> <span id="place"></span> <button id="on">on →</button></p>
<p><button id="save">Save the answers</button> <span id="count"></span></p>
<script>
const questions = {questions}, keys = "{keys}", name = "blind {mark}";
let at = 0, answers = {{}};
const find = id => document.getElementById(id);
try {{ answers = JSON.parse(localStorage.getItem(name)) || {{}} }} catch {{}}
function show() {{
  const question = questions[at], given = answers[question.name] || [];
  find("text").textContent = question.text;
  find("pictures").replaceChildren(...question.pictures.map((source, number) => {{
    const figure = document.createElement("figure"), image = document.createElement("img");
    image.src = source;
    figure.append(image);
    if (question.pictures.length > 1) figure.append(document.createElement("br"), question.choices[number]);
    return figure;
  }}));
  find("choices").replaceChildren(...question.choices.map((choice, number) => {{
    const button = document.createElement("button"), place = given.indexOf(choice);
    button.textContent = (choice.length > 1 ? keys[number] + "  " : "") + choice
      + (place >= 0 && question.take > 1 ? ": " + (place + 1) : "");
    if (place >= 0) button.className = "chosen";
    button.onclick = () => choose(choice);
    return button;
  }}));
  find("place").textContent = question.name + ", " + (at + 1) + " of " + questions.length;
  find("count").textContent = lines().length + " answered";
}}
function lines() {{
  const whole = questions.filter(question => (answers[question.name] || []).length === question.take);
  return whole.map(question => question.name + ", " + answers[question.name].join(" "));
}}
function choose(choice) {{
  const question = questions[at], given = answers[question.name] || [];
  const start = given.length < question.take && !given.includes(choice) ? given : [];
  answers[question.name] = [...start, choice];
  try {{ localStorage.setItem(name, JSON.stringify(answers)) }} catch {{}}
  if (answers[question.name].length === question.take) move(1); else show();
}}
function move(step) {{ at = Math.min(Math.max(at + step, 0), questions.length - 1); show() }}
find("back").onclick = () => move(-1);
find("on").onclick = () => move(1);
find("save").onclick = () => {{
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([lines().join("\\n") + "\\n"], {{ type: "text/plain" }}));
  link.download = "{download}";
  link.click();
}};
document.onkeydown = event => {{
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "ArrowLeft") return move(-1);
  if (event.key === "ArrowRight") return move(1);
  const {{ choices }} = questions[at], key = event.key.toLowerCase();
  const place = choices[0].length > 1 ? keys.indexOf(key) : choices.map(c => c.toLowerCase()).indexOf(key);
  if (choices[place]) choose(choices[place]);
}};
show();
</script></html>
"""


def data_uri(image: Image.Image) -> str:
    """A picture as an address that holds it: its pixels and nothing else, as a record would tell what it is."""
    buffer = io.BytesIO()
    Image.frombytes("RGB", image.size, image.tobytes()).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def form(title: str, task: str, questions: Sequence[Mapping[str, Any]], download: str) -> str:
    """
    A page that asks.

    Args:
        title, task (`str`): What stands above every question.
        questions (sequence of mappings): Each with "name", "text", "pictures" (data URIs), "choices", and how many of
            these an answer consists of ("take").
        download (`str`): The name of the file that answers are saved as.

    Returns:
        `str`: HTML that needs no other file.
    """
    data = json.dumps(questions).replace("<", "\\u003c")
    return FORM.format(
        title=html.escape(title),
        task=html.escape(task),
        questions=data,
        keys=KEYS,
        mark=hashlib.sha256(data.encode()).hexdigest()[:12],
        download=download,
    )


def open_picture(picture: Picture, folders: Mapping[str, str]) -> Image.Image:
    """The picture in RGB; of a key's, as long as it is where it was."""
    with Image.open(Path(folders[picture.method]) / picture.file) as image:
        return to_rgb(image)


def small_picture(picture: Picture, folders: Mapping[str, str]) -> Image.Image:
    """The picture as it is shown."""
    image = open_picture(picture, folders)
    image.thumbnail(SIZE)
    return image


def write_sheets(cells: Sequence[Cell], folder: Path, name: str, per_sheet: int, columns: int) -> list[Path]:
    """Writes sheets `name_01.png`, …, and returns their paths."""
    parts = [cells[start : start + per_sheet] for start in range(0, len(cells), per_sheet)]
    return [
        save(contact_sheet(part, columns), folder / f"{name}_{k:02d}.png") for k, part in enumerate(parts, start=1)
    ]


def key_path(folder: Path) -> Path:
    """Where the key of a folder of sheets lies: beside it, so that the folder can be handed out."""
    return folder.resolve().with_name(f"{folder.resolve().name}_key.json")


def make_rater_sheets(
    folders: Mapping[str, Path],
    output_dir: Path,
    pictures: int | None = None,
    seed: int = 0,
    comparisons: int | None = None,
    choices: Sequence[str] | None = None,
    per_sheet: int = 16,
) -> RaterSheets:
    """
    Writes the sheets, the forms and the key of a test that `examples/blind_test.py score` scores.

    Args:
        folders (`Mapping[str, Path]`): The pictures of each method, with their records.
        output_dir (`Path`): Where to write; the key lies beside it.
        pictures (`int`, *optional*): How many to ask about, chosen by chance. Default: all.
        seed (`int`, defaults to 0): Of the choice and the order.
        comparisons (`int`, *optional*): How many comparisons of all methods to ask for. Default: all there are.
        choices (sequence of `str`, *optional*): The emotions to choose from; see [`choices_of`].
        per_sheet (`int`, defaults to 16): Pictures on a sheet.

    Returns:
        [`RaterSheets`]: What was written.

    Raises:
        ValueError: If no picture's record names one emotion, the choices do not do, or `output_dir` is not empty.
    """
    places = {method: str(folder.resolve()) for method, folder in folders.items()}
    read = [read_pictures(Path(folder), method) for method, folder in places.items()]
    found, others = [picture for own, _ in read for picture in own], sum(count for _, count in read)
    if not found:
        raise ValueError("The folders hold no pictures whose record names one emotion.")
    chosen = choices_of(found, choices)
    asked, ranked = shuffled(found, seed, pictures), rank_questions(found, seed)[:comparisons]
    key = {
        "choices": chosen,
        "folders": places,
        "pictures": {str(number): asdict(picture) for number, picture in enumerate(asked, start=1)},
        "ranks": {f"R{number}": [asdict(one) for one in group] for number, group in enumerate(ranked, start=1)},
    }
    if output_dir.exists() and any(output_dir.iterdir()):
        raise ValueError(f"{str(output_dir)!r} is not empty. Choose another --output_dir, or delete it.")

    images = [small_picture(picture, places) for picture in asked]
    cells = [Cell(image, str(number)) for number, image in enumerate(images, start=1)]
    write_sheets(cells, output_dir, "sheet", per_sheet, columns=4)
    questions = [
        {"name": str(number), "text": "", "pictures": [data_uri(image)], "choices": chosen, "take": 1}
        for number, image in enumerate(images, start=1)
    ]
    task = "Which emotion does the picture evoke? Click on it or press its key. Go by the first impression."
    write_whole(output_dir / "form.html", form("Which emotion?", task, questions, "guesses.txt"))
    if ranked:
        write_ranks(ranked, places, output_dir, per_sheet)
    write_whole(key_path(output_dir), json.dumps(key, indent=1) + "\n")
    return RaterSheets(len(asked), len(ranked), others)


def write_ranks(
    ranked: Sequence[Sequence[Picture]], folders: Mapping[str, str], output_dir: Path, per_sheet: int
) -> None:
    """Writes the form and the sheets of ranks, a comparison a row; these tell the emotion."""
    count, questions, cells = len(folders), [], []
    for number, group in enumerate(ranked, start=1):
        images = [small_picture(picture, folders) for picture in group]
        remark = f"{group[0].emotion}: {group[0].prompt}"
        cells += [
            Cell(image, f"R{number} {letter}", "" if place else remark)
            for place, (image, letter) in enumerate(zip(images, LETTERS))
        ]
        uris = [data_uri(image) for image in images]
        question = {"name": f"R{number}", "text": remark, "pictures": uris, "choices": list(LETTERS[:count])}
        questions.append({**question, "take": count})
    write_sheets(cells, output_dir, "ranks", count * max(1, per_sheet // count), columns=count)
    task = "Which picture shows this and evokes the emotion best? Choose the best first, then the next."
    write_whole(output_dir / "ranks.html", form("Which is best?", task, questions, "ranks.txt"))
