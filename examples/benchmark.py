# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What MUSE costs, measured side by side: against the stock pipeline, its unavoidable parts, and the plain way.

    python examples/benchmark.py --architecture sd15 --sections tax limit plain

The real architectures have random weights, so nothing has to be downloaded; Storybook has its own. Each section is
a table of named measurements. What is finished is in the JSON file at once, and is not measured again unless `--again`
is given, so a run may be stopped and taken up. Sections:

    tax         a call without an emotion against the parent pipeline
    limit       an inner iteration against the sum of its unavoidable parts
    plain       an inner iteration, and a denoising step, against the same written straightforwardly
    calls       whole calls against the stock pipeline, with each of `MusePipeline.presets`
    leak        memory after ten guided calls against memory after one
    peak        the most memory that an inner iteration takes, with each option
    throughput  images per minute against the batch size
    laws        how the cost of a call grows, and a plot of it
    compile     torch.compile, channels-last, attention and threads
"""

import argparse
import gc
import inspect
import json
import os
import signal
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache, partial
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0
from muse_examples import REPOSITORY
from muse_examples.architectures import build_pipeline, random_module
from muse_examples.files import write_whole
from muse_examples.measuring import measured_memory, processor, release_memory, resident, versions
from muse_examples.options import one_line_errors, positive_int
from muse_examples.pipelines import DTYPES, checkpoint_gradients, default_device, load_pipeline, settings_of
from tqdm.auto import tqdm

from pipeline_muse import (
    PixelSpec,
    clip_similarity,
    frozen,
    label_weights,
    muse_loss,
    predict_x0,
    signal_level,
    wheel_neighbors,
)


Row = dict[str, Any]
Measurement = Callable[[], Row]

# What is compared: how the pipeline stands.
VARIANTS: dict[str, dict[str, bool]] = {
    "full VAE": {},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "preview_vae": {"preview_vae": True},
    "both": {"gradient_checkpointing": True, "preview_vae": True},
}
PROMPT = "a cat"
PAPER_STEPS, PAPER_INNER_STEPS = 50, 10

# A guided call that does all the work it is asked for: its gate opens at once, and no inner loop ends early.
GUIDED: dict[str, Any] = {
    "prompt": PROMPT,
    "emotion": "awe",
    "preset": "paper",
    "semantic_threshold": 0,
    "loss_threshold": float("-inf"),
    "output_type": "latent",
}
SIZES = {"storybook": (128, 128), "sd15": (512, 256), "sdxl": (1024, 512)}  # pixels of a side, on a GPU and on a CPU
STORYBOOK_PROMPTS = ("a house in the park", "a boat in the harbour")
STOCK_STEP, BACKWARD = "unet, 2 rows", ", backward"  # names of parts
WHOLE_PRESETS = ("fast",)  # what is also measured whole, at worst: the gate opens at once, and no loop ends early
AT_WORST = {"semantic_threshold": 0, "loss_threshold": float("-inf")}
LEAST_INNER_STEPS = 2  # a single one is taken otherwise, and not looked at again
CALLS_OF_LEAK = 10


@dataclass
class Bench:
    """What is measured, and how often; `steps` are denoising steps of short calls, of which more tell nothing new."""

    pipe: DiffusionPipeline
    preview_vae: AutoencoderTiny
    size: int
    device: str = "cpu"
    repeats: int = 3
    steps: int = 1
    iterations: int = 2  # inner steps per denoising step by which longer calls differ from shorter ones
    whole_steps: int = PAPER_STEPS
    batch_sizes: Sequence[int] = (1, 2, 4)
    time_limit: int = 300  # seconds that one torch.compile may take

    def stock(self, pipe: DiffusionPipeline | None = None, batch_size: int = 1, **overrides: Any) -> Any:
        """A call without an emotion; `pipe` may be the parent's."""
        arguments = {"prompt": [PROMPT] * batch_size, "num_inference_steps": self.steps}
        return self.call(pipe or self.pipe, arguments | overrides)

    def guided(self, batch_size: int = 1, **overrides: Any) -> Any:
        """
        A guided call of `GUIDED`; `overrides` are its other arguments.

        Raises:
            RuntimeError: If it made fewer inner steps than it was asked for, so that its time tells nothing.
        """
        arguments = GUIDED | {"prompt": [PROMPT] * batch_size, "num_inference_steps": self.steps} | overrides
        output = self.call(self.pipe, arguments)
        wanted = arguments["num_inference_steps"] * arguments.get("max_inner_steps", PAPER_INNER_STEPS)
        if any(trace.inner_steps != wanted for trace in output.trace):
            raise RuntimeError("The inner loop ended early, so there is nothing to measure.")
        return output

    def call(self, pipe: DiffusionPipeline, arguments: Row) -> Any:
        """A call with `arguments`, at this size, and with the noise of every other."""
        generator = [torch.Generator().manual_seed(seed) for seed in range(len(arguments["prompt"]))]
        return pipe(**{"height": self.size, "width": self.size, "generator": generator} | arguments)

    @contextmanager
    def variant(self, name: str) -> Iterator[None]:
        """The pipeline as one of `VARIANTS`."""
        options, before = VARIANTS[name], self.pipe.preview_vae
        self.pipe.preview_vae = self.preview_vae if options.get("preview_vae") else None
        if options.get("gradient_checkpointing"):
            checkpoint_gradients(self.pipe)
        try:
            yield
        finally:
            if options.get("gradient_checkpointing"):
                checkpoint_gradients(self.pipe, enable=False)
            self.pipe.preview_vae = before

    @contextmanager
    def in_call(self) -> Iterator[None]:
        """The networks as they are inside of a guided call."""
        networks = [part for part in self.pipe.components.values() if isinstance(part, torch.nn.Module)]
        with frozen(*networks), self.upcast():
            yield

    @contextmanager
    def upcast(self) -> Iterator[None]:
        """XL's VAE in float32 where it overflows in float16."""
        vae = self.pipe.vae
        is_xl = "text_encoder_2" in self.pipe.components
        overflows = is_xl and vae.config.force_upcast and vae.dtype == torch.float16
        if overflows:
            vae.to(torch.float32)
        try:
            yield
        finally:
            if overflows:
                vae.to(torch.float16)


