import argparse
import json
import shutil
import subprocess
import sys
from dataclasses import fields
from functools import partial

import edit
import generate
import make_emotion_library
import numpy as np
import pytest
import quickstart
import tiny_models
import torch
from huggingface_hub import HfApi
from huggingface_hub.errors import OfflineModeIsEnabled
from muse_examples.classifiers import label_probabilities, picture_pixels
from muse_examples.contact_sheets import Cell, contact_sheet, enlarge, save, wrap
from muse_examples.options import call_options, one_line_errors, parse_emotion
from muse_examples.pipelines import check_source, known_labels, load_pipeline, settings_of
from muse_examples.runs import (
    Job,
    Made,
    batches,
    closing_words,
    emotion_name,
    make_pictures,
    read_records,
    record,
    run_batch,
    run_settings,
    save_picture,
    write_summary,
)
from PIL import Image, ImageFont
from safetensors.torch import save_file

from pipeline_muse import EMOTION_PROMPTS, GuidanceSettings, MuseTrace, PixelSpec


PICTURE = str(quickstart.PICTURE)
SHORT = ["--num_inference_steps", 2, "--max_inner_steps", 1, "--semantic_threshold", 0]


@pytest.fixture
def run(monkeypatch):
    """Runs a script as from the command line."""

    def run_script(script, *arguments) -> None:
        monkeypatch.setattr("sys.argv", [script.__name__, *map(str, arguments)])
        script.main()

    return run_script


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
    assert parse_emotion(text) == emotion
    assert emotion_name(emotion) == name


@pytest.mark.parametrize("text", ["awe,fear", "awe=-1", "awe=nan", "awe=inf", "=1", "awe=", "awe=x"])
def test_malformed_mixtures_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="is not a mixture"):
        parse_emotion(text)
    with pytest.raises(argparse.ArgumentTypeError, match="names awe twice"):
        parse_emotion("awe=1,awe=2")


def test_what_a_user_can_mend_ends_a_script_in_one_line(capsys):
    @one_line_errors
    def main(error):
        raise error

    for error in (OSError("no such file\n\nand advice"), ValueError("\n no such file "), TypeError("no such file")):
        with pytest.raises(SystemExit) as ended:
            main(error)
        assert ended.value.code == "error: no such file"
    with pytest.raises(ZeroDivisionError):
        main(ZeroDivisionError())  # a fault of the program


