import copy
import json

import numpy as np
import pytest
import tiny_models
import torch
from fresh_process import check, run_fresh
from modeling_simemo import EMOSET_LABELS, SimEmoConfig, SimEmoForImageClassification
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from transformers import AutoImageProcessor, CLIPVisionConfig, pipeline

from pipeline_muse import MusePipeline, PixelSpec


# The rows of the paper's table of classifiers, with the tower of the tests and hidden layers to its scale.
CLASSIFIERS = {
    "simemo": {"head_hidden_sizes": [24]},
    "emogen": {"head_hidden_sizes": []},
    "emoedit": {"head_hidden_sizes": [8]},
    "zero-shot": {
        "head_hidden_sizes": [],
        "head_bias": False,
        "normalize_features": True,
        "logit_scale": 100.0,
    },
}

RELOAD = """
import sys, torch
from pathlib import Path
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageClassification
root = Path(sys.argv[1])
pixels, logits = load_file(root / "pixels.safetensors")["pixels"], {}
for folder in filter(Path.is_dir, root.iterdir()):
    assert AutoConfig.from_pretrained(folder, trust_remote_code=True).model_type == "simemo"
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        model = AutoModelForImageClassification.from_pretrained(folder, dtype=dtype, trust_remote_code=True)
        assert type(model).__module__ != "modeling_simemo", "the module must come from the saved folder"
        with torch.no_grad():
            logits[f"{folder.name} {dtype}"] = model(pixels.to(dtype)).logits
save_file(logits, root / "logits.safetensors")
"""


@pytest.fixture(params=CLASSIFIERS, ids=str)
def classifier(request) -> SimEmoForImageClassification:
    return tiny_models.emotion_classifier(**CLASSIFIERS[request.param])


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def test_defaults_are_simemo_on_vit_l_14():
    config = SimEmoConfig()
    assert tuple(config.id2label[index] for index in range(8)) == EMOSET_LABELS
    assert config.label2id["sadness"] == 7
    assert (config.projection_dim, config.head_hidden_sizes, config.image_size) == (768, [2048], 224)
    with torch.device("meta"):
        model = SimEmoForImageClassification(config)
    assert [tuple(layer.weight.shape) for layer in model.classifier if hasattr(layer, "weight")] == [
        (2048, 768),
        (8, 2048),
    ]


def test_logits_and_loss(classifier, pixels):
    labels = torch.tensor([0, 3, 7])
    with torch.no_grad():
        output = classifier(pixels, labels=labels)
        again = classifier(pixels, return_dict=False)
    assert output.logits.shape == (3, 8)
    assert torch.equal(output.logits, again[0]) and len(again) == 1
    torch.testing.assert_close(output.loss, F.cross_entropy(output.logits, labels))


def test_logits_do_not_depend_on_the_batch(classifier, pixels):
    with torch.no_grad():
        torch.testing.assert_close(classifier(pixels).logits[1:2], classifier(pixels[1:2]).logits)


def test_simemo_does_not_normalise_its_feature(pixels):
    model = tiny_models.emotion_classifier(**CLASSIFIERS["emogen"])
    with torch.no_grad():
        feature = model.clip(pixel_values=pixels).image_embeds
        expected = feature @ model.classifier[0].weight.T + model.classifier[0].bias
        torch.testing.assert_close(model(pixels).logits, expected)


def test_zero_shot_is_clip(pixels):
    clip = tiny_models.clip_model()
    model = tiny_models.emotion_classifier(**CLASSIFIERS["zero-shot"])
    names = tiny_models.tokenizer()(list(EMOSET_LABELS), padding=True, return_tensors="pt")
    with torch.no_grad():
        clip.logit_scale.fill_(torch.log(torch.tensor(100.0)))
        expected = clip(pixel_values=pixels, **names)
        model.clip.vision_model.load_state_dict(clip.vision_model.state_dict())
        model.clip.visual_projection.load_state_dict(clip.visual_projection.state_dict())
        model.classifier[0].weight.copy_(expected.text_embeds)
        torch.testing.assert_close(model(pixels).logits, expected.logits_per_image, rtol=1e-4, atol=1e-3)


