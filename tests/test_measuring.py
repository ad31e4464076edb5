"""The real architectures with random weights: that they are the real ones, and how memory is measured."""

import pytest
import tiny_models
import torch
from muse_examples import architectures, measuring


# Of the released checkpoints: Stable Diffusion 1.5 and XL, OpenAI's CLIP ViT-L/14, TAESD, and SimEmo's tower and head.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480, "clip_model": 427_616_513},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_the_architectures_are_the_real_ones(architecture):
    for name, number in PARAMETERS[architecture].items():
        with torch.device("meta"):
            module = architectures.network_builders(architecture)[name]()
        assert sum(weight.numel() for weight in module.parameters()) == number, name


def test_random_modules_have_weights_in_place_and_work():
    clip = architectures.random_module(lambda: tiny_models.clip_model(), "cpu", torch.bfloat16)
    assert {weight.dtype for weight in clip.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad or weight.is_meta for weight in clip.parameters())
    embeddings = clip.text_model.embeddings
    assert embeddings.position_ids.flatten().tolist() == list(range(16))
    norms = [weight for name, weight in clip.named_parameters() if "norm" in name and name.endswith("weight")]
    assert norms and all(bool((weight == 1).all()) for weight in norms)


def test_memory_is_the_most_at_any_time_and_not_what_is_left():
    with measuring.measured_memory("cpu") as memory:
        block = torch.ones(2**26)  # 256 MiB
        torch.cumsum(block, 0)  # as much again
        del block
    assert 0.45 < memory.beyond < 0.6
    assert memory.peak == memory.before + memory.beyond
    assert measuring.resident() < memory.before + 0.1


def test_memory_that_was_freed_before_does_not_count():
    small = [torch.ones(2**10) for _ in range(2**16)]  # 256 MiB
    held, rest = measuring.resident(), small[::1024]
    del small  # the allocator keeps what lies between the rest
    with measuring.measured_memory("cpu") as memory:
        pass
    assert len(rest) == 64 and memory.before < held - 0.1
