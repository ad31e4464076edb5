# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A call of a pipeline watched from outside, and ended at its next step: by plain forward hooks on the networks, and by
what the progress bar says. Nothing of the pipeline is changed.
"""

import re
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from PIL import Image


Result = TypeVar("Result")

BAR = "{n_fmt}/{total_fmt}{postfix}"  # such as `7/20, gate=1/1, inner=12, p=0.83`
BAR_PATTERN = re.compile(r"(\d+)/(\d+)(?:, gate=(\d+)/\d+)?(?:, inner=(\d+), p=([\d.]+))?")
PAUSE = 0.2  # seconds between two looks


class Cancelled(Exception):
    """A call that was ended from outside."""


@dataclass(frozen=True)
class Progress:
    """How far a call is."""

    step: int = 0  # denoising steps done
    steps: int = 0  # of so many; 0 before they begin
    walk: int = 0  # 1: the first row of steps, 2: the second, as in an edit, whose first goes from the source to noise
    is_open: bool = False  # the gate
    inner_steps: int = 0
    probability: float | None = None  # of the emotion, as the guide sees it
    preview: Image.Image | None = None


class Watch:
    """
    Follows the calls of a pipeline.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline`.
        is_cancelled (`Callable`): Asked before each call of the UNet, those of the inner loop included.
    """

    def __init__(self, pipe: DiffusionPipeline, is_cancelled: Callable[[], bool]):
        self.pipe, self.is_cancelled, self.is_left = pipe, is_cancelled, False
        self.progress = Progress()
        self.next_preview = 0.0

    def before_unet(self, module: Any, arguments: Any) -> None:
        if self.is_left or self.is_cancelled():
            raise Cancelled
        if torch.is_grad_enabled():  # that is the inner loop; the bar has the number at the end of the step
            self.progress = replace(self.progress, is_open=True, inner_steps=self.progress.inner_steps + 1)

    def after_decoder(self, module: Any, arguments: Any, pixels: torch.Tensor) -> None:
        if time.monotonic() >= self.next_preview:
            picture = (pixels[0].detach().float().clamp(-1, 1) + 1) * 127.5
            array = picture.permute(1, 2, 0).round().to("cpu", torch.uint8).numpy()
            self.progress = replace(self.progress, preview=Image.fromarray(array))
            self.next_preview = time.monotonic() + PAUSE

    def write(self, text: str) -> None:
        """Takes what the progress bar would print."""
        if found := BAR_PATTERN.search(text):
            step, steps, opened, inner, probability = found.groups()
            now, is_new = self.progress, int(step) == 0 and (self.progress.step > 0 or self.progress.walk == 0)
            self.progress = replace(now, step=int(step), steps=int(steps), walk=now.walk + is_new)
            if inner:
                self.progress = replace(
                    self.progress, is_open=int(opened) > 0, inner_steps=int(inner), probability=float(probability)
                )

    def flush(self) -> None:
        """A file has it."""

    @contextmanager
    def watching(self) -> Iterator[None]:
        """The calls in here are followed."""
        decoders = [vae.decoder for vae in (self.pipe.vae, self.pipe.preview_vae) if vae is not None]
        hooks = [decoder.register_forward_hook(self.after_decoder) for decoder in decoders]
        hooks.append(self.pipe.unet.register_forward_pre_hook(self.before_unet))
        self.pipe.set_progress_bar_config(file=self, bar_format=BAR, mininterval=0)
        try:
            yield
        finally:
            self.pipe.set_progress_bar_config()
            for hook in hooks:
                hook.remove()


def follow(
    pipe: DiffusionPipeline, call: Callable[[], Result], is_cancelled: Callable[[], bool]
) -> Iterator[Progress | Result]:
    """
    Runs `call` in a thread of its own, and tells how far it is.

    Args:
        pipe (`DiffusionPipeline`): The pipeline that it calls.
        call (`Callable`): What to run.
        is_cancelled (`Callable`): Asked at each step, those of the inner loop included, whether to end it.

    Yields:
        `Progress`: Whenever there is news; at last what `call` returns.

    Raises:
        Cancelled: If it was ended. Whoever leaves the iterator ends it too. All other errors are the call's.
    """
    watch, told = Watch(pipe, is_cancelled), None

    def run() -> Result:
        with watch.watching():
            return call()

    with ThreadPoolExecutor(max_workers=1) as executor:
        future = executor.submit(run)
        try:
            while wait([future], PAUSE).not_done:
                if watch.progress is not told:
                    told = watch.progress
                    yield told
            if not isinstance(future.exception(), Cancelled):
                yield watch.progress
            yield future.result()
        finally:
            watch.is_left = True  # the executor waits until the call has noticed
