"""The app: what a form asks for, a call that is followed and ended, and the page itself in a real browser."""

import argparse
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import edit
import pytest
import tiny_models
import torch
from muse_examples.captions import caption_pictures
from muse_examples.watching import Cancelled, Progress, follow
from muse_examples.wheel import WHEEL, WHEEL_SIZE, wheel_at, wheel_picture, wheel_place
from PIL import Image, ImageDraw
from transformers import (
    BertTokenizerFast,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessorPil,
    BlipProcessor,
)


pytest.importorskip("gradio", reason="gradio is not installed: the extra `demo` has it")
import app  # noqa: E402
from app import App, Form, Model, job_of, options_of, read_photo  # noqa: E402


PICTURE = str(app.PICTURE)
CHROMIUM = shutil.which("chromium")
FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
--disable-component-update --disable-sync""".split()


# ---- the wheel


@pytest.mark.parametrize("is_kept", [False, True])
@pytest.mark.parametrize("emotion", ["none", *WHEEL, "awe=0.6,excitement=0.4", "anger=0.7,amusement=0.3"])
def test_a_click_where_the_mark_is_means_what_is_marked(emotion, is_kept):
    assert wheel_at(*wheel_place(emotion, is_kept)) == (emotion, is_kept and emotion != "none")


@pytest.mark.parametrize("emotion", ["cozy", "awe=0.5,fear=0.5", "awe=1,fear", "awe=0.2,fear=0.3,anger=0.5"])
def test_what_lies_nowhere_on_the_wheel_has_no_mark(emotion):
    assert wheel_place(emotion, False) is None
    assert wheel_picture(emotion, False).tobytes() == wheel_picture("cozy", True).tobytes()
    assert wheel_picture("fear", False).size == (WHEEL_SIZE, WHEEL_SIZE)


# ---- what a form asks for


def test_a_form_becomes_a_job_and_options(tmp_path):
    form = Form(" a cat ", "awe=0.7, fear=0.3", seed=3, negative_prompt=" ", num_inference_steps=" 7", preset="fast")
    job = job_of(form, tmp_path)
    assert (job.prompt, job.emotion, job.seed, job.source) == ("a cat", {"awe": 0.7, "fear": 0.3}, 3, None)
    assert job.negative_prompt is None
    given = options_of(form, "some/base")
    assert given == {"preset": "fast", "num_inference_steps": 7}
    assert options_of(Form("a cat", "awe"), str(app.REPOSITORY))["num_inference_steps"] == 20, "Storybook's own"
    less = Form("a cat", "awe", emotion_strength=0.5, strength=0.7)
    assert options_of(less, "some/base") == {"preset": "full", "emotion_strength": 0.5}
    assert options_of(replace(less, photo=PICTURE), "some/base")["strength"] == 0.7


@pytest.mark.parametrize(("name", "text"), [("width", "wide"), ("num_inference_steps", "0"), ("latest_start", "a")])
def test_numbers_that_are_none_are_said(name, text):
    with pytest.raises(ValueError, match=name):
        options_of(replace(Form("a cat", "awe"), **{name: text}), "some/base")


def painted(size=(400, 400), box=(0, 0, 200, 400)) -> dict:
    layer = Image.new("RGBA", size)
    ImageDraw.Draw(layer).rectangle(box, fill="red")
    return {"background": None, "layers": [layer], "composite": None}


def test_a_photograph_and_what_is_painted_on_it_become_files(tmp_path):
    form = Form("a boat", "fear", photo=PICTURE, only_painted=True, painted=painted())
    job = job_of(form, tmp_path)
    photo, mask = Image.open(job.source), Image.open(job.mask)
    assert photo.size == mask.size == Image.open(PICTURE).size
    assert mask.getpixel((2, 2)) == 255 and mask.getpixel((photo.width - 2, 2)) == 0


def test_a_photograph_is_upright_and_no_larger_than_it_is_worked_on(tmp_path):
    image, exif = Image.new("RGB", (4000, 3000)), Image.Exif()
    exif[274] = 6  # turned by 90°
    image.save(tmp_path / "photo.jpg", exif=exif)
    assert read_photo(str(tmp_path / "photo.jpg")).size == (1152, 1536)


@pytest.mark.parametrize(
    ("form", "words"),
    [
        (Form(" ", "awe"), "what the picture should show"),
        (Form("", "awe", photo=PICTURE), "what the photograph shows"),
        (Form("a boat", "awe", photo=__file__), "cannot be read as a picture"),
        (Form("a boat", "awe", photo="missing.png"), "cannot be read as a picture"),
        (Form("a boat", "awe", photo=PICTURE, only_painted=True), "Paint where"),
        (Form("a boat", "awe", photo=PICTURE, only_painted=True, painted={"layers": []}), "Paint where"),
        (Form("a boat", "awe=0.5,fear"), "not a mixture"),
    ],
)
def test_what_makes_no_sense_is_said(form, words, tmp_path):
    with pytest.raises(app.MENDABLE) as error:
        job_of(form, tmp_path)
    assert words in app.message(error.value) and "broke" not in app.message(error.value)


def test_messages_are_one_line_and_tell_faults_of_the_program_apart():
    assert app.message(ValueError("\n too bad\nmore")) == "too bad"
    assert app.message(KeyError("x")) == "Something broke: 'x'"
    assert "not enough memory" in app.message(torch.OutOfMemoryError("CUDA …"))
    assert "&lt;b&gt;" in app.status("<b>", facts=["<i>"]) and "&lt;i&gt;" in app.status("", facts=["<i>"])


def test_strangers_do_not_choose_what_is_run():
    form = Form("a cat", "awe", base="evil/base", classifier="evil/code", dtype="float16")
    own, public = app.parse_args([]), app.parse_args(["--host", "0.0.0.0"])
    assert app.model_options(form, public) == public
    chosen = app.model_options(form, own)
    assert (chosen.base, chosen.classifier, chosen.dtype) == ("evil/base", "evil/code", "float16")
    assert app.model_options(Form("a cat", "awe"), own) == own


def test_one_model_is_in_memory(monkeypatch):
    model, held = Model(), []

    def load(args):
        held.append(model.pipe)
        if args.base == "broken":
            raise OSError("no such base")
        return args.base

    monkeypatch.setattr(app, "load_pipeline", load)
    monkeypatch.setattr(app, "load_judge", lambda pipe, args: None)
    for base in ("first", "first", "second"):
        model.load(argparse.Namespace(base=base))
        assert model.pipe == base
    with pytest.raises(OSError):
        model.load(argparse.Namespace(base="broken"))
    assert held == [None, None, None] and model.pipe is model.args is None


# ---- a call that is followed


def test_a_followed_call_is_the_same_call(pipe):
    def call():
        return pipe("a cat", emotion="awe", generator=tiny_models.generator(), **options).images

    options = {"num_inference_steps": 3, "semantic_threshold": 0, "max_inner_steps": 2, "output_type": "pt"}
    *news, images = follow(pipe, call, lambda: False)
    assert torch.equal(images, call())
    last = news[-1]
    assert (last.step, last.steps, last.is_open) == (3, 3, True) and last.inner_steps == 6
    assert 0 <= last.probability <= 1 and last.preview.size == (32, 32)
    assert not pipe.unet._forward_pre_hooks and not pipe.vae.decoder._forward_hooks


def test_a_call_ends_within_the_inner_loop(pipe, count_calls):
    calls = count_calls(pipe.unet)
    options = {"num_inference_steps": 3, "semantic_threshold": 0, "max_inner_steps": 50}
    with pytest.raises(Cancelled):
        list(follow(pipe, lambda: pipe("a cat", emotion="awe", **options), lambda: len(calls) >= 5))
    assert len(calls) == 5 and not pipe.unet._forward_pre_hooks
    assert pipe("a cat", emotion="awe", num_inference_steps=1, max_inner_steps=1).images, "it works on"


def test_whoever_leaves_ends_the_call(pipe, count_calls):
    calls = count_calls(pipe.unet)
    news = follow(pipe, lambda: pipe("a cat", emotion="awe", num_inference_steps=500), lambda: False)
    assert isinstance(next(news), Progress)
    news.close()
    made = len(calls)
    time.sleep(0.2)
    assert len(calls) == made < 500


def test_errors_of_a_followed_call_arrive(pipe):
    with pytest.raises(ValueError, match="`emotion`"):
        list(follow(pipe, lambda: pipe("a cat", emotion="awee"), lambda: False))


# ---- the page without a browser


@pytest.fixture
def other(tmp_path) -> App:
    """The page of a base that knows nothing of MUSE."""
    base, clip = tiny_models.save_base(tmp_path / "base"), tmp_path / "clip"
    tiny_models.clip_model().save_pretrained(clip)
    return App(app.parse_args(["--base", str(base), "--clip", str(clip), "--device", "cpu", "--caption_model", "any"]))


def says_last(page: App, updates: list[dict]) -> str:
    return [update[page.status] for update in updates if page.status in update][-1]


@pytest.mark.parametrize("emotion", ["awe=0.5,cozy=0.5", "none"])
def test_any_base_makes_a_picture(other, emotion, tmp_path):
    form = Form("a cat", emotion, num_inference_steps="2", latest_start="0" if emotion != "none" else "")
    updates = list(other.making(form, tmp_path / "stop"))
    assert "Done" in says_last(other, updates)
    assert Image.open(updates[-1][other.download]["value"]).info["muse"]
    assert (other.plot in updates[-1]) == (emotion != "none")


def test_a_call_that_cannot_be_made_gives_the_buttons_back(other, tmp_path):
    form = Form("a cat", "awe", width="33", height="32")
    updates = list(other.guarded(other.making(form, tmp_path / "stop")))
    assert "divisible by 8" in says_last(other, updates)
    assert updates[-1][other.go]["visible"] and not updates[-1][other.cancel]["visible"]


@pytest.mark.parametrize("photo", [PICTURE, None, __file__])
def test_another_photograph_lets_go_of_what_was_painted(other, photo, monkeypatch):
    monkeypatch.setattr(app.gr, "Warning", lambda words: None)
    *_, painted, ticked = other.new_photo(True, photo)
    assert (painted["value"], painted["visible"], ticked) == (None, False, False)
    # Ticked while the photograph is still being read: the answer to the photograph must not undo it
    assert other.new_photo(False, photo)[-2:] == [app.gr.skip(), app.gr.skip()]


def test_a_photograph_without_a_caption_gets_one(other, monkeypatch, tmp_path):
    monkeypatch.setattr(app, "caption_pictures", lambda name, pictures, device: [f"a boat, says {name}"])
    form = Form("", "none", photo=PICTURE, num_inference_steps="2")
    updates = list(other.making(form, tmp_path / "stop"))
    words = [update[other.inputs["prompt"]] for update in updates if other.inputs["prompt"] in update]
    assert words == ["a boat, says any"] and "Done" in says_last(other, updates)
    assert json.loads(Image.open(updates[-1][other.download]["value"]).info["muse"])["prompt"] == words[0]


# ---- pictures put into words


@pytest.fixture(scope="module")
def caption_model(tmp_path_factory) -> str:
    """A captioner with random weights, which always says the same."""
    folder = tmp_path_factory.mktemp("blip")
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "[DEC]", "a", "dog", "on", "sofa"]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizerFast(vocab=str(folder / "vocab.txt"), bos_token="[DEC]")
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    ids = {"bos_token_id": 5, "sep_token_id": 3, "eos_token_id": 3, "pad_token_id": 0}
    text = {"vocab_size": len(words), "encoder_hidden_size": 16, "max_position_embeddings": 64, **ids}
    config = BlipConfig(text_config=small | text, vision_config=small | {"image_size": 32, "patch_size": 16})
    model = BlipForConditionalGeneration(config)
    with torch.no_grad():
        head = model.text_decoder.cls.predictions.decoder
        head.weight.zero_()
        head.bias.copy_(torch.tensor([-9.0] * 7 + [9.0] + [-9.0] * 2))  # "dog", for ever
    model.save_pretrained(folder)
    BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer).save_pretrained(folder)
    return str(folder)


def test_a_picture_is_put_into_words(caption_model):
    pictures = [Image.open(PICTURE), Image.new("LA", (50, 20))]
    captions = caption_pictures(caption_model, pictures)
    assert len(captions) == 2 and set(" ".join(captions).split()) == {"dog"}


def test_edit_has_pictures_captioned_where_nobody_says_what_they_show(caption_model, tmp_path, capsys):
    broken = tmp_path / "broken.png"
    broken.write_bytes(Path(PICTURE).read_bytes()[:600])
    arguments = ["--image", PICTURE, str(broken), "--emotion", "awe", "--caption_model", caption_model]
    args = edit.parse_args(arguments)
    edit.caption(args)
    assert set(args.prompt[0].split()) == {"dog"} and args.prompt[1] is None
    assert f"{PICTURE} shows “dog" in capsys.readouterr().out
    args = edit.parse_args([*arguments, "--prompt", "a boat"])
    edit.caption(args)
    assert args.prompt == ["a boat", "a boat"], "what people say counts"
    with pytest.raises(SystemExit):
        edit.parse_args(arguments[:-2])


# ---- a Space


def test_the_space_has_what_it_needs():
    docs = tiny_models.REPOSITORY / "docs"
    front = (docs / "space.md").read_text(encoding="utf-8").split("---")[1]
    pinned = set((tiny_models.REPOSITORY / "constraints.txt").read_text().split("\n"))
    entries = dict(re.findall(r"^(\w+): (.*)$", front, flags=re.MULTILINE))
    assert f"gradio=={entries['sdk_version']}" in pinned
    assert (tiny_models.REPOSITORY / entries["app_file"]).is_file() and len(entries["short_description"]) <= 60


# ---- the page in a browser


@pytest.fixture(scope="module")
def address(tmp_path_factory) -> str:
    """Where the app runs, as people start it."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = tmp_path_factory.mktemp("app") / "log.txt"
    environment = os.environ | {"GRADIO_TEMP_DIR": str(log.parent / "gradio"), "NO_PROXY": "*"}
    command = [sys.executable, str(tiny_models.REPOSITORY / "examples" / "app.py"), "--port", str(port)]
    with open(log, "w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=environment)
    try:
        for _ in range(600):
            time.sleep(0.1)
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert process.poll() is None, log.read_text()
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(20)


@pytest.fixture(scope="module")
def browser():
    if CHROMIUM is None:
        pytest.skip("there is no chromium here")
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, address):
    """The page, which must ask nobody but the app for anything."""
    page, asked = browser.new_page(viewport={"width": 1280, "height": 1600}), []
    page.set_default_timeout(120_000)
    page.on("request", lambda request: asked.append(request.url))
    page.goto(address)
    page.wait_for_selector("#go")
    page.get_by_role("radio", name="fast", exact=True).check()
    yield page
    page.close()
    assert all(url.startswith((address, "data:", "blob:")) for url in asked), asked


