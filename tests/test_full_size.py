"""The script that measures the real architectures: that they are the real ones, and that it measures what it says."""

import full_size
import pytest
import tiny_models
import torch


# Of the released checkpoints: Stable Diffusion 1.5 and XL, OpenAI's CLIP ViT-L/14, TAESD, and SimEmo's tower and head.
PARAMETERS = {
    "sd15": {"unet": 859_520_964, "vae": 83_653_863, "text_encoder": 123_060_480, "clip_model": 427_616_513},
    "sdxl": {"unet": 2_567_463_684, "vae": 83_653_863, "text_encoder": 123_060_480, "text_encoder_2": 694_659_840},
}


@pytest.mark.parametrize("architecture", PARAMETERS)
def test_the_architectures_are_the_real_ones(architecture):
    for name, number in PARAMETERS[architecture].items():
        with torch.device("meta"):
            module = full_size.network_builders(architecture)[name]()
        assert sum(weight.numel() for weight in module.parameters()) == number, name


def test_random_modules_have_weights_in_place_and_work():
    clip = full_size.random_module(lambda: tiny_models.clip_model(), "cpu", torch.bfloat16)
    assert {weight.dtype for weight in clip.parameters()} == {torch.bfloat16}
    assert not any(weight.requires_grad or weight.is_meta for weight in clip.parameters())
    embeddings = clip.text_model.embeddings
    assert embeddings.position_ids.flatten().tolist() == list(range(16))
    norms = [weight for name, weight in clip.named_parameters() if "norm" in name and name.endswith("weight")]
    assert norms and all(bool((weight == 1).all()) for weight in norms)


@pytest.mark.parametrize("preview_vae", [None, tiny_models.preview_vae()], ids=["vae", "preview_vae"])
def test_an_iteration_is_the_difference_of_two_calls(preview_vae, monkeypatch):
    pipe = tiny_models.muse_pipeline(preview_vae=preview_vae)
    seconds = iter([9.0, 2.0, 10.0])  # of the call that warms up, and of those with one and three inner steps

    class Clock(full_size.Cost):
        def __init__(self, *arguments):
            super().__init__(next(seconds), 1.5)

    class Measured:
        def __enter__(self):
            return Clock()

        def __exit__(self, *error):
            return None

    monkeypatch.setattr(full_size, "measured", lambda device: Measured())
    result = full_size.measure(pipe, 32, 2, "cpu", gradient_checkpointing=True)
    assert result == {"seconds_per_inner_iteration": 2.0, "peak_gib": 1.5}


def test_memory_is_the_most_at_any_time():
    with full_size.measured("cpu") as little:
        pass
    with full_size.measured("cpu") as much:
        block = torch.ones(2**26)  # 256 MiB
        torch.cumsum(block, 0)
        del block
    assert much.gib - little.gib > 0.2 and much.seconds > 0


def test_sizes_that_no_network_takes_are_refused(capsys):
    with pytest.raises(SystemExit):
        full_size.parse_args(["--size", "100"])
    assert "multiple of 64" in capsys.readouterr().err
