"""
Every way to load the pipeline from the Hub, and to save and push it: the real client in processes of their own, and a
Hub on the loopback address. What needs no Hub is in `test_loading.py`.
"""

import json
from pathlib import Path

import diffusers
import pytest
import tiny_models
import torch
from diffusers import StableDiffusionXLPipeline
from fresh_process import check, run_fresh
from loopback_hub import Files, LoopbackHub, folder_files
from test_components import processor, vit


PREAMBLE = """
import os
import sys
import urllib.request
from pathlib import Path

import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from safetensors.torch import load_file, save_file

repository, hub, first, second = sys.argv[1:]


class PackageIndex(urllib.request.HTTPSHandler):
    # Where diffusers asks the package index for its own versions, the loopback Hub answers.
    def https_open(self, request):
        assert request.host == "pypi.org"
        return self.parent.open(hub + request.selector)


urllib.request.install_opener(urllib.request.build_opener(PackageIndex))


def image(pipe, **kwargs):
    generator = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=2, generator=generator, output_type="pt", **kwargs).images


def guided(pipe):
    return image(pipe, emotion=pipe.emotion_labels[0], max_inner_steps=1, semantic_threshold=0)


def refused(*arguments, **kwargs):
    # The error with which diffusers refuses to load.
    try:
        DiffusionPipeline.from_pretrained(*arguments, **kwargs)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{arguments} {kwargs} loaded")
"""


def edition(files: Files, name: str) -> dict[str, bytes]:
    """A revision whose code knows its name, and leaves a file `executed` where it runs."""
    mark = f"\nEDITION = {name!r}\nopen('executed', 'a').close()\n"
    tell = f"{mark}MusePipeline.edition = EDITION\nMusePipeline.edition_of_module = property(lambda self: EDITION)\n"
    ends = {path: tell if path == "pipeline_muse.py" else mark for path in files if path.endswith(".py")}
    return {path: content + ends.get(path, "").encode() for path, content in files.items()}


def save_xl_base(folder: Path) -> Path:
    """Saves a tiny Stable Diffusion XL checkpoint."""
    pipe = StableDiffusionXLPipeline(**tiny_models.stable_diffusion_xl(), force_zeros_for_empty_prompt=False)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, Files]:
    """The files of the tiny checkpoints: a plain base, one of XL, and the layout of this repository."""
    folder = tmp_path_factory.mktemp("checkpoints")
    return {
        "sd": folder_files(tiny_models.save_base(folder / "sd")),
        "sdxl": folder_files(save_xl_base(folder / "sdxl")),
        "muse": folder_files(tiny_models.save_muse(folder / "muse")),
    }


@pytest.fixture(scope="module")
def served():
    """One for all, as a client reads its address when it is imported."""
    with LoopbackHub(diffusers.__version__) as hub:
        yield hub


@pytest.fixture
def hub(served, checkpoints):
    """A Hub with two revisions of `org/muse`, of which the second is `main`, bases, and the community's pipelines."""
    served.clear()
    for name in ("sd", "sdxl"):
        served.push(f"org/{name}", checkpoints[name])
    served.editions = {name: edition(checkpoints["muse"], name) for name in ("first", "second")}
    served.revisions = [served.push("org/muse", files) for files in served.editions.values()]
    community = {f"v{diffusers.__version__}": "first", "main": "second"}
    mirrored = {f"{key}/muse.py": served.editions[name]["pipeline_muse.py"] for key, name in community.items()}
    served.push("diffusers/community-pipelines-mirror", mirrored, kind="datasets")
    return served


@pytest.fixture
def run(hub, tmp_path):
    """Runs a script after `PREAMBLE` in a fresh process, in the folder `tmp_path`."""

    def run_script(script: str, **environment: str) -> None:
        address = {"HF_ENDPOINT": hub.endpoint, "NO_PROXY": "127.0.0.1", "HF_HUB_DISABLE_XET": "1"}
        arguments = (tiny_models.REPOSITORY, hub.endpoint, *hub.revisions)
        process = run_fresh(PREAMBLE + script, *arguments, folder=tmp_path, **{**address, **environment})
        check(process)

    return run_script


# ---- loading -------------------------------------------------------------------------------------------------------


