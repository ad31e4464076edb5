"""What the model card says of the bundled weights, on a few images; the whole table is `evaluate.py`'s."""

import inspect
import json
import random
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import tiny_models
import torch
from diffusers import DiffusionPipeline, StableDiffusionXLPipeline
from diffusers.pipelines.pipeline_loading_utils import variant_compatible_siblings
from PIL import Image

from pipeline_muse import GuidanceSettings, MusePipeline, PixelSpec


STORYBOOK = tiny_models.REPOSITORY / "examples" / "storybook"
WEIGHT_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
EMOTIONS = ["amusement", "awe", "anger", "sadness"]
STEPS = {"num_inference_steps": 12}
GUIDED = {**STEPS, "preset": "fast", "semantic_threshold": 0}
sys.path.append(str(STORYBOOK))


@pytest.fixture(scope="module")
def pipe() -> DiffusionPipeline:
    return tiny_models.storybook()


@pytest.fixture(scope="module")
def judge(pipe):
    """The probability that the judge Emo-B, which never guides, gives to each of `EMOTIONS`, image by image."""
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
    return pipe(prompts, generator=generators, output_type="pt", **{**STEPS, **call}).images


@pytest.fixture(scope="module")
def guided(pipe, judge) -> torch.Tensor:
    """What the judge sees in images that were each guided towards one of `EMOTIONS`."""
    return judge(images_of(pipe, emotion=EMOTIONS, **GUIDED))


def test_a_judge_that_did_not_guide_sees_the_emotions_the_stronger_the_more(pipe, judge, guided):
    stock = judge(images_of(pipe)).diagonal()
    weak = judge(images_of(pipe, emotion=EMOTIONS, emotion_strength=0.3, **GUIDED)).diagonal()
    strong = guided.diagonal()
    assert stock.mean() < 0.4
    assert strong.mean() > stock.mean() + 0.3
    assert stock.mean() < weak.mean() < strong.mean() and (stock < strong).all()


def test_a_mixture_is_judged_as_a_mixture(pipe, judge, guided):
    first, last = 0, 3  # amusement and sadness
    emotion = {EMOTIONS[first]: 0.5, EMOTIONS[last]: 0.5}
    mixed = judge(images_of(pipe, 1, emotion=emotion, **GUIDED))[0]
    some = mixed[first] - guided[last, first], mixed[last] - guided[first, last]
    assert min(some) > 0.05, "some of each, where one alone has none"
    assert mixed[first] < guided[first, first] and mixed[last] < guided[last, last]


def test_the_gate_opens_at_the_first_preview_that_resembles_the_prompt(pipe):
    threshold = pipe.config.semantic_threshold
    generator = torch.Generator().manual_seed(0)
    call = {"emotion": "awe", "max_inner_steps": 0, "num_inference_steps": 20, "latest_start": 1.0}
    trace = pipe("a horse in the forest", generator=generator, **call).trace[0]
    assert trace.gate_step > 0, "noise does not resemble a horse"
    assert len(trace.similarity) == trace.gate_step + 1
    assert max(trace.similarity[:-1]) < threshold <= trace.similarity[-1]


def test_a_closed_gate_retraces_the_picture_that_is_edited(pipe):
    source = images_of(pipe)[:1]
    call = {"image": source, "emotion": "anger", "semantic_threshold": float("inf"), "output_type": "pt"}
    edited = pipe("a house in the park", negative_prompt="a house in the park", **call, **STEPS).images
    decoded = pipe.vae(source * 2 - 1).sample / 2 + 0.5  # what the autoencoder alone makes of it
    assert (edited - decoded).abs().mean() < 0.05


def test_the_checkpoint_is_small_and_the_judges_are_no_part_of_it():
    weights = list(tiny_models.REPOSITORY.glob("*/*.safetensors"))
    assert {path.name for path in weights} <= set(WEIGHT_NAMES)
    assert sum(path.stat().st_size for path in weights) < 60e6
    examples = [path for path in STORYBOOK.parent.rglob("*") if path.is_file()]
    assert {path.parent.name for path in examples if path.suffix == ".safetensors"} == {"judges", "xl", "fast"}
    names = [path.relative_to(tiny_models.REPOSITORY).as_posix() for path in weights + examples]
    fetched, _ = variant_compatible_siblings(names)  # what diffusers downloads of a repository
    assert {name.split("/")[0] for name in fetched} == {path.parent.name for path in weights}, "none of the examples"


