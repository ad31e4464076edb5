"""One or two tests for each hazard of gradients at test time; each fails where the rule against it is broken."""

import functools
import math

import diffusers
import pytest
import tiny_models
import torch
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from tiny_models import FAMILIES, STABLE_DIFFUSION_XL, generator, guide
from torch.nn.modules.module import register_module_forward_pre_hook

from pipeline_muse import FLOAT16_LOSS_SCALE


MODULES = ["unet", "vae", "preview_vae", "clip_model", "emotion_classifier", "text_encoder"]
every_family = pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.pipeline_class.__name__)


@pytest.fixture
def odd() -> diffusers.DiffusionPipeline:
    """Every module in a state of its own, which no call may change."""
    pipe = tiny_models.muse_pipeline(preview_vae=tiny_models.preview_vae())
    for index, name in enumerate(MODULES):
        module = getattr(pipe, name)
        for number, weight in enumerate(module.parameters()):
            weight.requires_grad_((number + index) % 3 != 0)
        for number, part in enumerate(module.modules()):
            part.training = (number + index) % 2 == 0
    pipe.preview_vae.enable_gradient_checkpointing()
    pipe.unet.enable_gradient_checkpointing()
    pipe.unet.up_blocks[0].gradient_checkpointing = False
    return pipe


def state_of(pipe) -> dict:
    """Everything that a caller might have set: flags, gradients, weights, components, the thread's gradient mode."""
    state: dict = {"grad mode": torch.is_grad_enabled(), "inference mode": torch.is_inference_mode_enabled()}
    state["components"] = {name: id(component) for name, component in pipe.components.items()}
    for name in MODULES:
        module = getattr(pipe, name)
        state[name] = [(weight.requires_grad, weight.grad, id(weight)) for weight in module.parameters()]
        state[f"{name} training"] = [part.training for part in module.modules()]
        state[f"{name} checkpointing"] = [getattr(part, "gradient_checkpointing", None) for part in module.modules()]
        state[f"{name} sum"] = [float(weight.detach().double().sum()) for weight in module.parameters()]
        state[f"{name} hooks"] = [len(part._forward_hooks) for part in module.modules()]
    return state


def gradients_of(pipe, monkeypatch, **arguments) -> list[torch.Tensor]:
    """The gradients with respect to the tokens of each sample at the first evaluation of a short call, unscaled."""
    gradients: list = []
    scale = FLOAT16_LOSS_SCALE if pipe.unet.dtype == torch.float16 else 1.0
    grad = torch.autograd.grad

    def record(outputs, inputs, grad_outputs):
        found = grad(outputs, inputs, grad_outputs)
        gradients.append([one.double() / scale for one in found])
        return found

    with monkeypatch.context() as patch:
        patch.setattr(torch.autograd, "grad", record)
        guide(pipe, **{"num_inference_steps": 1, "max_inner_steps": 1, **arguments})
    return gradients[0]


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    return torch.nn.functional.cosine_similarity(one.flatten(), other.flatten(), dim=0).item()


# ---- weights that require grad -------------------------------------------------------------------------------------

CALLS = {
    "guided": {"gradient_checkpointing": True},
    "closed": {"semantic_threshold": math.inf},
    "stock": {"emotion": None},
    "edit": {"image": torch.full((3, 32, 32), 0.3)},
    "gate": {"semantic_threshold": 1.0},
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("grad", [True, False], ids=["grad", "no grad"])
def test_weights_that_require_grad_are_as_before_after_a_normal_end(odd, call, grad):
    with torch.set_grad_enabled(grad):
        before = state_of(odd)
        guide(odd, **CALLS[call])
        assert state_of(odd) == before


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()], ids=["error", "interrupt"])
@pytest.mark.parametrize("where", ["callback", "classifier", "backward"])
def test_weights_that_require_grad_are_as_before_after_an_end_with_terror(odd, where, error):
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
        hooks.append(odd.emotion_classifier.register_forward_hook(hook))
    before = state_of(odd)
    with pytest.raises(type(error)):
        guide(odd, **arguments)
    assert calls
    assert state_of(odd) == before
    for hook in hooks:
        hook.remove()
    assert guide(odd).images.isfinite().all(), "and the next call works"


