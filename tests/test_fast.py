"""What makes guidance affordable: fewer updates, normalised steps, small previews, emotion libraries, presets."""

import inspect
import math
import sys

import make_emotion_library
import pytest
import tiny_models
import torch
from diffusers.models.attention_processor import AttnProcessor
from loading import call_options
from make_emotion_library import make_library
from safetensors.torch import load_file, save_file
from test_guidance import LATENTS, first_step, random_tokens, sees_tokens, tokens_of_each_step
from tiny_models import FAMILIES, guide, only_stable_diffusion
from torch.nn import functional as F

from pipeline_muse import MusePipeline


# ---- updates at every k-th step ------------------------------------------------------------------------------------


@only_stable_diffusion
def test_between_updates_a_step_costs_what_a_plain_step_costs(pipe, count_calls):
    unet, decoder, classifier = (count_calls(part) for part in (pipe.unet, pipe.vae.decoder, pipe.emotion_classifier))
    output = guide(pipe, num_inference_steps=7, update_interval=3, max_inner_steps=2, output_type="latent")
    (trace,) = output.trace
    updates = 3  # at the steps 0, 3 and 6
    assert len(trace.loss) == len(trace.kept) == updates and trace.inner_steps == 2 * updates
    assert len(unet) == updates * (1 + 3) + (7 - updates), "where tokens rest, null prompt and prompt share a call"
    assert len(decoder) == len(classifier) == 1 + updates * 3, "the first of all tells the inherent emotion"
    assert [sees_tokens(call) for call in unet.calls[-5:]] == [True] + [False, True, True, True]


def test_tokens_stay_between_updates(pipe):
    history = tokens_of_each_step(pipe, num_inference_steps=5, update_interval=2)
    moved = [not torch.equal(before, after) for before, after in zip(history, history[1:])]
    assert moved == [False, True, False, True]


@only_stable_diffusion
def test_the_noise_between_updates_is_that_of_the_tokens(pipe):
    """A step with an update that moves nothing ends where one without an update does."""
    tokens = random_tokens(pipe)
    settings = {"emotion_tokens": tokens, "max_inner_steps": 0, "num_inference_steps": 4}
    images = [guide(pipe, **settings, update_interval=interval).images for interval in (1, 4)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    assert not torch.allclose(images[0], guide(pipe, emotion=None, num_inference_steps=4).images, atol=1e-3)


@only_stable_diffusion
def test_the_gate_is_asked_where_tokens_are_updated(pipe, count_calls):
    clip = count_calls(pipe.clip_model)
    trace = guide(pipe, num_inference_steps=5, update_interval=2, semantic_threshold=1e3).trace[0]
    assert len(clip) == len(trace.similarity) == 3 and trace.gate_step is None
    before, after = trace.similarity[:2]
    if before < after:
        trace = guide(pipe, num_inference_steps=5, update_interval=2, semantic_threshold=after).trace[0]
        assert trace.gate_step == 2
    else:
        assert guide(pipe, num_inference_steps=5, update_interval=2, semantic_threshold=before).trace[0].gate_step == 0


def test_samples_of_a_batch_share_no_update(pipe):
    """Of which some are open, some closed, and one has no emotion: each comes out as it does alone."""
    settings = {"num_inference_steps": 4, "update_interval": 2, "emotion_optimizer": "normalized", "keep_best": False}
    prompts, emotions = ["a cat", "two dogs", "a boat"], ["awe", None, {"fear": 1.0, "awe": 1.0}]
    seeds = [tiny_models.generator(seed) for seed in range(3)]
    batch = guide(pipe, prompt=prompts, emotion=emotions, generator=seeds, **settings)
    for b, (prompt, emotion) in enumerate(zip(prompts, emotions)):
        alone = guide(pipe, prompt=prompt, emotion=[emotion], generator=tiny_models.generator(b), **settings)
        torch.testing.assert_close(batch.images[b], alone.images[0], rtol=0, atol=1e-4)
        assert batch.trace[b].inner_steps == alone.trace[0].inner_steps


# ---- the inner steps -----------------------------------------------------------------------------------------------


def test_normalised_steps_have_the_length_of_the_rate(pipe):
    """And go against the gradient, which the first step of Adam follows by its signs alone."""
    start = random_tokens(pipe)
    settings = {"emotion_tokens": start, "max_inner_steps": 1, "keep_best": False, "latents": LATENTS}
    moves = {}
    for name, rate in (("normalized", 0.05), ("normalized", 0.1), ("adam", 0.1)):
        tokens = first_step(pipe, emotion_optimizer=name, emotion_learning_rate=rate, **settings)["emotion_tokens"]
        moves[name, rate] = (tokens - start).flatten()
        assert moves[name, rate].square().mean().sqrt() == pytest.approx(rate, rel=1e-3)
    short, long, signs = moves.values()
    torch.testing.assert_close(2 * short, long, rtol=0, atol=1e-5)
    assert torch.equal(long.sign(), signs.sign()) and long.abs().std() > 10 * signs.abs().std()


@only_stable_diffusion
def test_normalised_steps_stay_where_the_gradient_vanishes(pipe, monkeypatch):
    tokens = random_tokens(pipe)
    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: [0 * one for one in grad(*a, **k)])
    output = guide(pipe, emotion_optimizer="normalized", emotion_tokens=tokens)
    assert torch.equal(output.emotion_tokens, tokens)


