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
from pathlib import Path
from typing import Any

import numpy as np
import repository  # noqa: F401
import torch
from evaluate import (
    CALL,
    PROCESS,
    Setting,
    items_of_editing,
    items_of_generation,
    load,
    make_images,
    to_pixels,
)
from muse_examples.contact_sheets import EMOTION_COLORS, Cell, contact_sheet
from muse_examples.measuring import processor, versions
from PIL import Image
from tqdm import tqdm
from world import EMOTIONS

from pipeline_muse import MusePipeline


STRENGTHS = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1.0)  # 0: the stock pipeline
SHOWN_STRENGTHS = (0.0, 0.25, 0.5, 0.75, 1.0)  # on the contact sheet; always among those that are measured
SHARES = (0.25, 0.5, 0.75)  # of the second emotion of a mixture
PAIRS = (("contentment", "awe"), ("sadness", "fear"), ("contentment", "fear"), ("excitement", "sadness"))
TOLERANCE = 0.05  # so much may the p(target) of a single picture fall from one strength to the next
MARGINS = (0, 8, 16, 24)  # px between the mask and what is compared with the source


# --------------------------------------------------------------------------------------
# What to make
# --------------------------------------------------------------------------------------


def items_of_mixture(number_of_prompts: int, share: float) -> list[dict]:
    """Every prompt with every pair of emotions, of which the second weighs `share`; seeds are the prompts' own."""
    prompts = {item["prompt"]: item["seed"] for item in items_of_generation(number_of_prompts)}
    return [
        {"prompt": prompt, "seed": seed, "emotion": {first: 1 - share, second: share}}
        for prompt, seed in prompts.items()
        for first, second in PAIRS
    ]


def single_emotions(images: list[Image.Image], number_of_prompts: int, place: int) -> list[Image.Image]:
    """The ends of the mixtures: the pictures of each pair's first (`place` 0) or second (1) emotion alone."""
    columns = [EMOTIONS.index(pair[place]) for pair in PAIRS]
    return [images[row * len(EMOTIONS) + column] for row in range(number_of_prompts) for column in columns]


