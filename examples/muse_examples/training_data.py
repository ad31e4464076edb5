# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Pictures with emotions, as `train_emotion_classifier.py` reads them, and how they are cut, coloured and degraded.

The layouts of a folder, told apart by what lies in it:

- image folders: `train/<label>/…` with `validation/<label>/…` and `test/<label>/…` by one of the names in `SPLITS`, in
  letters of any case, or `<label>/…` alone. What is hidden is left out. A `metadata.jsonl` with `file_name` and
  `caption` (or `text`) anywhere in it adds captions;
- EmoSet: `train.json`, `val.json`, `test.json` with entries `[label, …, picture, annotation]`, paths from the root.
  The annotations (scene, objects, actions, expressions) become captions;
- FI: the lists of its authors, `*.csv` or `agg/*.csv` with lines `emotion,url,disagree,agree`, and the pictures
  anywhere below, named as in their URLs. FI as it is passed on elsewhere, a folder per emotion, is an image folder.
"""

import csv
import importlib
import importlib.util
import io
import json
import math
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from accelerate.utils import tqdm
from modeling_simemo import EMOSET_LABELS, SimEmoConfig
from PIL import Image, ImageEnhance
from torch.nn import functional as F
from torch.utils.data import Dataset, Sampler

from muse_examples.files import read_text
from pipeline_muse import to_rgb


IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}

# split -> the names that it goes by, as a folder, as EmoSet's list, and in `datasets`
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "val", "valid", "eval", "evaluation", "dev"),
    "test": ("test", "testing"),
}
FEW = 10  # validation pictures of a label; below it, one picture more or less changes its recall by over 10 %

EMOSET_ATTRIBUTES = ("scene", "object", "human_action", "facial_expression")

AUGMENTATIONS = ("none", "standard", "robust", "degraded")


@dataclass(frozen=True)
class Example:
    """A labelled picture: its `name` in reports, how to `open` it, and a `caption` of what it shows, where known."""

    name: str
    label: str
    open: Callable[[], Image.Image]
    caption: str = ""

    def load(self) -> Image.Image:
        """The picture as upright RGB."""
        return to_rgb(self.open())


# ------------------------------------------------------------------------------------------------------- layouts


def read_data_dir(root: Path) -> dict[str, list[Example]]:
    """
    Reads a folder in one of the layouts above.

    Args:
        root (`Path`): The folder.

    Returns:
        `dict[str, list[Example]]`: The examples by split; "train" is always there.

    Raises:
        ValueError: If there are no labelled pictures for training, or a list is malformed.
    """
    if (root / "train.json").is_file():
        splits = read_emoset(root)
    elif lists := sorted([*root.glob("*.csv"), *root.glob("agg/*.csv")]):
        splits = {"train": read_fi(root, lists)}
    else:
        splits = read_image_folders(root)
    if not splits.get("train"):
        raise ValueError(
            f"`data_dir`: no labelled pictures in {str(root)!r}. Expected `train/<label>/*.jpg`, `<label>/*.jpg`, "
            "EmoSet's `train.json` or FI's `*.csv`."
        )
    return splits


def split_of(name: str) -> str | None:
    """The split that goes by a name, in letters of any case; `None` if it is none's."""
    return next((split for split, names in SPLITS.items() if name.lower() in names), None)


def find_splits(names: Iterable[str]) -> dict[str, str]:
    """
    Which of some names is that of which split.

    Raises:
        ValueError: If two are names of one split.
    """
    found: dict[str, str] = {}
    for name in names:
        if (split := split_of(name)) and found.setdefault(split, name) != name:
            raise ValueError(f"{found[split]!r} and {name!r} are both names of the split {split!r}; rename one.")
    return found


def read_image_folders(root: Path) -> dict[str, list[Example]]:
    """Image folders, with or without a folder per split."""
    captions, folders = read_captions(root), [path.name for path in visible_folders(root)]
    found = find_splits(folders)
    if not found:
        return {"train": list(_labelled(root, captions))}
    if left := sorted({*folders} - {*found.values()}):
        print(f"Left out of {str(root)!r}, as they are no split: {', '.join(left)}.")
    return {split: list(_labelled(root / name, captions)) for split, name in found.items()}


