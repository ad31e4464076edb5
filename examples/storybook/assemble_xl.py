# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Lay the XL Storybook out as a checkpoint: the parts in `xl/`, and those that it shares with the root's checkpoint.

    python examples/storybook/assemble_xl.py --output_dir outputs/storybook_xl

The folder is complete: load it with `DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)`, or upload it
as a repository of its own. The files of `xl/` have names that no download of the root's checkpoint takes along.
"""

import argparse
import json
import shutil
from pathlib import Path


FOLDER = Path(__file__).resolve().parent / "xl"
ROOT = Path(__file__).resolve().parents[2]
SHARED = ("vae", "text_encoder", "tokenizer", "scheduler", "clip_model", "emotion_classifier")
# Autoencoder and text encoder are the root's, unless the network was trained on others, which then lie beside it.
OWN = {
    "unet": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
}


def assemble(output: Path) -> Path:
    """
    Lay the checkpoint out.

    Args:
        output: the folder to write, made where it is missing.

    Returns:
        The same folder.

    Raises:
        ValueError: If another checkpoint lies there.
    """
    index = output / "model_index.json"
    ours = (FOLDER / "index.json").read_text()
    if index.exists() and json.loads(index.read_text())["_class_name"] != json.loads(ours)["_class_name"]:
        raise ValueError(f"{str(output)!r} holds another checkpoint; name a folder that is new.")
    for name in SHARED:
        shutil.copytree(ROOT / name, output / name, ignore=shutil.ignore_patterns("__pycache__"), dirs_exist_ok=True)
    for name, weights in OWN.items():
        if not (FOLDER / f"{name}.safetensors").exists():
            continue
        (output / name).mkdir(exist_ok=True)
        shutil.copyfile(FOLDER / f"{name}.json", output / name / "config.json")
        shutil.copyfile(FOLDER / f"{name}.safetensors", output / name / weights)
    shutil.copytree(ROOT / "tokenizer", output / "tokenizer_2", dirs_exist_ok=True)
    config = output / "tokenizer_2" / "tokenizer_config.json"
    padded = {**json.loads(config.read_text()), "pad_token": "!"}  # as SDXL's second tokenizer pads
    config.write_text(json.dumps(padded, indent=2) + "\n")
    shutil.copyfile(ROOT / "pipeline_muse_xl.py", output / "pipeline_muse_xl.py")
    index.write_text(ours)
    return output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/storybook_xl"), help="Default: %(default)s.")
    args = parser.parse_args()
    try:
        print(assemble(args.output_dir))
    except ValueError as error:
        parser.error(f"argument --output_dir: {error}")


if __name__ == "__main__":
    main()
