"""Classifiers without training: zero-shot from a CLIP, and converted from the checkpoints of others."""

import json
import math
import pickle
import random
import re
import sys
import zipfile
from pathlib import Path

import convert_emotion_checkpoint as converter
import make_zero_shot_classifier as zero_shot
import numpy as np
import pytest
import tiny_models
import torch
from emotion_wheel import draw
from huggingface_hub import ModelCard
from loopback_hub import LoopbackHub
from modeling_simemo import EMOSET_LABELS
from muse_examples import classifiers
from muse_examples.metrics import ecc_emc
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoImageProcessor,
    AutoModelForImageClassification,
    CLIPModel,
    CLIPTokenizer,
    CLIPVisionConfig,
    CLIPVisionModelWithProjection,
)
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from pipeline_muse import EMOTION_TEMPLATES


sys.path.append(str(tiny_models.REPOSITORY / "examples" / "storybook"))
from world import render, sample_scene  # noqa: E402


ALPHABETICAL = ["amusement", "anger", "awe", "contentment", "disgust", "excitement", "fear", "sadness"]


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=tiny_models.generator())


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clip")
    tiny_models.clip_model(seed=3).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


# ---- zero-shot -----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_with_one_prompt_per_label_the_logits_are_clips_own(pixels):
    clip, tokenizer = tiny_models.clip_model(), tiny_models.tokenizer()
    texts = {"cozy": "a warm room", "eerie": "an empty hall", "awe": "tall cliffs"}
    classifier = zero_shot.zero_shot_classifier(clip, tokenizer, {label: [text] for label, text in texts.items()})
    inputs = tokenizer(list(texts.values()), padding=True, return_tensors="pt")
    expected = clip(**inputs, pixel_values=pixels).logits_per_image
    torch.testing.assert_close(classifier(pixels).logits, expected, rtol=1e-4, atol=1e-4)
    assert classifier.config.id2label == dict(enumerate(texts))


@torch.no_grad()
def test_several_prompts_are_averaged_on_the_unit_sphere(pixels):
    clip, tokenizer = tiny_models.clip_model(), tiny_models.tokenizer()
    prompts = {"cozy": ["a warm room", "a fire", "tea"], "eerie": ["an empty hall"]}
    classifier = zero_shot.zero_shot_classifier(clip, tokenizer, prompts)
    inputs = tokenizer(prompts["cozy"], padding=True, return_tensors="pt")
    output = clip(**inputs, pixel_values=pixels)
    directions = output.text_embeds / output.text_embeds.norm(dim=-1, keepdim=True)
    mean = directions.sum(dim=0) / directions.sum(dim=0).norm()
    expected = clip.logit_scale.exp() * output.image_embeds @ mean
    torch.testing.assert_close(classifier(pixels).logits[:, 0], expected, rtol=1e-4, atol=1e-4)


def test_a_prompt_that_clip_cannot_read_to_its_end_is_refused():
    with pytest.raises(ValueError, match="`prompts` may have 16 tokens"):
        zero_shot.zero_shot_classifier(tiny_models.clip_model(), tiny_models.tokenizer(), {"cozy": ["so warm " * 9]})


def test_a_tokenizer_that_confuses_labels_is_refused():
    empty = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1}, merges=[])
    with pytest.raises(ValueError, match="does not tell 'fear' and 'rage' apart"):
        zero_shot.zero_shot_classifier(tiny_models.clip_model(), empty, {"fear": ["fear"], "rage": ["rage"]})