@pytest.fixture(scope="module")
def xl(xl_folder) -> DiffusionPipeline:
    return tiny_models.storybook(xl_folder)


def test_the_xl_checkpoint_is_small_and_made_of_shared_parts_and_its_own(xl_folder, xl):
    assert type(xl).__name__ == "MuseXLPipeline"
    parts = list((STORYBOOK / "xl").glob("*.safetensors"))
    assert {path.stem for path in parts} == {"unet", "text_encoder", "text_encoder_2"}
    assert sum(path.stat().st_size for path in parts) < 45e6
    assert sum(path.stat().st_size for path in xl_folder.rglob("*.safetensors")) < 60e6
    index = json.loads((xl_folder / "model_index.json").read_text())
    components = {name for name, value in index.items() if isinstance(value, list) and value[0] and name[0] != "_"}
    assert components == {path.name for path in xl_folder.iterdir() if path.is_dir()}


def test_the_xl_checkpoint_never_overwrites_another_one(tmp_path):
    from assemble_xl import assemble

    index = tmp_path / "model_index.json"
    index.write_text((tiny_models.REPOSITORY / "model_index.json").read_text())
    with pytest.raises(ValueError, match="another checkpoint"):
        assemble(tmp_path)
    assert list(tmp_path.iterdir()) == [index]


def test_a_judge_that_did_not_guide_sees_the_emotions_of_xl(xl, judge):
    quick = {"num_inference_steps": 8}
    stock = judge(images_of(xl, **quick)).diagonal()
    guided = judge(images_of(xl, emotion=EMOTIONS, **{**GUIDED, **quick})).diagonal()
    assert stock.mean() < 0.4
    assert guided.mean() > stock.mean() + 0.3


def test_xl_knows_that_pictures_were_small(xl):
    """The added conditioning was trained: what has been enlarged is soft."""
    plain = StableDiffusionXLPipeline.from_pipe(xl)
    plain.set_progress_bar_config(disable=True)

    def edges(**call) -> torch.Tensor:
        generators = [torch.Generator().manual_seed(seed) for seed in range(4)]
        prompts = ["a house in the park"] * len(generators)
        images = plain(prompts, generator=generators, num_inference_steps=8, output_type="pt", **call).images
        return images.diff(dim=-1).abs().mean() + images.diff(dim=-2).abs().mean()

    assert edges(original_size=(32, 32)) < 0.95 * edges()


def test_xl_is_trained_on_what_the_pipeline_gives_it(xl):
    from train_unet import ConditionsXL

    encoders = (xl.tokenizer, xl.text_encoder, xl.tokenizer_2, xl.text_encoder_2)
    conditions = ConditionsXL(*encoders, "cpu", word_share=0.5)
    states, pooled = conditions.encoded(conditions.ids(["a cat in the park"]))
    with torch.no_grad():
        given, null, given_pooled, null_pooled = xl.encode_prompt("a cat in the park", device="cpu")
    assert torch.equal(states, given) and torch.equal(pooled, given_pooled)
    assert not null.any() and not null_pooled.any(), "the null prompt is zero"


