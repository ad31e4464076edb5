# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Forward Universal Guidance (https://huggingface.co/papers/2302.07121), a rival of MUSE: the gradient of the same
classifier moves the noise of each step itself, instead of tokens beside the prompt.

The parent's own call runs, with another function in the place of the UNet's `forward`, so that sizes, schedulers,
embeddings and decoding are upstream's. The answer is the guided noise in the rows of the null prompts and of the
prompts alike, of which upstream's guidance makes itself: g + w (g - g) = g.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, DiffusionPipeline
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from torch import Tensor

from muse_examples.evaluation.methods import Method, Studio, without_emotion
from muse_examples.runs import Job, Made, run_batch
from pipeline_muse import (
    EMOTION_PROMPTS,
    FLOAT16_LOSS_SCALE,
    DenoisingStep,
    Emotion,
    GuidanceSettings,
    check_gradients,
    check_preview,
    frozen,
    guide_noise,
    label_weights,
    normalize_emotion,
    signal_level,
)


logger = logging.get_logger(__name__)

LEAST_SIGNAL = 1e-6  # a cumulative alpha below which latents tell nothing of the picture (zero terminal SNR)
ABSENT = object()


def universal_guidance(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    emotions: Sequence[Emotion],
    weight: float,
    recurrence: int = 1,
    **call: Any,
) -> list[Image.Image]:
    """
    Pictures by forward Universal Guidance.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline` or `MuseXLPipeline`, of whose modules nothing stays changed. No
            other thread may call its UNet meanwhile.
        prompts, emotions (sequences of one length): What each picture shows, and what it should evoke; `None` leaves
            a picture stock.
        weight, recurrence: See [`universally_guided`].
        call: Further arguments of the parent's call, such as `num_inference_steps` and `generator`.

    Returns:
        `list[PIL.Image.Image]`: One per prompt and `num_images_per_prompt`, or what `output_type` makes of them.

    Raises:
        ValueError: See [`universally_guided`], and for another number of emotions than of prompts.
    """
    if len(prompts) != len(emotions):
        raise ValueError(f"`emotions` has {len(emotions)} entries for {len(prompts)} prompts; give one for each.")
    with universally_guided(pipe, emotions, weight, recurrence):
        return pipe(list(prompts), **call).images


@contextmanager
def universally_guided(
    pipe: DiffusionPipeline, emotions: Sequence[Emotion], weight: float, recurrence: int = 1
) -> Iterator[None]:
    """
    Has the calls of a pipeline in here, without an `emotion` of theirs, guided towards `emotions` (Eq. 6):
    `eps + weight * sqrt(1 - a) * grad_z CE(classifier(decode(x0(z))))`, of the noise `eps` that classifier-free
    guidance made.

    Args:
        pipe (`DiffusionPipeline`): A `MusePipeline` or `MuseXLPipeline`; its classifier guides, CLIP where it has
            none, on what its previews' decoder shows.
        emotions (sequence of `str`, `dict` or `None`): One per prompt.
        weight (`float`): The paper's s(t) is this times sqrt(1 - a).
        recurrence (`int`, defaults to 1): How often each step is taken, with fresh noise in between (Algorithm 1's k);
            beyond 1 with DDIM alone.

    Raises:
        ValueError: For emotions that the classifier does not know, a module without gradients, a scheduler that does
            not tell its noise, or with which no x0 can be derived; `recurrence` below 1, or without DDIM.
    """
    if recurrence < 1:
        raise ValueError(f"`recurrence` has to be 1 or more, but is {recurrence}.")
    if recurrence > 1 and not isinstance(pipe.scheduler, DDIMScheduler):
        raise ValueError(f"`recurrence` needs a DDIMScheduler, not {type(pipe.scheduler).__name__}.")
    guide = LatentGuide(pipe, emotions, weight)
    with ExitStack() as stack:
        stack.enter_context(frozen(*pipe._guidance_chain))
        stack.enter_context(replaced(pipe.unet, "forward", guide))
        if recurrence > 1:
            stack.enter_context(replaced(pipe, "scheduler", recurrent(pipe.scheduler, guide, recurrence)))
        yield


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """An object's own attribute is `value` in here; then it is what it was, or what its class has."""
    before = vars(owner).get(name, ABSENT)
    try:
        setattr(owner, name, value)
        yield
    finally:
        if before is not ABSENT:
            setattr(owner, name, before)
        elif name in vars(owner):
            delattr(owner, name)


