"""HOW and WHICH: the inner loop, its tokens and its loss."""

import copy
import math

import pytest
import tiny_models
import torch
from tiny_models import every_family, generator, guide, stock
from torch.nn import functional as F


def first_step(pipe, **arguments) -> dict[str, torch.Tensor]:
    """What a callback sees after the first denoising step, of three; there the call ends."""
    seen = {}

    def callback(pipe, step, timestep, values):
        seen.update({name: value.clone() for name, value in values.items()})
        pipe._interrupt = True
        return {}

    names = ["latents", "emotion_tokens"]
    output = guide(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=names, **arguments)
    return {**seen, "trace": output.trace}


def tokens_of_each_step(pipe, **arguments) -> list[torch.Tensor]:
    """The tokens after each denoising step."""
    history = []

    def callback(pipe, step, timestep, values):
        history.append(values["emotion_tokens"])
        return {}

    guide(pipe, callback_on_step_end=callback, callback_on_step_end_tensor_inputs=["emotion_tokens"], **arguments)
    return history


@torch.no_grad()
def encode(pipe, prompt: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The hidden states of a prompt and of the null prompt."""
    return pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)[:2]


@torch.no_grad()
def added_conditions(pipe, prompt: str) -> list[dict[str, torch.Tensor] | None]:
    """What the UNet is told besides hidden states, for a prompt and for the null prompt: only XL's is, of 32 px."""
    pooled = pipe.encode_prompt(prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)[2:]
    sizes = torch.tensor([[32, 32, 0, 0, 32, 32]])  # original, left and top of the crop, target
    return [{"text_embeds": part.double(), "time_ids": sizes} for part in pooled] or [None, None]


def random_tokens(pipe, *shape: int) -> torch.Tensor:
    """Tokens of the width of the pipeline's prompt embeddings."""
    return torch.randn(*(shape or (1, 4)), pipe.unet.config.cross_attention_dim, generator=generator(4))


def start_noise(pipe) -> torch.Tensor:
    """What the generator of `guide` would draw next once it has drawn the latents."""
    drawn = generator()
    torch.randn(1, 4, 16, 16, generator=drawn)
    return torch.randn(1, 4, pipe.unet.config.cross_attention_dim, generator=drawn)


def sees_tokens(call) -> bool:
    """Whether a recorded call of the UNet had more in its prompt than the 16 tokens of the prompt."""
    (_, keywords), _ = call
    return keywords["encoder_hidden_states"].shape[1] > 16


def tokens_seen(calls) -> list[torch.Tensor]:
    return [call[0][1]["encoder_hidden_states"][:, 16:].detach() for call in calls.calls if sees_tokens(call)]


# ---- the loop against a reference ----------------------------------------------------------------------------------


class Reference:
    """The first denoising step once more, in float64, straight from the paper's formulas."""

    def __init__(self, pipe, latents: torch.Tensor, target: str, similar: list[str]):
        self.unet, self.vae, self.classifier = (
            copy.deepcopy(module).double().requires_grad_(False)
            for module in (pipe.unet, pipe.vae, pipe.emotion_classifier)
        )
        self.prompt, self.null = (part.double() for part in encode(pipe, "a cat"))
        self.prompt_added, self.null_added = added_conditions(pipe, "a cat")
        pipe.scheduler.set_timesteps(3)
        self.timestep = pipe.scheduler.timesteps[0]
        self.alpha = pipe.scheduler.alphas_cumprod[self.timestep].double()
        self.latents = latents.double()
        labels = pipe.emotion_labels
        self.target, self.similar = labels.index(target), [labels.index(label) for label in similar]
        self.noise_null = self.noise(self.null, self.null_added)
        self.inherent = self.logits(self.guided(self.noise(self.prompt, self.prompt_added))).argmax().item()

    def noise(self, embeds: torch.Tensor, added: dict[str, torch.Tensor] | None) -> torch.Tensor:
        return self.unet(self.latents, self.timestep, embeds, added_cond_kwargs=added).sample

    def guided(self, noise: torch.Tensor) -> torch.Tensor:
        return self.noise_null + GUIDANCE_SCALE * (noise - self.noise_null)

    def logits(self, noise: torch.Tensor) -> torch.Tensor:
        x0 = (self.latents - (1 - self.alpha).sqrt() * noise) / self.alpha.sqrt()
        image = self.vae.decode(x0 / self.vae.config.scaling_factor).sample / 2 + 0.5
        config = self.classifier.config
        mean, std = (torch.tensor(values).double().view(3, 1, 1) for values in (config.image_mean, config.image_std))
        return self.classifier(pixel_values=(image - mean) / std).logits

    def loss(self, tokens: torch.Tensor, inherent_weight: float, similar_weight: float) -> torch.Tensor:
        noise = self.noise(torch.cat([self.prompt, tokens], dim=1), self.prompt_added)
        logits = self.logits(self.guided(noise))

        def cross_entropy(label: int) -> torch.Tensor:
            return F.cross_entropy(logits, torch.tensor([label]))

        loss = cross_entropy(self.target)
        if self.inherent != self.target:
            loss = loss - inherent_weight * cross_entropy(self.inherent)
        if self.similar:
            loss = loss - similar_weight * sum(map(cross_entropy, self.similar)) / len(self.similar)
        return loss

    def gradient(self, tokens: torch.Tensor, *weights: float) -> tuple[float, torch.Tensor]:
        tokens = tokens.clone().requires_grad_()
        loss = self.loss(tokens, *weights)
        return loss.item(), torch.autograd.grad(loss, tokens)[0]


WEIGHTS = (0.3, 0.2)  # large enough to be seen
GUIDANCE_SCALE = 7.5
LATENTS = torch.randn(1, 4, 16, 16, generator=generator(3))


def guided_first_step(pipe, **arguments):
    defaults = {"inherent_weight": WEIGHTS[0], "similar_weight": WEIGHTS[1], "latents": LATENTS}
    defaults |= {"emotion_tokens": random_tokens(pipe), "guidance_scale": GUIDANCE_SCALE}
    return first_step(pipe, **{**defaults, **arguments})


@pytest.fixture
def reference(pipe) -> Reference:
    return Reference(pipe, LATENTS, "awe", ["contentment", "excitement"])


def test_the_reference_has_the_gradient_of_finite_differences(pipe, reference):
    tokens = random_tokens(pipe).double()
    _, gradient = reference.gradient(tokens, *WEIGHTS)
    for seed in range(3):
        direction = torch.randn(tokens.shape, generator=generator(seed)).double()
        with torch.no_grad():
            ahead, behind = (reference.loss(tokens + sign * 1e-5 * direction, *WEIGHTS) for sign in (1, -1))
        torch.testing.assert_close((gradient * direction).sum(), (ahead - behind) / 2e-5, rtol=1e-5, atol=1e-9)


def test_the_gradient_is_the_references_whatever_the_batch(pipe, reference, monkeypatch):
    """Losses are summed: a mean would halve it here. Adam forgives the factor, but for its epsilon."""
    gradients = []
    grad = torch.autograd.grad

    def record(*arguments, **keywords):
        gradients.append(grad(*arguments, **keywords))
        return gradients[-1]

    monkeypatch.setattr(torch.autograd, "grad", record)
    pair = {"prompt": ["a cat", "two dogs"], "emotion": ["awe", "fear"]}
    tokens = random_tokens(pipe)
    tensors = {"latents": torch.cat([LATENTS, -LATENTS]), "emotion_tokens": torch.cat([tokens, -tokens])}
    guided_first_step(pipe, max_inner_steps=1, **pair, **tensors)
    monkeypatch.undo()
    _, expected = reference.gradient(tokens.double(), *WEIGHTS)
    assert expected.abs().max() > 1e-5
    error = (gradients[0][0].double() - expected[0]).norm() / expected.norm()
    assert error < 1e-3


@every_family
def test_adam_walks_the_references_path(pipe, reference):
    """Losses and tokens of three inner steps, against Adam written out; and the inherent emotion before."""
    tokens = random_tokens(pipe).double()
    first, second, losses, path = 0, 0, [], [tokens]
    for k in range(1, 4):
        loss, gradient = reference.gradient(tokens, *WEIGHTS)
        losses.append(loss)
        first = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * gradient**2
        tokens = tokens - 0.01 * (first / (1 - 0.9**k)) / ((second / (1 - 0.999**k)).sqrt() + 1e-8)
        path.append(tokens)
    losses.append(reference.loss(tokens, *WEIGHTS).item())

    seen = guided_first_step(pipe, max_inner_steps=3)
    (trace,) = seen["trace"]
    assert trace.inherent_emotion == trace.labels[reference.inherent]
    assert trace.loss[0] == pytest.approx(losses, abs=2e-5)
    assert losses[-1] < losses[0] - 1e-4, "the path has to lead somewhere"
    kept = path[losses.index(min(losses))]
    torch.testing.assert_close(seen["emotion_tokens"], kept.float(), rtol=0, atol=2e-4)


# ---- the loss of each iterate --------------------------------------------------------------------------------------


def expected_loss(trace, probabilities: list[float], target: dict[str, float], similar: list[str]) -> float:
    cost = {label: -math.log(p) for label, p in zip(trace.labels, probabilities)}
    loss = sum(weight * cost[label] for label, weight in target.items())
    if trace.inherent_emotion not in target:
        loss -= WEIGHTS[0] * cost[trace.inherent_emotion]
    return loss - WEIGHTS[1] * sum(cost[label] / len(similar) for label in similar)


@pytest.mark.parametrize(
    "emotion, similar_emotions, similar",
    [
        ("awe", None, ["contentment", "excitement"]),
        ("fear", None, ["sadness"]),
        ("fear", "both", ["excitement", "sadness"]),
        ("fear", [], []),
        ("fear", ["anger", "disgust"], ["anger", "disgust"]),
        ("fear", ["fear", "anger"], ["anger"]),
        ("fear", {"fear": ["awe"], "awe": ["anger"]}, ["awe"]),
        ("fear", {"awe": ["anger"]}, []),
        ({"fear": 1, "anger": 3}, None, ["disgust", "sadness"]),
        ({"contentment": 2, "awe": 2}, None, ["amusement", "excitement"]),
        ({"disgust": 0.5, "awe": 0}, "both", ["anger", "sadness"]),
    ],
)
def test_the_loss_is_the_papers(pipe, emotion, similar_emotions, similar):
    weights = {"inherent_weight": WEIGHTS[0], "similar_weight": WEIGHTS[1], "num_inference_steps": 1}
    (trace,) = guide(pipe, emotion=emotion, similar_emotions=similar_emotions, **weights).trace
    target = {emotion: 1.0} if isinstance(emotion, str) else emotion
    target = {label: weight / sum(target.values()) for label, weight in target.items() if weight}
    assert trace.emotion == pytest.approx(target)
    for losses, probabilities in zip(trace.loss, trace.probabilities):
        for loss, row in zip(losses, probabilities):
            assert sum(row) == pytest.approx(1)
            assert loss == pytest.approx(expected_loss(trace, row, target, similar), abs=1e-4)


def test_the_inherent_term_is_dropped_where_it_is_the_target(pipe):
    inherent = guide(pipe, num_inference_steps=1).trace[0].inherent_emotion
    with_term, without, other = (
        guide(pipe, emotion=emotion, inherent_weight=weight, num_inference_steps=1).trace[0].loss
        for emotion, weight in ((inherent, 0.3), (inherent, 0.0), ("awe", 0.3))
    )
    assert inherent != "awe" and other != with_term
    assert with_term == without


def test_labels_off_the_wheel_have_no_similar_emotions(family):
    labels = {index: f"mood {index}" for index in range(8)}
    classifier = tiny_models.emotion_classifier(id2label=labels)
    pipe = tiny_models.muse_pipeline(family, emotion_classifier=classifier)
    short = {"num_inference_steps": 1}
    traces = [
        guide(pipe, emotion="mood 3", similar_weight=weight, similar_emotions=similar, **short).trace[0].loss
        for weight, similar in ((0.2, None), (0.2, "both"), (0.0, None), (0.2, ["mood 1"]))
    ]
    assert traces[0] == traces[1] == traces[2] != traces[3]


def test_labels_are_found_by_name_not_by_position(pipe):
    """SimEmotion's classes are in alphabetical order, EmoSet's are not: the same head in another order is the same."""
    expected = guide(pipe, emotion={"awe": 1, "fear": 1})
    order = [3, 0, 7, 5, 1, 6, 2, 4]
    labels = pipe.emotion_labels
    head = pipe.emotion_classifier.classifier[-1]
    head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    config = pipe.emotion_classifier.config
    config.id2label = {index: labels[old] for index, old in enumerate(order)}
    output = guide(pipe, emotion={"awe": 1, "fear": 1})
    torch.testing.assert_close(output.emotion_tokens, expected.emotion_tokens, rtol=0, atol=1e-5)
    assert output.trace[0].inherent_emotion == expected.trace[0].inherent_emotion
    assert output.trace[0].labels == [labels[old] for old in order]


# ---- tokens --------------------------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize("number", [None, 1])
def test_tokens_stand_behind_the_prompt_and_nowhere_else(pipe, count_calls, number):
    calls = count_calls(pipe.unet)
    tokens = random_tokens(pipe, number) if number else None
    output = guide(pipe, num_inference_steps=1, max_inner_steps=0, emotion_tokens=tokens)
    embeds = [keywords["encoder_hidden_states"] for (_, keywords), _ in calls.calls]
    prompt, null = encode(pipe, "a cat")
    assert torch.equal(embeds[0], torch.cat([null, prompt])), "as the parent asks, without tokens"
    assert torch.equal(embeds[1][:, :16], prompt)
    assert torch.equal(embeds[1][:, 16:], output.emotion_tokens)
    assert output.emotion_tokens.shape == (1, number or 4, prompt.shape[-1])
    assert len(embeds) == 2


def test_random_tokens_have_the_standard_deviation_of_the_prompt(pipe):
    tokens = guide(pipe, max_inner_steps=0, emotion_tokens="random", num_inference_steps=1).emotion_tokens
    prompt, _ = encode(pipe, "a cat")
    torch.testing.assert_close(tokens, prompt.std() * start_noise(pipe))


@every_family
@pytest.mark.parametrize("emotion", ["awe", {"awe": 3, "fear": 1}])
def test_tokens_start_at_the_hidden_state_of_the_emotions_word(pipe, emotion):
    settings = {"emotion_tokens": "emotion", "max_inner_steps": 0, "num_inference_steps": 1}
    tokens = guide(pipe, emotion=emotion, **settings).emotion_tokens

    def word(label: str) -> torch.Tensor:
        """Of "an image of awe" the tiny tokenizer makes one token per letter, after the first special token."""
        states, _ = encode(pipe, f"an image of {label}")
        return states[0, 10 : 10 + len(label)].mean(dim=0)

    start = word("awe") if emotion == "awe" else 0.75 * word("awe") + 0.25 * word("fear")
    prompt, _ = encode(pipe, "a cat")
    torch.testing.assert_close(tokens, start + 0.1 * prompt.std() * start_noise(pipe))


def test_tokens_of_an_earlier_call_are_taken_up_again(pipe, count_calls):
    earlier = guide(pipe).emotion_tokens
    calls = count_calls(pipe.unet)
    output = guide(pipe, emotion_tokens=earlier)
    assert torch.equal(tokens_seen(calls)[0], earlier)
    assert torch.equal(earlier, guide(pipe).emotion_tokens) and not torch.equal(output.emotion_tokens, earlier)


@pytest.mark.parametrize("shape", [(3,), (1, 3), (2, 3)], ids=str)
def test_tokens_may_be_shared_or_one_set_for_each_image(pipe, shape):
    tokens = random_tokens(pipe, *shape).requires_grad_()
    output = guide(pipe, emotion_tokens=tokens, num_images_per_prompt=2, max_inner_steps=0, num_inference_steps=1)
    assert torch.equal(output.emotion_tokens, tokens.detach().expand(2, 3, -1))
    assert not output.emotion_tokens.requires_grad


def test_the_callers_tokens_are_not_written_to(pipe):
    tokens = random_tokens(pipe)
    before = tokens.clone()
    guide(pipe, emotion_tokens=tokens)
    assert torch.equal(tokens, before)


def test_tokens_carry_over(pipe, count_calls):
    calls = count_calls(pipe.unet)
    after = tokens_of_each_step(pipe)
    seen = tokens_seen(calls)
    starts = seen[::3]  # two Adam steps are three evaluations
    assert torch.equal(starts[1], after[0]) and torch.equal(starts[2], after[1])
    assert not torch.equal(starts[1], starts[0])
    assert not torch.equal(after[0], after[1]), "a callback's history must not change behind its back"


# ---- Adam ----------------------------------------------------------------------------------------------------------


def test_adam_is_fresh_at_every_step_and_its_rate_falls_with_the_step_index(pipe, count_calls):
    """The first step of a fresh Adam moves every coordinate by the learning rate, whatever the gradient."""
    calls = count_calls(pipe.unet)
    guide(pipe, emotion_tokens=random_tokens(pipe), guidance_scale=20.0)
    evaluations = tokens_seen(calls)
    assert len(evaluations) == 3 * 3
    for i in range(3):
        moved = (evaluations[3 * i + 1] - evaluations[3 * i]).abs()
        assert moved.max() == pytest.approx(0.01 * (1 - i / 100), rel=1e-3), "had it the rate of its step?"
        assert moved.median() > 0.95 * moved.max(), "was there momentum?"


def test_a_rate_of_zero_takes_no_inner_steps(pipe, count_calls):
    """So it is from the 101st denoising step on."""
    calls = count_calls(pipe.unet)
    tokens = random_tokens(pipe)
    output = guide(pipe, emotion_learning_rate=0, emotion_tokens=tokens)
    assert torch.equal(output.emotion_tokens, tokens)
    assert len(calls) == 3 * 2
    assert torch.equal(output.images, guide(pipe, max_inner_steps=0, emotion_tokens=tokens).images)


def test_tokens_stay_where_the_gradient_vanishes(pipe, monkeypatch):
    tokens, grad = random_tokens(pipe), torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: [0 * one for one in grad(*a, **k)])
    output = guide(pipe, max_inner_steps=1, emotion_tokens=tokens)
    assert output.trace[0].inner_steps > 0 and torch.equal(output.emotion_tokens, tokens)


