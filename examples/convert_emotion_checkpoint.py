# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Converts emotion classifiers that others released to SimEmo's layout, in safetensors.

python examples/convert_emotion_checkpoint.py time_2023-11-12_03-29-best.pth --output_dir outputs/emogen
python examples/convert_emotion_checkpoint.py 2024-02-23-best.pth --output_dir outputs/emoedit
python examples/convert_emotion_checkpoint.py model.pth fc.pth --output_dir outputs/simemotion
python examples/convert_emotion_checkpoint.py perceptCLIP_Emotions.pth --output_dir outputs/perceptclip

The keys of the file tell which one it is. EmoGen and EmoEdit released heads for OpenAI's CLIP; SimEmotion's training
saves two files, the fine-tuned CLIP and the head; PerceptCLIP's is one file, of which the LoRA is merged into the
tower. Files are read as tensors only: none of their code runs.
"""

import argparse
import math
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import muse_examples  # noqa: F401, puts modeling_simemo on the path
import torch
from modeling_simemo import EMOSET_LABELS, SimEmoConfig, SimEmoForImageClassification
from muse_examples.classifiers import add_output_options, check_output_options, public_name, save_classifier
from muse_examples.options import existing_file, one_line_errors
from muse_examples.pipelines import CLIP_OF_STABLE_DIFFUSION
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoConfig, CLIPVisionConfig


StateDict = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Source:
    """A classifier of others: the linear layers of its head, with a ReLU between them, and the order of its labels."""

    name: str
    repository: str
    layers: tuple[str, ...]
    labels: tuple[str, ...]
    clip: str | None = None  # whose frozen features it was trained on
    site: str = "https://github.com"
    remark: str = ""  # what is not certain about it


SOURCES = (
    Source("EmoGen", "JingyuanYY/EmoGen", ("fc",), EMOSET_LABELS, CLIP_OF_STABLE_DIFFUSION),
    # Its forward ends in a softmax, which has no weights: without it the outputs are logits.
    Source("EmoEdit", "JingyuanYY/EmoEdit", ("hidden", "fc"), EMOSET_LABELS, "openai/clip-vit-base-patch32"),
    Source("SimEmotion", "dsn0w/SimEmotion", ("classifier.0", "classifier.2"), tuple(sorted(EMOSET_LABELS))),
    Source(
        "PerceptCLIP",
        "PerceptCLIP/PerceptCLIP_Emotions",
        ("mlp.fc1", "mlp.fc2", "mlp.fc3"),
        EMOSET_LABELS,
        site="https://huggingface.co",
        remark="The order of its labels is EmoSet's, which the file does not tell, and its accuracy is not known here:"
        " check both on pictures whose emotion you know; the names stand in `config.json`.",
    ),
)

# PerceptCLIP: peft's names of the tower within the file, and `lora_alpha`, which stands in its code only.
PEFT_TOWER = "model.base_model.model."
LORA_ALPHA = 8

# OpenAI's names of the vision tower, in transformers' words.
OPENAI_NAMES = {
    "visual.transformer.resblocks.": "vision_model.encoder.layers.",
    "visual.class_embedding": "vision_model.embeddings.class_embedding",
    "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
    "visual.conv1.": "vision_model.embeddings.patch_embedding.",
    "visual.ln_pre.": "vision_model.pre_layrnorm.",
    "visual.ln_post.": "vision_model.post_layernorm.",
    ".attn.": ".self_attn.",
    ".ln_1.": ".layer_norm1.",
    ".ln_2.": ".layer_norm2.",
    ".mlp.c_fc.": ".mlp.fc1.",
    ".mlp.c_proj.": ".mlp.fc2.",
}
TOWER = ("vision_model.", "visual_projection.")


def some(keys: Mapping[str, object]) -> str:
    """The first keys of a file, for messages."""
    names = [str(key) for key in keys]
    return f"{names[:8]}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def read_state_dict(path: Path) -> dict[str, torch.Tensor]:
    """
    Reads named tensors, saved on whatever device, without running code from the file.

    Args:
        path (`Path`): A `.safetensors` file, or one of `torch.save`.

    Returns:
        `dict[str, torch.Tensor]`: The tensors on the CPU, without the prefix that `DataParallel` gives their names.

    Raises:
        ValueError: If the file holds anything else.
    """
    try:
        if path.suffix == ".safetensors":
            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, SafetensorError, RuntimeError, EOFError, LookupError, ValueError) as error:
        # PyTorch's own message advises to read it all the same.
        raise ValueError(
            f"{path.name} is refused: it holds more than tensors, or is no checkpoint of PyTorch or safetensors."
        ) from error
    if not isinstance(state, Mapping) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        found = some(state) if isinstance(state, Mapping) else type(state).__name__
        raise ValueError(f"{path.name} is refused: it should hold tensors by name, but holds {found}.")
    parallel = all(key.startswith("module.") for key in state)
    return {key.removeprefix("module.") if parallel else key: value for key, value in state.items()}


def identify(head: StateDict) -> Source:
    """
    Tells by its keys whose head it is.

    Raises:
        ValueError: If it is none of `SOURCES`, or its layers do not fit each other or the eight classes.
    """
    for source in SOURCES:
        if set(head) == {f"{layer}.{part}" for layer in source.layers for part in ("weight", "bias")}:
            break
    else:
        known = "; ".join(f"{source.name}: {', '.join(source.layers)}" for source in SOURCES)
        raise ValueError(f"No known head of a classifier has the keys {some(head)}. Layers of those known: {known}.")
    shapes = {key: tuple(value.shape) for key, value in head.items()}
    weights = [shapes[f"{layer}.weight"] for layer in source.layers]
    fits = (
        all(len(shape) == 2 for shape in weights)
        and all(shapes[f"{layer}.bias"] == shape[:1] for layer, shape in zip(source.layers, weights))
        and all(before[0] == after[1] for before, after in pairwise(weights))
        and weights[-1][0] == len(source.labels)
    )
    if not fits:
        raise ValueError(
            f"This looks like {source.name}'s head, but is not one for 8 classes: its shapes are {shapes}."
        )
    return source


def is_tower(state: StateDict) -> bool:
    """Whether a file holds a CLIP rather than a head."""
    return any(key.startswith(("visual.", *TOWER)) for key in state)


def perceptclip_parts(state: StateDict) -> list[dict[str, torch.Tensor]]:
    """
    Takes apart what PerceptCLIP saves as one: a CLIP's vision tower under peft's names, its projection and a head.

    Args:
        state (`Mapping[str, torch.Tensor]`): The file.

    Returns:
        `list[dict[str, torch.Tensor]]`: The tower in transformers' layout, with the LoRA merged into its weights as
        peft does it; and the head.

    Raises:
        ValueError: If a LoRA lacks its other half, or the layer that it belongs to.
    """
    tower, lora, rest = {}, {}, {}
    for key, value in state.items():
        if not key.startswith(PEFT_TOWER):
            rest[key] = value
        elif ".lora_" in key:
            lora[key.removeprefix(PEFT_TOWER)] = value.float()
        else:
            tower["vision_model." + key.removeprefix(PEFT_TOWER).replace(".base_layer.", ".")] = value.float()
    if "proj.weight" in rest:
        tower["visual_projection.weight"] = rest.pop("proj.weight").float()
    for layer in {key.partition(".lora_")[0] for key in lora}:
        try:
            down, up = (lora.pop(f"{layer}.lora_{half}.default.weight") for half in "AB")  # (rank, in), (out, rank)
            weight = tower[f"vision_model.{layer}.weight"]
            tower[f"vision_model.{layer}.weight"] = weight + LORA_ALPHA / len(down) * up @ down
        except (KeyError, RuntimeError) as error:
            raise ValueError(f"The LoRA of {layer!r} is incomplete or misshapen: {error}") from error
    if lora:
        raise ValueError(f"The LoRA has keys that are unknown: {some(lora)}.")
    return [tower, rest]


def vision_tower(state: StateDict) -> dict[str, torch.Tensor]:
    """
    The vision tower of a CLIP, in transformers' layout.

    Args:
        state (`Mapping[str, torch.Tensor]`): A CLIP in the layout of OpenAI or of transformers.

    Raises:
        ValueError: If its tower is no vision transformer.
    """
    if "visual.layer1.0.conv1.weight" in state:
        raise ValueError("The CLIP has a ResNet as its vision tower; SimEmo's is a vision transformer.")
    tower: dict[str, torch.Tensor] = {}
    for key, value in state.items():
        if key == "visual.proj":
            tower["visual_projection.weight"] = value.T
        elif key.startswith("visual."):
            for old, new in OPENAI_NAMES.items():
                key = key.replace(old, new)
            if ".in_proj_" in key:  # query, key and value in one
                for name, part in zip("qkv", value.chunk(3)):
                    tower[key.replace("in_proj_", f"{name}_proj.")] = part
            else:
                tower[key] = value
        elif key.startswith(TOWER) and not key.endswith(".position_ids"):  # older releases saved these
            tower[key] = value
    return tower


def vision_config(tower: StateDict) -> CLIPVisionConfig:
    """
    The configuration of a vision tower of OpenAI's proportions, from the shapes of its weights.

    Raises:
        ValueError: If weights are missing, or it has other proportions.
    """
    layers = {key.split(".")[3] for key in tower if key.startswith("vision_model.encoder.layers.")}
    try:
        width, channels, patch, _ = tower["vision_model.embeddings.patch_embedding.weight"].shape
        positions = tower["vision_model.embeddings.position_embedding.weight"].shape[0]
        intermediate = tower["vision_model.encoder.layers.0.mlp.fc1.weight"].shape[0]
        projection = tower["visual_projection.weight"].shape[0]
    except (KeyError, ValueError) as error:
        raise ValueError(
            f"The CLIP's vision tower is incomplete or misshapen: {error}; it has {some(tower)}."
        ) from error
    side = math.isqrt(positions - 1)
    if side**2 + 1 != positions or width % 64:
        raise ValueError(
            f"The CLIP's vision tower has {positions} positions and a width of {width}: none of OpenAI's."
        )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=len(layers),
        num_attention_heads=width // 64,
        num_channels=channels,
        patch_size=patch,
        image_size=patch * side,
        projection_dim=projection,
        hidden_act="quick_gelu",
    )


def on_released_clip(clip: str, **settings: Any) -> SimEmoForImageClassification:
    """A classifier with the vision tower of a CLIP, a Hub id or a path; a `ValueError` if it is none. No head yet."""
    config = AutoConfig.from_pretrained(clip)
    vision = getattr(config, "vision_config", config)
    if not isinstance(vision, CLIPVisionConfig):
        raise ValueError(f"`clip` {clip!r} is a {config.model_type} and no CLIP.")
    config = SimEmoConfig(vision_config=vision, projection_dim=config.projection_dim, **settings)
    classifier, info = SimEmoForImageClassification.from_pretrained(
        clip, config=config, dtype=torch.float32, output_loading_info=True
    )
    if missing := sorted(key for key in info["missing_keys"] if not key.startswith("classifier.")):
        raise ValueError(f"`clip` {clip!r} lacks weights of its vision tower: {missing[:8]}.")
    return classifier


def on_clip_file(state: StateDict, **settings: Any) -> SimEmoForImageClassification:
    """A classifier with the vision tower of a CLIP's weights; a `ValueError` if they are not whole. No head yet."""
    tower = vision_tower(state)
    classifier = SimEmoForImageClassification(SimEmoConfig(vision_config=vision_config(tower), **settings))
    try:
        classifier.clip.load_state_dict(tower)
    except RuntimeError as error:
        raise ValueError(f"The CLIP's vision tower is not one of OpenAI's: {error}") from error
    return classifier


