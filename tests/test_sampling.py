"""Guided calls with every scheduler, prediction, schedule and sampling argument of the parent."""

import inspect
import math

import diffusers
import pytest
import torch
from diffusers import DDIMScheduler
from test_guidance import sees_tokens
from tiny_models import STABLE_DIFFUSION, STABLE_DIFFUSION_XL, generator, guide, muse_pipeline, parent_of, stock, unet


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers under NumPy 2

SCHEDULERS = {
    "DDIM": ("DDIMScheduler", {}),
    "DDPM": ("DDPMScheduler", {}),
    "PNDM": ("PNDMScheduler", {"skip_prk_steps": True}),
    "PNDM with Runge-Kutta": ("PNDMScheduler", {"skip_prk_steps": False}),
    "DPM++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "SDE-DPM++": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "UniPC": ("UniPCMultistepScheduler", {}),
    "Euler": ("EulerDiscreteScheduler", {}),
    "Euler ancestral": ("EulerAncestralDiscreteScheduler", {}),
    "Heun": ("HeunDiscreteScheduler", {}),
    "LMS": ("LMSDiscreteScheduler", {}),
    "LCM": ("LCMScheduler", {}),
    "TCD": ("TCDScheduler", {}),
}
# What each makes of the three predictions is tested with the functions; here that the loop asks as it has to.
PREDICTIONS = [
    *((STABLE_DIFFUSION, name, "epsilon") for name in SCHEDULERS),
    *((STABLE_DIFFUSION, name, "v_prediction") for name in ("DDIM", "PNDM")),
    (STABLE_DIFFUSION, "Euler", "sample"),
    *((STABLE_DIFFUSION_XL, name, "epsilon") for name in ("DDIM", "Heun")),
]
ZERO_SNR = {
    name: settings
    for name, settings in SCHEDULERS.items()
    if "rescale_betas_zero_snr" in inspect.signature(getattr(diffusers, settings[0])).parameters
}
NEVER = {"semantic_threshold": math.inf}


def with_scheduler(pipe, name: str, **config):
    """The pipeline with another scheduler on its own noise schedule, at whole timesteps."""
    class_name, settings = SCHEDULERS[name]
    pipe.scheduler = getattr(diffusers, class_name).from_config(pipe.scheduler.config, **(settings | config))
    return pipe


def previews(pipe, count_calls) -> tuple:
    """Counts what the network saw and said, and what the decoder of previews was given."""
    return count_calls(pipe.unet), count_calls(pipe.vae.post_quant_conv)


def looked_at(network) -> list:
    """The calls of the network whose answer became a preview."""
    return network.calls[:1] + [call for call in network.calls[1:] if sees_tokens(call)]


def assert_previews_are_ddims(pipe, calls) -> None:
    """
    Each x0 that was decoded against DDIM's own `pred_original_sample`, from what the network saw at the same
    timestep. At guidance 1 the network's output is the noise, so the two counts go in step, but for the parent's own
    calls after the first: what they say is not looked at.
    """
    names = ("num_train_timesteps", "prediction_type", "rescale_betas_zero_snr", "timestep_spacing")
    config = {name: pipe.scheduler.config[name] for name in names if name in pipe.scheduler.config}
    ddim = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False, **config)
    ddim.set_timesteps(4)
    network, decoder = looked_at(calls[0]), calls[1].calls
    assert len(network) == len(decoder) > 0
    for (((model_input, timestep, *_), _), (noise, *_)), (((latents,), _), _) in zip(network, decoder):
        x0 = ddim.step(noise, int(timestep), model_input).pred_original_sample
        scale = x0.abs().max().item()
        torch.testing.assert_close(latents * pipe.vae.config.scaling_factor, x0, rtol=1e-3, atol=1e-3 * scale)


