import pytest
import tiny_models
import torch

from pipeline_muse import MusePipeline


@pytest.fixture
def pipe() -> MusePipeline:
    """A tiny pipeline of random weights, fresh for every test."""
    return tiny_models.muse_pipeline()


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
