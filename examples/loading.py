# Copyright 2026 The MUSE pipelines authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What the example scripts share: their options, and how they load a pipeline."""

import argparse
import math
import os
import platform
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import uuid4

import numpy as np
import torch
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock
from PIL import Image
from safetensors.torch import load_file
from storybook_settings import MUSE_SETTINGS, MUSE_XL_SETTINGS
from transformers import CLIPModel, PreTrainedModel


REPOSITORY = Path(__file__).resolve().parent.parent
sys.path.append(str(REPOSITORY))  # a clone works without being installed

from pipeline_muse import EMOTION_OPTIMIZERS, MIKELS_WHEEL, MusePipeline, PixelSpec, to_rgb  # noqa: E402


# The CLIP whose text encoder Stable Diffusion 1.x and XL have.
CLIP_OF_STABLE_DIFFUSION = "openai/clip-vit-large-patch14"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

# Options of the scripts that are arguments of the pipeline by the same name, where given.
CALL_OPTIONS = (
    "negative_prompt",
    "height",
    "width",
    "strength",
    "guidance_reference",
    "num_inference_steps",
    "guidance_scale",
    "emotion_strength",
    "semantic_threshold",
    "max_inner_steps",
    "emotion_learning_rate",
    "emotion_optimizer",
    "update_interval",
    "patience",
    "keep_best",
    "preview_scale",
    "stop_probability",
    "num_emotion_tokens",
    "emotion_token_init",
    "max_inner_batch",
    "gradient_checkpointing",
)


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} CPU" if names else f"{platform.machine()} CPU"


def default_device() -> str:
    """The accelerator where there is one, else `"cpu"`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


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
            number = float(weight)
        except ValueError:
            number = math.nan
        if not label or label in mixture or not 0 <= number < math.inf:
            raise argparse.ArgumentTypeError(f"{text!r} is not a mixture such as awe=0.7,fear=0.3")
        mixture[label] = number
    return mixture


def emotion_name(emotion: str | dict[str, float] | None) -> str:
    """A short name for titles and files, such as `awe`, `awe70+fear30` (per cent), or `stock` for none."""
    if emotion is None:
        return "stock"
    if isinstance(emotion, str):
        return emotion
    total = sum(emotion.values()) or 1
    return "+".join(f"{label}{round(100 * weight / total)}" for label, weight in emotion.items())


def existing_file(text: str) -> Path:
    """The type of options that name a file."""
    path = Path(text)
    if not path.is_file():
        raise argparse.ArgumentTypeError(f"there is no file {text!r}")
    return path


def prompts_file(text: str) -> list[str]:
    """The type of options that name a file with one prompt per line; blank lines are left out."""
    try:
        lines = existing_file(text).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8: {error}") from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise argparse.ArgumentTypeError(f"{text!r} holds no prompts")
    return prompts


def output_folder(text: str) -> Path:
    """The type of options that name a folder to write to."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise argparse.ArgumentTypeError(f"{text!r} is a file")
    return path


PARTIAL = "muse-*.partial"  # what `whole_file` leaves where it is killed


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Yields the path to write to instead, which becomes `path` at the end: the file is there whole or not at all."""
    partial = path.with_name(PARTIAL.replace("*", uuid4().hex))
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def picture_file(text: str) -> Path:
    """The type of options that name a picture."""
    path = existing_file(text)
    try:
        Image.open(path).close()
    except (OSError, Image.DecompressionBombError) as error:
        raise argparse.ArgumentTypeError(f"{text!r} cannot be opened as a picture: {error}") from error
    return path


def positive_int(text: str) -> int:
    """The type of options that count something."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive integer")
    return int(text)