@pytest.mark.parametrize("inner, evaluations", [(0, 1), (1, 2), (3, 4)])
def test_no_call_of_the_network_is_wasted(pipe, count_calls, inner, evaluations):
    """Per step: the parent's call once; the start and each Adam step once. The noise that is used is at hand."""
    calls = count_calls(pipe.unet)
    trace = guide(pipe, max_inner_steps=inner).trace[0]
    assert len(calls) == 3 * (1 + evaluations)
    assert [len(losses) for losses in trace.loss] == [evaluations] * 3
    assert trace.inner_steps == 3 * inner


def test_only_the_inner_loop_records_a_graph(pipe, count_calls):
    """The network's first call and the last evaluation need none; no Adam step follows them."""
    calls = count_calls(pipe.unet)
    guide(pipe, num_inference_steps=1, max_inner_steps=2)
    assert [noise.requires_grad for _, (noise,) in calls.calls] == [False, True, True, False]


@pytest.mark.parametrize("rate", [0.01, 30.0])
def test_the_best_iterate_is_kept_and_its_noise_is_used(pipe, rate):
    """At an absurd rate the loss rises: the start is best, or whatever came by."""
    settings = {"max_inner_steps": 4, "emotion_learning_rate": rate}
    seen = first_step(pipe, emotion="fear", **settings)
    (trace,) = seen["trace"]
    assert trace.kept == [trace.loss[0].index(min(trace.loss[0]))]
    if rate > 1:
        assert trace.kept != [4]
    again = first_step(pipe, emotion="fear", max_inner_steps=0, emotion_tokens=seen["emotion_tokens"])
    torch.testing.assert_close(again["latents"], seen["latents"], rtol=0, atol=1e-5)
    assert again["trace"][0].loss[0] == pytest.approx([min(trace.loss[0])], abs=1e-5)


