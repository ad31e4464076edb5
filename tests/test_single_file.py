"""Checkpoints in one file, with the names that weights have in the original code of Latent Diffusion."""

import re

import pytest
import tiny_models
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file
from tiny_models import guide, stock


def original_vae(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """The weights of a VAE of two blocks a side, as the original code names and shapes them."""
    names = {
        r"down_blocks\.(\d)\.resnets": r"down.\1.block",
        r"down_blocks\.(\d)\.downsamplers\.0": r"down.\1.downsample",
        r"up_blocks\.0\.(resnets|upsamplers\.0)": r"up.1.\1",  # counted from the image
        r"up_blocks\.1\.resnets": r"up.0.resnets",
        r"up\.(\d)\.resnets": r"up.\1.block",
        r"up\.(\d)\.upsamplers\.0": r"up.\1.upsample",
        r"mid_block\.resnets\.0": "mid.block_1",
        r"mid_block\.resnets\.1": "mid.block_2",
        r"mid_block\.attentions\.0\.group_norm": "mid.attn_1.norm",
        r"mid_block\.attentions\.0\.to_([qkv])": r"mid.attn_1.\1",
        r"mid_block\.attentions\.0\.to_out\.0": "mid.attn_1.proj_out",
        "conv_shortcut": "nin_shortcut",
        "conv_norm_out": "norm_out",
    }
    weights = {}
    for name, weight in vae.state_dict().items():
        if re.search(r"attentions.*to_.*weight", name):
            weight = weight[..., None, None]  # a convolution there
        for ours, original in names.items():
            name = re.sub(ours, original, name)
        weights[f"first_stage_model.{name}"] = weight.contiguous()
    return weights


@pytest.fixture(params=tiny_models.FAMILIES, ids=lambda family: family.pipeline_class.__name__)
def family(request) -> tiny_models.Family:
    return request.param


@pytest.fixture
def base(family, tmp_path) -> str:
    """A folder, as the parent saves it."""
    family.parent_class(**family.components(), **family.settings).save_pretrained(tmp_path / "base")
    return str(tmp_path / "base")


@pytest.fixture
def checkpoint(family, tmp_path) -> str:
    """A file with the VAE of `base`; tests pass the other models."""
    file = tmp_path / "checkpoint.safetensors"
    save_file(original_vae(family.components()["vae"]), file)
    return str(file)


@pytest.mark.parametrize("models", [{}, {"clip_model": None}, tiny_models.muse_models()], ids=["", "None", "all"])
def test_a_single_file_makes_the_pipeline_that_the_folder_makes(family, base, checkpoint, models):
    folder = family.pipeline_class.from_pretrained(base, **models)
    others = {name: one for name, one in folder.components.items() if name.startswith(("unet", "text_encoder"))}
    single = family.pipeline_class.from_single_file(checkpoint, config=base, **others, **models)
    for pipe in (folder, single):
        tiny_models.quiet(pipe)
    assert type(single) is family.pipeline_class and single.vae is not folder.vae
    for name in ("clip_model", "emotion_classifier", "preview_vae"):
        assert getattr(single, name) is models.get(name), name
    assert single.config.semantic_threshold == 18.0
    assert torch.equal(stock(single, output_type="pt"), stock(folder, output_type="pt"))
    if models.get("emotion_classifier"):
        assert torch.equal(guide(single).images, guide(folder).images)