# --------------------------------------------------------------------------------------
# Time
# --------------------------------------------------------------------------------------


def seconds_of(work: Callable[[], Any], device: str) -> float:
    """How long `work` takes, until the device is done."""
    gc.collect()  # not of a sudden in the midst of it
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - start


def synchronize(device: str) -> None:
    if not device.startswith("cpu"):
        torch.accelerator.synchronize()


def interleaved(
    works: Mapping[str, Callable[[], Any]],
    bench: Bench,
    repeats: int | None = None,
    warm_up: bool = True,
    prepare: Callable[[str], Any] = lambda name: None,
) -> dict[str, list[float]]:
    """
    Times each of `works` in turn, A B A B, so that what slows the machine down for a while slows all of them down.

    Args:
        works (`Mapping[str, Callable]`): What to time, by name.
        bench ([`Bench`]): Its `device`, and its `repeats` where `repeats` is `None`.
        warm_up (`bool`, defaults to `True`): Whether a first round is not counted.
        prepare (`Callable`, *optional*): Told the name before each, outside of what is timed.

    Returns:
        `dict[str, list[float]]`: The seconds of each, round by round.
    """
    rounds = (repeats or bench.repeats) + warm_up
    seconds: dict[str, list[float]] = {name: [] for name in works}
    gc.freeze()  # what is there before need not be looked through each time
    with tqdm(total=rounds * len(works), leave=False) as bar:
        for round_ in range(rounds):
            for name, work in works.items():
                bar.set_description(name)
                prepare(name)
                elapsed = seconds_of(work, bench.device)
                if round_ >= warm_up:
                    seconds[name].append(elapsed)
                bar.update()
    gc.unfreeze()
    return seconds


def summary(values: Sequence[float]) -> Row:
    """Median and quartiles of repeated measurements."""
    low, median, high = (float(f"{np.quantile(values, share):.5g}") for share in (0.25, 0.5, 0.75))
    return {"median": median, "low": low, "high": high, "repeats": len(values)}


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> Row:
    """The ratio of two medians, with the middle 95 % of what other draws of the same rounds would give (bootstrap)."""
    upper, lower = np.array(numerators), np.array(denominators)
    draws = np.random.default_rng(0).integers(len(upper), size=(2000, len(upper)))
    ratios = np.median(upper[draws], axis=1) / np.median(lower[draws], axis=1)
    low, high = np.quantile(ratios, (0.025, 0.975))
    median = np.median(upper) / np.median(lower)
    return {"median": round(float(median), 4), "low": round(float(low), 4), "high": round(float(high), 4)}


# --------------------------------------------------------------------------------------
# The parts of a call
# --------------------------------------------------------------------------------------


@dataclass
class Step:
    """What the networks are given at the first denoising step of a guided call, for B images."""

    model_input: torch.Tensor  # (B, channels, h, w)
    timestep: torch.Tensor
    both: dict[str, Any]  # the UNet's other arguments: the null prompt's B rows, then the prompt's
    null: dict[str, Any]
    cond: dict[str, Any]
    tokens: torch.Tensor  # (B, n, D), float32
    target: torch.Tensor  # (B, C)
    inherent: torch.Tensor  # (B, C)
    similar: torch.Tensor  # (B, C)


def rows_of(value: Any, rows: slice, count: int) -> Any:
    """Some of the `count` rows of what the UNet is told, in nested dicts too."""
    if isinstance(value, dict):
        return {name: rows_of(part, rows, count) for name, part in value.items()}
    return value[rows] if isinstance(value, torch.Tensor) and value.shape[:1] == (count,) else value


def first_step(bench: Bench, **overrides: Any) -> Step:
    """Sees what a real call feeds its networks."""
    pipe, calls = bench.pipe, []
    hook = pipe.unet.register_forward_hook(lambda *seen: calls.append(seen[1:3]), with_kwargs=True)
    try:
        output = bench.guided(**{"num_inference_steps": 1, "max_inner_steps": 0} | overrides)
    finally:
        hook.remove()
    (model_input, timestep), arguments = calls[0]
    labels, traces = output.trace[0].labels, output.trace
    count = len(traces)
    similar = [
        {other: 1 / len(others) for other in others}
        for trace in traces
        for others in [set(wheel_neighbors(*trace.emotion)) & set(labels)]
    ]
    inherent = [{} if trace.inherent_emotion in trace.emotion else {trace.inherent_emotion: 1.0} for trace in traces]
    return Step(
        model_input[:count],
        timestep,
        arguments,
        rows_of(arguments, slice(count), 2 * count),
        rows_of(arguments, slice(count, None), 2 * count),
        output.emotion_tokens,
        *(
            label_weights(weights, labels).to(pipe.device)
            for weights in ([trace.emotion for trace in traces], inherent, similar)
        ),
    )


def predict(
    pipe: DiffusionPipeline, step: Step, arguments: dict[str, Any], tokens: torch.Tensor | None = None
) -> torch.Tensor:
    """The UNet's noise, with `tokens` appended to the prompt if there are any."""
    embeds = arguments["encoder_hidden_states"]
    if tokens is not None:
        embeds = torch.cat([embeds, tokens.to(embeds.dtype)], dim=1)
    return pipe.unet(step.model_input, step.timestep, **arguments | {"encoder_hidden_states": embeds})[0]


