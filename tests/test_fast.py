"""What makes guidance affordable: fewer updates, rest, small previews, emotion libraries, presets."""

import math

import pytest
import tiny_models
import torch
from safetensors.torch import load_file, save_file
from test_guidance import LATENTS, random_tokens, sees_tokens, tokens_of_each_step
from tiny_models import FAMILIES, generator, guide
from torch.nn import functional as F

from pipeline_muse import GuidanceSettings, PixelSpec


# ---- updates at every k-th step ------------------------------------------------------------------------------------


def test_between_updates_a_step_costs_what_a_plain_step_costs(pipe, count_calls):
    unet, decoder, classifier = (count_calls(part) for part in (pipe.unet, pipe.vae.decoder, pipe.emotion_classifier))
    output = guide(pipe, num_inference_steps=7, update_interval=3)
    (trace,) = output.trace
    updates = 3  # at the steps 0, 3 and 6
    assert len(trace.loss) == len(trace.kept) == updates and trace.inner_steps == 2 * updates
    assert len(unet) == updates * (1 + 3) + (7 - updates), "where tokens rest, the parent's own call is enough"
    assert len(decoder) == len(classifier) == 1 + updates * 3, "the first of all tells the inherent emotion"
    assert [sees_tokens(call) for call in unet.calls[-5:]] == [True] + [False, True, True, True]


def test_tokens_stay_between_updates(pipe):
    history = tokens_of_each_step(pipe, num_inference_steps=5, update_interval=2)
    moved = [not torch.equal(before, after) for before, after in zip(history, history[1:])]
    assert moved == [False, True, False, True]


def test_where_tokens_rest_the_null_prompt_sees_none(pipe, count_calls):
    """One call with both; the null prompt's rows are padded, and a mask hides the padding."""
    calls = count_calls(pipe.unet)
    output = guide(pipe, num_inference_steps=2, update_interval=2, max_inner_steps=0)
    (_, asked), (noise,) = calls.calls[-1]
    embeds, mask = asked["encoder_hidden_states"], asked["encoder_attention_mask"]
    assert torch.equal(embeds[1, 16:], output.emotion_tokens[0]) and embeds[0, 16:].abs().max() == 0
    assert mask.tolist() == [[1] * 16 + [0] * 4, [1] * 20]
    (latents, timestep), _ = calls.calls[-1][0]
    with torch.no_grad():
        null = pipe.unet(latents[:1], timestep, encoder_hidden_states=embeds[:1, :16]).sample
    torch.testing.assert_close(noise[:1], null, rtol=0, atol=1e-5)


@pytest.mark.parametrize("settings", [{"emotion_strength": 0.4}, {"guidance_scale": 1.0}], ids=str)
def test_a_step_at_rest_is_one_whose_tokens_do_not_move(pipe, settings):
    settings = settings | {"emotion_tokens": random_tokens(pipe), "max_inner_steps": 0, "num_inference_steps": 3}
    apart, together = (guide(pipe, **settings, update_interval=interval).images for interval in (1, 3))
    torch.testing.assert_close(apart, together, rtol=0, atol=1e-5)


def test_the_noise_between_updates_is_that_of_the_tokens(pipe):
    """A step with an update that moves nothing ends where one without an update does."""
    tokens = random_tokens(pipe)
    settings = {"emotion_tokens": tokens, "max_inner_steps": 0, "num_inference_steps": 4}
    images = [guide(pipe, **settings, update_interval=interval).images for interval in (1, 4)]
    torch.testing.assert_close(*images, rtol=0, atol=1e-5)
    assert not torch.allclose(images[0], guide(pipe, emotion=None, num_inference_steps=4).images, atol=1e-3)


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
    settings = {"num_inference_steps": 4, "update_interval": 2, "max_inner_steps": 1}
    prompts, emotions = ["a cat", "two dogs", "a boat"], ["awe", None, {"fear": 1.0, "awe": 1.0}]
    seeds = [generator(seed) for seed in range(3)]
    batch = guide(pipe, prompt=prompts, emotion=emotions, generator=seeds, **settings)
    for b, (prompt, emotion) in enumerate(zip(prompts, emotions)):
        alone = guide(pipe, prompt=prompt, emotion=[emotion], generator=generator(b), **settings)
        torch.testing.assert_close(batch.images[b], alone.images[0], rtol=0, atol=1e-4)
        assert batch.trace[b].inner_steps == alone.trace[0].inner_steps


