import csv
import json
import os
import shutil
from pathlib import Path

import pytest
import score_emotions
import tiny_models
import torch
from modeling_simemo import SimEmoForImageClassification
from muse_examples.classifiers import label_probabilities, picture_pixels
from muse_examples.contact_sheets import EMOTION_COLORS, PAPER
from muse_examples.intentions import intended_emotion, read_intentions
from PIL import Image, ImageColor

from pipeline_muse import PixelSpec, wheel_distance


LABELS = list(tiny_models.emotion_classifier().config.id2label.values())


@pytest.fixture(scope="module")
def classifier_folder(tmp_path_factory):
    """A classifier that is sure of what it says, and that says different things."""
    folder = tmp_path_factory.mktemp("classifier")
    tiny_models.sure_classifier().save_pretrained(folder)
    return folder


@pytest.fixture
def pictures(tmp_path):
    """Twelve pictures of noise on colours, of several sizes."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(12):
        noise = Image.effect_noise((40 + number, 48), 60).convert("RGB")
        color = Image.new("RGB", noise.size, f"hsl({30 * number}, 90%, 50%)")
        Image.blend(noise, color, 0.5).save(folder / f"{number:02d}.png")
    return folder


@pytest.fixture
def score(classifier_folder, pictures, tmp_path):
    """Runs the script on `pictures`, or another folder, and returns the folder that it wrote."""

    def run(*options: str, folder=pictures, output="scores"):
        arguments = [str(folder), "--classifier", str(classifier_folder), "--output_dir", str(tmp_path / output)]
        score_emotions.main([*arguments, "--device", "cpu", "--batch_size", "4", *options])
        return tmp_path / output

    return run


class Batches:
    """Notes how many pictures each batch holds that a classifier is given; can be told to break off at one."""

    def __init__(self):
        self.sizes: list[int] = []
        self.break_at: int | None = None
        self.record: Path | None = None
        self.written: list[int] = []  # lines in the record when a batch begins

    def __call__(self, module, arguments, keywords) -> None:
        if self.record is not None:
            self.written.append(self.record.read_bytes().count(b"\n"))
        if len(self.sizes) == self.break_at:
            raise KeyboardInterrupt
        self.sizes.append(len(keywords["pixel_values"]))

    def since(self) -> list[int]:
        """The batches since the last time that this was asked."""
        sizes, self.sizes = self.sizes, []
        return sizes


@pytest.fixture
def batches(monkeypatch):
    seen, load = Batches(), score_emotions.load_classifier

    def load_watched(args):
        classifier, spec = load(args)
        classifier.register_forward_pre_hook(seen, with_kwargs=True)
        return classifier, spec

    monkeypatch.setattr(score_emotions, "load_classifier", load_watched)
    return seen


def rows_of(folder):
    return [json.loads(line) for line in (folder / "scores.jsonl").read_text().splitlines()]


def table_of(folder):
    with open(folder / "scores.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_scores_are_those_of_the_classifier_itself(score, pictures, classifier_folder):
    folder = score()
    classifier = SimEmoForImageClassification.from_pretrained(classifier_folder).eval()
    spec = PixelSpec.from_classifier(classifier)
    rows, table = rows_of(folder), table_of(folder)
    assert [row["file"] for row in rows] == [line["file"] for line in table] == [f"{k:02d}.png" for k in range(12)]
    assert list(table[0]) == ["file", "emotion", "probability", "intended", *LABELS, "error"]
    for row, line in zip(rows, table):
        pixels = picture_pixels(Image.open(pictures / row["file"]), spec)
        expected = label_probabilities(classifier, pixels)[0]
        assert row["probabilities"] == pytest.approx(expected, abs=1e-5)
        assert {label: float(line[label]) for label in LABELS} == row["probabilities"]
        assert row["emotion"] == line["emotion"] == max(expected, key=expected.get)
        assert row["probability"] == float(line["probability"]) == row["probabilities"][row["emotion"]]
    assert len({row["emotion"] for row in rows}) > 1


def test_center_crop_looks_at_the_middle(score, pictures):
    wide = pictures.parent / "wide"
    wide.mkdir()
    with Image.open(pictures / "03.png") as image:
        middle = image.crop((0, 0, 40, 40))
        middle.save(wide / "a.png")
        around = Image.new("RGB", (120, 40), "white")
        around.paste(middle, (40, 0))
        around.save(wide / "b.png")
    cut = rows_of(score("--center_crop", folder=wide, output="cut"))
    assert cut[0]["probabilities"] == pytest.approx(cut[1]["probabilities"], abs=1e-5)
    squeezed = rows_of(score(folder=wide, output="squeezed"))
    assert squeezed[0]["probabilities"] != pytest.approx(squeezed[1]["probabilities"], abs=1e-3)


def test_a_classifier_that_is_described_by_its_image_processor(score, pictures, tmp_path):
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    model = ViTForImageClassification(ViTConfig(image_size=32, patch_size=8, id2label={0: "calm", 1: "wild"}, **sizes))
    model.eval().save_pretrained(tmp_path / "vit")
    processor = ViTImageProcessorPil(size={"height": 32, "width": 32}, image_mean=[0.1] * 3, image_std=[0.7] * 3)
    processor.save_pretrained(tmp_path / "vit")
    rows = rows_of(score("--classifier", str(tmp_path / "vit")))
    with torch.no_grad():
        logits = model(**processor(Image.open(pictures / "05.png"), return_tensors="pt")).logits
    assert list(rows[5]["probabilities"].values()) == pytest.approx(logits.softmax(-1)[0].tolist(), abs=1e-3)


def test_a_run_that_was_killed_goes_on_where_it_ended(score, batches):
    unbroken = score(output="unbroken")
    assert batches.since() == [4, 4, 4]
    folder = unbroken.parent / "scores"
    record = batches.record = folder / "scores.jsonl"
    batches.break_at = 2
    with pytest.raises(KeyboardInterrupt):
        score()
    assert batches.written == [0, 4, 8], "each batch is on disk before the next begins"
    assert not (folder / "scores.csv").exists()
    record.write_bytes(record.read_bytes()[:-30])  # the kill tore the last line
    batches.break_at = 1
    assert batches.since() == [4, 4]
    with pytest.raises(KeyboardInterrupt):
        score()
    batches.break_at = None
    assert batches.since() == [4]
    score()
    assert batches.since() == [1]
    assert [list(row) for row in rows_of(folder)] == [list(row) for row in rows_of(unbroken)]
    for row, expected in zip(rows_of(folder), rows_of(unbroken)):
        assert row["emotion"] == expected["emotion"]
        assert row["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-5)
    before = record.read_bytes()
    score()
    assert batches.since() == [], "nothing was left to do"
    assert record.read_bytes() == before


def test_pictures_that_changed_are_scored_again_and_those_that_are_gone_are_not_kept(score, pictures, batches):
    before = rows_of(score())
    shutil.copy(pictures / "01.png", pictures / "07.png")
    (pictures / "02.png").unlink()
    batches.since()
    after = rows_of(score())
    assert batches.since() == [1]
    assert [row["file"] for row in after] == [row["file"] for row in before if row["file"] != "02.png"]
    by_file = {row["file"]: row for row in after}
    assert by_file["07.png"]["probabilities"] == pytest.approx(by_file["01.png"]["probabilities"], abs=1e-5)


def test_a_record_that_holds_something_else_is_refused(score):
    folder = score()
    record = folder / "scores.jsonl"
    record.write_bytes(b"{}\n" + record.read_bytes())
    with pytest.raises(SystemExit, match="Line 1 of"):
        score()


@pytest.mark.parametrize("options", [["--center_crop"], ["--dtype", "bfloat16"], ["--classifier", "other"]], ids=str)
def test_scores_of_different_kinds_are_not_mixed(score, classifier_folder, tmp_path, options):
    folder = score()
    before = (folder / "scores.jsonl").read_bytes()
    tiny_models.emotion_classifier(seed=1).save_pretrained(tmp_path / "other")
    options = [option if option != "other" else str(tmp_path / "other") for option in options]
    with pytest.raises(SystemExit, match="Choose another"):
        score(*options)
    assert (folder / "scores.jsonl").read_bytes() == before
    shutil.copytree(classifier_folder, tmp_path / "copy")
    score("--classifier", str(tmp_path / "copy"))  # the same weights under another name


def test_what_cannot_be_read_is_reported_skipped_and_tried_again(score, pictures, capsys):
    whole, state = (pictures / "04.png").read_bytes(), (pictures / "04.png").stat()
    (pictures / "04.png").write_bytes(bytes(len(whole)))
    (pictures / "05.jpg").write_text("no picture")
    (pictures / "notes.txt").write_text("no picture either, and none that was meant")
    os.utime(pictures / "04.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    table = {line["file"]: line for line in table_of(score())}
    told = capsys.readouterr().err
    assert len(table) == 13
    for name in ("04.png", "05.jpg"):
        assert table[name]["error"] and not table[name]["emotion"]
        assert f"Skipped '{name}'" in told
    assert not any(line["error"] for name, line in table.items() if name not in ("04.png", "05.jpg"))
    (pictures / "04.png").write_bytes(whole)
    os.utime(pictures / "04.png", ns=(state.st_atime_ns, state.st_mtime_ns))
    folder = score()
    assert [row["file"] for row in rows_of(folder) if "error" in row] == ["05.jpg"]
    assert json.loads((folder / "summary.json").read_text())["unreadable"] == 1


def test_only_broken_pictures(score, pictures):
    for path in pictures.iterdir():
        path.write_text("broken")
    with pytest.raises(SystemExit, match="None of the pictures"):
        score()


def test_pictures_of_all_kinds_are_seen_as_they_look(score, pictures, tmp_path):
    kinds = tmp_path / "kinds"
    kinds.mkdir()
    with Image.open(pictures / "03.png") as image:
        few = image.quantize(16)
        few.save(kinds / "palette.png")
        few.convert("RGB").save(kinds / "rgb.png")
        turned = few.convert("RGB").transpose(Image.Transpose.ROTATE_90)
        exif = Image.Exif()
        exif[0x0112] = 6  # to be turned clockwise when shown
        turned.save(kinds / "turned.png", exif=exif)
        gray = image.convert("L")
        gray.save(kinds / "gray.png")
        gray.convert("I").point(lambda value: value * 257).convert("I;16").save(kinds / "gray16.png")
    rows = {row["file"]: row["probabilities"] for row in rows_of(score(folder=kinds))}
    assert rows["palette.png"] == pytest.approx(rows["rgb.png"], abs=1e-5)
    assert rows["turned.png"] == pytest.approx(rows["rgb.png"], abs=1e-5)
    assert rows["gray16.png"] == pytest.approx(rows["gray.png"], abs=1e-5)
    assert rows["gray.png"] != pytest.approx(rows["rgb.png"], abs=1e-3)


def test_folders_within_are_scored_if_asked_for_but_never_our_own_output(score, pictures):
    (pictures / "more").mkdir()
    shutil.copy(pictures / "00.png", pictures / "more" / "a.PNG")
    (pictures / "metadata.jsonl").write_text("")
    shutil.copy(pictures / "00.png", pictures / "sheet.png")  # generate.py's
    output = "pictures/scores"
    score(output=output)
    assert len(rows_of(score(output=output))) == 12
    assert [row["file"] for row in rows_of(score("--recursive", output=output))][-1] == "more/a.PNG"
    assert len(rows_of(score("--recursive", output=output))) == 13


def test_files_of_kinds_that_are_not_read_are_told_and_hidden_ones_passed_over(score, pictures, capsys):
    (pictures / "phone.HEIC").write_bytes(b"no picture for Pillow")
    shutil.copy(pictures / "00.png", pictures / "._00.png")
    assert len(rows_of(score())) == 12
    assert "Left out 1 files that Pillow does not read: .heic" in capsys.readouterr().err


def test_metadata_names_and_folders_say_what_was_intended(tmp_path):
    def intended(file: str, **entries: object) -> str | None:
        return intended_emotion(tmp_path / file, LABELS, entries)

    assert intended("000_awe_3.png") == "awe"
    assert intended("Sea-at-dawn FEAR.jpg") == "fear"
    assert intended("awesome.png") is None
    assert intended("000_awe70+fear30_0.png") is None
    assert intended("from_awe_to_fear.png") is None
    assert intended("anger/000.png") == "anger"
    assert intended("anger/000_awe.png") == "awe"
    metadata = tmp_path / "metadata.jsonl"
    assert read_intentions(metadata) == {}
    entries = [("a_awe.png", "fear"), ("b_awe.png", None), ("c_awe.png", {"awe": 1, "fear": 1}), ("d.png", "awe")]
    lines = [json.dumps({"file": file, "emotion": emotion}) for file, emotion in entries]
    metadata.write_text("\n".join([*lines, '{"file": "torn']), encoding="utf-8-sig")
    intentions = read_intentions(metadata)
    assert [intended(file, **intentions) for file, _ in entries] == ["fear", None, None, "awe"]


def test_summary_counts_confidence_accuracy_and_recall():
    answers = [("awe", 0.9, "awe"), ("awe", 0.7, "fear"), ("fear", 0.5, "fear"), ("fear", 0.3, None)]
    rows = [{"emotion": emotion, "probability": p, "intended": intended} for emotion, p, intended in answers]
    rows.append({"error": "broken", "intended": "awe"})
    summary = score_emotions.summarize(rows, ["awe", "fear", "anger"])
    assert summary["pictures"] == 4 and summary["unreadable"] == 1
    assert summary["mean_confidence"] == pytest.approx(0.6)
    assert (summary["intended"], summary["accuracy"]) == (3, pytest.approx(2 / 3))
    assert summary["emotions"]["awe"] == {"pictures": 2, "mean_confidence": 0.8, "intended": 1, "recall": 1.0}
    assert summary["emotions"]["fear"] == {"pictures": 2, "mean_confidence": 0.4, "intended": 2, "recall": 0.5}
    assert summary["emotions"]["anger"] == {"pictures": 0, "mean_confidence": None, "intended": 0, "recall": None}
    steps = wheel_distance("fear", "awe", polarity_aware=True)
    assert steps > wheel_distance("fear", "awe") > 0
    assert (summary["ecc"], summary["emc"]) == (pytest.approx((2 + 1 / (1 + steps)) / 3), pytest.approx(1 / steps))
    for others in ([], [{"emotion": "cozy", "probability": 0.5, "intended": "awe"}]):
        assert score_emotions.summarize(others, ["awe", "cozy"])["ecc"] is None, "nothing known, or off the wheel"
    text = score_emotions.summary_text(summary).splitlines()
    assert text[2].split() == ["fear", "2", "40.0%", "2", "50.0%"]
    assert text[-2].split() == ["all", "4", "60.0%", "3", "66.7%"]
    assert text[-1] == "1 more could not be scored"


def test_the_sheet_has_a_row_per_emotion_with_the_most_confident_first(tmp_path):
    found = [("fear", 0.6), ("awe", 0.5), ("fear", 0.9), ("awe", 0.8), ("awe", 0.7), ("anger", 0.4)]
    rows = []
    for number, (emotion, probability) in enumerate(found):
        Image.new("RGB", (200, 200), (40 * number, 10, 200)).save(tmp_path / f"{number}.png")
        row = {"file": f"{number}.png", "emotion": emotion, "probability": probability, "intended": None}
        rows.append(row)
    rows.append({"file": "broken.png", "error": "broken", "intended": None})
    sheet = score_emotions.sheet_of(rows, LABELS, tmp_path, columns=2)
    colors = sheet.getcolors(sheet.width * sheet.height)
    shown = {red // 40 for count, (red, green, blue) in colors if (green, blue) == (10, 200) and count >= 200 * 200}
    assert shown == {0, 2, 3, 4, 5}, "the two most confident of each"
    expected = {"awe": [120, 160], "anger": [200, None], "fear": [80, 0]}
    for place, label in enumerate(label for label in LABELS if label in expected):
        top = 20 + 262 * place
        for left, red in zip((20, 240), expected[label]):
            color = PAPER if red is None else f"#{red:02x}0ac8"
            assert sheet.getpixel((left + 100, top + 128)) == ImageColor.getrgb(color)
        title = sheet.crop((20, top, 220, top + 28))
        assert ImageColor.getrgb(EMOTION_COLORS[label]) in {color for _, color in title.getcolors(title.width * 28)}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["missing"], "no folder"),
        (["empty"], "holds no pictures"),
        (["pictures", "--batch_size", "0"], "positive"),
        (["pictures", "--output_dir", "pictures/00.png"], "is a file"),
        (["pictures", "--dtype", "int8"], "int8"),
        (["pictures", "--columns", "many"], "positive"),
    ],
    ids=str,
)
def test_bad_arguments_end_the_program_before_models_load(pictures, monkeypatch, options, message, capsys):
    monkeypatch.chdir(pictures.parent)
    (pictures.parent / "empty").mkdir()
    with pytest.raises(SystemExit):
        score_emotions.parse_args(options)
    assert message in capsys.readouterr().err


def test_a_classifier_that_is_not_there_or_lacks_its_numbers(score, tmp_path):
    with pytest.raises(SystemExit, match="error: --classifier"):
        score("--classifier", str(tmp_path / "nowhere"))
    tiny_models.emotion_classifier(id2label={0: "awe"}).save_pretrained(tmp_path / "one label")
    with pytest.raises(SystemExit, match="error: --classifier: .*label"):
        score("--classifier", str(tmp_path / "one label"))


def test_the_bundled_classifier_is_the_default(pictures, tmp_path):
    score_emotions.main([str(pictures), "--output_dir", str(tmp_path / "out"), "--device", "cpu"])
    settings = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert settings["pixels"]["size"] == [64, 64]
    assert settings["labels"][:2] == ["amusement", "awe"]
