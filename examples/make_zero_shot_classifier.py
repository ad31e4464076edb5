# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Makes an emotion classifier of a CLIP without any training: a linear head of text features, one per label.

python examples/make_zero_shot_classifier.py --clip openai/clip-vit-large-patch14 --output_dir outputs/zero-shot
python examples/make_zero_shot_classifier.py --labels cozy eerie --templates "a {} room" --output_dir outputs/cozy
python examples/make_zero_shot_classifier.py --prompts table.json --output_dir outputs/mine

`table.json` is an object such as {"cozy": ["a warm room", "a fire in the hearth"], "eerie": "an empty, dim corridor"}.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import muse_examples  # noqa: F401, puts modeling_simemo on the path
import torch
from modeling_simemo import EMOSET_LABELS, SimEmoConfig, SimEmoForImageClassification
from muse_examples.classifiers import add_output_options, check_output_options, public_name, save_classifier
from muse_examples.files import read_text
from muse_examples.options import existing_file, one_line_errors
from muse_examples.pipelines import CLIP_OF_STABLE_DIFFUSION
from transformers import CLIPModel, CLIPTokenizer

from pipeline_muse import EMOTION_TEMPLATES


ABOUT = """{base} as an image classifier, without any training: the rows of its linear head are the text features of
the labels, each the mean of its prompts' features on the unit sphere, and the logits are their cosines with the
image's feature, times CLIP's own logit scale of {scale:.4g}. Made by `make_zero_shot_classifier.py` of MUSE; its
accuracy has not been measured.

{prompts}"""


def fill_templates(labels: Sequence[str], templates: Sequence[str]) -> dict[str, list[str]]:
    """
    Puts every label into every template.

    Raises:
        ValueError: If a label comes twice, or a template has no place for it.
    """
    if len(set(labels)) < len(labels):
        raise ValueError(f"`labels` has to name each label once, but is {list(labels)}.")
    for template in templates:
        if "{}" not in template:
            raise ValueError(f'`templates` have to hold a {{}} in the place of the label, but one is "{template}".')
    return {label: [template.replace("{}", label) for template in templates] for label in labels}


def read_prompts(path: Path) -> dict[str, list[str]]:
    """
    Reads a table of prompts per label, see above.

    Raises:
        ValueError: If the file is not such a table.
    """
    try:
        table = json.loads(read_text(path))
    except ValueError as error:
        raise ValueError(f"`prompts`: {str(path)!r} is not JSON ({error}).") from error
    if not isinstance(table, dict) or not table:
        raise ValueError(f'`prompts`: {str(path)!r} has to hold an object such as {{"cozy": ["a warm room"]}}.')
    prompts = {label: [texts] if isinstance(texts, str) else texts for label, texts in table.items()}
    for label, texts in prompts.items():
        if not isinstance(texts, list) or not texts or not all(isinstance(text, str) and text for text in texts):
            raise ValueError(f"`prompts`: {label!r} has to have a text or a list of texts, but has {texts!r}.")
    return prompts


@torch.no_grad()
def zero_shot_classifier(
    clip_model: CLIPModel, tokenizer: CLIPTokenizer, prompts: Mapping[str, Sequence[str]]
) -> SimEmoForImageClassification:
    """
    Makes an emotion classifier of a CLIP without any training: the paper's zero-shot baseline.

    Args:
        clip_model (`CLIPModel`): The model; its vision tower is copied.
        tokenizer (`CLIPTokenizer`): Its tokenizer.
        prompts (`Mapping[str, Sequence[str]]`): The texts that stand for each label, in the order of the classes.

    Returns:
        `SimEmoForImageClassification`: With one prompt per label its logits are CLIP's own `logits_per_image`. In eval
        mode, in the dtype of `clip_model`.

    Raises:
        ValueError: If a text is longer than CLIP can read, or the tokenizer cannot tell two labels apart.
    """
    config = SimEmoConfig(
        vision_config=clip_model.config.vision_config,
        projection_dim=clip_model.config.projection_dim,
        head_hidden_sizes=[],
        head_bias=False,
        normalize_features=True,
        logit_scale=clip_model.logit_scale.exp().item(),
        id2label=dict(enumerate(prompts)),
    )
    classifier = SimEmoForImageClassification(config).to(clip_model.dtype).eval()
    classifier.clip.vision_model.load_state_dict(clip_model.vision_model.state_dict())
    classifier.clip.visual_projection.load_state_dict(clip_model.visual_projection.state_dict())
    blank = torch.zeros(1, 3, config.image_size, config.image_size, dtype=clip_model.dtype)  # `forward` wants an image
    length = clip_model.config.text_config.max_position_embeddings
    seen: dict[str, str] = {}
    for row, (label, texts) in zip(classifier.classifier[0].weight, prompts.items()):
        inputs = tokenizer(list(texts), padding=True, return_tensors="pt")
        if inputs["input_ids"].shape[-1] > length:
            raise ValueError(f"`prompts` may have {length} tokens each, but one of {list(texts)} has more.")
        if (same := seen.setdefault(str(inputs["input_ids"].tolist()), label)) != label:
            raise ValueError(f"`tokenizer` does not tell {same!r} and {label!r} apart: is it the CLIP's own?")
        features = clip_model(**inputs, pixel_values=blank).text_embeds.float()  # (texts, projection_dim), normalised
        mean = features.mean(dim=0)
        row.copy_(mean / mean.norm())
    return classifier


def parse_args(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`; ends the program with a message where they make no sense."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--clip", default=CLIP_OF_STABLE_DIFFUSION, help="CLIP, a Hub id or a path. Default: %(default)s."
    )
    parser.add_argument("--tokenizer", help="tokenizer, a Hub id or a path. Default: the CLIP's.")
    parser.add_argument("--labels", nargs="+", help="what to tell apart. Default: Mikels' eight emotions.")
    parser.add_argument("--templates", nargs="+", help=f"texts with {{}} for the label. Default: {EMOTION_TEMPLATES}.")
    parser.add_argument("--prompts", type=existing_file, help="table of prompts per label, instead of templates")
    add_output_options(parser)
    args = parser.parse_args(arguments)
    check_output_options(parser, args)
    if args.prompts and (args.labels or args.templates):
        parser.error("--prompts names the labels and their texts: leave --labels and --templates out")
    try:
        if args.prompts:
            args.prompts = read_prompts(args.prompts)
        else:
            args.prompts = fill_templates(args.labels or EMOSET_LABELS, args.templates or EMOTION_TEMPLATES)
    except ValueError as error:
        parser.error(str(error))
    return args


@one_line_errors
def main(arguments: Sequence[str] | None = None) -> None:
    """Makes the classifier of the command line."""
    args = parse_args(arguments)
    clip_model = CLIPModel.from_pretrained(args.clip, dtype=torch.float32).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.tokenizer or args.clip)
    classifier = zero_shot_classifier(clip_model, tokenizer, args.prompts)
    lines = [f"- {label}: " + "; ".join(f"“{text}”" for text in texts) for label, texts in args.prompts.items()]
    base = public_name(args.clip)
    about = ABOUT.format(base=base, scale=classifier.config.logit_scale, prompts="\n".join(lines))
    print(save_classifier(classifier, f"Zero-shot emotion classifier on {base}", about, args.clip, args))


if __name__ == "__main__":
    main()
