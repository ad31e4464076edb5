"""The benchmark: that each section measures what it says, on tiny random weights, and that a stopped run goes on."""

import json
import time
from contextlib import contextmanager
from functools import partial

import benchmark
import numpy as np
import pytest
import tiny_models
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook


@pytest.fixture
def bench(pipe) -> benchmark.Bench:
    return benchmark.Bench(pipe, tiny_models.preview_vae(), 32, repeats=1, iterations=1, batch_sizes=(1, 2))


@contextmanager
def seen_gradients():
    """The gradients that optimisers are given, in order."""
    gradients: list[torch.Tensor] = []

    def see(optimizer, *_):
        gradients.extend(weight.grad.clone() for group in optimizer.param_groups for weight in group["params"])

    handle = register_optimizer_step_pre_hook(see)
    yield gradients
    handle.remove()


# ---- time


def test_works_are_timed_in_turn_and_the_first_round_does_not_count(bench):
    order = []
    works = {name: partial(order.append, name) for name in "ab"}
    seconds = benchmark.interleaved(works, bench, repeats=2, prepare=lambda name: order.append(f"before {name}"))
    assert order == ["before a", "a", "before b", "b"] * 3
    assert [len(values) for values in seconds.values()] == [2, 2]
    assert len(benchmark.interleaved({"a": int}, bench, repeats=2, warm_up=False)["a"]) == 2


def test_what_prepares_a_work_is_not_timed(bench):
    works = {"a": partial(time.sleep, 0.1)}
    seconds = benchmark.interleaved(works, bench, warm_up=False, prepare=lambda name: time.sleep(0.4))
    assert 0.1 <= seconds["a"][0] < 0.4


def test_medians_come_with_quartiles_and_ratios_with_what_other_draws_would_give():
    assert benchmark.summary([1.0, 5.0, 2.0, 3.0, 4.0]) == {"median": 3.0, "low": 2.0, "high": 4.0, "repeats": 5}
    assert benchmark.ratio([2.0] * 5, [4.0] * 5) == {"median": 0.5, "low": 0.5, "high": 0.5}
    noisy = benchmark.ratio([2.0, 3.0, 2.0, 4.0, 2.2], [4.0, 4.1, 3.9, 4.0, 4.0])
    assert noisy["low"] < noisy["median"] == 0.55 < noisy["high"]


@pytest.fixture
def clock(monkeypatch):
    """Works that take as long as it says, without being done."""
    seconds = {}

    def interleaved(works, *_, **options):
        return {name: [seconds[name]] * 2 for name in works}

    monkeypatch.setattr(benchmark, "interleaved", interleaved)
    return seconds


def test_an_iteration_is_the_difference_of_two_calls_and_is_compared_with_its_parts(bench, clock):
    bench.steps, bench.iterations = 2, 3
    clock.update({"unet": 1.0, "decoder": 2.0, "classifier": 2.0, "short": 10.0, "long": 46.0})
    row = benchmark.limit(bench)["full VAE"]()
    assert [row[f"{name}, s"]["median"] for name in ("sum", "ours")] == [5, 36 / 6]
    assert row["ours / sum"]["median"] == 1.2
    assert [row[f"{part}, %"] for part in ("unet", "decoder", "classifier")] == [20, 40, 40]


def test_ours_is_compared_with_the_others(bench, clock):
    clock.update({"parent": 2.0, "ours": 3.0})
    assert benchmark.tax(bench)["emotion=None"]()["ours / parent"]["median"] == 1.5
    clock.update({"plain 2": 12.0, "plain 3": 22.0, "ours 2": 8.0, "ours 3": 12.0})
    row = benchmark.plain(bench)["ours with both"]()
    assert row["iteration, plain, s"]["median"] == 10 and row["iteration, ratio"]["median"] == 0.4
    assert row["step of 10, plain, s"]["median"] == 12 + 8 * 10
    assert row["step of 10, ratio"]["median"] == pytest.approx((8 + 8 * 4) / 92, abs=1e-3)
    clock.update({"stock": 2.0, "guided": 6.0})
    assert benchmark.throughput(bench)["batch of 2"]()["guided, images/min"]["median"] == 20