def test_more_guidance_raises_the_targets_probability(pipe):
    """The one end to end fact that random weights can show."""
    without, guided = (
        guide(pipe, emotion="disgust", emotion_learning_rate=rate, max_inner_steps=5).trace[0] for rate in (0, 0.1)
    )
    assert guided.target_probability > without.target_probability + 0.01


def test_the_loop_ends_below_the_threshold(pipe, count_calls):
    losses = guide(pipe, max_inner_steps=3).trace[0].loss[0]
    assert losses[0] > losses[1] > losses[2]
    calls = count_calls(pipe.unet)
    trace = guide(pipe, max_inner_steps=3, loss_threshold=(losses[1] + losses[2]) / 2).trace[0]
    assert trace.loss[0] == pytest.approx(losses[:3], abs=1e-6) and trace.kept[0] == 2
    assert len(calls) == 3 + sum(map(len, trace.loss)), "the noise below the threshold is not computed again"


MIXTURE = {"awe": 3, "fear": 1}


def test_the_threshold_of_a_mixture_counts_from_its_entropy(pipe):
    trace = guide(pipe, max_inner_steps=2, emotion=MIXTURE).trace[0]
    last = dict(zip(trace.labels, trace.probabilities[-1][trace.kept[-1]]))
    assert trace.target_probability == pytest.approx(last["awe"] + last["fear"])
    losses = trace.loss[0]
    assert losses[0] > losses[1] > losses[2]
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    excess = [loss - entropy for loss in losses]
    stopped = guide(pipe, max_inner_steps=2, emotion=MIXTURE, loss_threshold=(excess[0] + excess[1]) / 2).trace[0]
    assert len(stopped.loss[0]) == 2


