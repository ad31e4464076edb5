"""The rival that moves the noise itself by the classifier's gradient at the latents."""

import argparse
import gc

import diffusers
import pytest
import tiny_models
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, DiffusionPipeline, EulerDiscreteScheduler
from muse_examples.evaluation.methods import Studio
from muse_examples.evaluation.universal_guidance import universal, universal_guidance, universally_guided
from muse_examples.runs import Job
from test_guidance import GUIDANCE_SCALE, LATENTS, Reference
from test_stock import CALLS, encode
from tiny_models import every_family, generator, parent_of, stock
from torch.nn import functional as F


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers under NumPy 2

WEIGHT = 30.0
STEPS = 3


def guided(pipe, emotions=("awe",), prompts=("a cat",), weight=WEIGHT, **call) -> torch.Tensor:
    """The latents of a short call, shape `(n, 4, 16, 16)`."""
    defaults = {"num_inference_steps": STEPS, "generator": [generator(seed) for seed in range(len(prompts))]}
    return universal_guidance(pipe, prompts, emotions, weight, **{**defaults, "output_type": "latent", **call})


def first_latents(pipe, **call) -> torch.Tensor:
    """The latents after the first of three steps, at which the call ends."""
    seen = []

    def callback(pipe, step, timestep, values):
        seen.append(values["latents"].clone())
        pipe._interrupt = True
        return {}

    latents = LATENTS.to(pipe.unet.dtype)
    guided(pipe, callback_on_step_end=callback, latents=latents, guidance_scale=GUIDANCE_SCALE, **call)
    return seen[0]


def predicting(pipe, prediction_type: str) -> DiffusionPipeline:
    """The pipeline, whose network is now taken to predict something else."""
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, prediction_type=prediction_type)
    return pipe


# ---- one step, by hand ---------------------------------------------------------------------------------------------


class Step(Reference):
    """The first step of DDIM in float64, in terms of noise whatever the network predicts, straight from Eq. 6."""

    def take(self, latents: torch.Tensor, prediction_type: str, label: int, after: torch.Tensor) -> torch.Tensor:
        signal, noise = self.alpha.sqrt(), (1 - self.alpha).sqrt()
        self.latents = z = latents.double().requires_grad_()
        self.noise_null = self.noise(self.null, self.null_added)
        output = self.guided(self.noise(self.prompt, self.prompt_added))
        eps = {
            "epsilon": output,
            "v_prediction": signal * output + noise * z,
            "sample": (z - signal * output) / noise,
        }[prediction_type]
        loss = F.cross_entropy(self.logits(eps), torch.tensor([label]))
        gradient = torch.autograd.grad(loss, z)[0]
        assert (WEIGHT * noise * gradient).abs().max() > 1e-2, "it has to be seen"
        moved = (eps + WEIGHT * noise * gradient).detach()
        x0 = (z.detach() - noise * moved) / signal
        return after.sqrt() * x0 + (1 - after).sqrt() * moved


@every_family
@pytest.mark.parametrize("prediction_type", ["epsilon", "v_prediction", "sample"])
def test_a_step_is_the_papers(pipe, prediction_type):
    predicting(pipe, prediction_type)
    reference = Step(pipe, LATENTS, "awe", [])
    after = pipe.scheduler.alphas_cumprod[334].double()
    label = pipe.emotion_labels.index("awe")
    expected = reference.take(LATENTS, prediction_type, label, after)
    assert (first_latents(pipe, weight=0.0) - expected).norm() > 0.01 * expected.norm(), "it leads away from stock"
    error = (first_latents(pipe) - expected).norm() / expected.norm()
    assert error < 1e-4


def test_a_step_that_recurs_returns_to_its_noise_level_in_between(pipe):
    reference = Step(pipe, LATENTS, "awe", [])
    after, label = pipe.scheduler.alphas_cumprod[334].double(), pipe.emotion_labels.index("awe")
    share = reference.alpha / after
    fresh = torch.randn(LATENTS.shape, generator=generator()).double()
    again = share.sqrt() * reference.take(LATENTS, "epsilon", label, after) + (1 - share).sqrt() * fresh
    expected = reference.take(again, "epsilon", label, after)
    found = first_latents(pipe, recurrence=2, generator=generator())
    assert (found - expected).norm() / expected.norm() < 1e-4


def test_schedulers_of_other_units_walk_the_same_path(pipe):
    """Euler's latents are those of DDIM, by the square root of 1 + sigma ** 2."""
    expected = first_latents(pipe)
    pipe.scheduler = EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing="leading")
    found = first_latents(pipe)
    error = found / (1 + pipe.scheduler.sigmas[1] ** 2).sqrt() - expected
    assert error.norm() / expected.norm() < 1e-4


