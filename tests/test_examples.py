import argparse
import json
import shutil

import edit
import generate
import loading
import numpy as np
import pytest
import quickstart
import tiny_models
import torch
from jobs import Job, batches, make_pictures, read_records, record, run_settings, save_picture, write_summary
from PIL import Image, ImageFont
from safetensors.torch import save_file
from sheets import Cell, contact_sheet, enlarge, save, wrap
from storybook_settings import MUSE_SETTINGS, MUSE_XL_SETTINGS

from pipeline_muse import EMOTION_PROMPTS, MusePipeline, PixelSpec


PICTURE = str(quickstart.PICTURE)


@pytest.mark.parametrize(
    ("text", "emotion", "name"),
    [
        ("awe", "awe", "awe"),
        ("none", None, "stock"),
        ("awe=0.7,fear=0.3", {"awe": 0.7, "fear": 0.3}, "awe70+fear30"),
        ("awe=3, fear=1", {"awe": 3.0, "fear": 1.0}, "awe75+fear25"),
    ],
)
def test_emotions_of_the_command_line(text, emotion, name):
    assert loading.parse_emotion(text) == emotion
    assert loading.emotion_name(emotion) == name


@pytest.mark.parametrize("text", ["awe,fear", "awe=-1", "awe=nan", "awe=inf", "awe=1,awe=2", "=1", "awe=", "awe=x"])
def test_malformed_mixtures_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="mixture"):
        loading.parse_emotion(text)


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (generate, ["--emotion", "none"], "--prompt"),
        (generate, ["--prompt", "a cat", "--emotion", "awe", "--height", "65"], "multiple of 8"),
        (generate, ["--prompt", "a cat", "--emotion", "awe", "--batch_size", "0"], "positive"),
        (generate, ["--prompts", "missing.txt", "--emotion", "awe"], "missing.txt"),
        (generate, ["--prompts", PICTURE, "--emotion", "awe"], "not UTF-8"),
        (generate, ["--prompt", "a cat", "--output_dir", PICTURE], "is a file"),
        (edit, ["--image", PICTURE, "--emotion", "awe"], "--prompt"),
        (edit, ["--image", "missing.png", "--prompt", "a", "--emotion", "awe"], "missing.png"),
        (edit, ["--image", PICTURE, "--prompt", "a", "b", "--emotion", "awe"], "2 prompts for 1 pictures"),
        (edit, ["--image", PICTURE, "--prompt", "a", "--emotion", "awe", "--strength", "1.5"], "--strength"),
        (edit, ["--image", PICTURE, "--prompt", "a", "--emotion", "awe", "--mask", PICTURE, PICTURE], "2 masks for 1"),
        (edit, ["--image", PICTURE, "--prompt", "a", "--emotion", "awe", "--mask", __file__], "cannot be opened"),
        (edit, ["--image", __file__, "--prompt", "a", "--emotion", "awe"], "cannot be opened as a picture"),
        (generate, ["--prompt", "a", "--emotion", "awe", "--emotion_strength", "0"], "--emotion_strength"),
        (generate, ["--prompt", "a", "--emotion", "awe", "--max_inner_batch", "0"], "--max_inner_batch"),
        (quickstart, ["--caption", "a cat"], "--image"),
        (quickstart, ["--image", "missing.png"], "missing.png"),
    ],
    ids=str,
)
def test_bad_arguments_end_the_program_before_models_load(script, arguments, message, capsys):
    with pytest.raises(SystemExit):
        script.parse_args(arguments)
    assert message in capsys.readouterr().err


def test_generation_makes_every_prompt_with_every_emotion_from_the_same_seeds(tmp_path):
    (tmp_path / "prompts.txt").write_text("a dog\n\n a boat \n")
    arguments = ["--prompt", "a cat", "--prompts", str(tmp_path / "prompts.txt"), "--emotion", "awe", "none"]
    jobs = generate.plan(generate.parse_args([*arguments, "--num_images", "2", "--seed", "5"]))
    assert {(job.prompt, job.emotion, job.seed) for job in jobs} == {
        (prompt, emotion, seed)
        for prompt in ("a cat", "a dog", "a boat")
        for emotion in ("awe", None)
        for seed in (5, 6)
    }
    assert len({job.file_name for job in jobs}) == len(jobs) == 12


