# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What a classifier sees in a picture, and the folder that makes one load anywhere: weights, code, processor, card."""

import argparse
import hashlib
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from modeling_simemo import SimEmoConfig, SimEmoForImageClassification
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification, CLIPImageProcessor, PreTrainedModel

from muse_examples.degradations import degraded
from muse_examples.options import output_folder
from muse_examples.pipelines import DTYPES, check_source, judge_named, read_model
from pipeline_muse import PIXEL_SETTINGS, PixelSpec, check_classifier, to_rgb


MOST_DEGRADED = (512, 512)  # px of pictures that are degraded; more would take time and change nothing


# --------------------------------------------------------------------------------------
# What a classifier sees
# --------------------------------------------------------------------------------------


def cut_to_shape(image: Image.Image, size: tuple[int, int]) -> Image.Image:
    """The largest part around the middle of a picture that has the shape of `size`, height and width."""
    scale = min(image.height / size[0], image.width / size[1])
    height, width = (max(1, round(scale * side)) for side in size)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def picture_pixels(
    image: Image.Image, spec: PixelSpec, center_crop: bool = False, copies: int | None = None
) -> torch.Tensor:
    """
    A picture as a classifier sees it: the pipeline's own preprocessing of previews.

    Args:
        image (`PIL.Image.Image`): The picture, of any size and mode.
        spec ([`PixelSpec`]): What the classifier wants to see.
        center_crop (`bool`, defaults to `False`): Whether a picture of another aspect ratio is cut to the middle, as
            CLIP's image processor does, and not squeezed.
        copies (`int`, *optional*): How many mildly degraded copies to see ([`degraded`]) instead of the picture.

    Returns:
        `torch.Tensor` of shape `(copies or 1, 3, *spec.size)`, float32.
    """
    image = to_rgb(image)
    if center_crop:
        image = cut_to_shape(image, spec.size)
    if copies is not None:
        image = image.copy()
        image.thumbnail(MOST_DEGRADED)
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 127.5 - 1  # (1, 3, height, width)
    return spec.prepare(pixels if copies is None else degraded(pixels, copies)[:, 0])


def load_classifier(args: argparse.Namespace) -> tuple[PreTrainedModel, PixelSpec]:
    """
    Loads the classifier that `args.classifier` names.

    Args:
        args (`argparse.Namespace`): "classifier", a path, the name of one of the [`judges`], or a Hub id; "revision",
            "trust_remote_code", "dtype" and "device".

    Returns:
        `tuple[PreTrainedModel, PixelSpec]`: The classifier on its device in eval mode, and what it wants to see: by
        its config or else by its image processor.
    """
    judge = judge_named(args.classifier)
    source = {"revision": args.revision, "trust_remote_code": args.trust_remote_code}
    if judge is not None:
        classifier = read_model(judge).to(DTYPES[args.dtype])
    else:
        check_source("classifier", args.classifier, revision=args.revision)
        classifier = AutoModelForImageClassification.from_pretrained(
            args.classifier, dtype=DTYPES[args.dtype], **source
        )
    if all(hasattr(classifier.config, name) for name in PIXEL_SETTINGS):
        spec = PixelSpec.from_classifier(classifier)
    else:
        spec = PixelSpec.from_processor(AutoImageProcessor.from_pretrained(args.classifier, **source))
        spec.write_to(classifier)
    check_classifier(classifier)
    return classifier.to(args.device).eval(), spec


@torch.no_grad()
def label_probabilities(classifier: PreTrainedModel, pixels: torch.Tensor) -> list[dict[str, float]]:
    """
    Classifies pictures.

    Args:
        classifier (`PreTrainedModel`): The classifier.
        pixels (`torch.Tensor` of shape `(n, 3, height, width)`): The pictures, from [`picture_pixels`].

    Returns:
        `list[dict[str, float]]`: Per picture, the probability of each label.
    """
    logits = classifier(pixel_values=pixels.to(classifier.device, classifier.dtype)).logits.float()
    labels = [classifier.config.id2label[index] for index in range(logits.shape[-1])]
    return [dict(zip(labels, row)) for row in logits.softmax(dim=-1).tolist()]


def label_names(classifier: PreTrainedModel) -> list[str]:
    """The classifier's labels, in the order of its logits."""
    id2label = classifier.config.id2label
    return [id2label[index] for index in sorted(id2label)]


def fingerprint(model: torch.nn.Module) -> str:
    """Tells models apart by their weights, whatever they are called."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(weight.cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


# --------------------------------------------------------------------------------------
# The folder
# --------------------------------------------------------------------------------------


CARD = """---
{front_matter}
---