def test_the_tower_loads_from_any_clip(tmp_path):
    clip = tiny_models.clip_model(seed=5)
    clip.save_pretrained(tmp_path)
    config = SimEmoConfig(vision_config=clip.config.vision_config, projection_dim=clip.config.projection_dim)
    model, report = SimEmoForImageClassification.from_pretrained(tmp_path, config=config, output_loading_info=True)
    assert all(key.startswith("classifier.") for key in report["missing_keys"])
    for name, weight in model.clip.vision_model.state_dict().items():
        assert torch.equal(weight, clip.vision_model.state_dict()[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_gradients_reach_the_pixels(classifier, pixels, dtype):
    classifier = classifier.to(dtype).requires_grad_(False)
    pixels.requires_grad_()
    output = classifier(pixels.to(dtype), labels=torch.tensor([1, 2, 3]))
    assert output.logits.dtype == dtype and output.loss.dtype == torch.float32
    (gradient,) = torch.autograd.grad(output.loss, pixels)
    assert gradient.isfinite().all()
    assert (gradient.flatten(1).abs().amax(dim=1) > 0).all()


def test_gradients_are_those_of_finite_differences(classifier, pixels):
    classifier, pixels = classifier.double().requires_grad_(False), pixels[:1].double().requires_grad_()

    def loss_of(image: torch.Tensor) -> torch.Tensor:
        return F.cross_entropy(classifier(image).logits, torch.tensor([3]))

    (gradient,) = torch.autograd.grad(loss_of(pixels), pixels)
    assert (gradient != 0).all(), "every pixel counts"
    generator = torch.Generator().manual_seed(1)
    places = torch.randperm(pixels.numel(), generator=generator)[:12]
    steps = 1e-5 * F.one_hot(places, pixels.numel()).to(pixels).view(-1, *pixels.shape)
    with torch.no_grad():
        slopes = [(loss_of(pixels + step) - loss_of(pixels - step)) / 2e-5 for step in steps]
    torch.testing.assert_close(gradient.flatten()[places], torch.stack(slopes), rtol=1e-5, atol=1e-9)


def test_in_eval_mode_the_same_each_time_also_with_dropout(pixels):
    model = tiny_models.emotion_classifier(vision_config={**tiny_models.VISION_CONFIG, "attention_dropout": 0.5})
    pixels.requires_grad_()

    def answers() -> list[torch.Tensor]:
        logits = model(pixels).logits
        return [logits.detach(), *torch.autograd.grad(logits[:, 0].sum(), pixels)]

    first, again = answers(), answers()
    assert all(torch.equal(one, other) for one, other in zip(first, again))
    model.train()
    assert not torch.equal(answers()[0], first[0]), "there is dropout to switch off"


def test_attention_implementations_agree(classifier, pixels, tmp_path):
    classifier.save_pretrained(tmp_path)
    pixels.requires_grad_()
    answers = []
    for implementation in ("eager", "sdpa"):
        model = SimEmoForImageClassification.from_pretrained(tmp_path, attn_implementation=implementation).eval()
        assert model.clip.config._attn_implementation == implementation
        logits = model(pixels).logits
        answers.append((logits, *torch.autograd.grad(logits[:, 0].sum(), pixels)))
    for eager, fused in zip(*answers):
        torch.testing.assert_close(fused, eager, rtol=1e-4, atol=1e-5 * eager.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_agrees(classifier, pixels, dtype):
    with torch.no_grad():
        expected = classifier(pixels).logits.softmax(-1)
        half = classifier.to(dtype)(pixels.to(dtype)).logits.float().softmax(-1)
    torch.testing.assert_close(half, expected, rtol=0, atol=0.05)


def test_round_trip_in_a_fresh_process(pixels, tmp_path):
    models = {name: tiny_models.emotion_classifier(**config) for name, config in CLASSIFIERS.items()}
    for name, model in models.items():
        model.save_pretrained(tmp_path / "saved" / name)
    save_file({"pixels": pixels}, tmp_path / "saved" / "pixels.safetensors")
    check(run_fresh(RELOAD, tmp_path / "saved", folder=tmp_path, HF_HUB_OFFLINE="1"))
    logits = load_file(tmp_path / "saved" / "logits.safetensors")
    for name, model in models.items():
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            with torch.no_grad():
                expected = copy.deepcopy(model).to(dtype)(pixels.to(dtype)).logits
            assert logits[f"{name} {dtype}"].dtype == dtype
            torch.testing.assert_close(logits[f"{name} {dtype}"], expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_as_a_component_in_low_precision(tmp_path, dtype):
    tiny_models.save_muse(tmp_path / "muse")
    pipe = MusePipeline.from_pretrained(tmp_path / "muse", torch_dtype=dtype, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.emotion_classifier.dtype == dtype
    output = tiny_models.guide(pipe, num_inference_steps=2, output_type="pt")
    assert output.images.isfinite().all()
    assert output.trace[0].inner_steps > 0 and output.emotion_tokens.isfinite().all()


def test_saved_config_is_complete_and_reloads(tmp_path):
    config = tiny_models.emotion_classifier(**CLASSIFIERS["zero-shot"]).config
    config.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())
    assert saved["id2label"]["2"] == "contentment"
    assert {"vision_config", "projection_dim", "image_size", "image_mean", "image_std"} <= saved.keys()
    again = SimEmoConfig.from_pretrained(tmp_path)
    assert isinstance(again.vision_config, CLIPVisionConfig)
    assert again.to_diff_dict() == config.to_diff_dict()


def test_other_labels():
    config = SimEmoConfig(id2label={"1": "sad", "0": "glad"})
    assert (config.num_labels, config.label2id) == (2, {"glad": 0, "sad": 1})
    assert SimEmoConfig(label2id={"glad": 0, "sad": 1}).id2label == {0: "glad", 1: "sad"}
    assert SimEmoConfig(num_labels=3).num_labels == 3


def test_a_given_config_is_not_changed():
    vision = CLIPVisionConfig(**tiny_models.VISION_CONFIG)
    assert SimEmoConfig(vision_config=vision, projection_dim=4).vision_config.projection_dim == 4
    assert vision.projection_dim == 16


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"projection_dim": 0}, "projection_dim"),
        ({"head_hidden_sizes": [16, -1]}, "head_hidden_sizes"),
        ({"head_hidden_sizes": 16}, "head_hidden_sizes"),
        ({"head_hidden_sizes": [True]}, "head_hidden_sizes"),
        ({"logit_scale": 0}, "logit_scale"),
        ({"logit_scale": float("nan")}, "logit_scale"),
        ({"image_size": 64}, "image_size"),
        ({"image_mean": [0.5, 0.5]}, "image_mean"),
        ({"image_std": [0.5, 0.5, 0.0]}, "image_std"),
        ({"image_std": [0.5, 0.5, float("inf")]}, "image_std"),
        ({"id2label": {0: "awe", 2: "fear"}}, "without gaps"),
        ({"id2label": {}}, "without gaps"),
        ({"id2label": {0: "awe", 1: "awe"}}, "twice"),
        ({"id2label": {0: "awe", 1: "fear"}, "label2id": {"awe": 1, "fear": 0}}, "inverse"),
        ({"id2label": {0: "awe", 1: "fear"}, "num_labels": 3}, "num_labels"),
        ({"vision_config": "ViT-L/14"}, "vision_config"),
    ],
    ids=str,
)
def test_bad_configurations_are_refused(config, message):
    with pytest.raises(ValueError, match=message):
        SimEmoConfig(**{"vision_config": tiny_models.VISION_CONFIG, **config})


