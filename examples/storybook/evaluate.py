# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Measures MUSE on Storybook against the stock pipeline and Universal Guidance, in one run.

Generation: prompts of the world, each with the 8 emotions. Editing: held-out drawings without an
emotion, edited towards each. Emo-A is the classifier that guides, so the honest accuracies are those of the judges
Emo-B (another architecture) and Emo-C (trained on another drawing style), which never guide. "Degraded" are their
answers to eight mildly blurred, shifted, recoloured and noisy copies of each image: what is lost there beyond what
drawings lose, which are the first row, only the judge had seen. CLIP and the Frechet distance (FID) use a
CLIP of their own, which no pipeline sees. Writes a Markdown table, JSON and a plot; a setting that was measured before
is not measured again.

    python examples/storybook/evaluate.py
    python examples/storybook/evaluate.py --xl    # fewer rows, for the SDXL-shaped checkpoint and MuseXLPipeline
"""

import argparse
import json
import multiprocessing
import os
import random
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from assemble_xl import FOLDER as XL
from assemble_xl import assemble
from common import frechet_distance
from judges import load_judge
from modeling_simemo import SimEmoForImageClassification
from muse_examples.degradations import COPIES, MOST, degraded
from muse_examples.evaluation.universal_guidance import universal_guidance
from muse_examples.measuring import processor
from muse_examples.pipelines import settings_of
from repository import ROOT
from tqdm import tqdm
from transformers import CLIPTokenizer, PreTrainedModel
from world import CUES, EMOTIONS, PLACES, SUBJECTS, contact_sheet, content_prompt, render, sample_scene

from pipeline_muse import MusePipeline, PixelSpec
from pipeline_muse_xl import MuseXLPipeline


MUSE = "MUSE"  # the row of the whole method
NO_PULL = {"inherent_weight": 0.0, "similar_weight": 0.0}


CALL: dict[str, Any] = settings_of(str(ROOT))["call"]  # all else is the preset "full"
TUNED_ON = 2  # prompts that served to choose the settings, so they are not measured on
PIXELS = json.loads((ROOT / "vae" / "config.json").read_text())["sample_size"]  # of a side of a picture
PROCESS: dict[str, Any] = {}  # the pipeline and the judges of a worker process


@dataclass(frozen=True)
class Setting:
    """A row of the table: a way to make images, and its arguments."""

    name: str
    kind: str = "muse"  # "muse", "drawing", "stock", "word", "cue", "universal", "edit" or "edit_from_source"
    arguments: dict[str, Any] = field(default_factory=dict)


def generation_settings(thresholds: dict[float, str], xl: bool = False) -> list[Setting]:
    """The rows of the generation table, in its order; fewer for XL."""
    universal = [Setting(f"Universal Guidance, weight {w:g}", "universal", {"weight": w}) for w in (5.0, 30.0)]
    ablations = [
        Setting("MUSE without the inherent term", arguments={"inherent_weight": 0.0}),
        Setting("MUSE without the similar term", arguments={"similar_weight": 0.0}),
        Setting("MUSE without both", arguments=NO_PULL),
    ]
    return [
        Setting("stock, prompt alone", "stock"),
        Setting("stock, emotion's word in the prompt", "word"),
        Setting("stock, one of the emotion's cues in the prompt", "cue"),
        *([] if xl else universal),
        Setting(MUSE),
        *([] if xl else ablations),
        Setting("MUSE without optimisation", arguments={"max_inner_steps": 0}),
        *(
            Setting(name, arguments={"semantic_threshold": value})
            for value, name in thresholds.items()
            if name != MUSE
        ),
    ]


def editing_settings(xl: bool = False) -> list[Setting]:
    """Both references of guidance at three strengths, for XL at one."""
    return [
        Setting(f"edit, {reference} prompt, strength {strength:g}", kind, {"strength": strength})
        for reference, kind in {"source": "edit_from_source", "null": "edit"}.items()
        for strength in ((0.75,) if xl else (0.5, 0.75, 1.0))
    ]


# --------------------------------------------------------------------------------------
# Making images
# --------------------------------------------------------------------------------------


def make_images(pipe: MusePipeline, setting: Setting, items: list[dict], call: dict) -> tuple[list, list[dict]]:
    """Images of one batch of items, and what the trace told about each."""
    if setting.kind == "drawing":
        return [item["drawing"] for item in items], [{} for _ in items]
    prompts, emotions = [item["prompt"] for item in items], [item["emotion"] for item in items]
    call = {**call, "generator": [torch.Generator().manual_seed(item["seed"]) for item in items]}
    if setting.kind == "universal":
        return universal_guidance(pipe, prompts, emotions, **setting.arguments, **call), [{} for _ in items]
    if setting.kind in ("stock", "word", "cue"):
        names = {"stock": "prompt", "word": "word_prompt", "cue": "cue_prompt"}
        prompts = [item[names[setting.kind]] for item in items]
        return pipe(prompts, **call).images, [{} for _ in items]
    if setting.kind.startswith("edit"):
        call["image"] = [item["source"] for item in items]
    if setting.kind == "edit_from_source":
        call["negative_prompt"] = prompts
    output = pipe(prompts, emotion=emotions, **{**call, **setting.arguments})
    traces = [{"gate_step": trace.gate_step, "inner_steps": trace.inner_steps} for trace in output.trace]
    return output.images, traces


def shuffled_contents() -> list[tuple[str, str]]:
    """All places with all subjects, in an order that spreads both."""
    contents = [(place, subject) for place in PLACES for subject in SUBJECTS]
    random.Random(0).shuffle(contents)
    return contents


def items_of_generation(number_of_prompts: int) -> list[dict]:
    """Prompt, emotion and seed of every image; the same for every setting. Prompts are spread over the world."""
    items = []
    for index, (place, subject) in enumerate(shuffled_contents()[TUNED_ON : TUNED_ON + number_of_prompts]):
        prompt = content_prompt(place, subject)
        for emotion in EMOTIONS:
            cue = random.Random(f"{index}/{emotion}").choice(CUES[emotion])
            prompts = {"prompt": prompt, "word_prompt": f"{prompt}, {emotion}", "cue_prompt": f"{prompt} {cue}"}
            items.append({**prompts, "emotion": emotion, "seed": 1000 + index})
    return items


def items_of_drawings(number_of_each: int) -> list[dict]:
    """Held-out drawings of each emotion, for what the judges make of an emotion that is there."""
    items = []
    for index in range(number_of_each * len(EMOTIONS)):
        emotion = EMOTIONS[index % len(EMOTIONS)]
        scene = sample_scene(random.Random(f"evaluate/drawing/{index}"), emotion=emotion)
        drawing = {"prompt": content_prompt(scene.place, scene.subject), "drawing": render(scene)}
        items.append({**drawing, "emotion": emotion})
    return items


def items_of_editing(number_of_sources: int) -> list[dict]:
    """Held-out drawings without an emotion, each with its caption and every emotion."""
    items = []
    for index in range(number_of_sources):
        scene = sample_scene(random.Random(f"evaluate/edit/{index}"), emotion=None)
        content = {"prompt": content_prompt(scene.place, scene.subject), "source": render(scene, PIXELS)}
        items += [{**content, "emotion": emotion, "seed": 2000 + index} for emotion in EMOTIONS]
    return items


# --------------------------------------------------------------------------------------
# Judging them
# --------------------------------------------------------------------------------------


def to_pixels(images: list) -> torch.Tensor:
    """PIL images as pixels in [-1, 1], shape `(n, 3, H, W)`."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


