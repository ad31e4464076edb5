# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Measures on Storybook what lies in between: strengths of an emotion, mixtures of two, and edits within a mask.

Strength: prompts x 8 emotions at several `emotion_strength`, from the same seeds. Mixtures: pairs of emotions, from
1:0 to 0:1. Masks: held-out drawings, edited towards each emotion everywhere, and in one half. The guide (Emo-A) and
judges that never guide (Emo-B, Emo-C) say how probable the emotions are. Writes JSON, a plot and contact sheets.
Pictures are kept in `--images_dir`, and not made again if they are there: more of them may be asked for later, but
other settings need another folder.

    python examples/storybook/blends.py
"""

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import repository  # noqa: F401
import torch
from diffusers import DiffusionPipeline
from muse_examples.contact_sheets import EMOTION_COLORS, Cell, contact_sheet
from muse_examples.evaluation.data import Case, Content, plan, read_pairs
from muse_examples.evaluation.judges import ClipJudge, EmotionJudge, ask
from muse_examples.measuring import processor, versions
from muse_examples.pipelines import place, settings_of
from muse_examples.runs import Job, batches, run_batch
from PIL import Image
from repository import ROOT
from test_sets import CLIP, JUDGES, PIXELS, SEED, prompts, write_sources
from tqdm import tqdm
from world import EMOTIONS

from pipeline_muse import MusePipeline


STRENGTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # 0: the stock pipeline
SHOWN_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # on the contact sheet; always among those that are measured
SHARES = (0.25, 0.5, 0.75)  # of the second emotion of a mixture
PAIRS = (("contentment", "awe"), ("sadness", "fear"), ("contentment", "fear"), ("excitement", "sadness"))
TOLERANCE = 0.05  # so much may the p(target) of a single picture fall from one strength to the next
MARGINS = (0, 8, 16, 24)  # px between the mask and what is compared with the source


CALL = settings_of(str(ROOT))["call"]

Pictures = dict[float, list[Path]]  # by strength or share


# --------------------------------------------------------------------------------------
# What to make
# --------------------------------------------------------------------------------------


def cases(number_of_prompts: int) -> list[Case]:
    """Prompts with all 8 emotions."""
    return plan([Content(prompt) for prompt in prompts(number_of_prompts)], EMOTIONS, None, seed=SEED)


def edits(number_of_sources: int, folder: Path) -> list[Case]:
    """Drawings without an emotion, each to be edited towards all 8."""
    return plan(read_pairs(write_sources(folder, number_of_sources, PIXELS)), EMOTIONS, None, seed=2000)


def mixed(number_of_prompts: int, share: float) -> list[Job]:
    """Every prompt with every pair of emotions, of which the second weighs `share`; seeds are the prompts' own."""
    alone = cases(number_of_prompts)[:: len(EMOTIONS)]
    weights = [{first: 1 - share, second: share} for first, second in PAIRS]
    return [Job(case.prompt, mixture, case.seed) for case in alone for mixture in weights]


def single_emotions(paths: list[Path], number_of_prompts: int, place: int) -> list[Path]:
    """The ends of the mixtures: the pictures of each pair's first (`place` 0) or second (1) emotion alone."""
    columns = [EMOTIONS.index(pair[place]) for pair in PAIRS]
    return [paths[row * len(EMOTIONS) + column] for row in range(number_of_prompts) for column in columns]


