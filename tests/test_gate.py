"""WHEN: the semantic gate."""

import math

import pytest
import tiny_models
import torch
from tiny_models import generator, guide, stock

from pipeline_muse import PixelSpec


def similarities(pipe, **arguments) -> list[list[float]]:
    """The similarity of every sample at every step, from a call whose gates stay closed."""
    output = guide(pipe, **{"num_inference_steps": 4, **arguments, "semantic_threshold": math.inf})
    return [trace.similarity for trace in output.trace]


def between(values: list[float]) -> tuple[int, float]:
    """A step whose similarity exceeds all before it, the last such, and a threshold that it is the first to reach."""
    step = max(i for i in range(1, len(values)) if values[i] > max(values[:i]))
    return step, (values[step] + max(values[:step])) / 2


@pytest.fixture
def rising(pipe):
    """A pipeline whose previews come to resemble their prompt at the second step or later, at seed 0."""
    values = similarities(pipe)[0]
    assert max(values[1:]) > values[0], "the tiny models have to be chosen so"
    return pipe


def test_zero_opens_at_the_first_step_without_asking_clip(pipe, count_calls):
    calls = count_calls(pipe.clip_model)
    trace = guide(pipe, semantic_threshold=0).trace[0]
    assert (trace.gate_step, trace.similarity, len(calls)) == (0, [], 0)


def test_infinity_never_opens(pipe):
    trace = guide(pipe, semantic_threshold=math.inf).trace[0]
    assert trace.gate_step is None and trace.inherent_emotion is None
    assert trace.loss == trace.probabilities == trace.kept == []
    assert trace.inner_steps == 0 and trace.target_probability is None
    assert len(trace.similarity) == 3


def test_infinity_needs_no_clip():
    pipe = tiny_models.muse_pipeline(clip_model=None)
    output = guide(pipe, semantic_threshold=math.inf)
    assert torch.equal(output.images, stock(pipe))
    assert guide(pipe, semantic_threshold=0).trace[0].gate_step == 0


def test_it_opens_at_the_first_step_that_reaches_the_threshold(rising):
    values = similarities(rising)[0]
    step, threshold = between(values)
    trace = guide(rising, semantic_threshold=threshold, num_inference_steps=4).trace[0]
    assert trace.gate_step == step
    assert trace.similarity == values[: step + 1], "no similarity is measured once it is open"
    assert len(trace.loss) == len(trace.probabilities) == len(trace.kept) == 4 - step


def test_reaching_the_threshold_exactly_is_enough(pipe):
    first = similarities(pipe)[0][0]
    assert guide(pipe, semantic_threshold=first, num_inference_steps=4).trace[0].gate_step == 0


def test_it_latches(rising):
    """From the opening on every step is guided, though the previews fall below the threshold again."""
    values = similarities(rising)[0]
    step, threshold = between(values)
    assert max(values[step + 1 :]) < threshold, "the tiny models have to be chosen so"
    assert len(guide(rising, semantic_threshold=threshold, num_inference_steps=4).trace[0].loss) == 4 - step


def test_the_threshold_comes_from_the_config_unless_the_call_names_one(rising):
    step, threshold = between(similarities(rising)[0])
    rising.register_to_config(semantic_threshold=threshold)
    assert guide(rising, semantic_threshold=None, num_inference_steps=4).trace[0].gate_step == step
    assert guide(rising, semantic_threshold=0, num_inference_steps=4).trace[0].gate_step == 0


def test_the_default_threshold_is_the_papers(pipe):
    assert pipe.config.semantic_threshold == 18.0


def test_each_sample_has_its_own_gate(pipe):
    prompts = ["a cat", "qq zz xx"]
    generators = [generator(0), generator(1)]
    first = [values[0] for values in similarities(pipe, prompt=prompts, generator=generators)]
    assert abs(first[0] - first[1]) > 1e-3
    easy = int(first[1] > first[0])
    generators = [generator(0), generator(1)]
    output = guide(pipe, prompt=prompts, generator=generators, semantic_threshold=sum(first) / 2)
    assert output.trace[easy].gate_step == 0
    assert output.trace[1 - easy].gate_step != 0