def test_a_backward_pass_costs_what_it_adds(bench, clock):
    kinds = ("unet, 1 rows", "preview, 1", "classifier")
    clock.update(dict.fromkeys(("text", "gate", "output", "unet, 2 rows", *kinds), 1.0))
    clock.update({kind + benchmark.BACKWARD: 3.5 for kind in kinds})
    with bench.in_call():
        parts = benchmark.call_parts(bench)
    assert {parts[kind + benchmark.BACKWARD] for kind in kinds} == {2.5} and parts["text"] == 1


# ---- what is measured


@tiny_models.every_family
def test_the_parent_is_the_stock_pipeline_around_the_same_modules(bench):
    for module in (bench.pipe.unet, bench.pipe.vae):
        module.to(torch.bfloat16)
    parent = benchmark.parent_of(bench.pipe)
    assert type(parent) in (StableDiffusionPipeline, StableDiffusionXLPipeline)
    assert all(part is getattr(bench.pipe, name) for name, part in parent.components.items())
    assert parent.unet.dtype == torch.bfloat16
    bench.pipe.to(torch.float32)
    images = [bench.stock(pipe, output_type="latent").images for pipe in (parent, bench.pipe)]
    assert torch.equal(*images)


@tiny_models.every_family
def test_parts_are_given_what_a_call_gives_them(bench, count_calls):
    counter = count_calls(bench.pipe.unet, bench.pipe.emotion_classifier)
    bench.guided(num_inference_steps=1, max_inner_steps=0)
    noise, logits = counter.calls[-2][1][0], counter.calls[-1][1].logits
    step = benchmark.first_step(bench)
    parts = benchmark.inner_parts(bench, step)
    torch.testing.assert_close(parts["unet"].forward(), noise)
    assert parts["classifier"].forward().shape == logits.shape
    null, cond = benchmark.predict_both(bench.pipe, step).chunk(2)
    torch.testing.assert_close(null, benchmark.predict(bench.pipe, step, step.null), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(cond, benchmark.predict(bench.pipe, step, step.cond), rtol=1e-4, atol=1e-5)


def test_parts_go_forth_and_back_through_frozen_networks(bench):
    with bench.variant("both"), bench.in_call():
        step = benchmark.first_step(bench)
        for part in (*benchmark.inner_parts(bench, step).values(), benchmark.whole_iteration(bench, step)):
            gradient = part.forward_backward()
            assert gradient.shape == part.value.shape and gradient.abs().max() > 0
        assert bench.pipe.unet.is_gradient_checkpointing and bench.pipe.preview_vae is bench.preview_vae
        assert not any(weight.requires_grad for weight in bench.pipe.unet.parameters())
    assert not bench.pipe.unet.is_gradient_checkpointing and bench.pipe.preview_vae is None
    assert all(weight.requires_grad for weight in bench.pipe.unet.parameters())


@tiny_models.every_family
def test_the_plain_iteration_is_ours(bench):
    bench.pipe.scheduler.set_timesteps(1)
    step = benchmark.first_step(bench)
    with seen_gradients() as ours:
        output = bench.guided(num_inference_steps=1, max_inner_steps=3)
    with seen_gradients() as plain:
        noise, tokens, losses = benchmark.plain_step(bench.pipe, step, 3)
    assert len(ours) == len(plain) == 3
    for gradient, other in zip(ours, plain):
        assert gradient.abs().max() > 0
        torch.testing.assert_close(gradient, other[0], rtol=1e-3, atol=1e-3 * float(gradient.abs().max()))
    assert losses == pytest.approx(output.trace[0].loss[0][:3], rel=1e-4)
    assert output.trace[0].kept == [3], "the last tokens are the best, so that the noise is theirs in both"
    torch.testing.assert_close(tokens, output.emotion_tokens, rtol=1e-3, atol=1e-3)
    latents = bench.pipe.scheduler.step(noise, step.timestep, step.model_input).prev_sample
    torch.testing.assert_close(latents, output.images, rtol=1e-3, atol=1e-3)


def test_the_plain_iteration_has_both_branches_and_all_weights_in_the_graph(bench, count_calls):
    step, pipe = benchmark.first_step(bench), bench.pipe
    pipe.unet.requires_grad_(False)
    counter = count_calls(pipe.unet)
    with benchmark.trainable(pipe.unet, pipe.vae, pipe.emotion_classifier):
        benchmark.plain_step(pipe, step, 1)
        for weight in (pipe.unet.conv_in.weight, pipe.vae.decoder.conv_in.weight):
            assert weight.grad.abs().max() > 0
    assert [output[0].requires_grad for _, output in counter.calls] == [True, True, False, False]
    assert not any(weight.requires_grad or weight.grad is not None for weight in pipe.unet.parameters())
    assert all(weight.requires_grad and weight.grad is None for weight in pipe.vae.parameters())


def test_a_loop_that_ends_early_is_not_measured(bench):
    with pytest.raises(RuntimeError, match="ended early"):
        bench.guided(max_inner_steps=2, loss_threshold=float("inf"))
    bench.guided(max_inner_steps=2)


@pytest.mark.parametrize("section", ["tax", "limit", "plain", "peak", "throughput"])
def test_a_section_is_a_table_of_measurements(bench, section):
    measurements = benchmark.SECTIONS[section](bench)
    rows = {name: measure() for name, measure in list(measurements.items())[-1:]}
    assert all(rows.values())
    table = benchmark.markdown_table(rows).splitlines()
    assert len(table) == 2 + len(rows) and len({line.count("|") for line in table}) == 1
    json.dumps(rows)


def test_options_reach_the_calls_whose_memory_is_measured(bench, monkeypatch):
    seen = []
    monkeypatch.setattr(
        bench,
        "guided",
        lambda *given, **options: seen.append(
            (given, options, bench.pipe.preview_vae, bench.pipe.unet.is_gradient_checkpointing)
        ),
    )
    measurements = benchmark.peak(bench)
    for measure in measurements.values():
        measure()
    calls = dict(zip(measurements, seen))
    assert calls["both"][2] is bench.preview_vae and calls["both"][3]
    plain = {"num_inference_steps": 1, "max_inner_steps": benchmark.LEAST_INNER_STEPS}
    assert calls["full VAE"] == ((1,), plain, None, False) and not bench.pipe.unet.is_gradient_checkpointing
    assert calls["batch of 2, max_inner_batch=1"][0] == (2,)
    assert calls["batch of 2, max_inner_batch=1"][1]["max_inner_batch"] == 1


def test_what_a_call_keeps_is_found(bench, monkeypatch):
    row = benchmark.leak(bench)["full VAE"]()
    assert row["growth, bytes"] == 0 and row["after 1 call, bytes"] > 0
    kept = []
    monkeypatch.setattr(bench, "guided", lambda **options: kept.append(torch.zeros(1000)))
    assert benchmark.leak(bench)["full VAE"]()["growth, bytes"] == 9 * 4000


# ---- whole calls


def test_the_parts_that_a_call_needs_are_counted(bench):
    arguments = {"num_inference_steps": 3, "max_inner_steps": 2, "preview_scale": 0.5}
    with benchmark.counted(bench.pipe) as counts:
        bench.guided(**arguments)
    assert counts == {
        "unet, 2 rows": 3,
        "unet, 1 rows": 3 * 3,
        "unet, 1 rows, backward": 3 * 2,
        "preview, 0.5": 1 + 3 * 3,
        "preview, 0.5, backward": 3 * 2,
        "classifier": 1 + 3 * 3,
        "classifier, backward": 3 * 2,
    }
    with benchmark.counted(bench.pipe) as counts:
        bench.guided(semantic_threshold=1e5, num_inference_steps=3, max_inner_steps=0)
    assert counts == {"unet, 2 rows": 3, "preview, 1": 3, "gate": 3}
    with benchmark.counted(bench.pipe) as counts:
        bench.guided(max_inner_steps=0, height=64, width=64)
    assert counts["preview, 1"] == 2, "a share of the size of the image, not of the network's own"


def test_the_cost_of_a_call_is_the_sum_of_its_parts():
    parts = {"a": 1.5, "b": 10.0, "c": 7.0}
    assert benchmark.call_cost({"a": 2, "b": 0.5}, parts) == 8.0
    with pytest.raises(ValueError, match="lacks .'d'."):
        benchmark.call_cost({"a": 1, "d": 1}, parts)


def test_every_part_that_a_call_needs_is_timed(bench):
    with benchmark.counted(bench.pipe) as counts:
        bench.guided(max_inner_steps=1, preview_scale=0.5)
        bench.guided(semantic_threshold=1e5, max_inner_steps=0)
    with bench.in_call():
        parts = benchmark.call_parts(bench, [1.0, 0.5])
    assert counts.keys() < parts.keys() and {"text", "output"} < parts.keys()
    assert benchmark.call_cost(counts, parts) > benchmark.call_cost({"unet, 2 rows": 1}, parts) > 0


def test_a_whole_call_is_measured_beside_what_its_parts_foretell(bench):
    bench.whole_steps = 5
    sections = benchmark.calls(bench)
    assert set(bench.pipe.presets) < set(sections)
    row = sections["fast, whole, preview_vae"]()
    assert row["counts"]["unet, 1 rows, backward"] == 6, "at worst every 2nd step has two inner steps"
    assert row["counts"]["unet, 2 rows"] == 5, "one a step, with the tokens where they rest"
    assert row["preview_vae / stock"] > 0 and row["from parts / stock"] > 0


def test_loops_are_counted_on_storybook_where_they_end_early():
    settings = {"num_inference_steps": 2, "max_inner_steps": 2, "semantic_threshold": 0}
    counts = benchmark.counts_on_storybook(settings | {"loss_threshold": float("inf")})
    once_a_step = {"text": 1, "output": 1, "unet, 2 rows": 2, "unet, 1 rows": 2, "preview, 1": 3, "classifier": 3}
    assert counts == once_a_step, "no backward pass: the emotion is probable enough at once"


# ---- laws


def test_fits_recover_known_laws():
    line = benchmark.fit_line([1, 2, 4], [5.0, 7.0, 11.0])
    assert (line["a"], line["b"], line["R2"]) == (pytest.approx(3), pytest.approx(2), 1)
    power = benchmark.fit_power([16, 64, 256], [3 * x**1.5 for x in (16, 64, 256)])
    assert (power["a"], power["b"], power["R2"]) == (pytest.approx(3), pytest.approx(1.5), 1)
    assert benchmark.fit_line([1, 2, 3, 4], [1.0, 3.0, 2.0, 4.0])["R2"] == pytest.approx(0.64)


def test_laws_are_fitted_and_drawn(bench, tmp_path):
    measurements = benchmark.laws(bench)
    rows = {name: measurements[name]() for name in ("seconds against inner steps", "seconds against pixels")}
    for row in rows.values():
        x, low, median, high = np.array(row["points"]).T
        assert len(x) >= 3 and (low <= median).all() and (median <= high).all()
    benchmark.plot_laws(rows, "tiny", tmp_path / "laws.png")
    assert Image.open(tmp_path / "laws.png").width > 400


# ---- compilers


def test_a_change_is_made_for_half_of_the_works_and_taken_back(bench, monkeypatch):
    weight, timed, interleaved = bench.pipe.unet.conv_in.weight, {}, benchmark.interleaved

    def see(works, bench, prepare):
        def record(name):
            prepare(name)
            timed[name] = weight.is_contiguous(memory_format=torch.channels_last)

        return interleaved(works, bench, prepare=record)

    monkeypatch.setattr(benchmark, "interleaved", see)
    row = benchmark.compile_section(bench)["channels-last"]()
    assert timed == {
        "step, before": False,
        "iteration, before": False,
        "step, after": True,
        "iteration, after": True,
    }
    assert row["iteration, ratio"]["median"] > 0 and weight.is_contiguous()


def test_a_compiler_that_fails_is_a_result(bench, monkeypatch):
    class Broken(torch.nn.Module):
        def forward(self, *arguments, **keywords):
            raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", lambda module: Broken())
    unet, decoder = bench.pipe.unet, bench.pipe.vae.decoder
    row = benchmark.compile_section(bench)["torch.compile of UNet and decoder"]()
    assert row == {"failed": "RuntimeError: no compiler here"}
    assert bench.pipe.unet is unet and bench.pipe.vae.decoder is decoder


def test_what_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError, match="stopped after 0.1 s"), benchmark.time_limit(0.1):
        time.sleep(5)
    with benchmark.time_limit(0.1):
        pass
    time.sleep(0.15)  # the alarm is off