@only_stable_diffusion
@pytest.mark.parametrize("inner", [0, 1, 3])
def test_without_keeping_the_best_the_last_evaluation_is_spared(pipe, count_calls, inner):
    calls = count_calls(pipe.unet)
    output = guide(pipe, max_inner_steps=inner, keep_best=False)
    (trace,) = output.trace
    evaluations = max(1, inner)
    assert len(calls) == 3 * (1 + evaluations)
    assert [len(losses) for losses in trace.loss] == [evaluations] * 3 and trace.inner_steps == 3 * inner


@only_stable_diffusion
def test_without_keeping_the_best_tokens_go_on_as_they_were_left(pipe):
    """The denoising step takes the noise from before the inner step, the next denoising step the moved tokens."""
    start = random_tokens(pipe)
    settings = {"emotion_tokens": start, "max_inner_steps": 1, "emotion_learning_rate": 30.0, "latents": LATENTS}
    seen = first_step(pipe, keep_best=False, **settings)
    unmoved = first_step(pipe, **settings | {"max_inner_steps": 0})
    assert torch.equal(seen["latents"], unmoved["latents"])
    assert (seen["emotion_tokens"] - start).abs().min() > 20
    assert seen["trace"][0].kept == [0]


# ---- previews ------------------------------------------------------------------------------------------------------


def test_previews_shrink_with_their_scale(pipe, count_calls):
    decoder = count_calls(pipe.vae.decoder)
    guide(pipe, num_inference_steps=1, preview_scale=0.5)
    sizes = {tuple(arguments[0].shape[-2:]) for (arguments, _), _ in decoder.calls}
    assert sizes == {(8, 8)}
    guide(pipe, num_inference_steps=1, preview_scale=1e-9, height=32, width=64)
    assert tuple(decoder.calls[-1][0][0][0].shape[-2:]) == (1, 1)


@only_stable_diffusion
def test_a_small_preview_is_the_mean_of_the_latents(pipe, count_calls):
    decoded = count_calls(pipe.vae.post_quant_conv)
    for scale in (1.0, 0.5):
        guide(pipe, num_inference_steps=1, max_inner_steps=0, preview_scale=scale, latents=LATENTS)
    (first, _, small, _) = (arguments[0].detach() for (arguments, _), _ in decoded.calls)
    torch.testing.assert_close(small, F.avg_pool2d(first, 2), rtol=0, atol=1e-6)


# ---- emotion libraries ---------------------------------------------------------------------------------------------


@pytest.fixture
def library(pipe, tmp_path) -> dict[str, torch.Tensor]:
    """As it is read from a file."""
    tokens = {label: random_tokens(pipe, 3) + k for k, label in enumerate(("awe", "fear", "anger"))}
    save_file(tokens, tmp_path / "library.safetensors")
    return load_file(tmp_path / "library.safetensors")