# ---- images that are where they should be --------------------------------------------------------------------------


@pytest.mark.parametrize("interval, evaluations", [(1, 5), (2, 1)])
def test_tokens_that_are_good_enough_at_an_update_are_left_alone(pipe, count_calls, interval, evaluations):
    """For good, where updates are far between; their noise is in every step."""
    calls = count_calls(pipe.emotion_classifier)
    settings = {"num_inference_steps": 5, "update_interval": interval}
    output = guide(pipe, **settings, loss_threshold=1e3)
    assert [len(losses) for losses in output.trace[0].loss] == [1] * evaluations
    assert len(calls) == 1 + evaluations, "the first of all tells the inherent emotion"
    torch.testing.assert_close(output.images, guide(pipe, **settings, max_inner_steps=0).images, rtol=0, atol=1e-5)


@pytest.mark.parametrize("inner", [1, 2])
def test_a_sample_that_needs_a_step_is_looked_at_again(pipe, inner):
    """Each sample by itself; the images are those of calls of their own."""
    settings = {"num_inference_steps": 5, "update_interval": 2, "max_inner_steps": inner}
    prompts, emotions = ["a cat", "two dogs"], ["awe", "fear"]

    def both(**arguments):
        seeds = [generator(seed) for seed in range(2)]
        return guide(pipe, prompt=prompts, emotion=emotions, generator=seeds, **settings, **arguments)

    threshold = sum(trace.loss[0][0] for trace in both().trace) / 2  # one is below from the start, the other is not
    output = both(loss_threshold=threshold)
    updates = [len(trace.loss) for trace in output.trace]
    assert sorted(updates) == [1, 3]
    for b in range(2):
        mine = {"prompt": prompts[b], "emotion": emotions[b], "generator": generator(b)}
        alone = guide(pipe, **mine, **settings, loss_threshold=threshold)
        assert len(alone.trace[0].loss) == updates[b]
        torch.testing.assert_close(output.images[b], alone.images[0], rtol=0, atol=1e-4)


# ---- previews ------------------------------------------------------------------------------------------------------


def test_previews_shrink_with_their_scale(pipe, count_calls):
    decoder = count_calls(pipe.vae.decoder)
    guide(pipe, num_inference_steps=1, preview_scale=0.5)
    sizes = {tuple(arguments[0].shape[-2:]) for (arguments, _), _ in decoder.calls}
    assert sizes == {(8, 8)}
    guide(pipe, num_inference_steps=1, preview_scale=1e-9, height=32, width=64)
    assert tuple(decoder.calls[-1][0][0][0].shape[-2:]) == (1, 1)


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


# ---- presets -------------------------------------------------------------------------------------------------------

NAMES = ["paper", "full", "fast"]
PARTS = {part.name for part in GuidanceSettings.__dataclass_fields__.values()}


def same(output, expected) -> bool:
    return torch.equal(output.images, expected.images) and output.trace == expected.trace


@pytest.mark.parametrize("name", NAMES)
def test_a_preset_is_its_settings_and_what_is_given_beside_it_wins(pipe, name):
    preset = pipe.presets[name]
    assert set(preset) <= PARTS | {"emotion_tokens"}
    settings = {"max_inner_steps": None, "num_inference_steps": 1}  # `None` is the preset's
    output = guide(pipe, preset=name, **settings)
    assert output.images.isfinite().all() and len(output.trace[0].loss) > 0
    assert same(guide(pipe, **settings | dict(preset)), output), "over the paper's"
    others = {"max_inner_steps": 3, "update_interval": 1, "emotion_tokens": random_tokens(pipe)}
    other = guide(pipe, preset=name, **settings | others, loss_threshold=-1e3).trace[0]
    assert other.inner_steps == 3 and [len(losses) for losses in other.loss] == [4]


