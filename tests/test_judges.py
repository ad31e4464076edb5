"""What judges say is what their networks say, and is asked for once."""

import json
import random
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from muse_examples.classifiers import label_probabilities, picture_pixels
from muse_examples.degradations import COPIES
from muse_examples.evaluation import judges
from muse_examples.evaluation.judges import (
    Answers,
    ClipJudge,
    EmotionJudge,
    InceptionJudge,
    Pictures,
    answers_file,
    ask,
    ask_all,
    lpips_distance,
    recall,
    reference_statistics,
)
from muse_examples.evaluation.measures import Statistics
from muse_examples.pipelines import clips, read_model
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from pipeline_muse import PixelSpec


sys.path.append(str(tiny_models.REPOSITORY / "examples" / "storybook"))
from world import EMOTIONS, content_prompt, render, sample_scene  # noqa: E402


PROMPTS = ["a cat", "a dog", "a cat", "a bird", None, "a house by the sea and a very long way to it", "a dog"]
QUIET = {"disable": True}


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory) -> Path:
    """A classifier that says different things of different pictures."""
    folder = tmp_path_factory.mktemp("classifier")
    tiny_models.sure_classifier().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory) -> Path:
    """A CLIP as the Hub has them, with a processor that cuts to the middle."""
    folder = tmp_path_factory.mktemp("clip")
    tiny_models.clip_model().save_pretrained(folder)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tiny_models.tokenizer()).save_pretrained(folder)
    return folder