def test_a_zero_shot_folder_loads_everywhere(clip_folder, tmp_path, pixels, pipe):
    folder = tmp_path / "cozy"
    arguments = ["--clip", str(clip_folder), "--labels", "cozy", "eerie", "--templates", "a {} room", "so {}"]
    zero_shot.main([*arguments, "--output_dir", str(folder), "--dtype", "float16"])
    classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    assert classifier.dtype == torch.float16
    code = get_class_from_dynamic_module("modeling_simemo.SimEmoForImageClassification", str(folder))
    assert code is not type(classifier) and code.from_pretrained(folder).config.id2label == {0: "cozy", 1: "eerie"}
    prompts = {"cozy": ["a cozy room", "so cozy"], "eerie": ["a eerie room", "so eerie"]}
    clip = CLIPModel.from_pretrained(clip_folder).eval()
    expected = zero_shot.zero_shot_classifier(clip, tiny_models.tokenizer(), prompts)
    with torch.no_grad():
        logits = classifier.float()(pixels).logits
        torch.testing.assert_close(logits, expected(pixels).logits, rtol=1e-2, atol=1e-2)

    processor = AutoImageProcessor.from_pretrained(folder)
    picture = Image.effect_noise((48, 32), 60).convert("RGB")
    seen = processor(picture, return_tensors="pt")["pixel_values"]
    cut = torch.from_numpy(np.array(picture.crop((8, 0, 40, 32)))).permute(2, 0, 1) / 255
    mean, std = (
        torch.tensor(value).view(3, 1, 1) for value in (classifier.config.image_mean, classifier.config.image_std)
    )
    torch.testing.assert_close(seen[0], (cut - mean) / std, rtol=1e-3, atol=1e-3)

    pipe.load_emotion_classifier(folder, trust_remote_code=True)
    assert pipe.emotion_labels == ["cozy", "eerie"]
    assert tiny_models.guide(pipe, emotion="eerie").images.isfinite().all()


def test_the_card_of_a_zero_shot_classifier_says_what_it_is(clip_folder, tmp_path):
    table = tmp_path / "table.json"
    table.write_text(json.dumps({"cozy": ["a fire", "tea"], "eerie": "an empty hall"}), encoding="utf-8-sig")
    arguments = ["--clip", str(clip_folder), "--prompts", str(table), "--output_dir", str(tmp_path / "mine")]
    zero_shot.main(arguments)
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.pipeline_tag == "image-classification" and card.data.library_name == "transformers"
    assert card.data.base_model is None, "a folder of this machine means nothing on the Hub"
    assert "- cozy: “a fire”; “tea”\n- eerie: “an empty hall”" in card.text
    assert str(tmp_path) not in card.content and str(clip_folder) not in card.content


def test_the_card_names_a_clip_of_the_hub():
    config = tiny_models.emotion_classifier().config
    card = classifiers.model_card(config, "Title", "About.", "me/simemo", "openai/clip-vit-base-patch32")
    assert card.data.base_model == "openai/clip-vit-base-patch32"
    assert 'from_pretrained("me/simemo", trust_remote_code=True)' in card.text


def test_eight_emotions_are_the_default():
    args = zero_shot.parse_args(["--output_dir", "new"])
    assert list(args.prompts) == list(EMOSET_LABELS)
    assert args.prompts["fear"] == [template.format("fear") for template in EMOTION_TEMPLATES]