class LatentGuide:
    """
    Stands for the UNet's `forward`: its answer is the noise that a classifier's gradient at the latents has moved.

    Args:
        pipe (`DiffusionPipeline`): See [`universally_guided`].
        emotions (sequence of `str`, `dict` or `None`): One per prompt.
        weight (`float`): Of the gradient.
    """

    @torch.no_grad()
    def __init__(self, pipe: DiffusionPipeline, emotions: Sequence[Emotion], weight: float) -> None:
        has_none = pipe.emotion_classifier is None
        pipe._check_guidance(GuidanceSettings(semantic_threshold=0), is_zero_shot=has_none)
        self.pipe, self.weight, self.forward = pipe, weight, pipe.unet.forward
        self.classify = pipe._zero_shot_classifier(EMOTION_PROMPTS) if has_none else pipe._classify
        labels = pipe.emotion_labels
        self.target = label_weights([normalize_emotion(emotion, labels) for emotion in emotions], labels)
        self.conditions: dict[str, Any] = {}

    def __call__(self, latents: Tensor, timestep: Tensor, **conditions: Any) -> tuple[Tensor]:
        """
        As `UNet2DConditionModel.forward` with `return_dict=False`.

        Args:
            latents (`torch.Tensor` of shape `(B or 2 B, channels, h, w)`): As the scheduler scaled them; twice the
                same where there is guidance.
            timestep (`torch.Tensor`): Of the step.
            conditions: What else the network is told.

        Returns:
            `tuple[torch.Tensor]`: The guided prediction of B images, as often as the latents.
        """
        scheduler, self.conditions = self.pipe.scheduler, conditions
        check_preview(scheduler, torch.as_tensor(timestep).reshape(1))
        alpha = float(signal_level(scheduler, timestep))
        if alpha < LEAST_SIGNAL:
            return (self.forward(latents, timestep, **conditions)[0],)
        prediction, gradient = self.look(latents, timestep)
        # The gradient is of the noise; v and x0 are of the noise and of z, which stays
        noise = (1 - alpha) ** 0.5
        per_noise = {"epsilon": 1.0, "v_prediction": alpha**-0.5, "sample": -noise * alpha**-0.5}
        factor = per_noise[scheduler.config.get("prediction_type", "epsilon")]
        moved = prediction.float() + factor * self.weight * noise * gradient
        return (moved.to(prediction.dtype).repeat(self.repeats, 1, 1, 1),)

    @property
    def repeats(self) -> int:
        """How often the network sees each latent: with the null prompt and the prompt, or with that alone."""
        return 2 if self.pipe.do_classifier_free_guidance else 1

    @torch.enable_grad()
    def look(self, latents: Tensor, timestep: Tensor) -> tuple[Tensor, Tensor]:
        """What classifier-free guidance makes of the network's answer, and the loss' gradient at the latents in
        float32, both of shape `(B, channels, h, w)`. The graph ends with this call."""
        pipe, repeats = self.pipe, self.repeats
        z = latents.detach().chunk(repeats)[0].float().clone().requires_grad_()
        seen = z.repeat(repeats, 1, 1, 1).to(latents.dtype)
        answer = self.forward(seen, timestep, **self.conditions)[0]
        step = DenoisingStep(pipe, (seen, timestep), self.conditions, answer, len(z), region=None)
        with pipe._upcast(pipe._preview_decoder):
            preview = step.preview(list(range(len(z))), step.noise)
            logits = self.classify(preview)
            check_gradients(unet=answer, vae=preview, emotion_classifier=logits)
            # The sum: a mean would have each picture's gradient depend on its batch
            loss = F.cross_entropy(logits, self.targets(len(z)).to(logits), reduction="sum")
            scale = FLOAT16_LOSS_SCALE if answer.dtype == torch.float16 else 1.0
            gradient = torch.autograd.grad(scale * loss, z)[0] / scale
        prediction = guide_noise(step.null, step.noise, pipe.guidance_scale, pipe.guidance_rescale)
        return prediction.detach(), without_overflow(gradient)

    def targets(self, count: int) -> Tensor:
        """The weights of the labels of `count` images, shape `(count, num_labels)`; upstream lays several images of
        one prompt out side by side."""
        times, rest = divmod(count, len(self.target))
        if rest:
            raise ValueError(f"`emotions` has {len(self.target)} entries for {count} images.")
        return self.target.repeat_interleave(times, dim=0)

    def again(self, latents: Tensor, timestep: Tensor) -> Tensor:
        """The guided prediction for other latents of the step asked for last, shape `(B, channels, h, w)`."""
        seen = self.pipe.scheduler.scale_model_input(latents.repeat(self.repeats, 1, 1, 1), timestep)
        return self.pipe.unet(seen, timestep, **self.conditions)[0][: len(latents)]


