"""One or two tests for each hazard of gradients at test time; each fails where the rule against it is broken."""

import functools
import math
import threading

import diffusers
import pytest
import tiny_models
import torch
from diffusers.hooks import apply_layerwise_casting
from diffusers.models.attention_processor import AttnProcessor2_0, XFormersAttnProcessor
from tiny_models import STABLE_DIFFUSION_XL, every_family, generator, guide, quiet
from torch.nn.modules.module import register_module_forward_pre_hook

from pipeline_muse import FLOAT16_LOSS_SCALE


MODULES = ["unet", "vae", "preview_vae", "clip_model", "emotion_classifier", "text_encoder"]


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
        state[f"{name} hooks"] = [
            [list(hooks) for hooks in (part._forward_hooks, part._forward_pre_hooks, part._forward_hooks_with_kwargs)]
            for part in module.modules()
        ]
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
    "guided": {},
    "closed": {"semantic_threshold": math.inf},
    "stock": {"emotion": None},
    "edit": {"image": torch.full((3, 32, 32), 0.3)},
    "gate": {"semantic_threshold": 1.0},
}


def test_weights_that_require_grad_are_as_before_after_a_normal_end(odd):
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            before = state_of(odd)
            for call in CALLS.values():
                guide(odd, **call, num_inference_steps=2, max_inner_steps=1)
                assert state_of(odd) == before, call


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

    arguments = {"callback_on_step_end": fail} if where == "callback" else {}
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
        pipe.unet.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()
        output = guide(pipe)
    finally:
        handle.remove()
    assert training and not any(training)
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-3)


@pytest.mark.parametrize("decoder", ["vae", "preview_vae"])
def test_activation_memory_is_saved_by_checkpointing_which_changes_nothing(decoder):
    """diffusers' own switches; as only the inner loop has gradients, they act there alone."""
    pipe = tiny_models.muse_pipeline(preview_vae=tiny_models.preview_vae() if decoder == "preview_vae" else None)
    expected, most = guide(pipe), saved_bytes(pipe)
    pipe.unet.enable_gradient_checkpointing()
    getattr(pipe, decoder).enable_gradient_checkpointing()
    output = guide(pipe)
    torch.testing.assert_close(output.emotion_tokens, expected.emotion_tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-3)
    assert saved_bytes(pipe) < 0.6 * most
    assert pipe.unet.is_gradient_checkpointing and getattr(pipe, decoder).is_gradient_checkpointing


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


# ---- casting a module between forward and backward -----------------------------------------------------------------


@every_family
@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
def test_casting_a_module_between_forward_and_backward_never_happens(family, monkeypatch, checkpointing):
    """
    The VAE of SDXL, which overflows in float16, goes to float32 and back around the guidance of each step: before its
    first pass with gradients and after its last backward one.
    """
    events, apply, grad = [], torch.nn.Module._apply, torch.autograd.grad

    def record(kind, function):
        def recorded(*arguments, **keywords):
            if events[-1:] != [kind] or kind != "cast":  # one of a module is one of each of its parts
                events.append(kind)
            return function(*arguments, **keywords)

        return recorded

    pipe = tiny_models.muse_pipeline(family)
    is_half = family is STABLE_DIFFUSION_XL
    pipe.to(torch.float16 if is_half else torch.float32)
    if checkpointing:
        pipe.unet.enable_gradient_checkpointing()
        pipe.vae.enable_gradient_checkpointing()
    monkeypatch.setattr(torch.nn.Module, "_apply", record("cast", apply))
    monkeypatch.setattr(torch.autograd, "grad", record("backward", grad))
    pipe.unet.register_forward_hook(
        lambda _, __, answer: events.append("forward" if answer[0].requires_grad else "asked")
    )
    dtypes = set()
    pipe.vae.decoder.register_forward_hook(lambda module, _, image: dtypes.add(image.dtype))
    guide(pipe, image=torch.full((3, 32, 32), 0.3), num_inference_steps=2, output_type="latent")
    cast = ["cast"] if is_half else []
    step = ["asked", *cast, *["forward", "backward"] * 2, "asked", *cast]
    assert events == [*cast, *cast[:0], *(["asked"] * 2), *step * 2], "inversion and two guided steps"
    assert dtypes == {torch.float32}
    assert pipe.vae.dtype == (torch.float16 if is_half else torch.float32)


def test_casting_a_module_is_spared_where_tokens_rest(monkeypatch):
    pipe, dtypes = tiny_models.muse_pipeline(STABLE_DIFFUSION_XL).to(torch.float16), []
    pipe.unet.register_forward_hook(lambda *_: dtypes.append(pipe.vae.dtype))
    guide(pipe, num_inference_steps=3, update_interval=3, max_inner_steps=1)
    assert dtypes == [torch.float16, *[torch.float32] * 2, *[torch.float16] * 2], "asked, guided, at rest"


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


# ---- networks that pass no gradient on -----------------------------------------------------------------------------


def detaching(module: torch.nn.Module) -> torch.utils.hooks.RemovableHandle:
    def detach(_, __, answer):
        if hasattr(answer, "logits"):
            answer.logits = answer.logits.detach()
            return answer
        return tuple(part.detach() for part in answer) if isinstance(answer, tuple) else answer.detach()

    return module.register_forward_hook(detach)