def test_a_long_file_of_prompts_is_read_line_by_line(tmp_path):
    lines = [f"a cat, {number % 400}" for number in range(996)] + ["", "  ", "ein Schloß\u2028am Meer 🌊", " 城 "]
    (tmp_path / "prompts.txt").write_bytes(b"\xef\xbb\xbf" + "\r\n".join(lines).encode())
    jobs = generate.plan(generate.parse_args(["--prompts", str(tmp_path / "prompts.txt")]))
    assert [job.prompt for job in jobs[::8]] == [*lines[:996], "ein Schloß\u2028am Meer 🌊", "城"]
    assert [job.emotion for job in jobs[:8]] == list(EMOTION_PROMPTS), "the default"
    assert len({job.file_name for job in jobs}) == len(jobs) == 998 * 8


def test_a_file_without_prompts_is_refused(tmp_path, capsys):
    (tmp_path / "prompts.txt").write_text("\n \n")
    with pytest.raises(SystemExit):
        generate.parse_args(["--prompts", str(tmp_path / "prompts.txt")])
    assert "holds no prompts" in capsys.readouterr().err


def test_editing_gives_each_picture_its_prompt_and_its_mask(tmp_path):
    masks = [str(save(Image.new("L", (4, 4), "white"), tmp_path / name)) for name in ("one.png", "other.png")]
    arguments = ["--image", PICTURE, PICTURE, "--prompt", "a boat", "a ship", "--emotion", "awe", "fear"]
    jobs = edit.plan(edit.parse_args([*arguments, "--mask", *masks]))
    assert [(job.prompt, job.emotion, str(job.mask)) for job in jobs] == [
        ("a boat", "awe", masks[0]),
        ("a boat", "fear", masks[0]),
        ("a ship", "awe", masks[1]),
        ("a ship", "fear", masks[1]),
    ]
    assert len({job.file_name for job in jobs}) == 4
    assert [len(batch) for batch in batches(jobs, 4)] == [2, 2], "a mask is the batch's"
    assert {job.mask for job in edit.plan(edit.parse_args(arguments))} == {None}


def test_only_given_options_reach_the_pipeline():
    options = ["--prompt", "a", "--emotion", "awe", "--semantic_threshold", "0", "--max_inner_steps", "2"]
    options += ["--emotion_strength", "0.5", "--max_inner_batch", "3", "--gradient_checkpointing", "--width", "64"]
    options += ["--update_interval", "2", "--emotion_optimizer", "normalized", "--preview_scale", "0.5"]
    options += ["--no_keep_best", "--patience", "2"]
    given = {"semantic_threshold": 0.0, "max_inner_steps": 2, "emotion_strength": 0.5, "max_inner_batch": 3}
    given |= {"gradient_checkpointing": True, "width": 64, "update_interval": 2, "emotion_optimizer": "normalized"}
    given |= {"preview_scale": 0.5, "keep_best": False, "patience": 2}

    def reaching(*more: str) -> dict:
        return loading.call_options(generate.parse_args([*options, *more]), MusePipeline.presets)

    assert reaching("--base", "some/base") == given
    assert reaching() == {**MUSE_SETTINGS, **given}
    assert reaching("--preset", "fast") == {**MUSE_SETTINGS, **MusePipeline.presets["fast"], **given}


def test_an_emotion_library_reaches_the_pipeline_and_a_run_knows_it_by_content(tmp_path):
    def arguments(value: float) -> argparse.Namespace:
        save_file({"awe": torch.full((4, 32), value)}, tmp_path / "library.safetensors")
        library = ["--emotion_library", str(tmp_path / "library.safetensors")]
        return generate.parse_args(["--prompt", "a cat", "--emotion", "awe", *library])

    assert run_settings(arguments(1)) != run_settings(arguments(2)) == run_settings(arguments(2))
    tokens = loading.call_options(arguments(3), {})["emotion_tokens"]
    assert list(tokens) == ["awe"] and tokens["awe"].eq(3).all()


def test_the_checkpoints_of_storybook_have_settings_of_their_own(tmp_path):
    assert loading.storybook_settings(str(tiny_models.REPOSITORY)) == MUSE_SETTINGS
    (tmp_path / "xl").mkdir()
    index = tiny_models.REPOSITORY / "examples" / "storybook" / "xl" / "index.json"
    shutil.copy(index, tmp_path / "xl" / "model_index.json")  # as assemble_xl.py lays it out
    assert loading.storybook_settings(str(tmp_path / "xl")) == MUSE_XL_SETTINGS
    for base in (tmp_path, tiny_models.save_base(tmp_path / "base"), "some/base"):
        assert loading.storybook_settings(str(base)) == {}


def test_batches_have_one_source_and_a_size():
    one, other = (quickstart.PICTURE.with_name(name) for name in ("a.png", "b.png"))
    jobs = [Job("a", "awe", 0, source) for source in (one, one, one, other)]
    assert [[job.source for job in batch] for batch in batches(jobs, 2)] == [[one, one], [one], [other]]