def test_the_full_repository_by_id_its_revisions_and_offline(run):
    run("""
for arguments in ({}, {"revision": first}):
    assert refused("org/muse", **arguments).startswith("ValueError: The repository for org/muse contains custom code")
assert not Path("executed").exists()
assert not list(Path(os.environ["HF_HOME"]).rglob("*.py"))

latest = DiffusionPipeline.from_pretrained("org/muse", trust_remote_code=True)
assert Path("executed").exists()
assert isinstance(latest, StableDiffusionPipeline)
assert latest.edition == latest.edition_of_module == "second"
assert type(latest.emotion_classifier).__name__ == "SimEmoForImageClassification"
assert guided(latest).isfinite().all()

earlier = DiffusionPipeline.from_pretrained("org/muse", revision=first, trust_remote_code=True)
assert earlier.edition == earlier.edition_of_module == "first"
assert latest.edition == "second"
# diffusers executes both in one module, whose functions are those of the revision that was loaded last
assert latest.edition_of_module == "first", "diffusers keeps revisions apart now: tell the README"
latest.save_pretrained("saved")
save_file({"image": image(latest)}, "image.safetensors")
""")
    run(
        """
for arguments in ({}, {"revision": first}):
    assert "OfflineModeIsEnabled" in refused("org/muse", trust_remote_code=True, **arguments)
snapshots = Path(os.environ["HF_HOME"], "hub", "models--org--muse", "snapshots")
expected = load_file("image.safetensors")["image"]
for revision, edition in ((first, "first"), (second, "second")):
    pipe = DiffusionPipeline.from_pretrained(str(snapshots / revision), trust_remote_code=True)
    assert pipe.edition == edition
    torch.testing.assert_close(image(pipe), expected)

saved = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
assert saved.edition == "second", "its own code was saved, not that which was loaded last"
torch.testing.assert_close(image(saved), expected)
""",
        HF_HUB_OFFLINE="1",
    )


def test_the_dispatcher_by_id_on_other_bases(run):
    run("""
assert refused("org/sd", custom_pipeline="org/muse").startswith("ValueError: The repository for org/muse contains")
assert not Path("executed").exists()

trust = {"custom_pipeline": "org/muse", "trust_remote_code": True}
latest = DiffusionPipeline.from_pretrained("org/sd", **trust)
assert type(latest).__name__ == "MusePipeline" and latest.edition == "second"
assert latest.clip_model is None
sd = StableDiffusionPipeline.from_pretrained("org/sd")
assert torch.equal(image(latest), image(sd))

earlier = DiffusionPipeline.from_pretrained("org/sd", custom_revision=first, **trust)
for pipe, edition in ((latest, "second"), (earlier, "first")):
    assert pipe.edition == pipe.edition_of_module == edition, "revisions of the dispatcher are apart"
# Around the models of a pipeline that is there already; the dispatcher has to be told of those that it lacks
absent = dict.fromkeys(("text_encoder_2", "tokenizer_2", "clip_model", "emotion_classifier", "preview_vae"))
for pipe in (type(latest).from_pipe(sd), DiffusionPipeline.from_pipe(sd, **trust, **absent)):
    assert pipe.edition == "second" and pipe.unet is sd.unet
files = {path.name for path in Path(os.environ["HF_HOME"], "hub", "models--org--muse").rglob("*.*")}
assert files == {"pipeline.py", "pipeline_muse.py", "pipeline_muse_xl.py"}, "the code alone was fetched"
""")


def test_stable_diffusion_xl(run, hub, checkpoints):
    index = json.loads(checkpoints["sdxl"]["model_index.json"])
    index |= dict.fromkeys(("text_encoder", "tokenizer"), [None, None])
    hub.push("org/refiner", {**checkpoints["sdxl"], "model_index.json": json.dumps(index).encode()})
    code = {"pipeline_muse_xl.py": (tiny_models.REPOSITORY / "pipeline_muse_xl.py").read_bytes()}
    hub.push("org/sdxl-with-code", {**checkpoints["sdxl"], **code})
    run("""
pipe = DiffusionPipeline.from_pretrained(
    "org/sdxl", custom_pipeline="org/muse", trust_remote_code=True, semantic_threshold=3.0
)
assert type(pipe).__name__ == "MuseXLPipeline"
assert pipe.text_encoder_2 is not None and pipe.clip_model is None
assert pipe.config.semantic_threshold == 3.0
assert pipe.config.force_zeros_for_empty_prompt is False, "the base's own config has to arrive"
plain = DiffusionPipeline.from_pretrained("org/sdxl")
assert type(plain).__name__ == "StableDiffusionXLPipeline" and torch.equal(image(pipe), image(plain))
pipe.save_pretrained("saved")
save_file({"image": image(pipe)}, "saved.safetensors")

refiner = DiffusionPipeline.from_pretrained("org/refiner", custom_pipeline="org/muse", trust_remote_code=True)
assert type(refiner).__name__ == "MuseXLPipeline" and refiner.text_encoder is None

inside = {"pretrained_model_name_or_path": "org/sdxl-with-code", "custom_pipeline": "pipeline_muse_xl"}
assert "trust_remote_code=True" in refused(**inside)
assert type(DiffusionPipeline.from_pretrained(trust_remote_code=True, **inside)).__name__ == "MuseXLPipeline"
""")
    run("""
pipe = DiffusionPipeline.from_pretrained("saved", trust_remote_code=True)
assert type(pipe).__name__ == "MuseXLPipeline"
assert pipe.config.semantic_threshold == 3.0
torch.testing.assert_close(image(pipe), load_file("saved.safetensors")["image"])
""")