@pytest.mark.parametrize("shape", [(3, 32, 32), (1, 1, 32, 32), (1, 3, 64, 64)], ids=str)
def test_images_of_another_shape_are_refused(shape):
    with pytest.raises(ValueError, match="pixel_values"):
        tiny_models.emotion_classifier()(torch.zeros(shape))


def test_labels_of_another_shape_are_refused(pixels):
    with pytest.raises(ValueError, match="labels"):
        tiny_models.emotion_classifier()(pixels, labels=torch.zeros(3, 8))


def test_the_bundled_folder_brings_an_image_processor_that_sees_what_the_pipeline_shows():
    folder = tiny_models.REPOSITORY / "emotion_classifier"
    processor = AutoImageProcessor.from_pretrained(folder)
    model = SimEmoForImageClassification.from_pretrained(folder).eval()
    spec = PixelSpec.from_classifier(model)
    assert PixelSpec.from_processor(processor) == spec
    one_level = 1 / 255 / min(spec.std)
    for size in ((64, 64), (200, 200), (200, 120)):
        picture = Image.effect_noise(size, 20).convert("RGB")
        expected = spec.prepare(torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1)
        seen = processor(picture, return_tensors="pt").pixel_values
        torch.testing.assert_close(seen, expected, rtol=0, atol=1.01 * one_level)


def test_the_bundled_folder_serves_pipelines_of_transformers():
    folder = str(tiny_models.REPOSITORY / "emotion_classifier")
    classify = pipeline("image-classification", model=folder, trust_remote_code=True, device="cpu", top_k=8)
    picture = Image.open(tiny_models.REPOSITORY / "examples" / "picture.png").convert("RGB").resize((64, 64))
    answers = {answer["label"]: answer["score"] for answer in classify(picture)}
    model = SimEmoForImageClassification.from_pretrained(folder).eval()
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None] / 127.5 - 1
    with torch.no_grad():
        expected = model(PixelSpec.from_classifier(model).prepare(pixels)).logits.softmax(-1)[0]
    torch.testing.assert_close(torch.tensor([answers[label] for label in model.config.label2id]), expected)