def test_weights_that_require_grad_take_no_part_in_the_graph(odd, monkeypatch):
    """Else each of their layers would save its input; nor does `backward` visit leaves that are not the tokens."""

    def refuse(*arguments, **keywords):
        raise AssertionError("`backward` was called")

    monkeypatch.setattr(torch.Tensor, "backward", refuse)
    monkeypatch.setattr(torch.autograd, "backward", refuse)
    frozen = []
    for module in (odd.unet, odd.preview_vae.decoder, odd.emotion_classifier):
        module.register_forward_hook(
            lambda module, *_: frozen.append(not any(weight.requires_grad for weight in module.parameters()))
        )
    guide(odd)
    assert len(frozen) > 9 and all(frozen)


# ---- activation memory ---------------------------------------------------------------------------------------------


def test_activation_memory_is_saved_in_evaluation_mode_only():
    """Dropout is off, also where a caller left it on, and while activations are recomputed."""
    pipe, expected = tiny_models.muse_pipeline(), guide(tiny_models.muse_pipeline())
    for name in ("unet", "vae", "clip_model", "emotion_classifier"):
        getattr(pipe, name).train()
    training = []
    handle = register_module_forward_pre_hook(lambda module, arguments: training.append(module.training))
    try:
        output = guide(pipe, gradient_checkpointing=True, semantic_threshold=0)
    finally:
        handle.remove()
    assert training and not any(training)
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("decoder", ["vae", "preview_vae"])
def test_activation_memory_is_saved_by_checkpointing_which_changes_nothing(decoder):
    preview_vae = tiny_models.preview_vae() if decoder == "preview_vae" else None
    pipes = [tiny_models.muse_pipeline(preview_vae=preview_vae) for _ in range(2)]
    expected, output = guide(pipes[0]), guide(pipes[1], gradient_checkpointing=True)
    torch.testing.assert_close(output.emotion_tokens, expected.emotion_tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-3)
    assert saved_bytes(pipes[1], gradient_checkpointing=True) < 0.6 * saved_bytes(pipes[0])


def saved_bytes(pipe, **arguments) -> int:
    """The most that a graph of the call keeps for its backward pass."""
    graphs = [0]

    def pack(tensor):
        graphs[-1] += tensor.nbytes
        return tensor

    handle = pipe.unet.register_forward_pre_hook(lambda *_: graphs.append(0))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        guide(pipe, **arguments)
    handle.remove()
    return max(graphs)


def test_activation_memory_is_saved_in_the_inner_loop_only():
    pipe = tiny_models.muse_pipeline()
    pipe.vae.enable_gradient_checkpointing()
    modes, length = set(), pipe.tokenizer.model_max_length
    pipe.unet.register_forward_hook(
        lambda module, _, keywords, __: modes.add(
            (keywords["encoder_hidden_states"].shape[1] > length, module.is_gradient_checkpointing)
        ),
        with_kwargs=True,
    )
    guide(pipe, gradient_checkpointing=True)
    assert modes == {(False, False), (True, True)}
    assert not pipe.unet.is_gradient_checkpointing and pipe.vae.is_gradient_checkpointing


# ---- casting a module between forward and backward -----------------------------------------------------------------


@every_family
def test_casting_a_module_between_forward_and_backward_never_happens(family, monkeypatch):
    """The VAE of SDXL, which overflows in float16, is in float32 from before the first pass until after the last."""
    events, apply = [], torch.nn.Module._apply

    def record(module, *arguments, **keywords):
        events.append("cast")
        return apply(module, *arguments, **keywords)

    pipe = tiny_models.muse_pipeline(family)
    dtype = torch.float16 if family is STABLE_DIFFUSION_XL else torch.float32
    pipe.to(dtype)
    monkeypatch.setattr(torch.nn.Module, "_apply", record)
    pipe.unet.register_forward_hook(lambda *_: events.append("pass"))
    pipe.vae.decoder.register_forward_hook(lambda module, _, image: events.append(image.dtype))
    guide(pipe, image=torch.full((3, 32, 32), 0.3), num_inference_steps=2)
    last = len(events) - events[::-1].index("pass")
    assert events[events.index("pass") : last].count("cast") == 0
    assert set(events) - {"pass", "cast"} == {torch.float32}
    assert pipe.vae.dtype == dtype


