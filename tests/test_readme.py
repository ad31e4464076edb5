"""The README's snippets run as they stand, from a clone; a tiny checkpoint takes the place of a base on the Hub."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import tiny_models
from diffusers import StableDiffusionXLPipeline
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


README = (tiny_models.REPOSITORY / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def save_xl(folder: Path) -> Path:
    """A tiny Stable Diffusion XL checkpoint."""
    StableDiffusionXLPipeline(**tiny_models.STABLE_DIFFUSION_XL.components()).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """What a snippet loads from the Hub, and where a tiny one of the same kind lies."""
    folder = tmp_path_factory.mktemp("hub")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=3
    )
    ViTForImageClassification(config).save_pretrained(folder / "classifier")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "classifier")
    tiny_models.clip_model().save_pretrained(folder / "clip")
    return {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_models.save_base(folder / "base"),
        "stabilityai/stable-diffusion-xl-base-1.0": save_xl(folder / "xl"),
        "openai/clip-vit-large-patch14": folder / "clip",
        "path/to/your-classifier": folder / "classifier",
        "your-namespace/muse": tiny_models.REPOSITORY,
    }


def test_there_are_snippets_for_each_way_to_use_it():
    uses = ("trust_remote_code=True", "custom_pipeline=", "from_pipe", "image=source")
    assert all(any(use in snippet for snippet in SNIPPETS) for use in uses)


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder that looks like a fresh clone, into which a snippet may write."""
    for entry in tiny_models.REPOSITORY.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    return tmp_path


@pytest.mark.parametrize("index", range(len(SNIPPETS)))
def test_snippet_runs(index, stand_ins, clone):
    snippet = SNIPPETS[index]
    for name, path in stand_ins.items():
        snippet = snippet.replace(name, str(path))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(clone / "modules")}
    result = subprocess.run(
        [sys.executable, "-c", snippet], cwd=clone, env=environment, capture_output=True, text=True, timeout=180
    )
    assert result.returncode == 0, result.stderr[-3000:]
    saved = re.findall(r'save\("(.*?)"\)', snippet)
    assert all((clone / name).stat().st_size > 0 for name in saved)
