"""The snippets of the card and the recipes run as a reader runs them, in order, on tiny stand-ins for the Hub's."""

import re
from pathlib import Path

import PIL.Image
import pytest
import tiny_models
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from fresh_process import run_fresh
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil


PAGES = ["README.md", "docs/recipes.md"]

# What a reader has, or has read before
BEFORE = """
from diffusers import StableDiffusionPipeline
from transformers import CLIPModel
sd = StableDiffusionPipeline.from_pretrained("stable-diffusion-v1-5/stable-diffusion-v1-5")
clip_model = CLIPModel.from_pretrained("openai/clip-vit-large-patch14")
"""
ON_A_CPU = {
    '.to("cuda")': "",
    "pipe.enable_model_cpu_offload()\n": "",
    "float16": "float32",
    'variant="fp16",': "",
    'preset="fast"': 'preset="fast", num_inference_steps=3',
    "num_inference_steps=25": "num_inference_steps=3",
    " strength=0.75": " num_inference_steps=4, strength=0.75",
    'emotion="melancholic"': 'emotion="melancholic", num_inference_steps=2',
    'emotion="eerie"': 'emotion="eerie", num_inference_steps=2',
    'pipe("a lighthouse")': 'pipe("a lighthouse", num_inference_steps=2)',
    'pipe("a lighthouse", emotion="awe").': 'pipe("a lighthouse", emotion="awe", num_inference_steps=2).',
}


def snippets(page: str) -> str:
    text = (tiny_models.REPOSITORY / page).read_text(encoding="utf-8")
    return "\n".join(re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory) -> dict[str, Path]:
    """What a snippet loads from the Hub or a disk, and where a tiny one of the same kind lies."""
    folder = tmp_path_factory.mktemp("hub")
    config = ViTConfig(
        hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, image_size=32, num_labels=3
    )
    config.id2label = {0: "awe", 1: "fear", 2: "anger"}
    ViTForImageClassification(config).save_pretrained(folder / "classifier")
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder / "classifier")
    tiny_models.clip_model().save_pretrained(folder / "clip")
    tiny_models.preview_vae().save_pretrained(folder / "tiny")
    StableDiffusionXLPipeline(**tiny_models.STABLE_DIFFUSION_XL.components()).save_pretrained(folder / "xl")
    unet = tiny_models.unet(sum((32, 24)))  # as wide as the tiny XL's, the recipes' last pipeline by then
    unet.add_adapter(LoraConfig(r=2, target_modules=["to_k", "to_q", "to_v"]))
    StableDiffusionPipeline.save_lora_weights(
        folder, unet_lora_layers=get_peft_model_state_dict(unet), weight_name="lora.safetensors"
    )
    PIL.Image.new("RGB", (48, 32), "teal").save(folder / "photo.jpg")
    return {
        "stable-diffusion-v1-5/stable-diffusion-v1-5": tiny_models.save_base(folder / "base"),
        "stabilityai/stable-diffusion-xl-base-1.0": folder / "xl",
        "openai/clip-vit-large-patch14": folder / "clip",
        "madebyollin/taesdxl": folder / "tiny",
        "outputs/emogen": folder / "classifier",
        "path/to/lora.safetensors": folder / "lora.safetensors",
        "photo.jpg": folder / "photo.jpg",
        "your-namespace/muse": tiny_models.REPOSITORY,
    }


@pytest.fixture
def clone(tmp_path) -> Path:
    """A folder that looks like a fresh clone, into which a snippet may write."""
    for entry in tiny_models.REPOSITORY.iterdir():
        (tmp_path / entry.name).symlink_to(entry) if entry.name != "outputs" else None
    return tmp_path


def test_there_are_snippets_for_each_way_to_use_it():
    uses = ("trust_remote_code=True", "custom_pipeline=", "from_pipe", "image=", "load_emotion_classifier", "preset=")
    text = "".join(map(snippets, PAGES))
    assert all(use in text for use in uses)


@pytest.mark.parametrize("page", PAGES)
def test_the_snippets_of_a_page_run(page, stand_ins, clone):
    script = BEFORE + snippets(page)
    for old, new in (ON_A_CPU | {name: str(path) for name, path in stand_ins.items()}).items():
        script = script.replace(old, new)
    result = run_fresh(script, folder=clone, HF_HUB_OFFLINE="1")
    assert result.returncode == 0, result.stderr[-3000:]
    saved = re.findall(r'save\("(.*?)"\)', script)
    assert saved and all((clone / name).stat().st_size > 0 for name in saved)


def test_links_lead_somewhere():
    pages = [*(tiny_models.REPOSITORY / "docs").glob("*.md"), *(tiny_models.REPOSITORY / page for page in PAGES[:1])]
    for page in pages:
        targets = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text(encoding="utf-8"))
        missing = [target for target in targets if not (page.parent / target).exists()]
        assert not missing, f"{page.name} points to {missing}"


def test_scripts_and_options_that_pages_name_are_there():
    examples = tiny_models.REPOSITORY / "examples"
    scripts = {path.name: path.read_text(encoding="utf-8") for path in examples.rglob("*.py")}
    shared = (
        scripts["options.py"] + scripts["classifiers.py"] + (tiny_models.REPOSITORY / "pipeline_muse.py").read_text()
    )
    for page in (tiny_models.REPOSITORY / "docs").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        for script in re.findall(r"`examples/([\w/]+\.py)|python examples/([\w/]+\.py)", text):
            assert (examples / "".join(script)).is_file(), f"{page.name} names {script}"
        for name, arguments in re.findall(r"examples/(?:\w+/)?(\w+\.py)((?: [^\n`#]*)?)", text):
            for option in re.findall(r"--(\w+)", arguments):
                assert option in scripts[name] + shared or option == "help", f"{page.name}: {name} has no --{option}"


def test_the_card_fits_on_a_page():
    words = (tiny_models.REPOSITORY / "README.md").read_text(encoding="utf-8").split("---", 2)[2].split()
    assert len(words) <= 1300
