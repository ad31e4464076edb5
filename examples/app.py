# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
A page in the browser to make pictures that evoke emotions, and to edit photographs towards them.

python examples/app.py
python examples/app.py --base path/or/id --dtype float16 --caption_model Salesforce/blip-image-captioning-base

From top to bottom: what is said, the one pipeline in memory, the page. What the page asks for is in
`muse_examples/forms.py`, how a call is followed and ended in `muse_examples/watching.py`.
"""

import argparse
import gc
import html
import logging
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any
from uuid import uuid4


# Nothing is told to anybody. Has to be said before gradio is imported.
os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1"}

try:  # on a Space that borrows a GPU for each call; has to come before torch
    from spaces import GPU
except ImportError:

    def GPU(duration: int) -> Any:
        return lambda function: function


import gradio as gr  # noqa: E402
import torch  # noqa: E402
from muse_examples import REPOSITORY  # noqa: E402
from muse_examples.captions import CAPTION_HELP, caption_pictures  # noqa: E402
from muse_examples.classifiers import label_probabilities, picture_pixels  # noqa: E402
from muse_examples.contact_sheets import (  # noqa: E402
    BAD,
    EMOTION_COLORS,
    FAINT,
    GOOD,
    INK,
    Cell,
    contact_sheet,
)
from muse_examples.demo import CAPTION, PICTURE, PROMPT, load_judge, plot_inner_loop, remark  # noqa: E402
from muse_examples.forms import NUMBERS, Form, as_python, job_of, options_of, read_photo  # noqa: E402
from muse_examples.options import (  # noqa: E402
    USERS_ERRORS,
    add_memory_options,
    add_model_options,
    one_line_errors,
)
from muse_examples.pipelines import DTYPES, default_device, known_labels, load_pipeline, settings_of  # noqa: E402
from muse_examples.runs import (  # noqa: E402
    Job,
    Made,
    emotion_name,
    outcome,
    record,
    run_batch,
    save_picture,
    verdict,
)
from muse_examples.watching import Cancelled, Progress, follow  # noqa: E402
from muse_examples.wheel import WHEEL, wheel_at, wheel_picture  # noqa: E402
from PIL import Image  # noqa: E402

from pipeline_muse import MIKELS_WHEEL, PixelSpec  # noqa: E402


logger = logging.getLogger(__name__)

EVOKE, KEEP = "Evoke the emotion", "Keep the picture"
# `emotion_strength` and `strength`, as measured by examples/storybook/edit_frontier.py
MODES = {EVOKE: (1.0, 1.0), KEEP: (0.75, 0.75)}

MENDABLE = (*USERS_ERRORS, argparse.ArgumentTypeError)  # by whoever made the call
HEIGHT, SHEET_HEIGHT = 500, 760  # px, on the page
ON_A_SPACE = "SPACE_ID" in os.environ
GPU_SECONDS = 60  # that a call may borrow a Space's GPU for


# --------------------------------------------------------------------------------------
# What is said
# --------------------------------------------------------------------------------------


def status(text: str, share: float | None = None, color: str = INK, facts: Sequence[str] = ()) -> str:
    """A line that says how things are, with a bar and facts below, as HTML."""
    bar = "" if share is None else f'<div class="muse-bar"><div style="width:{100 * share:.1f}%"></div></div>'
    chips = "".join(f"<span>{html.escape(fact)}</span>" for fact in facts)
    return f'<div class="muse-status" style="--tone:{color}"><b>{html.escape(text)}</b>{bar}<div>{chips}</div></div>'


def counted(number: int, thing: str) -> str:
    return f"{number} {thing}" + (number != 1) * "s"


def told(progress: Progress, job: Job) -> str:
    """How far a picture is, as HTML."""
    if not progress.steps:
        return status("Starting …", 0)
    share, is_first = progress.step / progress.steps, job.source is not None and progress.walk < 2
    if is_first:
        return status("Walking from the photograph to noise", share / 2, facts=[f"step {progress.step}"])
    facts = [f"step {progress.step} of {progress.steps}"]
    if job.emotion is not None:
        facts.append("gate open" if progress.is_open else "gate closed")
    if progress.probability is not None:
        facts.append(f"p({emotion_name(job.emotion)}) = {progress.probability:.2f}")
    if progress.inner_steps:
        facts.append(counted(progress.inner_steps, "inner step"))
    if job.source is not None:
        share = 0.5 + share / 2
    return status("Making the picture", share, EMOTION_COLORS.get(emotion_name(job.emotion), INK), facts)


def result(made: Made, emotion: Any, seen: tuple[str, str] | None, seconds: float) -> str:
    """What became of a picture, as HTML; `seen` is the judge's remark."""
    found = outcome(made)
    words, color = verdict(found)
    facts = [f"{seconds:.0f} s", "{} x {} px".format(*made.image.size)]
    if made.trace is not None and found["gate_step"] is not None:
        facts.append(f"the gate opened at step {found['gate_step'] + 1}")
        facts.append(f"it felt like {found['inherent_emotion']} before")
    if seen:
        facts.append(seen[0].replace("judge:", "another judge:"))
    if made.trace is not None and found["gate_step"] is None:
        words = "The gate never opened: this is the picture without the emotion. Under “More”, let guidance start"
        words += " at the latest at 0.3, or lower the gate’s threshold."
    elif made.trace is not None and not made.blackened:
        words = f"Done: the guide gives {emotion_name(emotion)} {found['target_probability']:.0%}"
        facts.append(counted(found["inner_steps"], "inner step"))
    return status(words or "Done", 1, color, facts)