def test_networks_that_pass_no_gradient_on_are_named():
    """Where there is none at all, as in a network that was compiled or quantised for inference."""
    pipe = tiny_models.muse_pipeline()
    modules = {"unet": pipe.unet, "vae": pipe.vae.decoder, "emotion_classifier": pipe.emotion_classifier}
    for name, module in modules.items():
        handle = detaching(module)
        with pytest.raises(ValueError, match=f"`{name}` passes no gradient on"):
            guide(pipe)
        assert guide(pipe, max_inner_steps=0).images.isfinite().all(), "without inner steps it needs none"
        handle.remove()
    assert guide(pipe).trace[0].inner_steps > 0


@pytest.mark.parametrize("name", ["unet", "vae", "emotion_classifier"])
def test_weights_that_change_their_type_between_passes_are_refused(name, count_calls):
    """Layerwise casting, which the backward pass would find in another type than the forward pass left them."""
    pipe = tiny_models.muse_pipeline()
    module = getattr(pipe, name)
    calls = count_calls(pipe.text_encoder, pipe.unet)
    apply_layerwise_casting(module, torch.float8_e4m3fn, torch.float32, skip_modules_pattern=["norm", "embed"])
    with pytest.raises(ValueError, match=f"{type(module).__name__}.*layerwise casting"):
        guide(pipe)
    assert len(calls) == 0
    assert guide(pipe, emotion=None).images.isfinite().all()


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
    "source prompt": ({}, {"image": PICTURE, "negative_prompt": "a cat"}),
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


# ---- threads that share modules ------------------------------------------------------------------------------------


def test_threads_that_share_modules_make_what_each_makes_alone(odd):
    """Two pipelines around the same networks, each with a scheduler and a tokenizer of its own, which have a state."""
    own = {"scheduler": type(odd.scheduler).from_config(odd.scheduler.config), "tokenizer": tiny_models.tokenizer()}
    components = (
        odd.components | own
    )  # a fast tokenizer keeps its padding from call to call, so threads can't share one
    pipes = [odd, quiet(type(odd)(**components, requires_safety_checker=False))]
    calls = [
        {"prompt": "a cat", "emotion": "awe"},
        {"prompt": "two dogs", "emotion": "fear", "num_inference_steps": 4},
    ]
    before, expected = state_of(odd), [guide(pipe, **call) for pipe, call in zip(pipes, calls)]
    outputs, barrier = [None, None], threading.Barrier(2)

    def run(index):
        barrier.wait(10)
        outputs[index] = guide(pipes[index], **calls[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for output, alone in zip(outputs, expected):
        assert output is not None
        torch.testing.assert_close(output.images, alone.images, rtol=0, atol=1e-5)
        assert [trace.inner_steps for trace in output.trace] == [trace.inner_steps for trace in alone.trace]
    assert state_of(odd) == before


@pytest.mark.parametrize("where", ["before", "after"])
def test_a_call_that_ends_amid_anothers_pass_does_it_no_harm(where):
    """Its hooks are gone then from the network, but not from the list of those that this pass has still to call."""
    pipe = tiny_models.muse_pipeline()
    components = pipe.components | {"scheduler": type(pipe.scheduler).from_config(pipe.scheduler.config)}
    other = quiet(type(pipe)(**components, requires_safety_checker=False))
    expected, thread = guide(pipe), threading.Thread(target=guide, args=(other,))
    started, go_on = threading.Event(), threading.Event()

    def meet(*_):
        if threading.current_thread() is thread:
            started.set()
            assert go_on.wait(20)
        elif not thread.is_alive() and not started.is_set():
            thread.start()
            assert started.wait(20)

    def let_it_end(*_):
        if started.is_set() and threading.current_thread() is not thread:
            go_on.set()
            thread.join(20)

    pipe.unet.down_blocks[0].register_forward_pre_hook(meet)  # amid a pass, when both calls have their hooks
    register = pipe.unet.register_forward_pre_hook if where == "before" else pipe.unet.register_forward_hook
    register(let_it_end)
    assert torch.equal(guide(pipe).images, expected.images)
    assert started.is_set() and not thread.is_alive()


# ---- the order of rows ---------------------------------------------------------------------------------------------


@every_family
def test_upstream_asks_the_network_for_the_null_prompts_first(family):
    """MUSE takes the last rows for the prompts'. Should upstream change their order, this fails, and so does MUSE."""
    parent, rows = tiny_models.parent_of(tiny_models.muse_pipeline(family)), []
    hook = lambda _, __, keywords, ___: rows.append(keywords["encoder_hidden_states"])  # noqa: E731
    handle = parent.unet.register_forward_hook(hook, with_kwargs=True)
    call = {"prompt": ["a cat", "two dogs"], "negative_prompt": ["rain", "snow"], "num_inference_steps": 1}
    parent(**call, output_type="latent")
    handle.remove()
    with torch.no_grad():
        prompts, negative = parent.encode_prompt(
            call["prompt"], device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True,
            negative_prompt=call["negative_prompt"],
        )[:2]  # fmt: skip
    order = "the order of rows is no longer null prompts, prompts: see `DenoisingStep`"
    assert len(rows) == 1 and torch.equal(rows[0], torch.cat([negative, prompts])), order
