# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Networks that judge and never guide, read from `judges/`.

Their files are named so that no diffusers download of the checkpoint in the repository's root takes them along.

- `emo_b`: a ResNet emotion classifier.
- `emo_c`: a SimEmo emotion classifier trained on scenes in another drawing style.
- `clip`: a CLIP with another seed, which reads text with the tokenizer of the checkpoint.
"""

import json
import sys
from pathlib import Path

from safetensors.torch import load_file
from transformers import CLIPConfig, CLIPModel, PreTrainedModel, ResNetConfig, ResNetForImageClassification


FOLDER = Path(__file__).resolve().parent / "judges"
ROOT = Path(__file__).resolve().parents[2]
NAMES = ("emo_b", "emo_c", "clip")


def build_judge(kind: str, config: dict) -> PreTrainedModel:
    """An untrained judge from its saved configuration."""
    if kind == "ResNetForImageClassification":
        return ResNetForImageClassification(ResNetConfig.from_dict(config))
    if kind == "CLIPModel":
        return CLIPModel(CLIPConfig.from_dict(config))
    if str(ROOT / "emotion_classifier") not in sys.path:
        sys.path.insert(0, str(ROOT / "emotion_classifier"))
    from modeling_simemo import SimEmoConfig, SimEmoForImageClassification

    return SimEmoForImageClassification(SimEmoConfig.from_dict(config))


def load_judge(name: str, folder: Path = FOLDER) -> PreTrainedModel:
    """Load a judge in eval mode; its pixels are 64 x 64, normalised as CLIP's.

    Raises:
        ValueError: If there is no judge of that name.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown judge {name!r}; the judges are {', '.join(NAMES)}.")
    saved = json.loads((folder / f"{name}.json").read_text())
    judge = build_judge(saved["class"], saved["config"])
    judge.load_state_dict(
        {
            key: value.to(judge.state_dict()[key].dtype)
            for key, value in load_file(folder / f"{name}.safetensors").items()
        }
    )
    return judge.eval().requires_grad_(False)
