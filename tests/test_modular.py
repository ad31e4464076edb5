"""MUSE as a block of Modular Diffusers: what the pipeline makes of the same noise, and what the block declares."""

import ast
import inspect
import json
import math
import shutil

import pytest
import tiny_models
import torch
from block import MuseXLLoopDenoiser
from diffusers import (
    ClassifierFreeGuidance,
    ModularPipeline,
    PerturbedAttentionGuidance,
    StableDiffusionXLAutoBlocks,
    StableDiffusionXLPipeline,
)
from diffusers.commands.custom_blocks import CustomBlocksCommand
from fix_copies import BLOCK
from tiny_models import STABLE_DIFFUSION_XL, generator, guide

from pipeline_muse_xl import MuseXLPipeline


@pytest.fixture(scope="module")
def components() -> dict:
    """Of a tiny pipeline; no test changes them."""
    return tiny_models.muse_pipeline(STABLE_DIFFUSION_XL, preview_vae=tiny_models.preview_vae()).components


@pytest.fixture
def pipe(components) -> MuseXLPipeline:
    return tiny_models.quiet(MuseXLPipeline(**components))


def modular_pipeline(components, block=None, workflow="text2image", **guidance) -> ModularPipeline:
    """SDXL's modular pipeline with `block` in place of its denoiser, or as it is."""
    blocks = StableDiffusionXLAutoBlocks().get_workflow(workflow)
    if block is not None:
        blocks.sub_blocks["denoise.denoise"].sub_blocks["denoiser"] = block
    modular = blocks.init_pipeline()
    guider = ClassifierFreeGuidance(**{"guidance_scale": 5.0, **guidance})
    modular.update_components(**{n: one for n, one in components.items() if n in modular.components}, guider=guider)
    modular.set_progress_bar_config(disable=True)
    return modular


def call(modular, **arguments):
    """The state after a short call, with the arguments of `guide`."""
    defaults = {"prompt": "a cat", "num_inference_steps": 3, "height": 32, "width": 32, "output_type": "latent"}
    return modular(**(defaults | {"generator": generator()} | arguments))


CALLS = {
    "weaker": {"emotion_strength": 0.5, "preview_scale": 0.5},
    "fast": {"preset": "fast", "max_inner_steps": 1, "num_inference_steps": 5},
    "batch": {"prompt": ["a cat", "a dog"], "emotion": [{"awe": 1, "fear": 1}, None]},
    "images": {"num_images_per_prompt": 2, "max_inner_batch": 1, "emotion_tokens": torch.ones(2, 56)},
    "gate": {"semantic_threshold": 1e3, "latest_start": 0.4, "semantic_prompt": "a dog"},
    "zero-shot": {"emotion": "calm", "emotion_prompts": {"calm": "a lake", "anger": "a fight"}},
}


@pytest.mark.parametrize("name", CALLS)
def test_the_block_makes_what_the_pipeline_makes(components, pipe, name):
    """But for the last bits: upstream's loop asks the network for prompts and null prompts apart."""
    arguments = {"emotion": "awe", "preset": "full", "max_inner_steps": 2, "semantic_threshold": 0, **CALLS[name]}
    state = call(modular_pipeline(components, MuseXLLoopDenoiser(), guidance_rescale=0.3), **arguments)
    expected = guide(pipe, **arguments, height=32, width=32, guidance_rescale=0.3)
    torch.testing.assert_close(state.latents, expected.images, atol=2e-3, rtol=1e-3)
    torch.testing.assert_close(state.emotion_tokens, expected.emotion_tokens, atol=2e-2, rtol=1e-2)
    for ours, theirs in zip(state.trace, expected.trace, strict=True):
        assert (ours.gate_step, ours.kept, ours.inner_steps) == (theirs.gate_step, theirs.kept, theirs.inner_steps)
        assert ours.target_probability == pytest.approx(theirs.target_probability, abs=1e-3)


