"""Callbacks, interruption and progress: upstream's habits, and what MUSE adds to them."""

import io

import pytest
import torch
from diffusers.callbacks import MultiPipelineCallbacks, SDCFGCutoffCallback, SDXLCFGCutoffCallback
from tiny_models import every_family, generator, guide, parent_of, quiet, stock


NAMES = ["latents", "prompt_embeds", "negative_prompt_embeds", "emotion_tokens"]
NEVER = {"semantic_threshold": float("inf")}


def cutoff_class(pipe) -> type:
    return SDXLCFGCutoffCallback if "add_text_embeds" in pipe._callback_tensor_inputs else SDCFGCutoffCallback


def calling(function, names=NAMES) -> dict:
    return {"callback_on_step_end": function, "callback_on_step_end_tensor_inputs": names}


@pytest.mark.parametrize("emotion", ["awe", None])
def test_a_callback_sees_what_upstreams_sees(pipe, emotion):
    """Shapes as upstream's under guidance: `prompt_embeds` holds the null prompt's rows first."""
    steps = []

    def callback(seen_pipe, step, timestep, values):
        assert seen_pipe is pipe and not torch.is_grad_enabled()
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
    (arguments, asked), (_, guided) = (call[0] for call in calls.calls)  # the second step's
    latents, asked, guided = arguments[0], asked["encoder_hidden_states"], guided["encoder_hidden_states"]
    if name == "negative_prompt_embeds":
        return  # upstream has it stacked into `prompt_embeds` already, and reads it no more
    seen = {"latents": latents[:1], "prompt_embeds": asked, "emotion_tokens": guided[:, 16:]}[name]
    assert torch.equal(seen, replaced[name])
    assert torch.equal(guided[:, :16], asked[1:])


@every_family
@pytest.mark.parametrize("wrap", [lambda one: one, lambda one: MultiPipelineCallbacks([one])], ids=["one", "multi"])
def test_upstreams_guidance_cutoff_works(pipe, count_calls, wrap):
    cutoff = wrap(cutoff_class(pipe)(cutoff_step_ratio=None, cutoff_step_index=0))
    calls = count_calls(pipe.unet)
    for emotion, rows, lengths in (
        (None, [2, 1, 1], [16] * 3),
        ("awe", [2, 1, 1, 1, 1, 1], [16, 20] * 3),
    ):
        calls.calls.clear()
        output = guide(pipe, emotion=emotion, max_inner_steps=0, callback_on_step_end=cutoff)
        shapes = [keywords["encoder_hidden_states"].shape for (_, keywords), _ in calls.calls]
        assert [shape[0] for shape in shapes] == rows and [shape[1] for shape in shapes] == lengths
        assert output.images.isfinite().all()
    expected = stock(parent_of(pipe), callback_on_step_end=cutoff)
    assert torch.equal(guide(pipe, **NEVER, callback_on_step_end=cutoff).images, expected)
    assert not torch.equal(expected, stock(pipe))


@pytest.mark.parametrize("interval", [1, 4], ids=["guided", "at rest"])
def test_a_callback_may_turn_guidance_off_and_on(pipe, count_calls, interval):
    """As those do that guide in an interval of the steps; the null prompt's rows come and go."""
    whole: dict = {}

    def callback(pipe, step, timestep, values):
        whole.setdefault("prompt_embeds", values["prompt_embeds"])
        pipe._guidance_scale = 0.0 if step == 0 else 7.5
        return {"prompt_embeds": whole["prompt_embeds"][-1:] if step == 0 else whole["prompt_embeds"]}

    names = calling(callback, ["latents", "prompt_embeds"])
    calls = count_calls(pipe.unet)
    settings = {"num_inference_steps": 4, "max_inner_steps": 1, "update_interval": interval}
    output = guide(pipe, **settings, **names)
    rows = [arguments[0].shape[0] for (arguments, _), _ in calls.calls]
    assert rows == ([2, 1, 1, 1, 1, 1, 2, 1, 1, 2, 1, 1] if interval == 1 else [2, 1, 1, 1, 2, 2])
    assert output.images.isfinite().all() and len(output.trace[0].loss) == (4 if interval == 1 else 1)
    expected = stock(parent_of(pipe), num_inference_steps=4, **names)
    assert torch.equal(guide(pipe, **settings, **NEVER, **names).images, expected)


@pytest.mark.parametrize("others", ["parent", "muse", "muse in an edit"])
def test_a_callback_may_call_another_pipeline_of_the_same_network(pipe, others):
    """Each makes what it makes alone; with hooks at the network, one must not take the other's steps for its own."""
    scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    other = parent_of(pipe)
    if others != "parent":
        components = pipe.components | {"scheduler": scheduler}
        other = quiet(type(pipe)(**components, requires_safety_checker=False))
    other.scheduler = scheduler
    image = torch.full((3, 32, 32), 0.3)

    def call(**arguments):
        if others == "parent":
            return stock(other, prompt=["two dogs"] * 3)
        edit = {"image": image} if "edit" in others else {}
        return guide(other, prompt="two dogs", emotion="fear", num_inference_steps=1, **edit).images

    inner, outer, seen = call(), guide(pipe, num_inference_steps=2), []

    def callback(pipe, step, timestep, values):
        seen.append(call())
        return {}

    output = guide(pipe, num_inference_steps=2, callback_on_step_end=callback)
    assert len(seen) == 2 and all(torch.equal(one, inner) for one in seen)
    assert torch.equal(output.images, outer.images) and output.trace == outer.trace


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
    guide(pipe, **NEVER)
    assert "gate=0/1" in screen.getvalue() and "inner" not in screen.getvalue()


def test_the_progress_bar_of_an_edit_counts_the_steps_that_are_walked(pipe):
    screen = io.StringIO()
    pipe.set_progress_bar_config(disable=False, file=screen, mininterval=0, ncols=120)
    guide(pipe, image=torch.full((3, 32, 32), 0.3), num_inference_steps=4, strength=0.5, max_inner_steps=0)
    assert "2/2" in screen.getvalue() and "/4" not in screen.getvalue()
