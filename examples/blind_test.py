# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Asks people which emotion pictures evoke, without telling them which was meant; a user study in small.

1. Make the test, of the folders of one or more methods, as generate.py and edit.py write them:

   python examples/blind_test.py make outputs/full outputs/fast --output_dir outputs/blind

   The folder holds numbered sheets in random order and `form.html`, which works by opening it: keys choose an emotion,
   a button saves the guesses. With several folders it also holds `ranks.html` and its sheets, for after the guesses:
   pictures of one prompt, emotion and seed side by side, to be put in order, best first. Hand out the folder as it is.
   The key is not in it: it lies beside it, as `blind_key.json`. Whoever guesses should not look at that, nor at the
   pictures' own folders, whose files are named by the emotion.

2. Guess, in the form, or in a text file: a picture's number and an emotion a line, or the start of its name, and for
   ranks a question's and the letters in order:

   17 awe
   18 sad
   R3 B A C

3. Score the guesses, of one or more people, beside what classifiers say of the same pictures:

   python examples/blind_test.py score outputs/blind_key.json guesses.txt ranks.txt --judges emo_b emo_c

   It tells accuracy with its 95 % interval (Wilson's), whether at least the valence was right, accuracy per emotion,
   what was taken for what, and each method's mean rank. Judges are also asked about mildly degraded copies, see
   score_emotions.py. Pictures to which no emotion was added, as their gate never opened, have a row of their own, and
   no part in the emotions' rows. The figures are also written beside the key, as `blind_scores.json`.

Only pictures with a record that names one emotion are asked about. Whoever notices that a scene is there once with
each emotion can guess by elimination, and does better than the pictures deserve: `--pictures 40` leaves some out by
chance, and many scenes with few emotions each are better still. Several people's guesses of one picture all count,
though the interval takes each for a trial of its own.
"""

import argparse
import base64
import hashlib
import html
import io
import json
import random
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from muse_examples.classifiers import label_probabilities, load_classifier, picture_pixels
from muse_examples.contact_sheets import Cell, contact_sheet, save
from muse_examples.degradations import COPIES
from muse_examples.files import read_text, write_whole
from muse_examples.metrics import wilson_interval
from muse_examples.options import (
    add_device_options,
    existing_file,
    existing_folder,
    one_line_errors,
    output_folder,
    positive_int,
)
from muse_examples.runs import read_metadata, read_record
from PIL import Image

from pipeline_muse import MIKELS_WHEEL, POSITIVE_EMOTIONS, to_rgb


KEYS = "1234567890abcdefghijklmnopqrstuvwxyz"  # of the form's choices
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # of the pictures of a question of ranks
SIZE = (512, 512)  # px, the most that a form shows
DEGRADED = " degraded"  # ends the name of a judge that is asked about degraded copies

Pair = tuple[str, str]  # the emotion that was meant, and the one that was named


@dataclass(frozen=True)
class Picture:
    """A picture of a method, what it was meant to evoke, and whether its gate opened (`None`: it has none)."""

    method: str
    file: str
    emotion: str
    opened: bool | None
    content: str  # what pictures of several methods that can be compared have in common
    prompt: str


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)

    make = commands.add_parser("make", help="write the sheets, the form and the key")
    make.add_argument("folders", nargs="+", type=existing_folder, help="the pictures, a folder per method")
    make.add_argument("--output_dir", type=output_folder, default=Path("outputs/blind"), help="Default: %(default)s.")
    make.add_argument("--seed", type=int, default=0, help="of the order")
    make.add_argument("--pictures", type=positive_int, help="ask about that many, chosen by chance. Default: all.")
    make.add_argument("--choices", nargs="+", help="emotions to choose from. Default: Mikels' eight, or those meant.")
    make.add_argument("--per_sheet", type=positive_int, default=16, help="pictures. Default: %(default)s.")

    score = commands.add_parser("score", help="score guesses")
    score.add_argument("key", type=existing_file, help="the file that `make` wrote beside its folder")
    score.add_argument("guesses", nargs="+", type=existing_file, help="what was guessed, of one or more people")
    score.add_argument("--judges", nargs="+", default=[], help="classifiers, as score_emotions.py takes them")
    score.add_argument("--revision", default="main", help="revision of the judges on the Hub")
    score.add_argument("--trust_remote_code", action="store_true", help="run code that the judges bring")
    add_device_options(score)
    args = parser.parse_args(arguments)
    if args.command == "make" and len({folder.resolve() for folder in args.folders}) < len(args.folders):
        parser.error("give each folder once")
    return args


# --------------------------------------------------------------------------------------
# The pictures, and their order
# --------------------------------------------------------------------------------------


def method_names(folders: Sequence[Path]) -> list[str]:
    """The names of folders, or where some are alike their paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


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


def make(args: argparse.Namespace) -> None:
    """Writes the sheets, the forms and the key."""
    folders = dict(zip(method_names(args.folders), (str(folder.resolve()) for folder in args.folders)))
    read = [read_pictures(Path(folder), method) for method, folder in folders.items()]
    pictures, others = [picture for found, _ in read for picture in found], sum(count for _, count in read)
    if not pictures:
        raise ValueError("The folders hold no pictures whose record names one emotion.")
    choices = choices_of(pictures, args.choices)
    asked, ranked = shuffled(pictures, args.seed, args.pictures), rank_questions(pictures, args.seed)
    key = {
        "choices": choices,
        "folders": folders,
        "pictures": {str(number): asdict(picture) for number, picture in enumerate(asked, start=1)},
        "ranks": {f"R{number}": [asdict(one) for one in group] for number, group in enumerate(ranked, start=1)},
    }
    if args.output_dir.exists() and any(args.output_dir.iterdir()):
        raise ValueError(f"--output_dir: {str(args.output_dir)!r} is not empty. Choose another, or delete it.")

    images = [small_picture(picture, folders) for picture in asked]
    cells = [Cell(image, str(number)) for number, image in enumerate(images, start=1)]
    write_sheets(cells, args.output_dir, "sheet", args.per_sheet, columns=4)
    questions = [
        {"name": str(number), "text": "", "pictures": [data_uri(image)], "choices": choices, "take": 1}
        for number, image in enumerate(images, start=1)
    ]
    task = "Which emotion does the picture evoke? Click on it or press its key. Go by the first impression."
    write_whole(args.output_dir / "form.html", form("Which emotion?", task, questions, "guesses.txt"))
    if ranked:
        write_ranks(ranked, folders, args)
    write_whole(key_path(args.output_dir), json.dumps(key, indent=1) + "\n")
    print(f"{len(asked)} pictures to guess and {len(ranked)} comparisons to rank, in {str(args.output_dir)!r}.")
    if others:
        print(f"Left out {others} pictures whose record names no emotion, or several.")
    print(f"The key: {key_path(args.output_dir)}")


def write_ranks(ranked: Sequence[Sequence[Picture]], folders: Mapping[str, str], args: argparse.Namespace) -> None:
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
    write_sheets(cells, args.output_dir, "ranks", count * max(1, args.per_sheet // count), columns=count)
    task = "Which picture shows this and evokes the emotion best? Choose the best first, then the next."
    write_whole(args.output_dir / "ranks.html", form("Which is best?", task, questions, "ranks.txt"))


# --------------------------------------------------------------------------------------
# Guesses
# --------------------------------------------------------------------------------------


def whole_word(text: str, choices: Sequence[str]) -> str:
    """The choice that a text is, or that alone begins with it, whatever the case; a `ValueError` where none does."""
    text = text.strip().casefold()
    exact = [choice for choice in choices if choice.casefold() == text]
    begun = exact or [choice for choice in choices if text and choice.casefold().startswith(text)]
    if len(begun) != 1:
        raise ValueError(f"{text!r} is none of {', '.join(choices)}, nor the start of one alone")
    return begun[0]


def order_of(text: str, count: int) -> list[int]:
    """`B A C` -> `[1, 0, 2]`; a `ValueError` where letters are missing, or others there."""
    letters = re.findall(r"\w", text.upper())
    if sorted(letters) != list(LETTERS[:count]):
        raise ValueError(f"{text.strip()!r} does not name each of {', '.join(LETTERS[:count])} once")
    return [LETTERS.index(letter) for letter in letters]


def read_guesses(text: str, key: Mapping[str, Any]) -> tuple[dict[str, str], dict[str, list[int]]]:
    """
    Reads guesses and ranks, a line each: `17 awe`, `17, awe` or `R3 B A C`. Blank lines and those with `?` are
    passed over.

    Args:
        text (`str`): The lines.
        key (mapping): The key of the test.

    Returns:
        `tuple[dict[str, str], dict[str, list[int]]]`: The emotion by the picture's number, and by the question's the
        places of its pictures, best first.

    Raises:
        ValueError: That names the line, if it is none of these, or answers what was answered or not asked.
    """
    guesses: dict[str, str] = {}
    ranks: dict[str, list[int]] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or "?" in line or line.lstrip().startswith("#"):
            continue
        found = re.fullmatch(r"\s*([Rr]?)0*(\d+)\W+(.+)", line)
        name = found[1].upper() + found[2] if found else ""
        try:
            if not found or name not in {**key["pictures"], **key["ranks"]}:
                raise ValueError("there is no such picture or comparison")
            if name in {**guesses, **ranks}:
                raise ValueError(f"{name} was answered before")
            if name in key["ranks"]:
                ranks[name] = order_of(found[3], len(key["ranks"][name]))
            else:
                guesses[name] = whole_word(found[3], key["choices"])
        except ValueError as error:
            raise ValueError(f"line {number}, {line.strip()!r}: {error}") from None
    return guesses, ranks


# --------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------


def valence_right(meant: str, named: str) -> bool | None:
    """Whether both emotions are pleasant, or neither is; `None` off the wheel, where nobody knows."""
    if not {meant, named} <= set(MIKELS_WHEEL):
        return None
    return (meant in POSITIVE_EMOTIONS) == (named in POSITIVE_EMOTIONS)


def figures(pairs: Sequence[Pair]) -> dict[str, Any]:
    """
    How often the emotion that was meant was named.

    Args:
        pairs (sequence of `tuple[str, str]`): What was meant, and what was named.

    Returns:
        `dict[str, Any]`: "answers", "right" and their share, "accuracy", with its 95 % "interval", and "valence", the
        share of right valences among emotions of the wheel. Shares of nothing are `None`.
    """
    right, total = sum(meant == named for meant, named in pairs), len(pairs)
    valences = [valence for pair in pairs if (valence := valence_right(*pair)) is not None]
    return {
        "answers": total,
        "right": right,
        "accuracy": right / total if total else None,
        "interval": list(wilson_interval(right, total)),
        "valence": sum(valences) / len(valences) if valences else None,
    }


def confusion(pairs: Iterable[Pair], choices: Sequence[str]) -> list[list[int]]:
    """Counts: rows are what was meant, columns what was named, both in the order of the choices."""
    counts = Counter(pairs)
    return [[counts[meant, named] for named in choices] for meant in choices]


def mean_ranks(questions: Mapping[str, Sequence[Picture]], orders: Iterable[tuple[str, Sequence[int]]]) -> dict:
    """
    Each method's mean rank.

    Args:
        questions (mapping): The pictures of each comparison, by its name.
        orders (iterable of `tuple[str, sequence of int]`): A comparison, and the places of its pictures, best first.

    Returns:
        `dict`: By method "mean" (1 is best) and "first", the share of comparisons in which it was best; best first.
    """
    ranks: dict[str, list[int]] = {}
    for name, order in orders:
        for rank, place in enumerate(order, start=1):
            ranks.setdefault(questions[name][place].method, []).append(rank)
    found = {
        method: {"mean": sum(own) / len(own), "first": own.count(1) / len(own), "comparisons": len(own)}
        for method, own in ranks.items()
    }
    return dict(sorted(found.items(), key=lambda entry: entry[1]["mean"]))


def groups_of(pictures: Mapping[str, Picture]) -> dict[str, set[str]]:
    """The numbers of what is told apart: all, and each of several methods, by gate where some never opened."""
    groups: dict[str, set[str]] = {}
    methods = sorted({picture.method for picture in pictures.values()})
    for method in [None, *methods] if len(methods) > 1 else [None]:
        own = {name for name, picture in pictures.items() if method in (None, picture.method)}
        closed = {name for name in own if pictures[name].opened is False}
        label = method or "all"
        groups[label] = own
        if closed:
            groups |= {f"{label}, gate opened": own - closed, f"{label}, gate never opened": closed}
    return groups


@torch.no_grad()
def judged(pictures: Mapping[str, Picture], folders: Mapping[str, str], args: argparse.Namespace) -> dict[str, Any]:
    """What each of `args.judges` names in each picture, and as "… degraded" in copies of it: lists by number."""
    answers: dict[str, dict[str, list[str]]] = {}
    for judge in args.judges:
        classifier, spec = load_classifier(argparse.Namespace(**vars(args) | {"classifier": judge}))
        name = Path(judge).name
        for title, copies in ((name, None), (name + DEGRADED, COPIES)):
            answers[title] = {}
            for number, picture in pictures.items():
                pixels = picture_pixels(open_picture(picture, folders), spec, copies=copies)
                seen = label_probabilities(classifier, pixels)
                answers[title][number] = [max(one, key=one.__getitem__) for one in seen]
    return answers


def results(
    key: Mapping[str, Any],
    people: Sequence[tuple[dict[str, str], dict[str, list[int]]]],
    answers: Mapping[str, Mapping[str, Sequence[str]]],
) -> dict[str, Any]:
    """
    All figures of a test.

    Args:
        key (mapping): The key.
        people (sequence): What each person guessed and ranked, from `read_guesses`.
        answers (mapping): What each judge names, from `judged`.

    Returns:
        `dict[str, Any]`: The "groups" of pictures that are told apart and, without those whose gate never opened, the
        "emotions", each with the figures of "people" and of every judge on the pictures that people answered;
        "confusion", likewise without them; "ranks"; and the figures of each of the "people".
    """
    pictures = {number: Picture(**entry) for number, entry in key["pictures"].items()}
    guessed = [(number, guess) for guesses, _ in people for number, guess in guesses.items()]
    asked = {number for number, _ in guessed}
    named: dict[str, list[tuple[str, str]]] = {"people": guessed}
    for judge, given in answers.items():
        named[judge] = [(number, answer) for number in sorted(asked) for answer in given[number]]

    def compare(chosen: set[str]) -> dict[str, Any]:
        chosen = chosen & asked
        compared: dict[str, Any] = {"pictures": len(chosen)}
        for rater, entries in named.items():
            own = figures([(pictures[name].emotion, answer) for name, answer in entries if name in chosen])
            if len(entries) > len(asked) and rater != "people":
                del own["interval"]  # copies of one picture are no trials of their own
            compared[rater] = own
        return compared

    evoking = {number for number, picture in pictures.items() if picture.opened is not False}
    emotions = {
        emotion: compare({number for number in evoking if pictures[number].emotion == emotion})
        for emotion in key["choices"]
    }
    questions = {name: [Picture(**entry) for entry in group] for name, group in key["ranks"].items()}
    pairs = [(pictures[number].emotion, guess) for number, guess in guessed if number in evoking]
    each = [[(pictures[number].emotion, guess) for number, guess in guesses.items()] for guesses, _ in people]
    return {
        "groups": {label: compare(chosen) for label, chosen in groups_of(pictures).items()},
        "emotions": emotions,
        "choices": key["choices"],
        "confusion": confusion(pairs, key["choices"]),
        "ranks": mean_ranks(questions, chain.from_iterable(ranks.items() for _, ranks in people)),
        "people": [figures(own) for own in each if own],
    }


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows as text in columns, the first of which is aligned to the left."""
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(cell.rjust(width) if place else cell.ljust(width) for place, (cell, width) in enumerate(pairs))
        for pairs in (list(zip(row, widths)) for row in rows)
    )


def percent(value: float | None) -> str:
    """A share in per cent, `–` for none."""
    return "–" if value is None else f"{100 * value:.1f}"


def figures_table(groups: Mapping[str, Mapping[str, Any]], first: str) -> str:
    """People's accuracy, interval and valence, and judges' accuracy, in per cent, of rows that were answered."""
    raters = next(iter(groups.values())).keys() - {"pictures", "people"}
    judges = sorted(name for name in raters if not name.endswith(DEGRADED))
    rows = [[first, "pictures", "right", "95 %", "valence", *(f"{judge} (degraded)" for judge in judges)]]
    for label, entry in groups.items():
        own = entry["people"]
        if own["answers"]:
            interval = "–".join(f"{100 * end:.0f}" for end in own["interval"])
            both = [(entry[judge]["accuracy"], entry[judge + DEGRADED]["accuracy"]) for judge in judges]
            shares = [f"{percent(whole)} ({percent(copies)})" for whole, copies in both]
            accuracy, valence = percent(own["accuracy"]), percent(own["valence"])
            rows.append([label, str(entry["pictures"]), accuracy, interval, valence, *shares])
    return table(rows)


def report(found: Mapping[str, Any]) -> str:
    """The figures as text."""
    parts = []
    if found["people"]:
        parts += [figures_table(found["groups"], "by eye, in %"), figures_table(found["emotions"], "emotion")]
        header = ["meant, named", *(choice[:6] for choice in found["choices"])]
        lines = zip(found["choices"], found["confusion"])
        parts.append(table([header, *([meant, *map(str, counts)] for meant, counts in lines if any(counts))]))
    if len(found["people"]) > 1:
        each = [f"{percent(own['accuracy'])} of {own['answers']}" for own in found["people"]]
        parts.append(f"Each person, in %: {', '.join(each)}")
    if found["ranks"]:
        rows = [[name, f"{own['mean']:.2f}", percent(own["first"])] for name, own in found["ranks"].items()]
        parts.append(table([["method", "mean rank", "best, in %"], *rows]))
    return "\n\n".join(parts)


def score(args: argparse.Namespace) -> None:
    """Prints and writes the figures of guesses."""
    key = json.loads(read_text(args.key))
    if not isinstance(key, dict) or not {"choices", "folders", "pictures", "ranks"} <= key.keys():
        raise ValueError(f"{str(args.key)!r} is no key of blind_test.py make.")
    people = []
    for path in args.guesses:
        try:
            people.append(read_guesses(read_text(path), key))
        except ValueError as error:
            raise ValueError(f"{str(path)!r}, {error}") from error
    if not any(chain.from_iterable(people)):
        raise ValueError("The files hold no guesses.")
    asked = {number for guesses, _ in people for number in guesses}
    pictures = {number: Picture(**entry) for number, entry in key["pictures"].items() if number in asked}
    found = results(key, people, judged(pictures, key["folders"], args))
    path = args.key.with_name(args.key.name.removesuffix(".json").removesuffix("_key") + "_scores.json")
    write_whole(path, json.dumps(found, indent=1) + "\n")
    print(report(found))
    print(path)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Makes or scores the test of the command line, or of `arguments`."""
    args = parse_args(arguments)
    {"make": make, "score": score}[args.command](args)


if __name__ == "__main__":
    main()