@torch.no_grad()
def convert(states: Sequence[StateDict], clip: str | None = None) -> tuple[SimEmoForImageClassification, Source]:
    """
    Builds the classifier.

    Args:
        states (sequence of `Mapping[str, torch.Tensor]`): A head and, where it came with one, the CLIP; in any order,
            or PerceptCLIP's file, which holds both.
        clip (`str`, *optional*): The CLIP that the head stands on, a Hub id or a path. Defaults to the CLIP among
            `states`, and where there is none to that of the head's authors.

    Returns:
        `tuple[SimEmoForImageClassification, Source]`: The classifier in float32 and eval mode, and where it is from.

    Raises:
        ValueError: If the files are not a known head and at most one CLIP, or do not fit each other.
    """
    states = [
        part
        for state in states
        for part in (perceptclip_parts(state) if any(key.startswith(PEFT_TOWER) for key in state) else [state])
    ]
    towers, heads = [state for state in states if is_tower(state)], [state for state in states if not is_tower(state)]
    if len(heads) != 1 or len(towers) > 1:
        raise ValueError(f"Needed are a head and at most one CLIP, given {len(heads)} heads and {len(towers)} CLIPs.")
    head, source = heads[0], identify(heads[0])
    if towers and clip:
        raise ValueError("`clip` is given twice: as an option, and as a file.")
    sizes = [head[f"{layer}.weight"].shape for layer in source.layers]
    settings: dict[str, Any] = {
        "head_hidden_sizes": [size[0] for size in sizes[:-1]],
        "id2label": dict(enumerate(source.labels)),
    }
    if towers:
        classifier = on_clip_file(towers[0], **settings)
    elif clip := clip or source.clip:
        classifier = on_released_clip(clip, **settings)
    else:
        raise ValueError(f"{source.name} fine-tunes its CLIP: the head needs the CLIP file that was saved with it.")
    if sizes[0][1] != classifier.config.projection_dim:
        raise ValueError(
            f"{source.name}'s head takes {sizes[0][1]} features, but the CLIP gives"
            f" {classifier.config.projection_dim}: it stands on another CLIP, see `clip`."
        )
    for layer, name in zip(classifier.classifier[::2], source.layers, strict=True):
        layer.weight.copy_(head[f"{name}.weight"])
        layer.bias.copy_(head[f"{name}.bias"])
    return classifier.eval(), source


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=existing_file, help="the head and, if it came with one, the CLIP")
    parser.add_argument(
        "--clip", help="CLIP that the head stands on, a Hub id or a path. Default: its authors' choice."
    )
    add_output_options(parser)
    args = parser.parse_args(arguments)
    check_output_options(parser, args)
    return args


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Converts the files of the command line."""
    args = parse_args(arguments)
    classifier, source = convert([read_state_dict(path) for path in args.files], args.clip)
    base = args.clip or (None if len(args.files) > 1 else source.clip)
    weights = "its LoRA merged into the weights" if source.name == "PerceptCLIP" else "its weights unchanged"
    about = (
        f"The emotion classifier of [{source.name}]({source.site}/{source.repository}), {weights}, in"
        f" the layout of SimEmo. It stands on {public_name(base) if base else 'the CLIP that was fine-tuned with it'}."
        f" Converted by `convert_emotion_checkpoint.py` of MUSE; not measured anew. {source.remark}".rstrip()
    )
    print(f"{source.name}: {', '.join(source.labels)}")
    if source.remark:
        print(source.remark)
    print(save_classifier(classifier, f"{source.name}'s emotion classifier", about, base, args))


if __name__ == "__main__":
    main()