def message(error: BaseException) -> str:
    """What to tell of an error, in a line or two."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return "There is not enough memory for this. Take a smaller size, float16 or the preset “fast”."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else type(error).__name__
    return text if isinstance(error, MENDABLE) else f"Something broke: {text}"


# --------------------------------------------------------------------------------------
# The one pipeline in memory
# --------------------------------------------------------------------------------------


def base_of(args: argparse.Namespace) -> dict[str, str]:
    """What a record says of the base."""
    return {"base": "Storybook" if args.base == str(REPOSITORY) else args.base}


class Model:
    """The pipeline that was asked for last, and a judge that never guides, where the base brings one."""

    def __init__(self) -> None:
        self.args: argparse.Namespace | None = None
        self.pipe: Any = None
        self.judge: Any = None

    def load(self, args: argparse.Namespace) -> None:
        """Has the pipeline of these options, in place of the one before."""
        if args == self.args:
            return
        self.args = self.pipe = self.judge = None
        release_memory()
        self.pipe = load_pipeline(args)
        self.judge = load_judge(self.pipe, args)
        self.args = args

    def judged(self, image: Image.Image, emotion: Any) -> tuple[str, str] | None:
        """What the judge sees in a picture, and in which colour to say it."""
        if self.judge is None:
            return None
        pixels = picture_pixels(image, PixelSpec.from_classifier(self.pipe.emotion_classifier))
        return remark(label_probabilities(self.judge, pixels)[0], emotion if isinstance(emotion, str) else None)


def release_memory() -> None:
    """Gives memory back that nothing needs."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


MODEL = Model()
FOLDER = Path(tempfile.mkdtemp(prefix="muse-app-"))  # what sessions make; also how they end a call, see `stop_file`


def stop_file(session: str | None) -> Path:
    """A file that ends the call of a session: on a Space the call runs in another process."""
    return FOLDER / f"stop-{session}"


@GPU(duration=GPU_SECONDS)
def make(job: Job, options: dict[str, Any], stop: Path) -> Iterator[Progress | Made]:
    """Makes a picture; tells how far it is, and yields it at last."""
    pipe = MODEL.pipe
    yield from follow(pipe, lambda: run_batch(pipe, [job], **options)[0], stop.exists)


def model_options(form: Form, args: argparse.Namespace) -> argparse.Namespace:
    """The options of the command line with the models that a form names, where visitors may choose."""
    if not args.choose_models:
        return args
    chosen = {"base": form.base.strip() or args.base, "classifier": form.classifier.strip() or None}
    return argparse.Namespace(**vars(args) | chosen | {"dtype": form.dtype or args.dtype})


# --------------------------------------------------------------------------------------
# The page
# --------------------------------------------------------------------------------------