def test_the_xl_network_starts_as_the_one_that_it_grows_from():
    from train_unet import build_unet, grow

    torch.manual_seed(0)
    wide_states = torch.randn(200, 20)
    states = wide_states @ torch.randn(20, 8)  # a linear map is to be found, whatever it is
    added = {"addition_embed_type": "text_time", "addition_time_embed_dim": 4}
    added |= {"projection_class_embeddings_input_dim": 6 * 4 + 5, "use_linear_projection": True}
    small = build_unet(16, 1, cross_attention_dim=8)
    large = build_unet(16, 1, cross_attention_dim=20, **added)
    grow(small, large, states, wide_states)
    noisy = torch.randn(2, small.config.in_channels, 16, 16)
    conditions = {"text_embeds": torch.randn(2, 5), "time_ids": torch.tensor([[64, 64, 0, 0, 64, 64]] * 2)}
    with torch.no_grad():
        expected = small(noisy, 500, states[:6].view(2, 3, 8)).sample
        grown = large(noisy, 500, wide_states[:6].view(2, 3, 20), added_cond_kwargs=conditions).sample
    torch.testing.assert_close(grown, expected, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("seed", range(6))
def test_time_ids_tell_what_was_done_to_a_picture(seed):
    """On a ramp every pixel says where it came from."""
    import numpy as np
    from common import SIZE
    from train_unet import varied, varied_time_ids

    ramp = np.linspace(0, 255, SIZE)
    picture = np.stack(np.broadcast_arrays(ramp[:, None], ramp[None], 0.0), axis=-1).round().astype(np.uint8)
    shown, (height, width, top, left, *target) = varied(picture, seed), varied_time_ids(seed)
    assert shown.shape == picture.shape and target == [SIZE, SIZE] and height == width
    if height < SIZE:
        assert (top, left) == (0, 0)
        assert np.abs(shown.astype(float) - picture).mean() < 6, "nothing has moved"
    else:
        share = (shown[..., 0].max() - float(shown[..., 0].min())) / 255  # of the ramp that is left
        size = SIZE / share
        assert abs(shown[0, 0, 0] / 255 * size - top) < 3 and abs(shown[0, 0, 1] / 255 * size - left) < 3


def test_the_tokenizer_can_be_built_again(tmp_path):
    from common import build_tokenizer
    from world import vocabulary

    first, second = (build_tokenizer(tmp_path / name) for name in ("first", "second"))
    assert first.get_vocab() == second.get_vocab()
    assert all(len(first.tokenize(word)) == 1 for word in vocabulary())


@pytest.mark.parametrize("kind", ["AdamW", "Muon"])
def test_a_resumed_training_ends_as_an_unbroken_one(tmp_path, kind):
    from common import Muon, load_checkpoint, save_checkpoint

    def new() -> dict:
        torch.manual_seed(0)
        model = torch.nn.Linear(12, 10)
        adam = torch.optim.AdamW(model.parameters(), lr=0.1)
        return {"model": model, "optimizer": adam if kind == "AdamW" else Muon(model, lr=0.1)}

    def train(parts: dict, steps: range) -> None:
        for step in steps:
            inputs = torch.randn(4, 12, generator=torch.Generator().manual_seed(step))
            parts["optimizer"].zero_grad()
            parts["model"](inputs).square().sum().backward()
            parts["optimizer"].step()

    unbroken, first, second = new(), new(), new()
    train(unbroken, range(6))
    train(first, range(3))
    save_checkpoint(tmp_path / "a.checkpoint", 3, **first)
    train(second, range(load_checkpoint(tmp_path / "a.checkpoint", **second), 6))
    assert torch.equal(second["model"].weight, unbroken["model"].weight)
    assert torch.equal(second["model"].bias, unbroken["model"].bias)


@pytest.mark.parametrize("shape", [(16, 16), (16, 90), (90, 16)])
def test_muon_brings_all_singular_values_near_one(shape):
    from common import orthogonal

    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonal(torch.randn(shape)))
    assert 0.6 < values.min() and values.max() < 1.25


def test_halves_of_a_batch_give_the_gradient_of_the_whole():
    from common import Halves

    torch.manual_seed(0)
    model, inputs, threads = torch.nn.Linear(3, 2), torch.randn(5, 3), torch.get_num_threads()
    try:
        loss = Halves("cpu", len(inputs)).descend(lambda part: model(inputs[part]).square().sum() / 1000, model, model)
    finally:
        torch.set_num_threads(threads)
    whole = model(inputs).square().sum() / 1000
    assert loss == pytest.approx(whole.item())
    torch.testing.assert_close(model.weight.grad, torch.autograd.grad(whole, model.weight)[0])


def test_the_learning_rate_holds_and_falls():
    from common import held_learning_rate

    rates = [held_learning_rate(step, 1000, 2.0, warmup=10) for step in range(1000)]
    assert rates[0] == 0.2 and rates[9:801] == [2.0] * 792
    assert rates[801:] == sorted(rates[801:], reverse=True) and rates[-1] == pytest.approx(0.04)


@pytest.fixture
def small_world(tmp_path, monkeypatch) -> Path:
    """A work folder for a world of a few scenes, with an untrained tiny autoencoder, and the root's CLIP."""
    import common
    from rebuild import COPIED, keep
    from train_vae import build_vae

    for name in ("world", "world_held_out"):
        monkeypatch.setitem(common.SETS, name, (6, *common.SETS[name][1:]))
    keep(tmp_path, COPIED)
    torch.manual_seed(0)
    build_vae((8, 8, 8, 8)).save_pretrained(tmp_path / "vae")
    return tmp_path


