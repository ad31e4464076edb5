# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Loading a base as a MUSE pipeline, with the models that it lacks."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import modeling_simemo
import torch
import transformers
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock
from huggingface_hub import HfApi, constants
from huggingface_hub.errors import GatedRepoError, HfHubHTTPError, OfflineModeIsEnabled, RepositoryNotFoundError
from huggingface_hub.utils import HFValidationError, validate_repo_id
from safetensors.torch import load_file
from transformers import CLIPModel, PreTrainedModel

from muse_examples import REPOSITORY
from pipeline_muse import DTYPE_ARGUMENT, EMOTION_PROMPTS, Emotion, normalize_emotion, other_words


# The CLIP whose text encoder Stable Diffusion 1.x and XL have.
CLIP_OF_STABLE_DIFFUSION = "openai/clip-vit-large-patch14"

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def default_device() -> str:
    """The accelerator where there is one, else `"cpu"`."""
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def registered() -> list[dict[str, Any]]:
    """The settings of all examples that bring checkpoints; see [`settings_of`]."""
    paths = sorted((REPOSITORY / "examples").glob("*/settings.json"))
    return [json.loads(path.read_text(encoding="utf-8")) for path in paths]


def judges() -> dict[str, Path]:
    """The classifiers that examples bring and that never guide, by name."""
    found = [settings.get("judges", {}) for settings in registered()]
    return {name: REPOSITORY / path for named in found for name, path in named.items()}


def judge_named(name: str) -> Path | None:
    """The file of the judge of this name, unless it is a path, or no judge's name."""
    return None if Path(name).exists() else judges().get(name)


def read_model(path: Path) -> PreTrainedModel:
    """
    Reads a model from two files of any name, which no download of the checkpoint around them takes along.

    Args:
        path (`Path`): A JSON file with the "class", of transformers or SimEmo's, and its "config"; the weights lie
            beside it in a safetensors file of the same name.

    Returns:
        `PreTrainedModel`: The model in eval mode, in the dtype that the class has by default.
    """
    saved = json.loads(path.read_text(encoding="utf-8"))
    kind = getattr(modeling_simemo, saved["class"], None) or getattr(transformers, saved["class"])
    model = kind(kind.config_class.from_dict(saved["config"]))
    model.load_state_dict(load_file(path.with_suffix(".safetensors")))  # copies, and so converts
    return model.eval().requires_grad_(False)


def clips() -> dict[str, dict[str, Path]]:
    """The CLIPs that examples bring and that never guide, by name: the "model" and the folder of its "tokenizer"."""
    found = [settings.get("clips", {}) for settings in registered()]
    return {
        name: {part: REPOSITORY / path for part, path in paths.items()}
        for named in found
        for name, paths in named.items()
    }


def settings_of(base: str) -> dict[str, Any]:
    """
    What suits a checkpoint that an example brings.

    An example's folder registers its checkpoints in a `settings.json`: "name" is what they are called, "checkpoints"
    their `model_index.json`, by which they are known wherever they lie, "call" the arguments of the pipeline that suit
    them, "judge" a classifier that never guides, "judges" all of these by name, "clips" what [`clips`] tells of, and
    "preview_vae" the config of a small decoder. Paths are relative to the repository.

    Args:
        base (`str`): A path or a Hub id.

    Returns:
        `dict[str, Any]`: The settings; empty for all other bases.
    """
    index = Path(base) / "model_index.json"
    if index.is_file():
        for settings in registered():
            if any(index.read_bytes() == (REPOSITORY / known).read_bytes() for known in settings["checkpoints"]):
                return settings
    return {}


def check_source(option: str, source: str | None, config: str = "config.json", revision: str | None = None) -> None:
    """
    Finds out, within seconds and before anything large loads, whether a model is there.

    Args:
        option (`str`): The option that names it, for messages.
        source (`str`, *optional*): A path or a Hub id; nothing is checked without.
        config (`str`, defaults to `"config.json"`): The file that its folder has to hold.
        revision (`str`, *optional*): Its revision on the Hub.

    Raises:
        ValueError: If it is neither a folder with that file, nor on the Hub or in the Hub's cache.
        ConnectionError: If it might be on the Hub, but the Hub cannot be reached.
    """
    if source is None:
        return
    if Path(source).exists():
        if not (Path(source) / config).is_file():
            raise ValueError(f"--{option}: {source!r} holds no {config}")
        return
    try:
        validate_repo_id(source)
    except HFValidationError:
        raise ValueError(f"--{option}: there is no folder {source!r}, and on the Hub are only 'org/name'") from None
    if (Path(constants.HF_HUB_CACHE) / f"models--{source.replace('/', '--')}").is_dir():
        return
    missing = f"--{option}: there is no folder {source!r}, nor is it in the cache of the Hub, "
    try:
        HfApi().model_info(source, revision=revision, timeout=10)
    except GatedRepoError:
        pass  # the loader says what to do
    except RepositoryNotFoundError:
        raise ValueError(missing + "nor on the Hub, as far as you may see it") from None
    except OfflineModeIsEnabled:
        raise ValueError(missing + "which is offline (HF_HUB_OFFLINE)") from None
    except HfHubHTTPError:
        pass  # a mirror may know less than its files
    except Exception as error:  # that of whichever client the Hub's library uses
        raise ConnectionError(missing + f"which cannot be reached: {error}") from error