def predict_both(pipe: DiffusionPipeline, step: Step) -> torch.Tensor:
    """A step of the stock pipeline: the noise of null prompt and prompt in one call."""
    return pipe.unet(torch.cat([step.model_input] * 2), step.timestep, **step.both)[0]


@dataclass
class Part:
    """One network of the inner loop by itself."""

    function: Callable[[torch.Tensor], torch.Tensor]
    value: torch.Tensor

    @torch.no_grad()
    def forward(self) -> torch.Tensor:
        return self.function(self.value)

    @torch.enable_grad()
    def forward_backward(self) -> torch.Tensor:
        """The gradient with respect to `value`, and to nothing else."""
        leaf = self.value.detach().requires_grad_()
        output = self.function(leaf)
        return torch.autograd.grad(output, leaf, torch.ones_like(output))[0]


def decode_preview(pipe: DiffusionPipeline, latents: torch.Tensor) -> torch.Tensor:
    """Pixels `(B, 3, H, W)` in about [-1, 1], by `preview_vae` if there is one."""
    vae = pipe.preview_vae or pipe.vae
    return vae.decode((latents / vae.config.scaling_factor).to(vae.dtype), return_dict=False)[0]


def classify(pipe: DiffusionPipeline, pixels: torch.Tensor) -> torch.Tensor:
    """Logits `(B, C)`, float32, of pixels in about [-1, 1]."""
    classifier = pipe.emotion_classifier
    inputs = PixelSpec.from_classifier(classifier).prepare(pixels).to(classifier.dtype)
    return classifier(pixel_values=inputs).logits.float()


def inner_parts(bench: Bench, step: Step) -> dict[str, Part]:
    """What no inner iteration can do without: S -> UNet -> noise, latents -> decoder -> pixels -> classifier."""
    pipe = bench.pipe
    latents = step.model_input.float()
    with torch.no_grad():
        pixels = decode_preview(pipe, latents)
    return {
        "unet": Part(partial(predict, pipe, step, step.cond), step.tokens),
        "decoder": Part(partial(decode_preview, pipe), latents),
        "classifier": Part(partial(classify, pipe), pixels),
    }


def whole_iteration(bench: Bench, step: Step) -> Part:
    """The three parts in a row, S to logits, without what the pipeline does in between."""
    unet, decoder, classifier = inner_parts(bench, step).values()
    return Part(lambda tokens: classifier.function(decoder.function(unet.function(tokens).float())), step.tokens)


def parent_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """The stock pipeline around the same modules."""
    parent = type(pipe).__bases__[-1]
    names = inspect.signature(parent).parameters.keys()
    settings = {name: pipe.config[name] for name in names - pipe.components.keys() if name in pipe.config}
    stock = parent(**{name: part for name, part in pipe.components.items() if name in names}, **settings)
    stock.set_progress_bar_config(leave=False, **getattr(pipe, "_progress_bar_config", {}))
    return stock


# --------------------------------------------------------------------------------------
# Sections: tables of measurements by name
# --------------------------------------------------------------------------------------


def tax(bench: Bench) -> Mapping[str, Measurement]:
    """No tax: a call without an emotion against the parent pipeline. Goal: at most 1.01."""

    def measure() -> Row:
        stock = parent_of(bench.pipe)
        call = partial(bench.stock, output_type="pil")
        seconds = interleaved({"parent": partial(call, stock), "ours": call}, bench)
        return {
            "denoising steps": bench.steps,
            "parent, s": summary(seconds["parent"]),
            "ours, s": summary(seconds["ours"]),
            "ours / parent": ratio(seconds["ours"], seconds["parent"]),
        }

    return {"emotion=None": measure}


def limit(bench: Bench) -> Mapping[str, Measurement]:
    """The limit: an inner iteration against the sum of its parts, forth and back. Goal: at most 1.10."""

    def measure(name: str) -> Row:
        with bench.variant(name), bench.in_call():
            parts = inner_parts(bench, first_step(bench))
            works: dict[str, Callable[[], Any]] = {part: work.forward_backward for part, work in parts.items()}
            works |= {
                "short": partial(bench.guided, max_inner_steps=LEAST_INNER_STEPS),
                "long": partial(bench.guided, max_inner_steps=LEAST_INNER_STEPS + bench.iterations),
            }
            seconds = interleaved(works, bench)
        ours = per_iteration(seconds["short"], seconds["long"], bench)
        sums = [sum(values) for values in zip(*(seconds[part] for part in parts))]
        shares = {
            f"{part}, %": round(100 * statistics.median(seconds[part]) / statistics.median(sums)) for part in parts
        }
        return {
            **{f"{part}, s": summary(seconds[part]) for part in parts},
            "sum, s": summary(sums),
            "ours, s": summary(ours),
            "ours / sum": ratio(ours, sums),
            **shares,
        }

    return {name: partial(measure, name) for name in VARIANTS}


def per_iteration(shorter: Sequence[float], longer: Sequence[float], bench: Bench) -> list[float]:
    """Seconds of an inner iteration, from calls that differ in `bench.iterations` of them per denoising step."""
    return [(more - less) / (bench.iterations * bench.steps) for less, more in zip(shorter, longer)]


@contextmanager
def trainable(*modules: torch.nn.Module) -> Iterator[None]:
    """Modules whose weights require gradients, as they are loaded; afterwards they are as before, without any."""
    weights = [(weight, weight.requires_grad) for module in modules for weight in module.parameters()]
    try:
        for module in modules:
            module.requires_grad_(True)
        yield
    finally:
        for weight, requires_grad in weights:
            weight.requires_grad_(requires_grad)
            weight.grad = None


