# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Scores the pictures of a folder: what does each evoke, by a classifier? For judging the output of any generator.

python examples/score_emotions.py outputs/generate
python examples/score_emotions.py path/to/pictures --recursive --classifier path/or/id --output_dir outputs/scores

Writes `scores.jsonl`, one line per picture as it is done, and at the end `scores.csv`, `summary.json` and a sheet of
each emotion's most confident pictures. A run that was killed goes on where it ended; pictures that changed are scored
again. Where a picture's `metadata.jsonl`, name or folder tells the emotion that was intended, the summary holds
accuracy and recall.

Pictures are prepared as the classifier's image processor does. SimEmo, which guides, has them squeezed to a square, so
that all of a picture counts; with --center_crop they are cut to the middle, as many classifiers were trained.

With --degraded eight mildly blurred, shifted, recoloured and noisy copies of each picture are classified as well, the
same in every run: accuracy and recall on these tell an emotion that is there from one that only this classifier sees.
"""

import argparse
import csv
import io
import json
import math
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import tqdm
from muse_examples import REPOSITORY
from muse_examples.classifiers import (
    fingerprint,
    label_names,
    label_probabilities,
    load_classifier,
    picture_pixels,
)
from muse_examples.contact_sheets import BAD, EMOTION_COLORS, FAINT, GOOD, INK, PAPER, Cell, contact_sheet, save
from muse_examples.degradations import COPIES
from muse_examples.files import write_whole
from muse_examples.intentions import PICTURES, intended_emotion, read_intentions
from muse_examples.metrics import ecc_emc
from muse_examples.options import (
    add_device_options,
    existing_folder,
    one_line_errors,
    output_folder,
    positive_int,
)
from PIL import Image
from transformers import PreTrainedModel

from pipeline_muse import MIKELS_WHEEL, PixelSpec, to_rgb


UNKNOWN_SUFFIXES = frozenset((".heic", ".heif", ".jxl", ".raw", ".cr2", ".nef", ".arw", ".dng"))  # of other programs
METADATA = "metadata.jsonl"  # what generate.py and edit.py write beside their pictures, as they do SHEET
SHEET = "sheet.png"
THUMBNAIL = (320, 320)  # px; the most that a sheet shows
LONGEST_REMARK = 26  # letters below a picture

Row = dict[str, Any]  # a line of scores.jsonl


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=existing_folder, help="the pictures")
    parser.add_argument("--recursive", action="store_true", help="also those of its folders")
    parser.add_argument(
        "--classifier",
        default=str(REPOSITORY / "emotion_classifier"),
        help="any image classifier of transformers, a Hub id or a path, or a judge of Storybook's: emo_b, emo_c. "
        "Default: the bundled one, which knows Storybook's pictures only.",
    )
    parser.add_argument("--revision", default="main", help="revision of the classifier on the Hub")
    parser.add_argument("--trust_remote_code", action="store_true", help="run code that the classifier brings")
    parser.add_argument("--center_crop", action="store_true", help="cut pictures to the middle instead of squeezing")
    parser.add_argument("--degraded", action="store_true", help=f"also score {COPIES} degraded copies of each picture")
    parser.add_argument("--batch_size", type=positive_int, default=16, help="pictures at a time")
    parser.add_argument("--columns", type=positive_int, default=8, help="pictures of each emotion on the sheet")
    parser.add_argument(
        "--output_dir", type=output_folder, default=Path("outputs/scores"), help="Default: %(default)s."
    )
    add_device_options(parser)
    args = parser.parse_args(arguments)
    if not find_pictures(args):
        parser.error(f"{str(args.folder)!r} holds no pictures{'' if args.recursive else '; look deeper: --recursive'}")
    return args


# --------------------------------------------------------------------------------------
# Pictures and their classifier
# --------------------------------------------------------------------------------------


def find_pictures(args: argparse.Namespace, suffixes: Collection[str] = PICTURES) -> list[Path]:
    """The folder's pictures by name; without our own sheets and whatever lies in the output's folder."""
    found = args.folder.rglob("*") if args.recursive else args.folder.iterdir()
    output = args.output_dir.resolve()
    return sorted(
        path
        for path in found
        if path.suffix.lower() in suffixes
        and path.name[0] != "."
        and path.is_file()
        and output not in path.resolve().parents
        and not (path.name == SHEET and (path.parent / METADATA).exists())
    )


# --------------------------------------------------------------------------------------
# Scores
# --------------------------------------------------------------------------------------


def claim_output(args: argparse.Namespace, classifier: PreTrainedModel, spec: PixelSpec) -> None:
    """Notes in the output's folder what its scores are of; ends the program where they are of something else."""
    settings = {
        "folder": str(args.folder.resolve()),
        "weights": fingerprint(classifier),
        "labels": label_names(classifier),
        "pixels": asdict(spec),
        "center_crop": args.center_crop,
        "degraded": args.degraded,
        "dtype": args.dtype,
    }
    path = args.output_dir / "settings.json"
    if path.exists():
        known = json.loads(path.read_text(encoding="utf-8"))
        if others := [name for name, value in json.loads(json.dumps(settings)).items() if known.get(name) != value]:
            raise ValueError(
                f"--output_dir: {str(args.output_dir)!r} holds the scores of {known.get('classifier')!r} for"
                f" {known.get('folder')!r}, with other {', '.join(others)}. Choose another, or delete it."
            )
    write_whole(path, json.dumps({"classifier": args.classifier, **settings}, indent=2) + "\n")