# ---- strength ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("guidance_scale", [7.5, 1.0])
def test_strength_leads_from_the_noise_of_the_prompt_to_that_with_tokens(pipe, guidance_scale):
    """A step of DDIM is linear in the noise."""
    settings = {"guidance_scale": guidance_scale, "emotion_learning_rate": 0.3}
    none = first_step(pipe, **settings, semantic_threshold=math.inf)["latents"]
    whole = first_step(pipe, **settings)["latents"]
    assert (whole - none).abs().max() > 0.05
    for strength in (0.25, 0.75):
        part = first_step(pipe, **settings, emotion_strength=strength)["latents"]
        torch.testing.assert_close(part, torch.lerp(none, whole, strength), rtol=0, atol=1e-5)
    assert torch.equal(first_step(pipe, **settings, emotion_strength=1)["latents"], whole)


def test_the_least_strength_is_next_to_stock(pipe):
    distance = [(guide(pipe, emotion_strength=s).images - stock(pipe)).norm() for s in (1e-4, 0.5, 1)]
    assert distance[0] < 1e-3 * distance[2] and distance[0] < distance[1] < distance[2]


# ---- memory --------------------------------------------------------------------------------------------------------


def test_parts_of_a_batch_are_bounded_and_change_nothing(pipe, count_calls):
    prompts, emotions = ["a cat", "two dogs", "a red house"], ["awe", "fear", "anger"]
    settings = {"prompt": prompts, "emotion": emotions}
    losses = [trace.loss[0][0] for trace in guide(pipe, **settings).trace]
    settings["loss_threshold"] = (min(losses) + max(losses)) / 2
    expected = guide(pipe, **settings)
    assert len({trace.inner_steps for trace in expected.trace}) > 1, "samples have to stop at different times"
    calls = count_calls(pipe.unet)
    output = guide(pipe, **settings, max_inner_batch=2)
    rows = [
        keywords["encoder_hidden_states"].shape[0]
        for call in calls.calls
        if sees_tokens(call)
        for _, keywords in call[:1]
    ]
    assert max(rows) == 2 and 1 in rows
    torch.testing.assert_close(output.emotion_tokens, expected.emotion_tokens, rtol=0, atol=1e-4)
    torch.testing.assert_close(output.images, expected.images, rtol=0, atol=1e-3)
    assert [trace.inner_steps for trace in output.trace] == [trace.inner_steps for trace in expected.trace]