@pytest.fixture
def paths(tmp_path) -> list[Path]:
    """Seven pictures, of several sizes and modes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    found = []
    for number in range(7):
        noise = Image.effect_noise((40 + 3 * number, 48), 60).convert("RGB")
        color = Image.new("RGB", noise.size, f"hsl({50 * number}, 90%, 50%)")
        found.append(folder / f"{number}.png")
        Image.blend(noise, color, 0.5).convert("L" if number == 3 else "RGB").save(found[-1])
    return found


class Asked:
    """Notes the sizes of the batches that a judge is asked about; can be told to break off at one."""

    def __init__(self, monkeypatch):
        self.sizes: list[int] = []
        self.break_at: int | None = None
        for kind in (EmotionJudge, ClipJudge):
            monkeypatch.setattr(kind, "__call__", self.watched(kind.__call__))

    def watched(self, call):
        def wrapped(judge, images, prompts):
            if len(self.sizes) == self.break_at:
                raise KeyboardInterrupt
            self.sizes.append(len(images))
            return call(judge, images, prompts)

        return wrapped

    def since(self) -> list[int]:
        sizes, self.sizes = self.sizes, []
        return sizes


@pytest.fixture
def asked(monkeypatch) -> Asked:
    return Asked(monkeypatch)


def same(first: Answers, second: Answers) -> bool:
    return first.values.keys() == second.values.keys() and all(
        np.array_equal(first[name], second[name]) for name in first.values
    )


# --------------------------------------------------------------------------------------
# What they say
# --------------------------------------------------------------------------------------


def test_a_classifiers_answers_are_its_own(classifier_folder, paths, tmp_path):
    judge = EmotionJudge("tiny", str(classifier_folder), batch_size=3)
    found = ask(judge, "row", paths, PROMPTS, tmp_path)
    classifier, spec = judge.loaded
    for number, path in enumerate(paths):
        image = Image.open(path)
        expected = label_probabilities(classifier, picture_pixels(image, spec))[0]
        assert dict(zip(found.labels, found["probabilities"][number])) == pytest.approx(expected, abs=1e-5)
        assert found.emotions[number] == max(expected, key=expected.get)
        copies = label_probabilities(classifier, picture_pixels(image, spec, copies=COPIES))
        assert found.emotions_of_copies[number] == [max(copy, key=copy.get) for copy in copies]
    assert len(set(found.emotions)) > 1
    cut = ask(EmotionJudge("cut", str(classifier_folder), center_crop=True), "row", paths, PROMPTS, tmp_path)
    assert not np.allclose(cut["probabilities"], found["probabilities"], atol=1e-3)


def test_a_clips_answers_are_those_of_transformers(clip_folder, paths, tmp_path):
    found = ask(ClipJudge("tiny", str(clip_folder), batch_size=3), "row", paths, PROMPTS, tmp_path)
    model = CLIPModel.from_pretrained(clip_folder).eval()
    processor = CLIPProcessor.from_pretrained(clip_folder)
    for number, path in enumerate(paths):
        inputs = processor(
            text=[PROMPTS[number] or ""],
            images=Image.open(path).convert("RGB"),
            return_tensors="pt",
            truncation=True,
            max_length=16,
        )
        with torch.no_grad():
            output = model.requires_grad_(False)(**inputs)
            image = model.visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
        cosine = float(output.logits_per_image / model.logit_scale.exp())
        assert found["similarity"][number] == pytest.approx(100 * cosine, abs=1e-3)
        assert found["image"][number] == pytest.approx(image[0].numpy(), abs=1e-5), "as it is, not normalised"
        text = output.text_embeds[0].numpy()
        assert found["text"][number] / np.linalg.norm(found["text"][number]) == pytest.approx(text, abs=1e-5)
    assert found["image"].dtype == found["text"].dtype == np.float32
    assert abs(np.linalg.norm(found["text"], axis=1) - 1).min() > 0.01


def test_features_are_found_in_what_either_transformers_returns():
    tensor = torch.ones(1, 2, dtype=torch.bfloat16)
    for output in (tensor, types.SimpleNamespace(pooler_output=tensor, last_hidden_state=torch.zeros(1, 3, 2))):
        assert judges.features_of(output).tolist() == [[1, 1]] and judges.features_of(output).dtype == np.float32


def test_the_clip_of_an_example_goes_by_name_and_sees_as_it_was_trained(paths, tmp_path):
    assert list(clips()) == ["storybook_clip"]
    judge = ClipJudge.parse("storybook_clip", batch_size=8)
    scenes = [sample_scene(random.Random(f"judges/{number}"), emotion=None) for number in range(8)]
    drawn = [tmp_path / f"{number}.png" for number in range(8)]
    for scene, path in zip(scenes, drawn):
        render(scene).save(path)
    prompts = [content_prompt(scene.place, scene.subject) for scene in scenes]
    found = ask(judge, "drawings", drawn, prompts, tmp_path)

    model = read_model(clips()["storybook_clip"]["model"])
    pixels = torch.stack([torch.from_numpy(np.array(Image.open(path))).permute(2, 0, 1) for path in drawn])
    prepared = PixelSpec.from_clip(model).prepare(pixels / 127.5 - 1)
    tokenizer = CLIPTokenizer.from_pretrained(tiny_models.REPOSITORY / "tokenizer")
    tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
    image = model.visual_projection(model.vision_model(prepared).pooler_output).numpy()
    text = model.text_projection(model.text_model(**tokens).pooler_output).numpy()
    assert found["image"] == pytest.approx(image, abs=1e-4) and found["text"] == pytest.approx(text, abs=1e-4)
    others = ask(judge, "others", drawn, prompts[1:] + prompts[:1], tmp_path)
    assert found["similarity"].mean() > others["similarity"].mean() + 10, "it tells what a drawing shows"


def test_the_judges_of_an_example_go_by_name(tmp_path):
    scenes = [sample_scene(random.Random(f"judges/{name}"), name, strength=1.0) for name in EMOTIONS]
    drawn = [tmp_path / f"{name}.png" for name in EMOTIONS]
    for scene, path in zip(scenes, drawn):
        render(scene).save(path)
    found = ask(EmotionJudge.parse("emo_b"), "drawings", drawn, [None] * len(drawn), tmp_path)
    assert np.mean([answer == name for answer, name in zip(found.emotions, EMOTIONS)]) > 0.6
    kept = [own.count(name) / COPIES for own, name in zip(found.emotions_of_copies, EMOTIONS)]
    assert np.mean(kept) > 0.5


def test_half_precision_says_nearly_the_same(classifier_folder, clip_folder, paths, tmp_path):
    for kind, folder, name in (
        (EmotionJudge, classifier_folder, "probabilities"),
        (ClipJudge, clip_folder, "similarity"),
    ):
        full = ask(kind("full", str(folder)), "row", paths, PROMPTS, tmp_path)
        half = ask(kind("half", str(folder), dtype="bfloat16"), "row", paths, PROMPTS, tmp_path)
        assert half[name].dtype == np.float32
        assert not np.array_equal(half[name], full[name])
        assert np.abs(half[name] - full[name]).mean() < 0.02 * np.abs(full[name]).max()


def test_what_is_no_clip_is_refused_by_name(classifier_folder, tmp_path):
    folder = tmp_path / "no_clip"
    shutil.copytree(classifier_folder, folder)
    tiny_models.clip_model().vision_model.save_pretrained(folder)
    CLIPProcessor(CLIPImageProcessor(), tiny_models.tokenizer()).save_pretrained(folder)
    with pytest.raises(ValueError, match="CLIPVisionModel, which is no CLIP"):
        ClipJudge("no", str(folder)).loaded  # noqa: B018
    bare = tmp_path / "bare"
    tiny_models.clip_model().save_pretrained(bare)
    tiny_models.tokenizer().save_pretrained(bare)
    with pytest.raises((ValueError, OSError), match="bare"):
        ClipJudge("bare", str(bare)).loaded  # noqa: B018
    with pytest.raises(ValueError, match="there is no folder 'no/such/place'"):
        ClipJudge("none", "no/such/place").loaded  # noqa: B018


# --------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------


def test_judges_are_named_on_command_lines():
    judge = EmotionJudge.parse("emo_a=some/path=of mine", device="cuda", batch_size=4)
    assert (judge.name, judge.source, judge.device, judge.batch_size) == ("emo_a", "some/path=of mine", "cuda", 4)
    assert ClipJudge.parse("storybook_clip").source == "storybook_clip"
    assert ClipJudge.parse("held-out.2=storybook_clip").name == "held-out.2"
    assert InceptionJudge.parse("inception") == InceptionJudge()
    with pytest.raises(ValueError, match="or one of emo_b, emo_c"):
        EmotionJudge.parse("emo_d")
    with pytest.raises(ValueError, match="or one of storybook_clip"):
        ClipJudge.parse("emo_b")
    for text in ("=path", "", "name=", "openai/clip=x", "../up=x", ".hidden=x", "two words=x"):
        with pytest.raises(ValueError, match="name=path-or-id"):
            ClipJudge.parse(text)


def test_rows_of_any_name_have_files_of_their_own(tmp_path):
    names = ["MUSE, η = 18", "MUSE, η = 1/8", "MUSE-η-18", "MUSE -η -18", "..", "a/b", "a b", "a-b", "A-b", "x" * 60]
    files = [answers_file(tmp_path, "emo_b", name) for name in names]
    assert len(set(files)) == len(names)
    assert all(file.parent == tmp_path / "judged" / "emo_b" and file.suffix == ".safetensors" for file in files)
    assert answers_file(tmp_path, "emo_b", "a-b").name == "a-b.safetensors"
    assert files[0] != answers_file(tmp_path, "emo_c", names[0])


# --------------------------------------------------------------------------------------
# What is kept
# --------------------------------------------------------------------------------------


def test_nobody_is_asked_twice(classifier_folder, clip_folder, paths, tmp_path, asked):
    for judge in (EmotionJudge("emo", str(classifier_folder), batch_size=3), ClipJudge("clip", str(clip_folder))):
        first = ask(judge, "row", paths, PROMPTS, tmp_path)
        assert sum(asked.since()) == 7
        again = ask(type(judge)(judge.name, judge.source), "row", paths, PROMPTS, tmp_path)
        assert asked.since() == [] and same(first, again) and first.identity == again.identity
        files = list((tmp_path / "judged" / judge.name).iterdir())
        assert [file.name for file in files] == ["row.safetensors"], "one whole file"
        backwards = ask(judge, "row", paths[::-1], PROMPTS[::-1], tmp_path)
        assert asked.since() == []
        assert all(np.array_equal(first[name], backwards[name][::-1]) for name in first.values)


def test_batches_are_as_large_as_told(classifier_folder, paths, tmp_path, asked, monkeypatch):
    judge = EmotionJudge("emo", str(classifier_folder), batch_size=3)
    ask(judge, "row", paths, PROMPTS, tmp_path)
    assert asked.since() == [3, 3, 1]
    monkeypatch.setattr(judges, "KEPT_EVERY", 2)
    ask(judge, "other", paths, PROMPTS, tmp_path)
    assert asked.since() == [3, 3, 1]


def test_only_pictures_that_changed_are_asked_about_again(classifier_folder, paths, tmp_path, asked):
    judge = EmotionJudge("emo", str(classifier_folder))
    first = ask(judge, "row", paths, PROMPTS, tmp_path)
    Image.new("RGB", (32, 32), "red").save(paths[2])
    asked.since()
    again = ask(judge, "row", paths, PROMPTS, tmp_path)
    assert asked.since() == [1]
    changed = np.abs(again["probabilities"] - first["probabilities"]).max(axis=1) > 0
    assert changed.tolist() == [number == 2 for number in range(7)]
    more = ask(judge, "row", [*paths[:3], paths[0]], PROMPTS[:4], tmp_path)
    assert asked.since() == [] and np.array_equal(more["probabilities"][0], more["probabilities"][3])
    paths[0].rename(paths[0].with_name("renamed.png"))
    ask(judge, "row", [paths[0].with_name("renamed.png"), *paths[1:]], PROMPTS, tmp_path)
    assert asked.since() == [], "pictures are known by content"


def test_pictures_that_are_the_same_are_asked_about_once(classifier_folder, paths, tmp_path, asked):
    shutil.copy(paths[0], paths[4])
    found = ask(EmotionJudge("emo", str(classifier_folder)), "row", paths, PROMPTS, tmp_path)
    assert asked.since() == [6]
    assert np.array_equal(found["copies"][0], found["copies"][4])


def test_another_prompt_is_a_question_to_a_clip_only(classifier_folder, clip_folder, paths, tmp_path, asked):
    others = ["a tree", *PROMPTS[1:]]
    for judge, expected in (
        (EmotionJudge("emo", str(classifier_folder)), []),
        (ClipJudge("clip", str(clip_folder)), [1]),
    ):
        first = ask(judge, "row", paths, PROMPTS, tmp_path)
        asked.since()
        again = ask(judge, "row", paths, others, tmp_path)
        assert asked.since() == expected
        if expected:
            assert np.array_equal(first["image"][1:], again["image"][1:])
            assert not np.allclose(first["text"][0], again["text"][0])


@pytest.mark.parametrize("change", ["weights", "dtype", "labels", "center_crop"])
def test_another_judge_of_the_same_name_is_asked_about_all(change, classifier_folder, paths, tmp_path, asked):
    folder = tmp_path / "classifier"
    shutil.copytree(classifier_folder, folder)
    ask(EmotionJudge("emo", str(folder)), "row", paths, PROMPTS, tmp_path)
    asked.since()
    options = {"dtype": {"dtype": "bfloat16"}, "center_crop": {"center_crop": True}}.get(change, {})
    if change == "weights":
        tiny_models.emotion_classifier(seed=1).save_pretrained(folder)
    if change == "labels":
        config = json.loads((folder / "config.json").read_text())
        config["id2label"]["0"] = "joy"
        config["label2id"] = {name: int(index) for index, name in config["id2label"].items()}
        (folder / "config.json").write_text(json.dumps(config))
    other = ask(EmotionJudge("emo", str(folder), **options), "row", paths, PROMPTS, tmp_path)
    assert sum(asked.since()) == 7
    assert recall("emo", "row", paths, PROMPTS, tmp_path).identity == other.identity


def test_another_processor_makes_another_clip(clip_folder, paths, tmp_path, asked):
    folder = tmp_path / "clip"
    shutil.copytree(clip_folder, folder)
    ask(ClipJudge("clip", str(folder)), "row", paths, PROMPTS, tmp_path)
    processor = CLIPProcessor.from_pretrained(folder)
    processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    processor.save_pretrained(folder)
    asked.since()
    ask(ClipJudge("clip", str(folder)), "row", paths, PROMPTS, tmp_path)
    assert sum(asked.since()) == 7


def test_a_run_that_ends_early_goes_on_where_it_ended(classifier_folder, paths, tmp_path, asked, monkeypatch):
    monkeypatch.setattr(judges, "KEPT_EVERY", 4)
    judge = EmotionJudge("emo", str(classifier_folder), batch_size=2)
    asked.break_at = 3
    with pytest.raises(KeyboardInterrupt):
        ask(judge, "row", paths, PROMPTS, tmp_path)
    with pytest.raises(ValueError, match="3 of 7 pictures of 'row'"):
        recall("emo", "row", paths, PROMPTS, tmp_path)
    asked.break_at = None
    asked.since()
    found = ask(judge, "row", paths, PROMPTS, tmp_path)
    assert sum(asked.since()) == 3, "what the last four had been asked was kept"
    assert same(found, ask(judge, "anew", paths, PROMPTS, tmp_path))


def test_a_torn_file_is_no_answer(classifier_folder, paths, tmp_path, asked):
    judge = EmotionJudge("emo", str(classifier_folder))
    ask(judge, "row", paths, PROMPTS, tmp_path)
    file = answers_file(tmp_path, "emo", "row")
    file.write_bytes(file.read_bytes()[:-50])
    asked.since()
    ask(judge, "row", paths, PROMPTS, tmp_path)
    assert asked.since() == [7]


def test_answers_are_recalled_without_the_judge(clip_folder, paths, tmp_path, monkeypatch):
    found = ask(ClipJudge("clip", str(clip_folder)), "row", paths, PROMPTS, tmp_path)
    monkeypatch.setattr(ClipJudge, "loaded", property(lambda self: pytest.fail("it was loaded")))
    assert same(found, recall("clip", "row", paths, PROMPTS, tmp_path))
    one = recall("clip", "row", paths[3:4], PROMPTS[3:4], tmp_path)
    assert np.array_equal(one["similarity"], found["similarity"][3:4])
    with pytest.raises(ValueError, match="1 of 7 pictures of 'row', such as .*2.png"):
        recall("clip", "row", paths, [*PROMPTS[:2], "another", *PROMPTS[3:]], tmp_path)
    with pytest.raises(ValueError, match="7 of 7"):
        recall("clip", "other row", paths, PROMPTS, tmp_path)
    with pytest.raises(ValueError, match="1 prompts of 7 pictures"):
        recall("clip", "row", paths, PROMPTS[:1], tmp_path)


def test_a_judge_is_loaded_once_for_all_rows_and_goes_at_the_end(classifier_folder, paths, tmp_path, monkeypatch):
    loads, load = [], judges.load_classifier
    monkeypatch.setattr(judges, "load_classifier", lambda args: loads.append(args.device) or load(args))
    judge = EmotionJudge("emo", str(classifier_folder))
    rows = {"first": (paths[:4], PROMPTS[:4]), "second": (paths[2:], PROMPTS[2:]), "none": ([], [])}
    found = ask_all(judge, rows, tmp_path, **QUIET)
    assert loads == ["cpu"] and list(found) == list(rows)
    assert np.array_equal(found["first"]["copies"][2:], found["second"]["copies"][:2])
    assert found["none"].values == {} and found["none"].labels == found["first"].labels
    assert not {"loaded", "identity"} & vars(judge).keys()


def test_the_progress_tells_judge_and_row(classifier_folder, paths, tmp_path, capsys):
    judge = EmotionJudge("emo", str(classifier_folder))
    ask(judge, "a row", paths, PROMPTS, tmp_path)
    assert "emo: a row: 100%" in capsys.readouterr().err
    ask(judge, "a row", paths, PROMPTS, tmp_path)
    assert "a row" not in capsys.readouterr().err, "nothing was waiting"


# --------------------------------------------------------------------------------------
# What cannot be answered
# --------------------------------------------------------------------------------------


def test_a_picture_that_cannot_be_read_is_named(classifier_folder, paths, tmp_path):
    paths[3].write_bytes(paths[3].read_bytes()[:60])
    with pytest.raises(ValueError, match=r"3\.png' cannot be read as a picture"):
        ask(EmotionJudge("emo", str(classifier_folder)), "row", paths, PROMPTS, tmp_path)


def test_an_answer_that_is_not_finite_is_none(paths, tmp_path):
    class Broken(EmotionJudge):
        identity = {"kind": "classifier", "labels": ["awe"]}

        def __call__(self, images, prompts):
            values = np.ones((len(images), 1), np.float32)
            values[1] = self.value
            return {"probabilities": values.astype(self.kind)}

    for value, kind in ((np.nan, np.float32), (-1, np.int16)):
        judge = Broken("broken", "nowhere", dtype="float16")
        judge.value, judge.kind = value, kind
        with pytest.raises(ValueError, match=r"'broken' to '.*1\.png' is not finite in float16"):
            ask(judge, "row", paths, PROMPTS, tmp_path)
        assert not answers_file(tmp_path, "broken", "row").exists()


def test_a_classifier_that_overflows_is_told(classifier_folder, paths, tmp_path):
    judge = EmotionJudge("emo", str(classifier_folder))
    judge.loaded[0].classifier[-1].bias.data.fill_(torch.inf)
    told = judge([Image.open(paths[0]).convert("RGB")], [None])
    assert np.isnan(told["probabilities"]).all() and (told["copies"] == -1).all()


# --------------------------------------------------------------------------------------
# Reference pictures
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("normalize", [False, True])
def test_statistics_of_a_folder_are_those_of_its_features(normalize, clip_folder, paths, tmp_path, asked):
    judge = ClipJudge("clip", str(clip_folder), batch_size=3)
    features = ask(judge, "folder", paths, [None] * 7, tmp_path)["image"].astype(float)
    if normalize:
        features /= np.linalg.norm(features, axis=1, keepdims=True)
    asked.since()
    found = reference_statistics(judge, "image", paths, tmp_path / "reference.npz", normalize)
    assert asked.since() == [3, 3, 1] and found.count == 7
    assert found.mean == pytest.approx(features.mean(0), abs=1e-5)
    assert found.covariance == pytest.approx(np.cov(features, rowvar=False), abs=1e-5)
    again = reference_statistics(judge, "image", paths[::-1], tmp_path / "reference.npz", normalize)
    assert asked.since() == [] and np.array_equal(again.covariance, found.covariance)
    reference_statistics(judge, "image", paths, tmp_path / "reference.npz", not normalize)
    reference_statistics(judge, "image", paths[:6], tmp_path / "reference.npz", not normalize)
    assert asked.since() == [3, 3, 1, 3, 3]


def test_statistics_of_others_are_not_overwritten(clip_folder, paths, tmp_path):
    Statistics.of(np.random.default_rng(0).normal(size=(9, 4))).save(tmp_path / "theirs.npz")
    with pytest.raises(ValueError, match="theirs.npz"):
        reference_statistics(ClipJudge("clip", str(clip_folder)), "image", paths, tmp_path / "theirs.npz")
    assert len(Statistics.load(tmp_path / "theirs.npz").mean) == 4


# --------------------------------------------------------------------------------------
# The extra
# --------------------------------------------------------------------------------------


def test_a_missing_extra_is_told_in_one_line(monkeypatch, paths, tmp_path):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    monkeypatch.setitem(sys.modules, "lpips", None)
    for act in (
        lambda: ask(InceptionJudge(), "row", paths, PROMPTS, tmp_path),
        lpips_distance,
    ):
        with pytest.raises(ImportError, match=r'muse-diffusers\[paper\]".* torchvision') as caught:
            act()
        assert "\n" not in str(caught.value)


def test_inception_is_given_eight_bits(monkeypatch, paths, tmp_path):
    class Extractor(torch.nn.Module):  # what torch-fidelity's checks of its input
        def __init__(self, name, features_list, feature_extractor_weights_path=None):
            super().__init__()
            assert features_list == ["2048"] and feature_extractor_weights_path in (None, "weights.pth")
            self.scale = torch.nn.Parameter(torch.ones(1), requires_grad=False)

        def forward(self, pixels):
            assert pixels.dtype == torch.uint8 and pixels.ndim == 4 and pixels.shape[1] == 3
            return (self.scale * pixels.float().mean(dim=(2, 3)),)

    stand_in = types.SimpleNamespace(FeatureExtractorInceptionV3=Extractor)
    monkeypatch.setitem(sys.modules, "torch_fidelity", stand_in)
    found = ask(InceptionJudge(), "row", paths, PROMPTS, tmp_path)
    for path, features in zip(paths, found["features"]):
        expected = np.array(Image.open(path).convert("RGB")).reshape(-1, 3).mean(0)
        assert features == pytest.approx(expected, rel=1e-5)
    assert InceptionJudge.parse("mine=weights.pth").loaded is not None


def test_lpips_is_given_a_batch_of_one(monkeypatch):
    class Network(torch.nn.Module):
        def __init__(self, net, verbose):
            super().__init__()
            assert net == "alex" and not verbose

        def forward(self, first, second):
            assert first.shape == second.shape == (1, 3, 5, 6) and first.dtype == torch.float32
            return (first - second).abs().mean()[None, None, None, None]

    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=Network))
    zeros, ones = np.zeros((3, 5, 6), np.float32), np.ones((3, 5, 6), np.float32)
    assert lpips_distance()(zeros, ones) == 1


# --------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------


def test_pictures_are_read_when_they_are_looked_at(paths):
    shown = Pictures([*paths, Path("nowhere.png")])
    assert len(shown) == 8 and len(shown[2:4]) == 2
    assert np.array_equal(shown[3], np.array(Image.open(paths[3]).convert("RGB")))
    assert np.array_equal(shown[2:4][1], shown[3])
    with pytest.raises(ValueError, match="nowhere.png"):
        shown[7]


def test_pictures_are_cut_around_the_middle_to_a_size(tmp_path):
    wide = Image.new("RGB", (60, 20), "blue")
    wide.paste("red", (20, 0, 40, 20))
    wide.save(tmp_path / "wide.png")
    found = Pictures([tmp_path / "wide.png"], size=(10, 10))[0]
    assert found.shape == (10, 10, 3) and found[..., 0].min() == 255 and found[..., 2].max() == 0
    assert Pictures([tmp_path / "wide.png"], size=(30, 10))[0].shape == (10, 30, 3)
