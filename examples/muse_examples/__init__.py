# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What the scripts beside this folder share. Importing it puts the repository's modules on the path: a clone works
without being installed.

- `options`: the options of command lines, and how a script ends an error
- `pipelines`: loading a base as a MUSE pipeline
- `runs`: many pictures, on several processes, resumed after a kill
- `classifiers`: what a classifier sees in a picture, and the folder that makes one load anywhere
- `degradations`: mildly worse copies of pictures, on which an emotion should stand
- `intentions`: what pictures were meant to evoke
- `metrics`: how good, how well calibrated and how gravely wrong a classifier is
- `training_data`, `training_state`, `training_report`: of the classifier's training
- `emotion_library`: tokens of each emotion to start from
- `architectures`, `measuring`: the real networks with random weights; time, memory and machine
- `demo`: what the demo and the app show of a picture
- `forms`, `watching`, `wheel`: of the app: what it is asked for, a call followed and ended, the wheel to click on
- `captions`: pictures put into words
- `evaluation`: the paper's tables and figures
- `blind`: sheets and forms on which people guess
- `contact_sheets`, `plots`, `files`: pictures side by side; plots; files that are there whole or not at all
"""

import logging
import sys
from pathlib import Path


REPOSITORY = Path(__file__).resolve().parents[2]
sys.path += [str(REPOSITORY), str(REPOSITORY / "emotion_classifier")]

# transformers warns at every start that two classes of Stable Diffusion's pipelines, none of which is used here, take
# their slower form without torchvision. Nobody can do anything about it.
logging.getLogger("transformers.utils.import_utils").addFilter(
    lambda record: "requires torchvision (not installed); falling back" not in record.getMessage()
)
