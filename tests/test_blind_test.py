import base64
import io
import json
import random
import re
import sys

import blind_test
import pytest
import score_emotions
import tiny_models
import torch
from blind_test import Picture, figures, mean_ranks, order_of, read_guesses, results, whole_word
from muse_examples.blind import make_rater_sheets
from muse_examples.classifiers import picture_pixels
from muse_examples.degradations import COPIES, degraded
from muse_examples.metrics import wilson_interval
from muse_examples.pipelines import judges
from muse_examples.runs import save_picture
from PIL import Image

from pipeline_muse import MIKELS_WHEEL, PixelSpec


EMOTIONS = list(MIKELS_WHEEL)


def make_run(folder, emotions, number=0):
    """A folder as generate.py leaves it: a picture of noise per emotion; the first one's gate never opened."""
    for index, emotion in enumerate(emotions):
        name = emotion if isinstance(emotion, str) else "other"
        entry = {"file": f"{index:03d}_{name}_0.png", "prompt": f"scene {index}", "emotion": emotion, "seed": 0}
        if emotion is not None:
            entry |= {"gate_step": index or None}
        pixels = random.Random(f"{number}/{index}").randbytes(3 * 24 * 16)
        folder.mkdir(exist_ok=True)
        save_picture(Image.frombytes("RGB", (24, 16), pixels), entry, folder)
    return folder


@pytest.fixture
def runs(tmp_path):
    return [make_run(tmp_path / name, EMOTIONS, number) for number, name in enumerate(("full", "fast"))]


def make(folders, output, *options):
    blind_test.main(["make", *map(str, folders), "--output_dir", str(output), *options])
    return json.loads(blind_test.key_path(output).read_text())


def questions_of(page) -> list[dict]:
    return json.loads(re.search(r"const questions = (.*), keys = ", page)[1])


def picture_of(uri) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))


def test_the_key_knows_every_picture_of_the_form_whose_order_is_the_seeds(runs, tmp_path):
    keys = [make(runs, tmp_path / name, "--seed", seed) for name, seed in (("a", "1"), ("b", "1"), ("c", "2"))]
    orders = [[(entry["method"], entry["file"]) for entry in key["pictures"].values()] for key in keys]
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[0]) == sorted(orders[2]) != orders[0] and len(orders[0]) == 16
    questions = questions_of((tmp_path / "a" / "form.html").read_text())
    assert [question["name"] for question in questions] == list(keys[0]["pictures"]) == [str(k) for k in range(1, 17)]
    for question, (method, file) in zip(questions, orders[0]):
        shown = picture_of(question["pictures"][0])
        with Image.open(tmp_path / method / file) as image:
            assert shown.tobytes() == image.tobytes()
        assert shown.info == {} and question["choices"] == EMOTIONS
    assert (tmp_path / "a" / "sheet_01.png").exists() and not (tmp_path / "a" / "sheet_02.png").exists()
    assert len(make(runs, tmp_path / "few", "--pictures", "5")["pictures"]) == 5


def test_what_is_handed_out_does_not_depend_on_what_was_meant(tmp_path):
    """The same pixels under the same names with other emotions in their records: the same bytes."""
    made = []
    for number, emotions in enumerate((EMOTIONS, EMOTIONS[::-1])):
        folder = tmp_path / str(number) / "run"
        folder.mkdir(parents=True)
        lines = [json.dumps({"file": f"{k}.png", "emotion": emotion}) for k, emotion in enumerate(emotions)]
        (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        for k in range(len(emotions)):
            Image.new("RGB", (16, 16), (20 * k, 0, 0)).save(folder / f"{k}.png")
        key = make([folder], tmp_path / str(number) / "blind")
        made.append({path.name: path.read_bytes() for path in (tmp_path / str(number) / "blind").iterdir()})
    assert sorted(made[0]) == ["form.html", "sheet_01.png"] and made[0] == made[1]
    assert {entry["opened"] for entry in key["pictures"].values()} == {None} and key["ranks"] == {}


def test_pictures_without_one_emotion_are_left_out(tmp_path, capsys):
    run = make_run(tmp_path / "run", ["awe", None, {"awe": 0.5, "fear": 0.5}, "fear"])
    Image.new("RGB", (8, 8)).save(run / "no_record.png")
    key = make([run], tmp_path / "blind")
    assert sorted(entry["emotion"] for entry in key["pictures"].values()) == ["awe", "fear"]
    assert "Left out 2 pictures" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="error: .*not empty"):
        make([run], tmp_path / "blind")
    with pytest.raises(SystemExit, match="error: .*no pictures"):
        make([make_run(tmp_path / "stock", [None])], tmp_path / "other")
    with pytest.raises(SystemExit, match="error: .*add that to --choices"):
        make([run], tmp_path / "other", "--choices", "awe", "joy")


