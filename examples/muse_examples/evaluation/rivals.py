# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Rivals in editing, by diffusers' own pipelines: SDEdit, LEDITS++ and InstructPix2Pix.

Each gets a job's source at the size at which MUSE would edit it, and noise from the job's own seed. As many steps as
all rows have; whatever else a row does not name is upstream's default.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from diffusers import (
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    LEditsPPPipelineStableDiffusion,
    LEditsPPPipelineStableDiffusionXL,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInstructPix2PixPipeline,
    StableDiffusionXLImg2ImgPipeline,
    StableDiffusionXLInstructPix2PixPipeline,
    UNet2DConditionModel,
)
from PIL import Image

from muse_examples.evaluation.methods import Method, Studio, in_words, with_word
from muse_examples.runs import Job, Made
from pipeline_muse import accepted_arguments, check_number, check_schedule, fit_size, to_rgb


# Classes of Stable Diffusion 1.x and 2.x, and of XL.
SDEDIT = (StableDiffusionImg2ImgPipeline, StableDiffusionXLImg2ImgPipeline)
LEDITS = (LEditsPPPipelineStableDiffusion, LEditsPPPipelineStableDiffusionXL)
INSTRUCT_PIX2PIX = (StableDiffusionInstructPix2PixPipeline, StableDiffusionXLInstructPix2PixPipeline)

INSTRUCTION = "make it evoke {emotion}"


# --------------------------------------------------------------------------------------
# What they share
# --------------------------------------------------------------------------------------


def of_family(studio: Studio, kinds: tuple[type, type], checkpoint: str | None) -> DiffusionPipeline:
    """
    The pipeline of the class that suits a checkpoint.

    Args:
        studio (`Studio`): Whose base it shares where there is no checkpoint.
        kinds (`tuple[type, type]`): The classes of Stable Diffusion and of XL.
        checkpoint (`str`, *optional*): A Hub id or a path.

    Raises:
        ValueError: For a checkpoint of another family.
    """
    parts = studio.pipe.components if checkpoint is None else DiffusionPipeline.load_config(checkpoint)
    if not {"unet", "vae", "text_encoder"} <= parts.keys():
        raise ValueError(f"{checkpoint!r} is no checkpoint of Stable Diffusion 1.x, 2.x or XL.")
    return studio.pipeline(kinds["text_encoder_2" in parts], checkpoint)


def source_picture(pipe: DiffusionPipeline, job: Job, call: dict[str, Any], multiple: int = 8) -> Image.Image:
    """The source of a job as upright RGB, at the size of MUSE's edits: its aspect ratio at the checkpoint's native
    area, or the `height` and `width` of `call`, in multiples of `multiple` px."""
    with Image.open(job.source) as file:
        image = to_rgb(file)
    side = pipe.unet.config.sample_size
    height, width = (side, side) if isinstance(side, int) else side
    area = height * width * pipe.vae_scale_factor**2
    given: dict[str, Any] = {"new_width": call.get("width"), "new_height": call.get("height")}
    width, height = fit_size(image.width, image.height, area, multiple, **given)
    return pipe.image_processor.resize(image, height, width)


def pictures(output: Any) -> list[Made]:
    """What a pipeline of upstream's made, and whether its safety checker blackened it."""
    flags = getattr(output, "nsfw_content_detected", None) or [False] * len(output.images)
    return [Made(image, blackened=bool(flag)) for image, flag in zip(output.images, flags)]


@contextmanager
def untouched(pipe: DiffusionPipeline) -> Iterator[None]:
    """The UNet's attention processors and the VAE's dtype, which other rows share and upstream's edits change, are in
    the end what they were."""
    processors, dtype = pipe.unet.attn_processors, pipe.vae.dtype
    try:
        yield
    finally:
        pipe.unet.set_attn_processor(processors)
        if pipe.vae.dtype != dtype:
            pipe.vae.to(dtype)


# --------------------------------------------------------------------------------------
# The rows
# --------------------------------------------------------------------------------------


