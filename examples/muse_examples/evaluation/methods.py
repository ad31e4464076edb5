# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The rows of the tables: each is a name and a function that makes pictures of jobs.

A method of your own is a file with

    from muse_examples.evaluation.methods import method

    @method("my method")
    def mine(studio, jobs):
        prompts = [f"{job.prompt}, {job.emotion}" for job in jobs]
        return studio.pipe(prompts, generator=studio.generators(jobs), **studio.call).images

which `evaluate.py --methods FILE` adds to the tables of its task.
"""

import argparse
import importlib.util
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from muse_examples.options import call_options
from muse_examples.pipelines import DTYPES, generators, load_guide, load_pipeline
from muse_examples.runs import Job, Made, run_batch
from pipeline_muse import DTYPE_ARGUMENT, MusePipeline


TASKS = ("generation", "editing")
# What the rows of each table make
TASK_OF_TABLE = {"generation": "generation", "editing": "editing", "terms": "generation", "thresholds": "generation"}
TASK_OF_TABLE |= {"guides": "generation", "methods": "generation"}
STEPS = 50  # the default of upstream's text-to-image
EVERY_ROW = ("height", "width", "num_inference_steps", "guidance_scale")


class Studio:
    """
    What the methods of one process share.

    Args:
        args (`argparse.Namespace`): The options of `evaluate.py`, which tell the base, its device and how to call it.

    Attributes:
        call (`dict[str, Any]`): The arguments that every row has, such as `num_inference_steps`.
        settings (`dict[str, Any]`): Further arguments of MUSE's rows, where the row does not set them.
        device (`torch.device`): Where the base runs.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args, self.device = args, torch.device(args.device)
        given = call_options(args)
        self.call = {name: given[name] for name in given if name in EVERY_ROW}
        self.settings = {name: given[name] for name in given if name not in EVERY_ROW}
        self._others: dict[tuple[type, str | None], DiffusionPipeline] = {}

    @cached_property
    def pipe(self) -> DiffusionPipeline:
        """The base as a `MusePipeline`, loaded when it is first asked for."""
        pipe = load_pipeline(self.args)
        pipe.set_progress_bar_config(leave=False, disable=True)
        return pipe

    @property
    def steps(self) -> int:
        """The number of denoising steps of all rows; where nothing says it, upstream's default."""
        return self.call.get("num_inference_steps", STEPS)

    def load(self) -> None:
        """Loads the base, where that has not been done."""
        self.pipe  # noqa: B018

    def pipeline(self, kind: type[DiffusionPipeline], checkpoint: str | None = None) -> DiffusionPipeline:
        """
        A pipeline of another class.

        Args:
            kind (`type[DiffusionPipeline]`): The class.
            checkpoint (`str`, *optional*): What to load, a Hub id or a path; by default it shares the base's models
                and settings, but has a scheduler of its own.

        Returns:
            `DiffusionPipeline`: The pipeline, the same for every call with the same arguments.

        Raises:
            ValueError: If the class needs something that the base does not have.
        """
        if (kind, checkpoint) not in self._others:
            if checkpoint is None:
                other = sharing(self.pipe, kind)
            else:
                dtype = {DTYPE_ARGUMENT: DTYPES[self.args.dtype]}
                other = kind.from_pretrained(checkpoint, **dtype).to(self.device)
            other.set_progress_bar_config(leave=False, disable=True)
            self._others[kind, checkpoint] = other
        return self._others[kind, checkpoint]

    def generators(self, jobs: Sequence[Job]) -> list[torch.Generator]:
        """The source of noise of each job, on the CPU, so that devices agree and all rows start from the same."""
        return [generators(job.seed, 1)[0] for job in jobs]


def sharing(pipe: DiffusionPipeline, kind: type[DiffusionPipeline]) -> DiffusionPipeline:
    """
    A pipeline of class `kind` around the models and settings of another, but with a scheduler of its own, as these
    have a state. Models keep their dtypes, which upstream's `from_pipe` casts.

    Raises:
        ValueError: If the class needs something that `pipe` does not have.
    """
    parameters = inspect.signature(kind.__init__).parameters
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    own = {"scheduler": scheduler, "add_watermarker": getattr(pipe, "watermark", None) is not None}
    known = {"self": None, **pipe.config, **pipe.components, **own}
    missing = [name for name, one in parameters.items() if one.default is one.empty and name not in known]
    if missing:
        raise ValueError(f"{kind.__name__} needs {', '.join(missing)}, which {type(pipe).__name__} does not have.")
    return kind(**{name: known[name] for name in parameters if name in known and name != "self"})


Make = Callable[[Studio, Sequence[Job]], Sequence[Made | Image.Image]]


