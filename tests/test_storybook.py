"""What the model card says of the bundled weights, on a few images; the whole table is `evaluate.py`'s."""

import sys

import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline
from storybook_settings import MUSE_SETTINGS

from pipeline_muse import PixelSpec


STORYBOOK = tiny_models.REPOSITORY / "examples" / "storybook"
WEIGHT_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
EMOTIONS = ["amusement", "awe", "anger", "sadness"]


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    pipe = DiffusionPipeline.from_pretrained(tiny_models.REPOSITORY, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def judge(pipe):
    """The probability that the judge Emo-B, which never guides, gives to each of `EMOTIONS`, image by image."""
    sys.path.append(str(STORYBOOK))
    from judges import load_judge

    model, spec = load_judge("emo_b"), PixelSpec.from_classifier(pipe.emotion_classifier)

    @torch.no_grad()
    def probabilities(images: torch.Tensor) -> torch.Tensor:
        columns = [pipe.emotion_labels.index(emotion) for emotion in EMOTIONS]
        return model(pixel_values=spec.prepare(images * 2 - 1)).logits.softmax(dim=-1)[:, columns]

    return probabilities


def images_of(pipe, **call) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(3) for _ in EMOTIONS]
    prompts = ["a house in the park"] * len(EMOTIONS)
    return pipe(prompts, generator=generators, output_type="pt", **{**MUSE_SETTINGS, **call}).images


def test_a_judge_that_did_not_guide_sees_the_emotions(pipe, judge):
    stock = judge(images_of(pipe)).diagonal()
    guided = judge(images_of(pipe, emotion=EMOTIONS, semantic_threshold=0)).diagonal()
    assert stock.mean() < 0.4
    assert guided.mean() > stock.mean() + 0.3


def test_the_gate_opens_late_and_keeps_more_of_the_stock_image(pipe):
    stock = images_of(pipe)
    at_once = images_of(pipe, emotion=EMOTIONS, semantic_threshold=0)
    gated = images_of(pipe, emotion=EMOTIONS)
    assert 0 < (gated - stock).abs().mean() < (at_once - stock).abs().mean()


def test_a_closed_gate_retraces_the_picture_that_is_edited(pipe):
    source = images_of(pipe)[:1]
    call = {"image": source, "emotion": "anger", "semantic_threshold": float("inf"), "output_type": "pt"}
    call |= {"guidance_reference": "source", "num_inference_steps": 50}
    edited = pipe("a house in the park", **call).images
    decoded = pipe.vae(source * 2 - 1).sample / 2 + 0.5  # what the autoencoder alone makes of it
    assert (edited - decoded).abs().mean() < 0.05


def test_the_checkpoint_is_small_and_the_judges_are_no_part_of_it():
    weights = list(tiny_models.REPOSITORY.glob("*/*.safetensors"))
    assert {path.name for path in weights} <= set(WEIGHT_NAMES)
    assert sum(path.stat().st_size for path in weights) < 40e6
    judges = list((STORYBOOK / "judges").iterdir())
    assert judges and not any(path.name in WEIGHT_NAMES for path in judges)


def test_the_tokenizer_can_be_built_again(tmp_path):
    sys.path.append(str(STORYBOOK))
    from common import build_tokenizer
    from world import vocabulary

    first, second = (build_tokenizer(tmp_path / name) for name in ("first", "second"))
    assert first.get_vocab() == second.get_vocab()
    assert all(len(first.tokenize(word)) == 1 for word in vocabulary())
