# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Trains SimEmo, the emotion classifier that guides MUSE, on pictures with labels: CLIP's vision tower and a head, by the
recipe of its paper. What comes out is a folder that `AutoModelForImageClassification.from_pretrained(folder,
trust_remote_code=True)` and `pipe.load_emotion_classifier(folder, trust_remote_code=True)` load, with a model card.

accelerate launch examples/train_emotion_classifier.py --data_dir EmoSet-118K --clip openai/clip-vit-large-patch14 \
    --mixed_precision bf16 --output_dir simemo

The layouts of `--data_dir` are described in `muse_examples/training_data.py`. The loss is 0.7 CE + 0.3 (1 - cos(image,
text)), where the text says what the picture evokes and, if there is a caption, shows; CLIP's text tower is needed for
training only. The vision tower stays frozen until the 4th epoch. At the end the temperature that suits the validation
pictures is folded into the head: the inner loop of MUSE stops once an emotion is probable enough, so an over-confident
guide stops it early.

A run that was interrupted goes on with `--resume_from_checkpoint latest`. On one process of a CPU it ends with the
very weights of an unbroken one, as order, augmentation and dropout depend on nothing but the seed, the epoch and the
batch. Checkpoints hold pickles of accelerate: resume from your own only.

On scenes of Storybook, in minutes, without a download:

python examples/storybook/draw_folders.py --output_dir outputs/scenes
python examples/train_emotion_classifier.py --data_dir outputs/scenes --clip clip_model --tokenizer tokenizer \
    --caption_template "an image of {label}" --num_epochs 8 --tower_learning_rate 1e-4 --output_dir outputs/simemo