def run(monkeypatch, module, *options: str):
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "argv", [module.__name__, *options])
    try:
        module.main()
    finally:
        torch.set_num_threads(threads)


def test_latents_are_encoded_when_they_are_first_asked_for(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    import numpy as np
    from train_unet import Latents
    from train_vae import build_vae

    torch.manual_seed(0)
    vae, pictures = build_vae((8, 8, 8, 8)), np.random.default_rng(0).integers(0, 256, (3, 128, 128, 3), np.uint8)
    with ThreadPoolExecutor(2) as pool:
        latents = Latents(tmp_path / "latents.npy", vae, pictures, pool)
        first = latents[[2, 0, 2, 4]]
        assert first.shape == (4, 8, 16, 16) and first.isfinite().all()
        assert torch.equal(first[0], first[2]) and not torch.equal(first[0], first[1])
        assert np.isnan(latents.stored[1]).all(), "nobody asked"
        latents.encode = None
        again = Latents(tmp_path / "latents.npy", None, None, pool)
        assert torch.equal(again[[0, 2, 4]], first[[1, 0, 3]]), "kept"
        together = Latents(tmp_path / "together.npy", vae, pictures, pool)
        together.encode([0, 2, 4], [together.picture(index) for index in (0, 2, 4)])
        torch.testing.assert_close(together[[2, 0, 2, 4]], first, rtol=0, atol=2e-3)


def test_the_stages_that_are_long_go_on_as_if_never_interrupted(small_world, monkeypatch):
    import train_unet
    import train_vae
    from safetensors.torch import load_file

    tiny_vae = train_vae.build_vae((8, 8, 8, 8))
    monkeypatch.setattr(train_vae, "build_vae", lambda: tiny_vae)
    monkeypatch.setattr(train_vae, "SHOWN", 2)
    monkeypatch.setattr(train_unet, "validation_prompts", lambda: ["a cat in the park"])
    options = ("--work_dir", str(small_world), "--batch_size", "4", "--save_minutes", "0", "--resume", "--steps")
    run(monkeypatch, train_vae, *options, "2")
    assert json.loads((small_world / "vae_log.json").read_text())["step"] == 2

    def weights(*folders: str) -> dict[str, torch.Tensor]:
        files = [file for folder in folders for file in (small_world / folder).glob("*.safetensors")]
        return {f"{file.parent.name}.{name}": value for file in files for name, value in load_file(file).items()}

    before = weights("vae")
    run(monkeypatch, train_vae, "--decoder", *options, "2")
    same = {name.split(".")[1] for name, value in weights("vae").items() if torch.equal(value, before[name])}
    assert same == {"encoder", "quant_conv"}, "latents stay what they are"

    options = ("--width", "8", *options)
    run(monkeypatch, train_unet, *options, "2")
    unbroken = weights("unet", "text_encoder")
    untrained = load_file(tiny_models.REPOSITORY / "clip_model" / "model.safetensors")
    table = "text_model.embeddings.token_embedding.weight"
    trained = next(value for name, value in unbroken.items() if name.endswith("token_embedding.weight"))
    assert not torch.equal(trained, untrained[table].float()), "the text encoder is trained along"
    (small_world / "unet.checkpoint").unlink()
    monkeypatch.setattr(train_unet, "held_learning_rate", lambda step, steps, peak: peak / 200 * (step + 1))
    run(monkeypatch, train_unet, *options, "1")
    run(monkeypatch, train_unet, *options, "2")
    assert all(torch.equal(value, unbroken[name]) for name, value in weights("unet", "text_encoder").items())

    # Trained further: weights that are there, and a rate that leaves them as they are
    for name in ("unet", "text_encoder"):
        (small_world / name).rename(small_world / f"{name}_initial")
    (small_world / "unet.checkpoint").unlink()
    monkeypatch.setattr(train_unet, "held_learning_rate", lambda step, steps, peak: 0.0)
    run(monkeypatch, train_unet, "--initial", "unet_initial", *options, "1")
    assert all(torch.equal(value, unbroken[name]) for name, value in weights("unet", "text_encoder").items())


def test_a_rebuild_runs_what_is_missing_and_keeps_what_it_should(tmp_path, monkeypatch):
    import rebuild

    ran = []
    monkeypatch.setattr(rebuild, "run", lambda stage, *options: ran.append((stage, options)))
    options = ("--work_dir", str(tmp_path), "--export_to", str(tmp_path / "export"), "--device", "cpu")
    run(monkeypatch, rebuild, *options, "--keep", "--steps", "7")
    assert [stage for stage, _ in ran] == [
        "train_vae.py",
        "train_unet.py --steps 7",
        rebuild.TRAINED["vae_decoder"][0],
        "calibrate.py",
        "export.py",
        "check.py",
    ]
    assert all({"--resume", "--device"} <= set(given) for _, given in ran[:3])
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {
        "tokenizer",
        "guide",
        "clip_model",
        "clip_tuned",
    }
    del ran[:]
    run(monkeypatch, rebuild, *options, "--keep", "--steps", "9")
    assert [stage for stage, _ in ran][:2] == ["train_unet.py --steps 9", "calibrate.py"], "more steps: it goes on"
    del ran[:]
    run(monkeypatch, rebuild, *options, "--steps", "9", "--xl")
    stages = [stage.split()[0] for stage, _ in ran]
    assert (
        stages.count("train_clip.py") == 5
        and stages.count("train_classifier.py") == 3
        and "train_vae.py" not in stages
    )
    with pytest.raises(SystemExit):
        run(monkeypatch, rebuild, *options, "--further")


def test_the_diffusion_model_of_the_repository_is_trained_further(tmp_path, monkeypatch):
    import rebuild

    ran = []
    monkeypatch.setattr(rebuild, "run", lambda stage, *options: ran.append(stage))
    run(monkeypatch, rebuild, "--work_dir", str(tmp_path), "--further", "--steps", "7")
    further = "train_unet.py --steps 7 --initial unet_initial --seed 1"
    assert ran == [further, "calibrate.py", "export.py", "check.py"]
    with pytest.raises(SystemExit):
        run(monkeypatch, rebuild, "--work_dir", str(tmp_path), "--keep")
    for name, copied in (("unet", "unet_initial"), ("text_encoder", "text_encoder_initial"), ("vae", "vae")):
        (weights,) = (tmp_path / copied).glob("*.safetensors")
        assert weights.read_bytes() == (tiny_models.REPOSITORY / name / weights.name).read_bytes()


def test_stages_at_once_wait_for_what_they_build_on(tmp_path, monkeypatch):
    import rebuild

    done, given = set(), {}

    def pretend(command: str, *_: str):
        name = next((name for name in stages if command.startswith(stages[name][0])), None)
        if name is None:
            return done.update({"last"})
        given[name] = command
        assert set(stages[name][1]) <= done, f"{name} began too early"
        if name == fails:
            raise RuntimeError("no room")
        done.add(name)

    # The longest command first, as some begin as others do
    every = rebuild.TRAINED | rebuild.TRAINED_XL
    stages = dict(sorted(every.items(), key=lambda stage: -len(stage[1][0])))
    monkeypatch.setattr(rebuild, "run", pretend)
    options = ("--work_dir", str(tmp_path), "--xl", "--large", "--jobs", "4")
    fails = "vae"
    with pytest.raises(RuntimeError, match="no room"):
        run(monkeypatch, rebuild, *options)
    assert "clip_model" in done and not {"unet", "unet_xl", "last"} & done
    fails = None
    run(monkeypatch, rebuild, *options)
    assert {*every, "last"} <= done
    assert given["unet"] == f"train_unet.py {rebuild.LARGE['unet']}"


def test_what_is_drawn_ahead_is_what_is_drawn():
    import numpy as np
    from common import drawn_ahead, numbers_of

    def draw(step: int) -> np.ndarray:
        return numbers_of(0, step).integers(1000, size=5)

    ahead, at_once = (list(drawn_ahead(draw, 2, 7, device)) for device in ("cuda", "cpu"))
    assert len(ahead) == 5 and all(np.array_equal(*pair) for pair in zip(ahead, at_once))
    assert np.array_equal(ahead[0], draw(2)) and not np.array_equal(ahead[0], ahead[1])


def test_muon_takes_matrices_of_a_shape_together():
    from common import Muon

    torch.manual_seed(0)
    together, apart = (torch.nn.Sequential(torch.nn.Linear(12, 12), torch.nn.Linear(12, 12)) for _ in range(2))
    apart.load_state_dict(together.state_dict())
    for model in (together, apart):
        optimizer = Muon(model, lr=0.1)
        if model is together:
            optimizer.groups = [[parameter for group in optimizer.groups for parameter in group]]
        model(torch.ones(3, 12)).square().sum().backward()
        optimizer.step()
    for ours, theirs in zip(together.parameters(), apart.parameters()):
        torch.testing.assert_close(ours, theirs)


def test_wrong_captions_swap_one_thing_and_cues_for_those_of_the_same_emotions():
    from common import scene_of
    from train_clip import COMPANIONS, captions_of, one_word_off, pairs_of, parts_of
    from transformers import CLIPTokenizer
    from world import Scene

    scene, rng = Scene("park", "cat", "grey", cues=(("flags", 0.9),)), random.Random(0)
    others = [one_word_off(scene, rng, "full") for _ in range(400)]
    parts = ("place", "subject", "colour", "cues")
    assert all(sum(getattr(other, part) != getattr(scene, part) for part in parts) == 1 for other in others)
    cues = [other.cues[0][0] for other in others if other.cues != scene.cues]
    assert 160 < len(cues) < 240 and "balloons" in COMPANIONS["flags"] and "fire" not in COMPANIONS["flags"]
    assert len(cues) / 2 < sum(cue in COMPANIONS["flags"] for cue in cues)
    assert all(other.cues == scene.cues for other in (one_word_off(scene, rng, "content") for _ in range(50)))

    scenes = [scene_of("world", index) for index in range(24)]
    texts, kinds, wrong = captions_of(scenes, random.Random(1))
    tokenizer = CLIPTokenizer.from_pretrained(tiny_models.REPOSITORY / "tokenizer")
    pairs = pairs_of(scenes, tokenizer, random.Random(1))
    assert len(pairs["ids"]) == len(texts) + len(wrong) + 64
    assert not pairs["also_true"][:, : len(texts)].diagonal().any()
    same = [[negative == texts[k // 2] for k, negative in enumerate(wrong)]] * len(scenes)
    assert pairs["also_true"][:, len(texts) :].tolist() == same
    named = [sum(parts_of(*told)) for told in zip(scenes, texts, kinds)]
    assert pairs["parts"][24:].sum(1).tolist() == named and "content" in kinds
    assert {total for total, kind in zip(named, kinds) if kind == "content"} == {2}, "a place and a subject"


def test_tokens_behind_the_prompt_are_cues_padding_or_noise(pipe):
    from train_unet import Conditions
    from world import CUE_PHRASES, Scene

    conditions = Conditions(pipe.tokenizer, pipe.text_encoder, "cpu", word_share=0.0)
    scene, rng = Scene("park", "cat", "grey", cues=(("flags", 0.4),)), random.Random(0)
    tokens = [conditions.extra_tokens(scene, 8, True, rng) for _ in range(40)]
    rows = {row for phrase in conditions.phrases["flags"] for row in phrase}
    shares = {share for token in tokens for _, row, share, _ in token if row in rows}
    assert all(len(token) == 8 for token in tokens) and shares == {0.5, 1.0}, "as strong as the cue, or whole"
    assert all(row in rows or share == 0 for token in tokens for _, row, share, _ in token)

    drawn = {"ids": conditions.ids(["a cat in the park"]), "mixed": [], "null": [], "noise": torch.zeros(1, 1, 1)}
    last = conditions.phrases["flags"][0][-1]
    drawn["extra"] = torch.tensor([[(1, last, 1.0, 0), (1, last, 0.5, 0), (1, 0, 0, 0), (0, 0, 0, 1)]])
    with torch.no_grad():
        states, pooled = conditions.states(drawn, torch.Generator().manual_seed(0))
    phrase = conditions.hidden([CUE_PHRASES["flags"][0]])[0]
    end = int((conditions.ids([CUE_PHRASES["flags"][0]])[0] == pipe.tokenizer.eos_token_id).int().argmax())
    torch.testing.assert_close(states[0, 32], phrase[end])
    torch.testing.assert_close(states[0, 33], (phrase[end] + conditions.padding) / 2)
    torch.testing.assert_close(states[0, 34], conditions.padding)
    assert states[0, 35].std() == pytest.approx(conditions.std, rel=0.3) and pooled.shape == (1, 0)


def test_a_clip_that_is_trained_further_keeps_the_tokenizer_that_it_knows(small_world, monkeypatch):
    import train_clip

    file = small_world / "tokenizer" / "tokenizer.json"
    before = file.read_bytes()
    options = ("--initial", "clip_model", "--output", "on", "--steps", "1", "--batch_size", "2")
    run(monkeypatch, train_clip, "--work_dir", str(small_world), *options)
    assert file.read_bytes() == before and (small_world / "on" / "model.safetensors").exists()


def test_an_exported_xl_network_leaves_nothing_that_it_was_not_trained_on(small_world, tmp_path):
    from export import export_xl
    from train_unet import build_unet

    build_unet(8, 1).save_pretrained(small_world / "unet_xl")
    (small_world / "clip_model").rename(small_world / "clip_xl")
    folder = tmp_path / "xl"
    folder.mkdir()
    for name in ("vae.json", "vae.safetensors", "text_encoder.json", "text_encoder.safetensors"):
        (folder / name).touch()
    export_xl(small_world, folder)
    assert {path.name for path in folder.iterdir()} == {"index.json"} | {
        f"{part}.{kind}" for part in ("unet", "text_encoder_2") for kind in ("json", "safetensors")
    }


def test_drawings_show_the_cue_that_a_prompt_names():
    from check import drawn, normalise, pixels_of
    from judges import load_judge
    from world import CUES, EMOTIONS

    rng = random.Random(0)
    images = [drawn("park", "house", rng, 64, phrase) for emotion in ("awe", "anger") for phrase in CUES[emotion]]
    with torch.no_grad():
        answers = load_judge("emo_b")(normalise(pixels_of(images, "cpu"))).logits.argmax(1).tolist()
    truth = [EMOTIONS.index(emotion) for emotion in ("awe", "anger") for _ in CUES[emotion]]
    assert sum(answer == true for answer, true in zip(answers, truth)) > 0.7 * len(truth)
    assert drawn("park", "house", random.Random(0), 64) == drawn("park", "house", random.Random(0), 64)


def test_the_frechet_distance_is_that_of_gaussians():
    from common import frechet_distance

    torch.manual_seed(0)
    features = torch.randn(4000, 3, dtype=torch.double)
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(features, features + 2) == pytest.approx(12)
    assert frechet_distance(features, 3 * features) == pytest.approx(4 * features.var(0).sum().item(), rel=1e-2)


def test_samples_lie_between_the_drawings_where_the_sheet_says():
    from check import mixed_sheet

    drawings, samples = ([Image.new("RGB", (8, 8), colour)] * 10 for colour in ("black", "red"))
    sheet, places = mixed_sheet(drawings, samples)
    shown = [sheet.getpixel((4 + 12 * (k % 5) + 4, 4 + 12 * (k // 5) + 4))[0] > 128 for k in range(20)]
    assert [k + 1 for k, red in enumerate(shown) if red] == places and len(places) == 10


# ---- the frontier of accuracy against time -------------------------------------------------------------------------


@pytest.fixture
def frontier():
    import frontier

    return frontier


def test_the_frontier_is_what_nothing_beats_in_both(frontier):
    points = {"slow": (3.0, 70.0), "fast": (1.0, 60.0), "worse": (2.0, 55.0), "no better": (3.5, 70.0)}
    points["best"] = (9.0, 80.0)
    assert frontier.frontier(points) == [(1.0, 60.0), (3.0, 70.0), (9.0, 80.0)]


def test_rows_of_the_frontier_are_calls_of_the_pipeline(frontier):
    rows = frontier.rows()
    assert len({row.name for row in rows}) == len(rows)
    arguments = inspect.signature(MusePipeline.__call__).parameters
    settings = {part.name for part in fields(GuidanceSettings)}
    assert all(row.changes.keys() <= arguments.keys() and row.preset in (None, *MusePipeline.presets) for row in rows)
    for row in rows:  # in range, too
        GuidanceSettings(**{name: value for name, value in row.changes.items() if name in settings})


def test_the_frontier_reads_the_tables_of_the_evaluation(frontier, tmp_path):
    from muse_examples.evaluation.measures import Estimate
    from muse_examples.evaluation.tables import Column, percent_column, write_table

    columns = [percent_column("Emo-B"), percent_column("Emo-B degraded"), Column("CLIP"), Column("seconds", digits=2)]
    columns.insert(1, percent_column("Emo-C"))
    stock = {"Emo-B": Estimate(0.125, 0.1, 0.2), "Emo-C": 0.25, "Emo-B degraded": 0.5, "CLIP": 63.4, "seconds": 0.5}
    full = {"Emo-B": Estimate(0.75, 0.6, 0.9), "Emo-C": 0.5, "Emo-B degraded": 0.6, "CLIP": 57.0, "seconds": 2.0}
    write_table({"stock": stock, "full": full}, columns, tmp_path / "methods")
    table = frontier.read_table(tmp_path / frontier.TABLE)
    assert frontier.column(table, "Emo-B") == {"stock": 12.5, "full": 75}
    assert frontier.times_stock(table) == {"stock": 1, "full": 4}
    assert frontier.report(table).splitlines()[-1] == "| full | 75.0 | 50.0 | 57.0 | 4.00 |"

    (tmp_path / "methods.md").write_text("Made on this.\n\n| method |\n")
    args = frontier.argparse.Namespace(output_dir=tmp_path, results_dir=tmp_path / "results")
    frontier.publish(args, tmp_path / frontier.TABLE, "frontier", frontier.report, frontier.plot)
    told = (args.results_dir / "frontier.md").read_text()
    assert told == f"Made on this.\n\n{frontier.report(table)}", "where and how it was made is told"
    assert (args.results_dir / "frontier.png").stat().st_size > 0


def test_edits_that_the_world_draws_change_nothing_but_cues():
    from edit_frontier import DRAWN, drawn_edits
    from test_sets import scenes
    from world import EMOTIONS, render

    sources = [scene for scene in scenes("edit", 2, [None]) for _ in EMOTIONS]
    edits = [drawn_edits(2, strength) for strength in DRAWN]
    for weak, strong, source in zip(edits[0], edits[-1], sources):
        assert weak.cues[0][0] == strong.cues[0][0] and weak.cues[0][1] < strong.cues[0][1], "the same cue, more of it"
        without = replace(strong, cues=(), emotion=None, strength=0.0)
        assert render(without).tobytes() == render(source).tobytes() != render(strong).tobytes()


def test_the_frontier_of_edits_shows_the_worlds_own(tmp_path):
    import edit_frontier

    rows = [edit_frontier.WORLD.format(f"{strength:g}") for strength in edit_frontier.DRAWN]
    rows += [edit_frontier.name_of(strength, share) for strength in edit_frontier.STRENGTHS
             for share in edit_frontier.EMOTION_STRENGTHS]  # fmt: skip
    table = {row: dict.fromkeys(edit_frontier.COLUMNS, 50.0) | {"image similarity": 0.9} for row in rows}
    edit_frontier.plot(table, tmp_path / "edit_frontier.png")
    assert (tmp_path / "edit_frontier.png").stat().st_size > 0
    assert edit_frontier.report(table).splitlines()[2] == f"| {rows[0]} | 50.0 | 50.0 | 50.0 | 50.0 | 0.90 |"


def test_prompts_of_the_library_are_not_those_that_rows_are_measured_on(frontier):
    from test_sets import prompts

    of_library = set(frontier.library_prompts())
    assert len(prompts(62)) == len(set(prompts(62))) == 62
    assert len(of_library) == 4 and not of_library & set(prompts(24))


def test_the_small_decoder_makes_the_pictures_of_the_large_one(frontier, pipe):
    tiny, vae = frontier.load_preview_vae(), pipe.vae
    picture = Image.open(tiny_models.REPOSITORY / "examples" / "picture.png").convert("RGB")
    with torch.no_grad():
        latents = vae.encode(pipe.image_processor.preprocess(picture)).latent_dist.mean * vae.config.scaling_factor
        latents = latents + 0.3 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
        large = vae.decode(latents / vae.config.scaling_factor).sample.clamp(-1, 1)
        small = tiny.decode(latents / tiny.config.scaling_factor).sample.clamp(-1, 1)
    correlation = torch.corrcoef(torch.stack([large.flatten(), small.flatten()]))[0, 1]
    assert correlation > 0.9


def test_gradients_through_the_small_decoder_point_where_those_through_the_large_one_do(frontier):
    from preview_vae import compare_gradients, cost_of, pairs

    tiny = frontier.load_preview_vae()
    told = compare_gradients(tiny, pairs(1), steps=2)
    for name in ("first tokens", "final tokens"):
        assert len(told[name]["by_step"]) == 2 and told[name]["least"] > 0.5
    assert cost_of(tiny, torch.randn(1, 8, 16, 16))["MiB"] > 0