def test_the_classifier_goes_to_the_hub(clip_folder, tmp_path, monkeypatch):
    with LoopbackHub() as hub:
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", hub.endpoint)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_DISABLE_XET", True)
        monkeypatch.setenv("HF_TOKEN", "hf_loopback")
        arguments = ["--clip", str(clip_folder), "--labels", "cozy", "eerie", "--templates", "{}", "--push_to_hub"]
        zero_shot.main([*arguments, "--output_dir", str(tmp_path / "mine"), "--hub_model_id", "me/zero-shot"])
        files = hub.files("me/zero-shot")[1]
    written = {path.name: path.read_bytes() for path in (tmp_path / "mine").iterdir()}
    assert {name: files.get(name) for name in written} == written
    assert {"config.json", "model.safetensors", "modeling_simemo.py", "preprocessor_config.json", "README.md"} <= set(
        files
    )
    assert b'from_pretrained("me/zero-shot"' in files["README.md"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--labels", "cozy", "cozy"], "`labels` has to name each label once"),
        (["--templates", "a room"], "`templates` have to hold a {}"),
        (["--labels", "cozy", "--prompts", "table.json"], "--prompts names the labels"),
        (["--prompts", "missing.json"], "missing.json"),
        (["--prompts", "broken.json"], "is not JSON"),
        (["--prompts", "list.json"], "has to hold an object"),
        (["--prompts", "numbers.json"], "'cozy' has to have a text or a list of texts"),
        (["--hub_model_id", "me/mine"], "--hub_model_id needs --push_to_hub"),
        (["--push_to_hub", "--hub_model_id", "me/my/mine"], "--hub_model_id"),
        (["--output_dir", "table.json"], "is a file"),
    ],
    ids=str,
)
def test_bad_arguments_end_the_program_before_models_load(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    files = {"table": '{"cozy": "a fire"}', "broken": "{", "list": "[1]", "numbers": '{"cozy": [1]}'}
    for name, text in files.items():
        Path(f"{name}.json").write_text(text)
    with pytest.raises(SystemExit):
        zero_shot.parse_args(["--output_dir", "new", *arguments])
    assert message in capsys.readouterr().err


def test_storybooks_clip_tells_emotions_zero_shot():
    root = tiny_models.REPOSITORY
    clip, tokenizer = (
        CLIPModel.from_pretrained(root / "clip_model").eval(),
        CLIPTokenizer.from_pretrained(root / "tokenizer"),
    )
    prompts = zero_shot.fill_templates(EMOSET_LABELS, EMOTION_TEMPLATES)
    classifier = zero_shot.zero_shot_classifier(clip, tokenizer, prompts)
    rng = random.Random(0)
    truths = [label for label in EMOSET_LABELS for _ in range(10)]
    pictures = np.stack([np.asarray(render(sample_scene(rng, emotion=label))) for label in truths])
    mean, std = (
        torch.tensor(values).view(3, 1, 1) for values in (classifier.config.image_mean, classifier.config.image_std)
    )
    with torch.no_grad():
        logits = classifier((torch.from_numpy(pictures).permute(0, 3, 1, 2) / 255 - mean) / std).logits
    answers = [classifier.config.id2label[index] for index in logits.argmax(dim=-1).tolist()]
    accuracy = sum(answer == truth for answer, truth in zip(answers, truths)) / len(truths)
    assert accuracy > 0.6  # 0.775 on 400 renders; chance is 0.125


# ---- converted -----------------------------------------------------------------------------------------------------


class EmoGenHead(nn.Module):
    """EmoGen's classifier of CLIP features."""

    def __init__(self, features: int, classes: int = 8):
        super().__init__()
        self.fc = nn.Linear(features, classes)

    def forward(self, x):
        return self.fc(x)


class EmoEditHead(nn.Module):
    """EmoEdit's classifier of CLIP features, which gives probabilities."""

    def __init__(self, features: int, hidden: int = 12):
        super().__init__()
        self.hidden = nn.Linear(features, hidden)
        self.fc = nn.Linear(hidden, 8)

    def forward(self, x):
        return self.fc(self.hidden(x).relu()).softmax(dim=1)


class SimEmotionHead(nn.Module):
    """SimEmotion's head."""

    def __init__(self, features: int, hidden: int = 20):
        super().__init__()
        self.classifier = nn.Sequential(nn.Linear(features, hidden), nn.ReLU(), nn.Linear(hidden, 8))

    def forward(self, x):
        return self.classifier(x)


class OpenAIBlock(nn.Module):
    """A residual block of OpenAI's CLIP."""

    def __init__(self, width: int):
        super().__init__()
        self.attn = nn.MultiheadAttention(width, width // 64, batch_first=True)
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.ModuleDict({"c_fc": nn.Linear(width, 4 * width), "c_proj": nn.Linear(4 * width, width)})

    def forward(self, x):
        normed = self.ln_1(x)
        x = x + self.attn(normed, normed, normed, need_weights=False)[0]
        wide = self.mlp["c_fc"](self.ln_2(x))
        return x + self.mlp["c_proj"](wide * (1.702 * wide).sigmoid())


class OpenAITower(nn.Module):
    """The vision transformer of OpenAI's CLIP, for images of 32 px."""

    def __init__(self, width: int = 128, projection: int = 16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, kernel_size=8, stride=8, bias=False)
        self.class_embedding = nn.Parameter(torch.randn(width))
        self.positional_embedding = nn.Parameter(torch.randn(17, width))
        self.ln_pre, self.ln_post = nn.LayerNorm(width), nn.LayerNorm(width)
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(OpenAIBlock(width), OpenAIBlock(width))})
        self.proj = nn.Parameter(torch.randn(width, projection) / width**0.5)
        for parameter in self.parameters():  # layer norms and biases that start at ones and zeros would hide mistakes
            parameter.data.add_(0.05 * torch.randn_like(parameter))

    def forward(self, x):
        patches = self.conv1(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), patches], dim=1) + self.positional_embedding
        return self.ln_post(self.transformer["resblocks"](self.ln_pre(x))[:, 0]) @ self.proj