def says(page, *words: str) -> str:
    """Waits until the status has one of these words."""
    page.wait_for_function(f"{list(words)}.some(word => document.querySelector('#status').innerText.includes(word))")
    return page.inner_text("#status")


def take_steps(page, steps: int) -> None:
    page.click("button:has-text('More')")
    page.get_by_label("num_inference_steps").fill(str(steps))


def test_make_a_picture(page, tmp_path, monkeypatch):
    take_steps(page, 4)
    wheel = page.locator("#wheel img")
    scale = wheel.bounding_box()["width"] / WHEEL_SIZE
    x, y = wheel_place("awe", False)
    wheel.click(position={"x": x * scale, "y": y * scale})
    page.wait_for_function("document.querySelector('#emotion input').value == 'awe'")
    page.click("#go")
    assert "the guide gives awe" in says(page, "Done", "broke", "gate never")
    with page.expect_download() as download:
        page.click("#download")
    download.value.save_as(tmp_path / "made.png")
    entry = json.loads(Image.open(tmp_path / "made.png").info["muse"])
    assert (entry["emotion"], entry["seed"], entry["preset"], entry["base"]) == ("awe", 0, "fast", "Storybook")
    assert page.locator("#plot img").count() == 1

    # The call to copy makes the same picture
    page.get_by_role("tab", name="Python").click()
    code = page.inner_text("#python .cm-content")
    for entry in tiny_models.REPOSITORY.iterdir():
        if not entry.name.startswith("."):
            (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    exec(code)
    made, again = (Image.open(tmp_path / name).convert("RGB").tobytes() for name in ("made.png", "picture.png"))
    assert sum(abs(one - other) for one, other in zip(made, again)) / len(made) < 2


def test_edit_a_photograph_where_it_is_painted(page):
    take_steps(page, 8)
    page.click("button:has-text('Edit a photograph')")
    page.set_input_files("#photo input[type=file]", PICTURE)
    page.wait_for_selector("#photo img")
    page.fill("#prompt textarea", "a boat in the harbour")
    page.click("#only-painted label")
    page.wait_for_selector("#painted canvas")
    page.wait_for_timeout(1500)
    page.click("#go")
    says(page, "Paint where")
    page.wait_for_selector("#go")
    box = page.locator("#painted canvas").first.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - 60, y - 60)
    page.mouse.down()
    for step in range(4):
        page.mouse.move(x - 60 + 30 * step, y - 60 + 30 * (step % 2))
    page.mouse.up()
    page.wait_for_timeout(1000)
    page.click("#go")
    assert "Done" in says(page, "Done", "broke", "gate never")
    page.wait_for_selector("#slider img")
    page.get_by_role("tab", name="Python").click()
    page.wait_for_selector("#python :text('mask_image')")
    code = page.inner_text("#python .cm-content")
    assert re.search(r"\bstrength=0.75", code) and "emotion_strength=0.75" in code, "a photograph is kept"