"""

import argparse
import json
import math
import os
import random
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import muse_examples  # noqa: F401, puts modeling_simemo on the path
import torch
from accelerate import Accelerator, DistributedDataParallelKwargs, skip_first_batches
from accelerate.tracking import get_available_trackers
from accelerate.utils import broadcast_object_list, set_seed, tqdm
from huggingface_hub import HfApi
from huggingface_hub.utils import validate_repo_id
from modeling_simemo import SimEmoConfig, SimEmoForImageClassification
from muse_examples import REPOSITORY
from muse_examples.classifiers import public_name, save_model
from muse_examples.files import write_whole
from muse_examples.metrics import fit_temperature, fold_temperature, measure
from muse_examples.options import number, one_line_errors, output_folder, positive_int
from muse_examples.training_data import (
    AUGMENTATIONS,
    EmotionPictures,
    EpochSampler,
    Example,
    balanced_weights,
    check_labels,
    count_labels,
    describe_splits,
    find_unreadable,
    ordered_labels,
    read_data_dir,
    read_dataset,
    text_of,
    with_validation,
)
from muse_examples.training_report import draw_confusion, draw_reliability, training_card
from muse_examples.training_state import JsonLines, Progress, list_checkpoints, resume, save_checkpoint
from safetensors.torch import load_file, save_file
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import AutoConfig, AutoTokenizer, CLIPModel
from transformers.utils import logging


RESULT = "metrics.json"  # what is written last

# Options that say where things are or how fast they go, and nothing about what is learnt.
NO_RECIPE = {
    "output_dir", "checkpointing_steps", "checkpoints_total_limit", "resume_from_checkpoint", "logging_steps",
    "report_to", "push_to_hub", "hub_model_id", "hub_private", "dataloader_num_workers", "eval_batch_size",
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------- options


def parse_args(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line, or `arguments`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    data = parser.add_argument_group("data")
    source = data.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_dir", type=Path, help="image folders, EmoSet or FI")
    source.add_argument("--dataset_name", help="a dataset for the `datasets` library, a Hub id or a path")
    data.add_argument("--image_column", default="image")
    data.add_argument("--label_column", default="label")
    data.add_argument("--caption_column")
    data.add_argument("--validation_fraction", type=number(0.001, 0.9), default=0.1, help="where no split is given")
    data.add_argument("--caption_template", default="a photo that evokes {label}", help="Default: %(default)s")
    data.add_argument("--augmentation", choices=AUGMENTATIONS[:3], default="robust", help="Default: %(default)s")
    data.add_argument("--dataloader_num_workers", type=int, default=0)

    model = parser.add_argument_group("model")
    model.add_argument("--clip", help="Hub id or path of the CLIP that gives the vision tower and the text tower")
    model.add_argument("--tokenizer", help="of the text tower. Default: that of --clip")
    model.add_argument(
        "--init_from", help="a SimEmo to go on from; the vision tower, head and labels are then its own"
    )
    model.add_argument("--head_hidden_sizes", type=positive_int, nargs="*", default=[2048], help="Default: 2048")

    recipe = parser.add_argument_group("recipe")
    recipe.add_argument("--num_epochs", type=positive_int, default=25, help="Default: %(default)s")
    recipe.add_argument("--train_batch_size", type=positive_int, default=32, help="per process. Default: %(default)s")
    recipe.add_argument("--eval_batch_size", type=positive_int, default=64, help="per process. Default: %(default)s")
    recipe.add_argument("--gradient_accumulation_steps", type=positive_int, default=1)
    recipe.add_argument("--head_learning_rate", type=number(0), default=1e-3, help="Default: %(default)s")
    recipe.add_argument("--tower_learning_rate", type=number(0), default=1e-6, help="Default: %(default)s")
    recipe.add_argument("--tower_weight_decay", type=number(0), default=1e-5, help="Default: %(default)s")
    recipe.add_argument(
        "--unfreeze_epoch",
        type=positive_int,
        default=4,
        help="the first epoch, counted from 1, in which the vision tower learns. Default: %(default)s",
    )
    recipe.add_argument("--lr_step_epochs", type=positive_int, default=6, help="Default: %(default)s")
    recipe.add_argument("--lr_gamma", type=number(0, 1), default=0.5, help="Default: %(default)s")
    recipe.add_argument("--text_weight", type=number(0, 1), default=0.3, help="of the text term. Default: %(default)s")
    recipe.add_argument("--class_weights", choices=("none", "balanced"), default="none")
    recipe.add_argument("--max_grad_norm", type=number(0), default=1.0, help="0 does not clip. Default: %(default)s")
    recipe.add_argument("--mixed_precision", choices=("no", "fp16", "bf16"))
    recipe.add_argument("--early_stopping_patience", type=positive_int, help="epochs without a better validation")
    recipe.add_argument("--seed", type=int, default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--output_dir", type=output_folder, required=True)
    output.add_argument("--checkpointing_steps", type=positive_int, default=500, help="Default: %(default)s")
    output.add_argument("--checkpoints_total_limit", type=positive_int, default=2, help="Default: %(default)s")
    output.add_argument("--resume_from_checkpoint", help="`latest`, or the path of a checkpoint")
    output.add_argument("--logging_steps", type=positive_int, default=10, help="Default: %(default)s")
    output.add_argument("--report_to", nargs="*", default=[], help="trackers of accelerate besides log.jsonl")
    output.add_argument("--push_to_hub", action="store_true")
    output.add_argument("--hub_model_id", help="such as me/simemo")
    output.add_argument("--hub_private", action="store_true", help="make a new repository private")
    args = parser.parse_args(arguments)
    if problem := find_problem(args):
        parser.error(problem)
    return args


def find_problem(args: argparse.Namespace) -> str | None:
    """What is wrong with options that are right one by one."""
    available = [tracker.value for tracker in get_available_trackers()]
    checkpoint = args.resume_from_checkpoint
    if args.output_dir.resolve() == REPOSITORY / "emotion_classifier":
        return "--output_dir is the folder of the bundled classifier; choose another"
    if args.data_dir and not args.data_dir.is_dir():
        return f"--data_dir: there is no folder {str(args.data_dir)!r}"
    if not args.clip and not args.init_from:
        return "--clip or --init_from has to say where the vision tower comes from"
    if args.text_weight and not args.clip:
        return "the text term of the loss needs the text tower of --clip; leave it out with --text_weight 0"
    if "{label}" not in args.caption_template:
        return f"--caption_template has to hold {{label}}, got {args.caption_template!r}"
    if unknown := set(args.report_to) - set(available):
        return (
            f"--report_to: {', '.join(sorted(unknown))} is not installed; available: {', '.join(available) or 'none'}"
        )
    if args.push_to_hub and "/" not in (args.hub_model_id or ""):
        return "--push_to_hub needs a --hub_model_id such as me/simemo"
    if args.hub_model_id:
        try:
            validate_repo_id(args.hub_model_id)
        except ValueError as error:
            return f"--hub_model_id: {error}"
    if checkpoint and checkpoint != "latest" and not (Path(checkpoint) / "progress.json").is_file():
        return f"--resume_from_checkpoint: {checkpoint!r} is no checkpoint of this script"
    if not checkpoint and (args.output_dir / RESULT).exists():
        return f"--output_dir {args.output_dir} holds a finished classifier; choose another folder"
    if not checkpoint and list_checkpoints(args.output_dir):
        return f"--output_dir {args.output_dir} holds checkpoints: --resume_from_checkpoint latest, or another folder"
    return None


# --------------------------------------------------------------------------------------------- data and models


def load_examples(args: argparse.Namespace, accelerator: Accelerator) -> tuple[dict[str, list[Example]], list[str]]:
    """The readable pictures by split, with a validation split, and the names of those that cannot be read."""
    if args.data_dir:
        splits = read_data_dir(args.data_dir)
    else:
        splits = read_dataset(args.dataset_name, args.image_column, args.label_column, args.caption_column)
    examples = [example for split in splits.values() for example in split]
    problems: list[dict[int, str]] = [{}]
    if accelerator.is_main_process:
        problems = [find_unreadable(examples, max(2, args.dataloader_num_workers))]
        for index, reason in problems[0].items():
            print(f"Left out, as it cannot be read: {examples[index].name}: {reason}")
    broadcast_object_list(problems)
    unreadable = {examples[index].name for index in problems[0]}
    splits = {name: [e for e in split if e.name not in unreadable] for name, split in splits.items()}
    if not splits["train"]:
        raise ValueError("None of the training pictures can be read.")
    names = sorted(os.path.relpath(name, args.data_dir) if args.data_dir else name for name in unreadable)
    return with_validation(splits, args.validation_fraction, args.seed), names


def load_classifier(args: argparse.Namespace, labels: list[str]) -> SimEmoForImageClassification:
    """The SimEmo of `--init_from`, or the vision tower of `--clip` with a new head."""
    if args.init_from:
        return SimEmoForImageClassification.from_pretrained(args.init_from, dtype=torch.float32)
    clip = AutoConfig.from_pretrained(args.clip)
    config = SimEmoConfig(
        vision_config=clip.vision_config,
        projection_dim=clip.projection_dim,
        head_hidden_sizes=args.head_hidden_sizes,
        id2label=dict(enumerate(labels)),
    )
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # CLIP lacks the head and has a text tower, which would be listed at length
    try:
        return SimEmoForImageClassification.from_pretrained(args.clip, config=config, dtype=torch.float32)
    finally:
        logging.set_verbosity(verbosity)


@torch.no_grad()
def encode_texts(args: argparse.Namespace, texts: list[str], width: int, accelerator: Accelerator) -> torch.Tensor:
    """The text features of CLIP, of shape (texts, width); its text tower is not needed after this."""
    clip = CLIPModel.from_pretrained(args.clip, dtype=torch.float32).to(accelerator.device).eval()
    if clip.config.projection_dim != width:
        raise ValueError(f"--clip has features of width {clip.config.projection_dim}, --init_from of width {width}.")
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or args.clip)
    options = {"padding": True, "truncation": True, "return_tensors": "pt"}
    options["max_length"] = clip.config.text_config.max_position_embeddings
    features = []
    starts = tqdm(range(0, len(texts), 256), "encoding texts")
    for start in starts:
        tokens = tokenizer(texts[start : start + 256], **options).to(accelerator.device)
        features.append(clip.text_projection(clip.text_model(**tokens).pooler_output))
    return torch.cat(features)


def make_loader(pictures: EmotionPictures, args: argparse.Namespace, accelerator: Accelerator) -> DataLoader:
    """A loader that goes through pictures in their order, to measure on them."""
    keys: Any = [(0, index) for index in range(len(pictures))]
    return accelerator.prepare(
        DataLoader(pictures, args.eval_batch_size, sampler=keys, num_workers=args.dataloader_num_workers)
    )


class FeatureTap:
    """Keeps the image features of a SimEmo's last forward pass, which returns only logits."""

    def __init__(self, tower: torch.nn.Module):
        self.features: torch.Tensor
        tower.register_forward_hook(self)

    def __call__(self, module: torch.nn.Module, inputs: Any, output: Any) -> None:
        self.features = output.image_embeds


