# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What edits keep and what they evoke on Storybook, beside edits that the world draws itself.

An emotion that is seen changes a picture, so no edit keeps all of it. How much has to go is measured here: the world
draws each source again, the same to the last bush, with cues of the emotion at several strengths. The other rows are
MUSE's, at several `strength` and `emotion_strength`; `examples/evaluate.py` makes and judges them.

    python examples/storybook/edit_frontier.py
    accelerate launch --multi_gpu --num_processes 2 examples/storybook/edit_frontier.py    # on two processes
"""

import argparse
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import repository  # noqa: F401
from filelock import FileLock
from frontier import Numbers, column, publish
from muse_examples.evaluation.command import main as evaluate
from muse_examples.evaluation.methods import REGISTERED, muse
from test_sets import CLIP, JUDGES, PIXELS, SEED, drawing_name, scenes, write_pictures, write_sources
from world import EMOTIONS, Scene, sample_scene


DRAWN = (0.3, 0.4, 0.5, 0.6)  # strengths of the cues that the world draws
STRENGTHS, EMOTION_STRENGTHS = (0.5, 0.75, 1.0), (0.5, 0.75, 1.0)
NAMES = {(0.75, 0.75): "keep", (1.0, 1.0): "evoke"}  # (strength, emotion_strength), as in docs/recipes.md
WORLD = "drawn by the world, cues at {}"
TABLE = "editing.csv"  # of evaluate.py
COLUMNS = ("Emo-B", "Emo-B degraded", "Emo-C", "CLIP", "image similarity")


def name_of(strength: float, emotion_strength: float) -> str:
    """The name of a row of MUSE's."""
    known = NAMES.get((strength, emotion_strength))
    return f"strength {strength:g}, emotion_strength {emotion_strength:g}" + (f" ({known})" if known else "")


REGISTERED += [
    muse(name_of(strength, share), "editing", strength=strength, emotion_strength=share)
    for strength in STRENGTHS
    for share in EMOTION_STRENGTHS
]


def drawn_edits(count: int, strength: float) -> list[Scene]:
    """The scenes of [`write_sources`], each with cues of every emotion and nothing else changed."""
    edited = []
    for number, scene in enumerate(scenes("edit", count, [None])):
        for emotion in EMOTIONS:
            source = random.Random(f"edit/{number}/{emotion}")  # the same cues at every strength
            cues = sample_scene(source, emotion, scene.place, scene.subject, strength).cues
            edited.append(replace(scene, emotion=emotion, cues=cues))
    return edited


def report(table: Numbers) -> str:
    """Judges, content and likeness of all rows as a Markdown table."""
    columns = {name: column(table, name) for name in COLUMNS}
    lines = [f"| row | {' | '.join(columns)} |", "|---|" + "---:|" * len(columns)]
    for row in table:
        told = " | ".join(f"{values[row]:.{2 if name == COLUMNS[-1] else 1}f}" for name, values in columns.items())
        lines.append(f"| {row} | {told} |")
    return "\n".join(lines) + "\n"


def plot(table: Numbers, path: Path) -> None:
    """Both judges' accuracy against the image similarity: the world's own edits as a line, MUSE's as points."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    likeness, beside = column(table, "image similarity"), {"textcoords": "offset points", "ha": "right"}
    figure, axes = plt.subplots(1, 2, figsize=(13, 5), layout="constrained", sharex=True, sharey=True)
    for axis, judge in zip(axes, ("Emo-B degraded", "Emo-C")):
        values = column(table, judge)
        drawn = [WORLD.format(f"{strength:g}") for strength in DRAWN]
        axis.plot([likeness[row] for row in drawn], [values[row] for row in drawn], "-s", color="#555555")
        axis.annotate("drawn by the world", (likeness[drawn[0]], values[drawn[0]]), (-8, -12), **beside)
        for strength, color in zip(STRENGTHS, ("#3f7fbf", "#e0912f", "#c8372d")):
            rows = [name_of(strength, share) for share in EMOTION_STRENGTHS]
            label = f"MUSE, strength {strength:g}"
            axis.plot([likeness[row] for row in rows], [values[row] for row in rows], "-o", color=color, label=label)
            for row, share in zip(rows, EMOTION_STRENGTHS):
                place = likeness[row], values[row]
                axis.annotate(f"{share:g}", place, (5, 5), textcoords="offset points", fontsize=8, color=color)
        axis.set(xlabel="image similarity to the source", ylabel="accuracy [%]", title=judge)
        axis.grid(color="#eeeeee")
    axes[0].legend(loc="lower left")
    figure.suptitle("Edits on Storybook; beside the points: emotion_strength")
    figure.savefig(path, dpi=80)
    plt.close(figure)


def parse_args(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    """The options of this script, and those of `examples/evaluate.py`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sources", type=int, default=4, help="drawings to edit, each towards all 8 emotions")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/edit_frontier"))
    parser.add_argument("--results_dir", type=Path, help="write table and plot there, too")
    return parser.parse_known_args(arguments)


def main(arguments: Sequence[str] | None = None) -> None:
    args, rest = parse_args(arguments)
    data = args.output_dir / "data"
    args.output_dir.mkdir(parents=True, exist_ok=True)
    given = ["--seed", str(SEED), "--batch_size", "8", "--classifier", *JUDGES, "--scores", CLIP]
    with FileLock(args.output_dir / "data.lock"):  # of several processes one draws
        given += ["--images", str(write_sources(data / "sources", args.sources, PIXELS)), "--folder"]
        sources = [drawing_name(number) for number in range(args.sources) for _ in EMOTIONS]
        for strength in DRAWN:
            folder = data / f"drawn_{strength:g}"
            write_pictures(folder, drawn_edits(args.sources, strength), PIXELS, sources)
            given += [f"{WORLD.format(f'{strength:g}')}={folder}"]
    rows = ["--table", "editing", "--rows", "emotion_strength", "--methods", __file__]
    evaluate([*given, *rows, "--output_dir", str(args.output_dir), *rest], __doc__)
    publish(args, args.output_dir / "tables" / TABLE, "edit_frontier", report, plot)


if __name__ == "__main__":
    main()
