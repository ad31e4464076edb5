"""After any call every module is as it was."""

import gc

import pytest
import tiny_models
import torch
from tiny_models import guide


MODULES = ["unet", "vae", "preview_vae", "clip_model", "emotion_classifier", "text_encoder"]


@pytest.fixture
def pipe():
    """Every module in a state of its own, which no call may change."""
    pipe = tiny_models.muse_pipeline(preview_vae=tiny_models.preview_vae())
    for index, name in enumerate(MODULES):
        module = getattr(pipe, name)
        for number, weight in enumerate(module.parameters()):
            weight.requires_grad_((number + index) % 3 != 0)
        for number, part in enumerate(module.modules()):
            part.training = (number + index) % 2 == 0
    return pipe


def state_of(pipe) -> dict:
    """Everything that a caller might have set: flags, gradients, weights, components, the thread's gradient mode."""
    state: dict = {"grad mode": torch.is_grad_enabled(), "inference mode": torch.is_inference_mode_enabled()}
    state["components"] = {name: id(component) for name, component in pipe.components.items()}
    for name in MODULES:
        module = getattr(pipe, name)
        state[name] = [(weight.requires_grad, weight.grad, id(weight)) for weight in module.parameters()]
        state[f"{name} training"] = [part.training for part in module.modules()]
        state[f"{name} sum"] = [float(weight.detach().double().sum()) for weight in module.parameters()]
        state[f"{name} hooks"] = [len(part._forward_hooks) for part in module.modules()]
    return state


CALLS = {
    "guided": {},
    "closed": {"semantic_threshold": float("inf")},
    "stock": {"emotion": None},
    "edit": {"image": torch.full((3, 32, 32), 0.3)},
    "gate": {"semantic_threshold": 1.0},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_after_a_normal_end(pipe, call, grad):
    with torch.set_grad_enabled(grad):
        before = state_of(pipe)
        guide(pipe, **CALLS[call])
        assert state_of(pipe) == before


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["callback", "classifier", "backward"])
def test_after_an_end_with_terror(pipe, where, error):
    calls = []

    def fail(*arguments):
        calls.append(where)
        if where != "classifier" or len(calls) == 3:  # amid the inner loop
            raise error

    def fail_backwards(module, inputs, output):
        if output.logits.requires_grad:
            output.logits.register_hook(fail)

    arguments = {"gradient_checkpointing": True}
    if where == "callback":
        arguments["callback_on_step_end"] = fail
    hooks = []
    if where != "callback":
        hook = fail if where == "classifier" else fail_backwards
        hooks.append(pipe.emotion_classifier.register_forward_hook(hook))
    before = state_of(pipe)
    with pytest.raises(type(error)):
        guide(pipe, **arguments)
    assert calls
    assert state_of(pipe) == before
    for hook in hooks:
        hook.remove()
    assert guide(pipe).images.isfinite().all(), "and the next call works"


def test_flags_do_not_change_the_result(pipe):
    """Whatever mode the modules were left in, they run in evaluation mode and collect no gradients."""
    other = tiny_models.muse_pipeline(preview_vae=tiny_models.preview_vae())
    for module in (pipe.text_encoder, other.text_encoder):
        module.eval()
    assert torch.equal(guide(pipe).images, guide(other).images)


def test_gradient_checkpointing_changes_nothing_and_stays_on():
    pipe = tiny_models.muse_pipeline()
    expected = guide(pipe)
    pipe.unet.enable_gradient_checkpointing()
    pipe.vae.enable_gradient_checkpointing()
    output = guide(pipe)
    torch.testing.assert_close(output.emotion_tokens, expected.emotion_tokens, rtol=0, atol=1e-4)
    assert pipe.unet.is_gradient_checkpointing and pipe.vae.is_gradient_checkpointing


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
