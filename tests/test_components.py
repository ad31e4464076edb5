"""Components: other classifiers, none at all, and other pipelines around the same modules."""

import json
import math

import numpy as np
import PIL.Image
import pytest
import tiny_models
import torch
import transformers
from diffusers import StableDiffusionImg2ImgPipeline
from tiny_models import guide, stock
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pipeline_muse import EMOTION_PROMPTS, MIKELS_WHEEL, MusePipeline, PixelSpec


def vit(**config) -> ViTForImageClassification:
    """A stock classifier of transformers that knows nothing of MUSE."""
    torch.manual_seed(0)
    labels = {0: "joy", 1: "fear", 2: "awe"}
    return ViTForImageClassification(
        ViTConfig(
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            image_size=24,
            patch_size=8,
            id2label=labels,
            label2id={label: index for index, label in labels.items()},
            **config,
        )
    ).eval()


def processor() -> ViTImageProcessor:
    return ViTImageProcessor(
        size={"height": 24, "width": 24}, image_mean=[0.1, 0.2, 0.3], image_std=[0.4, 0.5, 0.6], resample=3
    )


# ---- classifiers ---------------------------------------------------------------------------------------------------


def test_a_stock_classifier_guides_with_its_own_image_processor(pipe):
    classifier = vit()
    pipe.load_emotion_classifier(classifier, processor())
    assert pipe.emotion_classifier is classifier
    assert pipe.emotion_labels == ["joy", "fear", "awe"]
    trace = guide(pipe, emotion="joy").trace[0]
    assert trace.labels == ["joy", "fear", "awe"]
    assert trace.loss[0][-1] < trace.loss[0][0]


SMALL_VIT, SMALL_CLIP = {"size": {"height": 24, "width": 16}}, {"size": {"shortest_edge": 40}, "crop_size": 24}
PROCESSORS = [
    *((name, {}) for name in ("ViT", "CLIP", "ConvNext", "DeiT", "EfficientNet", "Levit", "Perceiver", "PoolFormer")),
    *((name, {}) for name in ("MobileNetV1", "Siglip")),
    ("MobileViT", {"size": {"shortest_edge": 288}, "crop_size": 256}),  # blue comes first
    ("ViT", SMALL_VIT),
    *(
        ("ViT", SMALL_VIT | one)
        for one in ({"do_normalize": False}, {"do_rescale": False}, {"rescale_factor": 1 / 128})
    ),
    ("CLIP", SMALL_CLIP),
]
UNSUITED = [
    ("ViT", {"do_resize": False}),
    ("CLIP", {"do_center_crop": False}),
    ("MobileViT", {"size": {"shortest_edge": 224}, "crop_size": 256}),  # pads
    ("ImageGPT", {}),
    ("Siglip2", {}),
]


def processor_of(name: str, config: dict):
    """A processor that needs no torchvision."""
    made = getattr(transformers, f"{name}ImageProcessorPil", None) or getattr(transformers, f"{name}ImageProcessor")
    return made(**config)


@pytest.mark.parametrize("name, config", PROCESSORS, ids=str)
def test_pixels_are_prepared_as_image_processors_of_transformers_prepare_them(pipe, name, config):
    """Up to PIL's rounding to eight bits; also of pictures that are no squares."""
    given, classifier = processor_of(name, config), vit()
    pipe.load_emotion_classifier(classifier, given)
    spec = PixelSpec.from_classifier(classifier)
    assert spec == PixelSpec.from_processor(given)
    colors = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
    picture = PIL.Image.fromarray(colors).resize((120, 80), PIL.Image.Resampling.BICUBIC)
    for image in (picture, picture.crop((0, 0, 80, 80)), picture.rotate(90, expand=True)):
        expected = torch.from_numpy(np.array(given(image, return_tensors="np")["pixel_values"][0]))
        pixels = spec.prepare(torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1)[0]
        assert pixels.shape == expected.shape
        error = (pixels - expected).abs().mean(dim=(1, 2)) * torch.tensor(spec.std)
        assert error.max() < 0.01, error


@pytest.mark.parametrize("name, config", UNSUITED, ids=str)
def test_image_processors_that_do_more_are_refused(pipe, name, config):
    before = pipe.emotion_classifier
    with pytest.raises(ValueError, match=f"`image_processor` {name}"):
        pipe.load_emotion_classifier(vit(), processor_of(name, config))
    assert pipe.emotion_classifier is before


def test_a_classifier_whose_config_has_it_all_needs_no_processor(pipe):
    classifier = tiny_models.emotion_classifier(seed=1)
    pipe.load_emotion_classifier(classifier)
    assert pipe.emotion_classifier is classifier
    pipe.load_emotion_classifier(vit(image_mean=[0.5] * 3, image_std=[0.5] * 3))
    assert guide(pipe, emotion="joy").trace[0].gate_step == 0


