# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Judges asked about all rows, and what they say as tables and figures.

`docs/columns.md` says how each column is computed, and what the paper did.
"""

import argparse
import json
import statistics
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from accelerate import PartialState
from PIL import Image

from muse_examples.blind import key_path, make_rater_sheets
from muse_examples.classifiers import public_name
from muse_examples.contact_sheets import save
from muse_examples.evaluation.data import Case, Shown, shown_elsewhere, shown_of
from muse_examples.evaluation.figures import (
    example_sheet,
    feature_map_figure,
    inner_loop_figure,
    scatter_figure,
    threshold_figure,
)
from muse_examples.evaluation.judges import (
    Answers,
    ClipJudge,
    EmotionJudge,
    InceptionJudge,
    Judge,
    Pictures,
    ask,
    lpips_distance,
    recall,
    reference_statistics,
)
from muse_examples.evaluation.making import row_folder, slug
from muse_examples.evaluation.measures import (
    Statistics,
    confusion,
    cosine,
    emo_s,
    estimates_by,
    frechet_distance,
    intra_class_variance,
    mean_estimate,
    perceptual_distance,
    perceptual_diversity,
    right,
    right_content,
    right_of_copies,
    right_valence,
    semantic_diversity,
    squared_error,
    unit,
)
from muse_examples.evaluation.methods import TASK_OF_TABLE, Method
from muse_examples.evaluation.tables import (
    Column,
    Number,
    confusion_csv,
    emotion_columns,
    markdown,
    percent_column,
    write_table,
)
from muse_examples.files import read_text, write_whole
from muse_examples.intentions import PICTURES
from muse_examples.pipelines import settings_of
from muse_examples.plots import confusion_figure, save_figure
from pipeline_muse import MIKELS_WHEEL


SOURCES = "sources"  # the row of the pictures that were edited
LPIPS_PAIRS = 500  # of each emotion; all of 700 pictures are 244,650
EXAMPLES = 6  # prompts on the sheet of examples
FEATURE_MAPS = 6  # rows, for which there is room

Figures = dict[Column, Number]  # of a row
Look = Callable[[np.ndarray, np.ndarray], float]  # how different two pictures look


@dataclass
class Row:
    """A row of a table: its pictures, in the order of the plan, and what judges say of them and of their sources."""

    name: str
    shown: list[Shown]
    answers: dict[str, Answers] = field(default_factory=dict)
    sources: dict[str, Answers] = field(default_factory=dict)

    @property
    def paths(self) -> list[Path]:
        return [one.path for one in self.shown]

    @property
    def prompts(self) -> list[str | None]:
        return [one.prompt for one in self.shown]

    @property
    def emotions(self) -> list[str]:
        return [one.emotion for one in self.shown]

    @property
    def contents(self) -> list[str | int]:
        return [one.content for one in self.shown]

    @property
    def source_paths(self) -> list[Path]:
        """What was edited, one per picture; empty where that is not known of all."""
        known = [one.source for one in self.shown if one.source is not None]
        return known if len(known) == len(self.shown) else []

    def told(self, name: str) -> list[Any]:
        """What the records of its pictures say, of those that say it."""
        return [one.record[name] for one in self.shown if name in one.record]


# --------------------------------------------------------------------------------------
# Rows and judges
# --------------------------------------------------------------------------------------


def rows_of(
    args: argparse.Namespace, table: str, methods: Sequence[Method], cases: Mapping[str, list[Case]]
) -> dict[str, Row]:
    """The rows of a table that have pictures; those of other programs stand in the tables of whole methods."""
    task, found = TASK_OF_TABLE[table], {}
    for name, folder in args.folder if table == task else []:
        shown = shown_elsewhere(folder, cases[task], args.emotion)
        if task == "generation" or all(one.source for one in shown):
            found[name] = Row(name, shown)
    for method in methods:
        shown = shown_of(cases[task], row_folder(args.output_dir, method.name))
        if shown:
            found[method.name] = Row(method.name, shown)
    return found


def emotion_judges(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Names and sources of the classifiers: those asked for, else the guide and those that the base brings."""
    if args.judges:
        return args.judges
    own = Path(args.base) / "emotion_classifier"
    guide = args.classifier or (str(own) if own.is_dir() else None)
    found = [("guide", guide)] if guide else []
    return found + [(name, name) for name in settings_of(args.base).get("judges", {})]