def read_rows(path: Path) -> dict[str, Row]:
    """The rows of `scores.jsonl` by file, the last where there are several; a line that a kill has torn is cut off."""
    if not path.exists():
        return {}
    text = path.read_bytes()
    whole = text.rfind(b"\n") + 1
    if whole < len(text):
        os.truncate(path, whole)
    rows = {}
    for number, line in enumerate(text[:whole].splitlines(), start=1):
        try:
            row = json.loads(line)
            rows[row["file"]] = row
        except (ValueError, KeyError, TypeError):
            message = f"Line {number} of {str(path)!r} is no score; delete it, or choose another --output_dir."
            raise ValueError(message) from None
    return rows


def start_row(path: Path, folder: Path) -> Row:
    """What tells a picture from another, or from what it was."""
    state = path.stat()
    return {"file": path.relative_to(folder).as_posix(), "size": state.st_size, "modified": state.st_mtime_ns}


def score_batch(rows: Sequence[Row], classifier: PreTrainedModel, spec: PixelSpec, args: argparse.Namespace) -> None:
    """
    Adds to each row what its picture evokes, and its degraded copies if they are asked for, or the error that kept it
    from being seen.
    """
    pixels, seen = [], []
    for row in rows:
        try:
            with Image.open(args.folder / row["file"]) as image:
                looks = [picture_pixels(image, spec, args.center_crop)]
                if args.degraded:
                    looks.append(picture_pixels(image, spec, args.center_crop, COPIES))
            pixels.append(torch.cat(looks))
            seen.append(row)
        except Exception as error:  # decoders raise nearly anything for a broken file
            row["error"] = f"{type(error).__name__}: {error}"
    answers = label_probabilities(classifier, torch.cat(pixels)) if pixels else []
    each = 1 + COPIES * args.degraded
    for start, row in zip(range(0, len(answers), each), seen):
        own = answers[start : start + each]
        if not all(math.isfinite(value) for answer in own for value in answer.values()):
            row["error"] = f"the classifier's answer is not finite in {args.dtype}"
            continue
        emotion, *copies = (max(answer, key=answer.__getitem__) for answer in own)
        row |= {"emotion": emotion, "probability": own[0][emotion], "probabilities": own[0]}
        if args.degraded:
            row["degraded"] = copies


def score_folder(args: argparse.Namespace, classifier: PreTrainedModel, spec: PixelSpec) -> list[Row]:
    """
    Scores the pictures that have no score yet, each batch written as it is done.

    Args:
        args (`argparse.Namespace`): The options.
        classifier, spec: From `load_classifier`.

    Returns:
        `list[Row]`: One row per picture of the folder, by name. Those that could not be read have an "error".
    """
    path = args.output_dir / "scores.jsonl"
    known, rows = read_rows(path), [start_row(picture, args.folder) for picture in find_pictures(args)]
    done = {
        row["file"]
        for row in rows
        if (old := known.get(row["file"])) and "error" not in old and row.items() <= old.items()
    }
    waiting = [row for row in rows if row["file"] not in done]
    with (
        open(path, "a", encoding="utf-8") as record,
        tqdm(total=len(rows), initial=len(done), desc="pictures", dynamic_ncols=True) as progress,
    ):
        for start in range(0, len(waiting), args.batch_size):
            batch = waiting[start : start + args.batch_size]
            score_batch(batch, classifier, spec, args)
            for row in batch:
                record.write(json.dumps(row) + "\n")
                record.flush()
            progress.update(len(batch))
    return [known[row["file"]] if row["file"] in done else row for row in rows]