def share(text: str) -> float:
    """The type of options that lie in (0, 1]."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text!r} does not lie in (0, 1]")
    return number


def script_parser(description: str, output_dir: str) -> argparse.ArgumentParser:
    """The options of a script that makes each of many pictures with each of many emotions."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--emotion",
        nargs="+",
        type=parse_emotion,
        default=list(MIKELS_WHEEL),
        help="emotions, mixtures such as awe=0.7,fear=0.3, or none; each picture is made with each. "
        "Default: the eight of Mikels' wheel.",
    )
    parser.add_argument("--batch_size", type=positive_int, default=1, help="pictures at a time")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output_dir", type=output_folder, default=Path(output_dir), help="Default: %(default)s.")
    add_model_options(parser)
    add_guidance_options(parser)
    add_memory_options(parser)
    return parser


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say which models to load, and how."""
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
        "--classifier",
        help="emotion classifier that guides, a Hub id or a path; its repository's code is trusted. "
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
    group.add_argument("--max_inner_batch", type=positive_int, help="pictures of a batch that are optimised at a time")
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        default=None,
        help="recompute activations of UNet and decoder while optimising: much less memory, a third more time",
    )
    group.add_argument("--attention_slicing", action="store_true", help="compute attention in slices")
    group.add_argument("--vae_slicing", action="store_true", help="decode one image at a time")
    group.add_argument("--model_cpu_offload", action="store_true", help="keep idle models in main memory")
    group.add_argument("--sequential_cpu_offload", action="store_true", help="keep idle layers in main memory (slow)")


def add_guidance_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that are the pipeline's own arguments; its defaults hold where one is not given."""
    group = parser.add_argument_group("guidance")
    group.add_argument("--preset", choices=MusePipeline.presets, help="a set of what stands below; what is given wins")
    group.add_argument("--num_inference_steps", type=positive_int, help="denoising steps")
    group.add_argument("--guidance_scale", type=float)
    group.add_argument(
        "--emotion_strength",
        type=share,
        help="how much of the emotion's effect on each step is taken, in (0, 1]",
    )
    group.add_argument("--semantic_threshold", type=float, help="similarity at which the emotion sets in")
    group.add_argument("--max_inner_steps", type=positive_int, help="optimisation steps per denoising step, at most")
    group.add_argument("--emotion_learning_rate", type=float)
    group.add_argument("--emotion_optimizer", choices=EMOTION_OPTIMIZERS)
    group.add_argument(
        "--update_interval", type=positive_int, help="denoising steps from one look at gate and emotion to the next"
    )
    group.add_argument(
        "--patience", type=positive_int, help="updates with the emotion already there that end them all"
    )
    group.add_argument(
        "--no_keep_best", dest="keep_best", action="store_false", default=None, help="take the last tokens"
    )
    group.add_argument("--preview_scale", type=share, help="scale of the previews that guide, in (0, 1]")
    group.add_argument("--stop_probability", type=float, help="probability of the emotion that is enough")
    group.add_argument("--num_emotion_tokens", type=positive_int)
    group.add_argument("--emotion_token_init", choices=("random", "emotion"))
    group.add_argument(
        "--emotion_library", type=existing_file, help="tokens of each emotion to start from, safetensors"
    )


def storybook_settings(base: str) -> dict[str, Any]:
    """What suits the checkpoint in this repository's root, and the XL one that it can assemble; empty for others."""
    if Path(base).resolve() == REPOSITORY:
        return MUSE_SETTINGS
    index, ours = Path(base) / "model_index.json", REPOSITORY / "examples" / "storybook" / "xl" / "index.json"
    return MUSE_XL_SETTINGS if index.is_file() and index.read_bytes() == ours.read_bytes() else {}


def call_options(args: argparse.Namespace, presets: Mapping[str, dict]) -> dict:
    """The pipeline's arguments: those of `CALL_OPTIONS` that were given, else the preset's, else Storybook's."""
    given = {name: getattr(args, name, None) for name in CALL_OPTIONS}
    if args.emotion_library:
        given["emotion_tokens"] = load_file(args.emotion_library)
    chosen = {name: value for name, value in given.items() if value is not None}
    return {**storybook_settings(args.base), **presets.get(args.preset, {}), **chosen}