# ---- schedulers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family, name, prediction", PREDICTIONS, ids=str)
def test_the_classifier_sees_the_clean_image_of_the_step(family, count_calls, name, prediction):
    pipe = with_scheduler(muse_pipeline(family), name, prediction_type=prediction)
    calls = previews(pipe, count_calls)
    output = guide(pipe, guidance_scale=1.0, num_inference_steps=4)
    assert output.images.isfinite().all()
    assert_previews_are_ddims(pipe, calls)
    steps = len(pipe.scheduler.timesteps)
    assert len(output.trace[0].loss) == steps == pipe.num_timesteps
    assert output.trace[0].loss[0][1] < output.trace[0].loss[0][0], "the tokens go down the loss"


def state_of(scheduler) -> dict:
    """Where a scheduler stands: counters, timesteps and sigmas whole, of what it remembers the shapes."""

    def describe(value):
        if isinstance(value, torch.Tensor):
            return value.tolist() if value.ndim < 2 else value.shape
        return [describe(one) for one in value] if isinstance(value, (list, tuple)) else str(value)

    return {name: describe(value) for name, value in vars(scheduler).items()}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_schedulers_and_generators_end_as_after_a_stock_call(name):
    """Neither the gate nor the inner loop steps the scheduler or draws from the generator, start tokens included."""
    settings = {"num_inference_steps": 4}
    calls = {
        "parent": lambda pipe, random: stock(parent_of(pipe), generator=random, **settings),
        "no emotion": lambda pipe, random: stock(pipe, generator=random, **settings),
        "closed": lambda pipe, random: guide(pipe, generator=random, **settings, **NEVER).images,
        "guided": lambda pipe, random: guide(pipe, generator=random, **settings, max_inner_steps=1).images,
    }
    images, ends, whole = {}, {}, muse_pipeline()
    for kind, call in calls.items():
        pipe, random = with_scheduler(whole, name), generator()
        images[kind] = call(pipe, random)
        ends[kind] = (state_of(pipe.scheduler), random.get_state().tolist())
    assert all(end == ends["parent"] for end in ends.values())
    same = [torch.equal(image, images["parent"]) for image in images.values()]
    assert same == [True, True, True, False], "bit for bit, unless tokens are at work"


def accepting(argument: str) -> list[str]:
    return [
        name
        for name, (class_name, _) in SCHEDULERS.items()
        if argument in inspect.signature(getattr(diffusers, class_name).set_timesteps).parameters
    ]


@pytest.mark.parametrize("name", accepting("timesteps"))
def test_custom_timesteps_are_walked(pipe, count_calls, name):
    with_scheduler(pipe, name)
    calls, timesteps = previews(pipe, count_calls), [899, 499, 99]
    output = guide(pipe, timesteps=timesteps, guidance_scale=1.0, max_inner_steps=0)
    assert sorted({int(arguments[1]) for (arguments, _), _ in calls[0].calls}, reverse=True) == timesteps
    assert len(output.trace[0].loss) == len(pipe.scheduler.timesteps)
    assert_previews_are_ddims(pipe, calls)
    assert torch.equal(guide(pipe, timesteps=timesteps, **NEVER).images, stock(parent_of(pipe), timesteps=timesteps))


def test_custom_sigmas_are_walked(pipe, count_calls):
    """Euler's; UniPC takes them for flow matching only. Their timesteps lie between those of the training."""
    with_scheduler(pipe, "Euler")
    calls, sigmas = previews(pipe, count_calls), [12.0, 4.0, 1.0, 0.0]
    guide(pipe, sigmas=sigmas, guidance_scale=1.0, max_inner_steps=0)
    steps = sigmas[:1] + sigmas[:3]  # the first has a pass without tokens besides
    asked = looked_at(calls[0])
    assert len(asked) == len(calls[1]) == len(steps)
    for ((inputs, _), (noise, *_)), (((latents,), _), _), sigma in zip(asked, calls[1].calls, steps):
        x0 = inputs[0] * (1 + sigma**2) ** 0.5 - sigma * noise
        torch.testing.assert_close(latents * pipe.vae.config.scaling_factor, x0, rtol=1e-4, atol=1e-4)
    assert torch.equal(guide(pipe, sigmas=sigmas, **NEVER).images, stock(parent_of(pipe), sigmas=sigmas))