# {title}

{about}

Labels, in this order: {labels}. Go by the names in `config.id2label`,
never by position: classifiers of other origin are sorted otherwise.

What a picture is said to evoke is the model's opinion, not a measurement of what people feel; don't use it to judge
people or pictures of people. The network that guided a picture is a poor judge of it. The licences are those of the
models and data that it comes from.

## Use

```python
from transformers import AutoModelForImageClassification

classifier = AutoModelForImageClassification.from_pretrained("{repository}", trust_remote_code=True)
logits = classifier(pixel_values).logits  # (batch, {num_labels})
```

`pixel_values` are images in [0, 1] of {size} px, less `config.image_mean`, divided by `config.image_std`, as
`AutoImageProcessor` makes them. As the guide of a [MUSE](https://huggingface.co/papers/2511.21051) pipeline:

```python
pipe.load_emotion_classifier("{repository}", trust_remote_code=True)
```
"""


def add_output_options(parser: argparse.ArgumentParser) -> None:
    """Adds the options that say where the classifier goes."""
    group = parser.add_argument_group("output")
    group.add_argument("--output_dir", type=output_folder, required=True, help="folder to write the classifier to")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights. Default: %(default)s.")
    group.add_argument("--push_to_hub", action="store_true", help="upload the folder to the Hugging Face Hub")
    group.add_argument("--hub_model_id", help="name on the Hub, such as me/simemo. Default: that of the folder.")


def check_output_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where the options of `add_output_options` make no sense."""
    if args.hub_model_id and not args.push_to_hub:
        parser.error("--hub_model_id needs --push_to_hub")
    if args.push_to_hub:
        try:
            validate_repo_id(args.hub_model_id or args.output_dir.resolve().name)
        except HFValidationError as error:
            parser.error(f"--hub_model_id: {error}")


def public_name(model: str) -> str:
    """A Hub id as it is; of a folder, which means nothing elsewhere, the last part."""
    return Path(model).resolve().name if Path(model).exists() else model


def model_card(config: SimEmoConfig, title: str, about: str, repository: str, base_model: str | None) -> ModelCard:
    """
    Writes the model card of a classifier.

    Args:
        config (`SimEmoConfig`): Its configuration.
        title (`str`): The heading.
        about (`str`): What it is and where it comes from, as Markdown.
        repository (`str`): The name by which it is loaded in the examples.
        base_model (`str`, *optional*): The CLIP that it stands on; named in the front matter if it is on the Hub.

    Returns:
        `ModelCard`: The card, with front matter that the Hub understands.
    """
    front_matter = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification",
        tags=["emotion", "clip", "simemo", "muse"],
        base_model=None if base_model is None or Path(base_model).exists() else base_model,
    )
    return ModelCard(
        CARD.format(
            front_matter=front_matter.to_yaml(),
            title=title,
            about=about,
            labels=", ".join(config.id2label.values()),
            repository=repository,
            num_labels=config.num_labels,
            size=config.image_size,
        )
    )


def save_model(classifier: SimEmoForImageClassification, folder: Path) -> None:
    """Writes the weights, the configuration, the code and the image processor of a classifier."""
    config, size = classifier.config, classifier.config.image_size
    classifier.save_pretrained(folder)
    CLIPImageProcessor(
        size={"shortest_edge": size},
        crop_size={"height": size, "width": size},
        image_mean=config.image_mean,
        image_std=config.image_std,
    ).save_pretrained(folder)


def save_classifier(
    classifier: SimEmoForImageClassification, title: str, about: str, base_model: str | None, args: argparse.Namespace
) -> Path:
    """
    Writes the folder, which carries the code that `trust_remote_code=True` runs, and uploads it if that is asked for.

    Args:
        classifier (`SimEmoForImageClassification`): The classifier.
        title, about, base_model: See [`model_card`].
        args (`argparse.Namespace`): The options of `add_output_options`.

    Returns:
        `Path`: The folder.
    """
    folder = args.output_dir
    save_model(classifier.to(DTYPES[args.dtype]), folder)
    repository = args.hub_model_id or folder.resolve().name
    if args.push_to_hub:
        repository = HfApi().create_repo(repository, exist_ok=True).repo_id
    model_card(classifier.config, title, about, repository, base_model).save(folder / "README.md")
    if args.push_to_hub:
        HfApi().upload_folder(repo_id=repository, folder_path=folder, commit_message=f"Upload {title}")
    return folder