@torch.enable_grad()
def plain_step(
    pipe: DiffusionPipeline, step: Step, inner_steps: int, learning_rate: float = 0.01
) -> tuple[torch.Tensor, torch.Tensor, list[float]]:
    """
    One denoising step of MUSE written straightforwardly: both branches of the guidance are in the graph, `backward`
    computes the gradients of all weights that require one, and the noise is computed anew after the loop.

    Returns:
        `tuple`: The noise `(B, channels, h, w)`, the tokens `(B, n, D)`, and the loss of each inner iteration.
    """
    vae, scheduler = pipe.vae, pipe.scheduler
    tokens = step.tokens.clone().requires_grad_()
    adam = torch.optim.Adam([tokens], lr=learning_rate)

    def guided_noise() -> torch.Tensor:
        noise_null = predict(pipe, step, step.null)
        return torch.lerp(noise_null, predict(pipe, step, step.cond, tokens), pipe.guidance_scale)

    losses = []
    for _ in range(inner_steps):
        x0 = predict_x0(
            step.model_input,
            guided_noise(),
            signal_level(scheduler, step.timestep),
            scheduler.config.prediction_type,
        )
        image = vae.decode((x0 / vae.config.scaling_factor).to(vae.dtype)).sample
        logits = classify(pipe, image)
        loss = muse_loss(logits, step.target, step.inherent, step.similar, 0.0005, 0.0015).sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append(loss.item())
    with torch.no_grad():
        return guided_noise(), tokens.detach(), losses


def plain(bench: Bench) -> Mapping[str, Measurement]:
    """The plain way: the same iteration written straightforwardly. Goals: at most 0.5 of its time and its memory."""
    pipe = bench.pipe
    inner_steps = (LEAST_INNER_STEPS, LEAST_INNER_STEPS + bench.iterations)

    def measure(name: str) -> Row:
        step = first_step(bench)
        with bench.variant(name):
            call = partial(bench.guided, num_inference_steps=1)

            def straightforward(count: int) -> None:
                with trainable(pipe.unet, pipe.vae, pipe.emotion_classifier):
                    plain_step(pipe, step, count)

            works: dict[str, Callable[[], Any]] = {}
            for count in inner_steps:
                works[f"plain {count}"] = partial(straightforward, count)
                works[f"ours {count}"] = partial(call, max_inner_steps=count)
            with bench.upcast():
                seconds = interleaved(works, bench)
                peaks = {}
                for way in ("plain", "ours"):
                    with measured_memory(bench.device) as peaks[way]:
                        works[f"{way} {inner_steps[1]}"]()
        row: Row = {}
        one, ten = {}, {}
        for way in peaks:
            shorter, longer = (seconds[f"{way} {count}"] for count in inner_steps)
            one[way] = [(more - less) / bench.iterations for less, more in zip(shorter, longer)]
            ten[way] = [less + (PAPER_INNER_STEPS - inner_steps[0]) * each for less, each in zip(shorter, one[way])]
        for title, values in (("iteration", one), ("step of 10", ten)):
            row |= {f"{title}, {way}, s": summary(values[way]) for way in values}
            row[f"{title}, ratio"] = ratio(values["ours"], values["plain"])
        for way, peak in peaks.items():
            row |= {f"peak, {way}, GiB": round(peak.peak, 2), f"beyond weights, {way}, GiB": round(peak.beyond, 2)}
        row["peak, ratio"] = round(peaks["ours"].peak / peaks["plain"].peak, 3)
        row["beyond weights, ratio"] = round(peaks["ours"].beyond / peaks["plain"].beyond, 3)
        return row

    return {f"ours with {name}": partial(measure, name) for name in VARIANTS}


# ---- whole calls ----------------------------------------------------------------------------------------------------


@contextmanager
def counted(pipe: DiffusionPipeline) -> Iterator[Counter[str]]:
    """
    Counts what the block has the networks do, by the names of `call_parts`: UNet calls by rows, previews by the share
    of a side at which they are decoded, and backward passes.
    """
    counts: Counter[str] = Counter()
    sides = [0]  # of the latents that the UNet saw last

    def see(kind: str, arguments: tuple, output: torch.Tensor) -> None:
        name = kind
        if kind == "unet":
            sides[0] = arguments[0].shape[-1]
            name = f"unet, {arguments[0].shape[0]} rows"
        elif kind == "preview":
            name = f"preview, {arguments[0].shape[-1] / sides[0]:.2g}"
        counts[name] += 1
        if output.requires_grad:
            output.register_hook(lambda gradient: counts.update([name + BACKWARD]))

    hooks: list[tuple[torch.nn.Module, Callable]] = [
        (pipe.unet, lambda module, given, output: see("unet", given, output[0])),
        ((pipe.preview_vae or pipe.vae).decoder, lambda module, given, output: see("preview", given, output)),
        (pipe.emotion_classifier, lambda module, given, output: see("classifier", given, output.logits)),
        (pipe.clip_model, lambda module, given, output: see("gate", given, output.image_embeds)),
    ]
    handles = [module.register_forward_hook(hook) for module, hook in hooks]
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()


def call_cost(counts: Mapping[str, float], parts: Mapping[str, float]) -> float:
    """
    Seconds of a call that needs each part so many times.

    Args:
        counts (`Mapping[str, float]`): How often, by the part's name; see `counted`.
        parts (`Mapping[str, float]`): Seconds of each; see `call_parts`.

    Raises:
        ValueError: If a part that is needed was not measured.
    """
    if missing := sorted(counts.keys() - parts.keys()):
        raise ValueError(f"`parts` lacks {missing}, of which the call needs some; it has {sorted(parts)}.")
    return sum(count * parts[name] for name, count in counts.items())