def masks(size: tuple[int, int]) -> dict[str, Image.Image | None]:
    """Where an edit may act, white on black; `None` is everywhere."""
    half = Image.new("L", size)
    half.paste(255, (size[0] // 2, 0, *size))
    return {"everywhere": None, "half": half}


def strength_setting(strength: float) -> Setting:
    if strength == 0:
        return Setting("strength_0", "stock")
    return Setting(f"strength_{strength:g}", arguments={"emotion_strength": strength})


def mask_setting(name: str, mask: Image.Image | None) -> Setting:
    """Guided from the first step: the gate judges the whole picture, and with a mask most of that is the source."""
    where = {} if mask is None else {"mask_image": mask}
    return Setting(f"mask_{name}", "edit", {"semantic_threshold": 0} | where)


def pictures(setting: Setting, items: list[dict], args: argparse.Namespace) -> list[Image.Image]:
    """The pictures of all items, made in batches where `args.images_dir` lacks them."""
    paths = [args.images_dir / setting.name / f"{index:03d}.png" for index in range(len(items))]
    call = {**CALL, "guidance_scale": args.guidance_scale}
    for start in tqdm(range(0, len(items), args.batch_size), desc=setting.name):
        batch = slice(start, start + args.batch_size)
        if not all(path.exists() for path in paths[batch]):
            made, _ = make_images(PROCESS["pipe"], setting, items[batch], call)
            for path, image in zip(paths[batch], made):
                path.parent.mkdir(parents=True, exist_ok=True)
                image.save(path)
    return [Image.open(path).convert("RGB") for path in paths]


# --------------------------------------------------------------------------------------
# What came of it
# --------------------------------------------------------------------------------------


@torch.no_grad()
def probabilities(images: list[Image.Image]) -> dict[str, np.ndarray]:
    """What the guide and the judges see, each of shape `(n, 8)` in the order of `EMOTIONS`."""
    judges = PROCESS["judges"]
    pixels = judges.spec.prepare(to_pixels(images))
    seen = {}
    for name, model in judges.classifiers.items():
        columns = [model.config.label2id[label] for label in EMOTIONS]
        seen[name] = model(pixel_values=pixels).logits.softmax(dim=-1)[:, columns].numpy()
    return seen


def of_target(seen: np.ndarray, items: Sequence[dict]) -> np.ndarray:
    """The probability of each item's emotion, shape `(n,)`."""
    return seen[np.arange(len(items)), [EMOTIONS.index(item["emotion"]) for item in items]]


def rounded(values: Any, digits: int = 4) -> Any:
    """Numbers for JSON."""
    return np.round(np.asarray(values, dtype=float), digits).tolist()


def content(images: list[Image.Image], items: Sequence[dict]) -> float:
    """100 * cos of the pictures and their prompts, by the held-out CLIP."""
    judges = PROCESS["judges"]
    texts = judges.text_embeds([item["prompt"] for item in items])
    return 100 * float((judges.image_embeds(images) * texts).sum(-1).mean())


def rising(curves: np.ndarray, tolerance: float) -> float:
    """The share of curves, shape `(points, n)`, that never fall by more than `tolerance` from point to point."""
    return float((np.diff(curves, axis=0) >= -tolerance).all(axis=0).mean())


def measure_strengths(made: dict[float, list], items: Sequence[dict]) -> dict[str, Any]:
    """Per strength the mean p(target), accuracy and content; per judge whether p(target) rises, and for how many."""
    seen = {strength: probabilities(images) for strength, images in made.items()}
    stock = to_pixels(made[min(made)])
    rows = {}
    for strength, images in made.items():
        row: dict[str, Any] = {"CLIP": content(images, items)}
        row["change"] = float((to_pixels(images) - stock).abs().mean() * 127.5)  # mean, of 255
        for judge, table in seen[strength].items():
            row[f"p {judge}"] = float(of_target(table, items).mean())
            row[judge] = 100 * float(np.mean([EMOTIONS[k] == i["emotion"] for k, i in zip(table.argmax(1), items)]))
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


def measure_mixtures(made: dict[float, list], number_of_prompts: int) -> dict[str, Any]:
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
def round_trip(images: list[Image.Image]) -> list[Image.Image]:
    """What the autoencoder makes of pictures: the nearest that an edit can keep."""
    pipe = PROCESS["pipe"]
    pixels = to_pixels(images).to(pipe.vae.dtype)
    decoded = pipe.vae.decode(pipe.vae.encode(pixels).latent_dist.mode()).sample
    return pipe.image_processor.postprocess(decoded, output_type="pil")


def outside(mask: Image.Image, margin: int) -> np.ndarray:
    """Whether each pixel is black in the mask and further than `margin` px from its white, shape `(H, W)`."""
    white = np.argwhere(np.asarray(mask) > 0)
    everywhere = np.indices(mask.size[::-1]).reshape(2, -1).T
    distance = np.sqrt(((everywhere[:, None] - white[None]) ** 2).sum(-1)).min(axis=1)
    return (distance > margin).reshape(mask.size[::-1])


def measure_masks(made: dict[str, list], items: Sequence[dict]) -> dict[str, Any]:
    """Per mask the mean p(target), and how far what lies outside is from the source's round trip (of 255)."""
    kept = np.stack([np.asarray(image) for image in round_trip([item["source"] for item in items])]).astype(int)
    shapes, rows = masks(items[0]["source"].size), {}
    for name, images in made.items():
        row: dict[str, Any] = {}
        for judge, table in probabilities(images).items():
            row[f"p {judge}"] = rounded(of_target(table, items).mean())
        distance = np.abs(np.stack([np.asarray(image) for image in images]) - kept)  # (n, H, W, 3)
        if shapes[name] is not None:
            regions = {margin: distance[:, outside(shapes[name], margin)] for margin in MARGINS}
            row["outside"] = {
                f"> {margin} px": {"max": int(region.max()), "mean": rounded(region.mean(), 2)}
                for margin, region in regions.items()
                if region.size
            }
            row["inside, mean"] = rounded(distance[:, np.asarray(shapes[name]) > 0].mean(), 2)
        else:
            row["inside, mean"] = rounded(distance.mean(), 2)
        rows[name] = row
    return {"pictures": len(items), "semantic_threshold": 0, "rows": rows}


# --------------------------------------------------------------------------------------
# To look at
# --------------------------------------------------------------------------------------


def p_of(seen: np.ndarray, *labels: str) -> str:
    """Such as `fear 0.72`."""
    return ", ".join(f"{label} {seen[EMOTIONS.index(label)]:.2f}" for label in labels)


def strength_cells(made: dict[float, list], items: Sequence[dict]) -> list[Cell]:
    """A row per emotion, each of another prompt, from stock to full strength, with p(target) by Emo-B."""
    seen = {strength: probabilities(made[strength])["Emo-B"] for strength in SHOWN_STRENGTHS}
    prompts = len(items) // len(EMOTIONS)
    cells = []
    for number, emotion in enumerate(EMOTIONS):
        index = (number % prompts) * len(EMOTIONS) + number
        for strength in SHOWN_STRENGTHS:
            title = f"{strength:g}" if strength else "stock"
            told = p_of(seen[strength][index], emotion)
            cells.append(Cell(made[strength][index], title, told, title_color=EMOTION_COLORS[emotion]))
    return cells


def mixture_cells(made: dict[float, list], number_of_prompts: int) -> list[Cell]:
    """A row per pair, from the first emotion to the second, with the p of both by Emo-B."""
    seen = {share: probabilities(images)["Emo-B"] for share, images in made.items()}
    cells = []
    for number, (first, second) in enumerate(PAIRS):
        index = (number % number_of_prompts) * len(PAIRS) + number  # another prompt in each row
        for share, images in sorted(made.items()):
            weights = f"{100 - round(100 * share)} : {round(100 * share)}"
            cells.append(Cell(images[index], weights, p_of(seen[share][index], first, second)))
    return cells


def mask_cells(made: dict[str, list], items: Sequence[dict]) -> list[Cell]:
    """Rows of another source or emotion each: the source, mask and edit for each mask, and the edit everywhere."""
    shapes = masks(items[0]["source"].size)
    cells = []
    for index in range(0, len(items), max(1, 2 * len(items) // len(EMOTIONS) - 1)):
        emotion = items[index]["emotion"]
        cells.append(Cell(items[index]["source"], "source"))
        for name in [name for name in made if shapes[name] is not None]:
            cells += [Cell(shapes[name], "mask"), Cell(made[name][index], emotion)]
        cells.append(Cell(made["everywhere"][index], f"{emotion}, no mask"))
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
    parser = argparse.ArgumentParser(description="Measure strengths, mixtures and masks on Storybook.")
    parser.add_argument("--prompts", type=int, default=8, help="prompts, each with all 8 emotions (62 at most)")
    parser.add_argument("--mixed_prompts", type=int, default=8, help="those of them that are made with mixtures")
    parser.add_argument("--sources", type=int, default=4, help="drawings to edit, each towards all 8 emotions")
    parser.add_argument("--strengths", type=float, nargs="+", default=STRENGTHS, help="Default: %(default)s.")
    parser.add_argument("--guidance_scale", type=float, default=7.5)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of UNet and decoder")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--images_dir", type=Path, default=Path("outputs/blends"))
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    load(args.dtype, args.threads)
    items, edits = items_of_generation(args.prompts), items_of_editing(args.sources)
    strengths = {
        value: pictures(strength_setting(value), items, args) for value in sorted({*SHOWN_STRENGTHS, *args.strengths})
    }
    mixtures = {place: single_emotions(strengths[1], args.mixed_prompts, place) for place in (0, 1)}
    mixtures |= {
        share: pictures(Setting(f"mixture_{share:g}"), items_of_mixture(args.mixed_prompts, share), args)
        for share in SHARES
    }
    mixtures = dict(sorted(mixtures.items()))
    masked = {
        name: pictures(mask_setting(name, mask), edits, args) for name, mask in masks(edits[0]["source"].size).items()
    }
    names = ("prompts", "mixed_prompts", "sources", "guidance_scale", "dtype", "threads", "batch_size")
    record = {
        "protocol": {name: getattr(args, name) for name in names} | {"muse": CALL | MusePipeline.presets["full"]},
        "hardware": f"{os.cpu_count()} cores of an {processor()}",
        "versions": versions(),
        "strength": measure_strengths(strengths, items),
        "mixtures": measure_mixtures(mixtures, args.mixed_prompts),
        "masks": measure_masks(masked, edits),
    }
    args.results_dir.mkdir(parents=True, exist_ok=True)
    (args.results_dir / "blends.json").write_text(json.dumps(record, indent=1) + "\n")
    plot(record, args.results_dir / "blends.png")
    sheets = {
        "strengths": contact_sheet(strength_cells(strengths, items), len(SHOWN_STRENGTHS)),
        "mixtures": contact_sheet(mixture_cells(mixtures, args.mixed_prompts), len(mixtures)),
        "masks": contact_sheet(mask_cells(masked, edits), 2 * len(masked)),
    }
    for name, sheet in sheets.items():
        save_small(sheet, args.results_dir / f"blends_{name}.png")
    told = {task: record[task]["rows"] for task in ("strength", "mixtures", "masks")}
    print(json.dumps(told, indent=1))


if __name__ == "__main__":
    main()
