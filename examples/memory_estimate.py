# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The memory of a guided call with each option: computed with fake tensors, not measured on a GPU.

    python examples/memory_estimate.py --architecture sdxl --size 1024 --dtype float16

The pipeline's own call runs on the real architectures, but over tensors that have shapes and no data (PyTorch's
`FakeTensorMode`), so seconds on a laptop tell what a GPU would allocate. Every storage is counted from the operation
that makes it until it dies, in blocks of 512 bytes as by PyTorch's allocator, and belongs to the component that made
it. Attention is the fused kernel's, which keeps no matrix of N x N.

Not contained: workspaces inside of kernels (convolutions of cuDNN, the backward pass of attention), what the allocator
reserves beyond that, and the CUDA context.
"""

import argparse
import json
import operator
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from muse_examples.architectures import UNETS, build_pipeline
from muse_examples.measuring import versions
from muse_examples.options import one_line_errors, positive_int
from muse_examples.pipelines import DTYPES, checkpoint_gradients
from PIL import Image
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


NOTE = "computed with fake tensors; not measured on a GPU"
NUMBER = 0.5  # what every number is that only data could tell
COMPARISONS = {torch.ops.aten.lt.Scalar: operator.lt, torch.ops.aten.gt.Scalar: operator.gt}
BLOCK = 512  # bytes, the unit of PyTorch's allocator for CUDA
GOALS_GIB = {"sd15": 8.0, "sdxl": 16.0}  # at the native size

# The stages of a call, by the network that begins each; where it has to keep a graph, it is the inner loop
INNER_LOOP = "inner loop"
STAGES = {
    "text_encoder": "text encoding",
    "text_encoder_2": "text encoding",
    "unet": "noise",
    "clip_model": "gate",
    "emotion_classifier": "gate",
    "vae.encoder": "encoding",
    "vae.decoder": "decoding",
    "preview_vae.decoder": "decoding",
}

# A guided step; fake tensors say 0.5 of CLIP's similarity, so the gate is asked, and opens
CALL: dict[str, Any] = {
    "emotion": "awe",
    "num_inference_steps": 1,
    "max_inner_steps": 2,
    "semantic_threshold": 0.25,
    "loss_threshold": float("-inf"),
    "output_type": "pt",
}

# What is compared: arguments of `estimate`
OPTIONS: dict[str, dict[str, Any]] = {
    "stock (no emotion)": {"emotion": None},
    "plain": {},
    "zero-shot CLIP": {"zero_shot": True},
    "gradient_checkpointing": {"gradient_checkpointing": True},
    "preview_vae": {"preview_vae": True},
    "preview_scale 0.5": {"preview_scale": 0.5},
    "checkpointing, preview_vae": {"gradient_checkpointing": True, "preview_vae": True},
    "checkpointing, preview_scale 0.5": {"gradient_checkpointing": True, "preview_scale": 0.5},
    "checkpointing, VAE fixed for float16": {"gradient_checkpointing": True, "fixed_vae": True},
    "attention slicing": {"attention_slicing": True},
    "model CPU offload": {"offload": True},
    "checkpointing, preview_vae, offload": {"gradient_checkpointing": True, "preview_vae": True, "offload": True},
    "edit": {"edit": True},
    "batch 4": {"batch_size": 4},
    "batch 4, max_inner_batch 1": {"batch_size": 4, "max_inner_batch": 1},
}
DRAWN = ("plain", "gradient_checkpointing", "preview_vae", "checkpointing, preview_vae")

COLORS = {
    "weights": "#9aa0a8",
    "unet": "#3f7fbf",
    "vae": "#e0912f",
    "preview_vae": "#e8c35a",
    "emotion_classifier": "#4f9d69",
    "clip_model": "#7a5bc7",
    "backward": "#c8372d",
    "text_encoder": "#7d8b2c",
    "text_encoder_2": "#a9b665",
    "rest": "#34495e",
}


def nbytes(tensor: torch.Tensor) -> int:
    """What PyTorch's allocator gives for the storage of `tensor`."""
    return -(-tensor.untyped_storage().nbytes() // BLOCK) * BLOCK


class Allocations(TorchDispatchMode):
    """
    Counts the bytes of the storages that live while it is active, by owner.

    Over fake tensors whatever depends on none of them (timesteps, schedules, token ids) is computed for real. Where
    code asks for a number that only data could tell, it gets 0.5, and to a question what is right of 0.5, or else yes;
    a search finds nothing: all is finite, no two labels are alike, no loop ends early.

    Attributes:
        live (`Counter[str]`): Bytes by owner, now.
        peak (`Counter[str]`): The same when most bytes lived; `peak_stage` is the stage of the call at that time.
        stages (`dict[str, int]`): The most bytes that lived during each stage, in order.
        timeline (`list[tuple[str, Counter[str]]]`): Stage and live bytes, for every `stride` operations their most.
    """

    def __init__(self, stride: int = 64):
        super().__init__()
        self.live: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()
        self.stage, self.peak_stage, self.stages = "other", "other", dict[str, int]()
        self.owner = "rest"
        self.timeline: list[tuple[str, Counter[str]]] = []
        self.stride, self.operations = stride, 0
        self._answers: weakref.WeakKeyDictionary[torch.UntypedStorage, bool] = weakref.WeakKeyDictionary()
        self._owners: weakref.WeakKeyDictionary[torch.UntypedStorage, list] = weakref.WeakKeyDictionary()

    @contextmanager
    def owned_by(self, owner: str) -> Iterator[None]:
        """What is allocated in the block belongs to `owner`."""
        before, self.owner = self.owner, owner
        try:
            yield
        finally:
            self.owner = before

    def begin(self, stage: str) -> None:
        """What happens from now on belongs to a stage of the call."""
        self.stage = stage
        self._note()

    def add(self, tensor: torch.Tensor) -> None:
        """Counts the storage of `tensor` for the owner of this moment until it dies, whosever it was before."""
        storage = tensor.untyped_storage()
        if storage in self._owners:
            count = self._owners[storage][0]
            self.live[count[0]] -= count[1]
            self.live[self.owner] += count[1]
            count[0] = self.owner
            return
        count = [self.owner, nbytes(tensor)]  # shared with the finalizer, as the owner may change
        self._owners[storage] = [count, weakref.finalize(storage, self._subtract, count)]
        self.live[self.owner] += count[1]
        self._note()

    def remove(self, tensor: torch.Tensor) -> None:
        """The storage of `tensor` leaves the device."""
        if entry := self._owners.pop(tensor.untyped_storage(), None):
            entry[1]()

    def _subtract(self, count: list) -> None:
        owner, size = count
        self.live[owner] -= size

    def _note(self) -> None:
        total = self.live.total()
        self.stages[self.stage] = max(total, self.stages.get(self.stage, 0))
        if total > self.peak.total():
            self.peak, self.peak_stage = self.live.copy(), self.stage
        if self.timeline and total > self.timeline[-1][1].total():
            self.timeline[-1] = (self.stage, self.live.copy())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        is_known = bool(tensors) and not any(isinstance(tensor, FakeTensor) for tensor in tensors)
        try:
            with unset_fake_temporarily() if is_known else nullcontext():
                output = func(*args, **kwargs)
        except DataDependentOutputException:
            if func is not torch.ops.aten._local_scalar_dense.default:
                raise
            return NUMBER if tensors[0].is_floating_point() else self._answers.get(tensors[0].untyped_storage(), 1)
        except DynamicOutputShapeException:
            if func is not torch.ops.aten.nonzero.default:
                raise
            output = args[0].new_empty((0, args[0].ndim), dtype=torch.long)
        if func in COMPARISONS and output.ndim == 0:
            self._answers[output.untyped_storage()] = COMPARISONS[func](NUMBER, args[1])
        for leaf in tree_leaves(output):
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage() not in self._owners:
                self.add(leaf)
        if self.operations % self.stride == 0:
            self.timeline.append((self.stage, self.live.copy()))
        self.operations += 1
        return output


def networks(pipe: DiffusionPipeline) -> dict[str, torch.nn.Module]:
    """The components of `pipe` that have weights, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def tensors_of(module: torch.nn.Module) -> list[torch.Tensor]:
    """Its weights and buffers."""
    return [*module.parameters(), *module.buffers()]


def cast(module: torch.nn.Module, *arguments: Any, **keywords: Any) -> torch.nn.Module:
    """`module.to(dtype)`; PyTorch's own cannot exchange fake weights."""
    (dtype,) = (value for value in (*arguments, *keywords.values()) if isinstance(value, torch.dtype))
    for part in module.modules():
        for name, weight in part.named_parameters(recurse=False):
            setattr(part, name, torch.nn.Parameter(weight.to(dtype), requires_grad=weight.requires_grad))
    return module


@contextmanager
def faked(pipe: DiffusionPipeline) -> Iterator[None]:
    """In the block all new tensors are fake, and the weights of `pipe` have no data from now on."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        for module in networks(pipe).values():
            module.to_empty(device="cpu")
        pipe.vae.to = partial(cast, pipe.vae)  # XL decodes in float32
        yield


def record(pipe: DiffusionPipeline, offload: bool = False, **call: Any) -> Allocations:
    """
    Makes a call and counts what it allocates, the weights included.

    Args:
        pipe (`DiffusionPipeline`): A MUSE pipeline, real or [`faked`]. It keeps hooks: use it for this alone.
        offload (`bool`, defaults to `False`): Count weights as `enable_model_cpu_offload` moves them: they come with
            the first call of their component, and those of `model_cpu_offload_seq` leave when the next of it comes.
        call: Arguments of the call.
    """
    allocations, parts, chain = Allocations(), networks(pipe), pipe.model_cpu_offload_seq.split("->")
    owners: list[str] = []

    def own(owner: str, *_: Any) -> None:
        allocations.owner = owner

    def bring(name: str) -> None:
        """The weights of a component are on the device, and belong to none who may have cast them."""
        if offload:
            leaving = [other for other in chain if other in parts and other != name] if name in chain else []
            for tensor in (tensor for other in leaving for tensor in tensors_of(parts[other])):
                allocations.remove(tensor)
        with allocations.owned_by("weights"):
            for tensor in tensors_of(parts[name]):
                allocations.add(tensor)

    def enter(module: torch.nn.Module, arguments: tuple, keywords: dict, name: str) -> None:
        component = name.partition(".")[0]
        allocations.begin(INNER_LOOP if torch.is_grad_enabled() else STAGES.get(name, name))
        owners.append(allocations.owner)
        bring(component)
        allocations.owner = component
        embeds = keywords.get("encoder_hidden_states")
        if embeds is not None and embeds.requires_grad:  # the last that a backward pass comes to
            embeds.register_hook(partial(own, "rest"))

    def leave(module: torch.nn.Module, arguments: tuple, keywords: dict, output: Any) -> None:
        allocations.owner = owners.pop()
        logits = getattr(output, "logits", getattr(output, "image_embeds", None))
        if logits is not None and logits.requires_grad:  # the first that a backward pass comes to
            logits.register_hook(partial(own, "backward"))

    for name, part in parts.items():
        halves = {"encoder": part.encoder, "decoder": part.decoder} if name.endswith("vae") else {"": part}
        for half, module in halves.items():
            module.register_forward_pre_hook(partial(enter, name=f"{name}.{half}".strip(".")), with_kwargs=True)
            module.register_forward_hook(leave, with_kwargs=True)

    if not offload:
        for name in parts:
            bring(name)
    with allocations:
        pipe(**call)
    return allocations


def gib(size: int) -> float:
    """Bytes as GiB."""
    return round(size / 2**30, 3)


def estimate(
    architecture: str,
    size: int,
    dtype: torch.dtype,
    *,
    batch_size: int = 1,
    preview_vae: bool = False,
    zero_shot: bool = False,
    fixed_vae: bool = False,
    gradient_checkpointing: bool = False,
    attention_slicing: bool = False,
    offload: bool = False,
    edit: bool = False,
    **call: Any,
) -> dict[str, Any]:
    """
    The most memory that a guided call allocates: one denoising step with two Adam steps, as more add nothing.

    Args:
        architecture (`str`): "sd15" or "sdxl".
        size (`int`): Pixels of a side, a multiple of 64.
        dtype (`torch.dtype`): Of the weights.
        batch_size (`int`, defaults to 1): Images.
        preview_vae (`bool`, defaults to `False`): TAESD's architecture decodes previews.
        zero_shot (`bool`, defaults to `False`): CLIP classifies, so there is no SimEmo.
        fixed_vae (`bool`, defaults to `False`): XL's VAE is one that works in float16, so that it stays there.
        gradient_checkpointing (`bool`, defaults to `False`): UNet and decoders recompute their activations.
        attention_slicing (`bool`, defaults to `False`): As of `enable_attention_slicing`.
        offload (`bool`, defaults to `False`): Weights come and go as `enable_model_cpu_offload` moves them.
        edit (`bool`, defaults to `False`): The call edits a picture.
        call: Other arguments of the call.

    Returns:
        `dict[str, Any]`: In GiB the peak, its parts by owner, the peak of each stage, and the weights of each
        component; `peak_stage`; and `timeline`, live bytes by owner during the call.
    """
    pipe = build_pipeline(architecture, "meta", dtype, with_preview_vae=preview_vae)
    if zero_shot:
        pipe.emotion_classifier = None
    if fixed_vae:
        pipe.vae.register_to_config(force_upcast=False)
    if gradient_checkpointing:
        checkpoint_gradients(pipe)
    if attention_slicing:
        pipe.enable_attention_slicing()
    if edit:
        call["image"] = Image.new("RGB", (size, size))
    pipe.set_progress_bar_config(disable=True)
    with faked(pipe):
        weights = {name: sum(map(nbytes, tensors_of(part))) for name, part in networks(pipe).items()}
        allocations = record(
            pipe, offload, **CALL | {"prompt": ["a cat"] * batch_size, "height": size, "width": size} | call
        )
    return {
        "peak_gib": gib(allocations.peak.total()),
        "peak_stage": allocations.peak_stage,
        "parts_gib": {owner: gib(part) for owner, part in allocations.peak.most_common()},
        "stages_gib": {stage: gib(most) for stage, most in allocations.stages.items()},
        "weights_gib": {name: gib(weight) for name, weight in weights.items()},
        "timeline": allocations.timeline,
    }


def row(name: str, result: dict[str, Any]) -> str:
    """A line of the table."""
    parts = ", ".join(f"{part} {size:.2f}" for part, size in result["parts_gib"].items() if size >= 0.01)
    return f"| {name} | {result['peak_gib']:.2f} | {result['peak_stage']} | {parts} |"


def draw(timelines: dict[str, list[tuple[str, Counter[str]]]], goal: float, heading: str, path: Path) -> None:
    """A picture of live memory by owner during each call, one panel per option, with the goal as a line."""
    import matplotlib  # here, as the estimate does without

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, len(timelines), figsize=(4.2 * len(timelines), 3.8), sharey=True, squeeze=False)
    owners = [owner for owner in COLORS if any(live[owner] for line in timelines.values() for _, live in line)]
    for panel, (name, timeline) in zip(panels[0], timelines.items()):
        shares = [[live[owner] / 2**30 for _, live in timeline] for owner in owners]
        colors = [COLORS[owner] for owner in owners]
        areas = panel.stackplot(range(len(timeline)), shares, colors=colors, labels=owners, linewidth=0)
        panel.axhline(goal, color="#22262e", linestyle="--", linewidth=1)
        panel.text(len(timeline), goal, f"goal {goal:g} GiB ", ha="right", va="bottom", fontsize=8)
        peak = max(sum(moment) for moment in zip(*shares))
        panel.set_title(f"{name}: {peak:.1f} GiB", fontsize=10)
        panel.set_xticks([])
        panel.set_xlabel("operations of one guided step", fontsize=9)
        panel.margins(x=0)
    panels[0][0].set_ylabel("GiB")
    figure.suptitle(heading, fontsize=11)
    figure.legend(areas, owners, loc="lower center", ncols=len(owners), fontsize=8, frameon=False)
    figure.tight_layout(rect=(0, 0.07, 1, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def drawn(timelines: dict[str, Any]) -> dict[str, Any]:
    """Those of the options that tell most, or all where none of these was asked for."""
    return {name: timelines[name] for name in DRAWN if name in timelines} or timelines


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--architecture", choices=UNETS, default="sdxl")
    parser.add_argument("--size", type=positive_int, default=1024, help="pixels of a side. Default: %(default)s.")
    parser.add_argument("--dtype", choices=DTYPES, default="float16", help="Default: %(default)s.")
    parser.add_argument("--options", nargs="+", choices=OPTIONS, help="Default: all.")
    parser.add_argument("--output", type=Path, help="JSON file to write, and a picture beside it")
    args = parser.parse_args(arguments)
    if args.size % 64:
        parser.error(f"--size has to be a multiple of 64, but is {args.size}")
    if args.options is None:  # only XL's VAE needs the fix
        args.options = [name for name in OPTIONS if args.architecture == "sdxl" or "fixed_vae" not in OPTIONS[name]]
    return args


@one_line_errors
def main() -> None:
    args = parse_args()
    report: dict[str, Any] = {
        "note": NOTE,
        "architecture": args.architecture,
        "size": args.size,
        "dtype": args.dtype,
        "goal_gib": GOALS_GIB[args.architecture],
        "versions": versions(),
        "options": {},
    }
    timelines = {}
    print(f"{args.architecture} at {args.size} px in {args.dtype}, {NOTE}, GiB\n")
    print("| option | peak | in | at the peak |\n|---|---|---|---|")
    for name in args.options:
        result = estimate(args.architecture, args.size, DTYPES[args.dtype], **OPTIONS[name])
        timelines[name] = result.pop("timeline")
        report["options"][name] = result
        print(row(name, result), flush=True)
        if args.output:  # each time, as they take a while
            args.output.parent.mkdir(parents=True, exist_ok=True)
            args.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if args.output:
        heading = f"{args.architecture}, {args.size} px, {args.dtype}: {NOTE}"
        draw(drawn(timelines), GOALS_GIB[args.architecture], heading, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
