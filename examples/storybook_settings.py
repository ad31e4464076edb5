# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""The arguments of `MusePipeline` that suit Storybook: one set for all emotions, the one that is measured and shown.

The defaults of the pipeline are the paper's, for Stable Diffusion. Here fewer and larger steps are taken, and the
inner loop ends when the emotion is probable enough.
"""

from typing import Any


MUSE_SETTINGS: dict[str, Any] = {
    "num_inference_steps": 20,
    "max_inner_steps": 5,
    "emotion_learning_rate": 0.05,
    "stop_probability": 0.97,
}

# XL reads hidden states that no final layer norm has scaled: they are three times as large, so steps are, too.
MUSE_XL_SETTINGS: dict[str, Any] = {**MUSE_SETTINGS, "emotion_learning_rate": 0.15}
