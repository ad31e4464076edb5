# Copyright 2026 The MUSE pipelines authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What makes a folder an emotion classifier that loads anywhere: weights, code, image processor and model card."""

import argparse
import sys
from pathlib import Path

from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.utils import HFValidationError, validate_repo_id
from loading import DTYPES, REPOSITORY
from transformers import CLIPImageProcessor


# A clone works without being installed.
sys.path += [str(REPOSITORY), str(REPOSITORY / "emotion_classifier")]

from modeling_simemo import SimEmoConfig, SimEmoForImageClassification  # noqa: E402


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
    group.add_argument("--output_dir", type=Path, required=True, help="folder to write the classifier to")
    group.add_argument("--dtype", choices=DTYPES, default="float32", help="of the weights. Default: %(default)s.")
    group.add_argument("--push_to_hub", action="store_true", help="upload the folder to the Hugging Face Hub")
    group.add_argument("--hub_model_id", help="name on the Hub, such as me/simemo. Default: that of the folder.")


def check_output_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the program with a message where the options of `add_output_options` make no sense."""
    if args.output_dir.exists() and not args.output_dir.is_dir():
        parser.error(f"--output_dir: {str(args.output_dir)!r} is a file")
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