def test_comparisons_show_each_method_once(runs, tmp_path):
    (runs[1] / "003_excitement_0.png").unlink()
    key = make(runs, tmp_path / "blind")
    assert len(key["ranks"]) == 7 and (tmp_path / "blind" / "ranks_01.png").exists()
    for question in questions_of((tmp_path / "blind" / "ranks.html").read_text()):
        group = key["ranks"][question["name"]]
        assert sorted(entry["method"] for entry in group) == ["fast", "full"]
        assert len({entry["content"] for entry in group}) == 1 and group[0]["emotion"] in question["text"]
        assert question["take"] == 2 and question["choices"] == ["A", "B"]
    assert len({tuple(entry["method"] for entry in group) for group in key["ranks"].values()}) == 2, "in random order"


def test_sheets_of_rows_by_name_and_as_many_as_are_asked_for(runs, tmp_path):
    folders = dict(zip(("MUSE, η = 20", "stock"), runs))
    written = make_rater_sheets(folders, tmp_path / "raters", pictures=5, seed=1, comparisons=3)
    assert written == (5, 3, 0)
    key = json.loads((tmp_path / "raters_key.json").read_text())
    assert key["folders"] == {name: str(folder.resolve()) for name, folder in folders.items()}
    assert len(key["pictures"]) == 5 and list(key["ranks"]) == ["R1", "R2", "R3"]
    assert {entry["method"] for entry in key["pictures"].values()} <= folders.keys()
    with pytest.raises(ValueError, match="raters' is not empty"):
        make_rater_sheets(folders, tmp_path / "raters")