# ---- the run


@pytest.fixture
def counting_section(monkeypatch):
    """A section with two rows whose measurements are counted; the second fails until it is repaired."""
    made = {"first": 0, "second": 0, "broken": True}

    def section(bench):
        """A title. Not this."""

        def measure(name):
            if name == "second" and made["broken"]:
                raise MemoryError
            made[name] += 1
            return {"value": made[name]}

        return {name: partial(measure, name) for name in ("first", "second")}

    monkeypatch.setitem(benchmark.SECTIONS, "tax", section)
    return made


def test_what_is_measured_is_in_the_file_at_once_and_not_measured_again(counting_section, tmp_path, capsys):
    path = tmp_path / "new" / "report.json"
    arguments = ["--architecture", "storybook", "--device", "cpu", "--output", str(path)]
    with pytest.raises(MemoryError):
        benchmark.run_section(None, "tax", benchmark.parse_args(arguments).report, path)
    assert json.loads(path.read_text())["sections"]["tax"].keys() == {"first"}
    counting_section["broken"] = False
    benchmark.run_section(None, "tax", benchmark.parse_args(arguments).report, path)
    assert (counting_section["first"], counting_section["second"]) == (1, 1)
    report = json.loads(path.read_text())
    assert report["sections"]["tax"]["second"]["value"] == 1
    assert {"at", "in_seconds"} == report["sections"]["tax"]["second"]["done"].keys()
    assert report["hardware"]["cpu"] and report["versions"]["torch"] == torch.__version__
    assert "| first | 1 |" in capsys.readouterr().out
    benchmark.run_section(None, "tax", report, path, again=True, only=["second"])
    assert (counting_section["first"], counting_section["second"]) == (1, 2)