def visible_folders(root: Path) -> list[Path]:
    """The folders in a folder, without those that programs make for themselves, such as `.thumbnails` or `@eaDir`."""
    return sorted(path for path in root.iterdir() if path.is_dir() and path.name[0] not in "._@#")


def _labelled(folder: Path, captions: dict[Path, str]) -> Iterator[Example]:
    """The pictures of a folder with one folder per label."""
    for label_folder in visible_folders(folder):
        pictures = _pictures(label_folder)
        if not pictures:
            raise ValueError(f"`data_dir`: the folder {str(label_folder)!r} of a label holds no pictures.")
        for path in pictures:
            yield Example(str(path), label_folder.name, partial(Image.open, path), captions.get(path, ""))


def _pictures(folder: Path) -> list[Path]:
    """The pictures in a folder and in the visible folders below it."""
    here = [path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES and path.name[0] != "."]
    return sorted(here + [path for below in visible_folders(folder) for path in _pictures(below)])


def read_captions(root: Path) -> dict[Path, str]:
    """The captions of all `metadata.jsonl` below a folder, by picture."""
    captions = {}
    for metadata in root.rglob("metadata.jsonl"):
        for number, line in enumerate(read_text(metadata).splitlines(), start=1):
            if not line.strip():
                continue
            try:
                entry = json.loads(line)
                path, caption = metadata.parent / entry["file_name"], entry.get("caption", entry.get("text", ""))
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise ValueError(f"Line {number} of {str(metadata)!r} is no JSON object with `file_name`.") from error
            captions[path] = str(caption)
    return captions


def read_emoset(root: Path) -> dict[str, list[Example]]:
    """EmoSet's lists. Its authors describe entries of four items, the release has three: paths go by their suffix."""
    splits = {}
    for split, names in SPLITS.items():
        for path in (root / f"{name}.json" for name in names):
            if path.is_file():
                entries = tqdm(json.loads(read_text(path)), path.name)
                splits[split] = [_emoset_example(root, entry, path) for entry in entries]
    return splits


def _emoset_example(root: Path, entry: Any, source: Path) -> Example:
    texts = entry if isinstance(entry, list) and all(isinstance(text, str) for text in entry) else []
    pictures = [text for text in texts[1:] if Path(text).suffix.lower() in IMAGE_SUFFIXES]
    if len(pictures) != 1:
        raise ValueError(f"{str(source)!r}: entries have to be [label, picture, annotation], got {entry!r}.")
    path = root / pictures[0]
    caption = ""
    for text in texts[1:]:
        if text.endswith(".json") and (root / text).is_file():
            caption = emoset_caption(json.loads(read_text(root / text)))
    return Example(str(path), texts[0], partial(Image.open, path), caption)


def emoset_caption(annotation: dict[str, Any]) -> str:
    """An annotation of EmoSet in words: scene, objects, action and expression, as far as they are there."""
    parts: list[str] = []
    for name in EMOSET_ATTRIBUTES:
        value = annotation.get(name) or []
        parts += [value] if isinstance(value, str) else [str(part) for part in value]
    return ", ".join(part.replace("_", " ").lower() for part in parts)


def read_fi(root: Path, lists: Sequence[Path]) -> list[Example]:
    """
    FI's lists: a picture has the emotion that at least 3 of its workers, and most of them, agreed on. Where that holds
    for several, it has the one with the most votes; where these tie, and where it is not on disk, it is left out.
    """
    votes: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for path in lists:
        with open(path, newline="", encoding="utf-8-sig") as file:
            for number, row in enumerate(csv.reader(file), start=1):
                if len(row) != 4 or not (row[2].strip().isdecimal() and row[3].strip().isdecimal()):
                    raise ValueError(f"Line {number} of {str(path)!r} is not `emotion,url,disagree,agree`: {row}.")
                ballot = votes[Path(urlparse(row[1].strip()).path).name][row[0].strip()]
                ballot[0] += int(row[2])
                ballot[1] += int(row[3])
    on_disk = {path.name: path for path in _pictures(root)}
    examples, ties, missing = [], 0, 0
    for name, ballots in sorted(votes.items()):
        agreed = sorted((yes, emotion) for emotion, (no, yes) in ballots.items() if yes >= 3 and yes > no)
        if not agreed:
            continue
        if len(agreed) > 1 and agreed[-1][0] == agreed[-2][0]:
            ties += 1
        elif name not in on_disk:
            missing += 1
        else:
            examples.append(Example(str(on_disk[name]), agreed[-1][1], partial(Image.open, on_disk[name])))
    print(f"FI: {len(examples)} pictures; {missing} are not on disk, {ties} have two emotions with as many votes.")
    return examples


