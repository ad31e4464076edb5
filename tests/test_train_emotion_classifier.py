import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import tiny_models
import torch
import train_emotion_classifier as script
import yaml
from accelerate.state import AcceleratorState, GradientState
from muse_examples import training_data, training_state
from muse_examples.metrics import (
    TEMPERATURES,
    calibration_bins,
    calibration_error,
    confusion_matrix,
    fit_temperature,
    fold_temperature,
    measure,
)
from muse_examples.training_data import Example
from muse_examples.training_report import draw_confusion
from PIL import Image
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageClassification, CLIPModel


COLOURS = {"awe": (90, 60, 200), "anger": (210, 40, 30), "calm": (70, 160, 80)}
LABELS = ["awe", "anger", "calm"]  # EmoSet's order first


def picture(label: str, number: int) -> Image.Image:
    """A noisy picture in the colour of its label."""
    rng = random.Random(f"{label}/{number}")
    noise = Image.frombytes("RGB", (14, 11), rng.randbytes(14 * 11 * 3))
    return Image.blend(Image.new("RGB", noise.size, COLOURS[label]), noise, 0.4)


def draw_pictures(folder: Path, count: int, start: int = 0) -> None:
    """Pictures of all labels, a folder for each."""
    for label in COLOURS:
        (folder / label).mkdir(parents=True)
        for number in range(start, start + count):
            picture(label, number).save(folder / label / f"{label}_{number}.png")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """Accelerate keeps its state for the whole process; each run is to have its own."""
    yield
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A tiny CLIP with dropout in the vision tower, and its tokenizer."""
    folder = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    config = tiny_models.clip_model().config
    config.vision_config.attention_dropout = 0.2
    CLIPModel(config).save_pretrained(folder)
    tiny_models.tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory) -> Path:
    """Image folders of 3 labels: 7 pictures each to train on, 3 to validate on."""
    folder = tmp_path_factory.mktemp("pictures")
    draw_pictures(folder / "train", 7)
    draw_pictures(folder / "val", 3, start=7)
    return folder


def options(clip: Path | str | None, data: Path, output: Path, **overrides) -> list[str]:
    """A command line for a short run: 21 pictures in batches of 4, so 6 steps per epoch."""
    values = {
        "data_dir": data,
        "clip": clip,
        "output_dir": output,
        "caption_template": "{label}",
        "head_hidden_sizes": 8,
        "num_epochs": 2,
        "train_batch_size": 4,
        "unfreeze_epoch": 2,
        "tower_learning_rate": 1e-3,
        **overrides,
    }
    return [text for name, value in values.items() if value is not None for text in (f"--{name}", str(value))]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def finished(clip, pictures, tmp_path_factory) -> Path:
    """The result of an unbroken run."""
    folder = tmp_path_factory.mktemp("finished") / "simemo"
    script.main(options(clip, pictures, folder))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    return folder


# ------------------------------------------------------------------------------------------------------ a run


def test_the_result_loads_as_remote_code_and_as_a_guide(finished, pipe):
    classifier = AutoModelForImageClassification.from_pretrained(finished, trust_remote_code=True)
    assert list(classifier.config.id2label.values()) == LABELS
    assert classifier.config.head_hidden_sizes == [8]
    assert equal(dict(classifier.state_dict()), weights(finished))
    pipe.load_emotion_classifier(str(finished), trust_remote_code=True)
    assert list(pipe.emotion_labels) == LABELS


def test_a_run_writes_metrics_log_pictures_and_card(finished):
    report = json.loads((finished / "metrics.json").read_text())
    assert report["pictures"] == {"train": dict.fromkeys(LABELS, 7), "validation": dict.fromkeys(LABELS, 3)}
    assert sum(map(sum, report["metrics"]["confusion"])) == 9
    assert report["epochs"] == 2 and report["steps"] == 12
    lines = [json.loads(line) for line in (finished / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [6, 10, 12]
    assert 0 <= lines[0]["validation_accuracy"] <= 1 and lines[1]["loss"] > 0
    for name in ("confusion.png", "reliability.png"):
        assert min(Image.open(finished / name).size) > 200
    assert not (finished / "best.safetensors").exists()


def test_the_card_describes_the_run_and_no_machine(finished, clip, pictures):
    _, front_matter, text = (finished / "README.md").read_text().split("---\n", 2)
    meta = yaml.safe_load(front_matter)
    assert meta["pipeline_tag"] == "image-classification" and meta["library_name"] == "transformers"
    assert not {"base_model", "datasets"} & meta.keys()  # those are folders here, which mean nothing elsewhere
    accuracy = json.loads((finished / "metrics.json").read_text())["metrics"]["accuracy"]
    assert meta["model-index"][0]["results"][0]["metrics"][0]["value"] == round(accuracy, 4)
    assert f"| as released | {100 * accuracy:.1f} |" in text
    assert "| train | 7 | 7 | 7 | 21 |" in text
    assert "confusion.png" in text and "trust_remote_code=True" in text and "`caption_template`" in text
    for folder in (finished, clip, pictures):
        assert str(folder.parent) not in front_matter + text


def test_the_released_classifier_makes_the_logits_of_the_report(finished, pictures):
    classifier = AutoModelForImageClassification.from_pretrained(finished, trust_remote_code=True)
    splits = training_data.read_data_dir(pictures)
    data = training_data.EmotionPictures(splits["validation"], classifier.config)
    with torch.no_grad():
        logits = classifier(torch.stack([data[0, index]["pixel_values"] for index in range(9)])).logits
    labels = torch.tensor([data[0, index]["labels"] for index in range(9)])
    again = measure(logits, labels, LABELS)
    report = json.loads((finished / "metrics.json").read_text())["metrics"]
    assert again["confusion"] == report["confusion"] and again["loss"] == pytest.approx(report["loss"], rel=1e-4)


def test_training_learns_from_every_picture_once_per_epoch(clip, pictures, tmp_path, monkeypatch):
    seen = []
    get_item = training_data.EmotionPictures.__getitem__

    def note_and_get(data, key):
        if len(data) == 21:
            seen.append(key)
        return get_item(data, key)

    monkeypatch.setattr(training_data.EmotionPictures, "__getitem__", note_and_get)
    quick = {"num_epochs": 8, "unfreeze_epoch": 1, "head_learning_rate": 1e-2, "augmentation": "none"}
    script.main(options(clip, pictures, tmp_path, **quick))
    assert sorted(seen) == [(epoch, index) for epoch in range(8) for index in range(21)]
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert report["metrics"]["accuracy"] > 0.8
    assert report["metrics"]["loss"] <= report["metrics_before_scaling"]["loss"]


def test_the_card_names_what_is_on_the_hub(finished):
    names = {"clip": "openai/clip-vit-base-patch32", "dataset_name": "me/moods", "hub_model_id": "me/simemo"}
    command = options(data=None, output=finished.parent / "new", **names)
    report = json.loads((finished / "metrics.json").read_text()) | script.describe_sources(script.parse_args(command))
    card = script.training_card(report, AutoConfig.from_pretrained(finished, trust_remote_code=True))
    assert (card.data.base_model, card.data.datasets) == (names["clip"], ["me/moods"])
    assert "trained on me/moods" in card.text and 'from_pretrained("me/simemo"' in card.text


def test_seeds_decide_on_everything(clip, pictures, finished, tmp_path):
    script.main(options(clip, pictures, tmp_path / "same"))
    assert equal(weights(tmp_path / "same"), weights(finished))
    script.main(options(clip, pictures, tmp_path / "other", seed=1))
    assert not equal(weights(tmp_path / "other"), weights(finished))


# ------------------------------------------------------------------------------------------------------ resuming


@pytest.mark.parametrize(
    ("checkpoint", "overrides"),
    [
        (1, {}),
        (3, {"gradient_accumulation_steps": 2, "mixed_precision": "bf16"}),  # before an epoch's validation
        (4, {"gradient_accumulation_steps": 2, "class_weights": "balanced", "early_stopping_patience": 2}),
        (8, {"augmentation": "standard", "head_learning_rate": 0, "tower_learning_rate": 0}),  # epoch 1 is the best
    ],
    ids=str,
)
def test_an_interrupted_run_ends_as_an_unbroken_one(checkpoint, overrides, clip, pictures, tmp_path, monkeypatch):
    script.main(options(clip, pictures, tmp_path / "whole", **overrides))
    save = training_state.save_checkpoint

    def save_and_die(accelerator, folder, progress, limit):
        save(accelerator, folder, progress, limit)
        if progress.step == checkpoint:
            raise KeyboardInterrupt

    arguments = options(clip, pictures, tmp_path / "broken", checkpointing_steps=checkpoint, **overrides)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(script, "save_checkpoint", save_and_die)
        script.main(arguments)
    torch.manual_seed(99)  # what was drawn before must not matter
    (tmp_path / "broken" / "best.safetensors").unlink(missing_ok=True)  # nor what was best after the checkpoint
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script.main([*arguments, "--resume_from_checkpoint", "latest"])
    assert equal(weights(tmp_path / "broken"), weights(tmp_path / "whole"))
    reports = [json.loads((tmp_path / name / "metrics.json").read_text()) for name in ("whole", "broken")]
    assert reports[0]["metrics"] == reports[1]["metrics"] and reports[0]["best_epoch"] == reports[1]["best_epoch"]
    assert reports[0]["steps"] == reports[1]["steps"] == 12 / overrides.get("gradient_accumulation_steps", 1)
    assert reports[0]["mixed_precision"] == overrides.get("mixed_precision", "no")
    assert (tmp_path / "whole" / "log.jsonl").read_text() == (tmp_path / "broken" / "log.jsonl").read_text()


def test_a_killed_process_resumes_in_a_new_one(clip, pictures, tmp_path):
    arguments = options(clip, pictures, tmp_path / "killed", num_epochs=999, checkpointing_steps=4)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, script.__file__, *arguments]
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 400
    while process.poll() is None and not training_state.list_checkpoints(tmp_path / "killed"):
        assert time.monotonic() < deadline, "the run has not begun"
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    last = training_state.list_checkpoints(tmp_path / "killed")[-1]

    # All those epochs are not needed: both runs end with the one after that in which the process was killed.
    epochs = json.loads((last / "progress.json").read_text())["epoch"] + 2
    arguments = options(clip, pictures, tmp_path / "killed", num_epochs=epochs)
    script.main([*arguments, "--resume_from_checkpoint", "latest"])
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    script.main(options(clip, pictures, tmp_path / "whole", num_epochs=epochs))
    assert equal(weights(tmp_path / "killed"), weights(tmp_path / "whole"))


def test_a_checkpoint_of_another_run_is_refused(clip, pictures, tmp_path, capsys):
    script.main(options(clip, pictures, tmp_path, num_epochs=1, checkpointing_steps=2, checkpoints_total_limit=1))
    assert [path.name for path in training_state.list_checkpoints(tmp_path)] == ["checkpoint-6"]
    with pytest.raises(SystemExit, match="error: .*of another run"):
        script.main([*options(clip, pictures, tmp_path, seed=3), "--resume_from_checkpoint", "latest"])
    for message in ("holds a finished classifier", "holds checkpoints"):
        with pytest.raises(SystemExit):
            script.main(options(clip, pictures, tmp_path))  # it would mix two runs
        assert message in capsys.readouterr().err
        (tmp_path / "metrics.json").unlink(missing_ok=True)


def test_the_log_forgets_steps_that_are_taken_again(tmp_path):
    log = training_state.JsonLines(tmp_path / "log.jsonl")
    log.forget_after(0)
    for step in (1, 2, 3):
        log.log({"loss": 0.5}, step=step)
    with open(log.path, "a") as file:
        file.write('{"step": 3, "lo')  # cut off
    log.forget_after(2)
    assert [json.loads(line)["step"] for line in log.path.read_text().splitlines()] == [1, 2]


# ---------------------------------------------------------------------------------------------------- the recipe


def test_the_tower_learns_from_the_fourth_epoch_on(clip, pictures, tmp_path):
    arguments = options(clip, pictures, tmp_path, num_epochs=4, unfreeze_epoch=None, train_batch_size=21)
    script.main([*arguments, "--checkpointing_steps", "1", "--checkpoints_total_limit", "9"])
    first, third, fourth = (weights(tmp_path / f"checkpoint-{step}") for step in (1, 3, 4))
    original = weights(clip)
    tower = [name for name in fourth if name.startswith("clip.vision_model")]
    assert all(torch.equal(third[name], original[name.removeprefix("clip.")]) for name in tower)
    assert not torch.equal(fourth["clip.visual_projection.weight"], original["visual_projection.weight"])
    assert sum(not torch.equal(fourth[name], third[name]) for name in tower) > len(tower) / 2
    head = [name for name in fourth if name.startswith("classifier")]
    assert all(not torch.equal(first[name], third[name]) for name in head)


def test_learning_rates_fall_by_epochs(clip):
    model = tiny_models.emotion_classifier()
    args = script.parse_args(["--data_dir", str(clip), "--clip", "clip", "--output_dir", "new"])
    optimizer = script.make_optimizer(model, args)
    seen = []
    for epoch in (0, 5, 6, 12):
        script.start_epoch(model, optimizer, args, epoch)
        seen.append([group["lr"] for group in optimizer.param_groups])
        assert all(parameter.requires_grad == (epoch >= 3) for parameter in model.clip.parameters())
    assert seen == [[1e-3, 1e-6], [1e-3, 1e-6], [5e-4, 5e-7], [2.5e-4, 2.5e-7]]
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0, 1e-5]
    assert args.train_batch_size == 32 and args.num_epochs == 25 and args.text_weight == 0.3


def test_the_loss_is_that_of_simemo():
    model = tiny_models.emotion_classifier()
    tap = script.FeatureTap(model.clip)
    generator = tiny_models.generator()
    pixels, texts = (torch.randn(shape, generator=generator) for shape in ((4, 3, 32, 32), (2, 16)))
    batch = {"pixel_values": pixels, "labels": torch.tensor([0, 1, 1, 7]), "texts": torch.tensor([0, 1, 1, 0])}
    weight = torch.linspace(0.5, 2, 8)
    loss = script.simemo_loss(batch, model, tap, texts, 0.3, weight)
    features, logits = model.clip(pixel_values=pixels).image_embeds, model(pixels).logits
    cosine = (F.normalize(features) * F.normalize(texts[batch["texts"]])).sum(dim=-1)
    expected = 0.7 * F.cross_entropy(logits, batch["labels"], weight=weight) + 0.3 * (1 - cosine).mean()
    torch.testing.assert_close(loss, expected)
    plain = script.simemo_loss(batch, model, tap, None, 0.0, None)
    torch.testing.assert_close(plain, F.cross_entropy(logits, batch["labels"]))


def test_texts_are_encoded_as_clip_does(clip):
    args = types.SimpleNamespace(clip=str(clip), tokenizer=None)
    accelerator = script.Accelerator()
    features = script.encode_texts(args, ["awe", "anger"], 16, accelerator)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), tiny_models.tokenizer()
    with torch.no_grad():
        expected = model(
            **tokenizer(["awe", "anger"], padding=True, return_tensors="pt"), pixel_values=torch.zeros(1, 3, 32, 32)
        ).text_embeds
    torch.testing.assert_close(F.normalize(features), expected)
    with pytest.raises(ValueError, match="width"):
        script.encode_texts(args, ["awe"], 24, accelerator)


def test_class_weights_balance():
    examples = [Example(str(number), label, Image.new) for number, label in enumerate("aaab")]
    assert training_data.balanced_weights(examples, ["a", "b", "c"]) == [pytest.approx(2 / 3), 2, 0]


def test_class_weights_are_used(clip, tmp_path):
    draw_pictures(tmp_path / "data", 4)
    for number in (1, 2):
        (tmp_path / "data" / "calm" / f"calm_{number}.png").unlink()
    results = []
    for choice in ("none", "balanced"):
        script.main(options(clip, tmp_path / "data", tmp_path / choice, num_epochs=1, class_weights=choice))
        results.append(weights(tmp_path / choice))
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
    assert not equal(*results)


def test_gradients_are_clipped(clip, pictures, tmp_path):
    # Adam undoes the scale of gradients, until they are far below its epsilon.
    script.main(options(clip, pictures, tmp_path, num_epochs=1, unfreeze_epoch=1, max_grad_norm=1e-14))
    trained, original = weights(tmp_path), weights(clip)
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert (trained[f"clip.{name}"] - original[name]).abs().max() < 1e-6


def test_early_stopping_goes_back_to_the_best(clip, pictures, tmp_path):
    frozen = {"head_learning_rate": 0, "tower_learning_rate": 0, "text_weight": 0}
    script.main(options(clip, pictures, tmp_path, num_epochs=9, early_stopping_patience=2, **frozen))
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert (report["best_epoch"], report["epochs"]) == (1, 3)


def test_the_result_is_the_best_epoch_not_the_last(clip, pictures, tmp_path, monkeypatch):
    def improves(progress, accuracy, loss):
        progress.best_epoch = 1
        return progress.epoch == 0

    monkeypatch.setattr(training_state.Progress, "improves", improves)
    script.main(options(clip, pictures, tmp_path))  # the tower learns in the second epoch
    name = "vision_model.encoder.layers.0.mlp.fc1.weight"
    assert torch.equal(weights(tmp_path)[f"clip.{name}"], weights(clip)[name])


def test_a_worse_epoch_does_not_replace_the_best():
    progress = training_state.Progress({})
    assert progress.improves(0.5, 1.0)
    progress.epoch = 1
    assert not progress.improves(0.4, 0.1) and not progress.improves(0.5, 1.0)
    assert progress.improves(0.5, 0.9) and progress.best_epoch == 2


def test_training_goes_on_from_a_simemo_with_its_labels(clip, pictures, finished, tmp_path):
    few = tmp_path / "few"
    for label in ("awe", "calm"):
        (few / label).mkdir(parents=True)
        for number in range(4):
            picture(label, number).save(few / label / f"{number}.png")
    frozen = {"head_learning_rate": 0, "tower_learning_rate": 0, "text_weight": 0, "num_epochs": 1}
    script.main(options(None, few, tmp_path / "more", init_from=finished, **frozen))
    report = json.loads((tmp_path / "more" / "metrics.json").read_text())
    assert report["labels"] == LABELS and report["metrics"]["recall"]["anger"] is None
    ratio = weights(tmp_path / "more")["classifier.2.weight"] / weights(finished)["classifier.2.weight"]
    torch.testing.assert_close(ratio, torch.full_like(ratio, 1 / report["temperature"]))
    draw_pictures(tmp_path / "unknown", 2)
    (tmp_path / "unknown" / "calm").rename(tmp_path / "unknown" / "cosy")
    with pytest.raises(SystemExit, match="train pictures that the classifier does not have: .'cosy'"):
        script.main(options(None, tmp_path / "unknown", tmp_path / "new", init_from=finished, **frozen))


# ------------------------------------------------------------------------------------------------------- layouts


def save(label: str, number: int, path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture(label, number).save(path)
    return str(path)


def write_emoset(root: Path, with_id: bool) -> None:
    for split, numbers in {"train": range(4), "val": range(4, 6), "test": range(6, 7)}.items():
        entries = []
        for label in ("awe", "anger"):
            for number in numbers:
                name = f"{label}_{number:05}"
                save(label, number, root / "image" / label / f"{name}.jpg")
                annotation = root / "annotation" / label / f"{name}.json"
                annotation.parent.mkdir(parents=True, exist_ok=True)
                words = {
                    "image_id": name,
                    "emotion": label,
                    "brightness": 0.5,
                    "scene": "ice_floe",
                    "object": ["Bird", "Sea"],
                }
                annotation.write_text(json.dumps(words if number else {"emotion": label}))
                paths = [f"image/{label}/{name}.jpg", f"annotation/{label}/{name}.json"]
                entries.append([label, *([name] if with_id else []), *paths])
        (root / f"{split}.json").write_text(json.dumps(entries))
    (root / "info.json").write_text(json.dumps({"emotion": {"label2idx": {"awe": 1, "anger": 4}}}))


@pytest.mark.parametrize("with_id", [False, True])
def test_emoset(with_id, tmp_path):
    write_emoset(tmp_path, with_id)
    splits = training_data.read_data_dir(tmp_path)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 8, "validation": 4, "test": 2}
    first, second = splits["train"][:2]
    assert (first.label, first.caption) == ("awe", "")
    assert second.caption == "ice floe, bird, sea"
    assert training_data.text_of(second, "it evokes {label}") == "it evokes awe: ice floe, bird, sea"
    assert first.load().getpixel((0, 0)) == Image.open(tmp_path / "image/awe/awe_00000.jpg").getpixel((0, 0))


def test_a_test_split_is_reported_on_and_not_fitted_to(clip, tmp_path):
    write_emoset(tmp_path / "emoset", with_id=False)
    script.main(options(clip, tmp_path / "emoset", tmp_path / "new", num_epochs=1))
    report = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert report["split"] == "test" and sum(map(sum, report["metrics"]["confusion"])) == 2
    assert "too good" not in (tmp_path / "new" / "README.md").read_text()


def test_fi_lists_count_votes(tmp_path, capsys):
    lists = {
        "amusement_1.csv": ["amusement,http://farm1.host/1/one.jpg,2,3", "amusement,http://farm1.host/1/two.jpg,3,2"],
        "awe_1.csv": [
            "awe,http://farm1.host/1/one.jpg,0,5",
            "awe,http://farm1.host/1/gone.jpg,0,5",
            "awe,http://farm1.host/1/tie.jpg,1,4",
        ],
        "fear_1.csv": ["fear,http://farm1.host/1/tie.jpg,1,4", "fear,http://farm1.host/1/three.jpg,1,3"],
    }
    (tmp_path / "agg").mkdir()
    for name, lines in lists.items():
        (tmp_path / "agg" / name).write_text("\n".join(lines) + "\n")
    for name in ("one", "two", "tie", "three"):
        save("awe", 0, tmp_path / "pictures" / f"{name}.jpg")
    examples = training_data.read_data_dir(tmp_path)["train"]
    assert [(Path(example.name).stem, example.label) for example in examples] == [("one", "awe"), ("three", "fear")]
    assert "1 are not on disk, 1 have two emotions" in capsys.readouterr().out


def test_image_folders_with_and_without_splits(tmp_path, pictures):
    splits = training_data.read_data_dir(pictures)
    assert {split: len(examples) for split, examples in splits.items()} == {"train": 21, "validation": 9}
    assert training_data.ordered_labels(splits["train"]) == LABELS
    plain = training_data.read_data_dir(pictures / "train")
    parts = training_data.with_validation(plain, 0.3, seed=0)
    names = {split: {example.name for example in examples} for split, examples in parts.items()}
    assert not names["train"] & names["validation"] and len(names["train"] | names["validation"]) == 21
    counts = [sum(example.label == label for example in parts["validation"]) for label in LABELS]
    assert counts == [2, 2, 2]
    assert (
        training_data.with_validation(plain, 0.3, seed=1) != parts == training_data.with_validation(plain, 0.3, seed=0)
    )
    only_test = training_data.with_validation({"train": plain["train"], "test": plain["train"][:3]}, 0.3, seed=0)
    assert list(only_test) == ["train", "validation"] and len(only_test["validation"]) == 3


def test_captions_of_metadata_become_texts(tmp_path):
    save("awe", 0, tmp_path / "train" / "awe" / "a.png")
    save("awe", 1, tmp_path / "train" / "awe" / "b.png")
    (tmp_path / "train" / "metadata.jsonl").write_text('{"file_name": "awe/a.png", "text": "a lake"}\n\n')
    (example, other) = training_data.read_data_dir(tmp_path)["train"]
    assert (example.caption, other.caption) == ("a lake", "")
    assert training_data.text_of(example, "full of {label}") == "full of awe: a lake"
    assert training_data.text_of(other, "full of {label}") == "full of awe"
    config = tiny_models.emotion_classifier().config
    rows = {"full of awe": 3, "full of awe: a lake": 5}
    data = training_data.EmotionPictures([example, other], config, rows, "full of {label}")
    assert [data[0, index]["texts"] for index in range(2)] == [5, 3]


class Rows(list):
    """Stands in for a split of the `datasets` library, which the tests do not need."""

    features = {"mood": types.SimpleNamespace(names=["calm", "awe"])}
    column_names = ["photo", "mood", "words"]

    def __getitem__(self, key):
        return [row[key] for row in self] if isinstance(key, str) else super().__getitem__(key)

    def cast_column(self, column, feature):
        assert (column, feature) == ("photo", "undecoded")
        return self


def test_a_dataset_of_the_hub(tmp_path, monkeypatch):
    path = save("awe", 0, tmp_path / "a.png")
    cells = [{"bytes": Path(path).read_bytes(), "path": None}, {"bytes": None, "path": path}]
    rows = Rows({"photo": cell, "mood": index, "words": "a lake"} for index, cell in enumerate(cells))
    library = types.ModuleType("datasets")
    library.load_dataset = lambda name: {"train": rows, "val": rows, "extra": rows}
    library.Image = lambda decode: "undecoded"
    library.__spec__ = importlib.machinery.ModuleSpec("datasets", None)
    monkeypatch.setitem(sys.modules, "datasets", library)
    splits = training_data.read_dataset("me/moods", "photo", "mood", "words")
    assert list(splits) == ["train", "validation"]
    assert [(e.label, e.caption) for e in splits["train"]] == [("calm", "a lake"), ("awe", "a lake")]
    assert [e.load().size for e in splits["train"]] == [(14, 11)] * 2
    with pytest.raises(ValueError, match="label"):
        training_data.read_dataset("me/moods", "photo", "label", None)


def test_a_missing_datasets_library_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install datasets"):
        training_data.read_dataset("me/moods", "image", "label", None)


def broken_layout(kind: str, root: Path) -> None:
    if kind == "no pictures":
        (root / "awe").mkdir()
    elif kind == "emoset entry":
        (root / "train.json").write_text('[["awe", "image/awe/a"]]')
    elif kind == "fi line":
        (root / "awe.csv").write_text("emotion,url,disagree,agree\n")
    elif kind == "metadata":
        save("awe", 0, root / "awe" / "a.png")
        (root / "metadata.jsonl").write_text("a lake\n")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "no labelled pictures"),
        ("no pictures", "holds no pictures"),
        ("emoset entry", "train.json.*entries"),
        ("fi line", "Line 1 of .*awe.csv"),
        ("metadata", "Line 1 of .*metadata.jsonl"),
    ],
)
def test_broken_layouts_are_named(kind, message, tmp_path):
    broken_layout(kind, tmp_path)
    with pytest.raises(ValueError, match=message):
        training_data.read_data_dir(tmp_path)


def test_one_label_cannot_be_told_from_others(clip, pictures, tmp_path):
    shutil.copytree(pictures / "train" / "awe", tmp_path / "data" / "awe")
    with pytest.raises(SystemExit, match="error: There have to be two labels"):
        script.main(options(clip, tmp_path / "data", tmp_path / "new"))


def test_training_that_diverges_is_ended(clip, pictures, tmp_path):
    wild = {"head_learning_rate": 1e30, "max_grad_norm": 0, "logging_steps": 1}
    with pytest.raises(SystemExit, match="error: The loss is (nan|inf)"):
        script.main(options(clip, pictures, tmp_path, **wild))


def test_a_label_with_one_picture_cannot_be_split():
    with pytest.raises(ValueError, match="'b' has one picture"):
        training_data.stratified_split([Example(name, name[0], Image.new) for name in ("a1", "a2", "b1")], 0.5, 0)


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (("Train", "VAL", "testing"), ["train", "validation", "test"]),
        (("training", "eval", "Test", "holdout"), ["train", "validation", "test"]),
        (("TRAIN", "dev"), ["train", "validation"]),
        ((".",), ["train"]),
    ],
    ids=str,
)
def test_splits_are_known_by_their_usual_names(folders, splits, tmp_path, capsys):
    for folder in folders:
        for label in ("anger", "awe"):
            save(label, 0, tmp_path / folder / label / "picture.JPG")
    found = training_data.read_data_dir(tmp_path)
    assert sorted(found) == sorted(splits)
    for split, folder in zip(splits, folders):
        assert [example.label for example in found[split]] == ["anger", "awe"]
        assert all(Path(example.name).parents[1] == tmp_path / folder for example in found[split])
    assert ("as they are no split: holdout" in capsys.readouterr().out) == ("holdout" in folders)


def test_splits_that_have_two_names_or_nothing_to_train_on_are_refused(tmp_path):
    for folder in ("val", "valid"):
        save("awe", 0, tmp_path / folder / "awe" / "a.png")
    with pytest.raises(ValueError, match="'val' and 'valid' are both names of the split 'validation'"):
        training_data.read_data_dir(tmp_path)
    shutil.rmtree(tmp_path / "valid")
    with pytest.raises(ValueError, match="no labelled pictures"):
        training_data.read_data_dir(tmp_path)


def test_hidden_files_and_folders_are_no_pictures_and_no_labels(tmp_path):
    seen = save("awe", 0, tmp_path / "train" / "awe" / "deep" / "a.png")
    hidden = [
        "awe/._a.png",
        "awe/.thumbnails/a.png",
        "awe/@eaDir/a.png/a.png",
        ".ipynb_checkpoints/a.png",
        "_old/a.png",
    ]
    for name in hidden:
        save("awe", 0, tmp_path / "train" / name)
    also = save("awe", 0, tmp_path / "train" / "awe" / "_DSC0001.jpg")  # as cameras call them
    assert [example.name for example in training_data.read_data_dir(tmp_path)["train"]] == sorted([also, seen])


def test_a_byte_order_mark_is_no_part_of_a_list(tmp_path):
    save("awe", 0, tmp_path / "images" / "awe" / "a.png")
    line = json.dumps({"file_name": "awe/a.png", "text": "a lake"})
    (tmp_path / "images" / "metadata.jsonl").write_text(line + "\n", encoding="utf-8-sig")
    assert training_data.read_data_dir(tmp_path / "images")["train"][0].caption == "a lake"
    save("awe", 0, tmp_path / "fi" / "one.jpg")
    (tmp_path / "fi" / "awe.csv").write_text("awe,http://farm1.host/one.jpg,0,5\n", encoding="utf-8-sig")
    assert [example.label for example in training_data.read_data_dir(tmp_path / "fi")["train"]] == ["awe"]
    write_emoset(tmp_path / "emoset", with_id=False)
    for path in (tmp_path / "emoset").glob("*.json"):
        path.write_text(path.read_text(), encoding="utf-8-sig")
    assert len(training_data.read_data_dir(tmp_path / "emoset")["train"]) == 8


def test_a_run_says_first_what_it_learns_from_and_nothing_of_missing_keys(clip, pictures, tmp_path, capfd):
    quick = {"num_epochs": 1, "text_weight": 0, "resume_from_checkpoint": "latest"}
    script.main(options(clip, pictures, tmp_path / "new", **quick))
    told, errors = capfd.readouterr()
    lines = told.splitlines()
    assert [line.split() for line in lines[:3]] == [
        ["pictures", *LABELS, "all"],
        ["train", "7", "7", "7", "21"],
        ["validation", "3", "3", "3", "9"],
    ]
    assert lines[3].startswith("Few validation pictures, under 10, of awe, anger, calm")
    assert lines[4] == f"{tmp_path / 'new'} holds no checkpoint yet: the run starts at its beginning."
    assert "classifier.0.weight" not in told + errors and "text_model" not in told + errors


def test_unreadable_pictures_are_reported_and_left_out(clip, pictures, tmp_path, capsys):
    for split in ("train", "val"):
        draw_pictures(tmp_path / "data" / split, 2)
    whole = (pictures / "train" / "awe" / "awe_0.png").read_bytes()
    (tmp_path / "data" / "train" / "awe" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "data" / "val" / "calm" / "text.jpg").write_text("no picture")
    script.main(options(clip, tmp_path / "data", tmp_path / "new", num_epochs=1))
    told = capsys.readouterr().out
    report = json.loads((tmp_path / "new" / "metrics.json").read_text())
    assert report["unreadable"] == ["train/awe/cut.png", "val/calm/text.jpg"]
    assert all(f"{name}: " in told for name in ("cut.png", "text.jpg"))
    assert report["pictures"] == {split: dict.fromkeys(LABELS, 2) for split in ("train", "validation")}
    assert "cannot be read: 2" in (tmp_path / "new" / "README.md").read_text()


# ------------------------------------------------------------------------------------------------------ pictures


def test_rotation_and_transparency_are_heeded(tmp_path):
    image = picture("awe", 0)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned
    image.save(tmp_path / "turned.png", exif=exif)
    Image.new("RGBA", (4, 4), (0, 0, 0, 0)).save(tmp_path / "clear.png")
    turned, clear = (
        Example("", "", lambda path=tmp_path / name: Image.open(path)) for name in ("turned.png", "clear.png")
    )
    assert turned.load().size == (11, 14)
    assert clear.load().getpixel((0, 0)) == (255, 255, 255)


@pytest.mark.parametrize("augmentation", training_data.AUGMENTATIONS)
def test_augmentations_are_a_function_of_seed_epoch_and_index(augmentation):
    config = tiny_models.emotion_classifier(id2label=dict(enumerate(LABELS))).config
    examples = [Example("", "awe", lambda number=number: picture("awe", number)) for number in (0, 0)]
    data = training_data.EmotionPictures(examples, config, augmentation=augmentation)
    pixels = data[3, 0]["pixel_values"]
    assert pixels.shape == (3, 32, 32) and pixels.dtype == torch.float32
    assert torch.equal(pixels, data[3, 0]["pixel_values"])
    others = (data[4, 0]["pixel_values"], data[3, 1]["pixel_values"])
    assert all(torch.equal(pixels, other) == (augmentation == "none") for other in others)


def test_degraded_pictures_are_soft_and_pale():
    board = torch.stack([torch.arange(32) % 2, torch.arange(1, 33) % 2]).float().repeat(16, 1).expand(3, 32, 32)
    degraded = [training_data.degrade(board, random.Random(seed)) for seed in range(40)]
    contrasts = torch.stack([pixels.std() for pixels in degraded])
    assert contrasts.mean() < 0.7 * board.std() and contrasts.std() > 0.05
    assert torch.stack(degraded).mean() == pytest.approx(0.5, abs=0.05)


def test_robust_training_degrades_half_of_the_pictures(monkeypatch):
    calls = []
    monkeypatch.setattr(training_data, "degrade", lambda pixels, rng: calls.append(1) or pixels)
    for seed in range(200):
        training_data.augment(picture("awe", 0), 8, "robust", random.Random(seed))
    assert 70 < len(calls) < 130


def test_validation_sees_the_middle_of_a_picture():
    image = Image.new("RGB", (30, 10), "red")
    image.paste("blue", (10, 0, 20, 10))
    colours = {colour for _, colour in training_data.centre_crop(image, 8).getcolors()}
    assert all(blue > 240 > 10 > red for red, _, blue in colours)  # the filter reaches over the edge
    assert training_data.centre_crop(image, 8).getpixel((4, 4)) == (0, 0, 255)


def test_epochs_have_orders_of_their_own():
    sampler = training_data.EpochSampler(6, seed=0)
    first = list(sampler)
    assert list(sampler) == first and sorted(first) == [(0, index) for index in range(6)]
    sampler.epoch = 1
    assert [index for _, index in sampler] != [index for _, index in first]
    assert {epoch for epoch, _ in sampler} == {1}


# ----------------------------------------------------------------------------------------------------- calibration


def overconfident(scale: float, count: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits whose softmax tells the true probabilities of the labels if they are divided by `scale`."""
    generator = tiny_models.generator()
    logits = torch.randn(count, 5, generator=generator)
    labels = torch.multinomial(logits.softmax(dim=-1), 1, generator=generator)[:, 0]
    return scale * logits, labels