def half() -> Image.Image:
    """Where an edit may act, white on black: the right half."""
    mask = Image.new("L", (PIXELS, PIXELS))
    mask.paste(255, (PIXELS // 2, 0, PIXELS, PIXELS))
    return mask


def make(
    pipe: DiffusionPipeline, name: str, jobs: Sequence[Job], args: argparse.Namespace, **options: Any
) -> list[Path]:
    """The pictures of all jobs, made in batches where `args.images_dir` lacks them."""
    paths = [args.images_dir / name / f"{index:03d}.png" for index in range(len(jobs))]
    waiting = iter(paths)
    for batch in tqdm(list(batches(jobs, args.batch_size)), desc=name):
        own = [next(waiting) for _ in batch]
        if not all(path.exists() for path in own):
            for path, made in zip(own, run_batch(pipe, batch, **CALL, **options)):
                path.parent.mkdir(parents=True, exist_ok=True)
                made.image.save(path)
    return paths


# --------------------------------------------------------------------------------------
# What came of it
# --------------------------------------------------------------------------------------


@cache
def judges() -> dict[str, EmotionJudge]:
    """The guide, and judges that never guide."""
    return {judge.name: judge for judge in map(EmotionJudge.parse, JUDGES)}


@cache
def clip() -> ClipJudge:
    """The held-out CLIP."""
    return ClipJudge.parse(CLIP)


def row_name(paths: Sequence[Path]) -> str:
    """A name for the answers about pictures: that of their folder, and how many they are."""
    return f"{paths[0].parent.name}_{len(paths)}"


def probabilities(paths: Sequence[Path]) -> dict[str, np.ndarray]:
    """What the guide and the judges see, each of shape `(n, 8)` in the order of `EMOTIONS`."""
    folder, nothing, seen = paths[0].parents[1], [None] * len(paths), {}
    for name, judge in judges().items():
        answers = ask(judge, row_name(paths), paths, nothing, folder)
        seen[name] = answers["probabilities"][:, [answers.labels.index(label) for label in EMOTIONS]]
    return seen


def of_target(seen: np.ndarray, items: Sequence[Job]) -> np.ndarray:
    """The probability of each item's emotion, shape `(n,)`."""
    return seen[np.arange(len(items)), [EMOTIONS.index(str(item.emotion)) for item in items]]


def rounded(values: Any, digits: int = 4) -> Any:
    """Numbers for JSON."""
    return np.round(np.asarray(values, dtype=float), digits).tolist()


def content(paths: Sequence[Path], items: Sequence[Job]) -> float:
    """100 * cos of the pictures and their prompts, by the held-out CLIP."""
    asked = [item.prompt for item in items]
    return float(ask(clip(), row_name(paths), paths, asked, paths[0].parents[1])["similarity"].mean())


def pixels(paths: Sequence[Path]) -> np.ndarray:
    """Pictures of shape `(n, H, W, 3)`, of 255."""
    return np.stack([np.asarray(Image.open(path).convert("RGB")) for path in paths]).astype(int)


def rising(curves: np.ndarray, tolerance: float) -> float:
    """The share of curves, shape `(points, n)`, that never fall by more than `tolerance` from point to point."""
    return float((np.diff(curves, axis=0) >= -tolerance).all(axis=0).mean())


def measure_strengths(made: Pictures, items: Sequence[Job]) -> dict[str, Any]:
    """Per strength the mean p(target), accuracy and content; per judge whether p(target) rises, and for how many."""
    seen = {strength: probabilities(images) for strength, images in made.items()}
    stock = pixels(made[min(made)])
    rows = {}
    for strength, images in made.items():
        row: dict[str, Any] = {"CLIP": content(images, items)}
        row["change"] = float(np.abs(pixels(images) - stock).mean())  # of 255
        for judge, table in seen[strength].items():
            row[f"p {judge}"] = float(of_target(table, items).mean())
            row[judge] = 100 * float(np.mean([EMOTIONS[k] == i.emotion for k, i in zip(table.argmax(1), items)]))
        rows[f"{strength:g}"] = {name: rounded(value) for name, value in row.items()}
    judged = {}
    for judge in seen[min(seen)]:
        curves = np.stack([of_target(seen[strength][judge], items) for strength in sorted(seen)])  # (strengths, n)
        judged[judge] = {
            "mean rises": bool((np.diff(curves.mean(axis=1)) > 0).all()),
            "share of pictures that never fall": rounded(rising(curves, TOLERANCE)),
            "share of steps that do not fall": rounded((np.diff(curves, axis=0) >= -TOLERANCE).mean()),
            "share of pictures that end higher": rounded((curves[-1] > curves[0]).mean()),
            "p(target) by strength and picture": rounded(curves, 3),
        }
    return {"pictures": len(items), "tolerance": TOLERANCE, "rows": rows, "monotonic": judged}


def measure_mixtures(made: Pictures, number_of_prompts: int) -> dict[str, Any]:
    """Per pair, judge and share of the second emotion, the mean p of the first and of the second."""
    rows: dict[str, Any] = {}
    for share, images in made.items():
        for judge, table in probabilities(images).items():
            per_pair = table.reshape(number_of_prompts, len(PAIRS), -1).mean(axis=0)
            for (first, second), mean in zip(PAIRS, per_pair):
                p = {"first": mean[EMOTIONS.index(first)], "second": mean[EMOTIONS.index(second)]}
                row = {name: rounded(value) for name, value in p.items()}
                rows.setdefault(f"{first}:{second}", {}).setdefault(judge, {})[f"{share:g}"] = row
    return {"pictures": len(PAIRS) * number_of_prompts, "rows": rows}


@torch.no_grad()
def round_trip(pipe: DiffusionPipeline, sources: Sequence[Path]) -> np.ndarray:
    """What the autoencoder makes of pictures, `(n, H, W, 3)`, of 255: the nearest that an edit can keep."""
    known = dict.fromkeys(sources)
    batch = torch.from_numpy(pixels(list(known))).permute(0, 3, 1, 2) / 127.5 - 1
    decoded = pipe.vae.decode(pipe.vae.encode(batch.to(pipe.vae.dtype)).latent_dist.mode()).sample
    made = pipe.image_processor.postprocess(decoded, output_type="np")
    kept = dict(zip(known, (255 * made).round().astype(int)))
    return np.stack([kept[source] for source in sources])


def outside(mask: Image.Image, margin: int) -> np.ndarray:
    """Whether each pixel is black in the mask and further than `margin` px from its white, shape `(H, W)`."""
    white = np.argwhere(np.asarray(mask) > 0)
    everywhere = np.indices(mask.size[::-1]).reshape(2, -1).T
    distance = np.sqrt(((everywhere[:, None] - white[None]) ** 2).sum(-1)).min(axis=1)
    return (distance > margin).reshape(mask.size[::-1])


def measure_masks(
    pipe: DiffusionPipeline, everywhere: list[Path], masked: list[Path], items: Sequence[Job]
) -> dict[str, Any]:
    """With and without a mask the mean p(target), and how far all is from the source's round trip (of 255)."""
    kept = round_trip(pipe, [item.source for item in items if item.source])
    mask, rows = half(), {}
    for name, paths in (("everywhere", everywhere), ("half", masked)):
        seen = probabilities(paths)
        rows[name] = {f"p {judge}": rounded(of_target(table, items).mean()) for judge, table in seen.items()}
        distance = np.abs(pixels(paths) - kept)  # (n, H, W, 3)
        inside = distance if name == "everywhere" else distance[:, np.asarray(mask) > 0]
        rows[name]["inside, mean"] = rounded(inside.mean(), 2)
    regions = {margin: distance[:, outside(mask, margin)] for margin in MARGINS}
    rows["half"]["outside"] = {
        f"> {margin} px": {"max": int(region.max()), "mean": rounded(region.mean(), 2)}
        for margin, region in regions.items()
        if region.size
    }
    return {"pictures": len(items), "semantic_threshold": 0, "rows": rows}


# --------------------------------------------------------------------------------------
# To look at
# --------------------------------------------------------------------------------------


def p_of(seen: np.ndarray, *labels: str) -> str:
    """Such as `fear 0.72`."""
    return ", ".join(f"{label} {seen[EMOTIONS.index(label)]:.2f}" for label in labels)


def strength_cells(made: Pictures) -> list[Cell]:
    """A row per emotion, each of another prompt, from stock to full strength, with p(target) by Emo-B."""
    seen = {strength: probabilities(made[strength])["Emo-B"] for strength in SHOWN_STRENGTHS}
    rows = len(made[0]) // len(EMOTIONS)
    cells = []
    for number, emotion in enumerate(EMOTIONS):
        index = (number % rows) * len(EMOTIONS) + number
        for strength in SHOWN_STRENGTHS:
            title = f"{strength:g}" if strength else "stock"
            told = p_of(seen[strength][index], emotion)
            cells.append(Cell(Image.open(made[strength][index]), title, told, title_color=EMOTION_COLORS[emotion]))
    return cells


def mixture_cells(made: Pictures, number_of_prompts: int) -> list[Cell]:
    """A row per pair, from the first emotion to the second, with the p of both by Emo-B."""
    seen = {share: probabilities(images)["Emo-B"] for share, images in made.items()}
    cells = []
    for number, (first, second) in enumerate(PAIRS):
        index = (number % number_of_prompts) * len(PAIRS) + number  # another prompt in each row
        for share, images in sorted(made.items()):
            weights = f"{100 - round(100 * share)} : {round(100 * share)}"
            cells.append(Cell(Image.open(images[index]), weights, p_of(seen[share][index], first, second)))
    return cells


def mask_cells(everywhere: list[Path], masked: list[Path], items: Sequence[Job]) -> list[Cell]:
    """Rows of another source or emotion each: the source, the mask, the edit within it, and the edit everywhere."""
    cells = []
    for index in range(0, len(items), max(1, 2 * len(items) // len(EMOTIONS) - 1)):
        item = items[index]
        if item.source is not None:
            cells += [Cell(Image.open(item.source), "source"), Cell(half(), "mask")]
            cells.append(Cell(Image.open(masked[index]), str(item.emotion)))
            cells.append(Cell(Image.open(everywhere[index]), f"{item.emotion}, no mask"))
    return cells


def plot(record: dict[str, Any], path: Path) -> None:
    """p(target) and content over strength, and both p of the mixtures over their shares."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (strength, kept, mixtures) = plt.subplots(1, 3, figsize=(16, 4.6), layout="constrained")
    rows = record["strength"]["rows"]
    x = [float(value) for value in rows]
    for judge, told in record["strength"]["monotonic"].items():
        strength.plot(x, [row[f"p {judge}"] for row in rows.values()], marker="o", label=judge)
        if judge == "Emo-B":
            strength.plot(x, told["p(target) by strength and picture"], color="grey", linewidth=0.4, alpha=0.35)
        kept.plot(x, [row[judge] for row in rows.values()], marker="o", label=f"{judge} accuracy [%]")
    kept.plot(x, [row["CLIP"] for row in rows.values()], marker="s", color="black", label="CLIP (content kept)")
    strength.set(title="Mean p(target); single pictures by Emo-B in grey", xlabel="emotion_strength", ylim=(0, 1))
    kept.set(title="Accuracy and content", xlabel="emotion_strength")
    for number, (pair, judged) in enumerate(record["mixtures"]["rows"].items()):
        first, second = pair.split(":")
        shares = judged["Emo-B"]
        for name, line in (("first", "-"), ("second", "--")):
            label = f"{first} – {second}" if name == "first" else None
            values = [row[name] for row in shares.values()]
            mixtures.plot([float(s) for s in shares], values, line, color=f"C{number}", marker="o", label=label)
    mixtures.set(title="Mixtures: p(first) –, p(second) - -, by Emo-B", xlabel="share of the second", ylim=(0, 1))
    for axes in (strength, kept, mixtures):
        axes.legend(fontsize=8)
    figure.savefig(path, dpi=80)
    plt.close(figure)


def save_small(image: Image.Image, path: Path) -> None:
    """Writes a sheet with 256 colours, a third of the bytes."""
    image.quantize(256, dither=Image.Dither.NONE).save(path, optimize=True)


# --------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=8, help="prompts, each with all 8 emotions (62 at most)")
    parser.add_argument("--mixed_prompts", type=int, default=8, help="those of them that are made with mixtures")
    parser.add_argument("--sources", type=int, default=4, help="drawings to edit, each towards all 8 emotions")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="Default: %(default)s.")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--images_dir", type=Path, default=Path("outputs/blends"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    torch.set_num_threads(args.threads)
    pipe = place(MusePipeline.from_pretrained(ROOT, trust_remote_code=True), argparse.Namespace(device="cpu"))
    pipe.set_progress_bar_config(disable=True)
    items, strengths = cases(args.prompts), {}
    for value in sorted({*SHOWN_STRENGTHS, *args.strengths}):
        asked = items if value else [replace(item, emotion=None) for item in items]
        given = {"emotion_strength": value} if value else {}
        strengths[value] = make(pipe, f"strength_{value:g}", asked, args, **given)
    mixtures = {place: single_emotions(strengths[1], args.mixed_prompts, int(place)) for place in (0.0, 1.0)}
    for share in SHARES:
        mixtures[share] = make(pipe, f"mixture_{share:g}", mixed(args.mixed_prompts, share), args)
    mixtures = dict(sorted(mixtures.items()))
    # Guided from the first step: the gate judges the whole picture, and with a mask most of that is the source.
    edited = edits(args.sources, args.images_dir / "sources")
    everywhere = make(pipe, "everywhere", edited, args, semantic_threshold=0)
    masked = make(pipe, "half", edited, args, semantic_threshold=0, mask_image=half())
    names = ("prompts", "mixed_prompts", "sources", "threads", "batch_size")
    record = {
        "protocol": {name: getattr(args, name) for name in names} | {"muse": CALL | MusePipeline.presets["full"]},
        "hardware": f"{os.cpu_count()} cores of an {processor()}",
        "versions": versions(),
        "strength": measure_strengths(strengths, items),
        "mixtures": measure_mixtures(mixtures, args.mixed_prompts),
        "masks": measure_masks(pipe, everywhere, masked, edited),
    }
    args.results_dir.mkdir(parents=True, exist_ok=True)
    (args.results_dir / "blends.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, args.results_dir / "blends.png")
    sheets = {
        "strengths": contact_sheet(strength_cells(strengths), len(SHOWN_STRENGTHS)),
        "mixtures": contact_sheet(mixture_cells(mixtures, args.mixed_prompts), len(mixtures)),
        "masks": contact_sheet(mask_cells(everywhere, masked, edited), 4),
    }
    for name, sheet in sheets.items():
        save_small(sheet, args.results_dir / f"blends_{name}.png")
    told = {task: record[task]["rows"] for task in ("strength", "mixtures", "masks")}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