@pytest.mark.parametrize(
    ("script", "arguments", "message"),
    [
        (generate, ["--emotion", "none"], "--prompt"),
        (generate, ["--prompt", "a cat", "--emotion", "awe", "--height", "65"], "multiple of 8"),
        (edit, ["--image", str(quickstart.PICTURE.parent), "--prompt", "a"], "is a folder; name files in it"),
        (edit, ["--image", PICTURE, "--prompt", "a", "--negative_prompt", "b", "c"], "2 negative_prompts for 1"),
        (generate, ["--prompt", "a", "--update_interval", "0"], "`update_interval` has to lie in [1, inf]"),
        (generate, ["--prompt", "a", "--max_inner_steps", "1.5"], "'1.5' is no int"),
        (generate, ["--prompt", "a", "--preset", "slow"], "invalid choice: 'slow'"),
        (generate, ["--prompt", "a", "--emotion_tokens", "words"], "there is no file 'words'"),
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
    lines = [f"a cat, {number % 400}" for number in range(996)] + ["", " # 12", "ein Schloß\u2028am Meer 🌊", " 城 "]
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
    given = {"preset": "fast", "width": 64, "height": 32, "num_inference_steps": 3, "emotion_tokens": "emotion"}
    given |= {"semantic_threshold": 0.0, "max_inner_steps": 2, "emotion_strength": 0.5, "latest_start": 0.4}
    options = [text for name, value in given.items() for text in (f"--{name}", str(value))]

    def reaching(*more: str) -> dict:
        return call_options(generate.parse_args(["--prompt", "a", *more]))

    assert reaching("--base", "some/base", *options) == given
    assert reaching(*options) == given
    assert reaching("--base", "some/base") == {} and reaching() == {"num_inference_steps": 20}, "what suits Storybook"


def test_every_setting_of_the_method_is_an_option():
    values = {field.name: 1 for field in fields(GuidanceSettings)}
    arguments = [text for name, value in values.items() for text in (f"--{name}", str(value))]
    args = generate.parse_args(["--prompt", "a", "--base", "some/base", *arguments])
    assert call_options(args) == values
    assert isinstance(args.max_inner_batch, int) and isinstance(args.preview_scale, float)


def test_an_emotion_library_reaches_the_pipeline_and_a_run_knows_it_by_content(tmp_path):
    def arguments(value: float) -> argparse.Namespace:
        save_file({"awe": torch.full((4, 32), value)}, tmp_path / "library.safetensors")
        library = ["--emotion_tokens", str(tmp_path / "library.safetensors")]
        return generate.parse_args(["--prompt", "a cat", "--emotion", "awe", *library])

    assert run_settings(arguments(1)) != run_settings(arguments(2)) == run_settings(arguments(2))
    tokens = call_options(arguments(3))["emotion_tokens"]
    assert list(tokens) == ["awe"] and tokens["awe"].eq(3).all()


def test_a_library_of_one_run_is_what_the_next_starts_from(tmp_path, run):
    (tmp_path / "prompts.txt").write_text("a house\n# no prompt\na boat\n")
    path, base = tmp_path / "made" / "library.safetensors", tiny_models.save_muse(tmp_path / "muse")
    arguments = ["--base", base, "--device", "cpu", "--prompts", tmp_path / "prompts.txt", "--emotion", "awe", "fear"]
    run(make_emotion_library, *arguments, "--output", path, "--batch_size", 3, *SHORT)
    args = make_emotion_library.parse_args([*map(str, arguments), "--emotion_tokens", str(path), "--preset", "fast"])
    library = call_options(args)["emotion_tokens"]
    assert {label: tokens.shape for label, tokens in library.items()} == {"awe": (4, 32), "fear": (4, 32)}
    pipe = load_pipeline(args)
    short = {"num_inference_steps": 1, "max_inner_steps": 0, "semantic_threshold": 0}
    starts = (library, library["awe"])
    seen = [run_batch(pipe, [Job("a cat", "awe", 0)], emotion_tokens=tokens, **short) for tokens in starts]
    assert seen[0][0].image.tobytes() == seen[1][0].image.tobytes()
    with pytest.raises(SystemExit, match="error: The gate never opened for .'awe', 'fear'."):
        run(make_emotion_library, *arguments, "--output", path, "--semantic_threshold", "inf", *SHORT[:4])


def test_an_example_registers_its_checkpoints(tmp_path):
    settings = settings_of(str(tiny_models.REPOSITORY))
    assert settings["call"] and (tiny_models.REPOSITORY / settings["judge"]).is_file()
    (tmp_path / "xl").mkdir()
    index = tiny_models.REPOSITORY / "examples" / "storybook" / "xl" / "index.json"
    shutil.copy(index, tmp_path / "xl" / "model_index.json")  # as assemble_xl.py lays it out
    assert settings_of(str(tmp_path / "xl")) == settings
    for base in (tmp_path, tiny_models.save_base(tmp_path / "base"), "some/base"):
        assert settings_of(str(base)) == {}


def test_batches_have_one_source_and_a_size():
    one, other = (quickstart.PICTURE.with_name(name) for name in ("a.png", "b.png"))
    jobs = [Job("a", "awe", 0, source) for source in (one, one, one, other)]
    assert [[job.source for job in batch] for batch in batches(jobs, 2)] == [[one, one], [one], [other]]


def test_pictures_have_their_records_in_them_and_are_summed_up_in_a_sheet(tmp_path):
    pipe = tiny_models.muse_pipeline()
    jobs = [Job("a cat", emotion, 3, name="0") for emotion in (None, "awe", {"awe": 1.0, "fear": 1.0})]
    names = ["0_stock_3.png", "0_awe_3.png", "0_awe50+fear50_3.png"]
    options = {"num_inference_steps": 2, "max_inner_steps": 1, "semantic_threshold": 0}
    assert list(make_pictures(partial(run_batch, pipe, **options), batches(jobs, 2), set(names), tmp_path)) == names
    records = read_records(jobs, tmp_path)
    sheet = write_summary(records, tmp_path)
    assert [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()] == records
    assert [entry["file"] for entry in records] == names
    assert [entry.get("gate_step") for entry in records] == [None, 0, 0]
    assert records[1]["inner_steps"] == 2 and 0 <= records[1]["target_probability"] <= 1
    assert Image.open(sheet).width > 3 * 192
    stock = pipe("a cat", num_inference_steps=2, generator=tiny_models.generator(3)).images[0]
    assert Image.open(tmp_path / names[0]).tobytes() == stock.tobytes()


def test_negative_prompts_go_with_prompts_of_any_kind(tmp_path):
    pipe = tiny_models.muse_pipeline()
    options = {"num_inference_steps": 2, "max_inner_steps": 0, "semantic_threshold": 0}
    for prompt in ("a cat", "", None):
        jobs = [Job(prompt, "awe", seed, negative_prompt="blurry") for seed in (0, 1)]
        images = [made.image for made in run_batch(pipe, jobs, **options)]
        others = [made.image for made in run_batch(pipe, [Job(prompt, "awe", 0), Job(prompt, "awe", 1)], **options)]
        assert len(images) == 2 and all(one.tobytes() != other.tobytes() for one, other in zip(images, others))
    assert record(jobs[0], Made(images[0]))["negative_prompt"] == "blurry"


def test_a_run_says_what_is_not_as_it_was_asked_for(tmp_path):
    labels, image = list(EMOTION_PROMPTS), Image.new("RGB", (8, 8))
    opened = MuseTrace(labels, {"awe": 1.0}, 0, [20.0], "fear", [[0.1]], [[[0.0] * 2 + [0.9] + [0.0] * 5]], [0], 3)
    made = [Made(image), Made(image, opened), Made(image, MuseTrace(labels, {"awe": 1.0}, None, [9.5, 11.25]))]
    jobs = [Job("a cat", emotion, seed) for seed, emotion in enumerate((None, "awe", "awe", "awe"))]
    records = [record(job, one) for job, one in zip(jobs, [*made, Made(image, opened, blackened=True)])]
    assert closing_words(records[:2]) == ""
    words = closing_words(records).splitlines()
    assert "No emotion was added to 1 of 3 pictures" in words[0] and "up to 11.2" in words[0]
    assert "--semantic_threshold" in words[0] and "--latest_start" in words[0]
    assert words[1] == "The base's safety checker blackened 1 of 4 pictures." and records[3]["blackened"]
    for entry in records:
        save_picture(image, entry, tmp_path)
    assert write_summary(records, tmp_path).is_file()


def test_pictures_that_a_safety_checker_blackens_are_known():
    class Output:
        images, nsfw_content_detected, trace = [Image.new("RGB", (8, 8))] * 2, [True, False], None

    made = run_batch(lambda **options: Output, [Job("a cat", None, seed) for seed in (0, 1)])
    assert [one.blackened for one in made] == [True, False]


@pytest.mark.parametrize("side", [8, 400])
def test_a_sheet_of_many_pictures_shows_the_first(side, tmp_path, monkeypatch):
    jobs = [Job("a cat", emotion, seed) for seed in range(5) for emotion in ("awe", "fear")]
    for job in jobs:
        image = Image.new("RGB", (side, side))
        save_picture(image, record(job, Made(image)), tmp_path)
    whole = Image.open(write_summary(read_records(jobs, tmp_path), tmp_path)).size
    monkeypatch.setattr("muse_examples.runs.MOST_ON_SHEET", 4)
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
    pipe = load_pipeline(args)
    assert pipe.clip_model is not None and pipe.emotion_classifier is None
    assert pipe.emotion_labels == list(EMOTION_PROMPTS) == known_labels(args)
    assert quickstart.load_judge(pipe, args) is None


def test_a_checkpoint_of_muse_keeps_its_own_models(tmp_path):
    checkpoint = tiny_models.save_muse(tmp_path / "muse")
    args = ["--base", str(checkpoint), "--clip", "no/such-clip", "--prompt", "a cat", "--emotion", "awe"]
    parsed = generate.parse_args([*args, "--device", "cpu", "--gradient_checkpointing"])
    pipe = load_pipeline(parsed)
    assert pipe.clip_model is not None and pipe.emotion_classifier is not None
    assert pipe.unet.is_gradient_checkpointing and known_labels(parsed) in (None, pipe.emotion_labels)


def test_layers_are_not_offloaded_from_a_cpu_to_itself():
    arguments = ["--prompt", "a cat", "--base", "no/such", "--device", "cpu", "--sequential_cpu_offload"]
    with pytest.raises(ValueError, match="--sequential_cpu_offload .* --device is cpu"):
        load_pipeline(generate.parse_args(arguments))


def test_a_classifier_of_ones_own_guides(plain_base, tmp_path):
    own = tiny_models.emotion_classifier(id2label={0: "cozy", 1: "eerie"})
    own.save_pretrained(tmp_path / "own")
    options = ["--classifier", str(tmp_path / "own"), "--prompt", "a cat", "--emotion", "cozy"]
    args = generate.parse_args([*plain_base, *options])
    assert load_pipeline(args).emotion_labels == ["cozy", "eerie"] == known_labels(args)


def test_label_probabilities_are_what_the_pipeline_would_see():
    classifier = tiny_models.emotion_classifier()
    classifier.classifier[0].weight.data.mul_(100)
    image = Image.effect_noise((64, 48), 80).convert("RGB")
    spec = PixelSpec.from_classifier(classifier)
    pixels = torch.cat([picture_pixels(picture, spec) for picture in (image, image.rotate(180))])
    probabilities = label_probabilities(classifier, pixels)
    assert list(probabilities[0]) == list(classifier.config.id2label.values())
    assert probabilities[0] != probabilities[1]
    with torch.no_grad():
        seen = tiny_models.muse_pipeline(emotion_classifier=classifier)._classify(
            torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1
        )
    expected = label_probabilities(classifier, pixels[:1])[0]
    assert list(expected.values()) == pytest.approx(seen.softmax(-1)[0].tolist(), rel=1e-5)


def test_a_picture_is_squeezed_or_cut_to_the_middle():
    wide = Image.new("RGB", (96, 32), "black")
    wide.paste("white", (32, 0, 64, 32))
    spec = PixelSpec((32, 32), (0.0,) * 3, (1.0,) * 3)
    assert picture_pixels(wide, spec, center_crop=True).min() == 1
    squeezed = picture_pixels(wide, spec)[0, :, :, [0, 15, 31]]
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
def test_edit_end_to_end_with_a_mask_on_either_kind_of_base(plain_base, tmp_path, run, capsys):
    mask = Image.new("L", (30, 20), "black")
    mask.paste("white", (15, 0, 30, 20))
    for name, picture in {"mask": mask, "palette": Image.effect_noise((30, 20), 80).convert("P")}.items():
        save(picture, tmp_path / f"{name}.png")
    files = ["--image", tmp_path / "palette.png", "--mask", tmp_path / "mask.png", "--output_dir", tmp_path / "out"]
    run(edit, *plain_base, *files, "--prompt", "a cat", "--negative_prompt", "a cat", "--emotion", "fear", *SHORT)
    assert f"All 1 pictures, 40 x 24 px: {tmp_path / 'out' / 'sheet.png'}\n" in capsys.readouterr().out
    assert Image.open(tmp_path / "out" / "palette_fear_0.png").size == (40, 24)
    line = json.loads((tmp_path / "out" / "metadata.jsonl").read_text())
    assert line["mask"] == str(tmp_path / "mask.png") and line["gate_step"] == 0 and line["size"] == [40, 24]


def test_a_torn_picture_is_named_and_the_rest_is_made_once(plain_base, tmp_path, run, capsys):
    whole = [save(Image.effect_noise((24, 24), 80), tmp_path / name) for name in ("a.png", "b.png", "c.png")]
    data = whole[1].read_bytes()
    whole[1].write_bytes(data[: len(data) // 2])
    command = [edit, *plain_base, "--prompt", "a cat", "--emotion", "fear", "--output_dir", tmp_path / "out", *SHORT]
    with pytest.raises(SystemExit, match="error: 1 of 3 pictures were not made, for want of .*b.png"):
        run(*command, "--image", *whole, "--height", 16, "--width", 16)
    assert "Left out, as it cannot be read" in capsys.readouterr().err
    made = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").glob("?_fear_0.png")}
    assert [path.name for path in sorted(made)] == ["a_fear_0.png", "c_fear_0.png"]
    run(*command, "--image", whole[0], whole[2], "--height", 16, "--width", 16)  # left out
    whole[1].write_bytes(data)  # mended
    run(*command, "--image", *whole, "--height", 16, "--width", 16)
    assert "All 3 pictures, 16 x 16 px" in capsys.readouterr().out
    assert made == {path: path.stat().st_mtime_ns for path in made}
    whole[0].write_bytes(whole[2].read_bytes())
    with pytest.raises(SystemExit, match="holds 'a_fear_0.png' of another source_sha256"):
        run(*command, "--image", *whole, "--height", 16, "--width", 16)


def test_a_gate_that_never_opens_is_told_at_the_end(plain_base, tmp_path, run, capsys):
    closed = [
        "--semantic_threshold",
        "1000",
        "--latest_start",
        "1",
        "--num_inference_steps",
        2,
        "--output_dir",
        tmp_path / "out",
    ]
    run(generate, *plain_base, "--prompt", "a cat", "--negative_prompt", "blurry", "--emotion", "awe", "none", *closed)
    told = capsys.readouterr().out.splitlines()
    assert told[-1].startswith("No emotion was added to 1 of 1 pictures: their gate never opened")
    one, other = (Image.open(tmp_path / "out" / f"000_{name}_0.png") for name in ("awe", "stock"))
    assert one.tobytes() == other.tobytes()


@pytest.mark.parametrize("script", [generate, make_emotion_library, quickstart])
def test_misspelt_emotions_end_a_script_before_models_load(script, plain_base, tmp_path, monkeypatch, run):
    for module in ("muse_examples.runs", "make_emotion_library", "quickstart"):
        monkeypatch.setattr(f"{module}.load_pipeline", None)
    (tmp_path / "prompts.txt").write_text("a cat")
    arguments = [] if script is quickstart else ["--prompts", tmp_path / "prompts.txt"]
    arguments += ["--output_dir" if script is generate else "--output", tmp_path / "out"]
    with pytest.raises(SystemExit, match="did you mean 'excitement'"):
        run(script, *plain_base, "--emotion", "excitment", *arguments)
    assert not (tmp_path / "out").exists()


def test_words_of_ones_own_are_emotions_and_one_side_is_enough(plain_base, tmp_path, run):
    command = [generate, *plain_base, "--prompt", "a cat", "--emotion", "gloom", "--output_dir", tmp_path / "out"]
    run(*command, "--height", 16, *SHORT)
    assert Image.open(tmp_path / "out" / "000_gloom_0.png").size == (32, 16)


def test_each_run_has_a_folder_of_its_own_and_the_same_command_goes_on_in_it(plain_base, tmp_path, run, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = [generate, *plain_base, "--prompt", "a cat", "--emotion", "awe", *SHORT]
    for seed in (0, 1, 0, 1):
        run(*command, "--seed", seed)
    Image.effect_noise((16, 16), 80).save("a.png")
    Image.effect_noise((16, 16), 80).save("b.png")
    for picture in ("a.png", "b.png", "b.png"):
        run(edit, *plain_base, "--image", picture, "--prompt", "a cat", "--emotion", "awe", *SHORT)
    made = {path.parent.name: path.name for path in tmp_path.glob("outputs/*/*_awe_*.png")}
    generated = {"generate": "000_awe_0.png", "generate-2": "000_awe_1.png"}
    assert made == generated | {"edit": "a_awe_0.png", "edit-2": "b_awe_0.png"}
    with pytest.raises(SystemExit, match="Choose another --output_dir"):
        run(*command, "--seed", 2, "--output_dir", "outputs/generate")


def test_a_model_that_is_not_there_is_one_line_before_others_load(tmp_path, run, monkeypatch):
    told = "error: --{}: there is no folder 'no/such/model', and on the Hub are only 'org/name'"
    script = [sys.executable, tiny_models.REPOSITORY / "examples" / "generate.py", "--prompt", "a cat"]
    result = subprocess.run([*script, "--base", "no/such/model"], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 1
    assert result.stderr.splitlines() == [told.format("base")], "nor warnings of other libraries"
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as error:
        run(generate, "--prompt", "a cat", "--classifier", "no/such/model")
    assert error.value.code == told.format("classifier")


def test_a_judge_guides_by_its_name_unless_a_path_is_called_so(tmp_path, plain_base, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*map(str, plain_base), "--prompt", "a cat", "--classifier", "emo_b", "--device", "cpu"]
    assert type(load_pipeline(generate.parse_args(arguments)).emotion_classifier).__name__.startswith("ResNet")
    tiny_models.emotion_classifier().save_pretrained(tmp_path / "emo_b")
    assert type(load_pipeline(generate.parse_args(arguments)).emotion_classifier).__name__.startswith("SimEmo")


class OfTheHub(HfApi):
    error: Exception

    def model_info(self, *_, **__):
        raise self.error


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OfflineModeIsEnabled("no"), "nor is it in the cache of the Hub, which is offline"),
        (OSError("no route"), "which cannot be reached: no route"),
    ],
)
def test_what_only_the_hub_could_have_is_asked_for_once(error, message, monkeypatch, tmp_path):
    monkeypatch.setattr(OfTheHub, "error", error, raising=False)
    monkeypatch.setattr("muse_examples.pipelines.HfApi", OfTheHub)
    with pytest.raises((ValueError, OSError), match=message):
        check_source("base", "no/such-model")
    with pytest.raises(ValueError, match="holds no model_index.json"):
        check_source("base", str(tmp_path), "model_index.json")
    check_source("classifier", None)


def test_a_folder_without_pictures_belongs_to_nobody(plain_base, tmp_path, run, monkeypatch):
    out = tmp_path / "out"
    command = [generate, *plain_base, "--prompt", "a cat", "--emotion", "awe", "--output_dir", out, *SHORT]

    def fail(*_, **options):
        raise ValueError("no luck")

    with monkeypatch.context() as patch, pytest.raises(SystemExit, match="error: no luck"):
        patch.setattr("muse_examples.runs.run_batch", fail)
        run(*command, "--seed", 1)
    assert [path.name for path in out.iterdir()] == ["run.json"]
    run(*command)
    assert (out / "000_awe_0.png").is_file()


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


@pytest.mark.parametrize("threshold", [0, 1000])
def test_quickstart_end_to_end(threshold, tmp_path, run, capsys):
    checkpoint = tiny_models.save_muse(tmp_path / "muse")
    options = ["--num_inference_steps", 2, "--max_inner_steps", 1, "--semantic_threshold", threshold]
    options += ["--latest_start", "1"]
    options += ["--emotion", "fear", "--base", checkpoint, "--device", "cpu", "--output", tmp_path / "out"]
    run(quickstart, *options)
    told = capsys.readouterr().out
    for name in ("emotions.png", "edits.png", "inner_loop.png"):
        path = tmp_path / "out" / name
        assert str(path) in told
        assert Image.open(path).width > 2 * 192
    assert ("The scenes: No emotion was added to 8 of 8 pictures" in told) == (threshold > 0)
    assert ("The edits: No emotion was added to 1 of 1 pictures" in told) == (threshold > 0)


def test_the_preview_check_shows_what_small_previews_lose(tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(tiny_models.REPOSITORY / "examples" / "storybook")
    import preview_check
    from world import Scene, render

    picture = tmp_path / "house.png"
    render(Scene("park", "house", "red"), 128).save(picture)
    own = ["--size", "128", "--seen", "64", "--output_dir", str(tmp_path / "out")]
    preview_check.main([str(picture), "--vae", str(tiny_models.REPOSITORY / "vae"), *own])
    *told, sheet = capsys.readouterr().out.splitlines()
    decibels = [float(line.split(": ")[1].removesuffix(" dB")) for line in told]
    assert [line.split(":")[0] for line in told] == [f"preview_scale {scale}" for scale in ("1", "0.75", "0.5")]
    assert decibels[0] > max(decibels[1:]) + 1 and min(decibels) > 10
    assert sheet == str(tmp_path / "out" / "previews.png") and Image.open(sheet).width > 4 * 192