def openai_clip(tower: OpenAITower) -> dict[str, torch.Tensor]:
    """What `torch.save(model.state_dict())` of OpenAI's CLIP holds, its text half cut short."""
    text = {
        "positional_embedding": torch.zeros(4, 8),
        "text_projection": torch.zeros(8, 16),
        "logit_scale": torch.tensor(4.6),
        "transformer.resblocks.0.attn.in_proj_weight": torch.zeros(24, 8),
        "token_embedding.weight": torch.zeros(9, 8),
        "ln_final.weight": torch.ones(8),
    }
    return {**{f"visual.{key}": value for key, value in tower.state_dict().items()}, **text}


@pytest.fixture
def features(clip_folder, pixels) -> torch.Tensor:
    """The projected features of the tiny CLIP, as they are."""
    with torch.no_grad():
        return CLIPVisionModelWithProjection.from_pretrained(clip_folder).eval()(pixels).image_embeds


def save(content, path: Path) -> Path:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return path


def save_from_cuda(state: dict[str, torch.Tensor], path: Path) -> Path:
    """Saves as if the tensors lay on a GPU: the pickle names the device of each."""
    torch.save(state, path)
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in entries.items():
            if name.endswith("data.pkl"):
                content = content.replace(b"X\x03\x00\x00\x00cpu", b"X\x06\x00\x00\x00cuda:0")
            archive.writestr(name, content)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
@torch.no_grad()
def test_emogens_head_is_converted(prefix, suffix, clip_folder, pixels, features, tmp_path):
    net = EmoGenHead(16)
    path = save({prefix + key: value for key, value in net.state_dict().items()}, tmp_path / f"head.{suffix}")
    classifier, source = converter.convert([converter.read_state_dict(path)], str(clip_folder))
    assert source.name == "EmoGen" and source.clip == "openai/clip-vit-large-patch14"
    torch.testing.assert_close(classifier(pixels).logits, net(features))
    assert list(classifier.config.id2label.values()) == list(EMOSET_LABELS)


@torch.no_grad()
def test_emoedits_head_is_converted_without_its_softmax(clip_folder, pixels, features, tmp_path):
    net = EmoEditHead(16)
    path = save(net.state_dict(), tmp_path / "head.pth")
    classifier, source = converter.convert([converter.read_state_dict(path)], str(clip_folder))
    assert source.name == "EmoEdit" and source.clip == "openai/clip-vit-base-patch32"
    logits = classifier(pixels).logits
    torch.testing.assert_close(logits.softmax(dim=1), net(features))
    assert not torch.allclose(logits.sum(dim=1), torch.ones(3))
    assert list(classifier.config.id2label.values()) == list(EMOSET_LABELS)


@torch.no_grad()
def test_a_tower_in_half_precision_does_not_round_the_head(tmp_path):
    tiny_models.clip_model(seed=3).half().save_pretrained(tmp_path)
    net = EmoGenHead(16)
    classifier, _ = converter.convert([net.state_dict()], str(tmp_path))
    assert classifier.dtype == torch.float32
    assert torch.equal(classifier.classifier[0].weight, net.fc.weight)


@pytest.mark.parametrize("head_first", [False, True])
@torch.no_grad()
def test_simemotion_is_converted_from_openais_layout(head_first, pixels, tmp_path):
    tower, net = OpenAITower().eval(), SimEmotionHead(16)
    paths = [save(openai_clip(tower), tmp_path / "model.pth"), save(net.state_dict(), tmp_path / "fc.pth")]
    classifier, source = converter.convert(
        [converter.read_state_dict(path) for path in paths[:: -1 if head_first else 1]]
    )
    assert source.name == "SimEmotion"
    torch.testing.assert_close(classifier(pixels).logits, net(tower(pixels)), rtol=1e-4, atol=1e-4)
    assert classifier.config.vision_config.hidden_act == "quick_gelu"
    assert list(classifier.config.id2label.values()) == ALPHABETICAL