def text_judges(args: argparse.Namespace) -> list[tuple[str, str]]:
    """Names and sources of the CLIPs: those that are asked for, else that of the base or of the gate."""
    if args.scores:
        return args.scores
    own = list(settings_of(args.base).get("clips", {}))
    return [("CLIP", own[0] if own else args.clip)]


def feature_clip(args: argparse.Namespace) -> str:
    """The CLIP by whose features all else is computed."""
    return text_judges(args)[0][0]


def judges_of(args: argparse.Namespace) -> list[Judge]:
    """
    Everyone who is asked.

    Raises:
        ValueError: If there is no classifier.
    """
    how = {"device": args.device, "dtype": args.dtype, "trust_remote_code": args.trust_remote_code}
    if not emotion_judges(args):
        raise ValueError("--classifier: name the emotion classifiers that judge, such as emo_b=path/or/id")
    found: list[Judge] = [EmotionJudge(name, source, **how) for name, source in emotion_judges(args)]
    found += [ClipJudge(name, source, **how) for name, source in text_judges(args)]
    return found + ([InceptionJudge(device=args.device)] if args.inception else [])


def honest_judge(args: argparse.Namespace) -> str:
    """The classifier by which figures are drawn: the first that does not guide, or the one that there is."""
    own = {args.classifier, str(Path(args.base) / "emotion_classifier")}
    names = [name for name, source in emotion_judges(args) if source not in own]
    return names[0] if names else emotion_judges(args)[0][0]


def all_rows(
    args: argparse.Namespace,
    tables: Mapping[str, Sequence[Method]],
    cases: Mapping[str, list[Case]],
) -> dict[str, dict[str, Row]]:
    """The rows of each table."""
    return {table: rows_of(args, table, methods, cases) for table, methods in tables.items()}


def judge_rows(
    args: argparse.Namespace,
    tables: Mapping[str, Sequence[Method]],
    cases: Mapping[str, list[Case]],
    state: PartialState,
) -> None:
    """Asks all judges about all pictures of which they have not been asked, this process about its share of rows."""
    rows = {name: row for found in all_rows(args, tables, cases).values() for name, row in found.items()}
    asked = {name: (row.paths, row.prompts) for name, row in rows.items()}
    sources = list(dict.fromkeys(path for row in rows.values() for path in row.source_paths))
    if sources:
        asked[SOURCES] = (sources, [None] * len(sources))
    bar = {"position": state.local_process_index, "leave": False}
    turn = count()
    for judge in judges_of(args):
        with judge:
            for name, (paths, prompts) in asked.items():
                if next(turn) % state.num_processes == state.process_index:
                    ask(judge, name, paths, prompts, args.output_dir, **bar)
            for file, paths in references_of(args, judge):
                if next(turn) % state.num_processes == state.process_index:
                    reference_statistics(judge, feature_of(judge), paths, file, isinstance(judge, ClipJudge), **bar)


def feature_of(judge: Judge) -> str:
    """What a judge calls its features of pictures."""
    return "features" if isinstance(judge, InceptionJudge) else "image"


def reference_file(output_dir: Path, judge: str, name: str) -> Path:
    """Where the statistics of a folder of reference pictures lie."""
    return output_dir / "judged" / judge / f"reference_{slug(name)}.npz"


def references_of(args: argparse.Namespace, judge: Judge) -> Iterator[tuple[Path, list[Path]]]:
    """The files of statistics to write of a judge's features, and their pictures."""
    if isinstance(judge, InceptionJudge) or judge.name == feature_clip(args):
        for name, folder in args.fid:
            if folder.is_dir():
                paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in PICTURES)
                yield reference_file(args.output_dir, judge.name, name), paths


