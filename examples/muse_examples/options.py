# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The options that scripts have in common, and how a script ends an error."""

import argparse
import math
import re
from collections.abc import Callable
from dataclasses import Field, fields
from functools import wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, get_args, get_type_hints

import torch
from PIL import Image
from safetensors.torch import load_file

from muse_examples import REPOSITORY
from muse_examples.files import read_text
from muse_examples.pipelines import CLIP_OF_STABLE_DIFFUSION, DTYPES, default_device, settings_of
from pipeline_muse import MIKELS_WHEEL, GuidanceSettings, MusePipeline


# What a user can mend: files, options, memory, packages. All else is a fault of the program and keeps its traceback.
USERS_ERRORS = (OSError, ValueError, TypeError, ImportError, MemoryError, torch.OutOfMemoryError)

# Options of the scripts that are arguments of the pipeline by the same name, where given.
SETTINGS = tuple(field.name for field in fields(GuidanceSettings))
PLAIN = ("height", "width", "strength", "num_inference_steps", "guidance_scale", "preset", "emotion_tokens")
CALL_OPTIONS = PLAIN + SETTINGS

Given = ParamSpec("Given")
Returned = TypeVar("Returned")


def one_line_errors(main: Callable[Given, Returned]) -> Callable[Given, Returned]:
    """Has a script end `USERS_ERRORS` in one line and the exit status 1, as argparse ends what it finds."""

    @wraps(main)
    def wrapped(*arguments: Given.args, **keywords: Given.kwargs) -> Returned:
        try:
            return main(*arguments, **keywords)
        except USERS_ERRORS as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()]
            raise SystemExit(f"error: {lines[0] if lines else type(error).__name__}") from error

    return wrapped


# --------------------------------------------------------------------------------------
# Types of options
# --------------------------------------------------------------------------------------


def number(low: float, high: float = math.inf, low_included: bool = True) -> Callable[[str], float]:
    """The type of options that lie within `low` and `high`, the former of which may be left out."""

    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not (low <= value <= high) or (value == low and not low_included):
            bracket = "[" if low_included else "("
            raise argparse.ArgumentTypeError(f"{text!r} is not within {bracket}{low:g}, {high:g}]")
        return value

    return parse


share = number(0, 1, low_included=False)


def positive_int(text: str) -> int:
    """The type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def parse_emotion(text: str) -> str | dict[str, float] | None:
    """
    Reads an emotion from the command line: `awe`, a mixture such as `awe=0.7,fear=0.3`, or `none`.

    Args:
        text (`str`): The option's value.

    Returns:
        `str`, `dict[str, float]` or `None`: What the pipeline takes as `emotion`.

    Raises:
        argparse.ArgumentTypeError: If a weight is missing, negative or not finite, or a label is named twice.
    """
    if text.lower() == "none":
        return None
    if "=" not in text and "," not in text:
        return text
    mixture: dict[str, float] = {}
    for part in text.split(","):
        label, _, weight = (piece.strip() for piece in part.partition("="))
        try:
            amount = float(weight)
        except ValueError:
            amount = math.nan
        if not label or not 0 <= amount < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a mixture such as awe=0.7,fear=0.3")
        if label in mixture:
            raise argparse.ArgumentTypeError(f"{text!r} names {label} twice; give each emotion one weight")
        mixture[label] = amount
    return mixture


def existing_file(text: str) -> Path:
    """The type of options that name a file."""
    path = Path(text)
    if path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a folder; name files in it, such as {path / '*'}")
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def existing_folder(text: str) -> Path:
    """The type of options that name a folder."""
    path = Path(text)
    if not path.is_dir():
        raise argparse.ArgumentTypeError(f"there is no folder {text!r}")
    return path


def output_folder(text: str) -> Path:
    """The type of options that name a folder to write to."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file")
    return path