def test_a_classifier_of_unknown_pixels_is_refused_and_the_old_one_stays(pipe):
    before = pipe.emotion_classifier
    with pytest.raises(ValueError, match="image_mean"):
        pipe.load_emotion_classifier(vit())
    with pytest.raises(TypeError, match="`classifier`"):
        pipe.load_emotion_classifier(torch.nn.Linear(2, 2))
    assert pipe.emotion_classifier is before


def test_a_loaded_classifier_is_saved_with_its_pixel_format(pipe, tmp_path):
    pipe.load_emotion_classifier(vit(), processor())
    expected = guide(pipe, emotion="joy")
    pipe.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["emotion_classifier"] == ["transformers", "ViTForImageClassification"]
    again = MusePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert PixelSpec.from_classifier(again.emotion_classifier) == PixelSpec((24, 24), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert again.emotion_labels == ["joy", "fear", "awe"]
    output = guide(again, emotion="joy")
    torch.testing.assert_close(output.emotion_tokens, expected.emotion_tokens, rtol=0, atol=1e-4)


# ---- classifiers by name -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", [False, True], ids=["its own processor", "the caller's processor"])
def test_a_stock_classifier_is_loaded_by_its_folder(pipe, tmp_path, given):
    vit().save_pretrained(tmp_path)
    if not given:
        processor().save_pretrained(tmp_path)
    pipe.to(torch.bfloat16)
    pipe.load_emotion_classifier(tmp_path, processor() if given else None)
    assert type(pipe.emotion_classifier) is ViTForImageClassification
    assert pipe.emotion_classifier.dtype == torch.bfloat16 and not pipe.emotion_classifier.training
    assert PixelSpec.from_classifier(pipe.emotion_classifier).mean == (0.1, 0.2, 0.3)
    assert guide(pipe, emotion="joy").trace[0].inner_steps > 0


def test_a_simemo_is_loaded_by_its_folder(pipe):
    pipe.load_emotion_classifier(tiny_models.REPOSITORY / "emotion_classifier", trust_remote_code=True)
    assert pipe.emotion_classifier.config.model_type == "simemo"
    assert guide(pipe, emotion="anger").trace[0].inner_steps > 0


def test_revisions_are_for_names_only(pipe):
    with pytest.raises(ValueError, match="`revision`"):
        pipe.load_emotion_classifier(tiny_models.emotion_classifier(), revision="main")


@pytest.mark.parametrize(
    "config, message",
    [
        ({"num_labels": 1}, "one of several labels"),
        ({"problem_type": "multi_label_classification"}, "multi_label_classification"),
        ({"problem_type": "regression"}, "regression"),
    ],
)
def test_models_that_are_no_classifiers_are_refused(config, message):
    config = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, **config}
    small = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    model = ViTForImageClassification(ViTConfig(**small, image_size=32, patch_size=16, **config)).eval()
    pipe = tiny_models.muse_pipeline(emotion_classifier=model)
    for call in (lambda: guide(pipe, emotion="LABEL_0"), lambda: pipe.load_emotion_classifier(model)):
        with pytest.raises(ValueError, match=f"`emotion_classifier` .*{message}"):
            call()


def test_probabilities_in_place_of_logits_are_refused(pipe):
    """Their cross-entropy would be that of a classifier which is sure of nothing."""

    def soften(module, arguments, output):
        output.logits = output.logits.softmax(dim=-1)
        return output

    handle = pipe.emotion_classifier.register_forward_hook(soften)
    with pytest.raises(ValueError, match="`emotion_classifier` has to return logits"):
        guide(pipe)
    handle.remove()
    assert guide(pipe).trace[0].inner_steps > 0


# ---- no classifier at hand -----------------------------------------------------------------------------------------


@pytest.fixture
def zero_shot() -> MusePipeline:
    return tiny_models.muse_pipeline(emotion_classifier=None)


OWN = {"cozy": "a cozy picture", "eerie": ["an eerie picture", "a strange place"], "dull": "a dull picture"}


@torch.no_grad()
def clip_probabilities(pipe, image: torch.Tensor, labels: list[list[str]]) -> torch.Tensor:
    """What CLIP makes of an image, by hand: texts of one label are averaged on the unit sphere."""
    pixels, rows = PixelSpec.from_clip(pipe.clip_model).prepare(image), []
    for texts in labels:
        tokens = pipe.tokenizer(texts, padding="max_length", max_length=16, truncation=True, return_tensors="pt")
        output = pipe.clip_model(**tokens, pixel_values=pixels)
        mean = output.text_embeds.mean(dim=0)
        rows.append(pipe.clip_model.logit_scale.exp() * output.image_embeds @ (mean / mean.norm()))
        if len(texts) == 1:
            torch.testing.assert_close(rows[-1], output.logits_per_image[:, 0])
    return torch.stack(rows, dim=-1).softmax(dim=-1)