def lacks(component: str, base: str, revision: str | None = None) -> bool:
    """Whether a checkpoint does not bring a component of MUSE's, as one that was made without it in mind."""
    return not any(DiffusionPipeline.load_config(base, revision=revision).get(component, ()))


def known_labels(args: argparse.Namespace) -> list[str] | None:
    """The emotions that the pipeline of `add_model_options` will know, as far as files here tell before it loads."""
    folder = Path(args.classifier or Path(args.base) / "emotion_classifier")
    if (folder / "config.json").is_file():
        names = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("id2label", {})
        return list(names.values()) or None
    has_none = not args.classifier and Path(args.base).is_dir() and lacks("emotion_classifier", args.base)
    return list(EMOTION_PROMPTS) if has_none else None


def check_emotions(emotions: Sequence[Emotion], labels: Sequence[str] | None) -> None:
    """Raises a `ValueError` for misspelt emotions and weights out of range, where `labels` are known; other words are
    left to the CLIP, which every base of [`load_pipeline`] has."""
    if labels:
        for emotion in emotions:
            normalize_emotion(emotion, [*labels, *other_words(emotions, labels)])


def one_load_at_a_time() -> FileLock:
    """Each load copies custom code into one cache: another process would read a file that is half there."""
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
    return FileLock(Path(HF_MODULES_CACHE) / "muse.lock")


def load_pipeline(args: argparse.Namespace) -> DiffusionPipeline:
    """
    Loads the base of `options.add_model_options` as a `MusePipeline`, with the models that it lacks, on its device.

    Args:
        args (`argparse.Namespace`): The options; those of `add_memory_options` are heeded if they are among them.

    Returns:
        `DiffusionPipeline`: A `MusePipeline`, ready to be called with an `emotion`.

    Raises:
        ValueError: If layers are to be offloaded from a CPU to itself, which fails upstream, or a model is not there.
        ConnectionError: See [`check_source`].
    """
    if vars(args).get("sequential_cpu_offload") and torch.device(args.device).type == "cpu":
        raise ValueError("--sequential_cpu_offload moves layers to an accelerator and back, but --device is cpu")
    check_source("base", args.base, "model_index.json", args.revision)
    if args.classifier and judge_named(args.classifier) is None:
        check_source("classifier", args.classifier)
    check_source("preview_vae", args.preview_vae)
    dtype = DTYPES[args.dtype]
    models = {}
    if args.preview_vae:
        models["preview_vae"] = AutoencoderTiny.from_pretrained(args.preview_vae, **{DTYPE_ARGUMENT: dtype})
    if lacks("clip_model", args.base, args.revision):
        check_source("clip", args.clip)
        models["clip_model"] = CLIPModel.from_pretrained(args.clip, dtype=dtype).eval()
    with one_load_at_a_time():
        pipe = DiffusionPipeline.from_pretrained(
            args.base,
            revision=args.revision,
            variant=args.variant,
            custom_pipeline=str(REPOSITORY),
            trust_remote_code=True,
            **{DTYPE_ARGUMENT: dtype},
            **models,
        )
        if args.classifier:
            load_guide(pipe, args.classifier)
    return place(pipe, args)


def load_guide(pipe: DiffusionPipeline, name: str) -> None:
    """Lets a classifier guide: a folder, a judge by name (which then is none any more), or an id of the Hub."""
    judge = judge_named(name)
    if judge is None:
        pipe.load_emotion_classifier(name, trust_remote_code=True)
    else:
        pipe.load_emotion_classifier(read_model(judge).to(pipe.dtype))


def place(pipe: DiffusionPipeline, args: argparse.Namespace) -> DiffusionPipeline:
    """Moves the pipeline to its device by the options of `add_memory_options`, where `args` has them."""
    options = vars(args)
    if args.device == "cpu":  # there the backward pass of PyTorch's fused attention is slow
        pipe.unet.set_attn_processor(AttnProcessor())
    if options.get("gradient_checkpointing"):
        checkpoint_gradients(pipe)
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


def checkpoint_gradients(pipe: DiffusionPipeline, enable: bool = True) -> None:
    """UNet and decoders recompute activations in a backward pass, which only the inner loop has."""
    for part in (pipe.unet, pipe.vae, pipe.preview_vae):
        if part is not None:
            (part.enable_gradient_checkpointing if enable else part.disable_gradient_checkpointing)()


def generators(seed: int, count: int) -> list[torch.Generator]:
    """One source of noise per image, seeded `seed`, `seed + 1`, …; on the CPU, so that devices agree."""
    return [torch.Generator().manual_seed(seed + number) for number in range(count)]
