"""examples/evaluate.py: its rows and cases, its three stages, a kill, two processes, and both shapes of Storybook."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from fresh_process import check, run_fresh
from muse_examples.classifiers import label_probabilities, picture_pixels
from muse_examples.evaluation import making
from muse_examples.evaluation.command import cases_of, main, parse_args, tables_of
from muse_examples.evaluation.data import Shown, plan, read_contents
from muse_examples.evaluation.making import row_folder, slug
from muse_examples.evaluation.methods import Studio, guided_by, method
from muse_examples.evaluation.reporting import Row, examples, honest_judge, judges_of
from muse_examples.files import PARTIAL
from muse_examples.pipelines import judges, read_model
from muse_examples.runs import read_metadata, read_record, save_picture
from PIL import Image
from transformers import CLIPImageProcessor, CLIPProcessor

from pipeline_muse import PixelSpec


SCRIPT = tiny_models.REPOSITORY / "examples" / "evaluate.py"
SHORT = ["--num_inference_steps", "2", "--max_inner_steps", "1", "--semantic_threshold", "0"]
TWO = ["--emotion", "awe", "fear"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> dict[str, Path]:
    """A tiny base, a CLIP that judges, two classifiers, prompts, and pictures with captions."""
    folder = tmp_path_factory.mktemp("tiny")
    clip = folder / "clip"
    tiny_models.clip_model().save_pretrained(clip)
    image_processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor, tiny_models.tokenizer()).save_pretrained(clip)
    for number in range(2):
        tiny_models.sure_classifier(seed=number).save_pretrained(folder / f"judge{number}")
    (folder / "prompts.txt").write_text("a boat\na house\na cat\n")
    pictures = folder / "pictures"
    pictures.mkdir()
    for name, color in (("sea", "teal"), ("wall", "brown")):
        Image.effect_noise((32, 32), 80).convert("RGB").save(pictures / f"{name}.png")
        (pictures / f"{name}.txt").write_text(f"a {color} {name}")
    paths = {"clip": clip, "prompts": folder / "prompts.txt", "pictures": pictures}
    paths |= {f"judge{number}": folder / f"judge{number}" for number in range(2)}
    return paths | {"base": tiny_models.save_muse(folder / "muse", semantic_threshold=0.0)}


@pytest.fixture
def options(tiny, tmp_path) -> list[str]:
    """A command that makes few pictures of the tiny base."""
    told = ["--base", tiny["base"], "--captions", tiny["prompts"], "--output_dir", tmp_path / "out", "--device", "cpu"]
    told += ["--classifier", f"emo_a={tiny['judge0']}", f"emo_b={tiny['judge1']}", "--scores", f"CLIP={tiny['clip']}"]
    return [*map(str, told), "--guide", "emo_a", *SHORT, *TWO]


@pytest.fixture
def one_thread():
    """As accelerate has it: the last bits of pictures depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def table(path: Path) -> dict[str, dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return {row["method"]: row for row in csv.DictReader(file)}


def states(folder: Path) -> dict[str, tuple[int, int]]:
    """What changes when a picture is written again."""
    found = sorted((folder / "pictures").rglob("*.png"))
    return {str(path.relative_to(folder)): (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


# --------------------------------------------------------------------------------------
# Rows and options
# --------------------------------------------------------------------------------------


def names_of(options: list[str], *more: str) -> dict[str, list[str]]:
    found = tables_of(parse_args([*options, *more]))
    return {name: [row.name for row in rows] for name, rows in found.items()}


def test_tables_have_the_rows_that_options_ask_for(options, tiny):
    more = ["--table", "generation", "editing", "terms", "thresholds", "guides", "--images", str(tiny["pictures"])]
    more += ["--universal_guidance_weight", "5", "30", "--presets", "paper", "fast", "--thresholds", "0", "18", "inf"]
    found = names_of(options, *more, "--edit_strengths", "0.5", "1", "--edit_references", "null", "source")
    assert found["generation"] == [
        "stock, prompt alone",
        "stock, emotion in the prompt",
        "Universal Guidance, weight 5",
        "Universal Guidance, weight 30",
        "MUSE (paper)",
        "MUSE (fast)",
    ]
    assert len(found["editing"]) == 1 + 2 * 2 * 2
    assert found["editing"][-1] == "MUSE (fast), source prompt, strength 1"
    assert found["terms"][0] == "MUSE (paper), target term alone" and len(found["terms"]) == 5
    assert found["thresholds"] == [f"MUSE (paper), η = {eta}" for eta in ("0", "18", "inf")]
    assert found["guides"] == ["MUSE (paper), guided by emo_a", "MUSE (paper), guided by emo_b"]
    assert names_of(options, "--rows", "fast", "alone") == {"generation": ["stock, prompt alone", "MUSE (fast)"]}


def test_rows_are_what_they_are_called(options, tiny):
    """Their settings reach the pipeline: seen at what it is called with."""
    seen = []

    class Pipe:
        emotion_classifier = None

        def __call__(self, **arguments):
            seen.append(arguments)
            count = len(arguments["prompt"])
            return type("Output", (), {"images": [Image.new("RGB", (8, 8))] * count})

        def load_emotion_classifier(self, name, **_):
            self.emotion_classifier = name

        def register_modules(self, emotion_classifier):
            self.emotion_classifier = emotion_classifier

    tables = ["--table", "generation", "terms", "thresholds", "--thresholds", "21", "inf"]
    args = parse_args([*options, *tables, "--term_weights", "0.3"])
    studio, cases = Studio(args), cases_of(args)["generation"][:2]
    studio.pipe = Pipe()
    for rows in tables_of(args).values():
        for row in rows:
            row(studio, cases)
    calls = dict(zip([row.name for rows in tables_of(args).values() for row in rows], seen))
    stock, word = calls["stock, prompt alone"], calls["stock, emotion in the prompt"]
    assert "emotion" not in stock and stock["prompt"] == ["a boat"] * 2
    assert "emotion" not in word and word["prompt"] == ["a boat, awe", "a boat, fear"]
    assert "semantic_threshold" not in stock, "the stock pipeline knows no such argument"
    assert calls["MUSE (fast)"]["preset"] == "fast" and calls["MUSE (fast)"]["emotion"] == ["awe", "fear"]
    alone = calls["MUSE (paper), target term alone"]
    assert (alone["preset"], alone["inherent_weight"], alone["similar_weight"]) == ("paper", 0, 0)
    assert calls["MUSE (paper) without the similar term"]["similar_weight"] == 0
    weights = [(0.3, 0), (0, 0.3)]
    for name, pair in zip(("λ₁", "λ₂"), weights):
        call = calls[f"MUSE (paper), {name} = 0.3 alone"]
        assert (call["inherent_weight"], call["similar_weight"]) == pair
    assert "inherent_weight" not in calls["MUSE (paper) without the similar term"]
    assert calls["MUSE (paper) without optimisation"]["max_inner_steps"] == 0
    assert calls["MUSE (paper)"]["max_inner_steps"] == 1, "an option is for all rows of MUSE that set it not"
    assert calls["MUSE (paper), η = 21"]["semantic_threshold"] == 21
    assert calls["MUSE (paper), η = inf"]["semantic_threshold"] == float("inf")
    seeds = [[generator.initial_seed() for generator in call["generator"]] for call in seen]
    assert seeds == [[0, 0]] * len(seen), "all rows start from the same noise"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--table", "editing"], "needs --images"),
        (["--table", "methods"], "needs the files of --methods"),
        (["--rows", "nothing"], "No row of generation"),
        (["--folder", "a=/nowhere"], "there is no folder"),
        (["--classifier", "=x"], "is not name=value"),
        (["--classifier", "emo a=x", "emo-a=y"], "--classifier gives a name twice"),
        (["--thresholds", "-1"], "is not within"),
        (["--captions", "{empty}"], "holds no captions"),
        (["--methods", "{empty}"], "registers no row"),
        (["--emotion", "contentmant"], "contentment"),
    ],
)
def test_what_makes_no_sense_ends_in_one_line_before_anything_is_made(options, tmp_path, more, message, capsys):
    empty = tmp_path / "empty.txt"
    empty.write_text("# nothing\n")
    (tmp_path / "empty.py").write_text("")
    more = [
        text.replace("{empty}", str(empty.with_suffix(".py") if more[0] == "--methods" else empty)) for text in more
    ]
    with pytest.raises(SystemExit) as error:
        main([*options, *more])
    told = str(error.value.code) + capsys.readouterr().err
    assert message in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()


def test_bases_bring_their_judges_and_others_have_to_be_named(options, tiny):
    args = parse_args(["--captions", str(tiny["prompts"])])
    assert [judge.name for judge in judges_of(args)] == ["guide", "emo_b", "emo_c", "CLIP"]
    assert honest_judge(args) == "emo_b"
    assert honest_judge(parse_args(options)) == "emo_b", "the guide is no judge of itself"
    args.base, args.classifier = "someone/a-base", None
    with pytest.raises(ValueError, match="name the emotion classifiers"):
        judges_of(args)


# --------------------------------------------------------------------------------------
# A whole run
# --------------------------------------------------------------------------------------


def test_a_run_of_the_tiny_base_from_plan_to_tables(options, tiny, tmp_path, capsys, monkeypatch):
    other = tmp_path / "other"  # what another program made
    for number in range(4):
        path = other / ("awe" if number % 2 else "fear") / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.effect_noise((40, 40), 90).convert("RGB").save(path)
    own = tmp_path / "own.py"
    own.write_text(
        "from muse_examples.evaluation.methods import method\n\n\n"
        '@method("grey")\n'
        "def grey(studio, jobs):\n"
        "    prompts = [job.prompt for job in jobs]\n"
        "    pictures = studio.pipe(prompts, generator=studio.generators(jobs), **studio.call).images\n"
        '    return [picture.convert("L").convert("RGB") for picture in pictures]\n'
    )
    command = [*options, "--rows", "alone", "(full)", "grey", "--methods", str(own), "--batch_size", "4"]
    command += ["--folder", f"other={other}", "--images_per_emotion", "3", "--fid", f"real={tiny['pictures']}"]
    command += ["--emotion", "awe", "fear", "anger", "sadness"]

    main([*command, "--dry_run"])
    told = capsys.readouterr().out
    assert "MUSE (full)" in told and "In all about" in told
    counts = {line[:44].strip(): line[44:].split() for line in told.splitlines()}
    assert counts["stock, prompt alone"][:4] == ["12", "0", "4", "0"]
    assert counts["MUSE (full)"][:4] == ["12", "0", "6", "2"], "2 steps with guidance, and 1 inner step at each"
    assert not (tmp_path / "out").exists()

    main([*command, "--stage", "make"])
    folder = tmp_path / "out"
    before = states(folder)
    assert len(before) == 36 and not (folder / "judged").exists()
    assert {name.split(os.sep)[1] for name in before} == {"stock-prompt-alone", "muse-full", "grey"}
    record = read_record(folder / "pictures" / "muse-full" / "00001_fear_1.png")
    assert (record["prompt"], record["emotion"], record["seed"]) == ("a house", "fear", 1)
    assert record["seconds"] > 0 and record["gate_step"] == 0 and record["trace"]["probabilities"]
    image = Image.open(folder / "pictures" / "grey" / "00000_awe_0.png")
    assert np.ptp(np.asarray(image).astype(int), axis=-1).max() == 0
    (run,) = json.loads((folder / "run.json").read_text())["runs"]
    assert run["arguments"]["images_per_emotion"] == 3 and run["versions"]["torch"] == torch.__version__

    monkeypatch.setattr(making, "timed", lambda *_: pytest.fail("a picture was made twice"))
    main([*command, "--stage", "judge", "report"])
    tables = folder / "tables"
    found, more = table(tables / "generation.csv"), table(tables / "generation_more.csv")
    assert list(found) == ["other", "stock, prompt alone", "MUSE (full)", "grey"]

    # accuracy, by the judge itself
    classifier = tiny_models.SimEmoForImageClassification.from_pretrained(tiny["judge1"]).eval()
    spec = PixelSpec.from_classifier(classifier)
    right = []
    for path in sorted((folder / "pictures" / "muse-full").glob("*.png")):
        (answer,) = label_probabilities(classifier, picture_pixels(Image.open(path), spec))
        right.append(max(answer, key=answer.get) == path.name.split("_")[1])
    assert float(found["MUSE (full)"]["emo_b (%)"]) == pytest.approx(100 * np.mean(right)) != 0
    seconds = [read_record(folder / name)["seconds"] for name in before if "muse-full" in name]
    assert float(found["MUSE (full)"]["seconds"]) == pytest.approx(np.median(seconds))
    assert found["other"]["seconds"] == "" and found["other"]["CLIP"] == "", "nothing is known of what it shows"
    assert float(found["stock, prompt alone"]["FID real, CLIP"]) > 0
    assert more["MUSE (full)"]["pictures"] == "12" and more["other"]["pictures"] == "4"
    inner = [read_record(folder / name)["inner_steps"] for name in before if "muse-full" in name]
    assert more["MUSE (full)"]["gate open (%)"] == "100"
    assert float(more["MUSE (full)"]["inner steps"]) == pytest.approx(np.mean(inner)) != 0

    names = ("generation.md", "generation.tex", "generation.png", "generation_examples.png", "generation_features.png")
    names += ("generation_emotions_emo_b.csv", "generation_confusion/muse-full.csv", "generation_confusion/grey.png")
    assert all((tables / name).stat().st_size for name in names)
    text = (tables / "generation.md").read_text()
    assert "4 to 12 pictures a row of 3 contents and 4 emotions. Chance is 12.5 %." in text
    assert str(tmp_path) not in text and str(tiny["base"]) not in text, "tables name no path of the machine"
    assert (folder / "raters" / "generation" / "form.html").exists()
    assert (folder / "raters" / "generation_key.json").exists()

    # a new judge costs no new picture, and other settings are refused
    main([*command, "--scores", f"CLIP={tiny['clip']}", f"again={tiny['clip']}", "--stage", "judge", "report"])
    again = table(tables / "generation.csv")["grey"]
    assert again["again"] == again["CLIP"] != ""
    assert states(folder) == before
    with pytest.raises(SystemExit, match=r"another guidance_scale .*Choose another --output_dir"):
        main([*command, "--guidance_scale", "3"])
    assert states(folder) == before


def test_edits_are_judged_beside_their_sources(options, tiny, tmp_path):
    more = ["--table", "editing", "--images", str(tiny["pictures"]), "--presets", "fast", "--edit_strengths", "0.5"]
    main([*options, *more, "--sdedit_strengths", "0.5", "--metric_variant", "published"])
    found, extra = (table(tmp_path / "out" / "tables" / f"editing{end}.csv") for end in ("", "_more"))
    assert list(found) == ["SDEdit, strength 0.5", "MUSE (fast), null prompt, strength 0.5"]
    folder = row_folder(tmp_path / "out", "SDEdit, strength 0.5")
    errors = []
    for path in sorted(folder.glob("*.png")):
        source = Image.open(read_record(path)["source"]).convert("RGB")
        errors.append(np.mean((np.asarray(Image.open(path)) - np.asarray(source)) ** 2))  # wraps around, as published
    assert float(extra["SDEdit, strength 0.5"]["MSE"]) == pytest.approx(np.mean(errors))
    for row in found:
        assert 0 < float(found[row]["image similarity"]) <= 1
        assert -1 <= float(extra[row]["Emo-S, emo_b"]) <= 1
    assert (tmp_path / "out" / "tables" / "editing.png").exists()


def test_guides_guide_and_leave_the_pipeline_its_own(options, tiny, tmp_path):
    args = parse_args([*options, "--table", "guides", "--presets", "full"])
    studio = Studio(args)
    own = studio.pipe.emotion_classifier
    first, second = tables_of(args)["guides"]
    cases = cases_of(args)["generation"][:2]
    by_first, by_second = (row(studio, cases) for row in (first, second))
    assert studio.pipe.emotion_classifier is own
    assert by_first[0].trace.probabilities != by_second[0].trace.probabilities
    assert args.classifier == str(tiny["judge0"]), "a guide may be named as a judge is"
    with guided_by(studio.pipe, "emo_b"):
        assert type(studio.pipe.emotion_classifier).__name__ == "ResNetForImageClassification"
    assert studio.pipe.emotion_classifier is own


def test_a_killed_run_goes_on_with_two_processes_to_the_pictures_of_one(options, tmp_path, monkeypatch, one_thread):
    command = [*options, "--rows", "alone", "(fast)", "--stage", "make"]
    made = 3

    def save_and_die(image, entry, folder):
        save_picture(image, entry, folder)
        if len(states(tmp_path / "out")) == made:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("muse_examples.runs.save_picture", save_and_die)
        main(command)
    before = states(tmp_path / "out")
    (row_folder(tmp_path / "out", "MUSE (fast)")).mkdir(parents=True, exist_ok=True)
    left = row_folder(tmp_path / "out", "MUSE (fast)") / PARTIAL.replace("*", "left")
    left.write_bytes(b"half a picture")

    launch = [Path(sys.executable).with_name("accelerate"), "launch", "--multi_gpu", "--num_processes", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.run(
        [*launch, "--main_process_port", "0", SCRIPT, *command, "--stage", "make", "judge", "report"],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert process.returncode == 0, process.stderr[-4000:]
    after = states(tmp_path / "out")
    assert len(before) == made and before.items() <= after.items(), "none was made twice"
    assert not left.exists()
    assert process.stdout.count("Table “generation”") == 1, "one process reports"

    whole = [str(tmp_path / "whole") if text == str(tmp_path / "out") else text for text in command]
    main(whole)
    assert after.keys() == states(tmp_path / "whole").keys()
    for name in after:
        one, other = (Image.open(tmp_path / folder / name) for folder in ("out", "whole"))
        assert one.tobytes() == other.tobytes(), name
    assert (tmp_path / "out" / "tables" / "generation.csv").exists()


@pytest.mark.parametrize(("shape", "other"), [("sd", "thresholds"), ("xl", "editing")])
def test_storybook_is_one_configuration(shape, other, tmp_path):
    """In a process of its own, as its script and `examples/evaluate.py` have one name."""
    script = tiny_models.REPOSITORY / "examples" / "storybook" / "evaluate.py"
    told = ["--prompts", "1", "--sources", "1", "--drawings_of_each", "1", "--references", "2", *SHORT, *TWO]
    told += ["--output_dir", tmp_path / "out", "--results_dir", tmp_path / "results", "--device", "cpu"]
    told += ["--rows", "alone", "cue", "(full)", "--thresholds", "0", "inf"] + ["--xl"] * (shape == "xl")
    told += ["--table", "generation", other]
    told += ["--edit_strengths", "0.5", "--edit_references", "null", "--presets", "full"]
    run = "import runpy, sys; sys.argv[0] = sys.argv.pop(1); sys.path.insert(0, sys.argv[1]); "
    run += "del sys.argv[1]; runpy.run_path(sys.argv[0], run_name='__main__')"
    check(run_fresh(run, script, script.parent, *told, folder=tmp_path))
    found = table(tmp_path / "results" / "generation.csv")
    cue = "stock, one of the emotion's cues in the prompt"
    assert list(found) == ["drawings of the emotion, held out", "stock, prompt alone", "MUSE (full)", cue]
    judge, right = read_model(judges()["emo_b"]), []
    for name, entry in read_metadata(tmp_path / "out" / "data" / "drawings" / "metadata.jsonl").items():
        if entry["emotion"] in TWO:
            picture = Image.open(tmp_path / "out" / "data" / "drawings" / name)
            (answer,) = label_probabilities(judge, picture_pixels(picture, PixelSpec.from_classifier(judge)))
            right.append(max(answer, key=answer.get) == entry["emotion"])
    assert len(right) == 2
    assert float(found["drawings of the emotion, held out"]["Emo-B (%)"]) == pytest.approx(100 * np.mean(right))
    if other == "editing":
        edits = table(tmp_path / "results" / "editing.csv")
        assert 0.3 < float(edits["MUSE (full), null prompt, strength 0.5"]["image similarity"]) <= 1
        return
    curve = table(tmp_path / "results" / "thresholds.csv")
    assert [row.split()[-1] for row in curve] == ["0", "inf"]
    for column in ("Emo-B (%)", "CLIP"):
        assert float(curve["MUSE (full), η = inf"][column]) == pytest.approx(
            float(found["stock, prompt alone"][column]), abs=1e-4
        ), "a gate that never opens leaves the stock pipeline's picture"
    assert (tmp_path / "results" / "thresholds_curve.png").exists()


def test_emoctrls_test_set_adds_joint_accuracies(options, tiny, tmp_path):
    path = tmp_path / "test_data.json"
    path.write_text(json.dumps({"element": ["boat", "cat"], "caption": ["A house on a hill."]}))
    assert [case.element for case in plan(read_contents(path), ["awe"], None)] == [True, True, False]
    main([*options, "--captions", str(path), "--rows", "alone"])
    row = table(tmp_path / "out" / "tables" / "generation_more.csv")["stock, prompt alone"]
    content, joint = float(row["content (%)"]), float(row["joint, emo_b (%)"])
    assert 0 <= joint <= content <= 100


def test_names_of_rows_make_names_of_folders():
    assert slug("MUSE (paper), η = 18") == "muse-paper-eta-=-18"
    assert slug("Universal Guidance, weight 5") == "universal-guidance-weight-5"


def test_a_method_says_its_task():
    with pytest.raises(ValueError, match="`task` has to be one of generation, editing"):
        method("mine", "painting")


def test_examples_are_of_contents_that_rows_share(tmp_path):
    """Not of those that the largest row alone has, nor is a row shown that has few of them."""

    def shown(prompts):
        told = [(prompt, emotion) for prompt in prompts for emotion in ("awe", "fear", "anger")]
        return [Shown(tmp_path / "a.png", emotion, prompt, None, prompt, False, {}) for prompt, emotion in told]

    shared = shown(["a cat", "a car", "a boat"])
    others = shown([f"drawing {k}" for k in range(9)])
    parts = {"drawings": others + shared[:1], "stock": shared, "MUSE": shared, "two": shared[:6]}
    sheet, asked = examples({name: Row(name, part) for name, part in parts.items()})
    assert asked == [("a cat", "awe"), ("a car", "fear"), ("a boat", "anger")]
    assert list(sheet) == ["stock", "MUSE", "two"]