def test_each_sample_starts_from_its_emotion_in_the_library(pipe, library):
    emotions = ["fear", None, {"awe": 3.0, "anger": 1.0}]
    output = guide(
        pipe, prompt=["a", "b", "c"], emotion=emotions, num_images_per_prompt=2, max_inner_steps=0,
        num_inference_steps=1, emotion_tokens=library,
    )  # fmt: skip
    mixture = 0.75 * library["awe"] + 0.25 * library["anger"]
    expected = torch.stack([library["fear"], torch.zeros(3, random_tokens(pipe).shape[-1]), mixture])
    torch.testing.assert_close(output.emotion_tokens, expected.repeat_interleave(2, dim=0), rtol=0, atol=1e-6)


def test_a_librarys_tokens_are_not_changed(pipe, library):
    before = {label: tokens.clone() for label, tokens in library.items()}
    output = guide(pipe, emotion_tokens=library, emotion_learning_rate=0.1)
    assert not torch.equal(output.emotion_tokens[0], before["awe"])
    assert all(torch.equal(library[label], before[label]) for label in before)


def test_a_library_in_half_precision_serves_as_well(pipe, library):
    halves = {label: tokens.half() for label, tokens in library.items()}
    output = guide(pipe, emotion_tokens=halves, max_inner_steps=0, num_inference_steps=1)
    assert output.emotion_tokens.dtype == torch.float32
    torch.testing.assert_close(output.emotion_tokens[0], library["awe"], rtol=1e-3, atol=1e-3)
    assert math.isfinite(output.trace[0].loss[0][0])


# ---- patience ------------------------------------------------------------------------------------------------------


@only_stable_diffusion
@pytest.mark.parametrize("patience, evaluations", [(None, 6), (1, 1), (2, 2)])
def test_tokens_that_are_good_enough_so_often_are_left_alone(pipe, count_calls, patience, evaluations):
    calls = count_calls(pipe.emotion_classifier)
    output = guide(pipe, num_inference_steps=6, stop_probability=0.0, patience=patience)
    assert [len(losses) for losses in output.trace[0].loss] == [1] * evaluations
    assert len(calls) == 1 + evaluations, "the first of all tells the inherent emotion"
    torch.testing.assert_close(output.images, guide(pipe, num_inference_steps=6, stop_probability=0.0).images)


def test_a_sample_that_needs_a_step_is_looked_at_again(pipe):
    """Patience counts updates in a row, by sample; the images are those of calls of their own."""
    settings = {"num_inference_steps": 5, "patience": 1, "max_inner_steps": 1, "emotion_learning_rate": 0.1}
    prompts, emotions = ["a cat", "two dogs"], ["awe", "fear"]

    def both(**arguments):
        seeds = [tiny_models.generator(seed) for seed in range(2)]
        return guide(pipe, prompt=prompts, emotion=emotions, generator=seeds, **arguments)

    first = both(**settings | {"patience": None}).trace
    stop = sorted(trace.probabilities[0][0][trace.labels.index(e)] for trace, e in zip(first, emotions))
    between = sum(stop) / 2  # one has reached it from the start, the other has not
    output = both(**settings, stop_probability=between)
    updates = [len(trace.loss) for trace in output.trace]
    assert min(updates) == 1 < max(updates)
    for b in range(2):
        mine = {"prompt": prompts[b], "emotion": emotions[b], "generator": tiny_models.generator(b)}
        alone = guide(pipe, **mine, **settings, stop_probability=between)
        assert len(alone.trace[0].loss) == updates[b]
        torch.testing.assert_close(output.images[b], alone.images[0], rtol=0, atol=1e-4)


# ---- presets -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["paper", "full", "fast"])
def test_presets_are_arguments_of_the_call(pipe, name):
    preset = pipe.presets[name]
    assert preset.keys() <= inspect.signature(pipe.__call__).parameters.keys()
    output = guide(pipe, **{**preset, "num_inference_steps": 2})
    assert output.images.isfinite().all() and len(output.trace[0].loss) > 0


