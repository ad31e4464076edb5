"""Nothing of a call is left behind, but its output. What it does to modules is among the hazards."""

import gc

import tiny_models
import torch
from tiny_models import guide


def test_nothing_of_a_call_is_kept():
    """No output holds a graph, and no tensor of a call outlives it: a graph is hundreds of megabytes at real size."""

    def count_tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    pipe = tiny_models.muse_pipeline()
    guide(pipe)  # whatever is made once and cached
    before = count_tensors()
    output = guide(pipe)
    assert output.images.grad_fn is output.emotion_tokens.grad_fn is None
    assert not output.images.requires_grad and not output.emotion_tokens.requires_grad
    assert count_tensors() == before + 2, "the two of the output"


def test_calls_do_not_depend_on_earlier_calls():
    pipe = tiny_models.muse_pipeline()
    first = guide(pipe)
    guide(pipe, emotion="fear", semantic_threshold=1.0, guidance_scale=2.0, image=torch.full((3, 32, 32), 0.3))
    guide(pipe, emotion=None)
    again = guide(pipe)
    assert torch.equal(again.images, first.images)
    assert again.trace == first.trace
