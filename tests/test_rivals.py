"""The rivals in editing, and the pipelines of other classes that they share the base with."""

import argparse
from functools import wraps
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    EDMEulerScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
)
from muse_examples.evaluation.methods import Method, Studio
from muse_examples.evaluation.rivals import (
    INSTRUCT_PIX2PIX,
    LEDITS,
    SDEDIT,
    instruct_pix2pix,
    ledits,
    sde_solver,
    sdedit,
)
from muse_examples.runs import Job
from PIL import Image
from tiny_models import STABLE_DIFFUSION_XL, every_family, generator, quiet, stock


pytestmark = pytest.mark.filterwarnings("ignore:__array:DeprecationWarning")  # diffusers' schedulers under NumPy 2

STEPS = 4


def studio_of(pipe: DiffusionPipeline, **options) -> Studio:
    """A studio whose base is a tiny pipeline."""
    options = {"device": "cpu", "base": "none", "dtype": "float32", "num_inference_steps": STEPS, **options}
    studio = Studio(argparse.Namespace(**options))
    studio.pipe = pipe
    return studio


def with_sides(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The pipeline with a network that has cross-attention at a quarter of the latents' sides, as released ones."""
    blocks = {
        "block_out_channels": (8, 16, 16),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    }
    torch.manual_seed(0)
    pipe.unet = UNet2DConditionModel.from_config(pipe.unet.config, **blocks).eval()
    return pipe


def save_instructed(family: tiny_models.Family, folder: Path, channels: int = 8) -> str:
    """A tiny checkpoint of InstructPix2Pix, whose network takes the source beside the latents."""
    components = family.components()
    torch.manual_seed(1)
    components["unet"] = UNet2DConditionModel.from_config(components["unet"].config, in_channels=channels)
    for name, weight in components["unet"].named_parameters():
        if "attn2" in name and name.endswith("weight"):
            weight.data.mul_(3)
    kind = INSTRUCT_PIX2PIX[family is STABLE_DIFFUSION_XL]
    kind(**components, **family.settings).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def jobs(tmp_path) -> list[Job]:
    """Edits of one source of 48 x 32 px."""
    across, down = np.meshgrid(np.linspace(0, 1, 48), np.linspace(0, 1, 32))
    pixels = np.stack([across, down, 0.5 + 0.5 * np.sin(9 * across * down)], axis=-1)
    Image.fromarray((255 * pixels).astype(np.uint8)).save(tmp_path / "source.png")
    emotions = {"awe": 0, "fear": 1, "anger": 0}
    return [Job("a cat", emotion, seed, source=tmp_path / "source.png") for emotion, seed in emotions.items()]


@pytest.fixture(params=["sdedit", "ledits", "instruct_pix2pix"])
def row(request, family, tmp_path) -> Method:
    """Each of the rows."""
    if request.param == "instruct_pix2pix":
        return instruct_pix2pix(save_instructed(family, tmp_path / "instructed"))
    return {"sdedit": sdedit(0.75), "ledits": ledits(edit_threshold=0.3)}[request.param]


def pixels(made) -> np.ndarray:
    """Of pictures, shape `(n, H, W, 3)`."""
    return np.stack([np.asarray(one.image) for one in made]).astype(int)


# ---- every row -----------------------------------------------------------------------------------------------------


@every_family
def test_a_picture_is_of_its_emotion_and_seed_whatever_its_batch(pipe, row, jobs):
    studio = studio_of(pipe)
    made = pixels(row(studio, jobs))
    assert row.task == "editing" and np.array_equal(pixels(row(studio, jobs)), made)
    again = [jobs[2], Job("a cat", "awe", 1, source=jobs[0].source), jobs[0]]
    in_another_batch = pixels(row(studio, again))
    assert np.abs(made[[2, 0]] - in_another_batch[[0, 2]]).max() <= 1, "but for the last bit"
    alone = pixels(row(studio_of(pipe), jobs[:1]))
    assert np.abs(alone[0] - made[0]).max() <= 1
    assert np.abs(made[0] - made[2]).mean() > 0.3, "two emotions of one seed"
    assert np.abs(in_another_batch[1] - made[0]).mean() > 1, "two seeds of one emotion"


@every_family
def test_calls_are_those_of_the_network(pipe, row, jobs, monkeypatch):
    rows, forward = [], UNet2DConditionModel.forward

    def count(self, latents, *arguments, **keywords):
        rows.append(len(latents))
        return forward(self, latents, *arguments, **keywords)

    monkeypatch.setattr(UNet2DConditionModel, "forward", count)
    row(studio_of(pipe), jobs)
    assert row.calls(STEPS, {}) == (sum(rows) / len(jobs), 0)


@every_family
def test_nothing_of_a_row_is_left_for_the_next(pipe, row, jobs):
    before, config = stock(pipe), dict(pipe.scheduler.config)
    processors, scheduler = pipe.unet.attn_processors, pipe.scheduler
    row(studio_of(pipe), jobs)
    assert pipe.unet.attn_processors == processors, "the very same"
    assert pipe.scheduler is scheduler and dict(scheduler.config) == config
    assert torch.equal(stock(pipe), before)


@every_family
def test_the_size_is_that_of_muses_edits(pipe, row, jobs):
    edit = {"image": Image.open(jobs[0].source), "num_inference_steps": 1, "generator": generator()}
    expected = pipe("a cat", **edit).images[0].size
    assert expected == (40, 24)
    if row.name == "LEDITS++":
        expected = (32, 32)
    assert {one.image.size for one in row(studio_of(pipe), jobs[:2])} == {expected}
    assert row(studio_of(pipe, width=64), jobs[:1])[0].image.size == (64, 32 if row.name == "LEDITS++" else 40)
    assert row(studio_of(pipe, width=64, height=32), jobs[:1])[0].image.size == (64, 32)


@every_family
def test_half_precision_serves(family, row, jobs, dtype="float16"):
    """XL's VAE overflows, so upstream moves it to float32 and, after LEDITS++' inversion, forgets it there."""
    pipe = tiny_models.muse_pipeline(family).to(getattr(torch, dtype))
    made = row(studio_of(pipe, dtype=dtype), jobs[:1])
    assert pipe.vae.dtype == pipe.unet.dtype == getattr(torch, dtype)
    assert pixels(made).std() > 5, "no black picture"


def test_a_mixture_is_put_into_words(pipe, row, jobs):
    mixed = Job("a cat", {"awe": 0.5, "fear": 0.5}, 0, source=jobs[0].source)
    words = Job("a cat", "awe and fear", 0, source=jobs[0].source)
    assert np.array_equal(pixels(row(studio_of(pipe), [mixed])), pixels(row(studio_of(pipe), [words])))


# ---- SDEdit --------------------------------------------------------------------------------------------------------


@every_family
def test_sdedit_is_upstreams_with_the_emotion_in_the_prompt(family, pipe, jobs):
    kind = StableDiffusionXLImg2ImgPipeline if family is STABLE_DIFFUSION_XL else StableDiffusionImg2ImgPipeline
    parent = quiet(kind(**family.components(), **family.settings))
    parent.unet, parent.scheduler = pipe.unet, DDIMScheduler.from_config(pipe.scheduler.config)
    source = Image.open(jobs[1].source).resize((40, 24), Image.LANCZOS)
    arguments = {"image": source, "strength": 0.5, "num_inference_steps": STEPS, "guidance_scale": 3.0}
    expected = parent("a cat, fear", generator=generator(1), **arguments).images[0]
    (made,) = sdedit(0.5)(studio_of(pipe, guidance_scale=3.0), jobs[1:2])
    assert np.array_equal(np.asarray(made.image), np.asarray(expected))


@pytest.mark.parametrize("strength", [0.0, 1.5])
def test_sdedits_strength_is_a_share(strength):
    with pytest.raises(ValueError, match="`strength` has to lie in"):
        sdedit(strength)


def test_sdedit_needs_a_step(pipe, jobs):
    with pytest.raises(ValueError, match="`strength` 0.1 leaves none of 4 steps"):
        sdedit(0.1)(studio_of(pipe), jobs)


# ---- LEDITS++ ------------------------------------------------------------------------------------------------------


@every_family
def test_ledits_masks_by_attention_where_the_network_has_it(pipe, jobs, monkeypatch):
    masks = []
    kind = LEDITS[type(pipe) is STABLE_DIFFUSION_XL.pipeline_class]
    original = kind.__call__

    @wraps(original)
    def note(self, *arguments, **keywords):
        masks.append(keywords.get("use_intersect_mask", "upstream's own"))
        return original(self, *arguments, **keywords)

    monkeypatch.setattr(kind, "__call__", note)
    row = ledits()
    row(studio_of(pipe), jobs[:1])
    row(studio_of(with_sides(pipe)), jobs[:1])
    ledits(use_intersect_mask=True)(studio_of(pipe), jobs[:1])
    assert masks == [False, "upstream's own", True]


@every_family
def test_ledits_without_guidance_is_upstreams_reconstruction(family, pipe, jobs):
    parent = quiet(LEDITS[family is STABLE_DIFFUSION_XL](**family.components(), **family.settings))
    parent.unet, parent.scheduler = pipe.unet, sde_solver(pipe.scheduler)
    source = Image.open(jobs[1].source).resize((32, 32), Image.LANCZOS)
    parent.invert(source, num_inversion_steps=STEPS, generator=generator(1))
    expected = np.asarray(parent(editing_prompt=None).images[0]).astype(int)
    still, moved = (pixels(ledits(edit_guidance_scale=scale)(studio_of(pipe), jobs[1:2]))[0] for scale in (0.0, 10.0))
    assert np.abs(still - expected).max() <= 1 < np.abs(moved - expected).max()


@pytest.mark.parametrize("scheduler", [DDIMScheduler, PNDMScheduler])
def test_ledits_has_a_solver_of_its_own(pipe, jobs, scheduler):
    """Whatever the base's: with DDIM upstream's class would do another method's inversion."""
    expected = pixels(ledits()(studio_of(pipe), jobs[:1]))
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing", skip_prk_steps=True)
    studio = studio_of(pipe)
    assert np.array_equal(pixels(ledits()(studio, jobs[:1])), expected)
    config = studio.pipeline(LEDITS[0]).scheduler.config
    assert (config.algorithm_type, config.solver_order) == ("sde-dpmsolver++", 2)


def test_ledits_takes_a_checkpoint_of_its_own(pipe, jobs, tmp_path):
    folder = tiny_models.save_base(tmp_path / "base")
    made = pixels(ledits(str(folder))(studio_of(pipe), jobs[:1]))
    xl = tiny_models.muse_pipeline(STABLE_DIFFUSION_XL)  # whose family does not matter
    assert np.array_equal(pixels(ledits(str(folder))(studio_of(xl), jobs[:1])), made)
    assert not np.array_equal(made, pixels(ledits()(studio_of(pipe), jobs[:1]))), "whose weights are others"


def test_ledits_tells_where_it_cannot_work(pipe, jobs):
    pipe.scheduler = EDMEulerScheduler()
    with pytest.raises(ValueError, match="does not tell the noise level"):
        ledits()(studio_of(pipe), jobs)
    pipe.scheduler = tiny_models.ddim()
    add_hook_to_module(pipe.unet, ModelHook())
    with pytest.raises(ValueError, match="without the offloading"):
        ledits()(studio_of(pipe), jobs)


# ---- InstructPix2Pix -----------------------------------------------------------------------------------------------


@every_family
def test_instruct_pix2pix_is_upstreams_with_an_instruction(family, pipe, jobs, tmp_path):
    folder = save_instructed(family, tmp_path / "instructed")
    parent = quiet(INSTRUCT_PIX2PIX[family is STABLE_DIFFUSION_XL].from_pretrained(folder))
    source = Image.open(jobs[1].source).resize((40, 24), Image.LANCZOS)
    size = {"height": 24, "width": 40} if family is STABLE_DIFFUSION_XL else {}
    arguments = {"num_inference_steps": STEPS, "image_guidance_scale": 2.0, **size}
    expected = parent("evoke fear", image=source, generator=generator(1), **arguments).images[0]
    row = instruct_pix2pix(folder, "evoke {emotion}", image_guidance_scale=2.0)
    (made,) = row(studio_of(pipe), jobs[1:2])
    assert np.array_equal(np.asarray(made.image), np.asarray(expected))
    assert row.settings == {"checkpoint": folder, "instruction": "evoke {emotion}", "image_guidance_scale": 2.0}


def test_instruct_pix2pix_wants_a_network_that_takes_a_source(pipe, jobs, tmp_path):
    folder = save_instructed(tiny_models.STABLE_DIFFUSION, tmp_path / "plain", channels=4)
    with pytest.raises(ValueError, match="8 channels in all; that of .* takes 4"):
        instruct_pix2pix(folder)(studio_of(pipe), jobs)


# ---- on weights that draw -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def storybook(tmp_path_factory) -> tuple[Studio, list[Job]]:
    """The bundled checkpoint, and edits of a picture of its own."""
    pipe = tiny_models.storybook()
    path, prompt = tmp_path_factory.mktemp("storybook") / "source.png", "a house in the park"
    pipe(prompt, num_inference_steps=10, generator=generator()).images[0].save(path)
    jobs = [Job(prompt, emotion, seed, source=path) for seed, emotion in enumerate(["fear", "anger"])]
    return studio_of(pipe, num_inference_steps=10), jobs


def away(storybook: tuple[Studio, list[Job]], row: Method) -> float:
    """How far the pictures of a row are from their source, in 255ths."""
    studio, jobs = storybook
    return np.abs(pixels(row(studio, jobs)) - np.asarray(Image.open(jobs[0].source))).mean()


def test_sdedit_keeps_more_of_the_source_at_less_strength(storybook):
    weak, middle, strong = (away(storybook, sdedit(strength)) for strength in (0.1, 0.5, 1.0))
    assert weak < middle - 3 < strong - 6


def test_ledits_of_other_latents_is_refused(storybook):
    studio, jobs = storybook
    with pytest.raises(ValueError, match="for latents of 4 channels, but the base's have 8"):
        ledits()(studio, jobs)


# ---- pipelines of other classes ------------------------------------------------------------------------------------


@every_family
def test_other_pipelines_share_the_models_but_not_the_scheduler(family, pipe):
    pipe.unet.to(torch.bfloat16)
    studio, kind = studio_of(pipe), SDEDIT[family is STABLE_DIFFUSION_XL]
    other = studio.pipeline(kind)
    assert type(other) is kind and studio.pipeline(kind) is other
    for name, part in other.components.items():
        assert (part is pipe.components[name]) == (name != "scheduler" or part is None)
    assert dict(other.scheduler.config) == dict(pipe.scheduler.config)
    assert (other.unet.dtype, other.vae.dtype) == (torch.bfloat16, torch.float32)


def test_other_pipelines_share_the_settings(pipe):
    assert studio_of(pipe).pipeline(SDEDIT[0]).config.requires_safety_checker is False
    xl = tiny_models.muse_pipeline(STABLE_DIFFUSION_XL)
    xl.register_to_config(force_zeros_for_empty_prompt=False)
    other = studio_of(xl).pipeline(SDEDIT[1])
    assert other.config.force_zeros_for_empty_prompt is False and other.watermark is xl.watermark is None


def test_other_pipelines_need_what_the_base_has(pipe):
    with pytest.raises(ValueError, match="needs text_encoder_2, tokenizer_2, which MusePipeline does not have"):
        studio_of(pipe).pipeline(SDEDIT[1])


def test_other_checkpoints_are_loaded_in_the_dtype_of_the_run(pipe, tmp_path):
    folder = str(tiny_models.save_base(tmp_path / "base"))
    studio = studio_of(pipe, dtype="bfloat16")
    other = studio.pipeline(StableDiffusionImg2ImgPipeline, folder)
    assert other.unet.dtype == torch.bfloat16 and other is studio.pipeline(StableDiffusionImg2ImgPipeline, folder)