def add_intentions(rows: Sequence[Row], labels: Sequence[str], folder: Path) -> None:
    """Adds to each row the emotion that was intended, `None` where that is not known."""
    parents = {(folder / row["file"]).parent for row in rows}
    intentions = {parent: read_intentions(parent / METADATA) for parent in parents}
    for row in rows:
        path = folder / row["file"]
        row["intended"] = intended_emotion(path, labels, intentions[path.parent])


# --------------------------------------------------------------------------------------
# Reports
# --------------------------------------------------------------------------------------


def write_tables(rows: Sequence[Row], labels: Sequence[str], folder: Path) -> None:
    """
    Writes `scores.csv`, and `scores.jsonl` anew: in the order of names, without what is outdated. "kept" is the share
    of the degraded copies that evoke what their picture does.
    """
    kept = ["kept"] if any("degraded" in row for row in rows) else []
    lines: list[list[Any]] = [["file", "emotion", "probability", "intended", *labels, *kept, "error"]]
    for row in rows:
        probabilities = row.get("probabilities", {})
        lines.append(
            [*(row.get(name) for name in lines[0][:4]), *(probabilities.get(label) for label in labels)]
            + [share_of_copies(row, row.get("emotion")) for _ in kept]
            + [row.get("error")]
        )
    table = io.StringIO(newline="")
    csv.writer(table, lineterminator="\n").writerows(lines)
    write_whole(folder / "scores.csv", table.getvalue())
    write_whole(folder / "scores.jsonl", "".join(json.dumps(row) + "\n" for row in rows))


def share_of_copies(row: Row, emotion: str | None) -> float | None:
    """Of a picture's degraded copies, the share that evoke an emotion; `None` where there are no copies."""
    return mean([copy == emotion for copy in row.get("degraded", [])])


def mean(values: Sequence[float]) -> float | None:
    """The mean, `None` of nothing."""
    return sum(values) / len(values) if values else None


def mean_share_of_copies(rows: Sequence[Row]) -> float | None:
    """Of the degraded copies of pictures, the share that evoke what was intended; `None` where there are none."""
    shares = [share_of_copies(row, row["intended"]) for row in rows]
    return mean([share for share in shares if share is not None])


def summarize(rows: Sequence[Row], labels: Sequence[str]) -> dict[str, Any]:
    """
    Counts what was found.

    Args:
        rows (sequence of `Row`): The rows, with what was intended.
        labels (sequence of `str`): The labels of the classifier.

    Returns:
        `dict[str, Any]`: How many pictures were scored ("pictures") and were not ("unreadable"); the "mean_confidence"
        of the answers; of how many pictures the intention is known ("intended"), and the share of these that evoke it
        ("accuracy"); and "emotions", label by label: "pictures" and "mean_confidence" of those that evoke it,
        "intended" and "recall" of those that should. Shares of nothing are `None`. On Mikels' wheel also "ecc" and
        "emc": how near to what was intended the answers, and the mistakes alone, are ([`ecc_emc`]). Where there are
        degraded copies also their "accuracy_degraded", and label by label "recall_degraded".
    """
    scored = [row for row in rows if "error" not in row]
    pairs = [(row["intended"], row["emotion"]) for row in scored if row["intended"] is not None]
    hits = [intended == emotion for intended, emotion in pairs]
    on_wheel = bool(pairs) and all(label in MIKELS_WHEEL for pair in pairs for label in pair)
    ecc, emc = ecc_emc(pairs) if on_wheel else (None, None)
    emotions = {}
    for label in labels:
        evoking = [row["probability"] for row in scored if row["emotion"] == label]
        meant = [row["emotion"] == label for row in scored if row["intended"] == label]
        emotions[label] = {
            "pictures": len(evoking),
            "mean_confidence": mean(evoking),
            "intended": len(meant),
            "recall": mean(meant),
        }
    summary = {
        "pictures": len(scored),
        "unreadable": len(rows) - len(scored),
        "mean_confidence": mean([row["probability"] for row in scored]),
        "intended": len(hits),
        "accuracy": mean(hits),
        "ecc": ecc,
        "emc": None if all(hits) else emc,
        "emotions": emotions,
    }
    if any("degraded" in row for row in scored):
        known = [row for row in scored if row["intended"] is not None]
        summary["accuracy_degraded"] = mean_share_of_copies(known)
        for label, values in emotions.items():
            values["recall_degraded"] = mean_share_of_copies([row for row in known if row["intended"] == label])
    return summary