def test_wilsons_interval():
    """Of the example of Newcombe (1998), 81 of 263, and at the ends."""
    assert wilson_interval(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert wilson_interval(0, 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert wilson_interval(20, 20) == pytest.approx((0.8389, 1), abs=5e-5)
    assert wilson_interval(0, 0) == (0, 1)


def test_figures_by_hand():
    pairs = [("awe", "awe"), ("awe", "contentment"), ("fear", "awe"), ("fear", "fear"), ("cozy", "cozy")]
    found = figures(pairs)
    assert (found["answers"], found["right"], found["accuracy"], found["valence"]) == (5, 3, 0.6, 0.75)
    assert found["interval"] == list(wilson_interval(3, 5))
    assert figures([])["accuracy"] is None and figures([("cozy", "cozy")])["valence"] is None


def key_of(*entries) -> dict:
    """A key of pictures (method, emotion, opened)."""
    pictures = {
        str(k): {"method": method, "file": "", "emotion": emotion, "opened": opened, "content": "", "prompt": ""}
        for k, (method, emotion, opened) in enumerate(entries, start=1)
    }
    return {"choices": ["awe", "anger", "fear"], "folders": {}, "pictures": pictures, "ranks": {}}


def test_results_by_hand():
    key = key_of(
        ("a", "awe", True), ("a", "fear", False), ("b", "awe", None), ("b", "anger", True), ("b", "fear", True)
    )
    first = {"1": "awe", "2": "awe", "3": "fear", "4": "fear"}  # the fifth was not answered
    judge = {"1": ["awe"], "2": ["awe"], "3": ["awe"], "4": ["anger"]}
    copies = {number: answer * 3 + ["fear"] for number, answer in judge.items()}
    found = results(key, [(first, {}), ({"1": "awe"}, {})], {"emo": judge, "emo degraded": copies})
    groups = found["groups"]
    assert list(groups) == ["all", "all, gate opened", "all, gate never opened", "a"] + [
        "a, gate opened",
        "a, gate never opened",
        "b",
    ]
    shown = {label: (entry["pictures"], entry["people"]["accuracy"]) for label, entry in groups.items()}
    assert shown["all"] == (4, 2 / 5) and shown["all, gate opened"] == (3, 2 / 4)
    assert shown["all, gate never opened"] == (1, 0) and shown["b"] == (2, 0)
    assert groups["all"]["people"]["valence"] == 3 / 5
    assert groups["all"]["emo"]["accuracy"] == 3 / 4
    assert groups["all"]["emo degraded"]["accuracy"] == (3 + 1 + 3 + 3) / 16
    assert "interval" in groups["all"]["emo"] and "interval" not in groups["all"]["emo degraded"]
    assert found["confusion"] == [[2, 0, 1], [0, 0, 1], [0, 0, 0]], "without the picture whose gate never opened"
    assert found["emotions"]["fear"]["people"]["answers"] == 0
    assert [own["accuracy"] for own in found["people"]] == [1 / 4, 1]
    text = blind_test.report(found)
    assert re.search(r"^all, gate opened +3 +50.0 +15–85 +75.0 +100.0 \(75.0\)$", text, re.M)
    assert "25.0 of 4, 100.0 of 1" in text


def test_mean_ranks_by_hand():
    a, b, c = (Picture(method, "", "awe", None, "", "") for method in "abc")
    questions = {"R1": [a, b, c], "R2": [c, a, b]}
    found = mean_ranks(questions, [("R1", [1, 0, 2]), ("R2", [2, 1, 0])])
    assert found == {
        "b": {"mean": 1, "first": 1, "comparisons": 2},
        "a": {"mean": 2, "first": 0, "comparisons": 2},
        "c": {"mean": 3, "first": 0, "comparisons": 2},
    }


def test_guesses_are_read_as_people_write_them():
    key = key_of(*[("a", "awe", True)] * 4) | {"ranks": {"R1": [{}, {}, {}]}}
    text = "# mine\n1 awe\n 02, FEAR\n\n3: an\n4 ?\nr1, b a c\n"
    assert read_guesses(text, key) == ({"1": "awe", "2": "fear", "3": "anger"}, {"R1": [1, 0, 2]})
    for wrong in ("9 awe", "1 joy", "1 a", "1 awe\n1 fear", "R1 A B", "R1 A A B", "R2 A B C", "awe"):
        with pytest.raises(ValueError, match=r"^line \d, "):
            read_guesses(wrong, key)
    assert whole_word("sad", ["sad", "sadness"]) == "sad"
    assert order_of("BCA", 3) == [1, 2, 0]


def test_scoring_from_the_command_line(runs, tmp_path, capsys):
    key = make(runs, tmp_path / "blind")
    wrong = {"awe": "fear"}
    lines = [f"{k} {wrong.get(entry['emotion'], entry['emotion'])}" for k, entry in key["pictures"].items()]
    order = {name: "AB" if group[0]["method"] == "full" else "BA" for name, group in key["ranks"].items()}
    guesses = tmp_path / "guesses.txt"
    guesses.write_text("\n".join([*lines, *(f"{name} {letters}" for name, letters in order.items())]))
    tiny_models.emotion_classifier(id2label=dict(enumerate(EMOTIONS))).save_pretrained(tmp_path / "tiny")
    options = ["--judges", str(tmp_path / "tiny"), "--device", "cpu"]
    blind_test.main(["score", str(tmp_path / "blind_key.json"), str(guesses), *options])
    found = json.loads((tmp_path / "blind_scores.json").read_text())
    assert found["groups"]["full"]["people"]["accuracy"] == 7 / 8
    assert found["groups"]["all, gate never opened"]["pictures"] == 2
    assert found["groups"]["all"]["tiny degraded"]["answers"] == 16 * COPIES
    assert found["ranks"]["full"]["mean"] == 1 and found["ranks"]["fast"]["mean"] == 2
    assert "mean rank" in capsys.readouterr().out
    guesses.write_text("1 joy")
    with pytest.raises(SystemExit, match=r"error: '.*guesses.txt', line 1, '1 joy': 'joy' is none of amusement"):
        blind_test.main(["score", str(tmp_path / "blind_key.json"), str(guesses)])
    with pytest.raises(SystemExit, match="error: .*is no key"):
        blind_test.main(["score", str(tmp_path / "blind_scores.json"), str(guesses)])


# --------------------------------------------------------------------------------------
# Degradations, and judges by name
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (40, 97), (3, 5)], ids=str)
def test_degradations_are_the_same_in_every_call_and_mild(size):
    torch.manual_seed(0)
    coarse = torch.rand(2, 3, 4, 4) * 1.6 - 0.8
    pixels = torch.nn.functional.interpolate(coarse, size, mode="bilinear", align_corners=False)
    copies = degraded(pixels)
    assert copies.shape == (COPIES, 2, 3, *size) and copies.abs().max() <= 1
    torch.manual_seed(1)
    assert torch.equal(copies, degraded(pixels))
    assert torch.allclose(copies[:, 1:], degraded(pixels[1:]), atol=1e-5), "whatever else is in the batch"
    distances = (copies - pixels).abs().mean(dim=(1, 2, 3, 4))
    assert 0.01 < distances.min() and distances.max() < 0.2
    assert len({round(float(distance), 5) for distance in distances}) == COPIES
    others = degraded(pixels, 2, torch.Generator().manual_seed(5))
    assert others.shape[0] == 2 and not torch.equal(others, copies[:2])