def test_cancel(page):
    page.get_by_role("radio", name="paper", exact=True).check()  # fails where the page does not take it
    page.click("#go")
    says(page, "inner step")
    page.click("#cancel")
    start = time.monotonic()
    says(page, "Cancelled")
    assert time.monotonic() - start < 10
    page.wait_for_selector("#go")


def test_bad_input_is_a_message_and_does_no_harm(page, tmp_path):
    broken, large = tmp_path / "broken.png", tmp_path / "large.jpg"
    broken.write_bytes(b"\x89PNG\r\n\x1a\n" + b"broken" * 50)
    Image.effect_noise((4000, 3000), 50).convert("RGB").save(large)
    page.click("button:has-text('Edit a photograph')")
    page.set_input_files("#photo input[type=file]", broken)
    page.wait_for_selector("text=cannot be read as a picture")
    page.wait_for_selector("#photo input[type=file]", state="attached")
    page.set_input_files("#photo input[type=file]", large)
    page.wait_for_selector("#photo img")
    page.fill("#prompt textarea", "")
    page.click("#go")
    says(page, "Say in the first box what the photograph shows")
    page.wait_for_selector("#go")
    take_steps(page, 2)
    page.fill("#prompt textarea", "a boat")
    page.click("#go")
    assert "144 x 112" in says(page, "Done", "broke", "gate never")