# ---- scheduler.step in the inner loop ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "DPMSolverMultistepScheduler"])
@pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")
def test_scheduler_step_in_the_inner_loop_never_happens(name, monkeypatch):
    """Nor does the inner loop change any state of a scheduler that counts its steps or keeps earlier outputs."""
    pipe = tiny_models.muse_pipeline()
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config)
    step, steps, states = pipe.scheduler.step, [], {}

    @functools.wraps(step)
    def count(*arguments, **keywords):
        steps.append(arguments)
        return step(*arguments, **keywords)

    monkeypatch.setattr(pipe.scheduler, "step", count)
    pipe.unet.register_forward_hook(
        lambda _, arguments, __: states.setdefault(float(arguments[1]), set()).add(str(vars(pipe.scheduler)))
    )
    trace = guide(pipe, max_inner_steps=2).trace[0]
    assert trace.inner_steps == 6 and len(steps) == 3
    assert [len(seen) for seen in states.values()] == [1, 1, 1]


# ---- fp16 cross-entropy --------------------------------------------------------------------------------------------


def test_fp16_cross_entropy_is_never_taken_though_the_classifier_be_half():
    """Its steps are coarse where the loss is large, and where a classifier is certain it has no gradient at all."""
    pipe = tiny_models.muse_pipeline()
    pipe.emotion_classifier.half()
    losses = torch.tensor(guide(pipe).trace[0].loss)
    assert not torch.equal(losses.half().float(), losses)


def test_fp16_cross_entropy_is_scaled_so_that_small_gradients_survive(monkeypatch):
    """Gradients of a nearly indifferent classifier round to zero in a float16 network, were they not scaled."""
    directions = {}
    start = torch.randn(1, 4, 32, generator=generator(4))
    for dtype in (torch.float32, torch.float16):
        pipe = tiny_models.muse_pipeline()
        pipe.emotion_classifier.classifier[-1].weight.data.mul_(1e-4)
        for module in (pipe.unet, pipe.text_encoder, pipe.vae):
            module.to(dtype)
        directions[dtype] = gradients_of(pipe, monkeypatch, emotion_tokens=start)[0]
    assert cosine(*directions.values()) > 0.99, "unscaled it is 0.61"


# ---- the caller wraps in torch.inference_mode() --------------------------------------------------------------------


@every_family
def test_inference_mode_is_refused(family, count_calls):
    pipe = tiny_models.muse_pipeline(family)
    calls = count_calls(pipe.text_encoder, pipe.unet)
    with torch.inference_mode(), pytest.raises(ValueError, match="inference_mode"):
        guide(pipe)
    assert len(calls) == 0
    with torch.inference_mode():
        assert guide(pipe, emotion=None).images.isfinite().all(), "stock needs no gradients"
    with torch.no_grad():
        assert guide(pipe, num_inference_steps=1).trace[0].inner_steps == 2


def test_inference_mode_around_the_loading_of_weights_is_refused():
    with torch.inference_mode():
        pipe = tiny_models.muse_pipeline()
    with pytest.raises(ValueError, match="inference_mode"):
        guide(pipe)


# ---- one shared mean loss or stop rule -----------------------------------------------------------------------------

PAIR = {"prompt": ["a cat", "two dogs"], "emotion": ["awe", "fear"]}
STARTS = torch.randn(2, 4, 32, generator=generator(4))


def single(sample: int) -> dict:
    """The call of one of the two alone."""
    mine = {name: values[sample] for name, values in PAIR.items()}
    return {**mine, "emotion_tokens": STARTS[sample], "generator": generator(sample)}


def pair() -> dict:
    return {**PAIR, "emotion_tokens": STARTS, "generator": [generator(0), generator(1)]}