def picture_file(text: str) -> Path:
    """The type of options that name a picture."""
    path = existing_file(text)
    try:
        Image.open(path).close()
    except (OSError, Image.DecompressionBombError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be opened as a picture: {error}") from error
    return path


def prompts_file(text: str) -> list[str]:
    """The type of options that name a file with one prompt per line, without blank lines and `#` comments."""
    try:
        lines = read_text(existing_file(text)).split("\n")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8: {error}") from error
    prompts = [line.strip() for line in lines if line.strip() and not line.strip().startswith("#")]
    if not prompts:
        raise argparse.ArgumentTypeError(f"{text!r} holds no prompts")
    return prompts


PROMPTS_HELP = "a text file with one prompt per line; blank lines and those that start with # are left out"


def start_tokens(text: str) -> str | Path:
    """The type of `--emotion_tokens`."""
    return text if text in ("random", "emotion") else existing_file(text)


def meaning(name: str) -> str:
    """What the pipeline's documentation says of one of its arguments, in one sentence; empty if nothing."""
    found = re.search(rf"^ *{name} \(.*?\): (.*?)(?=^ *\w+ \(|^ *$)", MusePipeline.__call__.__doc__ or "", re.M | re.S)
    text = " ".join(found[1].split()) if found else ""
    return text.partition(". ")[0].removesuffix(".").replace("%", "%%")


def setting(field: Field) -> Callable[[str], Any]:
    """The type of an option that is a field of `GuidanceSettings`, which knows its range."""
    hint = get_type_hints(GuidanceSettings)[field.name]
    (kind,) = {*(get_args(hint) or [hint])} - {type(None)}

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(f"{text!r} is no {kind.__name__}") from error
        try:
            GuidanceSettings(**{field.name: value})
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error
        return value

    return parse


# --------------------------------------------------------------------------------------
# Groups of options
# --------------------------------------------------------------------------------------


def many_pictures_parser(description: str, output_dir: Path) -> argparse.ArgumentParser:
    """The options of a script that makes each of many pictures with each of many emotions."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--emotion",
        nargs="+",
        type=parse_emotion,
        default=list(MIKELS_WHEEL),
        help="emotions, mixtures such as awe=0.7,fear=0.3, or none; each picture is made with each. Words that the "
        "classifier does not know are left to CLIP. "
        "Default: the eight of Mikels' wheel.",
    )
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--output_dir",
        type=output_folder,
        help=f"default: {output_dir}, or where that holds other pictures {output_dir}-2, …; the same command goes on "
        "where it ended",
    )
    add_size_options(parser)
    add_model_options(parser)
    add_guidance_options(parser)
    add_memory_options(parser)
    return parser


def add_size_options(parser: argparse.ArgumentParser) -> None:
    """Adds the size of the pictures."""
    parser.add_argument(
        "--height", type=positive_int, help="in px, a multiple of 8; default: what suits base and picture"
    )
    parser.add_argument("--width", type=positive_int, help="in px, a multiple of 8; default: likewise")


def check_size(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program where the options of `add_size_options` make no sense."""
    for name in ("height", "width"):
        if (getattr(args, name) or 0) % 8:
            parser.error(f"--{name} has to be a multiple of 8")


def add_model_options(parser: argparse.ArgumentParser, guide: str = "--classifier") -> None:
    """Adds the options that say which models to load, and how; `guide` is what the one of the classifier is called."""
    group = parser.add_argument_group("models")
    group.add_argument(
        "--base",
        default=str(REPOSITORY),
        help="Stable Diffusion checkpoint, 1.x, 2.x or XL, a Hub id or a path. Default: Storybook, which is bundled.",
    )
    group.add_argument("--revision", help="revision of the base on the Hub")
    group.add_argument("--variant", help="variant of the base's weights, such as fp16")
    group.add_argument(
        "--clip",
        default=CLIP_OF_STABLE_DIFFUSION,
        help="CLIP of the semantic gate, for bases that bring none. Default: %(default)s.",
    )
    group.add_argument(
        guide,
        dest="classifier",
        help="emotion classifier that guides, a Hub id, a path, or a judge's name; its repository's code is trusted. "
        "Default: the base's own, or zero-shot by the gate's CLIP where it has none.",
    )
    group.add_argument("--preview_vae", help="AutoencoderTiny that decodes previews faster, a Hub id or a path")
    add_device_options(group)


def add_device_options(group: argparse._ActionsContainer) -> None:
    """Adds the options that say where models run, and how exactly."""
    group.add_argument("--device", default=default_device(), help="Default: %(default)s.")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="Default: %(default)s.")


def add_memory_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that trade time for memory."""
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations of UNet and decoder while optimising: much less memory, a third more time",
    )
    group.add_argument("--attention_slicing", action="store_true", help="compute attention in slices")
    group.add_argument("--vae_slicing", action="store_true", help="decode one image at a time")
    group.add_argument("--model_cpu_offload", action="store_true", help="keep idle models in main memory")
    group.add_argument("--sequential_cpu_offload", action="store_true", help="keep idle layers in main memory (slow)")


def add_guidance_options(parser: argparse.ArgumentParser, preset: bool = True) -> None:
    """Adds the pipeline's own arguments; where one is not given, the preset's value holds."""
    group = parser.add_argument_group("guidance")
    if preset:
        group.add_argument(
            "--preset", choices=MusePipeline.presets, help="a set of what stands below; what is given wins"
        )
    group.add_argument("--num_inference_steps", type=positive_int, help="denoising steps")
    group.add_argument("--guidance_scale", type=float)
    group.add_argument(
        "--emotion_tokens",
        type=start_tokens,
        metavar="{random,emotion,FILE}",
        help="what the tokens start from: noise, the emotion's word, or a library of make_emotion_library.py",
    )
    for field in fields(GuidanceSettings):
        group.add_argument(f"--{field.name}", type=setting(field), help=meaning(field.name))


def call_options(args: argparse.Namespace) -> dict[str, Any]:
    """The pipeline's arguments: those of `CALL_OPTIONS` that were given, else what suits the base."""
    given = {name: vars(args).get(name) for name in CALL_OPTIONS}
    if isinstance(given["emotion_tokens"], Path):
        given["emotion_tokens"] = load_file(given["emotion_tokens"])
    return settings_of(args.base).get("call", {}) | {name: value for name, value in given.items() if value is not None}