CSS = """
.gradio-container {max-width: 1280px !important; margin: auto}
#muse-title h1 {margin-bottom: 0} #muse-title p {color: var(--body-text-color-subdued)}
#picture img, #picture button, #picture .image-frame {width: 100%; height: 100%; object-fit: contain}
#wheel, #wheel * {border: none !important; outline: none !important; background: none !important; box-shadow: none}
#wheel img {cursor: crosshair; max-width: 340px; margin: auto}
.muse-status b {color: color-mix(in srgb, var(--tone) 80%, var(--body-text-color))}
.muse-status span {display: inline-block; margin: 6px 6px 0 0; padding: 1px 9px; border-radius: 9px;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); font-size: 13px}
.muse-bar {height: 6px; margin-top: 8px; border-radius: 3px; background: var(--border-color-primary)}
.muse-bar div {height: 100%; border-radius: 3px; background: var(--tone); transition: width .2s}
"""

TITLE = """# MUSE
Say what a picture shows and what it should feel like. MUSE asks Stable Diffusion for both, at test time; nothing is
trained. [The method](https://huggingface.co/papers/2511.21051)"""

STORYBOOK = """The model here is **Storybook**, a small illustrated world: a cat, horse, child, house, car,
boat, bicycle or tent, in a park, forest, street, cemetery, harbour, at the beach, in the mountains or on a farm."""

HINTS = {
    "num_inference_steps": "more take longer",
    "guidance_scale": "how closely to follow the prompt",
    "width": "in px, a multiple of 8",
    "height": "in px, a multiple of 8",
    "semantic_threshold": "likeness to the prompt that opens the gate",
    "latest_start": "0.3: guidance starts after 30 % of the steps in any case",
}
EXAMPLES = {
    "a frightening house": ["a house in the park", "fear", None, 0],
    "an exciting car": ["a red car in the street", "excitement", None, 1],
    "a boat between contentment and awe": ["a boat on the beach", "contentment=0.5,awe=0.5", None, 2],
    "a sad photograph": [CAPTION, "sadness", str(PICTURE), 0],
}
FIRST_PICTURE = REPOSITORY / "examples" / "storybook" / "results" / "demo_emotions.png"