@dataclass(frozen=True)
class Method:
    """
    A row.

    Args:
        name (`str`): The row's name.
        make (function): Of a [`Studio`] and jobs, which edit one source, if any; pictures, or `Made`, one per job.
        task (`str`): "generation" or "editing".
        settings (mapping): What tells it from a row of the same name that was made otherwise; as JSON.
        calls (function, *optional*): Of the number of denoising steps and the studio's `settings`; the most forward
            passes through the UNet that a picture takes (two where guidance needs two), and how many of these have a
            backward pass too.
    """

    name: str
    make: Make
    task: str = "generation"
    settings: Mapping[str, Any] = field(default_factory=dict)
    calls: Callable[[int, Mapping[str, Any]], tuple[int, int]] | None = None

    def __call__(self, studio: Studio, jobs: Sequence[Job]) -> list[Made]:
        made = [one if isinstance(one, Made) else Made(one) for one in self.make(studio, jobs)]
        if len(made) != len(jobs):
            raise ValueError(f"The method {self.name!r} made {len(made)} pictures of {len(jobs)} jobs.")
        return made


REGISTERED: list[Method] = []  # by `method`


def method(name: str, task: str = "generation", **settings: Any) -> Callable[[Make], Make]:
    """
    Makes a function a row.

    Args:
        name (`str`): The row's name.
        task (`str`, defaults to `"generation"`): "generation" or "editing".
        settings: What the function depends on besides its code, as JSON.

    Raises:
        ValueError: If the task is none of the two.
    """
    if task not in TASKS:
        raise ValueError(f"`task` has to be one of {', '.join(TASKS)}, got {task!r}.")

    def decorate(make: Make) -> Make:
        REGISTERED.append(Method(name, make, task, settings))
        return make

    return decorate


def load_methods(path: Path) -> list[Method]:
    """
    The rows that a file of the user's registers.

    Raises:
        ValueError: If it registers none.
    """
    before = len(REGISTERED)
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{str(path)!r} is no Python file.")
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    if len(REGISTERED) == before:
        raise ValueError(f"{str(path)!r} registers no row; see muse_examples/evaluation/methods.py.")
    return REGISTERED[before:]


# --------------------------------------------------------------------------------------
# The base alone
# --------------------------------------------------------------------------------------


def stock(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
    """The base's own pipeline with the prompt alone."""
    return run_batch(studio.pipe, [without_emotion(job) for job in jobs], **studio.call)


def stock_with_word(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
    """The base's own pipeline with the emotion in the prompt."""
    return run_batch(studio.pipe, [without_emotion(job, with_word(job)) for job in jobs], **studio.call)


def without_emotion(job: Job, prompt: str | None = None) -> Job:
    """The job for the base's own pipeline, with another prompt if one is given."""
    return Job(prompt or job.prompt, None, job.seed)


def with_word(job: Job) -> str:
    """A prompt that asks for the emotion in words."""
    return f"{job.prompt}, {in_words(job)}"


def in_words(job: Job) -> str:
    """A job's emotion, such as "awe"; of a mixture the labels, such as "awe and fear"."""
    return job.emotion if isinstance(job.emotion, str) else " and ".join(job.emotion or {})


def twice(steps: int, given: Mapping[str, Any]) -> tuple[int, int]:
    """Network calls of a pipeline with classifier-free guidance."""
    return 2 * steps, 0


STOCK = [
    Method("stock, prompt alone", stock, calls=twice),
    Method("stock, emotion in the prompt", stock_with_word, calls=twice),
]


# --------------------------------------------------------------------------------------
# MUSE
# --------------------------------------------------------------------------------------


def muse(name: str, task: str = "generation", guide: str | None = None, **settings: Any) -> Method:
    """
    A row of MUSE.

    Args:
        name (`str`): The row's name.
        task (`str`, defaults to `"generation"`): "generation" or "editing", where the job's source is edited.
        guide (`str`, *optional*): Another classifier that guides: a Hub id, a path, or the name of one of the
            [`judges`].
        settings: Arguments of the pipeline. `negative_prompt="source"` stands for the job's own prompt.
    """

    def make(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
        given = dict(settings)
        if given.get("negative_prompt") == "source":
            given["negative_prompt"] = [job.prompt for job in jobs]
        with guided_by(studio.pipe, guide):
            return run_batch(studio.pipe, jobs, **{**studio.call, **studio.settings, **given})

    def calls(steps: int, given: Mapping[str, Any]) -> tuple[int, int]:
        whole = {"max_inner_steps": 10, "update_interval": 1, **MusePipeline.presets[settings.get("preset", "full")]}
        whole |= {**given, **settings}
        inner, interval = whole["max_inner_steps"], whole["update_interval"]
        walked = round(steps * settings.get("strength", 1.0)) if task == "editing" else steps
        looks = -(-walked // interval)
        return 2 * walked + (walked if task == "editing" else 0) + looks * inner, looks * inner

    return Method(name, make, task, settings | ({"guide": guide} if guide else {}), calls)


@contextmanager
def guided_by(pipe: DiffusionPipeline, guide: str | None) -> Iterator[None]:
    """Another classifier guides the pipeline in here; `None`: its own."""
    own = pipe.emotion_classifier
    if guide is not None:
        load_guide(pipe, guide)
    try:
        yield
    finally:
        if guide is not None:
            pipe.register_modules(emotion_classifier=own)