def test_degradations_pass_gradients_on_even_where_pixels_are_cut_off():
    pixels = torch.ones(1, 3, 16, 16, requires_grad=True)
    copies = degraded(pixels, copies=4)
    assert copies.max() == 1, "some were cut off"
    (gradient,) = torch.autograd.grad(copies.sum(), pixels)
    assert torch.isfinite(gradient).all() and (gradient > 0.5).all()


def test_a_picture_is_degraded_alike_at_any_size():
    small = Image.new("RGB", (64, 64), "navy")
    small.paste("gold", (20, 10, 44, 50))
    spec = PixelSpec((64, 64), (0.5,) * 3, (0.5,) * 3)
    copies = [picture_pixels(small.resize((side, side), 0), spec, copies=4) for side in (64, 256, 1024)]
    for one in copies[1:]:
        assert (one - copies[0]).abs().mean() < 0.05 < (copies[0] - picture_pixels(small, spec)).abs().mean()


def test_the_judges_of_storybook_go_by_name(tmp_path, capsys):
    sys.path.append(str(tiny_models.REPOSITORY / "examples" / "storybook"))
    from world import render, sample_scene

    scenes = [
        sample_scene(random.Random(f"blind/{index}"), emotion, strength=1.0) for index, emotion in enumerate(EMOTIONS)
    ]
    for scene in scenes:
        render(scene).save(tmp_path / f"{scene.emotion}.png")
    assert sorted(judges()) == ["emo_b", "emo_c"]
    for name in judges():
        output = tmp_path / name
        options = ["--classifier", name, "--degraded", "--output_dir", str(output), "--device", "cpu"]
        score_emotions.main([str(tmp_path), *options])
        summary = json.loads((output / "summary.json").read_text())
        assert summary["accuracy"] > 0.6 and summary["accuracy_degraded"] > 0.5
        rows = [json.loads(line) for line in (output / "scores.jsonl").read_text().splitlines()]
        shares = [row["degraded"].count(row["intended"]) / COPIES for row in rows]
        assert summary["accuracy_degraded"] == pytest.approx(sum(shares) / len(shares))
        assert "degraded" in capsys.readouterr().out.splitlines()[0]
        assert (output / "scores.csv").read_text().splitlines()[0].endswith("sadness,kept,error")
        wanted = json.loads((output / "settings.json").read_text())["pixels"]
        assert wanted == json.loads((tmp_path / "emo_b" / "settings.json").read_text())["pixels"], "all see the same"