def call_parts(bench: Bench, scales: Iterable[float] = (1.0,)) -> dict[str, float]:
    """
    Median seconds of each part of a call, with previews at `scales` of a side, by the names that `counted` gives them;
    of backward passes without the forward pass before them.
    """
    pipe, step = bench.pipe, first_step(bench)
    parts = inner_parts(bench, step)
    latents, pixels = parts["decoder"].value, parts["classifier"].value
    length = pipe.clip_model.config.text_config.max_position_embeddings
    text = pipe.tokenizer([PROMPT], padding="max_length", max_length=length, return_tensors="pt").to(pipe.device)
    encode = partial(pipe.encode_prompt, PROMPT, device=pipe.device, do_classifier_free_guidance=True)
    works: dict[str, Callable[[], Any]] = {
        "text": partial(encode, num_images_per_prompt=1),
        "gate": partial(clip_similarity, pipe.clip_model, pixels, text),
        "output": partial(pipe.vae.decode, step.model_input.to(pipe.vae.dtype)),
        STOCK_STEP: partial(predict_both, pipe, step),
    }
    both_ways = {"unet, 1 rows": parts["unet"], "classifier": parts["classifier"]}
    for scale in scales:
        small = F.interpolate(latents, scale_factor=scale, mode="area")
        both_ways[f"preview, {scale:.2g}"] = Part(parts["decoder"].function, small)
    works |= {name: part.forward for name, part in both_ways.items()}
    works |= {name + BACKWARD: part.forward_backward for name, part in both_ways.items()}
    with torch.no_grad():
        seconds = {name: statistics.median(values) for name, values in interleaved(works, bench).items()}
    return seconds | {name + BACKWARD: seconds[name + BACKWARD] - seconds[name] for name in both_ways}


def counts_on_storybook(arguments: Mapping[str, Any]) -> dict[str, float]:
    """How often an image needs each part: the mean of one of each emotion, on Storybook, whose loops do end early."""
    pipe = storybook_pipeline("cpu", "float32")
    total: Counter[str] = Counter({"text": 0, "output": 0})
    bar = tqdm(zip(cycle(STORYBOOK_PROMPTS), pipe.emotion_labels), total=len(pipe.emotion_labels), leave=False)
    for seed, (prompt, emotion) in enumerate(bar):
        bar.set_description(f"{emotion} on Storybook")
        generator = torch.Generator().manual_seed(seed)
        with counted(pipe) as counts:
            pipe(prompt, emotion=emotion, generator=generator, output_type="latent", **arguments)
        total += counts + Counter(["text", "output"])
    return {name: count / len(pipe.emotion_labels) for name, count in total.items()}


def calls(bench: Bench) -> Mapping[str, Measurement]:
    """
    Whole calls against the stock pipeline. Goals: fast at most 1.3, full at most 6 times the stock call.

    With random weights no inner loop ends early, so how often a call needs each part is counted on Storybook, and its
    seconds are computed from the parts'. Rows named "whole" are measured as they are, and show how well that holds.
    """
    presets = type(bench.pipe).presets
    scales = sorted({preset.get("preview_scale", 1.0) for preset in presets.values()})

    @cache
    def parts_with(variant: str) -> dict[str, float]:
        with bench.variant(variant), bench.in_call():
            return call_parts(bench, scales)

    def compute(name: str) -> Row:
        arguments = {"num_inference_steps": bench.whole_steps, "preset": name}
        counts = counts_on_storybook(arguments)
        stock = {STOCK_STEP: bench.whole_steps, "text": 1, "output": 1}
        row: Row = {"kind": "computed from parts", "counts": counts}
        for variant in ("full VAE", "preview_vae"):
            parts = parts_with(variant)
            seconds, least = call_cost(counts, parts), call_cost(stock, parts)
            row |= {
                f"{variant}: parts": parts,
                f"{variant}, s": round(seconds, 2),
                f"{variant}: stock, s": round(least, 2),
                f"{variant} / stock": round(seconds / least, 3),
            }
        return row

    def measure(name: str, variant: str) -> Row:
        steps = bench.whole_steps
        arguments = GUIDED | {"prompt": [PROMPT], "num_inference_steps": steps, "preset": name} | AT_WORST
        with bench.variant(variant):
            stock = seconds_of(partial(bench.stock, num_inference_steps=steps, output_type="latent"), bench.device)
            with counted(bench.pipe) as counts:
                guided = seconds_of(partial(bench.call, bench.pipe, arguments), bench.device)
        parts = parts_with(variant)
        least = steps * parts[STOCK_STEP] + parts["text"]
        return {
            "kind": "measured, gate open from the first step, no loop ends early, no final decoding",
            "counts": dict(counts),
            f"{variant}, s": round(guided, 2),
            f"{variant}: stock, s": round(stock, 2),
            f"{variant} / stock": round(guided / stock, 3),
            "from parts / stock": round((call_cost(counts, parts) + parts["text"]) / least, 3),
        }

    whole = {
        f"{name}, whole, {variant}": partial(measure, name, variant)
        for name in WHOLE_PRESETS
        if name in presets
        for variant in ("full VAE", "preview_vae")
    }
    return {name: partial(compute, name) for name in presets} | whole


# ---- memory ---------------------------------------------------------------------------------------------------------


def live_bytes() -> int:
    """The storages of all tensors that Python can reach."""
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor) and not thing.is_meta:
            storage = thing.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def leak(bench: Bench) -> Mapping[str, Measurement]:
    """Memory after ten guided calls equals memory after one."""

    def measure(name: str) -> Row:
        with bench.variant(name):
            held = []
            for calls in (1, CALLS_OF_LEAK - 1):
                for _ in range(calls):
                    bench.guided(max_inner_steps=LEAST_INNER_STEPS)
                release_memory()
                tensors = torch.cuda.memory_allocated() if bench.device.startswith("cuda") else live_bytes()
                held.append((tensors, resident()))
        (first, process), (last, process_last) = held
        return {
            "after 1 call, bytes": first,
            f"after {CALLS_OF_LEAK} calls, bytes": last,
            "growth, bytes": last - first,
            "process after 1, GiB": round(process, 3),
            f"process after {CALLS_OF_LEAK}, GiB": round(process_last, 3),
        }

    return {name: partial(measure, name) for name in ("full VAE", "both")}


