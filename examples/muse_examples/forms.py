# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What stands on the app's page, and the call of the pipeline that it asks for."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from uuid import uuid4

from PIL import Image, ImageChops

from muse_examples import REPOSITORY
from muse_examples.options import parse_emotion
from muse_examples.pipelines import lacks, settings_of
from muse_examples.runs import Job
from pipeline_muse import to_rgb


LONGEST_SIDE = 1536  # px, of photographs as they are worked on

DIALS = ("emotion_strength", "strength")  # within (0, 1], 1 by default
NUMBERS = {  # empty: the base's, or the preset's
    "num_inference_steps": int,
    "guidance_scale": float,
    "width": int,
    "height": int,
    "semantic_threshold": float,
    "latest_start": float,
}


@dataclass(frozen=True)
class Form:
    """What stands on the page."""

    prompt: str
    emotion: str
    photo: str | None = None
    only_painted: bool = False
    painted: dict[str, Any] | None = None  # of gradio's ImageEditor
    seed: float | None = 0
    preset: str = "full"
    emotion_strength: float = 1.0
    strength: float = 1.0
    negative_prompt: str = ""
    num_inference_steps: str = ""
    guidance_scale: str = ""
    width: str = ""
    height: str = ""
    semantic_threshold: str = ""
    latest_start: str = ""
    base: str = ""
    classifier: str = ""
    dtype: str = ""
    caption_model: str = ""


def read_photo(path: str) -> Image.Image:
    """A photograph, upright, in RGB, and no larger than it is worked on."""
    try:
        with Image.open(path) as image:
            picture = to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"This file cannot be read as a picture: {error}") from error
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return picture


def painted_mask(painted: dict[str, Any] | None, size: tuple[int, int]) -> Image.Image:
    """What the brush left on the layers of an ImageEditor, white on black."""
    mask = Image.new("L", size)
    for layer in (painted or {}).get("layers") or []:
        mask = ImageChops.lighter(mask, layer.convert("RGBA").getchannel("A").resize(size))
    if mask.getextrema()[1] == 0:
        raise ValueError("Paint where the emotion should act, or take the tick away from “only where I paint”.")
    return mask


def job_of(form: Form, folder: Path) -> Job:
    """The picture that a form asks for. Writes the photograph and its mask to `folder`."""
    prompt, emotion = form.prompt.strip(), parse_emotion((form.emotion or "none").strip())
    source = mask = None
    if form.photo:
        if not prompt:
            raise ValueError("Say in the first box what the photograph shows.")
        photo, source = read_photo(form.photo), folder / f"{uuid4().hex}.png"
        photo.save(source)
        if form.only_painted:
            mask = folder / f"{uuid4().hex}.png"
            painted_mask(form.painted, photo.size).save(mask)
    elif not prompt:
        raise ValueError("Say in the first box what the picture should show.")
    seed = int(form.seed or 0)
    return Job(prompt, emotion, seed, source, mask, "muse", form.negative_prompt.strip() or None)


def options_of(form: Form, base: str) -> dict[str, Any]:
    """The arguments of the pipeline, besides those of the job, that a form asks for."""
    given: dict[str, Any] = {"preset": form.preset}
    given |= {name: getattr(form, name) for name in DIALS if getattr(form, name) < 1}
    if not form.photo:
        given.pop("strength", None)
    for name, kind in NUMBERS.items():
        if text := getattr(form, name).strip():
            try:
                given[name] = kind(text)
            except ValueError:
                raise ValueError(f"{name} has to be a number, or empty, but is {text!r}.") from None
            if kind is int and given[name] < 1:
                raise ValueError(f"{name} has to be at least 1, or empty.")
    return settings_of(base).get("call", {}) | given


def as_python(job: Job, options: dict[str, Any], args: argparse.Namespace, photo: str) -> str:
    """The same call in a script of one's own."""
    lines = ["import torch", "from diffusers import DiffusionPipeline"]
    lines += ["from PIL import Image"] if job.source else []
    is_own = Path(args.base).resolve() == REPOSITORY
    loading = ['".",  # Storybook, from the root of a clone' if is_own else repr(args.base), "trust_remote_code=True"]
    if args.dtype != "float32":
        loading.append(f"dtype=torch.{args.dtype}")
    if not is_own:
        loading.append('custom_pipeline="your-namespace/muse"')
        if lacks("clip_model", args.base, args.revision):
            lines.append("from transformers import CLIPModel")
            loading.append(f"clip_model=CLIPModel.from_pretrained({args.clip!r}, dtype=torch.{args.dtype})")
    lines += ["", "pipe = DiffusionPipeline.from_pretrained("]
    lines += [f"    {part}" if "#" in part else f"    {part}," for part in loading]
    lines += [f').to("{args.device}")' if args.device != "cpu" else ")"]
    if args.classifier:
        lines.append(f"pipe.load_emotion_classifier({args.classifier!r}, trust_remote_code=True)")
    call: dict[str, Any] = {"emotion": job.emotion, "negative_prompt": job.negative_prompt, **options}
    lines += ["output = pipe(", f"    {job.prompt!r},"]
    lines += [f"    {name}={value!r}," for name, value in call.items() if value is not None]
    if job.source:
        lines.append(f"    image=Image.open({photo!r}),")
    if job.mask:
        lines.append('    mask_image=Image.open("mask.png"),  # white where the emotion acts')
    lines += [f"    generator=torch.Generator().manual_seed({job.seed}),", ")", 'output.images[0].save("picture.png")']
    return "\n".join(lines) + "\n"
