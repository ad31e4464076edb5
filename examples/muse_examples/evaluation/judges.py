# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What judges say of pictures, kept in files, so that new judges cost no new pictures.

    judges = [EmotionJudge.parse("emo_b"), ClipJudge.parse("clip=openai/clip-vit-large-patch14", device="cuda")]
    for judge in judges:
        with judge:  # loads when it is first asked, and goes at the end
            answers = {row: ask(judge, row, paths, prompts, folder) for row, (paths, prompts) in rows.items()}

Each pair of a judge and a row has a file of its own, `judged/<judge>/<row>.safetensors`, so that processes may share
the pairs. Answers are known by the content of their picture, and by the prompt where that matters: a picture that
changed is asked about again, and so are all of them if the judge of that name has become another.
"""

import argparse
import gc
import hashlib
import importlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar, Self, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from tqdm import tqdm
from transformers import AutoModel, AutoProcessor, AutoTokenizer, PreTrainedModel

from muse_examples.classifiers import (
    cut_to_shape,
    fingerprint,
    label_names,
    load_classifier,
    picture_pixels,
)
from muse_examples.degradations import COPIES, MOST
from muse_examples.evaluation.measures import Statistics, unit
from muse_examples.files import whole_file
from muse_examples.pipelines import DTYPES, check_source, clips, judges, one_load_at_a_time, read_model
from muse_examples.runs import digest
from pipeline_muse import PixelSpec, to_rgb


FOLDER = "judged"
NAME = r"\w[\w.+-]*"  # of a judge, which is that of its folder too
KEPT_EVERY = 512  # pictures, after which a kill loses no answer

Prompt = str | None
Told = dict[str, np.ndarray]  # answers by name; the first axis is that of pictures
T = TypeVar("T")


# --------------------------------------------------------------------------------------
# Judges
# --------------------------------------------------------------------------------------


@dataclass
class Judge(ABC):
    """
    Who is asked. It loads when its answer is first needed, and goes at the end of `with judge:`.

    Args:
        name (`str`): Its name in tables, and that of the folder of its answers.
        source (`str`): A path, a Hub id, or the name of one that an example brings.
        device (`str`, defaults to `"cpu"`): Where it runs.
        dtype (`str`, defaults to `"float32"`): Of its weights, one of `DTYPES`.
        batch_size (`int`, defaults to 16): Pictures at a time.
        revision (`str`, defaults to `"main"`): Of its repository on the Hub.
        trust_remote_code (`bool`, defaults to `False`): Whether code that it brings may run.
    """

    name: str
    source: str
    device: str = "cpu"
    dtype: str = "float32"
    batch_size: int = 16
    revision: str = "main"
    trust_remote_code: bool = False

    heeds_prompts: ClassVar[bool] = False  # whether answers depend on the prompt

    @staticmethod
    def known() -> Iterable[str]:
        """The names of those that need no source."""
        return ()

    @classmethod
    def parse(cls, text: str, **options: Any) -> Self:
        """
        A judge from a command line.

        Args:
            text (`str`): `name=path-or-id`, or the name alone of one that an example brings.
            options: Further fields.

        Raises:
            ValueError: If the text is neither.
        """
        name, equals, source = text.partition("=")
        if not re.fullmatch(NAME, name) or (equals and not source):
            raise ValueError(
                f"{text!r} is not of the form name=path-or-id; names are words, as folders are called so."
            )
        if not equals and name not in cls.known():
            named = f", or one of {', '.join(sorted(cls.known()))}" if cls.known() else ""
            raise ValueError(f"{text!r} tells no source: name=path-or-id{named}.")
        return cls(name, source or name, **options)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.__dict__.pop("loaded", None)
        self.__dict__.pop("identity", None)
        gc.collect()
        if torch.device(self.device).type == "cuda":
            torch.cuda.empty_cache()

    @property
    @abstractmethod
    def loaded(self) -> Any:
        """Its networks and what else it needs."""

    @property
    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """What it is, as JSON: its answers hold for another that is the same, whatever that is called."""

    @abstractmethod
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Told:
        """
        Asks about one batch.

        Args:
            images (sequence of `PIL.Image.Image`): Pictures in RGB, of any size.
            prompts (sequence of `str` or `None`): What they should show.

        Returns:
            `dict[str, np.ndarray]`: Arrays, each of shape `(len(images), ...)`.
        """


@dataclass
class EmotionJudge(Judge):
    """
    Any classifier that `load_classifier` takes. It says "probabilities" `(n, labels)`, and "copies" `(n, COPIES)`: the
    number of the label of each mildly degraded copy. Its labels are in `identity["labels"]`.

    Args:
        center_crop (`bool`, defaults to `False`): Whether pictures are cut to the middle and not squeezed.
    """

    center_crop: bool = False

    @staticmethod
    def known() -> Iterable[str]:
        return judges()

    @cached_property
    def loaded(self) -> tuple[PreTrainedModel, PixelSpec]:
        with one_load_at_a_time():
            return load_classifier(
                argparse.Namespace(
                    classifier=self.source,
                    revision=self.revision,
                    trust_remote_code=self.trust_remote_code,
                    dtype=self.dtype,
                    device=self.device,
                )
            )

    @cached_property
    def identity(self) -> dict[str, Any]:
        classifier, spec = self.loaded
        return {
            "kind": "classifier",
            "weights": fingerprint(classifier),
            "dtype": self.dtype,
            "labels": label_names(classifier),
            "pixels": asdict(spec),
            "center_crop": self.center_crop,
            "degradations": {"copies": COPIES, **MOST},
        }

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Told:
        classifier, spec = self.loaded
        looks = [
            picture_pixels(image, spec, self.center_crop, copies) for image in images for copies in (None, COPIES)
        ]
        pixels = torch.cat(looks).to(classifier.device, classifier.dtype)
        logits = classifier(pixel_values=pixels).logits.float().cpu().unflatten(0, (len(images), 1 + COPIES))
        copies = logits[:, 1:].argmax(dim=-1).where(logits[:, 1:].isfinite().all(dim=-1), -1)
        return {"probabilities": logits[:, 0].softmax(dim=-1).numpy(), "copies": copies.short().numpy()}


@dataclass
class Clip:
    """A CLIP and what it takes: how it sees pictures, how it reads, and how many tokens."""

    model: PreTrainedModel
    see: Callable[[Sequence[Image.Image]], torch.Tensor]
    pixels: dict[str, Any]
    tokenizer: Any
    length: int


@dataclass
class ClipJudge(Judge):
    """
    Any CLIP-like model: CLIP, PickScore, SigLIP, HPSv2 where somebody converted it for transformers. It says
    "similarity" `(n,)`, 100 times the cosine of picture and prompt, and their features "image" and "text" `(n, D)`,
    not normalised.
    """

    heeds_prompts: ClassVar[bool] = True

    @staticmethod
    def known() -> Iterable[str]:
        return clips()

    @cached_property
    def loaded(self) -> Clip:
        if self.source in clips() and not Path(self.source).exists():
            return self.read_clip(**clips()[self.source])
        check_source("clip", self.source, revision=self.revision)
        source: dict[str, Any] = {"revision": self.revision, "trust_remote_code": self.trust_remote_code}
        with one_load_at_a_time():
            model = AutoModel.from_pretrained(self.source, dtype=DTYPES[self.dtype], **source)
            processor = AutoProcessor.from_pretrained(self.source, **source)
        if not all(hasattr(model, name) for name in ("get_image_features", "get_text_features")):
            raise ValueError(f"{self.source!r} is a {type(model).__name__}, which is no CLIP: it tells no features.")
        if not all(hasattr(processor, name) for name in ("image_processor", "tokenizer")):
            raise ValueError(f"{self.source!r} lacks what a CLIP reads with, its image processor or its tokenizer.")

        def see(images: Sequence[Image.Image]) -> torch.Tensor:
            return processor.image_processor(images=list(images), return_tensors="pt")["pixel_values"]

        return self.clip(model, see, processor.image_processor.to_dict(), processor.tokenizer)

    def read_clip(self, model: Path, tokenizer: Path) -> Clip:
        """One that an example brings, whose pictures are squeezed."""
        network = read_model(model).to(DTYPES[self.dtype])
        spec = PixelSpec.from_clip(network)

        def see(images: Sequence[Image.Image]) -> torch.Tensor:
            return torch.cat([picture_pixels(image, spec) for image in images])

        return self.clip(network, see, asdict(spec), AutoTokenizer.from_pretrained(tokenizer))

    def clip(self, model: PreTrainedModel, see: Any, pixels: dict[str, Any], tokenizer: Any) -> Clip:
        """A CLIP on its device; prompts are cut to what both its tokenizer and its text encoder take."""
        longest = getattr(model.config.text_config, "max_position_embeddings", tokenizer.model_max_length)
        length = min(tokenizer.model_max_length, longest)
        return Clip(model.to(self.device).eval(), see, pixels, tokenizer, length)

    @cached_property
    def identity(self) -> dict[str, Any]:
        clip = self.loaded
        vocabulary = json.dumps(sorted(clip.tokenizer.get_vocab().items()))
        return {
            "kind": "clip",
            "weights": fingerprint(clip.model),
            "dtype": self.dtype,
            "pixels": clip.pixels,
            "tokens": clip.length,
            "vocabulary": hashlib.sha256(vocabulary.encode()).hexdigest()[:16],
        }

    @torch.no_grad()
    def image_features(self, images: Sequence[Image.Image]) -> np.ndarray:
        """Features of pictures, `(n, D)`, float32, not normalised."""
        clip = self.loaded
        pixels = clip.see(images).to(clip.model.device, clip.model.dtype)
        return features_of(clip.model.get_image_features(pixel_values=pixels))

    @torch.no_grad()
    def text_features(self, prompts: Sequence[Prompt]) -> np.ndarray:
        """Features of prompts, `(n, D)`, float32, not normalised; long ones are cut, and `None` is the empty one."""
        clip, known = self.loaded, dict[Prompt, np.ndarray]()
        for part in parts(dict.fromkeys(prompts), self.batch_size):
            texts = [prompt or "" for prompt in part]
            tokens = clip.tokenizer(
                texts, padding="max_length", truncation=True, max_length=clip.length, return_tensors="pt"
            )
            known |= zip(part, features_of(clip.model.get_text_features(**tokens.to(clip.model.device))))
        return np.stack([known[prompt] for prompt in prompts])

    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Told:
        image, text = self.image_features(images), self.text_features(prompts)
        similarity = 100 * (unit(image) * unit(text)).sum(axis=-1)
        return {"similarity": similarity.astype(np.float32), "image": image, "text": text}


def features_of(output: Any) -> np.ndarray:
    """The projected features in what transformers returns: a tensor until version 4, an output with it since."""
    found = output if torch.is_tensor(output) else output.pooler_output
    return found.float().cpu().numpy()


@dataclass
class InceptionJudge(Judge):
    """
    torch-fidelity's Inception, whose features, "features" `(n, 2048)`, the FID is of. The source is a file of its
    weights, or "inception" for those that torch-fidelity downloads. Runs in float32.

    Not run here with its weights, for want of torchvision: written after torch-fidelity 0.4, of the extra `paper`.
    """

    name: str = "inception"
    source: str = "inception"

    @staticmethod
    def known() -> Iterable[str]:
        return ("inception",)

    @cached_property
    def loaded(self) -> torch.nn.Module:
        weights = None if self.source == "inception" else self.source
        kind = from_extra("torch_fidelity").FeatureExtractorInceptionV3
        return kind("inception-v3-compat", ["2048"], feature_extractor_weights_path=weights).to(self.device)

    @cached_property
    def identity(self) -> dict[str, Any]:
        return {"kind": "inception", "weights": fingerprint(self.loaded)}

    @torch.no_grad()
    def __call__(self, images: Sequence[Image.Image], prompts: Sequence[Prompt]) -> Told:
        pixels = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].to(self.device) for image in images]
        return {"features": torch.cat([self.loaded(one)[0] for one in pixels]).float().cpu().numpy()}


def lpips_distance(device: str = "cpu", net: str = "alex") -> Callable[[np.ndarray, np.ndarray], float]:
    """
    LPIPS, of two pictures as from `measures.network_pixels`.

    Not run here with its weights, for want of torchvision: written after lpips 0.1.4, of the extra `paper`.

    Args:
        device (`str`, defaults to `"cpu"`): Where it runs.
        net (`str`, defaults to `"alex"`): Its network, that of the published scripts.

    Raises:
        ImportError: If the extra is missing.
    """
    network = from_extra("lpips").LPIPS(net=net, verbose=False).to(device)

    @torch.no_grad()
    def distance(first: np.ndarray, second: np.ndarray) -> float:
        return network(*(torch.from_numpy(pixels)[None].to(device) for pixels in (first, second))).item()

    return distance


def from_extra(module: str) -> ModuleType:
    """A module of the extra `paper`. Raises an `ImportError` that says how to get it, in one line."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{module} cannot be imported ({error}). Inception's FID and LPIPS need the extra `paper`: pip install"
            ' "muse-diffusers[paper]", or ".[paper]" in a clone, with a torchvision that fits your torch.'
        ) from error