def read_dataset(name: str, image_column: str, label_column: str, caption_column: str | None) -> dict:
    """
    Reads a dataset by the `datasets` library.

    Args:
        name (`str`): A Hub id, or a path that `datasets.load_dataset` understands.
        image_column (`str`): The column of pictures.
        label_column (`str`): The column of labels, class indices with names or strings.
        caption_column (`str`, *optional*): The column of captions.

    Returns:
        `dict[str, list[Example]]`: The examples by split.

    Raises:
        ValueError: If `datasets` is not installed, or a column or the split for training is missing.
    """
    if importlib.util.find_spec("datasets") is None:
        raise ValueError("`dataset_name` needs the `datasets` library: `pip install datasets`, or use `data_dir`.")
    datasets: Any = importlib.import_module("datasets")
    loaded = datasets.load_dataset(name)
    splits = {split: loaded[key] for split, key in find_splits(loaded).items()}
    if "train" not in splits:
        raise ValueError(f"`dataset_name`: {name!r} has no split `train`, only {list(loaded)}.")
    columns = [column for column in (image_column, label_column, caption_column) if column]
    if absent := set(columns) - set(splits["train"].column_names):
        raise ValueError(f"`dataset_name`: {name!r} lacks {absent}; it has {splits['train'].column_names}.")
    undecoded = datasets.Image(decode=False)
    return {
        split: _dataset_examples(rows.cast_column(image_column, undecoded), split, *columns)
        for split, rows in splits.items()
    }


def _dataset_examples(rows: Any, split: str, image: str, label: str, caption: str | None = None) -> list[Example]:
    names = getattr(rows.features[label], "names", None)
    labels = [names[value] if names else str(value) for value in rows[label]]
    captions = rows[caption] if caption else [""] * len(labels)
    return [
        Example(f"{split}[{index}]", text, partial(_open_row, rows, index, image), str(words or ""))
        for index, (text, words) in enumerate(zip(labels, captions))
    ]


def _open_row(rows: Any, index: int, column: str) -> Image.Image:
    cell = rows[index][column]
    return Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] else cell["path"])


# ------------------------------------------------------------------------------------------- splits and labels


def find_unreadable(examples: Sequence[Example], workers: int) -> dict[int, str]:
    """Decodes every picture once. Returns the index of each that cannot be read, with the reason."""

    def problem(example: Example) -> str:
        try:
            example.load()
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    with ThreadPoolExecutor(workers) as pool:
        problems = tqdm(pool.map(problem, examples), "checking pictures", len(examples))
        return {index: text for index, text in enumerate(problems) if text}


def stratified_split(examples: Sequence[Example], fraction: float, seed: int) -> tuple[list[Example], list[Example]]:
    """
    Sets a share of each label's examples aside.

    Args:
        examples (sequence of [`Example`]): The examples.
        fraction (`float`): The share, in (0, 1); of each label at least one example is set aside, and one is not.
        seed (`int`): Decides which.

    Returns:
        `tuple[list[Example], list[Example]]`: The examples that remain, and those set aside.

    Raises:
        ValueError: If a label has one example only.
    """
    chosen: set[int] = set()
    for label in sorted({example.label for example in examples}):
        indices = [index for index, example in enumerate(examples) if example.label == label]
        if len(indices) < 2:
            raise ValueError(f"The label {label!r} has one picture, too few to validate on another.")
        count = min(max(round(fraction * len(indices)), 1), len(indices) - 1)
        chosen.update(random.Random(f"{seed}/{label}").sample(indices, count))
    parts: tuple[list[Example], list[Example]] = ([], [])
    for index, example in enumerate(examples):
        parts[index in chosen].append(example)
    return parts