@pytest.mark.parametrize(
    "name",
    ["DPMSolverMultistepScheduler", "HeunDiscreteScheduler", "EulerAncestralDiscreteScheduler", "PNDMScheduler"],
)
def test_schedulers_of_previews_serve(pipe, name):
    pipe.scheduler = getattr(diffusers, name).from_config(pipe.scheduler.config, skip_prk_steps=True)
    moved, plain = (guided(pipe, weight=weight, generator=generator()) for weight in (WEIGHT, 0.0))
    assert moved.isfinite().all() and (moved - plain).abs().max() > 1e-3


def test_a_step_whose_noise_tells_nothing_is_the_parents(pipe):
    """Zero terminal SNR: at the first timestep the noise cannot be told from v."""
    changes = {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    assert torch.equal(first_latents(pipe), first_latents(pipe, weight=0.0))
    moved, plain = (guided(pipe, weight=weight) for weight in (0.01, 0.0))
    assert moved.isfinite().all() and not torch.equal(moved, plain)


# ---- beside the parent ---------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("call", ["images per prompt", "no guidance", "rescaled guidance", "sigmas", "embeddings"])
def test_without_weight_it_is_the_parent(pipe, call):
    arguments = {"prompt": "a cat", **CALLS[call]}
    scheduler_class = getattr(diffusers, arguments.pop("scheduler", "DDIMScheduler"))
    parent = parent_of(pipe)
    parent.scheduler = pipe.scheduler = scheduler_class.from_config(pipe.scheduler.config)
    arguments.pop("semantic_prompt", None)
    count = 1 if arguments["prompt"] == "a cat" else 2
    if "encoded" in arguments:
        arguments |= encode(pipe, arguments.pop("encoded"))
    results = []
    for one in (parent, pipe):
        if isinstance(arguments.get("generator"), list):
            arguments["generator"] = [generator(seed) for seed in (7, 8)]
        with universally_guided(pipe, ["awe"] * count, 0.0) if one is pipe else torch.no_grad():
            results.append(torch.as_tensor(stock(one, **arguments)))
    # Upstream mixes the rescaled noise and its own by shares, which in the end are those of one noise.
    exact = {"rtol": 0, "atol": 1e-4 if call == "rescaled guidance" else 0}
    torch.testing.assert_close(results[1], results[0], **exact)


def test_a_picture_without_an_emotion_is_stock(pipe):
    prompts = ["a cat", "two dogs"]
    made = guided(pipe, [None, "fear"], prompts)
    expected = stock(pipe, prompt=prompts, generator=[generator(seed) for seed in range(2)])
    assert torch.equal(made[0], expected[0])
    assert (made[1] - expected[1]).abs().max() > 1e-2


@every_family
def test_a_picture_does_not_depend_on_its_batch(pipe):
    """Nor do several images of one prompt."""
    prompts, emotions = ["a cat", "two dogs", "a cat"], ["awe", "fear", "anger"]
    batch = guided(pipe, emotions, prompts)
    for b in range(3):
        alone = guided(pipe, emotions[b : b + 1], prompts[b : b + 1], generator=generator(b))
        torch.testing.assert_close(batch[b], alone[0], rtol=0, atol=2e-4)
    pair = {"num_images_per_prompt": 2, "generator": [generator(seed) for seed in range(4)]}
    several = guided(pipe, ["awe", "fear"], ["a cat", "two dogs"], **pair)
    alone = guided(pipe, ["fear"], ["two dogs"], generator=generator(2))
    torch.testing.assert_close(several[2], alone[0], rtol=0, atol=2e-4)


@every_family
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_serves(family, dtype):
    """As far as noise allows, the gradient is that of single precision; a VAE that overflows is back in its dtype."""
    single, half = tiny_models.muse_pipeline(family), tiny_models.muse_pipeline(family).to(dtype)
    (away, plain), whole = ((first_latents(half, weight=w).float() for w in (WEIGHT, 0.0)), first_latents(single))
    assert half.vae.dtype == half.unet.dtype == dtype
    expected = whole - first_latents(single, weight=0.0)
    assert F.cosine_similarity((away - plain).flatten(), expected.flatten(), dim=0) > 0.9
    assert universal_guidance(half, ["a cat"], ["awe"], 1.0, num_inference_steps=1)[0].size == (32, 32)


def test_a_gradient_that_overflows_leaves_its_step_out(pipe, monkeypatch, caplog):
    look = type(pipe)._classify
    monkeypatch.setattr(
        type(pipe), "_classify", lambda self, image: look(self, image) * torch.tensor([[torch.inf], [1.0]])
    )
    prompts = ["a cat", "two dogs"]
    diffusers.utils.logging.enable_propagation()
    made = guided(pipe, ["awe", "fear"], prompts)
    diffusers.utils.logging.disable_propagation()
    assert "images [0]" in caplog.text
    monkeypatch.undo()
    expected = guided(pipe, [None, "fear"], prompts)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-4)


def test_clip_guides_where_there_is_no_classifier(family):
    pipe = tiny_models.muse_pipeline(family, emotion_classifier=None)
    assert (guided(pipe) - guided(pipe, weight=0.0)).abs().max() > 1e-3


