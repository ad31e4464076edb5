"""Where no tokens are at work, the result is the stock pipeline's, bit for bit."""

import diffusers
import pytest
import tiny_models
import torch
from tiny_models import FAMILIES, every_family, generator, guide, parent_of, stock
from transformers import CLIPImageProcessor


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers under NumPy 2

CALLS = {
    "one prompt": {},
    "two prompts": {"prompt": ["a cat", "two dogs"]},
    "negative prompt": {"negative_prompt": "rain"},
    "images per prompt": {"prompt": ["a cat", "two dogs"], "num_images_per_prompt": 2},
    "no guidance": {"guidance_scale": 1.0},
    "guidance below one": {"guidance_scale": 0.0, "negative_prompt": "rain"},
    "rescaled guidance": {"guidance_rescale": 0.7},
    "noise in DDIM": {"eta": 0.7},
    "size": {"height": 16, "width": 40},
    "height alone": {"height": 16},
    "timesteps": {"timesteps": [900, 500, 100], "scheduler": "DDPMScheduler"},
    "sigmas": {"sigmas": [10.0, 3.0, 1.0], "scheduler": "EulerDiscreteScheduler"},
    "a generator each": {"num_images_per_prompt": 2, "generator": [7, 8]},
    "global generator": {"generator": None},
    "latents": {"latents": torch.randn(1, 4, 16, 16, generator=generator(5))},
    "embeddings": {"prompt": None, "encoded": ["a cat", "two dogs"], "semantic_prompt": "a cat"},
    "pixels": {"output_type": "pt"},
    "arrays": {"output_type": "np"},
}


def encode(pipe, prompts: list[str]) -> dict[str, torch.Tensor]:
    """What the call takes in place of prompts."""
    names = next(family.encoded for family in FAMILIES if type(pipe) is family.pipeline_class)
    with torch.no_grad():
        encoded = pipe.encode_prompt(prompts, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    return dict(zip(names, encoded))


NEVER = {"emotion": "awe", "semantic_threshold": float("inf")}


@every_family
@pytest.mark.parametrize("call", CALLS)
def test_where_no_tokens_are_at_work_it_is_the_parent(pipe, call):
    """Without an emotion, and with a gate that is never to open."""
    parent, arguments = parent_of(pipe), dict(CALLS[call])
    scheduler_class = getattr(diffusers, arguments.pop("scheduler", "DDIMScheduler"))
    parent.scheduler = pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config, skip_prk_steps=True)
    never = NEVER | {name: arguments.pop(name) for name in ("semantic_prompt",) if name in arguments}
    if "encoded" in arguments:
        arguments |= encode(pipe, arguments.pop("encoded"))
    ways = [(parent, {}), (pipe, {}), (pipe, never)]
    if "height" in arguments and "width" not in arguments:  # Stable Diffusion's drops it; with an emotion it counts
        ways.pop()
        assert guide(pipe, **never | arguments).images.shape[2:] == (8, 16)
    results = []
    for one, more in ways:
        torch.manual_seed(11)
        if isinstance(arguments.get("generator"), list):
            more = more | {"generator": [generator(seed) for seed in (7, 8)]}
        results.append(torch.as_tensor(stock(one, **{**arguments, **more})))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("init", ["random", "emotion"])
def test_tokens_leave_the_generators_alone(pipe, init):
    used, untouched = generator(), generator()
    guide(pipe, generator=used, emotion_tokens=init, **NEVER)
    torch.randn(1, 4, 16, 16, generator=untouched)  # all that the parent draws: its latents
    assert torch.equal(used.get_state(), untouched.get_state())


def test_positional_arguments_are_the_parents(pipe):
    arguments = ("a cat", 24, 32, 3, None, None, 5.0, "rain", 2, 0.0, generator(), None, None, None, None, None)
    rest = ("latent", False, None, 0.1)
    arguments_again = (*arguments[:10], generator(), *arguments[11:])
    images, verdicts = pipe(*arguments, *rest)
    expected, _ = parent_of(pipe)(*arguments_again, *rest)
    assert torch.equal(images, expected) and verdicts is None


def test_closed_samples_of_a_batch_are_stock(pipe):
    """One entry is None, one gate never opens: their neighbour's tokens are none of their business."""
    prompts = ["a cat", "two dogs", "a red house"]
    generators = [generator(seed) for seed in range(3)]
    output = guide(pipe, prompt=prompts, emotion=["awe", None, "fear"], generator=generators)
    expected = stock(pipe, prompt=prompts, generator=[generator(seed) for seed in range(3)])
    # Not to the bit: the network sees other rows beside it. The tolerance is that of batches against single calls.
    torch.testing.assert_close(output.images[1], expected[1], rtol=0, atol=1e-4)
    for guided in (0, 2):
        assert (output.images[guided] - expected[guided]).abs().max() > 1e-3
    trace = output.trace[1]
    assert (trace.emotion, trace.gate_step, trace.loss, trace.inherent_emotion) == ({}, None, [], None)


def test_stock_callbacks_of_the_old_style_still_work(pipe):
    steps = []
    with pytest.warns(FutureWarning, match="callback"):
        pipe("a cat", num_inference_steps=2, callback=lambda i, t, latents: steps.append(i), callback_steps=1)
    assert steps == [0, 1]


@pytest.mark.parametrize("muse", [{}, NEVER], ids=["no emotion", "closed gate"])
def test_the_safety_checker_is_asked(pipe, muse):
    from diffusers.pipelines.stable_diffusion import StableDiffusionSafetyChecker

    torch.manual_seed(0)
    config = tiny_models.clip_model().config
    checker = StableDiffusionSafetyChecker._from_config(config, attn_implementation="eager").eval()
    checker.concept_embeds_weights.data.fill_(-2.0)  # every cosine exceeds it
    size = {"height": 32, "width": 32}
    pipe.register_modules(
        safety_checker=checker, feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=size)
    )
    output = guide(pipe, **{"emotion": None, **muse}, output_type="pt", num_inference_steps=1)
    assert output.nsfw_content_detected == [True]
    assert output.images.abs().max() == 0, "upstream blackens the picture"
