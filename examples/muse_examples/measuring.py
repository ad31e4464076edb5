# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a measurement was made on, and how much memory work takes."""

import ctypes
import gc
import platform
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import diffusers
import psutil
import torch
import transformers


def processor() -> str:
    """The CPU's name, as far as the system tells."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} CPU" if names else f"{platform.machine()} CPU"


def versions() -> dict[str, str]:
    """The versions of what a measurement depends on, by name."""
    modules = {module.__name__: module.__version__ for module in (torch, diffusers, transformers)}
    return {"python": platform.python_version(), **modules}


@dataclass
class Memory:
    """Memory in use, in GiB: `before` some work, and the most at any time during it, `peak`."""

    before: float
    peak: float

    @property
    def beyond(self) -> float:
        """What the work needed on top of what was there before it, which is mostly the weights."""
        return self.peak - self.before


def resident() -> float:
    """Main memory that this process holds, in GiB."""
    return psutil.Process().memory_info().rss / 2**30


def release_memory() -> None:
    """Gives back what is not in use, so that `resident` counts only what is; glibc keeps freed memory otherwise."""
    gc.collect()
    if sys.platform == "linux":
        getattr(ctypes.CDLL(None), "malloc_trim", lambda pad: None)(0)


@contextmanager
def measured_memory(device: str) -> Iterator[Memory]:
    """Fills in what the block needed: on a GPU PyTorch's own count, else the process' size, looked at often."""
    release_memory()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        memory = Memory(*[torch.cuda.memory_allocated() / 2**30] * 2)
        yield memory
        torch.cuda.synchronize()
        memory.peak = torch.cuda.max_memory_allocated() / 2**30
        return

    memory, done = Memory(*[resident()] * 2), threading.Event()

    def watch() -> None:
        while not done.wait(0.01):
            memory.peak = max(memory.peak, resident())

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    try:
        yield memory
    finally:
        memory.peak = max(memory.peak, resident())
        done.set()
        watcher.join()
