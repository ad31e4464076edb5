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


def images_of(pipe, count: int = len(EMOTIONS), **call) -> torch.Tensor:
    generators = [torch.Generator().manual_seed(3) for _ in range(count)]
    prompts = ["a house in the park"] * count
    return pipe(prompts, generator=generators, output_type="pt", **{**MUSE_SETTINGS, **call}).images


@pytest.fixture(scope="module")
def guided(pipe, judge) -> torch.Tensor:
    """What the judge sees in images that were each guided towards one of `EMOTIONS`."""
    return judge(images_of(pipe, emotion=EMOTIONS, semantic_threshold=0))


def test_a_judge_that_did_not_guide_sees_the_emotions_the_stronger_the_more(pipe, judge, guided):
    stock = judge(images_of(pipe)).diagonal()
    weak = judge(images_of(pipe, emotion=EMOTIONS, semantic_threshold=0, emotion_strength=0.3)).diagonal()
    strong = guided.diagonal()
    assert stock.mean() < 0.4
    assert strong.mean() > stock.mean() + 0.3
    assert (stock < weak).all() and (weak < strong).all()


def test_a_mixture_is_judged_as_a_mixture(pipe, judge, guided):
    first, last = EMOTIONS[0], EMOTIONS[-1]
    mixed = judge(images_of(pipe, 1, emotion={first: 0.5, last: 0.5}, semantic_threshold=0))[0]
    assert mixed[0] > guided[-1, 0] + 0.1 and mixed[-1] > guided[0, -1] + 0.1, "some of each, where one alone has none"
    assert mixed[0] < guided[0, 0] and mixed[-1] < guided[-1, -1]


def test_the_gate_opens_at_the_first_preview_that_resembles_the_prompt(pipe):
    threshold = pipe.config.semantic_threshold
    generator = torch.Generator().manual_seed(0)
    trace = pipe("a house in the park", emotion="awe", generator=generator, **MUSE_SETTINGS).trace[0]
    assert trace.gate_step > 0, "noise does not resemble a house"
    assert len(trace.similarity) == trace.gate_step + 1
    assert max(trace.similarity[:-1]) < threshold <= trace.similarity[-1]


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


def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path):
    sys.path.append(str(STORYBOOK))
    from common import load_checkpoint, save_checkpoint

    def new() -> dict:
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        return {"model": model, "optimizer": torch.optim.AdamW(model.parameters(), lr=0.1)}

    def train(parts: dict, steps: range) -> None:
        for step in steps:
            inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(step))
            parts["optimizer"].zero_grad()
            parts["model"](inputs).square().sum().backward()
            parts["optimizer"].step()

    unbroken, first, second = new(), new(), new()
    train(unbroken, range(6))
    train(first, range(3))
    save_checkpoint(tmp_path / "a.checkpoint", 3, **first)
    train(second, range(load_checkpoint(tmp_path / "a.checkpoint", **second), 6))
    assert torch.equal(second["model"].weight, unbroken["model"].weight)