@torch.no_grad()
def test_simemotion_is_converted_from_transformers_layout(pixels, tmp_path):
    torch.manual_seed(0)
    tower, net = OpenAITower().eval(), SimEmotionHead(16)
    by_openai, _ = converter.convert([openai_clip(tower), net.state_dict()])
    state = {**by_openai.clip.state_dict(), "text_model.final_layer_norm.weight": torch.ones(8)}
    state["vision_model.embeddings.position_ids"] = torch.arange(17)[None]
    paths = [save(state, tmp_path / "model.pth"), save(net.state_dict(), tmp_path / "fc.pth")]
    classifier, _ = converter.convert([converter.read_state_dict(path) for path in paths])
    torch.testing.assert_close(classifier(pixels).logits, net(tower(pixels)), rtol=1e-4, atol=1e-4)


class PerceptClip(nn.Module):
    """PerceptCLIP's classifier: a LoRA of peft on a CLIP's tower, whose projected feature goes into three layers."""

    def __init__(self, rank: int = 4):
        super().__init__()
        sizes = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 2}
        config = CLIPVisionConfig(**sizes, image_size=32, patch_size=8, projection_dim=16, hidden_act="quick_gelu")
        clip = CLIPVisionModelWithProjection(config)
        lora = LoraConfig(r=rank, lora_alpha=8, target_modules=["q_proj", "k_proj", "v_proj"], lora_dropout=0.1)
        self.proj, self.model = clip.visual_projection, get_peft_model(clip.vision_model, lora)
        self.mlp = nn.ModuleDict({"fc1": nn.Linear(16, 12), "fc2": nn.Linear(12, 10), "fc3": nn.Linear(10, 8)})
        for parameter in self.parameters():  # a new LoRA does nothing
            parameter.data.add_(0.2 * torch.randn_like(parameter))

    def forward(self, x):
        x = self.mlp["fc1"](self.proj(self.model(x)[1])).relu()
        return self.mlp["fc3"](self.mlp["fc2"](x).relu())


@pytest.mark.parametrize("rank", [4, 16])
@torch.no_grad()
def test_perceptclips_lora_is_merged(rank, pixels, tmp_path, capsys):
    torch.manual_seed(0)
    net = PerceptClip(rank).eval()
    keys = set(net.state_dict())
    layer = "model.base_model.model.encoder.layers.0.self_attn.q_proj."
    assert {"proj.weight", "mlp.fc3.bias", layer + "base_layer.weight", layer + "lora_A.default.weight"} <= keys
    path = save(net.state_dict(), tmp_path / "perceptCLIP_Emotions.pth")
    converter.main([str(path), "--output_dir", str(tmp_path / "perceptclip")])
    assert "check both on pictures whose emotion you know" in capsys.readouterr().out
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "perceptclip", trust_remote_code=True)
    torch.testing.assert_close(classifier(pixels).logits, net(pixels), rtol=1e-4, atol=1e-4)
    with net.model.disable_adapter():
        assert not torch.allclose(classifier(pixels).logits, net(pixels), atol=1e-2)
    assert classifier.config.head_hidden_sizes == [12, 10]
    card = ModelCard.load(tmp_path / "perceptclip" / "README.md").text
    assert "huggingface.co/PerceptCLIP/PerceptCLIP_Emotions" in card and "its LoRA merged" in card


@pytest.mark.parametrize("half", ["lora_A", "lora_B", "base_layer"])
def test_half_a_lora_is_refused(half):
    key = (
        f"model.base_model.model.encoder.layers.1.self_attn.v_proj.{half}{'' if half == 'base_layer' else '.default'}"
    )
    state = PerceptClip().state_dict()
    del state[f"{key}.weight"]
    with pytest.raises(ValueError, match="LoRA of 'encoder.layers.1.self_attn.v_proj' is incomplete"):
        converter.convert([state])


@torch.no_grad()
def test_a_clip_in_half_precision_becomes_float32(pixels):
    tower, net = OpenAITower().eval(), SimEmotionHead(16)
    halves = {key: value.half() for key, value in openai_clip(tower).items()}
    classifier, _ = converter.convert([halves, net.state_dict()])
    assert classifier.dtype == torch.float32
    torch.testing.assert_close(classifier(pixels).logits, net(tower(pixels)), rtol=0, atol=0.02)


