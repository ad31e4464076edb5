# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Networks that judge and never guide, read from `judges/`.

Their files are named so that no diffusers download of the checkpoint in the repository's root takes them along.

- `emo_b`: a ResNet emotion classifier.
- `emo_c`: a SimEmo emotion classifier trained on scenes in another drawing style.
- `clip`: a CLIP with another seed, which reads text with the tokenizer of the checkpoint.
"""

from pathlib import Path

import repository  # noqa: F401
from muse_examples.pipelines import read_model
from transformers import PreTrainedModel


FOLDER = Path(__file__).resolve().parent / "judges"
NAMES = ("emo_b", "emo_c", "clip")


def load_judge(name: str, folder: Path = FOLDER) -> PreTrainedModel:
    """Load a judge in eval mode; the config of an emotion classifier says what pixels it wants.

    Raises:
        ValueError: If there is no judge of that name.
    """
    if name not in NAMES:
        raise ValueError(f"Unknown judge {name!r}; the judges are {', '.join(NAMES)}.")
    return read_model(folder / f"{name}.json")