@pytest.mark.parametrize("argument", ["timesteps", "sigmas"])
def test_schedules_that_a_scheduler_does_not_take_are_refused(pipe, count_calls, argument):
    """By upstream's own error, before any work."""
    calls = count_calls(pipe.unet, pipe.text_encoder)
    for name in set(SCHEDULERS) - set(accepting(argument)):
        with pytest.raises(ValueError, match=SCHEDULERS[name][0]):
            guide(with_scheduler(pipe, name), **{argument: [3, 2, 1]})
    assert len(calls) == 0


# ---- zero terminal SNR ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ZERO_SNR)
def test_pure_noise_has_a_preview_with_velocities(pipe, count_calls, name):
    zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing", "prediction_type": "v_prediction"}
    with_scheduler(pipe, name, **zero)
    calls = previews(pipe, count_calls)
    output = guide(pipe, guidance_scale=1.0, guidance_rescale=0.7, max_inner_steps=1)
    assert int(calls[0].calls[0][0][0][1]) == 999
    assert output.images.isfinite().all() and torch.tensor(output.trace[0].loss).isfinite().all()
    assert_previews_are_ddims(pipe, calls)
    assert torch.equal(guide(pipe, **NEVER).images, stock(parent_of(pipe)))


@pytest.mark.parametrize("name", ZERO_SNR)
def test_pure_noise_has_no_preview_with_noise_predictions(pipe, count_calls, name):
    """Schedulers that keep a trace of signal in it may go on; the others say so before any work."""
    with_scheduler(pipe, name, rescale_betas_zero_snr=True, timestep_spacing="trailing")
    calls = count_calls(pipe.unet, pipe.text_encoder)
    if pipe.scheduler.alphas_cumprod[-1] > 0:
        assert guide(pipe).images.isfinite().all()
        return
    with pytest.raises(ValueError, match=rf"`scheduler` {SCHEDULERS[name][0]}.*zero terminal SNR.*v_prediction"):
        guide(pipe)
    assert len(calls) == 0


# ---- sampling arguments --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheduler", ["LCM", "TCD"])
@pytest.mark.parametrize("scale", [0.0, 1.0, 8.0])
def test_distilled_models_are_told_the_guidance_scale(count_calls, scheduler, scale):
    """LCM's networks take it as an embedding; there is no null prompt then, whatever the scale."""
    pipe = with_scheduler(muse_pipeline(unet=unet(time_cond_proj_dim=8)), scheduler)
    arguments = {"guidance_scale": scale, "prompt": ["a cat", "two dogs"]}
    assert torch.equal(guide(pipe, **arguments, **NEVER).images, stock(parent_of(pipe), **arguments))
    calls = count_calls(pipe.unet)
    output = guide(pipe, **arguments)
    assert output.images.isfinite().all() and output.trace[0].loss[0][-1] < output.trace[0].loss[0][0]
    expected = pipe.get_guidance_scale_embedding(torch.tensor([scale - 1.0]), embedding_dim=8)
    for (arguments, keywords), _ in calls.calls:
        assert torch.equal(keywords["timestep_cond"], expected.expand(arguments[0].shape[0], -1))