def test_pictures_have_their_records_in_them_and_are_summed_up_in_a_sheet(tmp_path):
    pipe = tiny_models.muse_pipeline()
    jobs = [Job("a cat", emotion, 3, name="0") for emotion in (None, "awe", {"awe": 1.0, "fear": 1.0})]
    names = ["0_stock_3.png", "0_awe_3.png", "0_awe50+fear50_3.png"]
    options = {"num_inference_steps": 2, "max_inner_steps": 1, "semantic_threshold": 0}
    assert list(make_pictures(pipe, batches(jobs, 2), set(names), tmp_path, **options)) == names
    records = read_records(jobs, tmp_path)
    sheet = write_summary(records, tmp_path)
    assert [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()] == records
    assert [entry["file"] for entry in records] == names
    assert [entry.get("gate_step") for entry in records] == [None, 0, 0]
    assert records[1]["inner_steps"] == 2 and 0 <= records[1]["target_probability"] <= 1
    assert Image.open(sheet).width > 3 * 192
    stock = pipe("a cat", num_inference_steps=2, generator=tiny_models.generator(3)).images[0]
    assert Image.open(tmp_path / names[0]).tobytes() == stock.tobytes()


@pytest.mark.parametrize("side", [8, 256, 400])
def test_a_sheet_of_many_pictures_shows_the_first(side, tmp_path, monkeypatch):
    jobs = [Job("a cat", emotion, seed) for seed in range(5) for emotion in ("awe", "fear")]
    for job in jobs:
        save_picture(Image.new("RGB", (side, side)), record(job, None), tmp_path)
    whole = Image.open(write_summary(read_records(jobs, tmp_path), tmp_path)).size
    monkeypatch.setattr("jobs.MOST_ON_SHEET", 4)
    cut = Image.open(write_summary(read_records(jobs, tmp_path), tmp_path)).size
    assert cut[0] < whole[0] and cut[1] < whole[1]
    assert len((tmp_path / "metadata.jsonl").read_text().splitlines()) == 10


@pytest.fixture
def plain_base(request, tmp_path) -> list[str]:
    """The options that load a base, of the family that is asked for, which has nothing of MUSE, and a CLIP."""
    family = getattr(request, "param", tiny_models.STABLE_DIFFUSION)
    family.parent_class(**family.components(), **family.settings).save_pretrained(tmp_path / "base")
    tiny_models.clip_model().save_pretrained(tmp_path / "clip")
    return ["--base", str(tmp_path / "base"), "--clip", str(tmp_path / "clip"), "--device", "cpu"]


def test_a_plain_base_gets_the_clip_that_it_lacks_which_also_classifies(plain_base):
    args = generate.parse_args([*plain_base, "--prompt", "a cat", "--emotion", "awe"])
    pipe = loading.load_pipeline(args)
    assert pipe.clip_model is not None and pipe.emotion_classifier is None
    assert pipe.emotion_labels == list(EMOTION_PROMPTS)
    assert loading.load_judge(pipe, args) is None


def test_a_checkpoint_of_muse_keeps_its_own_models(tmp_path):
    checkpoint = tiny_models.save_muse(tmp_path / "muse")
    args = ["--base", str(checkpoint), "--clip", "no/such-clip", "--prompt", "a cat", "--emotion", "awe"]
    pipe = loading.load_pipeline(generate.parse_args([*args, "--device", "cpu"]))
    assert pipe.clip_model is not None and pipe.emotion_classifier is not None


def test_a_classifier_of_ones_own_guides(plain_base, tmp_path):
    own = tiny_models.emotion_classifier(id2label={0: "cozy", 1: "eerie"})
    own.save_pretrained(tmp_path / "own")
    options = ["--classifier", str(tmp_path / "own"), "--prompt", "a cat", "--emotion", "cozy"]
    pipe = loading.load_pipeline(generate.parse_args([*plain_base, *options]))
    assert pipe.emotion_labels == ["cozy", "eerie"]


def test_label_probabilities_are_what_the_pipeline_would_see():
    classifier = tiny_models.emotion_classifier()
    classifier.classifier[0].weight.data.mul_(100)
    image = Image.effect_noise((64, 48), 80).convert("RGB")
    spec = PixelSpec.from_classifier(classifier)
    pixels = torch.cat([loading.picture_pixels(picture, spec) for picture in (image, image.rotate(180))])
    probabilities = loading.label_probabilities(classifier, pixels)
    assert list(probabilities[0]) == list(classifier.config.id2label.values())
    assert probabilities[0] != probabilities[1]
    with torch.no_grad():
        seen = tiny_models.muse_pipeline(emotion_classifier=classifier)._classify(
            torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        )
    expected = loading.label_probabilities(classifier, pixels[:1])[0]
    assert list(expected.values()) == pytest.approx(seen.softmax(-1)[0].tolist(), rel=1e-5)