def with_validation(splits: dict[str, list[Example]], fraction: float, seed: int) -> dict[str, list[Example]]:
    """Splits that have a "validation": the "test" where there is no other, else a share of "train"."""
    splits = {name: examples for name, examples in splits.items() if examples}
    if "validation" in splits:
        return splits
    if "test" in splits:
        return {"train": splits["train"], "validation": splits["test"]}
    train, validation = stratified_split(splits["train"], fraction, seed)
    return {"train": train, "validation": validation}


def ordered_labels(examples: Sequence[Example]) -> list[str]:
    """The labels of examples: the emotions in EmoSet's order, then all others by alphabet."""
    found = {example.label for example in examples}
    return [*(label for label in EMOSET_LABELS if label in found), *sorted(found - set(EMOSET_LABELS))]


def check_labels(splits: dict[str, list[Example]], labels: Sequence[str]) -> None:
    """Raises a `ValueError` where there are no two labels, or pictures have one that the classifier does not know."""
    if len(labels) < 2:
        raise ValueError(f"There have to be two labels at least, got {list(labels)}.")
    for split, examples in splits.items():
        if unknown := sorted({example.label for example in examples} - set(labels)):
            raise ValueError(f"Labels of the {split} pictures that the classifier does not have: {unknown}.")


def count_labels(examples: Sequence[Example], labels: Sequence[str]) -> dict[str, int]:
    """The number of pictures per label."""
    counts = Counter(example.label for example in examples)
    return {label: counts[label] for label in labels}


def describe_splits(splits: dict[str, list[Example]], labels: Sequence[str]) -> str:
    """The number of pictures by split and label as a table for the eye, and a warning where validation has few."""
    rows = {split: count_labels(examples, labels) for split, examples in splits.items()}
    width = max(map(len, labels))
    lines = ["".join([f"{'pictures':<12}", *(f"{label:>{width + 2}}" for label in labels), f"{'all':>9}"])]
    for split, counts in rows.items():
        numbers = "".join(f"{count:>{width + 2}}" for count in counts.values())
        lines.append(f"{split:<12}{numbers}{sum(counts.values()):>9}")
    if few := [label for label, count in rows.get("validation", {}).items() if count < FEW]:
        lines.append(
            f"Few validation pictures, under {FEW}, of {', '.join(few)}: accuracy and calibration are rough figures."
        )
    return "\n".join(lines)


def balanced_weights(examples: Sequence[Example], labels: Sequence[str]) -> list[float]:
    """Weights of classes by which each counts as much as any other, 1 on average over the pictures."""
    counts = count_labels(examples, labels).values()
    present = sum(count > 0 for count in counts)
    return [len(examples) / (present * count) if count else 0.0 for count in counts]


def text_of(example: Example, template: str) -> str:
    """What a picture evokes and, where known, shows; the feeling first, as long texts are cut at the end."""
    feeling = template.replace("{label}", example.label)
    return f"{feeling}: {example.caption}" if example.caption else feeling


# --------------------------------------------------------------------------------------------------- pictures


def to_pixels(image: Image.Image) -> torch.Tensor:
    """A picture as floats in [0, 1], of shape (3, height, width)."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def centre_crop(image: Image.Image, size: int) -> Image.Image:
    """The largest square in the middle, in `size` px: what validation sees, and CLIP's own preprocessing."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def random_crop(image: Image.Image, size: int, rng: random.Random) -> Image.Image:
    """A part of 50 to 100 % of the area with sides of up to 3:4, in `size` px, mirrored half of the time."""
    area = image.width * image.height * rng.uniform(0.5, 1)
    aspect = math.exp(rng.uniform(math.log(3 / 4), math.log(4 / 3)))
    width, height = min(image.width, (area * aspect) ** 0.5), min(image.height, (area / aspect) ** 0.5)
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    cut = image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + width, top + height))
    return cut.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else cut


def jitter(image: Image.Image, rng: random.Random) -> Image.Image:
    """Brightness, contrast and saturation changed by up to 20 %: colours carry feelings, so no hue."""
    for enhancer in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhancer(image).enhance(rng.uniform(0.8, 1.2))
    return image