def recall_answers(args: argparse.Namespace, rows: Collection[Row]) -> None:
    """Adds to rows what judges have said."""
    judges = [name for name, _ in emotion_judges(args) + text_judges(args)] + ["inception"] * args.inception
    sources = list(dict.fromkeys(path for row in rows for path in row.source_paths))
    for judge in judges:
        if sources:
            of_sources = recall(judge, SOURCES, sources, [None] * len(sources), args.output_dir)
        for row in rows:
            row.answers[judge] = recall(judge, row.name, row.paths, row.prompts, args.output_dir)
            if row.source_paths:
                places = [sources.index(path) for path in row.source_paths]
                values = {name: array[places] for name, array in of_sources.values.items()}
                row.sources[judge] = Answers(of_sources.identity, values)


# --------------------------------------------------------------------------------------
# The figures of a row
# --------------------------------------------------------------------------------------


class Reference(NamedTuple):
    """Pictures that rows are compared with: the column of the distance, whose features, and their statistics."""

    column: Column
    judge: str
    statistics: Statistics
    by_clip: bool


def main_figures(args: argparse.Namespace, references: Sequence[Reference], row: Row, estimate: Any) -> Figures:
    """What the first table of a report shows: emotion, content, likeness to real pictures, and time."""
    found: Figures = {}
    for name, _ in emotion_judges(args):
        answers = row.answers[name]
        # An emotion that a judge has no word for cannot be named by it
        known = [place for place, emotion in enumerate(row.emotions) if emotion in answers.labels]
        contents = [row.contents[place] for place in known]
        found[percent_column(name)] = estimate(right(answers.emotions, row.emotions)[known], contents)
        copies = right_of_copies(answers.emotions_of_copies, row.emotions)[known]
        found[percent_column(f"{name} degraded")] = estimate(copies, contents)
    for name, _ in text_judges(args):
        known = [place for place, prompt in enumerate(row.prompts) if prompt]
        similarity = row.answers[name]["similarity"][known]
        found[Column(name, better="higher")] = estimate(similarity, [row.contents[place] for place in known])
    found |= distances(references, row)
    if row.source_paths:
        name = feature_clip(args)
        likeness = cosine(row.answers[name]["image"], row.sources[name]["image"])
        found[Column("image similarity", digits=2, better="higher")] = estimate(likeness, row.contents)
    if seconds := row.told("seconds"):
        found[Column("seconds", digits=2, better="lower")] = statistics.median(seconds)
    if memory := row.told("peak_memory"):
        found[Column("peak memory", unit="GiB", factor=2**-30, better="lower")] = max(memory)
    return found


def references_to(args: argparse.Namespace) -> list[Reference]:
    """What rows are compared with, by a CLIP's features (on the unit sphere, times 100) and by Inception's."""
    clip, found = feature_clip(args), list[Reference]()
    for name, place in args.fid:
        for judge in [clip] + ["inception"] * args.inception:
            file = reference_file(args.output_dir, judge, name) if place.is_dir() else place
            column = Column(f"FID {name}" + (f", {clip}" if judge == clip else ""), digits=2, better="lower")
            found.append(Reference(column, judge, Statistics.load(file), by_clip=judge == clip))
    return found


def distances(references: Sequence[Reference], row: Row) -> Figures:
    """The Frechet distances of a row's pictures to references."""
    found: Figures = {}
    for one in references if len(row.shown) > 1 else ():
        features = unit(row.answers[one.judge]["image"]) if one.by_clip else row.answers[one.judge]["features"]
        if one.statistics.mean.shape[0] != features.shape[1]:  # statistics that were saved of other features
            continue
        with warnings.catch_warnings(action="ignore"):  # the heading says it once
            distance = frechet_distance(Statistics.of(features), one.statistics)
        found[one.column] = distance * (100 if one.by_clip else 1)
    return found