def summary_text(summary: Mapping[str, Any]) -> str:
    """The summary as a table for the eye."""

    def line(name: str, values: Mapping[str, Any], share: str) -> str:
        keys = ("mean_confidence", share, *([f"{share}_degraded"] if copied else []))
        first, *others = ("–" if values[key] is None else f"{values[key]:.1%}" for key in keys)
        counted = f"{name:<{width}}{values['pictures']:>10}{first:>12}{values['intended']:>10}"
        return counted + "".join(f"{text:>{room}}" for text, room in zip(others, (9, 10)))

    copied = "accuracy_degraded" in summary
    width = max(map(len, (*summary["emotions"], "emotion"))) + 2
    return "\n".join(
        [
            f"{'emotion':<{width}}{'pictures':>10}{'confidence':>12}{'intended':>10}{'recall':>9}"
            + f"{'degraded':>10}" * copied,
            *(line(label, values, "recall") for label, values in summary["emotions"].items()),
            line("all", summary, "accuracy"),
            *([f"{summary['unreadable']} more could not be scored"] if summary["unreadable"] else []),
        ]
    )


def cell_of(row: Row, folder: Path) -> Cell:
    """A picture of the sheet, below it its name and, where another emotion was intended, that."""
    with Image.open(folder / row["file"]) as image:
        picture = to_rgb(image)
    picture.thumbnail(THUMBNAIL)
    name, intended = Path(row["file"]).name.encode("ascii", "replace").decode(), row["intended"]
    remark = name if intended in (None, row["emotion"]) else f"{intended}: {name}"
    if len(remark) > LONGEST_REMARK:
        remark = remark[: LONGEST_REMARK - 1] + "…"
    color = FAINT if intended is None else GOOD if intended == row["emotion"] else BAD
    title = f"{row['emotion']} {row['probability']:.2f}"
    return Cell(picture, title, remark, color, EMOTION_COLORS.get(row["emotion"], INK))


def sheet_of(rows: Sequence[Row], labels: Sequence[str], folder: Path, columns: int) -> Image.Image:
    """One row of pictures per emotion that was found, the most confident first."""
    scored = sorted((row for row in rows if "error" not in row), key=lambda row: (-row["probability"], row["file"]))
    best = [[row for row in scored if row["emotion"] == label][:columns] for label in labels]
    columns = max(map(len, best))
    blank = Cell(Image.new("RGB", (1, 1), PAPER), "")
    cells = [[cell_of(row, folder) for row in line] + [blank] * (columns - len(line)) for line in best if line]
    return contact_sheet([cell for line in cells for cell in line], columns)


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Scores the folder of the command line, or of `arguments`."""
    args = parse_args(arguments)
    try:
        classifier, spec = load_classifier(args)
    except (OSError, ValueError) as error:
        raise ValueError(f"--classifier: {error}") from error
    claim_output(args, classifier, spec)
    labels, rows = label_names(classifier), score_folder(args, classifier, spec)
    add_intentions(rows, labels, args.folder)
    write_tables(rows, labels, args.output_dir)
    summary = summarize(rows, labels)
    write_whole(args.output_dir / "summary.json", json.dumps(summary, indent=2) + "\n")
    for row in rows:
        if "error" in row:
            print(f"Skipped {ascii(row['file'])}: {row['error']}", file=sys.stderr)
    if others := find_pictures(args, UNKNOWN_SUFFIXES):
        kinds = ", ".join(sorted({path.suffix.lower() for path in others}))
        print(f"Left out {len(others)} files that Pillow does not read: {kinds}. Convert them first.", file=sys.stderr)
    if not summary["pictures"]:
        raise ValueError("None of the pictures could be scored.")
    print(summary_text(summary))
    print(save(sheet_of(rows, labels, args.folder, args.columns), args.output_dir / SHEET))


if __name__ == "__main__":
    main()