# --------------------------------------------------------------------------------------
# Asking them
# --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Answers:
    """
    What a judge says of the pictures of a row, in their order.

    Args:
        identity (`dict[str, Any]`): What the judge is.
        values (`dict[str, np.ndarray]`): By name; the first axis is that of pictures.
    """

    identity: dict[str, Any]
    values: Told

    def __getitem__(self, name: str) -> np.ndarray:
        return self.values[name]

    @property
    def labels(self) -> list[str]:
        """A classifier's labels, in the order of its probabilities."""
        return self.identity["labels"]

    @property
    def emotions(self) -> list[str]:
        """The label that a classifier gives to each picture."""
        return [self.labels[index] for index in self["probabilities"].argmax(axis=-1)]

    @property
    def emotions_of_copies(self) -> list[list[str]]:
        """The labels that a classifier gives to the degraded copies of each picture."""
        return [[self.labels[index] for index in own] for own in self["copies"]]


def ask(judge: Judge, row: str, paths: Sequence[Path], prompts: Sequence[Prompt], folder: Path, **bar: Any) -> Answers:
    """
    What a judge says of pictures; it is asked about those only of which its answer is not known. Where it is asked at
    all, the row's file holds no answers but these thereafter.

    Args:
        judge ([`Judge`]): Who is asked.
        row (`str`): The name of these pictures, such as that of the method, or "sources" for what edits are made of.
        paths (sequence of `Path`): The pictures. Where several are the same, it is asked about one.
        prompts (sequence of `str` or `None`): What each should show.
        folder (`Path`): Where `judged` lies, with the answers.
        bar: Further arguments of the progress bar, such as `position` or `disable`.

    Returns:
        [`Answers`]: In the order of the pictures.

    Raises:
        ValueError: If a picture cannot be read, or an answer is not finite; what was said until then is kept.
    """
    keys = picture_keys(paths, prompts, judge.heeds_prompts)
    file, identity = answers_file(folder, judge.name, row), told_identity(judge)
    found, known = read_answers(file)
    if found != identity:
        known = {}
    waiting = list({key: number for number, key in enumerate(keys) if key not in known}.items())
    total = len(set(keys))
    shown = {"desc": f"{judge.name}: {row}", "unit": " pictures", "dynamic_ncols": True, "disable": not waiting} | bar
    with tqdm(total=total, initial=total - len(waiting), **shown) as progress:
        for kept in parts(waiting, max(KEPT_EVERY, judge.batch_size)):
            for batch in parts(kept, judge.batch_size):
                told = look(judge, [paths[number] for _, number in batch], [prompts[number] for _, number in batch])
                for place, (key, _) in enumerate(batch):
                    known[key] = {name: values[place] for name, values in told.items()}
                progress.update(len(batch))
            write_answers(file, identity, {key: known[key] for key in dict.fromkeys(keys) if key in known})
    return in_order(identity, known, keys)


