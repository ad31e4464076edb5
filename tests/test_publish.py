"""What `publish.py` uploads arrives whole: the repository, Storybook XL, the block, the Space; by the loopback Hub."""

import configparser
import re
from pathlib import Path

import publish
import pytest
import tiny_models
from diffusers import StableDiffusionXLPipeline
from fresh_process import check, run_fresh
from huggingface_hub import HfApi
from loopback_hub import Files, LoopbackHub, folder_files
from PIL import Image
from publish import ALSO, PLACEHOLDER, REPOSITORY, WHOLE


NAMES = {"me/muse" + kind.ending: kind for kind in (WHOLE, *ALSO.values())}


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub to which all was published as `me/muse`, in this process, by the real client."""
    with LoopbackHub() as hub, pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        patch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        api = HfApi(endpoint=hub.endpoint, token="hf_none")
        for repo_id, kind in NAMES.items():
            folder = tmp_path_factory.mktemp("staged")
            publish.stage(REPOSITORY, kind, folder, "me/muse")
            publish.upload(api, kind, folder, repo_id, "Publish", private=True, tag="v1")
        yield hub


def uploaded(hub: LoopbackHub, repo_id: str) -> Files:
    return hub.files(repo_id, kind=f"{NAMES[repo_id].repo_type}s")[1]


@pytest.mark.parametrize("repo_id", NAMES)
def test_a_clone_is_whole(hub, tmp_path, repo_id):
    """No pointers in place of weights and pictures, the placeholder replaced, and a card."""
    files = uploaded(hub, repo_id)
    clone = hub.clone(repo_id, tmp_path, f"{NAMES[repo_id].repo_type}s")
    assert folder_files(clone) == files
    texts = {path for path, content in files.items() if b"\0" not in content}
    assert hub.large_files(files) == set(files) - texts, "what is binary is what is kept apart"
    assert not [path for path in texts if Path(path).suffix in (".md", ".py") and PLACEHOLDER.encode() in files[path]]
    assert files["README.md"].startswith(b"---\n")
    assert not [path for path in files if Path(path).is_absolute() or "__pycache__" in path]


def test_the_whole_repository_is_there_and_its_tag(hub):
    tracked = set(publish.committed_files(REPOSITORY))
    assert set(uploaded(hub, "me/muse")) == tracked
    for repo_id, kind in NAMES.items():
        assert hub.files(repo_id, "v1", f"{kind.repo_type}s") == hub.files(repo_id, kind=f"{kind.repo_type}s")


@pytest.mark.parametrize("repo_id", NAMES)
def test_links_and_pictures_of_the_cards_resolve(hub, repo_id):
    """Those that are relative, to files: the Hub has no page at a folder's address."""
    files = uploaded(hub, repo_id)
    for path in (path for path in files if path.endswith(".md")):
        text = re.sub(r"```.*?```", "", files[path].decode(), flags=re.DOTALL)
        links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'(?:src|href)="([^"]+)"', text)
        for link in (link for link in links if not re.match(r"\w+:|#", link)):
            target = (Path("/", path).parent / link.partition("#")[0]).resolve()
            assert str(target)[1:] in files, f"{path} leads to {link}"


def test_a_space_has_its_app_and_what_that_needs(hub):
    files = uploaded(hub, "me/muse-space")
    front = dict(re.findall(r"^(\w+): (.*)$", files["README.md"].decode().split("---")[1], flags=re.MULTILINE))
    assert front["sdk"] == "gradio" and front["app_file"] in files
    needed = files["requirements.txt"].decode().split()
    setup = configparser.ConfigParser()
    setup.read(REPOSITORY / "setup.cfg")
    assert set(needed) >= set(setup["options"]["install_requires"].split())
    assert any(name.startswith("gradio") for name in needed)


def test_a_release_has_its_entry_in_the_changelog():
    changelog = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.findall(r"^## (\S+)", changelog, flags=re.MULTILINE)[0] == publish.version(REPOSITORY)


def test_a_dry_run_says_all_and_uploads_nothing(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["publish.py", "--repo_id", "me/muse", "--dry_run", "--also", *ALSO])
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    publish.main()
    told = capsys.readouterr().out
    assert all(
        re.search(rf"{kind.repo_type} {re.escape(repo_id)} v\S+: \d+ files", told) for repo_id, kind in NAMES.items()
    )


@pytest.mark.parametrize("repo_id", ["muse", PLACEHOLDER, "me/muse/x"])
def test_a_name_of_ones_own_is_asked_for(repo_id, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["publish.py", "--repo_id", repo_id])
    with pytest.raises(SystemExit):
        publish.main()
    assert "--repo_id" in capsys.readouterr().err


USE = """
import runpy
import sys

import torch
from diffusers import ModularPipelineBlocks
from transformers import AutoModelForImageClassification

sys.path.insert(0, "clone/examples")
sys.argv = ["generate.py", *"--emotion fear --num_inference_steps 2 --output_dir pictures --prompt".split(), "a house"]
runpy.run_path("clone/examples/generate.py", run_name="__main__")

try:
    refused = ModularPipelineBlocks.from_pretrained("me/muse-modular")
except ValueError as error:
    refused = str(error)
assert "trust_remote_code=True" in refused
for card in ("xl.py", "modular.py"):
    exec(open(card).read())

classifier = AutoModelForImageClassification.from_pretrained("org/simemo", trust_remote_code=True)
pipe.update_components(emotion_classifier=classifier)
arguments = {"num_inference_steps": 2, "semantic_threshold": 0.0, "max_inner_steps": 1}
trace = pipe(prompt="a cat", emotion="awe", output="trace", **arguments)[0]
assert trace.gate_step == 0 and trace.labels == list(classifier.config.id2label.values())
"""


def test_what_was_published_runs(hub, tmp_path):
    """In one fresh process: the demo's first picture from a clone, the snippets of the cards, another's SimEmo."""
    hub.clone("me/muse", tmp_path / "clone")
    StableDiffusionXLPipeline(**tiny_models.stable_diffusion_xl()).save_pretrained(tmp_path / "sdxl")
    models = {
        "openai/clip-vit-large-patch14": tiny_models.clip_model(),
        "madebyollin/taesdxl": tiny_models.preview_vae(),
        "org/simemo": tiny_models.emotion_classifier(),
    }
    for repo_id, model in models.items():
        model.save_pretrained(tmp_path / repo_id)
        hub.push(repo_id, folder_files(tmp_path / repo_id))
    hub.push("stabilityai/stable-diffusion-xl-base-1.0", folder_files(tmp_path / "sdxl"))
    small = {"float16": "float32", '"cuda"': '"cpu"', "steps=20": "steps=2", '"fast"': '"fast", num_inference_steps=2'}
    for name, repo_id in {"xl.py": "me/muse-storybook-xl", "modular.py": "me/muse-modular"}.items():
        (snippet,) = re.findall(r"```python\n(.*?)```", uploaded(hub, repo_id)["README.md"].decode(), flags=re.DOTALL)
        for large, little in small.items():
            snippet = snippet.replace(large, little)
        (tmp_path / name).write_text(snippet)
    check(run_fresh(USE, folder=tmp_path, HF_ENDPOINT=hub.endpoint, NO_PROXY="127.0.0.1"))
    sizes = {"pictures/000_fear_0.png": (128, 128), "fear.png": (128, 128), "awe.png": (32, 32)}
    assert {name: Image.open(tmp_path / name).size for name in sizes} == sizes