# ---- batches -------------------------------------------------------------------------------------------------------

PROMPTS = ["a cat", "two dogs", "a red house"]
EMOTIONS = ["awe", None, {"fear": 2, "sadness": 1}]


def test_the_classifier_sees_degraded_copies_in_place_of_a_preview(pipe, count_calls):
    """Their mean log-probabilities, softmaxed, are what the trace tells, and the loss is of these."""
    seen, weights = count_calls(pipe.emotion_classifier), {"inherent_weight": 0.0, "similar_weight": 0.0}
    settings = {"num_inference_steps": 1, "max_inner_steps": 2, "semantic_threshold": 0, "degraded_copies": 3}
    (trace,) = guide(pipe, **settings, **weights).trace
    pictures = [keywords["pixel_values"] for (_, keywords), _ in seen.calls]
    assert [len(batch) for batch in pictures] == [1, 3, 3, 3], "the inherent emotion is that of the preview itself"
    assert len({batch.flatten(1)[row].sum().item() for batch in pictures[1:] for row in range(3)}) == 9, "each its own"
    target = trace.labels.index("awe")
    for (_, output), loss, told in zip(seen.calls[1:], trace.loss[0], trace.probabilities[0]):
        mean = output.logits.detach().log_softmax(dim=-1).mean(dim=0).softmax(dim=-1)
        torch.testing.assert_close(torch.tensor(told), mean)
        assert loss == pytest.approx(-math.log(mean[target]), abs=1e-5)
    (again,) = guide(pipe, **settings, **weights).trace
    assert again.loss == trace.loss
    assert guide(pipe, **settings | {"degraded_copies": 0}, **weights).trace[0].loss != trace.loss


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"emotion_tokens": "emotion", "max_inner_batch": 2},
        {"guidance_scale": 1.0},
        {"guidance_rescale": 0.5, "negative_prompt": "snow"},
        {"eta": 1.0},
        {"semantic_threshold": "some"},
        {"loss_threshold": "some"},
        {"update_interval": 2, "max_inner_steps": 1, "num_inference_steps": 3},
        {"degraded_copies": 2},
    ],
    ids=lambda settings: " ".join(settings) or "defaults",
)
def test_a_batch_is_its_single_calls(pipe, settings):
    """Whatever the neighbours are up to. `some`: a threshold that some samples pass and others do not."""

    def call(samples: list[int], settings: dict):
        chosen = {name: [values[b] for b in samples] for name, values in (("prompt", PROMPTS), ("emotion", EMOTIONS))}
        if "negative_prompt" in settings:
            settings = settings | {"negative_prompt": ["snow"] * len(samples)}
        seeds = [generator(10 + b) for b in samples]
        return guide(pipe, **{"num_inference_steps": 2, **chosen, **settings}, generator=seeds)

    everyone = range(len(PROMPTS))
    if settings.get("semantic_threshold"):
        values = [
            trace.similarity[0] for trace in call(everyone, {"semantic_threshold": math.inf}).trace if trace.emotion
        ]
        settings = {"semantic_threshold": (min(values) + max(values)) / 2}
    if settings.get("loss_threshold"):
        values = [trace.loss[0][0] for trace in call(everyone, {}).trace if trace.emotion]
        settings = {"loss_threshold": (min(values) + max(values)) / 2}
    batch = call(everyone, settings)
    if "semantic_threshold" in settings or "loss_threshold" in settings:
        paths = {(trace.gate_step, trace.inner_steps) for trace in batch.trace if trace.emotion}
        assert len(paths) > 1, "the samples have to differ"
    for b in everyone:
        single = call([b], settings)
        torch.testing.assert_close(batch.images[b], single.images[0], rtol=0, atol=1e-4)
        if EMOTIONS[b]:
            torch.testing.assert_close(batch.emotion_tokens[b], single.emotion_tokens[0], rtol=0, atol=1e-4)
        assert batch.trace[b].gate_step == single.trace[0].gate_step
        assert batch.trace[b].inherent_emotion == single.trace[0].inherent_emotion
        assert batch.trace[b].kept == single.trace[0].kept
        assert sum(batch.trace[b].loss, []) == pytest.approx(sum(single.trace[0].loss, []), abs=1e-4)