def test_the_papers_preset_is_what_is_done_without_one(pipe):
    defaults = inspect.signature(pipe.__call__).parameters
    assert pipe.presets["paper"] == {name: defaults[name].default for name in pipe.presets["paper"]}


def test_the_pipelines_know_the_same_presets():
    ours, xl = (family.pipeline_class.presets for family in FAMILIES)
    assert ours.keys() == xl.keys()
    assert all(ours[name].keys() == xl[name].keys() for name in ours)


@only_stable_diffusion
def test_the_fast_preset_adds_no_forward_pass_of_the_network(pipe, count_calls):
    """What it adds is the backward pass and a preview, at every third step."""
    unet, decoder = count_calls(pipe.unet), count_calls(pipe.vae.decoder)
    trace = guide(pipe, num_inference_steps=9, **pipe.presets["fast"]).trace[0]
    assert trace.inner_steps == 3
    assert sum(noise.shape[0] for _, (noise,) in unet.calls) == 9 * 2 + 1, "at the first step the prompt alone, too"
    assert [noise.requires_grad for _, (noise,) in unet.calls].count(True) == 3
    assert len(decoder) == 1 + 3


def test_the_fast_preset_evokes_emotions_on_storybook():
    """By the guide; `frontier.py` asks judges who never guide, in more steps and for more pictures."""
    pipe = tiny_models.quiet(MusePipeline.from_pretrained(tiny_models.REPOSITORY, trust_remote_code=True))
    pipe.unet.set_attn_processor(AttnProcessor())
    emotions = ["awe", "fear", "sadness", "excitement"]
    seeds = [tiny_models.generator(seed) for seed in range(len(emotions))]
    call = {"prompt": ["a house in the park"] * len(emotions), "generator": seeds, "num_inference_steps": 24}
    output = pipe(**call, emotion=emotions, semantic_threshold=0, output_type="pt", **pipe.presets["fast"])
    judged = pipe._classify(2 * output.images - 1).softmax(dim=-1)
    columns = [pipe.emotion_labels.index(emotion) for emotion in emotions]
    assert judged[range(len(emotions)), columns].mean() > 0.7
    assert max(trace.inner_steps for trace in output.trace) <= 24 // 3


# ---- the script that makes libraries -------------------------------------------------------------------------------


def test_a_library_is_the_mean_over_pictures_whose_gate_opened():
    pipe = tiny_models.muse_pipeline()
    options = {"num_inference_steps": 2, "max_inner_steps": 1}
    prompts = ["a cat", "two dogs"]
    library = make_library(pipe, prompts, ["awe", "fear"], seed=3, batch_size=3, semantic_threshold=0, **options)
    single = [
        guide(pipe, prompt=prompt, emotion="fear", generator=tiny_models.generator(seed), **options).emotion_tokens
        for prompt, seed in zip(prompts, (3 + 1, 3 + 3))
    ]
    assert set(library) == {"awe", "fear"}
    torch.testing.assert_close(library["fear"], torch.cat(single).mean(dim=0), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="never opened.*'awe', 'fear'"):
        make_library(pipe, prompts, ["awe", "fear"], semantic_threshold=math.inf, **options)


def test_a_library_of_the_command_line_serves_the_next_call(tmp_path, monkeypatch):
    (tmp_path / "prompts.txt").write_text("a house in the park\n")
    path = tmp_path / "made" / "library.safetensors"
    arguments = ["--prompts", str(tmp_path / "prompts.txt"), "--output", str(path), "--batch_size", "8"]
    arguments += ["--num_inference_steps", "2", "--max_inner_steps", "1", "--semantic_threshold", "0"]
    monkeypatch.setattr(sys, "argv", ["make_emotion_library.py", *arguments])
    make_emotion_library.main()
    library = load_file(path)
    assert len(library) == 8 and {tokens.shape for tokens in library.values()} == {(4, 128)}
    args = make_emotion_library.parse_args([*arguments, "--emotion_library", str(path), "--preset", "fast"])
    call = call_options(args, MusePipeline.presets)
    assert call["patience"] == call["max_inner_steps"] == 1 and call["num_inference_steps"] == 2
    assert torch.equal(call["emotion_tokens"]["awe"], library["awe"])
