"""What diffusers makes of this repository: each case loads in a process of its own, from a checkpoint on disk."""

import ast
import inspect
import json
import shutil
import subprocess
from pathlib import Path

import pytest
import tiny_models
from diffusers.utils.dynamic_modules_utils import get_relative_imports
from fresh_process import check, run_fresh

from pipeline import AutoMusePipeline
from pipeline_muse import MusePipeline
from pipeline_muse_xl import MuseXLPipeline


PREAMBLE = """
import sys
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification, CLIPModel

repository, base, muse, scratch = sys.argv[1:]


def image(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt", **kwargs).images
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return tiny_models.save_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def muse(tmp_path_factory) -> Path:
    return tiny_models.save_muse(tmp_path_factory.mktemp("muse"))


@pytest.fixture
def run(base, muse, tmp_path):
    """Runs a script after `PREAMBLE` in a fresh process that has seen no code of this repository yet."""

    def run_script(script: str) -> subprocess.CompletedProcess:
        arguments = (tiny_models.REPOSITORY, base, muse, tmp_path / "scratch")
        return run_fresh(PREAMBLE + script, *arguments, folder=tmp_path, HF_HUB_OFFLINE="1")

    return run_script


def test_the_layout_of_this_repository_loads(run):
    check(
        run("""
pipe = DiffusionPipeline.from_pretrained(muse, trust_remote_code=True)
assert type(pipe).__name__ == "MusePipeline"
assert isinstance(pipe, StableDiffusionPipeline)
assert type(pipe.emotion_classifier).__name__ == "SimEmoForImageClassification"
assert pipe.clip_model is not None and pipe.preview_vae is not None
assert pipe.config.semantic_threshold == 21.5
output = pipe("a cat", emotion="awe", num_inference_steps=2, max_inner_steps=1, semantic_threshold=0, output_type="pt")
assert output.images.shape == (1, 3, 32, 32)
assert output.emotion_tokens.isfinite().all()
""")
    )


def test_it_needs_trust(run):
    process = run("DiffusionPipeline.from_pretrained(muse)")
    assert process.returncode != 0 and "trust_remote_code" in process.stderr


@pytest.mark.parametrize("code", ["repository", "repository + '/pipeline_muse.py'"])
def test_custom_pipeline_on_a_plain_base(run, code):
    check(
        run(f"""
pipe = DiffusionPipeline.from_pretrained(base, custom_pipeline={code}, trust_remote_code=True)
assert type(pipe).__name__ == "MusePipeline"
assert pipe.clip_model is None and pipe.emotion_classifier is None and pipe.preview_vae is None
assert pipe.config.requires_safety_checker is False, "the base's own config has to arrive"
assert pipe.config.semantic_threshold == 18.0
plain = StableDiffusionPipeline.from_pretrained(base)
assert torch.equal(image(pipe), image(plain))
""")
    )


@pytest.mark.parametrize("code", ["repository", "repository + '/pipeline_muse.py'"])
def test_components_of_the_caller_arrive(run, code):
    check(
        run(f"""
from diffusers import AutoencoderTiny
models = dict(
    clip_model=CLIPModel.from_pretrained(muse, subfolder="clip_model"),
    emotion_classifier=AutoModelForImageClassification.from_pretrained(
        muse + "/emotion_classifier", trust_remote_code=True
    ),
    preview_vae=AutoencoderTiny.from_pretrained(muse, subfolder="preview_vae"),
)
pipe = DiffusionPipeline.from_pretrained(
    base, custom_pipeline={code}, trust_remote_code=True, semantic_threshold=7.0, **models
)
for name, model in models.items():
    assert getattr(pipe, name) is model, name
assert pipe.config.semantic_threshold == 7.0
pipe("a cat", emotion="fear", num_inference_steps=2, max_inner_steps=1, semantic_threshold=0)
""")
    )


@pytest.fixture(scope="module")
def codeless(muse, tmp_path_factory) -> Path:
    """`muse` without its code: diffusers prefers the code of a checkpoint to that of `custom_pipeline`."""
    folder = tmp_path_factory.mktemp("codeless")
    shutil.copytree(muse, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("pipeline*.py"))
    index = json.loads((folder / "model_index.json").read_text())
    index["_class_name"] = "StableDiffusionPipeline"
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("has_code", [True, False])
def test_components_of_the_caller_stand_above_the_checkpoints(run, codeless, has_code):
    arguments = "muse" if has_code else f"{str(codeless)!r}, custom_pipeline=repository"
    check(
        run(f"""