@pytest.mark.parametrize("rescale", [0.0, 0.7])
@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_the_step_is_taken_with_guided_noise(pipe, count_calls, scale, rescale):
    """Scale and rescaling are applied to the prompt with its tokens as upstream applies them to the prompt."""
    calls, taken = count_calls(pipe.unet), []
    arguments = {"guidance_scale": scale, "guidance_rescale": rescale}

    def callback(pipe, step, timestep, values):
        taken.append((timestep, values["latents"]))
        return {}

    guide(pipe, **arguments, max_inner_steps=0, num_inference_steps=2, callback_on_step_end=callback)
    (latents, asked), (_, noise) = [
        (inputs[0], output[0]) for (inputs, _), output in calls.calls if inputs[1] == taken[1][0]
    ]
    latents = latents[:1]
    if scale > 1:
        null, cond = asked[:1], noise
        noise = null + scale * (cond - null)
        if rescale:  # Common Diffusion Noise Schedules and Sample Steps are Flawed, Eq. 15, 16
            axes = {"dim": (1, 2, 3), "keepdim": True}
            noise = rescale * noise * cond.std(**axes) / noise.std(**axes) + (1 - rescale) * noise
    ddim = DDIMScheduler.from_config(pipe.scheduler.config)
    ddim.set_timesteps(2)
    torch.testing.assert_close(ddim.step(noise, taken[1][0], latents).prev_sample, taken[1][1], rtol=0, atol=1e-5)


def outcome(call):
    """What a call ends with: its result, or its error."""
    try:
        return call()
    except Exception as error:
        return type(error), str(error)


def test_clip_skip_ends_as_the_parents(pipe):
    """Under some releases of transformers upstream's own code does not find the text encoder's last norm."""
    expected = outcome(lambda: stock(parent_of(pipe), clip_skip=1))
    for call in (lambda: stock(pipe, clip_skip=1), lambda: guide(pipe, clip_skip=1, **NEVER).images):
        ours = outcome(call)
        assert torch.equal(ours, expected) if isinstance(expected, torch.Tensor) else ours == expected


@pytest.mark.parametrize("init", ["random", "emotion"])
def test_clip_skip_takes_an_earlier_layer(pipe, count_calls, init):  # of the prompt, and of the emotion's word
    if not hasattr(pipe.text_encoder, "text_model"):  # what upstream's code looks for
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    expected = stock(parent_of(pipe), clip_skip=1)
    assert torch.equal(guide(pipe, clip_skip=1, emotion_tokens=init, **NEVER).images, expected)
    assert not torch.equal(stock(pipe), expected)
    calls = count_calls(pipe.unet)
    guide(pipe, clip_skip=1, emotion_tokens=init)
    embeds, _ = pipe.encode_prompt("a cat", "cpu", 1, False, clip_skip=1)
    assert torch.equal(calls.calls[-1][0][1]["encoder_hidden_states"][:, :16], embeds)


def test_cross_attention_kwargs_reach_every_pass(pipe, count_calls):
    calls = count_calls(pipe.unet)
    output = guide(pipe, cross_attention_kwargs={"scale": 0.5})
    assert output.images.isfinite().all()
    assert all(keywords["cross_attention_kwargs"] == {"scale": 0.5} for (_, keywords), _ in calls.calls)
    assert pipe.cross_attention_kwargs == {"scale": 0.5}


def test_embeddings_serve_in_place_of_prompts_with_a_gate_of_their_own(pipe):
    """Without a prompt the gate has to be told what to ask about, or that it is open or shut."""
    embeds, null = pipe.encode_prompt("a cat", "cpu", 1, True)
    given = {"prompt": None, "prompt_embeds": embeds, "negative_prompt_embeds": null}
    threshold = guide(pipe, **NEVER).trace[0].similarity[1]
    expected = guide(pipe, semantic_threshold=threshold)
    output = guide(pipe, semantic_threshold=threshold, semantic_prompt="a cat", **given)
    assert torch.equal(output.images, expected.images) and output.trace == expected.trace
    with pytest.raises(ValueError, match="`semantic_prompt`"):
        guide(pipe, semantic_threshold=threshold, **given)
    assert torch.equal(guide(pipe, **given).images, guide(pipe).images)
    assert torch.equal(guide(pipe, **given, **NEVER).images, stock(pipe))