def sdedit(strength: float) -> Method:
    """
    A row of SDEdit (https://huggingface.co/papers/2108.01073) with the base: noise on the source, and back from there
    with the emotion in the prompt.

    Args:
        strength (`float`): In (0, 1]: the share of the steps that is walked back. Less keeps more of the source.

    Raises:
        ValueError: For a strength out of range, and when pictures are made, if it leaves no step to walk.
    """
    check_number("strength", strength, above=0, high=1)

    def make(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
        if walked(studio.steps) < 1:
            raise ValueError(f"`strength` {strength:g} leaves none of {studio.steps} steps to walk.")
        pipe = of_family(studio, SDEDIT, None)
        call = accepted_arguments(pipe.__call__, **studio.call)
        call |= {"strength": strength, "num_inference_steps": studio.steps}
        source = source_picture(pipe, jobs[0], studio.call)
        prompts = [with_word(job) for job in jobs]
        with untouched(pipe):
            return pictures(pipe(prompts, image=[source] * len(jobs), generator=studio.generators(jobs), **call))

    def walked(steps: int) -> int:
        return min(int(steps * strength), steps)  # as upstream rounds

    def calls(steps: int, given: Mapping[str, Any]) -> tuple[int, int]:
        return 2 * walked(steps), 0

    return Method(f"SDEdit, strength {strength:g}", make, "editing", {"strength": strength}, calls)


def ledits(checkpoint: str | None = None, **settings: Any) -> Method:
    """
    A row of LEDITS++ (https://huggingface.co/papers/2311.16711): the source is inverted with a solver of its own, and
    the emotion is the editing prompt. Sizes are multiples of 32 px. Where the UNet has no cross-attention at a quarter
    of the latents' sides, as small ones, the mask is that of the noise alone, which is XL's default in any case.

    Args:
        checkpoint (`str`, *optional*): A Hub id or a path; the base by default.
        settings: Arguments of upstream's `invert` and `__call__`, such as `skip` and `edit_guidance_scale`.

    Raises:
        ValueError: When pictures are made, if the base's scheduler has no diffusion's noise schedule, models are
            offloaded, or latents have not the four channels that upstream's masks have.
    """

    def make(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
        if checkpoint is None:  # the class would take the steps of any scheduler for a diffusion's
            check_schedule(studio.pipe.scheduler)
        pipe = of_family(studio, LEDITS, checkpoint)
        if any(hasattr(part, "_hf_hook") for part in (pipe.unet, pipe.vae)):
            raise ValueError("LEDITS++ runs where its weights lie, so it has to go without the offloading of models.")
        if (channels := pipe.vae.config.latent_channels) != 4:
            raise ValueError(f"LEDITS++ of diffusers is for latents of 4 channels, but the base's have {channels}.")
        source = source_picture(pipe, jobs[0], studio.call, multiple=32)
        made = []
        for job, generator in zip(jobs, studio.generators(jobs)):  # an inversion has one generator
            pipe.scheduler = sde_solver(pipe.scheduler)
            inversion = {"num_inversion_steps": studio.steps, **accepted_arguments(pipe.invert, **settings)}
            with untouched(pipe):
                pipe.invert(source, generator=generator, **inversion)
            editing = accepted_arguments(pipe.__call__, **noise_mask(pipe) | settings)
            with untouched(pipe):  # again: XL's inversion leaves its VAE in a dtype that its call does not expect
                made += pictures(pipe(editing_prompt=[in_words(job)], **editing))
        return made

    def calls(steps: int, given: Mapping[str, Any]) -> tuple[int, int]:
        return (4 if settings.get("source_prompt") else 3) * steps, 0

    own = {"checkpoint": checkpoint} if checkpoint else {}
    return Method("LEDITS++", make, "editing", own | settings, calls)


def sde_solver(scheduler: Any) -> DPMSolverMultistepScheduler:
    """The solver of LEDITS++ on the noise schedule of `scheduler`."""
    plain = dict.fromkeys(("use_karras_sigmas", "use_exponential_sigmas", "use_beta_sigmas", "thresholding"), False)
    solver = {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "timestep_spacing": "leading"}
    return DPMSolverMultistepScheduler.from_config(scheduler.config, **solver, **plain)


def noise_mask(pipe: DiffusionPipeline) -> dict[str, bool]:
    """What has LEDITS++ do without attention maps where the UNet has none at a quarter of the latents' sides."""
    blocks = pipe.unet.config.down_block_types
    return {} if len(blocks) > 2 and "CrossAttn" in blocks[2] else {"use_intersect_mask": False}


def instruct_pix2pix(checkpoint: str, instruction: str = INSTRUCTION, **settings: Any) -> Method:
    """
    A row of InstructPix2Pix (https://huggingface.co/papers/2211.09800), a network of its own that takes instructions.

    Args:
        checkpoint (`str`): A Hub id or a path, such as "timbrooks/instruct-pix2pix", of Stable Diffusion or XL.
        instruction (`str`): With `{emotion}` in it.
        settings: Arguments of upstream's `__call__`, such as `image_guidance_scale`.

    Raises:
        ValueError: When pictures are made, for a checkpoint of another family, or whose UNet takes no source.
    """

    def make(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
        check_edits(checkpoint)
        pipe = of_family(studio, INSTRUCT_PIX2PIX, checkpoint)
        source = source_picture(pipe, jobs[0], studio.call)
        size = accepted_arguments(pipe.__call__, width=source.width, height=source.height)
        call = {"num_inference_steps": studio.steps, **size, **settings}
        prompts = [instruction.format(emotion=in_words(job)) for job in jobs]
        with untouched(pipe):
            output = pipe(prompts, image=[source] * len(jobs), generator=studio.generators(jobs), **call)
        return pictures(output)

    def calls(steps: int, given: Mapping[str, Any]) -> tuple[int, int]:
        return 3 * steps, 0

    own = {"checkpoint": checkpoint, "instruction": instruction}
    return Method("InstructPix2Pix", make, "editing", own | settings, calls)


def check_edits(checkpoint: str) -> None:
    """Raises a `ValueError`, before any weights are loaded, unless a checkpoint's UNet takes a source too."""
    config = UNet2DConditionModel.load_config(checkpoint, subfolder="unet")
    if config["in_channels"] != 2 * config["out_channels"]:
        wanted = f"a UNet that takes a source beside the latents, {2 * config['out_channels']} channels in all"
        raise ValueError(f"InstructPix2Pix needs {wanted}; that of {checkpoint!r} takes {config['in_channels']}.")