def degrade(pixels: torch.Tensor, rng: random.Random) -> torch.Tensor:
    """
    Makes a picture like an early preview of a diffusion model, which is what a guide sees: soft, pale and noisy.

    Args:
        pixels (`torch.Tensor` of shape `(3, size, size)`): The picture in [0, 1].
        rng (`random.Random`): The source of randomness.

    Returns:
        `torch.Tensor`: As `pixels`; noise may leave [0, 1], as previews do.
    """
    size = pixels.shape[-1]
    generator = torch.Generator().manual_seed(rng.getrandbits(63))

    def enlarged(small: torch.Tensor) -> torch.Tensor:
        return F.interpolate(small[None], size=(size, size), mode="bilinear", align_corners=False)[0]

    soft = enlarged(F.adaptive_avg_pool2d(pixels, max(1, size // rng.choice((1, 2, 4, 8)))))
    pixels = torch.lerp(pixels, soft, rng.uniform(0.2, 1))
    mean = pixels.mean(dim=(1, 2), keepdim=True)
    pixels = torch.lerp(mean, pixels, rng.uniform(0.45, 1.1))
    coarse = enlarged(torch.randn((3, max(1, size // 4), max(1, size // 4)), generator=generator))
    fine = torch.randn(pixels.shape, generator=generator)
    return pixels + rng.uniform(0, 0.15) * coarse + rng.uniform(0, 0.08) * fine


def augment(image: Image.Image, size: int, augmentation: str, rng: random.Random) -> torch.Tensor:
    """
    The picture as a classifier is to see it, of shape (3, size, size): "none" as it is, "degraded" as a preview would
    be, "standard" cut, mirrored and recoloured at random, "robust" like that, with half of the pictures degraded.
    """
    if augmentation in ("none", "degraded"):
        pixels = to_pixels(centre_crop(image, size))
        return degrade(pixels, rng) if augmentation == "degraded" else pixels
    pixels = to_pixels(jitter(random_crop(image, size, rng), rng))
    return degrade(pixels, rng) if augmentation == "robust" and rng.random() < 0.5 else pixels


class EmotionPictures(Dataset):
    """
    The pictures of a split as a classifier wants them. An item is asked for by (epoch, index), which with the seed
    decide on all that is random in it: the same in every run, in every process and worker.

    Args:
        examples (sequence of [`Example`]): The pictures.
        config ([`SimEmoConfig`]): Has the labels, the size, and the mean and standard deviation to normalise by.
        texts (`dict[str, int]`, *optional*): The row of each text in the table of text features.
        template (`str`, *optional*): The template of the texts, with `{label}`.
        augmentation (`str`, *optional*): One of `AUGMENTATIONS`.
        seed (`int`, *optional*): The seed.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        config: SimEmoConfig,
        texts: dict[str, int] | None = None,
        template: str = "{label}",
        augmentation: str = "none",
        seed: int = 0,
    ):
        self.examples, self.config, self.augmentation, self.seed = examples, config, augmentation, seed
        self.rows = [(texts or {}).get(text_of(example, template), 0) for example in examples]
        self.mean = torch.tensor(config.image_mean).view(3, 1, 1)
        self.std = torch.tensor(config.image_std).view(3, 1, 1)

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        epoch, index = key
        example, rng = self.examples[index], random.Random(f"{self.seed}/{epoch}/{index}")
        pixels = augment(example.load(), self.config.image_size, self.augmentation, rng)
        label = self.config.label2id[example.label]
        return {"pixel_values": (pixels - self.mean) / self.std, "labels": label, "texts": self.rows[index]}


class EpochSampler(Sampler):
    """Goes through the keys of [`EmotionPictures`] in an order that `seed` and the current `epoch` decide on."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed, self.epoch = length, seed, 0

    def __len__(self) -> int:
        return self.length

    def __iter__(self) -> Iterator[tuple[int, int]]:
        order = list(range(self.length))
        random.Random(f"{self.seed}/{self.epoch}").shuffle(order)
        return iter([(self.epoch, index) for index in order])
