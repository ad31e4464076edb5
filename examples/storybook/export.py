# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Last stage: lay the trained parts out as a diffusers checkpoint in the root, and the judges in `judges/`.

With `--xl` only what the SDXL-shaped checkpoint has of its own, into `xl/`, under names that no download of the root's
checkpoint takes along; `assemble_xl.py` makes a checkpoint of it.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import diffusers
import repository  # noqa: F401
from assemble_xl import FOLDER as XL
from common import ROOT, save_json
from diffusers import AutoencoderKL, UNet2DConditionModel
from judges import FOLDER
from modeling_simemo import SimEmoForImageClassification
from safetensors.torch import save_file
from train_unet import build_scheduler, text_encoder_of
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, ResNetForImageClassification

from pipeline_muse import PixelSpec


DIFFUSERS_FILES = ("config.json", "diffusion_pytorch_model.safetensors")
TRANSFORMERS_FILES = ("config.json", "model.safetensors")
INDEX = {
    "_class_name": ["pipeline_muse", "MusePipeline"],
    "_diffusers_version": diffusers.__version__,
    "clip_model": ["transformers", "CLIPModel"],
    "emotion_classifier": ["modeling_simemo", "SimEmoForImageClassification"],
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "preview_vae": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "semantic_threshold": None,
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
INDEX_XL = {
    **{key: value for key, value in INDEX.items() if "safety_checker" not in key},
    "_class_name": ["pipeline_muse_xl", "MuseXLPipeline"],
    "force_zeros_for_empty_prompt": True,
    "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
}


def without_paths(config: dict) -> dict:
    """A configuration without traces of the machine that it was trained on."""
    return {
        key: value
        for key, value in config.items()
        if key not in ("_name_or_path", "name_or_path", "dtype", "torch_dtype")
    }


def export_model(model, folder: Path, files: dict[str, str]):
    """Write a model's config and weights, and nothing else, into a folder; `files` says under which names."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        model.save_pretrained(scratch)
        for source, name in files.items():
            if name.endswith(".json"):
                config = json.loads((Path(scratch) / source).read_text())
                config.pop("_name_or_path", None)
                save_json(folder / name, config)
            else:
                shutil.copyfile(Path(scratch) / source, folder / name)


def export_judge(model, name: str, folder: Path):
    folder.mkdir(parents=True, exist_ok=True)
    save_json(
        folder / f"{name}.json", {"class": type(model).__name__, "config": without_paths(model.config.to_dict())}
    )
    weights = {key: value.contiguous() for key, value in model.state_dict().items()}
    path = folder / f"{name}.safetensors"
    save_file({key: value.half() if value.is_floating_point() else value for key, value in weights.items()}, path)
    path.chmod(0o644)


def threshold_of(calibration: Path) -> float:
    """What `calibrate.py` found, or a gate that is always open."""
    return json.loads(calibration.read_text())["semantic_threshold"] if calibration.exists() else 0.0


def export_xl(work: Path, folder: Path):
    """Write what the SDXL-shaped checkpoint does not share with the root's."""
    unet = UNet2DConditionModel.from_pretrained(work / "unet_xl").half()
    encoder = text_encoder_of(CLIPModel.from_pretrained(work / "clip_xl"), CLIPTextModelWithProjection)
    for name, model, files in (("unet", unet, DIFFUSERS_FILES), ("text_encoder_2", encoder, TRANSFORMERS_FILES)):
        export_model(model, folder, dict(zip(files, (f"{name}.json", f"{name}.safetensors"))))
    for left in (*folder.glob("vae.*"), *folder.glob("text_encoder.*")):  # of a network that was trained on others
        left.unlink()
    save_json(folder / "index.json", {**INDEX_XL, "semantic_threshold": threshold_of(work / "calibration_xl.json")})


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work_dir", type=Path, default=Path(tempfile.gettempdir()) / "storybook")
    parser.add_argument("--output", type=Path, default=ROOT)
    parser.add_argument("--judges", type=Path, default=FOLDER)
    parser.add_argument("--xl", action="store_true", help="the parts of the SDXL-shaped checkpoint, and only those")
    args = parser.parse_args()
    work, root = args.work_dir, args.output
    if args.xl:
        return export_xl(work, root / XL.relative_to(ROOT))
    diffusers_files, transformers_files = (dict(zip(names, names)) for names in (DIFFUSERS_FILES, TRANSFORMERS_FILES))

    export_model(
        AutoencoderKL.from_pretrained(work / "vae").half(),
        root / "vae",
        diffusers_files,
    )
    export_model(
        UNet2DConditionModel.from_pretrained(work / "unet").half(),
        root / "unet",
        diffusers_files,
    )
    clip = CLIPModel.from_pretrained(work / "clip_tuned")
    export_model(clip, root / "clip_model", transformers_files)
    export_model(CLIPTextModel.from_pretrained(work / "text_encoder"), root / "text_encoder", transformers_files)
    if (work / "guide").exists():
        guide = SimEmoForImageClassification.from_pretrained(work / "guide")
        export_model(guide, root / "emotion_classifier", transformers_files)
    shutil.copytree(work / "tokenizer", root / "tokenizer", dirs_exist_ok=True)
    build_scheduler().save_pretrained(root / "scheduler")
    scheduler = root / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().rstrip() + "\n")
    save_json(root / "model_index.json", {**INDEX, "semantic_threshold": threshold_of(work / "calibration.json")})

    for name, folder, kind in (
        ("emo_b", "emo_b", ResNetForImageClassification),
        ("emo_c", "emo_c", SimEmoForImageClassification),
        ("clip", "clip_b_tuned", CLIPModel),
    ):
        if (work / folder).exists():
            judge = kind.from_pretrained(work / folder)
            if name == "emo_b":  # a ResNet's config has no place for them
                PixelSpec.from_clip(clip).write_to(judge)
            export_judge(judge, name, args.judges)


if __name__ == "__main__":
    main()