def test_clip_classifies_as_it_does(zero_shot, count_calls):
    """The preview that it is shown, by its own scale and cosines."""
    decoder = count_calls(zero_shot.vae.decoder)
    trace = guide(zero_shot, emotion="eerie", emotion_prompts=OWN, num_inference_steps=1, max_inner_steps=0).trace[0]
    texts = [[one] if isinstance(one, str) else one for one in OWN.values()]
    expected = clip_probabilities(zero_shot, decoder.calls[-1][1], texts)
    torch.testing.assert_close(torch.tensor(trace.probabilities[0]), expected, rtol=1e-4, atol=1e-5)


def test_without_a_classifier_clip_guides_towards_the_eight_emotions(zero_shot):
    assert zero_shot.emotion_labels == list(EMOTION_PROMPTS) and set(EMOTION_PROMPTS) == set(MIKELS_WHEEL)
    trace = guide(zero_shot, emotion="awe", emotion_learning_rate=0.1, max_inner_steps=4).trace[0]
    assert trace.labels == list(EMOTION_PROMPTS)
    assert trace.loss[0][0] > trace.loss[0][-1]


@pytest.mark.parametrize("has_classifier", [True, False])
def test_any_other_word_is_left_to_clip(has_classifier, count_calls):
    """Which tells it from the labels and "neutral"; where all words are labels, the classifier is asked."""
    pipe = tiny_models.muse_pipeline(**({} if has_classifier else {"emotion_classifier": None}))
    judge = count_calls(pipe.emotion_classifier) if has_classifier else []
    settings = {"num_inference_steps": 2, "emotion_learning_rate": 0.1}
    for emotion, words in (("cozy", ["cozy"]), ({"cozy": 1, "Awe": 3}, ["cozy"]), ("neutral", ["neutral"])):
        trace = guide(pipe, emotion=emotion, **settings).trace[0]
        assert trace.labels == [*pipe.emotion_labels, *dict.fromkeys([*words, "neutral"])]
        assert trace.loss[0][-1] < trace.loss[0][0] and len(judge) == 0
    assert trace.emotion == {"neutral": 1.0}
    traces = guide(pipe, emotion=["dull", "fear"], prompt=["a cat"] * 2, **settings).trace
    assert [list(one.emotion) for one in traces] == [["dull"], ["fear"]] and len(judge) == 0
    assert guide(pipe, emotion=" FEAR").trace[0].labels == pipe.emotion_labels
    assert len(judge) > 0 or not has_classifier


@pytest.mark.parametrize(
    "emotion, word", [("Neutral", "neutral"), ({"Cozy": 1, "cozy": 1}, "cozy"), (["Cozy", " cozy"], "cozy")], ids=str
)
def test_other_words_are_the_same_whatever_their_case_and_spaces(pipe, emotion, word):
    prompts = ["a cat"] * 2 if isinstance(emotion, list) else "a cat"
    for trace in guide(pipe, emotion=emotion, prompt=prompts, num_inference_steps=1).trace:
        assert [label.strip().lower() for label in trace.emotion] == [word]


def test_without_clip_other_words_are_refused():
    pipe = tiny_models.muse_pipeline(clip_model=None)
    with pytest.raises(ValueError, match="`emotion` 'cozy'.*'awe'.*`clip_model`"):
        guide(pipe, emotion="cozy")


def test_prompts_that_read_alike_are_refused(pipe):
    with pytest.raises(ValueError, match="`emotion_prompts` of 'calm' and 'cozy' read alike"):
        guide(pipe, emotion="calm", emotion_prompts={"calm": "a picture", "dull": "dull", "cozy": "a  PICTURE"})


@pytest.mark.parametrize("has_classifier", [True, False])
def test_prompts_of_ones_own_make_labels_of_ones_own(has_classifier):
    pipe = tiny_models.muse_pipeline(**({} if has_classifier else {"emotion_classifier": None}))
    settings = {"emotion_learning_rate": 0.1, "num_inference_steps": 1, "emotion_prompts": OWN}
    trace = guide(pipe, emotion=["eerie", {"cozy": 1, "dull": 3}], prompt=["a cat"] * 2, **settings).trace
    assert trace[0].labels == ["cozy", "eerie", "dull"]
    assert all(one.loss[0][0] > one.loss[0][-1] for one in trace)
    assert guide(pipe, emotion="eerie", similar_emotions=["dull"], **settings).trace[0].inner_steps > 0
    with pytest.raises(ValueError, match="`emotion` 'awe'.*'cozy', 'dull', 'eerie'"):
        guide(pipe, emotion="awe", **settings)


def test_zero_shot_gradients_are_finite_and_the_gate_still_works(zero_shot):
    closed = guide(zero_shot, semantic_threshold=math.inf)
    assert torch.equal(closed.images, stock(zero_shot))
    similarities = guide(zero_shot, semantic_threshold=1e6).trace[0].similarity
    threshold = max(similarities)
    trace = guide(zero_shot, semantic_threshold=threshold).trace[0]
    assert trace.gate_step == similarities.index(threshold)


# ---- pipelines around the same modules -----------------------------------------------------------------------------


def test_other_pipelines_take_over_its_modules(pipe):
    assert StableDiffusionImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet
