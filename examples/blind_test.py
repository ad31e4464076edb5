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
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from muse_examples.blind import LETTERS, Picture, key_path, make_rater_sheets, open_picture
from muse_examples.classifiers import label_probabilities, load_classifier, picture_pixels
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

from pipeline_muse import MIKELS_WHEEL, POSITIVE_EMOTIONS


DEGRADED = " degraded"  # ends the name of a judge that is asked about degraded copies

Pair = tuple[str, str]  # the emotion that was meant, and the one that was named


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


def method_names(folders: Sequence[Path]) -> list[str]:
    """The names of folders, or where some are alike their paths."""
    names = [folder.resolve().name for folder in folders]
    return names if len(set(names)) == len(names) else [str(folder) for folder in folders]


def make(args: argparse.Namespace) -> None:
    """Writes the sheets, the forms and the key."""
    folders = dict(zip(method_names(args.folders), args.folders))
    options = {"pictures": args.pictures, "seed": args.seed, "choices": args.choices, "per_sheet": args.per_sheet}
    made = make_rater_sheets(folders, args.output_dir, **options)
    print(
        f"{made.pictures} pictures to guess and {made.comparisons} comparisons to rank, in {str(args.output_dir)!r}."
    )
    if made.left_out:
        print(f"Left out {made.left_out} pictures whose record names no emotion, or several.")
    print(f"The key: {key_path(args.output_dir)}")


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
