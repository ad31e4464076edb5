"""Components: other classifiers, other pipelines around the same modules, saving and loading."""

import inspect
import json

import pytest
import tiny_models
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionPipeline
from tiny_models import guide, stock
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from pipeline_muse import MusePipeline, PixelSpec


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


def test_pixels_are_prepared_as_its_image_processor_prepares_them(pipe):
    """Up to PIL's rounding to eight bits, and its kernel."""
    pipe.load_emotion_classifier(vit(), processor())
    smooth = (
        torch.linspace(0, 1, 32)[:, None] * torch.linspace(0.2, 1, 48) * torch.tensor([1, 0.5, 0.8])[:, None, None]
    )
    image = (smooth * 255).round().to(torch.uint8)
    expected = processor()(images=image.permute(1, 2, 0).numpy(), return_tensors="pt").pixel_values
    pixels = PixelSpec.from_classifier(pipe.emotion_classifier).prepare(image[None] / 127.5 - 1)
    torch.testing.assert_close(pixels, expected, rtol=0, atol=0.02)


@pytest.mark.parametrize(
    "sizes, expected",
    [
        ({"size": {"height": 24, "width": 24}}, 24),
        ({"size": {"shortest_edge": 40}, "crop_size": {"height": 24, "width": 24}}, 24),
        ({"size": {"shortest_edge": 24}}, 24),
    ],
    ids=["size", "crop", "shortest edge"],
)
def test_the_size_is_that_of_the_pixels_the_model_sees(pipe, sizes, expected):
    class Processor:
        size, crop_size = sizes["size"], sizes.get("crop_size")
        image_mean, image_std = (0.5,) * 3, (0.5,) * 3

    pipe.load_emotion_classifier(vit(), Processor())
    assert PixelSpec.from_classifier(pipe.emotion_classifier) == PixelSpec(24, (0.5,) * 3, (0.5,) * 3)


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
    assert PixelSpec.from_classifier(again.emotion_classifier) == PixelSpec(24, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    assert again.emotion_labels == ["joy", "fear", "awe"]
    output = guide(again, emotion="joy")
    torch.testing.assert_close(output.emotion_tokens, expected.emotion_tokens, rtol=0, atol=1e-4)


# ---- pipelines around the same modules -----------------------------------------------------------------------------


def test_components_make_the_same_pipeline_again(pipe):
    again = MusePipeline(**pipe.components)
    again.set_progress_bar_config(disable=True)
    assert torch.equal(guide(again).images, guide(pipe).images)
    assert set(pipe.components) >= {"clip_model", "emotion_classifier", "preview_vae"}


def test_from_pipe_both_ways(pipe):
    parent = StableDiffusionPipeline.from_pipe(pipe)
    assert type(parent) is StableDiffusionPipeline and parent.unet is pipe.unet
    muse = MusePipeline.from_pipe(
        parent, clip_model=pipe.clip_model, emotion_classifier=pipe.emotion_classifier, preview_vae=None
    )
    for one in (parent, muse):
        one.set_progress_bar_config(disable=True)
    assert torch.equal(stock(parent), stock(pipe))
    assert torch.equal(guide(muse).images, guide(pipe).images)


def test_from_pipe_carries_everything_to_another_muse_pipeline(pipe):
    pipe.register_to_config(semantic_threshold=3.0)
    again = MusePipeline.from_pipe(pipe)
    assert {name: id(one) for name, one in again.components.items()} == {
        name: id(one) for name, one in pipe.components.items()
    }
    assert again.config.semantic_threshold == 3.0
    assert StableDiffusionImg2ImgPipeline.from_pipe(pipe).unet is pipe.unet


def test_the_call_starts_with_the_parents_signature():
    """Positional arguments of code written for the parent mean the same here."""
    ours, theirs = (
        [
            (name, one.default, one.kind)
            for name, one in inspect.signature(pipeline.__call__).parameters.items()
            if name != "kwargs"
        ]
        for pipeline in (MusePipeline, StableDiffusionPipeline)
    )
    assert ours[: len(theirs)] == theirs
    names = [name for name, *_ in ours]
    assert "eta" in names and "semantic_threshold" in names, "eta is DDIM's"


# ---- saving and loading --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "missing", [(), ("clip_model", "preview_vae"), ("clip_model", "emotion_classifier", "preview_vae")]
)
def test_saved_pipelines_load_again(tmp_path, missing):
    """Imported as usual, and whichever of the optional components are there."""
    models = {"preview_vae": tiny_models.preview_vae(), **dict.fromkeys(missing)}
    pipe = tiny_models.muse_pipeline(**models)
    pipe.register_to_config(semantic_threshold=3.5)
    pipe.save_pretrained(tmp_path)
    again = MusePipeline.from_pretrained(tmp_path, trust_remote_code=True)  # for SimEmo's code
    again.set_progress_bar_config(disable=True)
    assert again.config.semantic_threshold == 3.5
    for name in ("clip_model", "emotion_classifier", "preview_vae"):
        assert (getattr(again, name) is None) == (name in missing)
    torch.testing.assert_close(stock(again), stock(pipe), rtol=0, atol=1e-4)
    if "emotion_classifier" not in missing:
        torch.testing.assert_close(guide(again).emotion_tokens, guide(pipe).emotion_tokens, rtol=0, atol=1e-4)


def test_to_moves_every_component(pipe):
    pipe.to(torch.float64)
    for name in ("clip_model", "emotion_classifier", "unet"):
        assert getattr(pipe, name).dtype == torch.float64
    assert pipe.device == torch.device("cpu")