def test_the_community_pipeline_is_one_file_and_gives_way_to_a_folder_of_its_name(run, hub, tmp_path):
    for name, files in hub.editions.items():
        for path in ("pipeline.py", "pipeline_muse.py", "pipeline_muse_xl.py"):
            (tmp_path / name / "muse").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "muse" / path).write_bytes(files[path])
    run("""
pipe = DiffusionPipeline.from_pretrained("org/sd", custom_pipeline="muse")
assert type(pipe).__name__ == "MusePipeline" and pipe.edition == "first", "the release's"
assert DiffusionPipeline.from_pretrained("org/sd", custom_pipeline="muse", custom_revision="main").edition == "second"
assert torch.equal(image(pipe), image(StableDiffusionPipeline.from_pretrained("org/sd")))

pipes = []
for edition in ("first", "second"):
    os.chdir(edition)
    assert "trust_remote_code=True" in refused("org/sd", custom_pipeline="muse")
    pipes.append(DiffusionPipeline.from_pretrained("org/sd", custom_pipeline="muse", trust_remote_code=True))
    assert pipes[-1].edition == edition, "the folder's own pipeline_muse.py, not that of the folder before"
    os.chdir("..")
assert [pipe.edition_of_module for pipe in pipes] == ["first", "second"]
""")


def test_variants_dtypes_and_device_maps(run, hub, checkpoints, tmp_path):
    half = tiny_models.muse_pipeline(preview_vae=tiny_models.preview_vae()).to(torch.float16)
    half.save_pretrained(tmp_path / "half", variant="fp16")
    variant = {path: data for path, data in folder_files(tmp_path / "half").items() if ".fp16." in path}
    hub.push("org/variants", {**checkpoints["muse"], **variant})
    run("""
def dtypes(pipe):
    return {name: one.dtype for name, one in pipe.components.items() if isinstance(one, torch.nn.Module)}


names = {"unet", "vae", "text_encoder", "clip_model", "emotion_classifier", "preview_vae"}
load = {"pretrained_model_name_or_path": "org/variants", "trust_remote_code": True}
half = DiffusionPipeline.from_pretrained(variant="fp16", torch_dtype=torch.float16, **load)
assert dtypes(half) == dict.fromkeys(names, torch.float16)
files = {path.name for path in Path(os.environ["HF_HOME"]).rglob("*.safetensors")}
assert files == {"diffusion_pytorch_model.fp16.safetensors", "model.fp16.safetensors"}

whole = DiffusionPipeline.from_pretrained(dtype=torch.bfloat16, **load)
assert dtypes(whole) == dict.fromkeys(names, torch.bfloat16)
per_component = {"unet": torch.bfloat16, "emotion_classifier": torch.float16, "default": torch.float32}
mixed = DiffusionPipeline.from_pretrained(dtype=per_component, **load)
assert dtypes(mixed) == {name: per_component.get(name, torch.float32) for name in names}

placed = DiffusionPipeline.from_pretrained(device_map="cpu", **load)
assert placed.hf_device_map == "cpu" and guided(placed).isfinite().all()
# To balance, diffusers makes each component without weights first, and trusts no code there
assert "modeling_simemo.py" in refused(device_map="balanced", **load)
assert "modeling_simemo" in refused(emotion_classifier=placed.emotion_classifier, **load)
balanced = DiffusionPipeline.from_pretrained(device_map="balanced", emotion_classifier=None, **load)
balanced.load_emotion_classifier(placed.emotion_classifier)
assert torch.equal(guided(balanced), guided(placed))
""")


# ---- saving --------------------------------------------------------------------------------------------------------


