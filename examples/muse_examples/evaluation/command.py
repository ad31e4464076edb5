# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The command of `examples/evaluate.py`: its options, the rows that they ask for, and its three stages."""

import argparse
import datetime
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from accelerate import PartialState

from muse_examples.evaluation.data import Case, Content, plan, read_contents, read_pairs
from muse_examples.evaluation.making import make_rows, note_run, plan_table, slug
from muse_examples.evaluation.methods import STOCK, TASK_OF_TABLE, Method, Studio, load_methods, muse
from muse_examples.evaluation.reporting import judge_rows, report
from muse_examples.evaluation.rivals import instruct_pix2pix, ledits, sdedit
from muse_examples.evaluation.universal_guidance import universal
from muse_examples.options import (
    add_guidance_options,
    add_memory_options,
    add_model_options,
    add_size_options,
    check_size,
    existing_file,
    existing_folder,
    number,
    one_line_errors,
    output_folder,
    positive_int,
    share,
)
from muse_examples.pipelines import check_emotions, known_labels
from pipeline_muse import MIKELS_WHEEL, MusePipeline


STAGES = ("make", "judge", "report")


def named(kind: Callable[[str], object] = str) -> Callable[[str], tuple[str, object]]:
    """The type of options such as `emo_b=path/or/id`; a name alone stands for itself."""

    def parse(text: str) -> tuple[str, object]:
        name, equals, value = text.partition("=")
        if not name or (equals and not value):
            raise argparse.ArgumentTypeError(f"{text!r} is not name=value")
        return name, kind(value or name)

    return parse


def folder_or_file(text: str) -> Path:
    """The type of options that name a folder or a file."""
    return existing_folder(text) if Path(text).is_dir() else existing_file(text)


def parse_args(arguments: Sequence[str] | None = None, description: str | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--table", nargs="+", choices=TASK_OF_TABLE, default=["generation"], help="Default: %(default)s."
    )
    parser.add_argument("--stage", nargs="+", choices=STAGES, default=list(STAGES), help="Default: all three.")
    parser.add_argument("--dry_run", action="store_true", help="print the plan and end")
    parser.add_argument("--output_dir", type=output_folder, default=Path("outputs/evaluation"))
    add_data_options(parser)
    add_row_options(parser)
    add_column_options(parser)
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures at a time")
    add_size_options(parser)
    add_model_options(parser, guide="--guide")
    add_guidance_options(parser, preset=False)
    add_memory_options(parser)
    args = parser.parse_args(arguments)
    check_size(parser, args)
    check(parser, args)
    return args


def add_data_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say what pictures show and evoke."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--captions",
        type=existing_file,
        help="what pictures show: COCO's annotations, EmoCtrl's test set, JSON lines, or a text with a caption a line",
    )
    group.add_argument(
        "--images", type=existing_folder, help="pictures to edit; their captions lie in the folder, or are --captions"
    )
    group.add_argument("--images_per_emotion", type=positive_int, help="of each row. Default: one of each caption.")
    group.add_argument("--emotion", nargs="+", default=list(MIKELS_WHEEL), help="Default: the eight of Mikels' wheel.")
    group.add_argument("--seed", type=int, default=0, help="of the sample of captions, and of the first picture")


