"""Many pictures on several processes: none is lost, none is made twice, and a kill leaves no trace."""

import json
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, TimeoutError
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import edit
import generate
import pytest
import tiny_models
import torch
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock
from muse_examples.files import PARTIAL, whole_file
from muse_examples.pipelines import load_pipeline
from muse_examples.runs import (
    Job,
    batches,
    deal,
    differences,
    make_pictures,
    read_records,
    run_batch,
    run_settings,
    save_picture,
)
from PIL import Image


SCRIPT = [str(tiny_models.REPOSITORY / "examples" / "generate.py"), "--emotion", "awe", "none", "--device", "cpu"]
SCRIPT += ["--num_inference_steps", "2", "--max_inner_steps", "1", "--semantic_threshold", "0"]


@pytest.fixture
def generate_here(monkeypatch):
    """Runs the script in this process, on one thread, as accelerate has it: the last bits depend on their number."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(*arguments: str | Path) -> None:
        monkeypatch.setattr("sys.argv", [*SCRIPT, *map(str, arguments)])
        generate.main()

    yield run
    torch.set_num_threads(threads)


def pictures(folder: Path) -> list[Path]:
    return sorted(folder.glob("*_0.png"))


def states(paths: list[Path]) -> list[tuple[str, int, int]]:
    """What changes when a file is written again."""
    return [(path.name, path.stat().st_ino, path.stat().st_mtime_ns) for path in paths]


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_run_goes_on_with_two_processes_to_the_pictures_of_one(tmp_path, generate_here, monkeypatch, capsys):
    (tmp_path / "prompts.txt").write_text("a house\n" * 2 + "a boat\n" * 6)
    options = ["--base", tiny_models.save_muse(tmp_path / "muse"), "--prompts", tmp_path / "prompts.txt"]
    folder, count, made = tmp_path / "killed", 16, 3

    def save_and_die(image, entry, folder):
        save_picture(image, entry, folder)
        if len(pictures(folder)) == made:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("muse_examples.runs.save_picture", save_and_die)
        generate_here(*options, "--output_dir", folder)
    before = states(pictures(folder))
    (folder / PARTIAL.replace("*", "left")).write_bytes(b"half a picture")

    processes, told = 2, ""
    for index in reversed(range(processes)):  # as accelerate starts them, here one after the other
        state = SimpleNamespace(
            num_processes=processes,
            process_index=index,
            local_process_index=index,
            is_main_process=index == 0,
            is_local_main_process=True,
            device=torch.device("cpu"),
            destroy_process_group=lambda: None,
        )
        with monkeypatch.context() as patch:
            patch.setattr("muse_examples.runs.PartialState", lambda cpu, state=state: state)
            generate_here(*options, "--output_dir", folder)
        told += capsys.readouterr().out
    found = re.findall(r"process (\d) of 2: (\d+) were there, (\d+) made in .* images per minute", told)
    shares = {process: (int(there), int(new)) for process, there, new in found}
    assert [sum(share) for share in shares.values()] == [count // 2] * 2
    assert sum(new for _, new in shares.values()) == count - made
    last = shares["1"][1]
    assert f"in all: {count - last} were there, {last} made in" in told, "as the last one sees it"
    assert len(before) == made and [state for state in states(pictures(folder)) if state in before] == before

    generate_here(*options, "--output_dir", tmp_path / "whole")
    assert len(pictures(folder)) == count
    assert contents(folder) == contents(tmp_path / "whole"), "bit for bit, and no temporary file"


def test_a_folder_is_of_one_run(tmp_path, generate_here, capfd):
    arguments = [
        "--base",
        tiny_models.save_muse(tmp_path / "muse"),
        "--prompt",
        "a cat",
        "--output_dir",
        tmp_path / "out",
    ]
    generate_here(*arguments)
    before = states(pictures(tmp_path / "out"))
    assert len(before) == 2
    refusal = r"another guidance_scale \(was null, is 5.0\), seed \(was 0, is 1\)\. Choose another --output_dir"
    with pytest.raises(SystemExit, match=refusal):
        generate_here(*arguments, "--guidance_scale", "5", "--seed", "1")
    capfd.readouterr()
    generate_here(*arguments)
    assert "in all: 2 were there, 0 made in" in capfd.readouterr().out
    assert states(pictures(tmp_path / "out")) == before


def test_settings_know_files_by_content_and_the_device_by_its_kind(tmp_path):
    def settings(color: str, device: str, folder: str) -> dict:
        Image.new("RGB", (8, 8), color).save(tmp_path / "picture.jpg")
        arguments = ["--image", str(tmp_path / "picture.jpg"), "--prompt", "a cat", "--device", device]
        return run_settings(edit.parse_args([*arguments, "--output_dir", folder]))

    known = settings("red", "cuda:0", "one")
    assert differences(tmp_path, known) == [], "there is no run yet"
    (tmp_path / "run.json").write_text(json.dumps({**known, "an option that is gone": None}), encoding="utf-8-sig")
    assert differences(tmp_path, settings("blue", "cpu", "one")) == [], "nor a picture of any"
    save_picture(Image.new("RGB", (8, 8)), {"file": "made.png"}, tmp_path)
    assert differences(tmp_path, settings("red", "cuda:1", "other")) == []
    assert differences(tmp_path, settings("blue", "cuda:0", "one")) == ["image"], "too long to be shown"
    assert differences(tmp_path, settings("red", "cpu", "one")) == ['device (was "cuda", is "cpu")']


@pytest.mark.parametrize("count", [1, 7, 40])
@pytest.mark.parametrize("processes", [1, 2, 3, 8])
def test_every_batch_is_dealt_to_one_process(count, processes):
    plan = [[Job(None, "awe", number)] for number in range(count)]
    shares = [deal(iter(plan), index, processes) for index in range(processes)]
    dealt = Counter(job.seed for share in shares for (job,) in share)
    assert dealt == Counter(range(count))
    for first in range(count):  # what is left of a plan is dealt as evenly
        sizes = [sum(job.seed >= first for (job,) in share) for share in shares]
        assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize("processes", [2, 4, 8])
def test_no_process_gets_all_pictures_of_one_emotion(processes):
    emotions = ["awe", "fear", None, "anger"] * 100
    plan = [[Job(None, emotion, number)] for number, emotion in enumerate(emotions)]
    for index in range(processes):
        found = Counter(job.emotion for (job,) in deal(plan, index, processes))
        assert min(found.values()) > 0.5 * 100 / processes and len(found) == 4


def test_what_is_missing_of_a_batch_is_made_with_the_whole_batch(tmp_path):
    pipe = tiny_models.muse_pipeline()
    jobs = [Job("a cat", "awe", seed, name="cat") for seed in range(3)]
    options = {"num_inference_steps": 2, "max_inner_steps": 1, "semantic_threshold": 0}
    for missing in ({job.file_name for job in jobs}, {"cat_awe_1.png"}):
        before = contents(tmp_path)
        untouched = [tmp_path / name for name in sorted(set(before) - missing)]
        known = states(untouched)
        for name in missing & set(before):
            (tmp_path / name).unlink()
        plan = [*batches(jobs, 3), [Job("a dog", "awe", 0, name="there already")]]
        assert set(make_pictures(partial(run_batch, pipe, **options), plan, missing, tmp_path)) == missing
        assert states(untouched) == known
    assert contents(tmp_path) == before and len(before) == 3


def test_files_that_hold_no_picture_of_ours_are_made_again(tmp_path):
    jobs = [Job("ein Schloß 城", {"awe": 0.5, "fear": 0.5}, seed) for seed in range(4)]
    record = {"file": jobs[0].file_name, "prompt": jobs[0].prompt, "emotion": jobs[0].emotion, "seed": 0}
    save_picture(Image.new("RGB", (8, 8)), record, tmp_path)
    (tmp_path / jobs[1].file_name).touch()
    Image.new("RGB", (8, 8)).save(tmp_path / jobs[2].file_name)
    assert read_records(jobs, tmp_path) == [record, None, None, None]


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), whole_file(path) as partial:
        partial.write_text("ne")
        raise KeyboardInterrupt
    assert contents(tmp_path) == {"file.txt": b"old"}
    with whole_file(path) as partial:
        partial.write_text("new")
        assert path.read_text() == "old" and partial.match(PARTIAL)
    assert contents(tmp_path) == {"file.txt": b"new"}
    with pytest.raises(OSError, match="CMYK"):  # as where the disk is full
        save_picture(Image.new("CMYK", (8, 8)), {"file": "picture.png"}, tmp_path)
    assert contents(tmp_path) == {"file.txt": b"new"}


def test_processes_load_one_after_another(tmp_path):
    base = str(tiny_models.save_muse(tmp_path / "muse"))
    args = generate.parse_args(["--base", base, "--prompt", "a cat", "--device", "cpu"])
    with ThreadPoolExecutor() as pool:
        with FileLock(Path(HF_MODULES_CACHE) / "muse.lock"):  # as another process that is copying the code
            loading = pool.submit(load_pipeline, args)
            with pytest.raises(TimeoutError):
                loading.result(timeout=1)
        assert loading.result().emotion_labels