@pytest.mark.parametrize("workflow", ["text2image", "image2image"])
def test_it_is_upstreams_denoiser_until_its_gate_opens(components, workflow):
    image = {"image": torch.rand(1, 3, 32, 32), "strength": 0.7} if workflow == "image2image" else {}
    modular = modular_pipeline(components, MuseXLLoopDenoiser(), workflow)
    expected = call(modular_pipeline(components, workflow=workflow), **image).latents
    stock, closed = call(modular, **image), call(modular, emotion="awe", semantic_threshold=math.inf, **image)
    assert torch.equal(stock.latents, expected) and stock.trace is None and stock.emotion_tokens is None
    assert torch.equal(closed.latents, expected) and closed.trace[0].gate_step is None
    guided = call(modular, emotion="awe", semantic_threshold=0, max_inner_steps=1, **image)
    assert guided.latents.isfinite().all() and (guided.latents - expected).abs().max() > 0.1


def test_a_call_leaves_the_components_as_they_were(components):
    modules = [one for one in components.values() if isinstance(one, torch.nn.Module)]
    flags = [(one.training, [weight.requires_grad for weight in one.parameters()]) for one in modules]
    hooks = len(components["unet"]._forward_hooks)
    call(modular_pipeline(components, MuseXLLoopDenoiser()), emotion="awe", semantic_threshold=0, max_inner_steps=1)
    assert flags == [(one.training, [weight.requires_grad for weight in one.parameters()]) for one in modules]
    assert len(components["unet"]._forward_hooks) == hooks
    assert all(weight.grad is None for one in modules for weight in one.parameters())


def test_what_the_block_declares(components):
    modular = modular_pipeline(components, MuseXLLoopDenoiser())
    theirs = set(inspect.signature(MuseXLPipeline.__call__).parameters)
    theirs -= set(inspect.signature(StableDiffusionXLPipeline.__call__).parameters)
    edits = {"image", "mask_image", "strength"}  # of the pipeline, by inversion
    assert theirs - edits <= set(modular.blocks.input_names)
    assert "guidance_scale" not in modular.blocks.input_names
    assert {"clip_model", "emotion_classifier", "preview_vae"} <= set(modular.components)
    assert {"trace", "emotion_tokens"} <= set(modular.blocks.output_names)
    assert modular.config.semantic_threshold == 18.0
    imported = [node for node in ast.walk(ast.parse(BLOCK.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
    assert not [node.module for node in imported if "pipelines" in node.module.split(".")]


def test_the_threshold_is_a_setting_of_the_pipeline(components):
    modular = modular_pipeline(components, MuseXLLoopDenoiser())
    modular.update_components(semantic_threshold=0.0)
    assert call(modular, emotion="awe", max_inner_steps=0).trace[0].gate_step == 0


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"emotion": "awe", "preset": "slow"}, "`preset` has to be one of"),
        ({"emotion": "awe", "update_interval": 0}, "`update_interval`"),
        ({"emotion_tokens": "random"}, "`emotion_tokens` cannot be given without an `emotion`"),
        ({"emotion": ["awe", "fear"]}, "`emotion` has 2 entries for 1 prompts"),
    ],
)
def test_bad_input_is_refused_by_name(components, arguments, message):
    with pytest.raises(ValueError, match=message):
        call(modular_pipeline(components, MuseXLLoopDenoiser()), **arguments)


def test_guiders_that_ask_more_of_the_network_are_refused(components):
    modular = modular_pipeline(components, MuseXLLoopDenoiser())
    modular.update_components(guider=PerturbedAttentionGuidance(perturbed_guidance_layers=["mid_block"]))
    with pytest.raises(ValueError, match="`guider` has to be a ClassifierFreeGuidance.*PerturbedAttentionGuidance"):
        call(modular, emotion="awe")


def test_diffusers_packs_the_block(tmp_path, monkeypatch):
    """What `diffusers-cli custom_blocks` writes is what the repository ships."""
    shutil.copy(BLOCK, tmp_path)
    monkeypatch.chdir(tmp_path)
    CustomBlocksCommand().run()
    packed, shipped = (json.loads((folder / "modular_config.json").read_text()) for folder in (tmp_path, BLOCK.parent))
    assert packed["auto_map"] == shipped["auto_map"] == {"ModularPipelineBlocks": "block.MuseXLLoopDenoiser"}