def test_a_report_of_something_else_is_not_gone_on_with(counting_section, tmp_path, capsys):
    path = tmp_path / "report.json"
    arguments = ["--architecture", "storybook", "--device", "cpu", "--output", str(path)]
    benchmark.write_report(benchmark.parse_args(arguments).report, path)
    assert benchmark.parse_args(arguments).report["sections"] == {}
    with pytest.raises(SystemExit):
        benchmark.parse_args([*arguments, "--dtype", "float32"])
    assert "has dtype bfloat16, not float32; take another file" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--sections", "speed"], "invalid choice: 'speed'"),
        (["--architecture", "sd3"], "invalid choice: 'sd3'"),
        (["--size", "100"], "--size has to be a multiple of 64, but is 100"),
        (["--architecture", "storybook", "--size", "40"], "--size has to be a multiple of 32, but is 40"),
        (["--repeats", "0"], "'0' is not a positive integer"),
        (["--sections", "laws", "--batch_sizes", "2"], "--batch_sizes has to hold two or more sizes"),
    ],
)
def test_bad_options_are_refused_before_any_work(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_defaults_are_by_device_and_architecture(tmp_path):
    on_cpu = benchmark.parse_args(["--device", "cpu", "--architecture", "sdxl"])
    assert (on_cpu.size, on_cpu.dtype, on_cpu.output.name) == (512, "bfloat16", "benchmark_sdxl_512_cpu.json")
    small = benchmark.parse_args(["--device", "cpu", "--architecture", "storybook"])
    assert (small.size, small.repeats) == (128, 20)


def test_tables_have_a_dash_where_a_row_lacks_a_value():
    rows = {"one": {"a": 1.23456, "hidden": [1]}, "two": {"b": {"median": 2.0, "low": 1.0, "high": 3.0}}}
    assert benchmark.markdown_table(rows).splitlines() == [
        "|  | a | b |",
        "| --- | --- | --- |",
        "| one | 1.235 | – |",
        "| two | – | 2 (1–3) |",
    ]
