# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""A photograph put into words, by any image-to-text model of transformers."""

from collections.abc import Iterable

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

from pipeline_muse import to_rgb


QUESTION = "Say in one short sentence what this picture shows."  # to models that want to be asked
LONGEST = 40  # tokens

CAPTION_HELP = (
    "image-to-text model of transformers that says what a picture shows, a Hub id or a path, such as"
    " Salesforce/blip-image-captioning-base. Default: none."
)


@torch.no_grad()
def caption_pictures(model_id: str, images: Iterable[Image.Image], device: str = "cpu") -> list[str]:
    """
    Says what pictures show. The model is loaded for it, and let go of.

    Args:
        model_id (`str`): A captioner, such as BLIP or GIT, or a model that chats about pictures: a Hub id or a path.
        images (iterable of `PIL.Image.Image`): The pictures, of any size and mode.
        device (`str`, defaults to `"cpu"`): Where the model runs.

    Returns:
        `list[str]`: A caption for each, in one line, without a full stop: a prompt for the pipeline.

    Raises:
        ValueError: If the model has nothing to say.
    """
    processor = AutoProcessor.from_pretrained(model_id)
    model = AutoModelForImageTextToText.from_pretrained(model_id).eval().to(device)
    captions = []
    for image in map(to_rgb, images):
        if getattr(processor, "chat_template", None):
            content = [{"type": "image", "image": image}, {"type": "text", "text": QUESTION}]
            talk = [{"role": "user", "content": content}]
            options = {"add_generation_prompt": True, "tokenize": True, "return_dict": True}
            inputs = processor.apply_chat_template(talk, **options, return_tensors="pt")
        else:
            inputs = processor(images=image, return_tensors="pt")
        tokens = model.generate(**inputs.to(device), max_new_tokens=LONGEST, do_sample=False)[0]
        if getattr(processor, "chat_template", None):  # the answer follows what was asked
            tokens = tokens[inputs["input_ids"].shape[1] :]
        captions.append(" ".join(processor.decode(tokens, skip_special_tokens=True).split()).rstrip(". "))
    if "" in captions:
        raise ValueError(f"The caption model {model_id!r} has no words for a picture; say yourself what it shows.")
    return captions