def test_one_shared_mean_loss_would_shrink_the_gradients_of_a_batch(monkeypatch):
    pipe = tiny_models.muse_pipeline()
    together = gradients_of(pipe, monkeypatch, **pair())
    for sample in (0, 1):
        (alone,) = gradients_of(pipe, monkeypatch, **single(sample))
        assert (together[sample] - alone).norm() < 1e-3 * alone.norm()


def test_one_shared_stop_rule_would_end_the_loops_of_a_batch_together():
    pipe = tiny_models.muse_pipeline()
    losses = [trace.loss[0][0] for trace in guide(pipe, **pair()).trace]
    settings = {"loss_threshold": sum(losses) / 2, "num_inference_steps": 1}
    output = guide(pipe, **pair(), **settings)
    assert sorted(trace.inner_steps for trace in output.trace) == [0, 2]
    for sample in (0, 1):
        alone = guide(pipe, **single(sample), **settings)
        torch.testing.assert_close(output.emotion_tokens[sample], alone.emotion_tokens[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(output.images[sample], alone.images[0], rtol=0, atol=1e-4)


# ---- xformers backward ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["unet", "vae"])
def test_xformers_backward_is_refused_and_pytorchs_attention_used(name, count_calls):
    pipe = tiny_models.muse_pipeline()
    assert {type(one) for one in pipe.unet.attn_processors.values()} == {AttnProcessor2_0}
    calls = count_calls(pipe.text_encoder, pipe.unet)
    getattr(pipe, name).set_attn_processor(XFormersAttnProcessor())
    with pytest.raises(ValueError, match="xFormers.*disable_xformers_memory_efficient_attention"):
        guide(pipe)
    assert len(calls) == 0
    getattr(pipe, name).set_attn_processor(AttnProcessor2_0())
    assert guide(pipe).trace[0].inner_steps > 0


# ---- VAE tiling ----------------------------------------------------------------------------------------------------


def test_vae_tiling_has_about_the_gradient(monkeypatch):
    """Of a network of random weights, whose tiles differ more at their borders than those of one that was trained."""
    pipe, start = tiny_models.muse_pipeline(), STARTS[:1]
    whole = gradients_of(pipe, monkeypatch, emotion_tokens=start)[0]
    pipe.vae.tile_sample_min_size, pipe.vae.tile_latent_min_size = 24, 24 // pipe.vae_scale_factor
    pipe.vae.enable_tiling()
    tiled = gradients_of(pipe, monkeypatch, emotion_tokens=start)[0]
    assert 0.95 < cosine(whole, tiled) < 1 - 1e-6


# ---- the gradient itself -------------------------------------------------------------------------------------------

PICTURE = torch.rand(3, 32, 32, generator=generator(5))
WAYS = {
    "vae": ({}, {}),
    "preview vae": ({"preview_vae": tiny_models.preview_vae}, {}),
    "no classifier": ({"emotion_classifier": lambda: None}, {}),
    "mask": ({}, {"image": PICTURE, "mask_image": PICTURE[:1]}),
    "source prompt": ({}, {"image": PICTURE, "guidance_reference": "source"}),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_that_of_finite_differences(monkeypatch, way):
    """Of the losses that the pipeline itself reports, in its float32, along the gradient."""
    components, arguments = WAYS[way]
    pipe = tiny_models.muse_pipeline(**{name: make() for name, make in components.items()})
    arguments = arguments | {"inherent_weight": 0.3, "similar_weight": 0.2, "num_inference_steps": 1}
    start = STARTS[:1].double()
    (gradient,) = gradients_of(pipe, monkeypatch, **arguments, emotion_tokens=start.float())
    step = 0.02 * gradient / gradient.norm()
    ahead, behind = (
        guide(pipe, **arguments, emotion_tokens=(start + sign * step).float(), max_inner_steps=0).trace[0].loss[0][0]
        for sign in (1, -1)
    )
    assert (ahead - behind) / 0.04 == pytest.approx(gradient.norm().item(), rel=0.01)
