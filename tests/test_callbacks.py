"""Callbacks, interruption and progress: upstream's habits, and what MUSE adds to them."""

import io

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from tiny_models import generator, guide, stock


NAMES = ["latents", "prompt_embeds", "negative_prompt_embeds", "emotion_tokens"]


def cutoff_class(pipe) -> type:
    return SDXLCFGCutoffCallback if "add_text_embeds" in pipe._callback_tensor_inputs else SDCFGCutoffCallback


def calling(function, names=NAMES) -> dict:
    return {"callback_on_step_end": function, "callback_on_step_end_tensor_inputs": names}


@pytest.mark.parametrize("emotion", ["awe", None])
def test_a_callback_sees_what_upstreams_sees(pipe, emotion):
    """Shapes as upstream's under guidance: `prompt_embeds` holds the null prompt's rows first."""
    steps = []

    def callback(seen_pipe, step, timestep, values):
        assert seen_pipe is pipe
        steps.append((step, int(timestep), {name: tuple(value.shape) for name, value in values.items()}))
        return {}

    names = NAMES if emotion else NAMES[:3]
    guide(pipe, emotion=emotion, **calling(callback, names))
    assert [step[:2] for step in steps] == [(0, 667), (1, 334), (2, 1)]
    width = pipe.unet.config.cross_attention_dim
    expected = {"latents": (1, 4, 16, 16), "prompt_embeds": (2, 16, width), "negative_prompt_embeds": (1, 16, width)}
    assert all(shapes == expected | ({"emotion_tokens": (1, 4, width)} if emotion else {}) for *_, shapes in steps)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_callback_returns_is_used_from_then_on(pipe, count_calls, name):
    calls = count_calls(pipe.unet)
    replaced = {}

    def callback(pipe, step, timestep, values):
        if step == 0:
            replaced[name] = torch.randn(values[name].shape, generator=generator(9))
            calls.calls.clear()
            return dict(replaced)
        return values

    guide(pipe, max_inner_steps=0, num_inference_steps=2, **calling(callback))
    (arguments, null), (_, cond) = (call[0] for call in calls.calls[:2])  # the second step's
    latents, null, cond = arguments[0], null["encoder_hidden_states"], cond["encoder_hidden_states"]
    value = replaced[name]
    seen = {
        "latents": (latents,),
        "prompt_embeds": (null, cond[:, :16]),
        "negative_prompt_embeds": (null,),
        "emotion_tokens": (cond[:, 16:],),
    }[name]
    assert torch.equal(torch.cat(seen), value)


@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: MultiPipelineCallbacks([one])], ids=["one", "multi"])
@pytest.mark.parametrize("emotion", ["awe", None])
def test_upstreams_guidance_cutoff_works(pipe, count_calls, wrap, emotion):
    cutoff = wrap(cutoff_class(pipe)(cutoff_step_ratio=None, cutoff_step_index=0))
    calls = count_calls(pipe.unet)
    output = guide(pipe, emotion=emotion, max_inner_steps=0, callback_on_step_end=cutoff)
    rows = [keywords["encoder_hidden_states"].shape[0] for (_, keywords), _ in calls.calls]
    if emotion is None:
        assert rows == [2, 1, 1]
    else:
        tokens = [keywords["encoder_hidden_states"].shape[1] for (_, keywords), _ in calls.calls]
        assert rows == [2, 1, 1, 1] and tokens == [16, 20, 20, 20]
    assert output.images.isfinite().all()


def test_the_cutoff_is_upstreams_while_the_gate_is_closed(pipe):
    cutoff = cutoff_class(pipe)(cutoff_step_ratio=0.5)
    expected = stock(pipe, num_inference_steps=4, callback_on_step_end=cutoff)
    never = guide(pipe, num_inference_steps=4, semantic_threshold=float("inf"), callback_on_step_end=cutoff)
    assert torch.equal(never.images, expected)
    assert not torch.equal(expected, stock(pipe, num_inference_steps=4))


@pytest.mark.parametrize("emotion, wanted", [("awe", ["gate=1/1", "inner=6", "p=0."]), (["fear", None], ["gate=1/1"])])
def test_the_progress_bar_tells_the_state_of_the_loop(pipe, emotion, wanted):
    screen = io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=screen, mininterval=0, ncols=120)
    prompt = ["a cat", "two dogs"] if isinstance(emotion, list) else "a cat"
    guide(pipe, emotion=emotion, prompt=prompt, generator=None)
    last = screen.getvalue().split("\r")[-1]
    assert "3/3" in last
    for part in wanted:
        assert part in last, last


def test_the_progress_bar_tells_of_closed_gates(pipe):
    screen = io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=screen, mininterval=0, ncols=120)
    guide(pipe, semantic_threshold=float("inf"))
    assert "gate=0/1" in screen.getvalue() and "inner" not in screen.getvalue()