def test_storybook_evokes_more():
    pipe = tiny_models.storybook()
    emotions, prompts = ["contentment", "amusement"], ["a house in the park", "a cat on the beach"]
    labels = [pipe.emotion_labels.index(emotion) for emotion in emotions]

    def probabilities(weight: float) -> torch.Tensor:
        images = guided(pipe, emotions, prompts, weight, num_inference_steps=10, output_type="pt")
        with torch.no_grad():
            return pipe._classify(images * 2 - 1).softmax(dim=-1)[range(2), labels]

    assert (probabilities(10.0) > probabilities(0.0) + 0.2).all()


# ---- nothing stays -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("recurrence", [1, 2])
def test_nothing_stays_changed_whatever_happens(pipe, monkeypatch, error, recurrence):
    before, scheduler = stock(pipe), pipe.scheduler
    modules = [pipe.unet, pipe.vae, pipe.emotion_classifier, pipe.clip_model]
    pipe.unet.conv_in.weight.requires_grad_(False)
    pipe.vae.train()

    def flags() -> list:
        return [
            ([weight.requires_grad for weight in module.parameters()], [part.training for part in module.modules()])
            for module in modules
        ]

    flags_before, calls, classify = flags(), [], pipe._classify

    def fail(image):
        calls.append(image)
        if len(calls) == 2:
            raise error("enough")
        return classify(image)

    monkeypatch.setattr(pipe, "_classify", fail)
    with pytest.raises(error, match="enough"):
        guided(pipe, recurrence=recurrence)
    assert "forward" not in vars(pipe.unet) and pipe.scheduler is scheduler
    assert flags() == flags_before and torch.is_grad_enabled()
    pipe.vae.eval()
    assert torch.equal(stock(pipe), before)


def test_a_hook_of_accelerate_stays(pipe):
    add_hook_to_module(pipe.unet, ModelHook())
    hooked = pipe.unet.forward
    assert (guided(pipe) - guided(pipe, weight=0.0)).abs().max() > 1e-3
    assert pipe.unet.forward is hooked


def test_no_graph_outlives_its_step(pipe, monkeypatch):
    def count_graphs() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) and one.grad_fn is not None for one in gc.get_objects())

    seen, classify = [], pipe._classify

    def count(image):
        seen.append(count_graphs())
        return classify(image)

    monkeypatch.setattr(pipe, "_classify", count)
    others = count_graphs()  # what earlier tests of the same process left behind
    made = guided(pipe)
    assert not made.requires_grad and count_graphs() <= others
    assert len(set(seen)) == 1, "each step starts with as much as the first"


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"emotions": ["joy of life"]}, "not known to the classifier"),
        ({"emotions": ["awe", "fear"]}, "2 entries for 1 prompts"),
        ({"recurrence": 0}, "1 or more"),
        ({"scheduler": "EulerDiscreteScheduler", "recurrence": 2}, "needs a DDIMScheduler, not Euler"),
        ({"scheduler": "EDMEulerScheduler"}, "does not tell the noise level"),
    ],
)
def test_bad_input_is_refused(pipe, arguments, message):
    if name := arguments.pop("scheduler", None):
        config = {key: pipe.scheduler.config[key] for key in ("prediction_type",)}
        pipe.scheduler = getattr(diffusers, name).from_config(config)
    with pytest.raises(ValueError, match=message):
        guided(pipe, **arguments)
    assert "forward" not in vars(pipe.unet)


def test_pure_noise_is_refused_where_noise_is_predicted(pipe):
    changes = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **changes)
    with pytest.raises(ValueError, match="pure noise"):
        guided(pipe)


# ---- the row -------------------------------------------------------------------------------------------------------


def test_the_row_makes_pictures_of_jobs(pipe, count_calls):
    studio = Studio(argparse.Namespace(device="cpu", base="none", num_inference_steps=2))
    studio.pipe = pipe
    jobs = [Job("a cat", "awe", 0), Job("two dogs", {"fear": 0.5, "awe": 0.5}, 1)]
    row = universal(WEIGHT)
    assert row.name == "Universal Guidance, weight 30" and row.task == "generation"
    calls = count_calls(pipe.unet)
    made = row(studio, jobs)
    assert row.calls(2, {}) == (4, 4) and len(calls) == 2, "null prompt and prompt at once"
    for job, one in zip(jobs, made):
        emotions = [job.emotion]
        alone = universal_guidance(
            pipe, [job.prompt], emotions, WEIGHT, num_inference_steps=2, generator=generator(job.seed)
        )
        pixels = [torch.tensor(list(image.tobytes())) for image in (one.image, alone[0])]
        assert (pixels[0] - pixels[1]).abs().max() <= 1
    twice = universal(WEIGHT, recurrence=2)
    assert twice.name != row.name and twice.calls(2, {}) == (8, 8)
    calls.calls.clear()
    assert len(twice(studio, jobs)) == 2 and len(calls) == 4