def add_row_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which rows a table has."""
    group = parser.add_argument_group("rows")
    presets = list(MusePipeline.presets)
    group.add_argument(
        "--presets",
        nargs="+",
        choices=presets,
        default=presets,
        help="of MUSE; the first is the one of which terms, thresholds and guides are shown. Default: %(default)s.",
    )
    group.add_argument(
        "--universal_guidance_weight", nargs="*", type=number(0), default=[], help="rows of Universal Guidance"
    )
    group.add_argument(
        "--thresholds",
        nargs="+",
        type=number(0),
        default=[0, 14, 18, 21, 24, 30],
        help="η. Default: the paper's, %(default)s.",
    )
    group.add_argument(
        "--term_weights",
        nargs="*",
        type=number(0),
        default=[],
        help="further λ₁ and λ₂, each alone, in the table of terms",
    )
    group.add_argument(
        "--edit_strengths", nargs="+", type=share, default=[1.0], help="of edits by MUSE. Default: %(default)s."
    )
    group.add_argument(
        "--edit_references",
        nargs="+",
        choices=("null", "source"),
        default=["null"],
        help="prompts that guidance leads away from in these. Default: %(default)s.",
    )
    group.add_argument("--sdedit_strengths", nargs="*", type=share, default=[0.5], help="Default: %(default)s.")
    group.add_argument("--ledits", action="store_true", help="a row of LEDITS++ on the base")
    group.add_argument("--instruct_pix2pix", metavar="CHECKPOINT", help="a row of InstructPix2Pix")
    group.add_argument(
        "--methods", nargs="+", type=existing_file, default=[], help="Python files with rows of your own"
    )
    group.add_argument(
        "--folder",
        nargs="+",
        type=named(existing_folder),
        default=[],
        metavar="NAME=PATH",
        help="pictures that other programs made",
    )
    group.add_argument("--rows", nargs="+", help="only rows whose names contain one of these")


def add_column_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which columns a table has."""
    group = parser.add_argument_group("columns")
    group.add_argument(
        "--classifier",
        dest="judges",
        nargs="+",
        type=named(),
        default=[],
        metavar="NAME=PATH",
        help="emotion classifiers that judge, any image classifiers of transformers by Hub id or path. "
        "Default: the base's own, which guides.",
    )
    group.add_argument(
        "--scores",
        nargs="+",
        type=named(),
        metavar="NAME=PATH",
        help="CLIP-like models that compare picture and prompt: CLIP, PickScore, HPSv2. "
        "All else by features is by those of the first. Default: the gate's CLIP.",
    )
    group.add_argument(
        "--fid",
        nargs="*",
        type=named(folder_or_file),
        default=[],
        metavar="NAME=PATH",
        help="folders of reference pictures, or saved statistics",
    )
    group.add_argument(
        "--inception", action="store_true", help="FID by Inception, beside that by CLIP; needs the extra `paper`"
    )
    group.add_argument("--lpips", action="store_true", help="diversity by LPIPS; needs the extra `paper`")
    group.add_argument(
        "--metric_variant",
        choices=("corrected", "published"),
        default="corrected",
        help="of diversity and MSE: as they should be, or as published scripts compute them. Default: %(default)s.",
    )
    group.add_argument("--resamples", type=positive_int, default=2000, help="of intervals. Default: %(default)s.")
    group.add_argument("--trust_remote_code", action="store_true", help="run code that judges bring")
    group.add_argument(
        "--rater_pictures", type=positive_int, default=64, help="of each table's blind test. Default: %(default)s."
    )


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where options contradict one another; resolves the guide's name."""
    tasks = {TASK_OF_TABLE[table] for table in args.table}
    if "generation" in tasks and not args.captions:
        parser.error("all tables but editing need --captions")
    if "editing" in tasks and not args.images:
        parser.error("--table editing needs --images")
    if "methods" in args.table and not args.methods:
        parser.error("--table methods needs the files of --methods that have its rows")
    for option, values in (
        ("classifier", args.judges),
        ("folder", args.folder),
        ("fid", args.fid),
        ("scores", args.scores or []),
    ):
        if len({slug(name) for name, _ in values}) < len(values):
            parser.error(f"--{option} gives a name twice")
    if "guides" in args.table and not args.judges:
        parser.error("--table guides needs the --classifier that guide")
    args.classifier = dict(args.judges).get(args.classifier, args.classifier)


# --------------------------------------------------------------------------------------
# Rows
# --------------------------------------------------------------------------------------


def generation_rows(args: argparse.Namespace) -> list[Method]:
    """The rows of the table of generation."""
    return [
        *STOCK,
        *(universal(weight) for weight in args.universal_guidance_weight),
        *(muse(f"MUSE ({preset})", preset=preset) for preset in args.presets),
    ]


def muse_edit(preset: str, strength: float, reference: str) -> Method:
    """A row of edits, which guidance leads away from the null prompt, or from the picture's own."""
    given: dict[str, Any] = {"negative_prompt": "source"} if reference == "source" else {}
    name = f"MUSE ({preset}), {reference} prompt, strength {strength:g}"
    return muse(name, "editing", preset=preset, strength=strength, **given)


def editing_rows(args: argparse.Namespace) -> list[Method]:
    """The rows of the table of editing."""
    return [
        *(sdedit(strength) for strength in args.sdedit_strengths),
        *([ledits()] if args.ledits else []),
        *([instruct_pix2pix(args.instruct_pix2pix)] if args.instruct_pix2pix else []),
        *(
            muse_edit(preset, strength, reference)
            for preset in args.presets
            for reference in args.edit_references
            for strength in args.edit_strengths
        ),
    ]