class Judges:
    """Everything that looks at finished images."""

    def __init__(self, root: Path, reference: list) -> None:
        guide = SimEmoForImageClassification.from_pretrained(root / "emotion_classifier").eval()
        self.classifiers = {"Emo-A": guide, "Emo-B": load_judge("emo_b"), "Emo-C": load_judge("emo_c")}
        self.spec = PixelSpec.from_classifier(guide)  # the judges were trained on the same pixels
        self.clip = load_judge("clip")
        self.tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer")
        self.reference = self.image_embeds(reference)

    @torch.no_grad()
    def image_embeds(self, images: list) -> torch.Tensor:
        """Held-out CLIP features on the unit sphere, shape `(n, D)`."""
        spec = PixelSpec.from_clip(self.clip)
        parts = [spec.prepare(to_pixels(images[i : i + 64])) for i in range(0, len(images), 64)]
        features = [self.clip.visual_projection(self.clip.vision_model(part).pooler_output) for part in parts]
        return F.normalize(torch.cat(features), dim=-1)

    @torch.no_grad()
    def text_embeds(self, prompts: list[str]) -> torch.Tensor:
        """Held-out CLIP features on the unit sphere, shape `(n, D)`."""
        tokens = self.tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        pooled = self.clip.text_model(**tokens).pooler_output
        return F.normalize(self.clip.text_projection(pooled), dim=-1)

    @torch.no_grad()
    def answers(self, model: PreTrainedModel, pixels: torch.Tensor) -> list[str]:
        """The labels that a classifier gives to pixels in [-1, 1]."""
        logits = torch.cat([model(pixel_values=self.spec.prepare(part)).logits for part in pixels.split(256)])
        return [model.config.id2label[int(index)] for index in logits.argmax(dim=-1)]

    @torch.no_grad()
    def judge(self, images: list, items: list[dict]) -> dict[str, float]:
        """The columns of the table, in per cent where they are shares."""
        row, pixels = {}, to_pixels(images)
        intended = [item["emotion"] for item in items]
        copies = degraded(pixels).flatten(0, 1)
        for name, model in self.classifiers.items():
            row[name] = 100 * float(np.mean(np.equal(self.answers(model, pixels), intended)))
            row[f"{name} degraded"] = 100 * float(np.mean(np.equal(self.answers(model, copies), intended * COPIES)))
        embeds = self.image_embeds(images)
        row["CLIP"] = 100 * float((embeds * self.text_embeds([item["prompt"] for item in items])).sum(-1).mean())
        if "source" in items[0]:
            sources = self.image_embeds([item["source"] for item in items])
            row["CLIP image"] = float((embeds * sources).sum(-1).mean())
        else:
            row["FID"] = 100 * frechet_distance(embeds, self.reference)
        return row