def test_one_emotion_serves_all_prompts_and_images(pipe):
    output = guide(pipe, prompt=["a cat", "two dogs"], num_images_per_prompt=2, num_inference_steps=1)
    assert output.images.shape[0] == len(output.trace) == output.emotion_tokens.shape[0] == 4
    assert all(trace.emotion == {"awe": 1.0} for trace in output.trace)
    output = guide(
        pipe, prompt=["a cat", "two dogs"], emotion=["awe", "fear"], num_images_per_prompt=2, num_inference_steps=1
    )
    assert [list(trace.emotion) for trace in output.trace] == [["awe"], ["awe"], ["fear"], ["fear"]]


def test_emotions_without_prompts_make_their_own(pipe):
    output = guide(pipe, prompt=None, emotion=["awe", {"fear": 1, "anger": 1}], num_inference_steps=1)
    named = ["an image of awe", "an image of fear and anger"]
    expected = guide(pipe, prompt=named, emotion=["awe", {"fear": 1, "anger": 1}], num_inference_steps=1)
    assert torch.equal(output.images, expected.images)


# ---- what can break ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_ends_the_loop_at_the_last_tokens_that_were(pipe, caplog, value):
    calls = []

    def break_third(module, arguments, output):
        calls.append(output)
        if len(calls) == 3:  # the inherent emotion and the start come first
            output.logits = output.logits * value
        return output

    pipe.emotion_classifier.register_forward_hook(break_third)
    output = guide(pipe, max_inner_steps=3, num_inference_steps=2)
    trace = output.trace[0]
    assert "A loss is nan" in caplog.text
    assert len(trace.loss[0]) == 2 and trace.kept[0] == 0
    assert len(trace.loss[1]) == 4, "the next step tries again"
    assert output.images.isfinite().all() and output.emotion_tokens.isfinite().all()