def test_similarity_is_that_of_the_preview_and_the_prompt(pipe, count_calls):
    """At the first step by hand: guided noise, one-step x0, decoded, CLIP's cosine times its own scale."""
    calls = count_calls(pipe.unet)
    similarity = similarities(pipe, num_inference_steps=4)[0][0]
    ((latents, timestep), _), (noise,) = calls.calls[0]
    null, cond = noise.chunk(2)
    guided = null + pipe.guidance_scale * (cond - null)
    alpha = pipe.scheduler.alphas_cumprod[int(timestep)]
    x0 = (latents[:1] - (1 - alpha).sqrt() * guided) / alpha.sqrt()
    with torch.no_grad():
        image = pipe.vae.decode(x0 / pipe.vae.config.scaling_factor).sample
        text = pipe.tokenizer(["a cat"], padding="max_length", return_tensors="pt")
        output = pipe.clip_model(pixel_values=PixelSpec.from_clip(pipe.clip_model).prepare(image), **text)
    expected = output.logits_per_image.item()  # transformers' own product of scale and cosine
    assert similarity == pytest.approx(expected, rel=1e-4)


def test_the_scale_is_clips_own(pipe):
    scale, own = pipe.clip_model.logit_scale.exp().item(), similarities(pipe)[0]
    pipe.clip_model.logit_scale.data.fill_(math.log(100))
    assert similarities(pipe)[0] == pytest.approx([value / scale * 100 for value in own], rel=1e-4)


def test_the_gate_may_be_asked_about_another_text(pipe):
    own = similarities(pipe)[0]
    assert similarities(pipe, semantic_prompt="a cat")[0] == own
    other = similarities(pipe, semantic_prompt="zz qq")[0]
    assert abs(other[0] - own[0]) > 1e-3
    swapped = similarities(pipe, prompt=["a cat", "a dog"], semantic_prompt=["zz qq", "a dog"], generator=None)
    assert len(swapped) == 2


def test_an_emotion_without_a_prompt_asks_about_its_prompt(pipe):
    """ "an image of {emotion}", for the picture and for the gate."""
    implied = guide(pipe, prompt=None, semantic_threshold=math.inf)
    named = guide(pipe, prompt="an image of awe", semantic_threshold=math.inf)
    assert torch.equal(implied.images, named.images)
    assert implied.trace[0].similarity == named.trace[0].similarity
    assert torch.equal(implied.images, stock(pipe, prompt="an image of awe"))


def test_the_inherent_emotion_is_that_of_the_step_before(rising, count_calls):
    step, threshold = between(similarities(rising)[0])
    previews, classified = count_calls(rising.clip_model), count_calls(rising.emotion_classifier)
    trace = guide(rising, semantic_threshold=threshold, num_inference_steps=4).trace[0]
    (_, seen), output = classified.calls[0]
    (_, before), _ = previews.calls[step - 1]
    (_, now), _ = previews.calls[step]
    torch.testing.assert_close(seen["pixel_values"], before["pixel_values"])
    assert not torch.allclose(seen["pixel_values"], now["pixel_values"])
    assert trace.inherent_emotion == trace.labels[output.logits.argmax()]


def test_the_inherent_emotion_is_that_of_the_first_step_if_it_opens_there(pipe, count_calls):
    first = similarities(pipe)[0][0]
    previews, classified = count_calls(pipe.clip_model), count_calls(pipe.emotion_classifier)
    trace = guide(pipe, semantic_threshold=first, num_inference_steps=4).trace[0]
    (_, seen), output = classified.calls[0]
    torch.testing.assert_close(seen["pixel_values"], previews.calls[0][0][1]["pixel_values"])
    assert trace.inherent_emotion == trace.labels[output.logits.argmax()]


def test_previews_come_from_the_preview_vae_if_there_is_one(count_calls):
    pipe = tiny_models.muse_pipeline(preview_vae=tiny_models.preview_vae())
    decoder = count_calls(pipe.preview_vae.decoder)
    big = count_calls(pipe.vae.decoder)
    guide(pipe, num_inference_steps=1, max_inner_steps=2)
    assert len(decoder) == 1 + 3, "one preview and three evaluations of the inner loop"
    assert len(big) == 0, "latents were asked for"


# ---- gates that stay shut ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "latest, interval, opened", [(0.0, 1, 0), (0.5, 1, 2), (0.3, 1, 2), (0.5, 3, 3), (1.0, 1, None)]
)
def test_late_enough_it_opens_whatever_the_similarity(pipe, latest, interval, opened):
    """At the first look from that share of the four steps on; the similarity is told nevertheless."""
    trace = guide(
        pipe,
        num_inference_steps=4,
        semantic_threshold=1e6,
        latest_start=latest,
        update_interval=interval,
        max_inner_steps=0,
    ).trace[0]
    assert trace.gate_step == opened
    looks = range(0, 4 if opened is None else opened + 1, interval)
    assert len(trace.similarity) == len(looks)
    assert len(trace.loss) == (0 if opened is None else len(range(opened, 4, interval)))