# --------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------


def load(dtype: str, threads: int, xl: bool = False) -> None:
    """Loads, once per process, what all its settings share."""
    torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as scratch:
        kind, base = (MuseXLPipeline, assemble(Path(scratch) / "xl")) if xl else (MusePipeline, ROOT)
        pipe = kind.from_pretrained(base, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    for module in (pipe.unet, pipe.vae, pipe.text_encoder, *([pipe.text_encoder_2] if xl else [])):
        module.to(getattr(torch, dtype))
    scenes = [sample_scene(random.Random(f"evaluate/reference/{index}")) for index in range(1024)]
    PROCESS["pipe"], PROCESS["judges"] = pipe, Judges(ROOT, [render(scene) for scene in scenes])


def measure(setting: Setting, items: list[dict], args: argparse.Namespace) -> dict[str, Any]:
    """Makes and judges all images of a setting; keeps them for a look."""
    call = {"num_inference_steps": args.steps, "guidance_scale": args.guidance_scale}
    images, traces, start = [], [], time.perf_counter()
    for i in range(0, len(items), args.batch_size):
        made, told = make_images(PROCESS["pipe"], setting, items[i : i + args.batch_size], call)
        images += made
        traces += told
    row = {"seconds": (time.perf_counter() - start) / len(items), **PROCESS["judges"].judge(images, items)}
    gates = [trace["gate_step"] for trace in traces if trace.get("gate_step") is not None]
    if "gate_step" in traces[0]:
        row["inner steps"] = float(np.mean([trace["inner_steps"] for trace in traces]))
        row["gate"] = float(np.mean(gates)) if gates else None
        row["open"] = 100 * len(gates) / len(traces)
    save_sheet(images[: 8 * args.sheet_rows], args.sheets_dir / f"{setting.name.replace(' ', '_')}.png")
    return row


def save_sheet(images: list, path: Path) -> None:
    """A contact sheet, one prompt a row."""
    path.parent.mkdir(parents=True, exist_ok=True)
    contact_sheet(images, columns=8, scale=2).save(path)


def markdown(rows: dict[str, dict], columns: list[str]) -> str:
    """The rows as a Markdown table."""

    def cell(value: float | None, column: str) -> str:
        digits = 2 if column in ("CLIP image", "seconds", "FID") else 1
        return "–" if value is None else f"{value:.{digits}f}"

    lines = ["| setting | " + " | ".join(columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for name, row in rows.items():
        lines.append(f"| {name} | " + " | ".join(cell(row.get(column), column) for column in columns) + " |")
    return "\n".join(lines)


def plot(generation: dict[str, dict], editing: dict[str, dict], thresholds: dict[float, str], path: Path) -> None:
    """Accuracy against content: all settings, the threshold's curve, and editing."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 3, figsize=(16, 4.8), layout="constrained")
    for name, row in generation.items():
        if name == MUSE or name not in thresholds.values():
            axes[0].scatter(row["CLIP"], row["Emo-B"], s=50, label=name, marker="*" if name == MUSE else "o")
    axes[0].set(title="Settings", xlabel="CLIP (content kept)", ylabel="Emo-B accuracy [%]")
    axes[0].legend(fontsize=7)
    curve = [generation[name] for name in thresholds.values()]
    names = [f"{value:g}" for value in thresholds]
    axes[1].plot(names, [row["Emo-B"] for row in curve], marker="o", label="Emo-B accuracy [%]")
    axes[1].plot(names, [row["CLIP"] for row in curve], marker="s", label="CLIP")
    axes[1].set(title="WHEN: the threshold η", xlabel="η")
    axes[1].legend()
    for reference, marker in (("source", "o"), ("null", "s")):
        chosen = {name: row for name, row in editing.items() if f" {reference} " in name}
        x, y = [row["CLIP image"] for row in chosen.values()], [row["Emo-B"] for row in chosen.values()]
        axes[2].plot(x, y, marker=marker, label=f"{reference} prompt")
        for name, row in chosen.items():
            axes[2].annotate(name.split()[-1], (row["CLIP image"], row["Emo-B"]), fontsize=8)
    axes[2].set(title="Editing at several strengths", xlabel="CLIP image similarity", ylabel="Emo-B accuracy [%]")
    axes[2].legend()
    figure.savefig(path, dpi=90)
    plt.close(figure)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Measure MUSE on Storybook.")
    parser.add_argument("--prompts", type=int, default=8, help="prompts, each with all 8 emotions (62 at most)")
    parser.add_argument("--sources", type=int, default=4, help="drawings to edit, each towards all 8 emotions")
    parser.add_argument("--drawings_of_each", type=int, default=38, help="drawings of each emotion to compare with")
    parser.add_argument("--steps", type=int, default=CALL["num_inference_steps"], help="denoising steps")
    parser.add_argument("--guidance_scale", type=float, help="the pipeline's own by default: 7.5, of XL 5.0")
    parser.add_argument("--xl", action="store_true", help="measure the SDXL-shaped checkpoint")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16", help="of UNet and decoder")
    parser.add_argument("--workers", type=int, default=2, help="settings that are measured at a time")
    parser.add_argument("--batch_size", type=int, default=16)
    parser.add_argument("--sheet_rows", type=int, default=6, help="prompts on each contact sheet")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--sheets_dir", type=Path, default=Path("outputs/evaluation"), help="for contact sheets")
    parser.add_argument("--again", action="store_true", help="measure again what was measured before")
    args = parser.parse_args()
    if args.guidance_scale is None:
        args.guidance_scale = 5.0 if args.xl else 7.5
    return args


def main() -> None:
    args = parse_args()
    index = XL / "index.json" if args.xl else ROOT / "model_index.json"
    eta = json.loads(index.read_text())["semantic_threshold"]
    between = [] if args.xl else [round(0.85 * eta, 1), round(1.1 * eta, 1)]
    values = sorted([0.0, eta, float("inf"), *between])
    thresholds = {value: MUSE if value == eta else f"MUSE, η = {value:g}" for value in values}
    drawings = [Setting("drawings of the emotion, held out", "drawing")]
    settings = {
        "drawings": (drawings, items_of_drawings(args.drawings_of_each)),
        "generation": (generation_settings(thresholds, args.xl), items_of_generation(args.prompts)),
        "editing": (editing_settings(args.xl), items_of_editing(args.sources)),
    }
    muse = dict((MuseXLPipeline if args.xl else MusePipeline).presets["full"])
    results = args.results_dir / ("evaluation_xl" if args.xl else "evaluation")
    names = ("prompts", "sources", "drawings_of_each", "steps", "guidance_scale", "batch_size", "dtype", "workers")
    protocol = {name: getattr(args, name) for name in names} | {
        "muse": muse,
        "semantic_threshold": eta,
        "degradations": {"copies": COPIES, **MOST},
    }
    args.results_dir.mkdir(parents=True, exist_ok=True)
    record_path = results.with_suffix(".json")
    record = json.loads(record_path.read_text()) if record_path.exists() and not args.again else {}
    if record.get("protocol") != protocol:
        record = {"protocol": protocol, **{task: {} for task in settings}}
    record["hardware"] = f"{os.cpu_count()} cores of an {processor()}, torch {torch.__version__}"

    waiting = [(task, row) for task, (rows, _) in settings.items() for row in rows if row.name not in record[task]]
    threads = max(1, (os.cpu_count() or 1) // args.workers)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, initializer=load, initargs=(args.dtype, threads, args.xl)) as pool:
        jobs = {pool.submit(measure, row, settings[task][1], args): (task, row) for task, row in waiting}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="settings"):
            task, setting = jobs[job]
            record[task][setting.name] = job.result()
            values = ", ".join(f"{key} {value:.2f}" for key, value in job.result().items() if value is not None)
            tqdm.write(f"{setting.name}: {values}")
            record_path.write_text(json.dumps(record, indent=1) + "\n")

    rows = {task: {row.name: record[task][row.name] for row in chosen} for task, (chosen, _) in settings.items()}
    columns = ["Emo-A", "Emo-B", "Emo-C", "Emo-B degraded", "Emo-C degraded", "CLIP"]
    text = (
        f"Measured by `examples/storybook/evaluate.py{' --xl' if args.xl else ''}` on {record['hardware']}:"
        f" {args.prompts} prompts x 8 emotions,"
        f" {args.steps} DDIM steps, guidance {args.guidance_scale:g}, {args.dtype}, one seed per prompt."
        f" Chance is 12.5. η is {eta:g} unless named. Seconds are per image, in batches of {args.batch_size},"
        f" {args.workers} settings at a time on as many processes. Degraded is the mean over {COPIES} mildly degraded"
        " copies of each image.\n\n"
        + markdown(rows["drawings"] | rows["generation"], [*columns, "FID", "open", "gate", "inner steps", "seconds"])
        + f"\n\nEditing {args.sources} held-out drawings towards 8 emotions each:\n\n"
        + markdown(rows["editing"], [*columns, "CLIP image", "open", "gate", "inner steps", "seconds"])
        + "\n"
    )
    results.with_suffix(".md").write_text(text)
    plot(rows["generation"], rows["editing"], thresholds, results.with_suffix(".png"))
    print(text)


if __name__ == "__main__":
    main()