def lacks_clip(base: str, revision: str | None = None) -> bool:
    """Whether a checkpoint brings no CLIP for the semantic gate, as one that was made without MUSE in mind."""
    index = DiffusionPipeline.load_config(base, revision=revision)
    return not any(index.get("clip_model", ()))


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """
    Loads the base of `add_model_options` as a `MusePipeline`, with the models that it lacks, on its device.

    Args:
        args (`argparse.Namespace`): The options; those of `add_memory_options` are heeded if they are among them.

    Returns:
        `DiffusionPipeline`: A `MusePipeline`, ready to be called with an `emotion`.
    """
    dtype = DTYPES[args.dtype]  # `torch_dtype` below, as diffusers 0.38 does not know `dtype`
    models = {}
    if args.preview_vae:
        models["preview_vae"] = AutoencoderTiny.from_pretrained(args.preview_vae, torch_dtype=dtype)
    if lacks_clip(args.base, args.revision):
        models["clip_model"] = CLIPModel.from_pretrained(args.clip, dtype=dtype).eval()
    # Each load copies the custom code into one cache: another process would read a file that is half there.
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    with FileLock(Path(HF_MODULES_CACHE) / "muse.lock"):
        pipe = DiffusionPipeline.from_pretrained(
            args.base,
            revision=args.revision,
            variant=args.variant,
            torch_dtype=dtype,
            custom_pipeline=str(REPOSITORY),
            trust_remote_code=True,
            **models,
        )
        if args.classifier:
            pipe.load_emotion_classifier(args.classifier, trust_remote_code=True)
    return place(pipe, args)


def place(pipe: DiffusionPipeline, args: argparse.Namespace) -> DiffusionPipeline:
    """Moves the pipeline to its device by the options of `add_memory_options`, where `args` has them."""
    options = vars(args)
    if args.device == "cpu":  # there the backward pass of PyTorch's fused attention is slow
        pipe.unet.set_attn_processor(AttnProcessor())
    if options.get("attention_slicing"):
        pipe.enable_attention_slicing()
    if options.get("vae_slicing"):
        pipe.vae.enable_slicing()
    if options.get("sequential_cpu_offload"):
        pipe.enable_sequential_cpu_offload(device=args.device)
    elif options.get("model_cpu_offload"):
        pipe.enable_model_cpu_offload(device=args.device)
    else:
        pipe.to(args.device)
    return pipe


def load_judge(pipe: DiffusionPipeline, args: argparse.Namespace) -> PreTrainedModel | None:
    """
    Loads a classifier that says what a picture evokes, and that did not guide.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline` of `load_pipeline`.
        args (`argparse.Namespace`): Its options.

    Returns:
        `PreTrainedModel` or `None`: The judge of Storybook if that is the base; other bases have none.
    """
    if not storybook_settings(args.base):
        return None
    sys.path.append(str(REPOSITORY / "examples" / "storybook"))
    from judges import load_judge as load_storybook_judge

    return load_storybook_judge("emo_b").to(pipe.device)


def picture_pixels(image: Image.Image, spec: PixelSpec, center_crop: bool = False) -> torch.Tensor:
    """
    A picture as a classifier sees it: the pipeline's own preprocessing of previews.

    Args:
        image (`PIL.Image.Image`): The picture, of any size and mode.
        spec ([`PixelSpec`]): What the classifier wants to see.
        center_crop (`bool`, defaults to `False`): Whether a picture of another aspect ratio is cut to the middle, as
            CLIP's image processor does, and not squeezed.

    Returns:
        `torch.Tensor` of shape `(1, 3, *spec.size)`, float32.
    """
    image = to_rgb(image)
    if center_crop:
        scale = min(image.height / spec.size[0], image.width / spec.size[1])
        height, width = (max(1, round(scale * side)) for side in spec.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        image = image.crop((left, top, left + width, top + height))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None]  # (1, 3, height, width)
    return spec.prepare(pixels / 127.5 - 1)


@torch.no_grad()
def label_probabilities(classifier: PreTrainedModel, pixels: torch.Tensor) -> list[dict[str, float]]:
    """
    Classifies pictures.

    Args:
        classifier (`PreTrainedModel`): The classifier.
        pixels (`torch.Tensor` of shape `(n, 3, height, width)`): The pictures, from [`picture_pixels`].

    Returns:
        `list[dict[str, float]]`: Per picture, the probability of each label.
    """
    logits = classifier(pixel_values=pixels.to(classifier.device, classifier.dtype)).logits.float()
    labels = [classifier.config.id2label[index] for index in range(logits.shape[-1])]
    return [dict(zip(labels, row)) for row in logits.softmax(dim=-1).tolist()]


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One source of noise per image, seeded `seed`, `seed + 1`, …; on the CPU, so that devices agree."""
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]