def more_figures(args: argparse.Namespace, look: Look | None, row: Row, estimate: Any) -> Figures:
    """What the second table of a report shows."""
    found: Figures = {}
    variant, clip = args.metric_variant, row.answers[feature_clip(args)]
    for name, _ in emotion_judges(args):
        answers = row.answers[name]
        if MIKELS_WHEEL.keys() >= {*answers.labels, *row.emotions}:
            valence = right_valence(answers["probabilities"], answers.labels, row.emotions, variant)
            found[percent_column(f"{name} valence")] = estimate(valence, row.contents)
        if row.source_paths and set(row.emotions) <= set(answers.labels):
            before = row.sources[name]["probabilities"]
            gain = emo_s(before, answers["probabilities"], answers.labels, row.emotions)
            found[Column(f"Emo-S, {name}", digits=2, better="higher")] = estimate(gain, row.contents)
    if all(row.prompts):
        content = right_content(clip["image"], clip["text"], [prompt or "" for prompt in row.prompts])
        if any(one.element for one in row.shown):
            found[percent_column("content")] = estimate(content, row.contents)
            for name, _ in emotion_judges(args):
                both = content * right(row.answers[name].emotions, row.emotions)
                found[percent_column(f"joint, {name}")] = estimate(both, row.contents)
    diversity = semantic_diversity(clip["image"], row.emotions, variant=variant, seed=args.seed)
    found[Column("diversity", digits=3, better="higher")] = diversity.value
    found[Column("intra-class variance", digits=3)] = intra_class_variance(clip["image"], row.emotions).value
    found |= pixel_figures(args, look, row, estimate) | trace_figures(row)
    found[Column("pictures", digits=0)] = len(row.shown)
    return found


def pixel_figures(args: argparse.Namespace, look: Look | None, row: Row, estimate: Any) -> Figures:
    """How far edits are from their sources, and by LPIPS (`look`) the diversity of what is no edit."""
    found: Figures = {}
    if row.source_paths:
        with Image.open(row.paths[0]) as image:
            size = image.size
        edited, sources = Pictures(row.paths, size), Pictures(row.source_paths, size)
        errors = [squared_error(edit, source, args.metric_variant) for edit, source in zip(edited, sources)]
        found[Column("MSE", digits=0, better="lower")] = estimate(errors, row.contents)
        if look:
            looks = [perceptual_distance(*pair, look, args.metric_variant) for pair in zip(edited, sources)]
            found[Column("LPIPS", digits=3, better="lower")] = estimate(looks, row.contents)
    elif look:
        pairs = LPIPS_PAIRS if args.metric_variant == "corrected" else None
        diversity = perceptual_diversity(
            Pictures(row.paths), row.emotions, look, args.metric_variant, pairs, args.seed
        )
        found[Column("LPIPS diversity", digits=3, better="higher")] = diversity.value
    return found


def trace_figures(row: Row) -> Figures:
    """What MUSE did: how often the gate opened, at which step, and the inner steps that were spent."""
    gates = row.told("gate_step")
    if not gates:
        return {}
    opened = [step for step in gates if step is not None]
    return {
        percent_column("gate open", better=None): len(opened) / len(gates),
        Column("at step", digits=1): statistics.mean(opened) if opened else None,
        Column("inner steps", digits=1): statistics.mean(row.told("inner_steps")),
    }


# --------------------------------------------------------------------------------------
# The report
# --------------------------------------------------------------------------------------


def report(
    args: argparse.Namespace,
    tables: Mapping[str, Sequence[Method]],
    cases: Mapping[str, list[Case]],
) -> None:
    """Writes the tables and figures of all tables that have pictures, and prints the first table of each."""
    references, look = references_to(args), lpips_distance(args.device) if args.lpips else None
    for table, rows in all_rows(args, tables, cases).items():
        if not rows:
            print(f"{table}: there are no pictures yet", file=sys.stderr)
            continue
        recall_answers(args, rows.values())
        folder = args.output_dir / "tables"
        estimate = partial(mean_estimate, resamples=args.resamples, seed=args.seed)
        by_emotion = partial(estimates_by, resamples=args.resamples, seed=args.seed)
        first = write_figures(rows, partial(main_figures, args, references), estimate, folder / table)
        second = write_figures(rows, partial(more_figures, args, look), estimate, folder / f"{table}_more")
        for name, _ in emotion_judges(args):
            write_emotions(args, rows, name, by_emotion, folder / f"{table}_emotions_{slug(name)}")
        write_confusions(rows, honest_judge(args), folder / f"{table}_confusion")
        told = heading(args, table, cases[TASK_OF_TABLE[table]], rows)
        body = [markdown(*shown, intervals=True) for shown in (first, second)]
        write_whole(folder / f"{table}.md", "\n\n".join([told, *body]) + "\n")
        draw(args, table, tables[table], rows, first, folder)
        write_rater_sheets(args, table, rows)
        print(told, markdown(*first), folder / f"{table}.md", sep="\n\n", flush=True)