def make_optimizer(model: SimEmoForImageClassification, args: argparse.Namespace) -> torch.optim.AdamW:
    """One optimizer for both parts: AdamW without weight decay, which the head has, is Adam."""
    tower = {"params": list(model.clip.parameters()), "weight_decay": args.tower_weight_decay}
    head = {"params": list(model.classifier.parameters()), "weight_decay": 0.0}
    return torch.optim.AdamW([{**head, "lr": args.head_learning_rate}, {**tower, "lr": args.tower_learning_rate}])


def start_epoch(model: SimEmoForImageClassification, optimizer: Any, args: argparse.Namespace, epoch: int) -> None:
    """Sets what the epoch, counted from 0, decides on: the learning rates, and whether the tower learns."""
    decay = args.lr_gamma ** (epoch // args.lr_step_epochs)
    for group, rate in zip(optimizer.param_groups, (args.head_learning_rate, args.tower_learning_rate)):
        group["lr"] = rate * decay
    model.clip.requires_grad_(epoch + 1 >= args.unfreeze_epoch)


# ---------------------------------------------------------------------------------------- training and validation


@torch.no_grad()
def predict(model: torch.nn.Module, loader: DataLoader, accelerator: Accelerator) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits of shape (n, classes) and labels of shape (n,), of all processes, on the CPU."""
    model.eval()
    logits, labels = [], []
    for batch in tqdm(loader, "validating", leave=False):
        output = model(pixel_values=batch["pixel_values"]).logits.float()
        output, truth = accelerator.gather_for_metrics((output, batch["labels"]))
        logits.append(output.cpu())
        labels.append(truth.cpu())
    return torch.cat(logits), torch.cat(labels)


def train_epoch(
    model: torch.nn.Module,
    optimizer: Any,
    loader: Iterable[dict],
    loss_of: Callable[[dict], torch.Tensor],
    args: argparse.Namespace,
    accelerator: Accelerator,
    progress: Progress,
    bar: Any,
) -> None:
    """Trains on the batches of the current epoch that are not done yet."""
    model.train()
    clock = time.monotonic()
    for index, batch in enumerate(loader, start=progress.batch):
        # Dropout is as it would be in an unbroken run, whatever was drawn before.
        place = f"{args.seed}/{progress.epoch}/{index}/{accelerator.process_index}"
        torch.manual_seed(random.Random(place).getrandbits(63))
        with accelerator.accumulate(model):
            loss = loss_of(batch)
            accelerator.backward(loss)
            if accelerator.sync_gradients and args.max_grad_norm:
                accelerator.clip_grad_norm_(model.parameters(), args.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad()
        progress.batch = index + 1
        if not accelerator.sync_gradients:
            continue
        progress.step += 1
        progress.seconds, clock = progress.seconds + time.monotonic() - clock, time.monotonic()
        bar.update()
        if progress.step % args.logging_steps == 0:
            mean = accelerator.reduce(loss.detach(), reduction="mean").item()
            if not math.isfinite(mean):
                raise ValueError(f"The loss is {mean}: try lower learning rates, or another --mixed_precision.")
            rates = {f"{name}_lr": group["lr"] for name, group in zip(("head", "tower"), optimizer.param_groups)}
            accelerator.log({"loss": mean, "epoch": progress.epoch + 1, **rates}, step=progress.step)
            bar.set_postfix(loss=f"{mean:.3f}")
        if progress.step % args.checkpointing_steps == 0:
            save_checkpoint(accelerator, args.output_dir, progress, args.checkpoints_total_limit)


def simemo_loss(
    batch: dict,
    model: torch.nn.Module,
    tap: FeatureTap,
    text_features: torch.Tensor | None,
    text_weight: float,
    class_weights: torch.Tensor | None,
) -> torch.Tensor:
    """The loss of SimEmo: (1 - w) CE(logits, label) + w (1 - cos(image feature, text feature))."""
    logits = model(pixel_values=batch["pixel_values"]).logits.float()
    loss = (1 - text_weight) * F.cross_entropy(logits, batch["labels"], weight=class_weights)
    if text_features is not None:
        cosine = F.cosine_similarity(tap.features.float(), text_features[batch["texts"]], dim=-1)
        loss = loss + text_weight * (1 - cosine).mean()
    return loss


def validate(
    model: torch.nn.Module, loader: DataLoader, args: argparse.Namespace, accelerator: Accelerator, progress: Progress
) -> bool:
    """Measures the model after an epoch, keeps the best; returns whether to stop early."""
    labels = list(accelerator.unwrap_model(model).config.id2label.values())
    logits, truth = predict(model, loader, accelerator)
    figures = measure(logits, truth, labels)
    logged = {f"validation_{name}": figures[name] for name in ("accuracy", "loss", "calibration_error")}
    recall = {f"recall_{name}": value for name, value in figures["recall"].items() if value is not None}
    accelerator.log({**logged, **recall, "epoch": progress.epoch + 1}, step=progress.step)
    accelerator.print(
        f"epoch {progress.epoch + 1}: accuracy {figures['accuracy']:.3f}, loss {figures['loss']:.3f}, "
        f"calibration error {figures['calibration_error']:.3f}"
    )
    if progress.improves(figures["accuracy"], figures["loss"]) and accelerator.is_main_process:
        tensors = accelerator.unwrap_model(model).state_dict()
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, args.output_dir / "new.safetensors")
        os.replace(args.output_dir / "new.safetensors", args.output_dir / "best.safetensors")
    accelerator.wait_for_everyone()
    patience = args.early_stopping_patience
    return patience is not None and progress.epoch + 1 - progress.best_epoch >= patience


def finish(
    model: torch.nn.Module,
    loaders: dict[str, DataLoader],
    args: argparse.Namespace,
    accelerator: Accelerator,
    progress: Progress,
) -> dict[str, Any]:
    """Goes back to the best weights, calibrates them, and returns the figures of the result."""
    classifier = accelerator.unwrap_model(model)
    classifier.load_state_dict(load_file(args.output_dir / "best.safetensors"))
    temperature = fit_temperature(*predict(model, loaders["validation"], accelerator))
    fold_temperature(classifier.classifier, temperature)
    names = list(classifier.config.id2label.values())
    split = "test" if "test" in loaders else "validation"
    logits, truth = predict(model, loaders[split], accelerator)
    degraded, _ = predict(model, loaders["degraded"], accelerator)
    if accelerator.is_main_process:
        draw_confusion(measure(logits, truth, names)["confusion"], names, args.output_dir / "confusion.png")
        draw_reliability(logits * temperature, logits, truth, args.output_dir / "reliability.png")
    return {
        "split": split,
        "labels": names,
        "temperature": temperature,
        "metrics": measure(logits, truth, names),
        "metrics_before_scaling": measure(logits * temperature, truth, names),
        "metrics_degraded": measure(degraded, truth, names),
        "best_epoch": progress.best_epoch,
        "epochs": progress.epoch,
        "steps": progress.step,
        "seconds": round(progress.seconds, 1),
        "device": f"{accelerator.num_processes} x {accelerator.device.type}",
        "mixed_precision": accelerator.mixed_precision,
        "image_size": classifier.config.image_size,
    }


def describe_sources(args: argparse.Namespace) -> dict[str, Any]:
    """What data, model and options a run is made of, without the paths of this machine."""
    name, base = args.output_dir.resolve().name, args.init_from or args.clip
    recipe = {
        key: public_name(str(value)) if isinstance(value, (str, Path)) else value
        for key, value in vars(args).items()
        if key not in NO_RECIPE and value is not None
    }
    return {
        "name": name,
        "repository": args.hub_model_id or name,
        "data": recipe.get("data_dir", recipe.get("dataset_name")),
        "datasets": None if args.data_dir or Path(args.dataset_name).exists() else [args.dataset_name],
        "base_model": None if Path(base).exists() else base,
        "recipe": recipe,
    }


def write_result(args: argparse.Namespace, classifier: SimEmoForImageClassification, report: dict[str, Any]) -> None:
    """Writes classifier, figures and card, and uploads them if that is asked for."""
    save_model(classifier, args.output_dir)
    training_card(report, classifier.config).save(args.output_dir / "README.md")
    write_whole(args.output_dir / RESULT, json.dumps(report, indent=2) + "\n")
    (args.output_dir / "best.safetensors").unlink()
    print(f"{args.output_dir}: accuracy on the {report['split']} pictures {report['metrics']['accuracy']:.3f}")
    if args.push_to_hub:
        leftovers = ["checkpoint-*", "partial-checkpoint*"]
        where = {"repo_id": args.hub_model_id, "folder_path": args.output_dir, "ignore_patterns": leftovers}
        print(HfApi().upload_folder(**where, commit_message=f"Upload {report['name']}"))


# ------------------------------------------------------------------------------------------------------- program


@one_line_errors
def main(arguments: list[str] | None = None) -> None:
    args = parse_args(arguments)
    log = JsonLines(args.output_dir / "log.jsonl")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with=[log, *args.report_to],
        project_dir=args.output_dir,
        # While the tower is frozen, its parameters have no gradients.
        kwargs_handlers=[DistributedDataParallelKwargs(find_unused_parameters=True)],
    )
    if accelerator.is_main_process:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        if args.push_to_hub:  # now, as it fails where there is no access
            HfApi().create_repo(args.hub_model_id, private=args.hub_private, exist_ok=True)

    # Data and models
    splits, unreadable = load_examples(args, accelerator)
    set_seed(args.seed)
    classifier = load_classifier(args, ordered_labels(splits["train"]))
    labels = list(classifier.config.id2label.values())
    check_labels(splits, labels)
    accelerator.print(describe_splits(splits, labels))
    if accelerator.device.type == "cpu":  # there the backward pass of PyTorch's fused attention is slow
        classifier.set_attn_implementation("eager")
    rows: dict[str, int] = {}
    text_features = class_weights = None
    if args.text_weight:
        texts = sorted({text_of(example, args.caption_template) for example in splits["train"]})
        rows = {text: row for row, text in enumerate(texts)}
        text_features = encode_texts(args, texts, classifier.config.projection_dim, accelerator)
    if args.class_weights == "balanced":
        class_weights = torch.tensor(balanced_weights(splits["train"], labels), device=accelerator.device)
    optimizer = make_optimizer(classifier, args)
    tap = FeatureTap(classifier.clip)

    sampler = EpochSampler(len(splits["train"]), args.seed)
    pictures = partial(EmotionPictures, config=classifier.config, template=args.caption_template, seed=args.seed)
    train_pictures = pictures(splits["train"], texts=rows, augmentation=args.augmentation)
    data = {split: pictures(examples) for split, examples in splits.items() if split != "train"}
    data["degraded"] = pictures(splits.get("test", splits["validation"]), augmentation="degraded")

    workers = args.dataloader_num_workers
    train_loader = DataLoader(train_pictures, args.train_batch_size, sampler=sampler, num_workers=workers)
    loaders = {name: make_loader(split, args, accelerator) for name, split in data.items()}
    model, optimizer, train_loader = accelerator.prepare(classifier, optimizer, train_loader)
    loss_of = partial(
        simemo_loss,
        model=model,
        tap=tap,
        text_features=text_features,
        text_weight=args.text_weight,
        class_weights=class_weights,
    )

    # Training
    signature = {
        "labels": labels,
        "pictures": len(splits["train"]),
        "batch": [args.train_batch_size, args.gradient_accumulation_steps, accelerator.num_processes],
        "seed": args.seed,
    }
    progress = resume(accelerator, args.output_dir, args.resume_from_checkpoint, Progress(signature))
    if accelerator.is_main_process:
        log.forget_after(progress.step)
    sources = describe_sources(args)
    accelerator.init_trackers("simemo", config={name: str(value) for name, value in sources["recipe"].items()})
    steps = math.ceil(len(train_loader) / args.gradient_accumulation_steps) * args.num_epochs
    bar = tqdm(total=steps, initial=progress.step, desc="training")
    stop = False
    while progress.epoch < args.num_epochs and not stop:
        sampler.epoch = progress.epoch
        start_epoch(classifier, optimizer, args, progress.epoch)
        left = skip_first_batches(train_loader, progress.batch) if progress.batch < len(train_loader) else []
        train_epoch(model, optimizer, left, loss_of, args, accelerator, progress, bar)
        stop = validate(model, loaders["validation"], args, accelerator, progress)
        progress.epoch, progress.batch = progress.epoch + 1, 0
    bar.close()

    # Result
    report = {**sources, **finish(model, loaders, args, accelerator, progress), "unreadable": unreadable}
    report["pictures"] = {split: count_labels(examples, labels) for split, examples in splits.items()}
    if accelerator.is_main_process:
        write_result(args, accelerator.unwrap_model(model, keep_fp32_wrapper=False), report)
    accelerator.end_training()


if __name__ == "__main__":
    main()