clip_model = CLIPModel.from_pretrained(muse, subfolder="clip_model")
pipe = DiffusionPipeline.from_pretrained(
    {arguments}, trust_remote_code=True, clip_model=clip_model, emotion_classifier=None
)
assert type(pipe).__name__ == "MusePipeline"
assert pipe.clip_model is clip_model
assert pipe.emotion_classifier is None
assert pipe.preview_vae is not None
assert pipe.config.semantic_threshold == 21.5
""")
    )


def test_stock_classifiers_of_transformers_load(run):
    check(
        run("""
from transformers import ViTConfig, ViTForImageClassification
config = ViTConfig(
    hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=16,
    id2label={0: "joy", 1: "fear"}, label2id={"joy": 0, "fear": 1},
)
classifier = ViTForImageClassification(config)
pipe = DiffusionPipeline.from_pretrained(
    base, custom_pipeline=repository, trust_remote_code=True, emotion_classifier=classifier
)
assert pipe.emotion_classifier is classifier
""")
    )


@pytest.mark.parametrize("has_code", [True, False])
def test_saved_pipelines_load_in_a_fresh_process(run, codeless, has_code):
    arguments = "muse" if has_code else f"{str(codeless)!r}, custom_pipeline=repository"
    check(
        run(f"""
pipe = DiffusionPipeline.from_pretrained({arguments}, trust_remote_code=True)
pipe.save_pretrained(scratch)
save_file(dict(image=image(pipe)), scratch + "/image.safetensors")
""")
    )
    check(
        run("""
pipe = DiffusionPipeline.from_pretrained(scratch, trust_remote_code=True)
assert type(pipe).__name__ == "MusePipeline"
assert type(pipe.emotion_classifier).__name__ == "SimEmoForImageClassification"
assert pipe.config.semantic_threshold == 21.5
torch.testing.assert_close(image(pipe), load_file(scratch + "/image.safetensors")["image"])
""")
    )


def relative_imports(path: Path) -> set[str]:
    """Names of the sibling modules that a file imports, by its syntax tree."""
    nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
    return {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.level == 1}


def test_diffusers_fetches_every_pipeline_for_the_dispatcher():
    """diffusers fetches the siblings that are imported by a statement, and fails over those that do not exist."""
    dispatcher = tiny_models.REPOSITORY / "pipeline.py"
    siblings = {path.stem for path in tiny_models.REPOSITORY.glob("pipeline_muse*.py")}
    assert set(get_relative_imports(dispatcher)) == relative_imports(dispatcher) == siblings


@pytest.mark.parametrize("path", sorted(tiny_models.REPOSITORY.glob("pipeline_muse*.py")), ids=lambda path: path.name)
def test_pipelines_stand_alone(path):
    assert not get_relative_imports(path), "only one file is fetched where a pipeline is loaded by its name"


@pytest.mark.parametrize("pipeline_class", [MusePipeline, MuseXLPipeline])
def test_the_dispatcher_knows_every_component(pipeline_class):
    """diffusers asks the dispatcher, not the pipeline behind it, which components and settings to load."""
    offered = inspect.signature(AutoMusePipeline.__init__).parameters
    needed = inspect.signature(pipeline_class.__init__).parameters
    assert needed.keys() <= offered.keys()
    for name, parameter in needed.items():
        assert offered[name].annotation == parameter.annotation, name
    assert set(pipeline_class._optional_components) <= set(AutoMusePipeline._optional_components)


def test_the_index_of_the_tiny_checkpoint_is_that_of_the_repository(muse):
    """What the tests above show of the tiny checkpoint holds for the one that ships."""
    tiny = json.loads((muse / "model_index.json").read_text())
    shipped = json.loads((tiny_models.REPOSITORY / "model_index.json").read_text())
    for name in ("_class_name", "clip_model", "emotion_classifier", "unet", "vae", "text_encoder", "scheduler"):
        assert shipped[name] == tiny[name], name


def test_the_shipped_checkpoint_loads(run):
    check(
        run("""
pipe = DiffusionPipeline.from_pretrained(repository, trust_remote_code=True)
assert type(pipe).__name__ == "MusePipeline"
assert sorted(pipe.emotion_classifier.config.label2id) == [
    "amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness"
]
output = pipe("a cat", emotion="awe", num_inference_steps=2, max_inner_steps=1, semantic_threshold=0)
assert output.emotion_tokens.isfinite().all()
""")
    )