def peak(bench: Bench) -> Mapping[str, Measurement]:
    """The most memory that a guided call takes, with each option; on a CPU that of the whole process."""

    def measure(name: str, batch_size: int, **options: Any) -> Row:
        with bench.variant(name):
            steps = {"num_inference_steps": 1, "max_inner_steps": LEAST_INNER_STEPS}
            call = partial(bench.guided, batch_size, **steps, **options)
            with measured_memory(bench.device) as memory:
                call()
        return {
            "images": batch_size,
            "peak, GiB": round(memory.peak, 2),
            "beyond weights, GiB": round(memory.beyond, 2),
        }

    most = max(bench.batch_sizes)
    return {name: partial(measure, name, 1) for name in VARIANTS} | {
        f"batch of {most}": partial(measure, "full VAE", most),
        f"batch of {most}, max_inner_batch=1": partial(measure, "full VAE", most, max_inner_batch=1),
        f"batch of {most}, max_inner_batch=1, both": partial(measure, "both", most, max_inner_batch=1),
    }


# ---- throughput and laws --------------------------------------------------------------------------------------------


def throughput(bench: Bench) -> Mapping[str, Measurement]:
    """Images per minute of whole short calls, against the batch size."""

    def measure(batch_size: int) -> Row:
        works: dict[str, Callable[[], Any]] = {
            "stock": partial(bench.stock, batch_size=batch_size, output_type="latent"),
            "guided": partial(bench.guided, batch_size, max_inner_steps=LEAST_INNER_STEPS),
        }
        seconds = interleaved(works, bench)
        rates = {name: [60 * batch_size / value for value in values] for name, values in seconds.items()}
        return {
            "denoising steps": bench.steps,
            "inner steps": LEAST_INNER_STEPS,
            **{f"{name}, images/min": summary(values) for name, values in rates.items()},
        }

    return {f"batch of {size}": partial(measure, size) for size in bench.batch_sizes}


def fit_line(x: Sequence[float], y: Sequence[float]) -> Row:
    """`y = a + b x` by least squares, and the share of the variance that it explains."""
    b, a = np.polyfit(x, y, 1)
    return {"law": f"{a:.3g} + {b:.3g} x", "a": float(a), "b": float(b), "R2": r_squared(y, a + b * np.array(x))}


def fit_power(x: Sequence[float], y: Sequence[float]) -> Row:
    """`y = a x^b` by least squares of the logarithms; R2 is that of the logarithms."""
    logs = np.log(x), np.log(y)
    b, log_a = np.polyfit(*logs, 1)
    a = float(np.exp(log_a))
    return {"law": f"{a:.3g} x^{b:.2f}", "a": a, "b": float(b), "R2": r_squared(logs[1], log_a + b * logs[0])}


def r_squared(values: Any, fitted: np.ndarray) -> float:
    unexplained, all_of_it = np.square(values - fitted).sum(), np.square(values - np.mean(values)).sum()
    return round(float(1 - unexplained / all_of_it), 4)


def side_multiple(pipe: DiffusionPipeline) -> int:
    """Pixels of which a side has to be a multiple, so that the UNet can halve it at each level."""
    return pipe.vae_scale_factor * 2 ** (len(pipe.unet.config.block_out_channels) - 1)


def laws(bench: Bench) -> Mapping[str, Measurement]:
    """How the seconds of a guided call grow: lines, and a power of the number of pixels."""
    multiple = side_multiple(bench.pipe)
    width = bench.pipe.unet.config.cross_attention_dim
    sides = sorted({max(multiple, round(share * bench.size / multiple) * multiple) for share in (0.5, 0.75, 1, 1.25)})

    def measure(points: Mapping[float, Row], fit: Callable[[Sequence[float], Sequence[float]], Row]) -> Row:
        one = {"max_inner_steps": LEAST_INNER_STEPS}
        works = {f"x = {x}": partial(bench.guided, **one | values) for x, values in points.items()}
        seconds = interleaved(works, bench)
        medians = [statistics.median(values) for values in seconds.values()]
        measured = [
            [x, *np.quantile(values, (0.25, 0.5, 0.75)).tolist()] for x, values in zip(points, seconds.values())
        ]
        return fit(list(points), medians) | {"points": measured}

    tables: dict[str, tuple[dict[float, Row], Callable]] = {
        "denoising steps": ({x: {"num_inference_steps": x} for x in (1, 2, 3, 4)}, fit_line),
        "inner steps": ({x: {"max_inner_steps": x} for x in (0, 2, 3, 4)}, fit_line),
        "emotion tokens": ({x: {"emotion_tokens": torch.randn(x, width)} for x in (1, 8, 32, 64)}, fit_line),
        "images per batch": ({x: {"batch_size": x} for x in bench.batch_sizes}, fit_line),
        "pixels": ({side**2: {"height": side, "width": side} for side in sides}, fit_power),
    }
    return {f"seconds against {name}": partial(measure, *table) for name, table in tables.items()}