def without_overflow(gradient: Tensor) -> Tensor:
    """Zeros for the samples whose gradient a network of half precision could not hold: they take a plain step."""
    finite = gradient.flatten(1).isfinite().all(dim=1)
    if not finite.all():
        lost = (~finite).nonzero().flatten().tolist()
        logger.warning(f"Universal Guidance leaves a step of the images {lost} out: its gradient is infinite or NaN.")
    return torch.where(finite[:, None, None, None], gradient, 0.0)


def recurrent(scheduler: DDIMScheduler, guide: LatentGuide, times: int) -> DDIMScheduler:
    """
    A copy of a scheduler which takes each step `times` times. In between it returns to the noise level that it came
    from (Algorithm 1): `z_t = sqrt(a_t / a_s) z_s + sqrt(1 - a_t / a_s) noise`, s being the timestep after t. The
    noise is of the call's own generators.
    """
    ddim = type(scheduler).from_config(scheduler.config)
    take = ddim.step

    @wraps(take)
    def step(noise: Tensor, timestep: Tensor, latents: Tensor, **options: Any) -> Any:
        after = int(timestep) - ddim.config.num_train_timesteps // ddim.num_inference_steps
        level = ddim.alphas_cumprod[after] if after >= 0 else ddim.final_alpha_cumprod
        share = float(ddim.alphas_cumprod[int(timestep)] / level)
        for _ in range(times - 1):
            denoised = take(noise, timestep, latents, **options)[0]
            fresh = randn_tensor(latents.shape, options.get("generator"), latents.device, latents.dtype)
            latents = share**0.5 * denoised + (1 - share) ** 0.5 * fresh
            noise = guide.again(latents, timestep)
        return take(noise, timestep, latents, **options)

    ddim.step = step
    return ddim


def universal(weight: float, recurrence: int = 1) -> Method:
    """
    A row of Universal Guidance.

    Args:
        weight, recurrence: See [`universally_guided`].
    """

    def make(studio: Studio, jobs: Sequence[Job]) -> list[Made]:
        with universally_guided(studio.pipe, [job.emotion for job in jobs], weight, recurrence):
            return run_batch(studio.pipe, [without_emotion(job) for job in jobs], **studio.call)

    def calls(steps: int, given: Mapping[str, Any]) -> tuple[int, int]:
        return 2 * steps * recurrence, 2 * steps * recurrence

    name = f"Universal Guidance, weight {weight:g}" + (f", {recurrence} times" if recurrence > 1 else "")
    return Method(name, make, settings={"weight": weight, "recurrence": recurrence}, calls=calls)