NO_TERMS: dict[str, Any] = {"inherent_weight": 0.0, "similar_weight": 0.0}


def term_rows(args: argparse.Namespace) -> list[Method]:
    """The rows of the table of the loss' terms."""
    preset = args.presets[0]
    name = f"MUSE ({preset})"
    return [
        muse(f"{name}, target term alone", preset=preset, **NO_TERMS),
        muse(f"{name} without the similar term", preset=preset, similar_weight=0.0),
        muse(f"{name} without the inherent term", preset=preset, inherent_weight=0.0),
        muse(name, preset=preset),
        *(
            muse(f"{name}, {symbol} = {weight:g} alone", preset=preset, **{**NO_TERMS, term: weight})
            for weight in args.term_weights
            for symbol, term in (("λ₁", "inherent_weight"), ("λ₂", "similar_weight"))
        ),
        muse(f"{name} without optimisation", preset=preset, max_inner_steps=0),
    ]


def threshold_rows(args: argparse.Namespace) -> list[Method]:
    """The rows of the table of the gate's thresholds, which alone decides when guidance starts."""
    preset = args.presets[0]
    return [
        muse(f"MUSE ({preset}), η = {threshold:g}", preset=preset, semantic_threshold=threshold, latest_start=1.0)
        for threshold in args.thresholds
    ]


def guide_rows(args: argparse.Namespace) -> list[Method]:
    """The rows of the table of guides."""
    preset = args.presets[0]
    return [muse(f"MUSE ({preset}), guided by {name}", preset=preset, guide=guide) for name, guide in args.judges]


ROWS = {"generation": generation_rows, "editing": editing_rows, "terms": term_rows}
ROWS |= {"thresholds": threshold_rows, "guides": guide_rows, "methods": lambda args: []}


def tables_of(args: argparse.Namespace) -> dict[str, list[Method]]:
    """The rows of each table that is asked for."""
    own = [method for path in args.methods for method in load_methods(path)]
    found = {}
    for table in args.table:
        methods = ROWS[table](args) + [
            method for method in own if (TASK_OF_TABLE[table] if table == "methods" else table) == method.task
        ]
        if args.rows:
            methods = [method for method in methods if any(part in method.name for part in args.rows)]
        if len({slug(method.name) for method in methods}) < len(methods):
            raise ValueError(f"The table {table!r} has two rows of one name.")
        found[table] = methods
    if not any(found.values()) and not args.folder:
        raise ValueError(f"No row of {', '.join(args.table)} has one of {args.rows} in its name.")
    return found


def cases_of(args: argparse.Namespace) -> dict[str, list[Case]]:
    """What the rows of each task have to make."""
    tasks = {TASK_OF_TABLE[table] for table in args.table}
    contents: dict[str, list[Content]] = {}
    if "generation" in tasks:
        contents["generation"] = read_contents(args.captions, args.seed)
    if "editing" in tasks:
        contents["editing"] = read_pairs(args.images, args.captions, args.seed)
    return {task: plan(some, args.emotion, args.images_per_emotion, args.seed) for task, some in contents.items()}


@one_line_errors
def main(arguments: Sequence[str] | None = None, description: str | None = None) -> None:
    """Runs the evaluation of the command line, or of `arguments`."""
    args = parse_args(arguments, description)
    # Unless told of the CPU, accelerate takes each of several processes without a GPU for the only one. They may wait
    # long for one another.
    state = PartialState(cpu=args.device == "cpu", timeout=datetime.timedelta(days=30))
    if args.device == state.device.type != "cpu":
        args.device = str(state.device)  # a GPU of its own
    try:
        run(args, state)
    finally:
        state.destroy_process_group()


def run(args: argparse.Namespace, state: PartialState) -> None:
    """All stages that are asked for, in this process."""
    check_emotions(args.emotion, known_labels(args))
    tables, cases, studio = tables_of(args), cases_of(args), Studio(args)
    rows = {method.name: (method, cases[method.task]) for methods in tables.values() for method in methods}
    if args.dry_run:
        if state.is_main_process:
            print(plan_table(args, studio, rows.values(), state))
        return
    if state.is_main_process:
        note_run(args, state)
    if "make" in args.stage:
        make_rows(args, studio, rows.values(), state)
    del studio
    state.wait_for_everyone()
    if "judge" in args.stage:
        judge_rows(args, tables, cases, state)
    state.wait_for_everyone()
    if "report" in args.stage and state.is_main_process:
        report(args, tables, cases)
