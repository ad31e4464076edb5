# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""The arguments of the pipelines that suit Storybook: one set for all emotions, the one that is measured and shown.

The defaults of the pipelines are the paper's, for Stable Diffusion; Storybook takes the preset "full" in fewer steps.
"""

import sys
from pathlib import Path
from typing import Any


sys.path.append(str(Path(__file__).resolve().parent.parent))  # a clone works without being installed

from pipeline_muse import MusePipeline  # noqa: E402
from pipeline_muse_xl import MuseXLPipeline  # noqa: E402


STEPS = {"num_inference_steps": 20}
MUSE_SETTINGS: dict[str, Any] = {**STEPS, **MusePipeline.presets["full"]}
MUSE_XL_SETTINGS: dict[str, Any] = {**STEPS, **MuseXLPipeline.presets["full"]}