@pytest.mark.parametrize(
    ("head", "order"),
    [(EmoGenHead, list(EMOSET_LABELS)), (EmoEditHead, list(EMOSET_LABELS)), (SimEmotionHead, ALPHABETICAL)],
)
def test_every_label_stays_with_its_class(head, order, clip_folder, pixels):
    """In the three orders the same name stands at different places: a label must find the weights of its own row."""
    for index, label in enumerate(order):
        net = head(16)
        last = list(net.modules())[-1]
        last.bias.data.zero_()[index] = 50
        classifier, _ = converter.convert([net.state_dict()], str(clip_folder))
        with torch.no_grad():
            probabilities = classifier(pixels).logits.softmax(dim=-1)
        assert probabilities[:, classifier.config.label2id[label]].min() > 0.99


def test_tensors_that_lay_on_a_gpu_are_read_without_one(tmp_path):
    net = EmoGenHead(16)
    path = save_from_cuda(net.state_dict(), tmp_path / "head.pth")
    with zipfile.ZipFile(path) as archive:
        devices = re.findall(rb"cuda:0|cpu", archive.read(f"{path.stem}/data.pkl"))
    assert set(devices) == {b"cuda:0"}
    state = converter.read_state_dict(path)
    assert {value.device.type for value in state.values()} == {"cpu"}
    assert torch.equal(state["fc.weight"], net.fc.weight)