def test_a_picture_is_squeezed_or_cut_to_the_middle():
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (32, 0, 64, 32))
    spec = PixelSpec((32, 32), (0.0,) * 3, (1.0,) * 3)
    assert loading.picture_pixels(wide, spec, center_crop=True).min() == 1
    squeezed = loading.picture_pixels(wide, spec)[0, :, :, [0, 15, 31]]
    torch.testing.assert_close(squeezed, torch.tensor([0.0, 1.0, 0.0]).expand(3, 32, 3), rtol=0, atol=0.01)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((64, 64), (192, 192)), ((64, 32), (192, 96)), ((512, 512), (320, 320)), ((256, 200), (256, 200))],
)
def test_enlarge(size, expected):
    assert enlarge(Image.new("RGB", size)).size == expected


def test_contact_sheet_shows_every_picture():
    colors = [(200, 30 * number, 10) for number in range(5)]
    cells = [Cell(Image.new("RGB", (64, 64), color), f"picture {number}") for number, color in enumerate(colors)]
    sheet = contact_sheet(cells, columns=3, heading="a heading " * 30)
    shown = {color for _, color in sheet.getcolors(sheet.width * sheet.height)}
    assert set(colors) <= shown
    with pytest.raises(ValueError, match="0 pictures"):
        contact_sheet([], columns=3)


def test_wrap_keeps_every_word():
    font = ImageFont.load_default(18)
    text = "one two three unbreakablyverylongwordindeed four"
    lines = wrap(text, 90, font)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 90 or " " not in line for line in lines)


@pytest.mark.parametrize("plain_base", tiny_models.FAMILIES, indirect=True, ids=str)
def test_edit_end_to_end_with_a_mask_on_either_kind_of_base(plain_base, tmp_path, monkeypatch, capsys):
    mask = Image.new("L", (30, 20), "black")
    mask.paste("white", (15, 0, 30, 20))
    for name, picture in {"mask": mask, "palette": Image.effect_noise((30, 20), 80).convert("P")}.items():
        save(picture, tmp_path / f"{name}.png")
    options = {"--image": tmp_path / "palette.png", "--mask": tmp_path / "mask.png", "--prompt": "a cat"}
    options |= {"--emotion": "fear", "--num_inference_steps": 2, "--max_inner_steps": 1, "--semantic_threshold": 0}
    arguments = [str(part) for option in options.items() for part in option]
    monkeypatch.setattr("sys.argv", ["edit.py", *plain_base, *arguments, "--output_dir", str(tmp_path / "out")])
    edit.main()
    assert str(tmp_path / "out" / "sheet.png") in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "000_palette_fear_0.png").size == (40, 24)
    line = json.loads((tmp_path / "out" / "metadata.jsonl").read_text())
    assert line["mask"] == str(tmp_path / "mask.png") and line["gate_step"] == 0


def test_emotions_that_no_model_knows_end_a_script_before_any_picture(plain_base, tmp_path, monkeypatch):
    arguments = ["--prompt", "a cat", "--emotion", "awe", "boredom", "--output_dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["generate.py", *plain_base, *arguments])
    with pytest.raises(SystemExit, match="boredom"):
        generate.main()
    assert not (tmp_path / "out").exists()


def test_two_pictures_of_one_name_end_a_script_before_models_load(tmp_path, monkeypatch):
    arguments = [
        "--base",
        "no/such-base",
        "--prompt",
        "a cat",
        "--emotion",
        "awe=0.7,fear=0.3",
        "fear",
        "awe=7,fear=3",
    ]
    monkeypatch.setattr("sys.argv", ["generate.py", *arguments, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="2 pictures would be called '000_awe70.fear30_0.png'"):
        generate.main()


def test_quickstart_end_to_end(tmp_path, monkeypatch, capsys):
    checkpoint = tiny_models.save_muse(tmp_path / "muse")
    options = {"--num_inference_steps": 2, "--max_inner_steps": 1, "--semantic_threshold": 0, "--emotion": "fear"}
    arguments = [str(part) for option in options.items() for part in option]
    arguments += ["--base", str(checkpoint), "--device", "cpu", "--output", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", ["quickstart.py", *arguments])
    quickstart.main()
    told = capsys.readouterr().out
    for name in ("emotions.png", "edits.png", "inner_loop.png"):
        path = tmp_path / "out" / name
        assert str(path) in told
        assert Image.open(path).width > 2 * 192
