import os
import sys
from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline


if "PYTEST_XDIST_WORKER" in os.environ:  # as many workers as cores: one thread each, in their subprocesses too
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture
def family() -> tiny_models.Family:
    """The pipeline of Stable Diffusion; `@every_family` is for where XL's does something of its own."""
    return tiny_models.STABLE_DIFFUSION


@pytest.fixture
def pipe(family) -> DiffusionPipeline:
    """A tiny pipeline of random weights, fresh for every test."""
    return tiny_models.muse_pipeline(family)


@pytest.fixture(scope="session")
def xl_folder(tmp_path_factory) -> Path:
    """The XL Storybook as a checkpoint."""
    sys.path.append(str(tiny_models.REPOSITORY / "examples" / "storybook"))
    from assemble_xl import assemble

    return assemble(tmp_path_factory.mktemp("storybook") / "xl")


class CallCounter:
    """Counts the calls of modules, and keeps their inputs and outputs."""

    def __init__(self, *modules: torch.nn.Module):
        self.calls: list[tuple[dict, object]] = []
        for module in modules:
            module.register_forward_hook(self._record, with_kwargs=True)

    def _record(self, module, arguments, keywords, output) -> None:
        self.calls.append(((arguments, keywords), output))

    def __len__(self) -> int:
        return len(self.calls)


@pytest.fixture
def count_calls() -> type[CallCounter]:
    return CallCounter