class Intruder:
    """Writes a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize(
    "writer", [torch.save, lambda content, path: path.write_bytes(pickle.dumps(content, protocol=2))]
)
def test_code_in_a_checkpoint_is_refused_and_does_not_run(writer, tmp_path):
    path = tmp_path / "head.pth"
    writer({**EmoGenHead(16).state_dict(), "more": Intruder(tmp_path / "touched")}, path)
    with pytest.raises(ValueError, match="head.pth is refused"):
        converter.read_state_dict(path)
    assert not (tmp_path / "touched").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("noise.pth", b"\x00\x01 no checkpoint"),
        ("empty.pth", b""),
        ("noise.safetensors", b"\x08 no checkpoint"),
        ("zip.pth", b"PK\x03\x04 cut short"),
        ("text.pth", b"fc.weight"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_files_that_are_no_checkpoints_are_refused(name, content, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=f"{name} is refused"):
        converter.read_state_dict(tmp_path / name)


@pytest.mark.parametrize(("content", "found"), [({"epoch": 3, "fc": 1.0}, "'epoch'"), (torch.zeros(2), "Tensor")])
def test_files_of_other_things_than_named_tensors_are_refused(content, found, tmp_path):
    path = save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"should hold tensors by name, but holds .*{found}"):
        converter.read_state_dict(path)


def renamed(net: nn.Module, **names: str) -> dict[str, torch.Tensor]:
    return {
        names.get(key.split(".")[0], key.split(".")[0]) + "." + key.split(".")[1]: v
        for key, v in net.state_dict().items()
    }


@pytest.mark.parametrize(
    ("states", "message"),
    [
        ([nn.Linear(4, 8).state_dict()], r"No known head .* \['weight', 'bias'\]"),
        (
            [renamed(EmoGenHead(16), fc="head")],
            r"No known head .* \['head.weight', 'head.bias'\].*EmoEdit: hidden, fc",
        ),
        ([{**EmoGenHead(16).state_dict(), "extra.weight": torch.zeros(1)}], "No known head .*extra.weight"),
        ([EmoGenHead(16, classes=16).state_dict()], r"looks like EmoGen's head.*8 classes.*\(16, 16\)"),
        ([{**EmoEditHead(16).state_dict(), "hidden.bias": torch.zeros(3)}], "looks like EmoEdit's head"),
        ([{**EmoGenHead(16).state_dict(), "fc.weight": torch.zeros(8)}], "looks like EmoGen's head"),
        ([EmoGenHead(24).state_dict()], "takes 24 features, but the CLIP gives 16"),
        ([EmoGenHead(16).state_dict()] * 2, "given 2 heads and 0 CLIPs"),
        ([openai_clip(OpenAITower())], "given 0 heads and 1 CLIPs"),
        ([EmoGenHead(16).state_dict(), openai_clip(OpenAITower())], "`clip` is given twice"),
    ],
)
def test_unknown_heads_are_refused(states, message, clip_folder):
    with pytest.raises(ValueError, match=message):
        converter.convert(states, str(clip_folder))


def test_simemotions_head_needs_its_own_clip():
    with pytest.raises(ValueError, match="SimEmotion fine-tunes its CLIP"):
        converter.convert([SimEmotionHead(16).state_dict()])


def test_what_is_no_clip_is_refused(tmp_path):
    tiny_models.emotion_classifier().save_pretrained(tmp_path / "simemo")
    bare = tmp_path / "bare"
    tiny_models.clip_model().config.save_pretrained(bare)
    save_file({"text_model.final_layer_norm.weight": torch.ones(32)}, bare / "model.safetensors", {"format": "pt"})
    with pytest.raises(ValueError, match="lacks weights of its vision tower"):
        converter.convert([EmoGenHead(16).state_dict()], str(bare))
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="is a bert and no CLIP"):
        converter.convert([EmoGenHead(16).state_dict()], str(tmp_path / "bert"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"visual.layer1.0.conv1.weight": torch.zeros(1)}, "ResNet"),
        ({"visual.conv1.weight": None}, "incomplete or misshapen.*patch_embedding"),
        ({"visual.ln_post.bias": None}, "not one of OpenAI's.*post_layernorm.bias"),
        ({"visual.attnpool.q_proj.weight": torch.zeros(1)}, "not one of OpenAI's.*attnpool"),
        ({"visual.positional_embedding": torch.zeros(12, 128)}, "12 positions"),
    ],
)
def test_other_vision_towers_are_refused(change, message):
    state = {key: value for key, value in {**openai_clip(OpenAITower()), **change}.items() if value is not None}
    with pytest.raises(ValueError, match=f"(?s){message}"):
        converter.convert([state, SimEmotionHead(16).state_dict()])


def test_a_converted_folder_loads_everywhere(clip_folder, tmp_path, pixels, features, capsys):
    net = EmoEditHead(16)
    path = save(net.state_dict(), tmp_path / "2024-best.pth")
    converter.main([str(path), "--clip", str(clip_folder), "--output_dir", str(tmp_path / "emoedit")])
    assert "EmoEdit: amusement, awe" in capsys.readouterr().out
    folder = tmp_path / "emoedit"
    assert not [name for name in folder.iterdir() if name.suffix in (".pth", ".bin")]
    classifier = AutoModelForImageClassification.from_pretrained(folder, trust_remote_code=True)
    with torch.no_grad():
        torch.testing.assert_close(classifier(pixels).logits.softmax(dim=1), net(features))
    assert AutoImageProcessor.from_pretrained(folder).size["shortest_edge"] == 32
    card = ModelCard.load(folder / "README.md")
    assert card.data.pipeline_tag == "image-classification" and "JingyuanYY/EmoEdit" in card.text


def test_refusals_end_the_program_with_a_message(tmp_path):
    path = save(nn.Linear(2, 2).state_dict(), tmp_path / "head.pth")
    with pytest.raises(SystemExit, match="No known head"):
        converter.main([str(path), "--output_dir", str(tmp_path / "new")])
    assert not (tmp_path / "new").exists()


# ---- the wheel -----------------------------------------------------------------------------------------------------


def test_grave_mistakes_cost_more_confidence():
    right = [("awe", "awe")] * 3
    near, far = (ecc_emc([*right, ("awe", answer)]) for answer in ("contentment", "anger"))
    assert near == pytest.approx(((3 + 1 / 2) / 4, 1.0))
    assert far == pytest.approx(((3 + 1 / 7) / 4, 1 / 6))
    ecc, emc = ecc_emc(right)
    assert ecc == 1 and math.isnan(emc)
    with pytest.raises(ValueError, match="`answers`"):
        ecc_emc([])


def test_the_wheel_is_drawn(tmp_path):
    assert Image.open(draw(tmp_path / "new" / "wheel.png")).width > 500


# ---- the bundled classifier's own card -----------------------------------------------------------------------------


def test_the_bundled_classifier_has_a_model_card():
    card = ModelCard.load(tiny_models.REPOSITORY / "emotion_classifier" / "README.md")
    assert card.data.license == "apache-2.0" and card.data.library_name == "transformers"
    assert card.data.pipeline_tag == "image-classification"
    scripts = set(re.findall(r"examples/\S+\.py", card.text))
    assert len(scripts) >= 4 and all((tiny_models.REPOSITORY / script).is_file() for script in scripts)