def plot_laws(rows: Mapping[str, Row], title: str, path: Path) -> None:
    """Draws the points of each law with their quartiles, and the law."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(rows), figsize=(3.4 * len(rows), 3.2), layout="constrained", squeeze=False)
    for axis, (name, row) in zip(axes[0], rows.items()):
        x, low, median, high = np.array(row["points"]).T
        axis.errorbar(x, median, yerr=(median - low, high - median), fmt="o", color="#34495e", capsize=3)
        line = np.linspace(x.min(), x.max(), 100)
        fitted = row["a"] * line ** row["b"] if "^" in row["law"] else row["a"] + row["b"] * line
        axis.plot(line, fitted, color="#c8372d", label=f"{row['law']}\nR² = {row['R2']:.3f}")
        axis.set(xlabel=name.removeprefix("seconds against "), ylim=(0, None))
        axis.legend(loc="lower right", frameon=False)
    axes[0][0].set_ylabel("seconds of a guided call")
    figure.suptitle(title)
    figure.savefig(path, dpi=100)
    plt.close(figure)


# ---- compilers and layouts ------------------------------------------------------------------------------------------


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Raises a `TimeoutError` where the block takes longer; for the main thread of a system that has alarms."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"stopped after {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def compile_section(bench: Bench) -> Mapping[str, Measurement]:
    """Whether torch.compile, channels-last, fused attention and more threads are worth it: before against after."""
    pipe = bench.pipe

    def compare(change: Callable[[bool], Any]) -> Row:
        """`change(True)` makes it so, `change(False)` as it was; the first pass afterwards may compile."""
        with bench.variant("full VAE"), bench.in_call():
            try:
                step = first_step(bench)
                stock_step = torch.no_grad()(partial(predict_both, pipe, step))
                iteration = whole_iteration(bench, step).forward_backward
                change(True)
                with time_limit(bench.time_limit):
                    first = [round(seconds_of(work, bench.device), 1) for work in (stock_step, iteration)]
                works = {
                    f"{kind}, {state}": work
                    for state in ("before", "after")
                    for kind, work in (("step", stock_step), ("iteration", iteration))
                }
                seconds = interleaved(works, bench, prepare=lambda name: change(name.endswith("after")))
            except Exception as error:  # a compiler may fail in any way; what it says is the result
                return {"failed": f"{type(error).__name__}: {str(error).strip()[:300]}"}
            finally:
                change(False)
        return {
            "first step, s": first[0],
            "first iteration, s": first[1],
            **{f"{name}, s": summary(values) for name, values in seconds.items()},
            "step, ratio": ratio(seconds["step, after"], seconds["step, before"]),
            "iteration, ratio": ratio(seconds["iteration, after"], seconds["iteration, before"]),
        }

    def layout(after: bool) -> None:
        for module in (pipe.unet, pipe.vae):
            module.to(memory_format=torch.channels_last if after else torch.contiguous_format)

    processors, threads, unet, decoder = (
        pipe.unet.attn_processors,
        torch.get_num_threads(),
        pipe.unet,
        pipe.vae.decoder,
    )
    compiled_unet, compiled_decoder = torch.compile(unet), torch.compile(decoder)

    def attention(kind: type, after: bool) -> None:
        unet.set_attn_processor(kind() if after else dict(processors))

    def compiled(after: bool) -> None:
        pipe.unet = compiled_unet if after else unet

    def compiled_both(after: bool) -> None:
        compiled(after)
        pipe.vae.decoder = compiled_decoder if after else decoder

    changes: dict[str, Callable[[bool], Any]] = {
        "channels-last": layout,
        "AttnProcessor2_0 (fused)": partial(attention, AttnProcessor2_0),
        "AttnProcessor": partial(attention, AttnProcessor),
        "torch.compile of the UNet": compiled,
        "torch.compile of UNet and decoder": compiled_both,
    }
    if bench.device == "cpu" and threads > 1:
        changes["one thread"] = lambda after: torch.set_num_threads(1 if after else threads)
    return {name: partial(compare, change) for name, change in changes.items()}


SECTIONS: dict[str, Callable[[Bench], Mapping[str, Measurement]]] = {
    "tax": tax,
    "limit": limit,
    "plain": plain,
    "calls": calls,
    "leak": leak,
    "peak": peak,
    "throughput": throughput,
    "laws": laws,
    "compile": compile_section,
}


# --------------------------------------------------------------------------------------
# Tables
# --------------------------------------------------------------------------------------


def cell(value: Any) -> str:
    """A number, or a median with its quartiles, in four digits at most."""
    if isinstance(value, dict):
        return f"{cell(value['median'])} ({cell(value['low'])}–{cell(value['high'])})"
    return f"{value:.4g}" if isinstance(value, float) else f"{value}"


def is_shown(value: Any) -> bool:
    return isinstance(value, (int, float, str)) or isinstance(value, dict) and "median" in value


def markdown_table(rows: Mapping[str, Row]) -> str:
    """One line per row, one column per value that fits into a cell; what some rows lack is a dash there."""
    shown = {name: {key: value for key, value in row.items() if is_shown(value)} for name, row in rows.items()}
    columns = list(dict.fromkeys(key for row in shown.values() for key in row))
    lines = [["", *columns], ["---"] * (len(columns) + 1)]
    lines += [[name, *(cell(row.get(column, "–")) for column in columns)] for name, row in shown.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# --------------------------------------------------------------------------------------
# The run
# --------------------------------------------------------------------------------------


def storybook_pipeline(device: str, dtype: str) -> DiffusionPipeline:
    """The checkpoint of this repository."""
    unset = dict.fromkeys(("revision", "variant", "preview_vae", "classifier"))
    pipe = load_pipeline(argparse.Namespace(base=str(REPOSITORY), device=device, dtype=dtype, **unset))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def storybook_preview_vae() -> AutoencoderTiny:
    """A decoder of the shape of Storybook's own."""
    path = REPOSITORY / settings_of(str(REPOSITORY))["preview_vae"]
    return AutoencoderTiny.from_config(json.loads(path.read_text(encoding="utf-8")))