@pytest.mark.parametrize("scale", [0.4, 1.0, 3.0])
def test_the_temperature_undoes_over_and_underconfidence(scale):
    logits, labels = overconfident(scale)
    temperature = fit_temperature(logits, labels)
    assert temperature == pytest.approx(scale, rel=0.05)
    best = F.cross_entropy(logits / temperature, labels)
    assert best <= F.cross_entropy(logits, labels)
    assert all(best <= F.cross_entropy(logits / (temperature * factor), labels) for factor in (0.9, 1.1))
    assert calibration_error(logits / temperature, labels) < 0.03


def test_a_validation_without_errors_asks_for_no_endless_confidence():
    assert fit_temperature(torch.eye(4), torch.arange(4)) == pytest.approx(TEMPERATURES[0])


@pytest.mark.parametrize("config", [{}, {"head_hidden_sizes": [], "head_bias": False, "logit_scale": 10.0}], ids=str)
def test_folded_logits_are_scaled_logits(config):
    model = tiny_models.emotion_classifier(**config)
    pixels = torch.randn(2, 3, 32, 32, generator=tiny_models.generator())
    with torch.no_grad():
        before = model(pixels).logits
        fold_temperature(model.classifier, 2.5)
        torch.testing.assert_close(model(pixels).logits, before / 2.5)