def write_figures(
    rows: Mapping[str, Row], figures: Any, estimate: Any, stem: Path
) -> tuple[dict[str, dict[str, Number]], list[Column]]:
    """Writes a table, and returns it with its columns, those that any row has."""
    told = {name: figures(row, estimate) for name, row in rows.items()}
    columns = list(dict.fromkeys(column for row in told.values() for column in row))
    table = {name: {column.name: value for column, value in row.items()} for name, row in told.items()}
    write_table(table, columns, stem)
    return table, columns


def write_emotions(args: argparse.Namespace, rows: Mapping[str, Row], judge: str, by_emotion: Any, stem: Path) -> None:
    """Writes a judge's accuracy by emotion."""
    table = {
        name: by_emotion(right(row.answers[judge].emotions, row.emotions), row.emotions, row.contents)
        for name, row in rows.items()
    }
    write_table(table, emotion_columns(args.emotion), stem)


def write_confusions(rows: Mapping[str, Row], judge: str, folder: Path) -> None:
    """Writes what a judge takes for what, row by row, as CSV and as a plot."""
    for name, row in rows.items():
        answers = row.answers[judge]
        if not set(row.emotions) <= set(answers.labels):
            continue
        counts = confusion(answers["probabilities"], answers.labels, row.emotions)
        meant = [number for number, label in enumerate(answers.labels) if label in row.emotions]
        labels = [answers.labels[number] for number in meant]
        told = counts[meant].tolist()
        write_whole(folder / f"{slug(name)}.csv", confusion_csv(told, labels, answers.labels))
        figure = confusion_figure(told, labels, answers.labels, f"{name}, by {judge}")
        save_figure(figure, folder / f"{slug(name)}.png")


def heading(args: argparse.Namespace, table: str, cases: Sequence[Case], rows: Mapping[str, Row]) -> str:
    """What the figures of a table are of: base, test set, judges, device and versions."""
    runs = json.loads(read_text(args.output_dir / "run.json"))["runs"]
    last = next((run for run in reversed(runs) if "make" in run["arguments"]["stage"]), runs[-1])
    contents = len({case.content for case in cases})
    steps = args.num_inference_steps or settings_of(args.base).get("call", {}).get("num_inference_steps")
    labels = len(next(iter(rows.values())).answers[honest_judge(args)].labels)
    base = settings_of(args.base).get("name") or public_name(args.base)
    guide = public_name(args.classifier) if args.classifier else "the base's own classifier"
    versions = ", ".join(f"{name} {version}" for name, version in last["versions"].items())
    made = {len(row.shown) for row in rows.values()}
    pictures = f"{min(made)}" if len(made) == 1 else f"{min(made)} to {max(made)}"
    walked = f", {steps} steps" if steps else ""
    return (
        f"Table “{table}” of `examples/evaluate.py`: {base}{walked}, {args.dtype}, {pictures} pictures a row of"
        f" {contents} contents and {len(args.emotion)} emotions. Chance is {100 / labels:.1f} %. In"
        f" brackets: 95 % intervals, resampled by content. Made on {last['device']} by {last['processes']} process(es)"
        f" in batches of {args.batch_size}; {versions}, commit {last['commit'] or 'unknown'}. Guided by"
        f" {guide}, which is no judge of itself."
        + " FID depends on the number of pictures where that is no larger than features have dimensions."
        * bool(args.fid)
    )