def test_a_loss_that_is_never_finite_leaves_the_start(pipe, caplog):
    def break_all(module, arguments, output):
        output.logits = output.logits * math.nan
        return output

    pipe.emotion_classifier.register_forward_hook(break_all)
    tokens = random_tokens(pipe)
    output = guide(pipe, emotion_tokens=tokens)
    assert torch.equal(output.emotion_tokens, tokens)
    assert output.images.isfinite().all()
    assert caplog.text.count("A loss is nan") == 3


@pytest.mark.parametrize("broken", [[0], [0, 1]], ids=["one of two", "all"])
def test_a_gradient_that_is_not_finite_ends_the_loop_of_its_sample(pipe, caplog, broken):
    """The loss may be finite where its gradient is not; the neighbour goes on."""

    def break_gradient(module, arguments, output):
        if output.logits.requires_grad and output.logits.shape[0] == 2:
            factor = torch.ones(2, 1)
            factor[broken] = math.nan
            output.logits.register_hook(lambda gradient: gradient * factor)
        return output

    emotions = {"prompt": ["a cat", "two dogs"], "emotion": ["awe", "fear"], "max_inner_steps": 2}
    tokens = torch.cat([random_tokens(pipe), -random_tokens(pipe)])
    healthy = guide(pipe, **emotions, emotion_tokens=tokens, generator=[generator(0), generator(1)])
    pipe.emotion_classifier.register_forward_hook(break_gradient)
    output = guide(pipe, **emotions, emotion_tokens=tokens, generator=[generator(0), generator(1)])
    assert "A gradient is not finite" in caplog.text
    assert output.images.isfinite().all()
    for b in (0, 1):
        if b in broken:
            assert torch.equal(output.emotion_tokens[b], tokens[b])
            assert output.trace[b].kept == [0, 0, 0]
        else:
            torch.testing.assert_close(output.emotion_tokens[b], healthy.emotion_tokens[b], rtol=0, atol=1e-4)


@every_family
def test_tokens_and_losses_are_float32_whatever_the_model(pipe):
    pipe.to(torch.bfloat16)
    output = guide(pipe, output_type="pt", semantic_threshold=0.0)
    assert output.emotion_tokens.dtype == torch.float32
    assert output.images.isfinite().all()
    assert all(math.isfinite(loss) for losses in output.trace[0].loss for loss in losses)
    given = guide(pipe, emotion_tokens=random_tokens(pipe).bfloat16(), max_inner_steps=1, num_inference_steps=1)
    assert given.emotion_tokens.dtype == torch.float32
    moved = output.emotion_tokens - guide(pipe, max_inner_steps=0).emotion_tokens
    assert 0 < moved.abs().max() < 0.1, "steps of 0.01 would be lost in bfloat16 tokens"
    assert torch.equal(guide(pipe, semantic_threshold=math.inf).images, stock(pipe))