def ask_all(
    judge: Judge, rows: Mapping[str, tuple[Sequence[Path], Sequence[Prompt]]], folder: Path, **bar: Any
) -> dict[str, Answers]:
    """Asks one judge about the pictures and prompts of several rows, by name, and lets it go. See [`ask`]."""
    with judge:
        return {row: ask(judge, row, paths, prompts, folder, **bar) for row, (paths, prompts) in rows.items()}


def recall(name: str, row: str, paths: Sequence[Path], prompts: Sequence[Prompt], folder: Path) -> Answers:
    """
    What the judge of that name has said of pictures, without loading it.

    Raises:
        ValueError: If it has not been asked about all of them as they are now.
    """
    file = answers_file(folder, name, row)
    identity, known = read_answers(file)
    keys = picture_keys(paths, prompts, identity.get("heeds_prompts", False))
    if missing := [str(path) for path, key in zip(paths, keys) if key not in known]:
        raise ValueError(
            f"{name!r} has not been asked about {len(missing)} of {len(paths)} pictures of {row!r},"
            f" such as {missing[0]!r}; ask it first."
        )
    return in_order(identity, known, keys)


def reference_statistics(
    judge: Judge, feature: str, paths: Sequence[Path], file: Path, normalize: bool = False, **bar: Any
) -> Statistics:
    """
    The statistics of a folder of reference pictures of any size: features are kept of one batch at a time.

    Args:
        judge ([`Judge`]): Whose features.
        feature (`str`): Their name, such as "features" of Inception's and "image" of a CLIP's.
        paths (sequence of `Path`): The pictures.
        file (`Path`): The `.npz` file to write, or to read where it is of the same pictures and judge.
        normalize (`bool`, defaults to `False`): Whether features are put on the unit sphere first.
        bar: Further arguments of the progress bar.

    Raises:
        ValueError: If the file holds statistics that are not from here, which nobody may want to lose.
    """
    made_of = json.dumps([told_identity(judge), feature, normalize, sorted(content_of(path) for path in paths)])
    made_of = hashlib.sha256(made_of.encode()).hexdigest()
    if file.exists():
        with np.load(file) as saved:
            known = str(saved["made_of"]) if "made_of" in saved else None
        if known is None:
            raise ValueError(f"{str(file)!r} was not written here; it would be lost.")
        if known == made_of:
            return Statistics.load(file)

    def features() -> Iterator[np.ndarray]:
        shown = {"desc": f"{judge.name}: {file.name}", "unit": " pictures", "dynamic_ncols": True} | bar
        with tqdm(total=len(paths), **shown) as progress:
            for batch in parts(paths, judge.batch_size):
                told = look(judge, batch, [None] * len(batch))[feature]
                yield unit(told) if normalize else told
                progress.update(len(batch))

    statistics = Statistics.of(features())
    statistics.save(file, made_of=made_of)
    return statistics


