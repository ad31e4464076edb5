"""The script that computes memory with fake tensors: that it finds what a real call allocates, and where."""

import gc
import json

import memory_estimate
import pytest
import tiny_models
import torch
from muse_examples.pipelines import checkpoint_gradients
from PIL import Image


SD, XL = tiny_models.FAMILIES
MIB = 2**20


def record(pipe, offload=False, **call):
    """What a short call of a tiny pipeline allocates."""
    settings = {"prompt": "a cat", "semantic_threshold": 0, "max_inner_steps": 1, "output_type": "latent"}
    settings["generator"] = tiny_models.generator()
    return memory_estimate.record(pipe, offload, **memory_estimate.CALL | settings | call)


def weights(pipe, *names):
    """Bytes of the weights of these components, of all by default."""
    parts = memory_estimate.networks(pipe)
    tensors = [one for name in names or parts for one in memory_estimate.tensors_of(parts[name])]
    return sum(memory_estimate.nbytes(one) for one in tensors)


def fake_and_real(family, prepare=lambda pipe: pipe, **call):
    """Of fake tensors, which have no data, and of real ones, the same is counted."""
    pipe, other = (prepare(tiny_models.muse_pipeline(family)) for _ in range(2))
    gc.collect()
    gc.disable()  # else a tensor in a cycle dies in one of the two before its peak
    try:
        real = record(other, **call)
        with memory_estimate.faked(pipe):
            fake = record(pipe, **call)
    finally:
        gc.enable()
    assert fake.peak_stage == real.peak_stage == memory_estimate.INNER_LOOP
    assert fake.stages.keys() == real.stages.keys() and min(fake.stages.values()) > weights(pipe)
    tables = 0.02 * MIB  # of a scheduler, which die when Python collects garbage
    differences = [fake.stages[stage] - size for stage, size in real.stages.items()]
    assert max(map(abs, differences)) < tables
    assert {**fake.peak, "rest": 0} == {**real.peak, "rest": 0} and abs(fake.peak["rest"] - real.peak["rest"]) < tables
    return pipe, fake


def test_fake_tensors_allocate_what_real_ones_do_in_an_edit_by_chunks():
    sources = {"prompt": ["a cat", "a dog"], "image": Image.new("RGB", (32, 32), "teal")}
    _, edit = fake_and_real(SD, max_inner_batch=1, degraded_copies=0, **sources)
    assert {"text encoding", "encoding", "noise", "gate", "decoding", "inner loop"} <= edit.stages.keys()


def test_degraded_copies_are_of_a_size_that_chance_decides():
    """A blurred copy is smaller for a while, by a random share, so fake and real tensors agree nearly."""
    pipe, real = tiny_models.muse_pipeline(SD), record(tiny_models.muse_pipeline(SD), degraded_copies=2)
    plain = record(tiny_models.muse_pipeline(SD), degraded_copies=0)
    with memory_estimate.faked(pipe):
        fake = record(pipe, degraded_copies=2)
    assert fake.peak.total() > plain.peak.total()
    assert fake.peak.total() == pytest.approx(real.peak.total(), rel=0.02)


def test_fake_tensors_allocate_what_real_ones_do_where_xl_checkpoints_and_decodes_in_float32():
    def prepare(pipe):
        checkpoint_gradients(pipe)
        return pipe.to(torch.float16)

    pipe, fake = fake_and_real(XL, prepare)
    assert fake.peak["weights"] > weights(pipe) + weights(pipe, "vae") / 2


def test_a_call_gives_back_all_but_its_result(pipe):
    allocations = record(pipe)
    assert allocations.live["weights"] == weights(pipe)
    assert {"text_encoder", "unet", "vae", "emotion_classifier", "backward"} <= allocations.live.keys()
    assert max(live.total() for _, live in allocations.timeline) == allocations.peak.total()
    assert 0 <= allocations.live.total() - weights(pipe) < 0.02 * MIB < allocations.peak.total() - weights(pipe)


def test_storages_count_once_in_blocks_of_the_allocator_until_they_die():
    with memory_estimate.Allocations() as allocations:
        one = torch.ones(100)
        view = one[50:]
        assert allocations.live == {"rest": 512}
        del one
        assert allocations.live == {"rest": 512}
        allocations.begin("later")
        with allocations.owned_by("other"):
            two = view + 1
            del view
        assert allocations.live == {"rest": 0, "other": 512}
        del two
    assert allocations.peak == {"rest": 512, "other": 512} and allocations.peak_stage == "later"
    assert allocations.stages["later"] == 1024 and allocations.live.total() == 0


def test_offloaded_weights_count_while_they_are_on_the_device(pipe):
    allocations = record(pipe, offload=True)  # CLIP never comes: the gate's threshold is 0
    assert allocations.peak["weights"] == weights(pipe, "unet", "vae", "emotion_classifier")
    assert weights(pipe, "text_encoder") < allocations.stages["text encoding"] < weights(pipe)


def test_an_estimate_names_stage_and_parts_of_the_peak():
    result = memory_estimate.estimate("sd15", 512, torch.float16, max_inner_steps=1)
    assert result["weights_gib"]["unet"] == pytest.approx(859_520_964 * 2 / 2**30, abs=2e-3)
    assert result["peak_stage"] == "inner loop"
    assert result["peak_gib"] == result["stages_gib"]["inner loop"] < memory_estimate.GOALS_GIB["sd15"]
    assert result["peak_gib"] == pytest.approx(sum(result["parts_gib"].values()), abs=5e-3)
    matrices = 5 * 8 * (64 * 64) ** 2 * 2 / 2**30  # of the 5 layers with 8 heads on 64 x 64 latents, were they kept
    assert result["parts_gib"]["vae"] > result["parts_gib"]["unet"] > 0.5 and result["parts_gib"]["unet"] < matrices


def test_the_script_writes_a_table_and_a_picture(tmp_path, monkeypatch, capsys):
    def tiny(architecture, device, dtype, with_preview_vae):
        decoder = tiny_models.preview_vae() if with_preview_vae else None
        return tiny_models.muse_pipeline(preview_vae=decoder).to(dtype)

    output = tmp_path / "memory.json"
    options = ["preview_vae", "zero-shot CLIP"]
    arguments = ["--architecture", "sd15", "--size", "64", "--output", str(output), "--options", *options]
    monkeypatch.setattr(memory_estimate, "build_pipeline", tiny)
    monkeypatch.setattr("sys.argv", ["memory_estimate.py", *arguments])
    memory_estimate.main()
    report = json.loads(output.read_text())
    assert report["note"] == memory_estimate.NOTE and list(report["options"]) == options
    assert "preview_vae" in report["options"]["preview_vae"]["weights_gib"]
    zero_shot = report["options"]["zero-shot CLIP"]
    assert "emotion_classifier" not in zero_shot["weights_gib"] and zero_shot["peak_stage"] == "inner loop"
    assert output.with_suffix(".png").stat().st_size > 1000
    assert memory_estimate.NOTE in capsys.readouterr().out


def test_what_is_drawn_is_never_nothing():
    assert memory_estimate.drawn({"zero-shot CLIP": 1, "plain": 2}) == {"plain": 2}
    assert memory_estimate.drawn({"zero-shot CLIP": 1}) == {"zero-shot CLIP": 1}


def test_bad_sizes_are_refused(capsys):
    with pytest.raises(SystemExit):
        memory_estimate.parse_args(["--size", "100"])
    assert "multiple of 64" in capsys.readouterr().err