def test_saved_and_pushed_pipelines_load_in_a_fresh_process(run, tmp_path):
    imported = tiny_models.muse_pipeline()
    imported.save_pretrained(tmp_path / "imported")
    run("""
ways = {
    "repository": ("org/muse", {"trust_remote_code": True}),
    "dispatcher": ("org/sd", {"custom_pipeline": "org/muse", "trust_remote_code": True}),
    "mirror": ("org/sd", {"custom_pipeline": "muse"}),
}
for name, (base, arguments) in ways.items():
    pipe = DiffusionPipeline.from_pretrained(base, semantic_threshold=3.0, **arguments)
    pipe.save_pretrained(name)
    save_file({"image": image(pipe)}, f"{name}.safetensors")
    pipe.push_to_hub(f"org/{name}-pushed")
    pipe.save_pretrained(f"{name}-again", push_to_hub=True, repo_id=f"org/{name}-saved")
""")
    run("""
for name, edition in {"repository": "second", "dispatcher": "second", "mirror": "first"}.items():
    expected = load_file(f"{name}.safetensors")["image"]
    for source in (name, f"org/{name}-pushed", f"org/{name}-saved"):
        assert "trust_remote_code=True" in refused(source)
        pipe = DiffusionPipeline.from_pretrained(source, trust_remote_code=True)
        assert type(pipe).__name__ == "MusePipeline" and pipe.edition == edition, source
        assert pipe.config.semantic_threshold == 3.0
        assert (pipe.emotion_classifier is None) == (name != "repository"), source
        torch.testing.assert_close(image(pipe), expected)

# A class that was imported is saved as upstream saves it, by its bare name: whoever loads it names the code
pipe = DiffusionPipeline.from_pretrained("imported", custom_pipeline="org/muse", trust_remote_code=True)
assert pipe.edition == "second" and pipe.emotion_classifier is not None

sys.path.append(repository)
from pipeline_muse import MusePipeline

again = MusePipeline.from_pretrained("imported", trust_remote_code=True)  # for SimEmo's code
assert type(again) is MusePipeline and torch.equal(guided(again), guided(pipe))
""")


# ---- classifiers ---------------------------------------------------------------------------------------------------


def test_classifiers_by_id(run, hub, checkpoints, tmp_path):
    prefix = "emotion_classifier/"
    muse = checkpoints["muse"]
    simemo = {path.removeprefix(prefix): data for path, data in muse.items() if path.startswith(prefix)}
    earlier, _ = (hub.push("org/simemo", edition(simemo, name)) for name in ("first", "second"))
    vit().save_pretrained(tmp_path / "vit")
    processor().save_pretrained(tmp_path / "vit")
    hub.push("org/vit", folder_files(tmp_path / "vit"))
    run(f"""
def edition(classifier):
    return sys.modules[type(classifier).__module__].EDITION


def refuses(name):
    try:
        pipe.load_emotion_classifier(name)
    except ValueError as error:
        return "trust_remote_code=True" in str(error)


pipe = DiffusionPipeline.from_pretrained("org/sd", custom_pipeline="muse")
Path("executed").unlink()
assert refuses("org/simemo")
assert pipe.emotion_classifier is None and not Path("executed").exists()

pipe.load_emotion_classifier("org/simemo", revision={earlier!r}, trust_remote_code=True)
assert edition(pipe.emotion_classifier) == "first"
assert refuses("org/simemo"), "code that was trusted once is not trusted for good"
pipe.load_emotion_classifier("org/simemo", trust_remote_code=True)
assert edition(pipe.emotion_classifier) == "second"
pipe.save_pretrained("simemo")
save_file({{"image": guided(pipe)}}, "simemo.safetensors")

pipe.load_emotion_classifier("org/vit", revision="main")
assert pipe.emotion_labels == ["joy", "fear", "awe"]
assert pipe.emotion_classifier.config.image_mean == [0.1, 0.2, 0.3]
pipe.save_pretrained("vit-saved")
save_file({{"image": guided(pipe)}}, "vit-saved.safetensors")
""")
    run("""
from transformers import AutoModelForImageClassification

alone = AutoModelForImageClassification.from_pretrained("org/simemo", trust_remote_code=True)
assert type(alone).__name__ == "SimEmoForImageClassification"
for name in ("simemo", "vit-saved"):
    pipe = DiffusionPipeline.from_pretrained(name, trust_remote_code=True)
    torch.testing.assert_close(guided(pipe), load_file(f"{name}.safetensors")["image"])
assert pipe.emotion_labels == ["joy", "fear", "awe"]
""")