def look(judge: Judge, paths: Sequence[Path], prompts: Sequence[Prompt]) -> Told:
    """Asks about one batch. Raises a `ValueError` for pictures that cannot be read and for answers that are none."""
    told = judge([open_picture(path) for path in paths], prompts)
    for values in told.values():
        whole = np.isfinite(values).reshape(len(paths), -1).all(axis=1)
        if values.dtype.kind == "i":
            whole &= (values >= 0).reshape(len(paths), -1).all(axis=1)
        if not whole.all():
            path = paths[int(whole.argmin())]
            raise ValueError(f"The answer of {judge.name!r} to {str(path)!r} is not finite in {judge.dtype}.")
    return told


def parts(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cuts what there is into lists of at most `size`."""
    left = iter(items)
    while part := list(islice(left, size)):
        yield part


# --------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------


def open_picture(path: Path) -> Image.Image:
    """A picture as upright RGB. Raises a `ValueError` that names it if it cannot be read."""
    try:
        with Image.open(path) as image:
            return to_rgb(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{str(path)!r} cannot be read as a picture: {error}") from error


class Pictures(Sequence[np.ndarray]):
    """
    Pictures of files as arrays of shape `(height, width, 3)` in 8 bits, each read when it is looked at.

    Args:
        paths (sequence of `Path`): The files.
        size (`tuple[int, int]`, *optional*): Width and height, to whose shape pictures are cut around the middle and
            then resized, as EmoEdit's script does with its sources.
    """

    def __init__(self, paths: Sequence[Path], size: tuple[int, int] | None = None) -> None:
        self.paths, self.size = paths, size

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return Pictures(self.paths[index], self.size)
        image = open_picture(self.paths[index])
        if self.size is not None:
            image = cut_to_shape(image, self.size[::-1]).resize(self.size, Image.Resampling.BICUBIC)
        return np.array(image)


# --------------------------------------------------------------------------------------
# Files of answers
# --------------------------------------------------------------------------------------


def answers_file(folder: Path, judge: str, row: str) -> Path:
    """Where the answers of a judge of a row lie. A name that no file may have gets another, of its own."""
    name = re.sub(r"[^\w.+-]+", "-", row).strip("-.")
    if name != row:
        name += "-" + hashlib.sha256(row.encode()).hexdigest()[:8]
    return folder / FOLDER / judge / f"{name}.safetensors"


def told_identity(judge: Judge) -> dict[str, Any]:
    """What a judge is, as a file has it."""
    return json.loads(json.dumps(judge.identity | {"heeds_prompts": judge.heeds_prompts}))


def picture_keys(paths: Sequence[Path], prompts: Sequence[Prompt], heeds_prompts: bool) -> list[str]:
    """By what the answers to pictures are known: their content, and the prompt where it is heeded."""
    if len(paths) != len(prompts):
        raise ValueError(f"There are {len(prompts)} prompts of {len(paths)} pictures.")
    suffixes = [f" {prompt or ''}" if heeds_prompts else "" for prompt in prompts]
    return [content_of(path) + suffix for path, suffix in zip(paths, suffixes)]


def content_of(path: Path) -> str:
    """The digest of a file, which is read once for all judges, as long as it does not change."""
    state = path.stat()
    return known_digest(path, state.st_size, state.st_mtime_ns)


@cache
def known_digest(path: Path, size: int, modified: int) -> str:
    """The digest of a file in a state."""
    return digest(path)


def read_answers(file: Path) -> tuple[dict[str, Any], dict[str, Told]]:
    """What the judge is, and its answers by key; nothing of both where there is no file, or no whole one."""
    try:
        with safe_open(file, "numpy") as saved:
            notes = saved.metadata()
            arrays = {name: saved.get_tensor(name) for name in saved.keys()}
    except (FileNotFoundError, SafetensorError):
        return {}, {}
    keys = json.loads(notes["keys"])
    return json.loads(notes["judge"]), {
        key: {name: values[place] for name, values in arrays.items()} for place, key in enumerate(keys)
    }


def write_answers(file: Path, identity: dict[str, Any], known: dict[str, Told]) -> None:
    """Writes answers whole."""
    notes = {"judge": json.dumps(identity), "keys": json.dumps(list(known))}
    with whole_file(file) as partial:
        save_file(stacked(list(known.values())), partial, metadata=notes)


def stacked(each: Sequence[Told]) -> Told:
    """The answers to several pictures in one."""
    return {name: np.stack([told[name] for told in each]) for name in (each[0] if each else ())}


def in_order(identity: dict[str, Any], known: Mapping[str, Told], keys: Sequence[str]) -> Answers:
    """The answers to pictures with these keys."""
    return Answers(identity, stacked([known[key] for key in keys]))
