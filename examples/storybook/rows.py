# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The row that Storybook adds to the tables: what its emotions are by construction, named in the prompt."""

import random
from collections.abc import Sequence

from muse_examples.evaluation.methods import Studio, method, without_emotion
from muse_examples.runs import Job, Made, run_batch
from world import CUES


@method("stock, one of the emotion's cues in the prompt")
def stock_with_cue(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
    """The base's own pipeline, asked for a light, a weather or a thing that stands for the emotion in this world."""
    cues = [random.Random(f"{job.prompt}/{job.emotion}").choice(CUES[str(job.emotion)]) for job in jobs]
    asked = [without_emotion(job, f"{job.prompt} {cue}") for job, cue in zip(jobs, cues)]
    return run_batch(studio.pipe, asked, **studio.call)