def test_whoever_starts_late_needs_no_clip():
    pipe = tiny_models.muse_pipeline(clip_model=None)
    trace = guide(pipe, semantic_threshold=18.0, latest_start=0.5, num_inference_steps=2, max_inner_steps=0).trace[0]
    assert (trace.gate_step, trace.similarity) == (1, [])
    assert trace.inherent_emotion in trace.labels


def test_the_inherent_emotion_of_a_late_start_is_that_of_the_step_before(pipe, count_calls):
    """Also where no similarity is asked for, so that the look before has to be remembered."""
    classified = count_calls(pipe.emotion_classifier)
    decoded = count_calls(pipe.vae.post_quant_conv)
    settings = {"semantic_threshold": 1e6, "num_inference_steps": 2, "max_inner_steps": 0, "latest_start": 0.5}
    guide(pipe, **settings)
    asked = classified.calls[0][0][1]["pixel_values"]
    with torch.no_grad():
        (before,), _ = decoded.calls[0][0]
        image = pipe.vae.decoder(pipe.vae.post_quant_conv(before))
    torch.testing.assert_close(asked, PixelSpec.from_classifier(pipe.emotion_classifier).prepare(image))


def test_gates_that_stayed_shut_are_told_with_the_highest_similarity(pipe, caplog):
    prompts, emotions = ["a cat", "two dogs", "a boat"], ["awe", None, "fear"]
    output = guide(pipe, prompt=prompts, emotion=emotions, semantic_threshold=1e6, num_inference_steps=2)
    (record,) = [one for one in caplog.records if "Guidance never started" in one.message]
    shut = [f"{b} (reached {max(output.trace[b].similarity):.1f})" for b in (0, 2)]
    told = (f"images {', '.join(shut)}", "`semantic_threshold` is 1e+06", "`latest_start`")
    assert all(word in record.message for word in told), record.message


def test_gates_that_opened_late_are_told_beside_those_that_stayed_shut(pipe, caplog):
    settings = {"semantic_threshold": 1e6, "num_inference_steps": 2, "max_inner_steps": 0, "latest_start": 0.5}
    output = guide(pipe, prompt=["a cat", "two dogs"], emotion=["awe", "fear"], **settings)
    (record,) = [one for one in caplog.records if "Guidance started late in the images 0 (" in one.message]
    assert all(f"(reached {max(trace.similarity):.1f})" in record.message for trace in output.trace)
    assert "never started" not in record.message and "`latest_start`" in record.message


def test_a_gate_that_nobody_asks_is_told_where_it_stays_shut(caplog):
    """Without a CLIP, and with no look late enough."""
    pipe = tiny_models.muse_pipeline(clip_model=None)
    settings = {"semantic_threshold": 18.0, "latest_start": 0.9, "update_interval": 3, "max_inner_steps": 0}
    (trace,) = guide(pipe, **settings, num_inference_steps=3).trace
    assert trace.gate_step is None and "Guidance never started" in caplog.text


def test_never_is_never(pipe):
    """However late it is, and with nothing to wait for."""
    settings = {"semantic_threshold": math.inf, "num_inference_steps": 2, "max_inner_steps": 1, "latest_start": 0.0}
    assert guide(pipe, **settings).trace[0].gate_step is None
    assert guide(pipe, prompt=None, **settings).trace[0].gate_step is None


def test_without_a_prompt_there_is_nothing_to_wait_for(pipe, count_calls):
    """Guidance starts at once, and CLIP is asked nothing; unless somebody names what it should find."""
    settings = {"prompt": None, "semantic_threshold": 1e6, "num_inference_steps": 2, "max_inner_steps": 0}
    clip = count_calls(pipe.clip_model)
    (trace,) = guide(pipe, **settings).trace
    assert (trace.gate_step, trace.similarity, len(clip)) == (0, [], 0)
    (trace,) = guide(pipe, **settings, semantic_prompt="a house").trace
    assert trace.gate_step is None and len(trace.similarity) == 2 == len(clip)


@pytest.mark.parametrize(
    "settings", [{"semantic_threshold": 0}, {"semantic_threshold": math.inf}, {"emotion": [None]}]
)
def test_nothing_is_told_where_the_gate_opened_or_was_never_to(pipe, caplog, settings):
    guide(pipe, **{"num_inference_steps": 1, "max_inner_steps": 0, "semantic_threshold": 1e6, **settings})
    assert "Guidance" not in caplog.text