def test_the_full_preset_is_what_is_done_without_one(pipe):
    call = {"prompt": "a cat", "emotion": "awe", "num_inference_steps": 2, "output_type": "latent"}
    call |= {"semantic_threshold": 0}
    assert same(pipe(**call, generator=generator()), pipe(**call, generator=generator(), preset="full"))


def test_the_papers_preset_is_the_table_of_settings():
    defaults = {part.name: part.default for part in GuidanceSettings.__dataclass_fields__.values()}
    for family in FAMILIES:
        preset = family.pipeline_class.presets["paper"]
        assert preset["emotion_tokens"] == "random"
        assert {**defaults, **preset} == defaults | {"emotion_tokens": "random"}


def test_the_pipelines_know_the_same_presets_with_rates_of_their_own():
    ours, xl = (family.pipeline_class.presets for family in FAMILIES)
    assert list(ours) == list(xl) == NAMES
    rate = "emotion_learning_rate"
    for name in NAMES:
        assert {**ours[name], rate: 0} == {**xl[name], rate: 0}
    assert [(ours[name][rate], xl[name][rate]) for name in ("full", "fast")] == [(0.05, 0.15), (0.2, 0.4)]


def test_presets_are_read_only(pipe):
    """Else a change would be one for all pipelines."""
    with pytest.raises(TypeError):
        pipe.presets["mine"] = {}
    with pytest.raises(TypeError):
        pipe.presets["full"]["max_inner_steps"] = 7


@pytest.mark.parametrize("emotion", ["awe", None])
@pytest.mark.parametrize("name", ["quick", None, ["fast"], 1])
def test_an_unknown_preset_is_told_which_are_known(pipe, count_calls, name, emotion):
    calls = count_calls(pipe.text_encoder, pipe.unet)
    with pytest.raises(ValueError, match="`preset` has to be one of .*'paper', 'full', 'fast'"):
        guide(pipe, preset=name, emotion=emotion)
    assert len(calls) == 0


def test_the_fast_preset_adds_three_rows_of_the_network_at_every_second_step(pipe, count_calls):
    """Two of them with a backward pass, and a preview of each; and it starts from the emotion's word."""
    unet, decoder = count_calls(pipe.unet), count_calls(pipe.vae.decoder)
    trace = guide(pipe, num_inference_steps=7, preset="fast", max_inner_steps=None).trace[0]
    updates = 4  # at the steps 0, 2, 4 and 6
    assert trace.inner_steps == 2 * updates
    assert sum(noise.shape[0] for _, (noise,) in unet.calls) == 7 * 2 + 3 * updates
    assert [noise.requires_grad for _, (noise,) in unet.calls].count(True) == 2 * updates
    assert len(decoder) == 1 + 3 * updates
    short = {"num_inference_steps": 1, "preset": "fast"}
    assert same(guide(pipe, **short), guide(pipe, **short, emotion_tokens="emotion"))
    assert not same(guide(pipe, **short), guide(pipe, **short, emotion_tokens="random"))


def test_the_fast_preset_evokes_emotions_on_storybook():
    """By the guide; `frontier.py` asks judges who never guide, in more steps and for more pictures."""
    pipe = tiny_models.storybook()
    emotions = ["awe", "fear", "sadness", "excitement"]
    seeds = [generator(seed) for seed in range(len(emotions))]
    call = {"prompt": ["a house in the park"] * len(emotions), "generator": seeds, "num_inference_steps": 20}
    output = pipe(**call, emotion=emotions, semantic_threshold=0, output_type="pt", preset="fast")
    with torch.no_grad():
        pixels = PixelSpec.from_classifier(pipe.emotion_classifier).prepare(2 * output.images - 1)
        judged = pipe.emotion_classifier(pixel_values=pixels).logits.softmax(dim=-1)
    columns = [pipe.emotion_labels.index(emotion) for emotion in emotions]
    assert judged[range(len(emotions)), columns].mean() > 0.7
    assert max(trace.inner_steps for trace in output.trace) <= 7, "they soon rest"