def draw(
    args: argparse.Namespace,
    table: str,
    methods: Sequence[Method],
    rows: Mapping[str, Row],
    shown: tuple[dict[str, dict[str, Number]], list[Column]],
    folder: Path,
) -> None:
    """Draws the figures that suit a table."""
    judge, clip = honest_judge(args), feature_clip(args)
    columns = {column.name: column for column in shown[1]}
    content = columns["image similarity"] if "image similarity" in columns else columns[clip]
    save_figure(scatter_figure(shown[0], content, columns[judge]), folder / f"{table}.png")
    save(example_sheet(*examples(rows)), folder / f"{table}_examples.png")
    if table == "terms":
        told = {name: [one.record for one in row.shown] for name, row in rows.items()}
        answers = {name: row.answers[judge].emotions for name, row in rows.items()}
        save_figure(inner_loop_figure(told, answers, judge), folder / "terms_inner_loop.png")
    if table == "thresholds":
        draw_thresholds(methods, rows, shown[0], columns[judge], columns[clip], folder / "thresholds_curve.png")
    if table in ("generation", "editing") and sum(len(row.shown) for row in rows.values()) > 3:
        first = dict(list(rows.items())[-FEATURE_MAPS:])
        features = {name: (row.answers[clip]["image"], row.emotions) for name, row in first.items()}
        spread = {name: intra_class_variance(*told).value for name, told in features.items()}
        save_figure(feature_map_figure(features, spread, args.seed), folder / f"{table}_features.png")


def examples(
    rows: Mapping[str, Row],
) -> tuple[dict[str, list[Path | None]], list[tuple[str | None, str | None]]]:
    """The pictures of all rows of the first prompts, each with another emotion."""
    # The largest row may be of other contents, such as drawings, and have nothing to be compared with.
    known = {name: {(one.content, one.emotion): one.path for one in reversed(row.shown)} for name, row in rows.items()}
    shared = Counter(key for paths in known.values() for key in paths)
    most = max(
        rows.values(), key=lambda row: (sum(shared[one.content, one.emotion] > 1 for one in row.shown), len(row.shown))
    )
    firsts: dict[str | int, list[Shown]] = {}
    for one in most.shown:
        if one.prompt:
            firsts.setdefault(one.content, []).append(one)
    chosen = [group[number % len(group)] for number, group in enumerate(list(firsts.values())[:EXAMPLES])]
    chosen = chosen or most.shown[:EXAMPLES]
    asked: list[tuple[str | None, str | None]] = [(one.prompt, one.emotion) for one in chosen]
    keys = [(one.content, one.emotion) for one in chosen]
    sheet: dict[str, list[Path | None]] = {}
    if all(one.source for one in chosen):
        sheet[SOURCES] = [one.source for one in chosen]
    for name, paths in known.items():
        pictures = [paths.get(key) for key in keys]
        if pictures.count(None) <= len(pictures) / 2:  # a row of little else than gaps compares nothing
            sheet[name] = pictures
    return sheet, asked


def draw_thresholds(
    methods: Sequence[Method],
    rows: Mapping[str, Row],
    table: Mapping[str, Mapping[str, Number]],
    accuracy: Column,
    content: Column,
    path: Path,
) -> None:
    """Draws the paper's Figure 5: accuracy and content over the threshold, with one picture as an example."""
    values = {m.settings["semantic_threshold"]: m.name for m in methods if m.name in rows}
    first = next(iter(rows.values())).shown[0]
    pictures = {
        value: Image.open(one.path)
        for value, name in values.items()
        for one in rows[name].shown
        if (one.content, one.emotion) == (first.content, first.emotion)
    }
    told = {value: table[name] for value, name in values.items()}
    figure = threshold_figure(told, accuracy, content, pictures, f"“{first.prompt}”, {first.emotion}")
    save_figure(figure, path)


def write_rater_sheets(args: argparse.Namespace, table: str, rows: Mapping[str, Row]) -> None:
    """Writes the blind test of whole methods, the paper's user study; one that is there may have been handed out."""
    output = args.output_dir / "raters" / table
    folders = {
        name: row_folder(args.output_dir, name)
        for name, row in rows.items()
        if name not in dict(args.folder) or row.shown[0].record
    }
    folders = {name: folder for name, folder in folders.items() if folder.is_dir()}
    if table != TASK_OF_TABLE[table] or not folders or key_path(output).exists():
        return
    few = args.rater_pictures
    make_rater_sheets(folders, output, pictures=few, seed=args.seed, comparisons=few)