def build(args: argparse.Namespace) -> Bench:
    """The pipeline of `args.architecture`, with TAESD's architecture as `preview_vae`."""
    if args.architecture == "storybook":
        pipe = storybook_pipeline(args.device, args.dtype)
        preview_vae = random_module(storybook_preview_vae, args.device, DTYPES[args.dtype])
    else:
        pipe = build_pipeline(args.architecture, args.device, DTYPES[args.dtype], with_preview_vae=True)
        preview_vae, pipe.preview_vae = pipe.preview_vae, None
    pipe.set_progress_bar_config(disable=True)
    return Bench(
        pipe,
        preview_vae,
        args.size,
        args.device,
        args.repeats,
        args.steps,
        args.iterations,
        args.whole_steps,
        args.batch_sizes,
        args.time_limit,
    )


def hardware(device: str) -> Row:
    """The machine, by name and size."""
    known: Row = {
        "cpu": processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
    }
    if device.startswith("cuda"):
        gpu = torch.cuda.get_device_properties(device)
        known |= {"gpu": gpu.name, "gpu_memory_gib": round(gpu.total_memory / 2**30, 1), "cuda": torch.version.cuda}
    return known


def read_report(args: argparse.Namespace) -> Row:
    """
    The report to go on with: an empty one, or what `args.output` holds.

    Raises:
        ValueError: If that was measured at another size, on another machine or with other versions.
    """
    what = {name: getattr(args, name) for name in ("architecture", "size", "dtype", "device")}
    report: Row = {**what, "hardware": hardware(args.device), "versions": versions(), "sections": {}}
    if not args.output.exists():
        return report
    before = json.loads(args.output.read_text(encoding="utf-8"))
    for name in report.keys() - {"sections"}:
        if before.get(name) != report[name]:
            raise ValueError(f"{args.output} has {name} {before.get(name)}, not {report[name]}; take another file")
    return before


def write_report(report: Row, path: Path) -> None:
    """Writes at once or not at all, so that a kill leaves the report of before."""
    write_whole(path, json.dumps(report, indent=1) + "\n")


def run_section(
    bench: Bench, name: str, report: Row, path: Path, again: bool = False, only: Sequence[str] | None = None
) -> None:
    """Measures what is missing in a section; what is measured is in the file at once."""
    rows = report["sections"].setdefault(name, {})
    for row, measure in SECTIONS[name](bench).items():
        if (row in rows and not again) or (only and row not in only):
            continue
        start = time.perf_counter()
        result = measure()
        done = datetime.now(UTC).isoformat(timespec="seconds")
        rows[row] = result | {"done": {"at": done, "in_seconds": round(time.perf_counter() - start, 1)}}
        write_report(report, path)
    title = (SECTIONS[name].__doc__ or "").strip().partition("\n")[0]
    print(f"\n**{name}** – {title}\n\n{markdown_table(rows)}", flush=True)
    if name == "laws" and rows:
        title = f"{report['architecture']}, {report['size']} px, {report['dtype']}, {report['device']}"
        plot_laws(rows, title, path.with_suffix(".png"))


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=SIZES, default="sd15", help="Default: %(default)s.")
    parser.add_argument("--size", type=positive_int, help="pixels of a side. Default: by architecture and device.")
    parser.add_argument("--device", default=default_device(), help="Default: %(default)s.")
    parser.add_argument("--dtype", choices=DTYPES, help="Default: float16 on a GPU, bfloat16 on a CPU.")
    parser.add_argument("--sections", nargs="+", choices=SECTIONS, default=list(SECTIONS), help="Default: all.")
    parser.add_argument("--rows", nargs="+", help="of the sections, by name. Default: all.")
    parser.add_argument("--again", action="store_true", help="measure also what the output file has")
    parser.add_argument("--repeats", type=positive_int, help="Default: 20 on a GPU and for Storybook, else 3.")
    parser.add_argument("--steps", type=positive_int, help="denoising steps of short calls. Default: 1; Storybook: 4.")
    parser.add_argument("--iterations", type=positive_int, default=2, help="inner steps that are told apart")
    parser.add_argument("--whole_steps", type=positive_int, default=PAPER_STEPS, help="Default: %(default)s.")
    parser.add_argument("--batch_sizes", nargs="+", type=positive_int, default=[1, 2, 4], help="Default: 1 2 4.")
    parser.add_argument("--time_limit", type=positive_int, default=300, help="seconds for one torch.compile")
    parser.add_argument(
        "--output", type=Path, help="JSON file. Default: outputs/benchmark_*.json by what is measured."
    )
    args = parser.parse_args(arguments)
    on_gpu, is_small = not args.device.startswith("cpu"), args.architecture == "storybook"
    args.size = args.size or SIZES[args.architecture][0 if on_gpu else 1]
    args.dtype = args.dtype or ("float16" if on_gpu else "bfloat16")
    args.repeats = args.repeats or (20 if on_gpu or is_small else 3)
    args.steps = args.steps or (4 if is_small else 1)
    device = args.device.partition(":")[0]
    args.output = args.output or Path(f"outputs/benchmark_{args.architecture}_{args.size}_{device}.json")
    multiple = 32 if is_small else 64
    if args.size % multiple:
        parser.error(f"--size has to be a multiple of {multiple}, but is {args.size}")
    if len(set(args.batch_sizes)) < 2 and "laws" in args.sections:
        parser.error("--batch_sizes has to hold two or more sizes, as a law is fitted to them")
    try:
        args.report = read_report(args)
    except ValueError as error:
        parser.error(f"--output: {error}")
    return args


@one_line_errors
def main() -> None:
    args = parse_args()
    bench = build(args)
    for name in args.sections:
        run_section(bench, name, args.report, args.output, args.again, args.rows)
    print(f"\nAll of it: {args.output}")


if __name__ == "__main__":
    main()