def test_calibration_error_by_hand():
    confidence = torch.tensor([0.9, 0.9, 0.6, 0.6, 1.0])
    logits = torch.stack([confidence, 1 - confidence], dim=1).log()
    labels = torch.tensor([0, 1, 0, 0, 0])
    assert calibration_error(logits, labels) == pytest.approx((2 * 0.4 + 2 * 0.4 + 0) / 5, abs=1e-6)
    assert [count for count, *_ in calibration_bins(logits, labels) if count] == [2, 2, 1]


def test_measures_by_hand(tmp_path):
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 1])]
    labels = torch.tensor([0, 1, 1, 1])
    assert confusion_matrix(logits, labels).tolist() == [[1, 0, 0], [1, 2, 0], [0, 0, 0]]
    figures = measure(logits, labels, LABELS)
    assert figures["accuracy"] == 0.75
    assert figures["recall"] == {"awe": 1, "anger": pytest.approx(2 / 3), "calm": None}
    draw_confusion(figures["confusion"], LABELS, tmp_path / "confusion.png")
    assert Image.open(tmp_path / "confusion.png").width > 200


# ------------------------------------------------------------------------------------------- options and publishing


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"data_dir": "missing"}, "missing"),
        ({"data_dir": None}, "--dataset_name"),
        ({"dataset_name": "me/moods"}, "not allowed with"),
        ({"clip": None}, "--init_from"),
        ({"clip": None, "init_from": "me/simemo"}, "--text_weight 0"),
        ({"caption_template": "a photo"}, "{label}"),
        ({"report_to": "nosuchtracker"}, "nosuchtracker"),
        ({"hub_model_id": "no/such/id"}, "--hub_model_id"),
        ({"resume_from_checkpoint": "missing"}, "no checkpoint"),
        ({"output_dir": tiny_models.REPOSITORY / "emotion_classifier"}, "bundled"),
        ({"train_batch_size": 0}, "positive"),
        ({"validation_fraction": 1.5}, "0.9"),
        ({"head_learning_rate": -1}, "within"),
        ({"head_learning_rate": "nan"}, "within"),
        ({"text_weight": "much"}, "text_weight"),
        ({"augmentation": "degraded"}, "invalid choice"),
    ],
    ids=str,
)
def test_bad_arguments_end_the_program_before_models_load(overrides, message, tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(options(**{"clip": "clip", "data": tmp_path, "output": tmp_path / "new", **overrides}))
    assert message in capsys.readouterr().err


def test_publishing_needs_a_name(tmp_path, capsys):
    with pytest.raises(SystemExit):
        script.parse_args([*options("clip", tmp_path, tmp_path / "new"), "--push_to_hub"])
    assert "--hub_model_id" in capsys.readouterr().err


def test_publishing_leaves_out_what_training_leaves_behind(clip, pictures, tmp_path, monkeypatch):
    from huggingface_hub.utils import filter_repo_objects

    calls = []

    class Hub:
        """Notes what would be asked of the Hub."""

        def create_repo(self, repo_id, **options):
            calls.append(("create", repo_id, options))

        def upload_folder(self, repo_id, folder_path, ignore_patterns, commit_message):
            files = [str(path.relative_to(folder_path)) for path in Path(folder_path).rglob("*") if path.is_file()]
            calls.append(("upload", repo_id, sorted(filter_repo_objects(files, ignore_patterns=ignore_patterns))))

    monkeypatch.setattr(script, "HfApi", Hub)
    arguments = options(clip, pictures, tmp_path / "new", num_epochs=1, checkpointing_steps=3, hub_model_id="me/moods")
    script.main([*arguments, "--push_to_hub", "--hub_private"])
    files = ["README.md", "config.json", "confusion.png", "log.jsonl", "metrics.json", "model.safetensors"]
    code = ["modeling_simemo.py", "preprocessor_config.json"]
    assert calls == [
        ("create", "me/moods", {"private": True, "exist_ok": True}),
        ("upload", "me/moods", [*files, *code, "reliability.png"]),
    ]
    assert 'from_pretrained("me/moods"' in (tmp_path / "new" / "README.md").read_text()


def test_storybook_draws_folders_to_train_on(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tiny_models.REPOSITORY / "examples" / "storybook")
    draw_folders = importlib.import_module("draw_folders")
    draw_folders.draw(tmp_path, "train", "fear", 2, "painted")
    first, second = training_data.read_data_dir(tmp_path)["train"]
    assert first.label == second.label == "fear" and first.caption and second.caption
    assert first.load().size == (64, 64) and first.load().tobytes() != second.load().tobytes()
    draw_folders.draw(tmp_path / "again", "train", "fear", 1, "painted")
    assert training_data.read_data_dir(tmp_path / "again")["train"][0].load().tobytes() == first.load().tobytes()