class App:
    """What the page does. Its methods yield what changes, by component."""

    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.inputs: dict[str, Any] = {}  # components, by the field of `Form`
        self.build()

    # ---- what it looks like

    def build(self) -> None:
        """Lays the page out."""
        with gr.Blocks(title="MUSE", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as self.page:
            gr.Markdown(TITLE, elem_id="muse-title")
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    self.build_question()
                with gr.Column(scale=6, min_width=320):
                    self.build_answer()
            self.build_details()
            self.connect()

    def build_question(self) -> None:
        """The left side: what is asked for."""
        args, add = self.args, self.inputs
        labels = known_labels(args) or list(MIKELS_WHEEL)
        add["prompt"] = gr.Textbox(PROMPT, label="What the picture shows", lines=2, elem_id="prompt")
        with gr.Accordion("Edit a photograph", open=False) as self.photo_part:
            add["photo"] = gr.Image(
                show_label=False,
                type="filepath",
                height=150,
                sources=["upload", "clipboard"],
                elem_id="photo",
                buttons=[],
            )
            # The file as it is: what is no picture gets a word of ours, where gradio would fail
            add["photo"].preprocess = lambda file: file.path if file else None
            self.say = gr.Button("Say what it shows", size="sm", visible=bool(args.caption_model))
            add["only_painted"] = gr.Checkbox(False, label="Change it only where I paint", elem_id="only-painted")
            add["painted"] = gr.ImageEditor(
                label="Paint where the emotion acts", type="pil", visible=False, elem_id="painted", layers=False,
                brush=gr.Brush(colors=["#e0559a"], color_mode="fixed", default_size=40), transforms=(), sources=(),
                height=340, buttons=[],
            )  # fmt: skip
        with gr.Row():
            with gr.Column(min_width=200):
                self.wheel = gr.Image(
                    wheel_picture("fear", False), show_label=False, interactive=False, type="pil", format="png",
                    buttons=[], elem_id="wheel", container=False, image_mode="RGBA", visible=set(labels) >= set(WHEEL),
                )  # fmt: skip
            with gr.Column(min_width=190):
                add["emotion"] = gr.Dropdown(
                    [*labels, "none"], value="fear" if "fear" in labels else labels[0], allow_custom_value=True,
                    label="Emotion", elem_id="emotion",
                    info="Click the wheel, or choose, or write: a word of your own, a mixture (awe=0.7,fear=0.3)",
                )  # fmt: skip
                self.mode = gr.Radio(list(MODES), value=EVOKE, label="How much", elem_id="mode")
        with gr.Row():
            with gr.Column(min_width=270, scale=3):
                add["preset"] = gr.Radio(
                    ["fast", "full", "paper"], value="full", label="Preset", info="fast: a third of the time of full"
                )
            with gr.Column(min_width=110, scale=1):
                add["seed"] = gr.Number(0, label="Seed", precision=0, min_width=70, elem_id="seed")
                self.dice = gr.Button("Another seed", size="sm")
        with gr.Row():
            self.go = gr.Button("Make the picture", variant="primary", elem_id="go", scale=3)
            self.all = gr.Button("All emotions", elem_id="all", scale=2)
            self.cancel = gr.Button("Cancel", variant="stop", visible=False, elem_id="cancel", scale=3)
        self.build_more()
        if settings_of(args.base):
            filled = [add["prompt"], add["emotion"], add["photo"], add["seed"]]
            gr.Examples(list(EXAMPLES.values()), filled, example_labels=list(EXAMPLES), label="Try")

    def build_more(self) -> None:
        """What most people leave as it is."""
        args, add = self.args, self.inputs
        with gr.Accordion("More", open=False):
            add["emotion_strength"] = gr.Slider(
                0.05, 1, 1.0, step=0.05, label="emotion_strength", info="1: all of the emotion; towards 0: none"
            )
            add["strength"] = gr.Slider(
                0.05, 1, 1.0, step=0.05, label="strength", info="Of edits: less keeps more of the photograph"
            )
            add["negative_prompt"] = gr.Textbox("", label="negative_prompt", info="What the picture should not show")
            names = list(NUMBERS)
            for pair in zip(names[::2], names[1::2]):
                with gr.Row():
                    for name in pair:
                        add[name] = gr.Textbox("", label=name, placeholder="as it suits the base", info=HINTS[name])
            with gr.Group(visible=args.choose_models):
                add["base"] = gr.Textbox(
                    args.base if args.base != str(REPOSITORY) else "", label="Base", placeholder="Storybook",
                    info="Stable Diffusion 1.x, 2.x or XL: a Hub id or a folder. Code that it brings is run.",
                )  # fmt: skip
                with gr.Row():
                    add["classifier"] = gr.Textbox(
                        args.classifier or "", label="Emotion classifier", info="a Hub id or a folder; empty: its own"
                    )
                    add["dtype"] = gr.Dropdown(list(DTYPES), value=args.dtype, label="dtype", info=f"on {args.device}")
                add["caption_model"] = gr.Textbox(
                    args.caption_model or "", label="Caption model", placeholder="none",
                    info="image-to-text model of transformers that says what photographs show",
                )  # fmt: skip
                self.load = gr.Button("Load", size="sm")
            if settings_of(args.base):
                gr.Markdown(STORYBOOK)

    def build_answer(self) -> None:
        """The right side: what comes of it."""
        is_storybook = bool(settings_of(self.args.base))
        self.picture = gr.Image(
            str(FIRST_PICTURE) if is_storybook else None, show_label=False, height=HEIGHT, format="png",
            interactive=False, buttons=["fullscreen"], elem_id="picture",
        )  # fmt: skip
        self.slider = gr.ImageSlider(
            label="Before | after", height=HEIGHT, format="png", interactive=False, visible=False, elem_id="slider",
            buttons=["fullscreen"], max_height=HEIGHT,
        )  # fmt: skip
        words = "Nothing made yet" + is_storybook * ": this is one prompt and one seed, in every emotion"
        self.status = gr.HTML(status(words, color=FAINT), elem_id="status")
        self.download = gr.DownloadButton(
            "Download the picture, with how it was made", visible=False, elem_id="download"
        )

    def build_details(self) -> None:
        """Below: for the curious."""
        with gr.Tabs():
            with gr.Tab("How it went"):
                self.plot = gr.Image(
                    show_label=False, format="png", interactive=False, buttons=["fullscreen"], elem_id="plot"
                )
            with gr.Tab("Python"):
                self.python = gr.Code(label="The same call", language="python", interactive=False, elem_id="python")

    def connect(self) -> None:
        """Says what happens when."""
        add = self.inputs
        shown = [self.picture, self.slider, self.status, self.download, self.plot, self.python]
        buttons = [self.go, self.all, self.cancel]
        changed = [*shown, *buttons, add["prompt"], add["emotion"], self.wheel]
        model: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": 1, "show_progress": "hidden"}
        quick: dict[str, Any] = {"queue": False, "show_progress": "hidden"}
        every = set(add.values())
        for button, method in ((self.go, self.one), (self.all, self.sheet_of_all)):
            started = button.click(self.begin, None, [self.status, *buttons], api_visibility="private", **quick)
            started.then(method, every, changed, api_visibility="private", **model)
        self.cancel.click(self.stop, None, self.status, api_visibility="private", **quick)
        self.page.unload(self.leave)
        self.load.click(self.load_models, every, changed, api_visibility="private", **model)
        self.say.click(self.caption, every, changed, api_visibility="private", **model)
        add["caption_model"].change(
            lambda name: gr.update(visible=bool(name)),
            add["caption_model"],
            self.say,
            api_visibility="private",
            **quick,
        )

        photo_parts = [add["photo"], self.photo_part, self.mode, add["painted"], add["only_painted"]]
        beside: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}  # queued: messages need it
        painting = [add["only_painted"], add["photo"]]
        add["photo"].change(self.new_photo, painting, photo_parts, api_visibility="private", **beside)
        add["only_painted"].input(self.canvas, painting, add["painted"], api_visibility="private", **quick)

        place = [add["emotion"], self.mode]
        add["emotion"].change(self.draw_wheel, place, self.wheel, api_visibility="private", **quick)
        self.mode.change(self.draw_wheel, place, self.wheel, api_visibility="private", **quick)
        dials = [add["emotion_strength"], add["strength"]]
        self.mode.change(MODES.get, self.mode, dials, api_visibility="private", **quick)
        self.wheel.select(self.click_wheel, None, place, api_visibility="private", **quick)
        self.dice.click(lambda: int(uuid4()) % 100_000, None, add["seed"], api_visibility="private", **quick)

    # ---- small things

    @staticmethod
    def click_wheel(event: gr.SelectData) -> tuple[str, str]:
        """The emotion and the mode at the place of a click."""
        emotion, is_kept = wheel_at(*event.index)
        return emotion, KEEP if is_kept else EVOKE

    @staticmethod
    def draw_wheel(emotion: str, mode: str) -> Image.Image:
        return wheel_picture(emotion, mode == KEEP)

    def new_photo(self, only_painted: bool, photo: str | None) -> list[Any]:
        """Another photograph, which people want to keep, or none. No picture: it is let go of, with a word."""
        # What was painted on the one before. Who asks for a canvas while this one is read keeps it.
        nothing_painted = [gr.update(value=None, visible=False), False] if only_painted else [gr.skip(), gr.skip()]
        if photo is None:
            return [gr.skip(), gr.skip(), EVOKE, *nothing_painted]
        try:
            read_photo(photo)
        except ValueError as error:
            gr.Warning(message(error))
            return [None, gr.skip(), gr.skip(), *nothing_painted]
        return [gr.skip(), gr.update(open=True), KEEP, *nothing_painted]

    def canvas(self, wanted: bool, photo: str | None) -> Any:
        """The photograph to paint on."""
        if not (wanted and photo):
            return gr.update(value=None, visible=False)
        canvas = read_photo(photo)
        factor = 640 / max(canvas.size)  # small photographs are easier to paint on when they are large
        canvas = canvas.resize([max(1, round(factor * side)) for side in canvas.size], Image.Resampling.LANCZOS)
        return gr.update(value=canvas, visible=True)

    # ---- calls of the model

    def begin(self, request: gr.Request) -> list[Any]:
        """A call was asked for; it may have to wait for others."""
        stop_file(request.session_hash).unlink(missing_ok=True)
        return [status("Waiting …", 0), *self.running(True)]

    def stop(self, request: gr.Request) -> str:
        """Ends the call of a session at its next step."""
        stop_file(request.session_hash).touch()
        return status("Cancelling …", color=FAINT)

    def leave(self, request: gr.Request) -> None:
        """Somebody closes the page."""
        self.stop(request)

    @staticmethod
    def running(is_running: bool) -> list[Any]:
        """The buttons while a call runs, and when it does not."""
        return [gr.update(visible=not is_running)] * 2 + [gr.update(visible=is_running)]

    def form_of(self, values: dict[Any, Any]) -> Form:
        """What stands on the page."""
        return Form(**{field.name: values[self.inputs[field.name]] for field in fields(Form)})

    def guarded(self, updates: Iterator[dict[Any, Any]]) -> Iterator[dict[Any, Any]]:
        """Passes updates on; an error becomes a message, and in the end the buttons are as they were."""
        buttons = [self.go, self.all, self.cancel]
        try:
            yield from updates
        except Cancelled:
            yield {self.status: status("Cancelled", color=FAINT)}
        except Exception as error:
            if not isinstance(error, MENDABLE):
                logger.exception("A call failed")
            text = message(error)
            gr.Warning(text)
            yield {self.status: status(text, color=BAD)}
        finally:
            release_memory()
        yield dict(zip(buttons, self.running(False)))

    def loading(self, form: Form) -> Iterator[dict[Any, Any]]:
        """Loads what a form names, if it is not there, and shows the emotions that it knows."""
        args = model_options(form, self.args)
        if args == MODEL.args:
            return
        name = "Storybook" if args.base == str(REPOSITORY) else args.base
        yield {self.status: status(f"Loading {name} …", 0)}
        MODEL.load(args)
        labels = MODEL.pipe.emotion_labels
        is_mikels = set(WHEEL) <= set(labels)
        yield {
            self.inputs["emotion"]: gr.update(choices=[*labels, "none"]),
            self.wheel: gr.update(visible=is_mikels),
            self.status: status(f"{name} is loaded, in {args.dtype} on {args.device}", color=GOOD),
        }

    def load_models(self, values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        yield from self.guarded(self.loading(self.form_of(values)))

    def captioning(self, form: Form) -> Iterator[dict[Any, Any]]:
        """Says what the photograph shows; the words can be corrected."""
        name = (form.caption_model.strip() if self.args.choose_models else "") or self.args.caption_model
        if not (name and form.photo):
            raise ValueError("This takes a photograph, and a caption model.")
        yield {self.status: status("Looking at the photograph …", 0)}
        (words,) = caption_pictures(name, [read_photo(form.photo)], self.args.device)
        words_are = status("This is what it shows? Correct the words if not.", color=GOOD)
        yield {self.inputs["prompt"]: words, self.status: words_are}

    def caption(self, values: dict[Any, Any]) -> Iterator[dict[Any, Any]]:
        yield from self.guarded(self.captioning(self.form_of(values)))

    def one(self, values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from self.guarded(self.making(self.form_of(values), stop_file(request.session_hash)))

    def sheet_of_all(self, values: dict[Any, Any], request: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from self.guarded(self.making_all(self.form_of(values), stop_file(request.session_hash)))

    def making(self, form: Form, stop: Path) -> Iterator[dict[Any, Any]]:
        """One picture."""
        if form.photo and not form.prompt.strip() and (form.caption_model or self.args.caption_model):
            for update in self.captioning(form):
                yield update
                form = replace(form, prompt=update.get(self.inputs["prompt"], form.prompt))
        job = job_of(form, FOLDER)
        yield from self.loading(form)
        args = MODEL.args or self.args
        options = options_of(form, args.base)
        yield {
            self.picture: gr.update(value=str(job.source) if job.source else None, visible=True, height=HEIGHT),
            self.slider: gr.update(visible=False),
            self.download: gr.update(visible=False),
            self.plot: None,
            self.python: as_python(job, options, args, Path(form.photo or "").name),
        }
        start, preview, made = time.perf_counter(), None, None
        for news in make(job, options, stop):
            if isinstance(news, Made):
                made = news
                break
            yield {self.status: told(news, job)}
            if news.preview is not None and news.preview is not preview:
                preview = news.preview
                yield {self.picture: preview}
        yield self.finished(job, made, options, args, form, time.perf_counter() - start)

    def finished(
        self, job: Job, made: Any, options: dict[str, Any], args: argparse.Namespace, form: Form, seconds: float
    ) -> dict[Any, Any]:
        """What is shown of a picture that is made."""
        folder = FOLDER / uuid4().hex
        entry = record(job, made) | base_of(args) | options
        if form.photo:
            entry["source"] = Path(form.photo).name
        entry.pop("mask", None)  # its digest stays
        save_picture(made.image, entry, folder)
        path = str(folder / entry["file"])
        seen = MODEL.judged(made.image, job.emotion)
        update = {
            self.status: result(made, job.emotion, seen, seconds),
            self.picture: gr.update(value=path, visible=job.source is None),
            self.download: gr.update(value=path, visible=True),
        }
        if job.source:
            before = folder / "before.png"
            with Image.open(job.source) as photo:
                photo.resize(made.image.size, Image.Resampling.LANCZOS).save(before)
            update[self.slider] = gr.update(value=(str(before), path), visible=True)
        if made.trace is not None:
            threshold = options.get("semantic_threshold", MODEL.pipe.config.semantic_threshold)
            update[self.plot] = str(plot_inner_loop([made.trace], threshold, folder / "inner_loop.png"))
        return update

    def making_all(self, form: Form, stop: Path) -> Iterator[dict[Any, Any]]:
        """The picture without an emotion, or the photograph, and with each, from one seed."""
        first = job_of(replace(form, emotion="none"), FOLDER)
        yield from self.loading(form)
        args = MODEL.args or self.args
        options = options_of(form, args.base)
        cells = []
        entry = {"prompt": first.prompt, "seed": first.seed} | base_of(args) | options
        if first.source:
            with Image.open(first.source) as photo:
                cells.append(Cell(photo.convert("RGB"), "source"))
        emotions = ([] if first.source else [None]) + MODEL.pipe.emotion_labels
        yield {
            self.picture: gr.update(value=None, visible=True, height=SHEET_HEIGHT),
            self.slider: gr.update(visible=False),
            self.download: gr.update(visible=False),
        }
        for number, emotion in enumerate(emotions):
            job = replace(first, emotion=emotion)
            for news in make(job, options, stop):
                name, share = emotion or "no emotion", number / len(emotions)
                if isinstance(news, Progress):
                    share += news.step / max(1, news.steps) / len(emotions)
                    facts = [f"picture {number + 1} of {len(emotions)}", f"step {news.step}"]
                    yield {self.status: status(f"Making the picture: {name}", share, INK, facts)}
                else:
                    words = MODEL.judged(news.image, emotion) or verdict(outcome(news))
                    color = EMOTION_COLORS.get(emotion or "", INK)
                    cells.append(Cell(news.image, emotion or "stock", *words, title_color=color))
            sheet = contact_sheet(
                cells, 3 if len(emotions) % 3 != 1 else 4, f"“{form.prompt.strip()}”, seed {first.seed}"
            )
            entry |= {"file": f"{uuid4().hex}.png", "emotions": [cell.title for cell in cells]}
            save_picture(sheet, entry, FOLDER)
            path = str(FOLDER / entry["file"])
            yield {self.picture: path}
        yield {self.download: gr.update(value=path, visible=True)}
        yield {self.status: status(f"Done: {len(emotions)} pictures", 1, GOOD)}


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--caption_model", help=CAPTION_HELP)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at. Default: this machine only.")
    parser.add_argument("--port", type=int, help="Default: the first that is free from 7860 on.")
    add_model_options(parser)
    add_memory_options(parser)
    parser.set_defaults(dtype="float16" if default_device() == "cuda" else "float32")
    args = parser.parse_args(arguments)
    # A base or a classifier may bring code: strangers do not choose what is run here.
    args.choose_models = args.host in ("127.0.0.1", "localhost", "::1") and not ON_A_SPACE
    return args


@one_line_errors
def main() -> None:
    args = parse_args()
    app = App(args)
    if ON_A_SPACE:  # a borrowed GPU takes what is there at the start
        MODEL.load(args)
    theme = gr.themes.Soft(primary_hue="violet", font=["system-ui", "sans-serif"], font_mono=["monospace"]).set(
        body_background_fill="*neutral_50",
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
    )
    app.page.queue(max_size=20).launch(
        server_name=None if ON_A_SPACE else args.host,
        server_port=args.port,
        share=False,
        ssr_mode=False,
        theme=theme,
        css=CSS,
        footer_links=[],
        max_file_size="40mb",
        allowed_paths=[str(FOLDER)],
    )


if __name__ == "__main__":
    main()
