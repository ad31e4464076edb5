# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Stage 4: the emotion classifiers.

- `guide` is the SimEmo that guides MUSE: the CLIP's vision tower and an MLP head, trained on pictures that are
  blurred, noisy, recoloured, cut, sent through the autoencoder or previewed by the diffusion model. No label
  smoothing; its temperature is fitted on validation scenes and folded into the last layer.
- `emo_b` judges and never guides: a ResNet with another seed.
- `emo_c` judges and never guides: a SimEmo trained on scenes in the other drawing style, `inked`.
"""

import copy

import numpy as np
import repository  # noqa: F401
import torch
from common import (
    JUDGED_SIZE,
    SIZE,
    arguments,
    autocast,
    degrade,
    generator_of,
    labels_of,
    learning_rate_at,
    load_checkpoint,
    load_set,
    mirror,
    normalise,
    numbers_of,
    progress,
    random_like,
    save_array,
    save_checkpoint,
    save_json,
    show_loss,
    to_pictures,
    to_pixels,
    update_average,
)
from diffusers import AutoencoderKL, UNet2DConditionModel
from modeling_simemo import SimEmoConfig, SimEmoForImageClassification
from PIL import Image, ImageDraw
from torch.nn import functional as F
from tqdm import tqdm
from transformers import CLIPModel, CLIPTextModel, CLIPTokenizer, ResNetConfig, ResNetForImageClassification
from world import EMOTIONS, Scene, content_prompt


LABELS = dict(enumerate(EMOTIONS))
TRAINED_ON = {"guide": "emotion", "emo_b": "emotion", "emo_c": "inked"}
SEEDS = {"guide": 0, "emo_b": 1, "emo_c": 2}
PREVIEWS = 8000


def build_classifier(name: str, clip: CLIPModel) -> torch.nn.Module:
    if name == "emo_b":
        config = ResNetConfig(
            embedding_size=32,
            hidden_sizes=[32, 64, 128, 192],
            depths=[2, 1, 1, 1],
            layer_type="basic",
            id2label=LABELS,
            label2id={label: index for index, label in LABELS.items()},
        )
        return ResNetForImageClassification(config)
    config = SimEmoConfig(vision_config=clip.config.vision_config, head_hidden_sizes=[256], id2label=LABELS)
    model = SimEmoForImageClassification(config)
    ours = model.clip.state_dict()
    theirs = {name.removeprefix("vision_model."): value for name, value in clip.vision_model.state_dict().items()}
    theirs["visual_projection.weight"] = clip.visual_projection.weight
    model.clip.load_state_dict({name: theirs[name.removeprefix("vision_model.")] for name in ours})
    model.set_attn_implementation("eager")  # on a CPU the backward of the fused kernel takes half of the step
    return model


@torch.no_grad()
def load_previews(args, scenes: list[Scene]) -> np.ndarray:
    """The first scenes as the guide will meet them: through the autoencoder, every other one as a one-step preview of
    the diffusion model from a random noise level."""
    # Only here, as the judges need none of it.
    from train_unet import build_scheduler

    path = args.work_dir / "emotion_previews.npy"
    if path.exists():
        return np.load(path, mmap_mode="r")
    _, pictures = load_set("emotion", args.work_dir, SIZE, PREVIEWS)
    vae = AutoencoderKL.from_pretrained(args.work_dir / "vae").to(args.device).eval()
    unet = UNet2DConditionModel.from_pretrained(args.work_dir / "unet").to(args.device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    encoder = CLIPTextModel.from_pretrained(args.work_dir / "text_encoder").to(args.device).eval()
    scheduler = build_scheduler()
    generator, chunks = generator_of(7, 0), []
    for start in tqdm(range(0, PREVIEWS, 64), desc="previews", mininterval=20):
        with autocast(args.device):
            latents = vae.encode(to_pixels(pictures[start : start + 64], args.device)).latent_dist.mean.float()
        latents = latents * vae.config.scaling_factor
        texts = [content_prompt(scene.place, scene.subject) for scene in scenes[start + 1 : start + 64 : 2]]
        ids = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids.to(args.device)
        t = torch.randint(50, 750, (len(texts),), generator=generator)
        noise = torch.randn(latents[1::2].shape, generator=generator).to(args.device)
        noisy = scheduler.add_noise(latents[1::2], noise, t)
        with autocast(args.device):
            predicted = unet(noisy, t.to(args.device), encoder(ids).last_hidden_state).sample.float()
        a = scheduler.alphas_cumprod[t].view(-1, 1, 1, 1).to(args.device)
        latents[1::2] = (noisy - (1 - a).sqrt() * predicted) / a.sqrt()
        with autocast(args.device):
            decoded = vae.decode(latents / vae.config.scaling_factor).sample
        chunks.append(to_pictures(F.interpolate(decoded.float(), size=(JUDGED_SIZE, JUDGED_SIZE), mode="area")))
    save_array(path, np.concatenate(chunks))
    return np.load(path, mmap_mode="r")


def recolour(pixels: torch.Tensor, generator: torch.Generator, share: float = 0.4) -> torch.Tensor:
    """Scale and shift the channels of a share of the pictures."""
    shape = (len(pixels), 3, 1, 1)
    gain = 1 + 0.2 * (2 * random_like(pixels, shape, generator) - 1)
    shift = 0.15 * (2 * random_like(pixels, shape, generator) - 1)
    chosen = random_like(pixels, (len(pixels), 1, 1, 1), generator) < share
    return torch.where(chosen, pixels * gain + shift, pixels)


def cut_out(pixels: torch.Tensor, generator: torch.Generator, share: float = 0.4) -> torch.Tensor:
    """Paint a box of one colour into a share of the pictures."""
    size, count = pixels.shape[-1], len(pixels)
    centre = random_like(pixels, (2, count, 1, 1), generator) * size
    half = (0.08 + 0.17 * random_like(pixels, (2, count, 1, 1), generator)) * size
    grid = torch.arange(size, device=pixels.device)
    inside = ((grid.view(1, -1, 1) - centre[0]).abs() < half[0]) & ((grid.view(1, 1, -1) - centre[1]).abs() < half[1])
    inside = inside & (random_like(pixels, (count, 1, 1), generator) < share)
    colour = 2 * random_like(pixels, (count, 3, 1, 1), generator) - 1
    return torch.where(inside[:, None], colour, pixels)


@torch.no_grad()
def logits_of(model: torch.nn.Module, pictures: np.ndarray, device: str, seed: int | None = None) -> torch.Tensor:
    """Logits of pictures, degraded if a seed is given."""
    model.eval()
    chunks = []
    for start in range(0, len(pictures), 250):
        pixels = to_pixels(pictures[start : start + 250], device)
        if seed is not None:
            pixels = degrade(pixels, generator_of(seed, start))
        chunks.append(model(normalise(pixels)).logits.float())
    return torch.cat(chunks).cpu()


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """The temperature at which the validation likelihood is highest, by a search on a grid."""
    candidates = torch.linspace(0.3, 4.0, 371)
    return min(candidates.tolist(), key=lambda t: F.cross_entropy(logits / t, labels).item())


def draw_confusion(matrix: torch.Tensor) -> Image.Image:
    """Rows are the truth, columns the answer, in the order of EMOTIONS."""
    cell, margin = 44, 96
    image = Image.new("RGB", (margin + 8 * cell + 8, 28 + 8 * cell + 8), (255, 255, 255))
    draw = ImageDraw.Draw(image)
    shares = matrix / matrix.sum(1, keepdim=True).clamp(min=1)
    for i, truth in enumerate(EMOTIONS):
        draw.text((6, 28 + i * cell + 16), truth, fill=(40, 40, 40))
        draw.text((margin + i * cell + 2, 8), truth[:7], fill=(40, 40, 40))
        for j in range(8):
            share = shares[i, j].item()
            x, y = margin + j * cell, 28 + i * cell
            draw.rectangle(
                (x, y, x + cell - 2, y + cell - 2), fill=tuple(int(255 - share * (255 - c)) for c in (36, 92, 150))
            )
            draw.text((x + 12, y + 14), f"{100 * share:.0f}", fill=(255, 255, 255) if share > 0.5 else (60, 60, 60))
    return image


def main():
    parser = arguments(__doc__, steps=1500, batch_size=96, learning_rate=5e-4)
    parser.add_argument("--model", choices=tuple(TRAINED_ON), required=True)
    args = parser.parse_args()
    name, seed = args.model, args.seed + SEEDS[args.model]
    torch.manual_seed(seed)
    scenes, pictures = load_set(TRAINED_ON[name], args.work_dir)
    labels = labels_of(scenes)
    validation = load_set("emotion_validation", args.work_dir)
    held_out = load_set("inked_held_out" if name == "emo_c" else "emotion_held_out", args.work_dir)
    previews = load_previews(args, scenes) if name != "emo_c" else None
    folder, checkpoint = args.work_dir / name, args.work_dir / f"{name}.checkpoint"

    model = build_classifier(name, CLIPModel.from_pretrained(args.work_dir / "clip_tuned")).to(args.device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.learning_rate, weight_decay=0.05)
    start = 0
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, model=model, average=average, optimizer=optimizer)

    def save(step: int):
        save_checkpoint(checkpoint, step, model=model, average=average, optimizer=optimizer)
        final = copy.deepcopy(average)
        truth = labels_of(validation[0])
        logits = torch.cat(
            [logits_of(final, validation[1], args.device), logits_of(final, validation[1], args.device, seed=3)]
        )
        temperature = fit_temperature(logits, truth.repeat(2))
        last = [module for module in final.classifier if isinstance(module, torch.nn.Linear)][-1]
        with torch.no_grad():
            last.weight.div_(temperature)
            last.bias.div_(temperature)
        final.save_pretrained(folder)
        truth = labels_of(held_out[0])
        clean, degraded = (logits_of(final, held_out[1], args.device, seed=s).argmax(1) for s in (None, 4))
        matrix = torch.zeros(8, 8)
        matrix.index_put_((truth, clean), torch.ones(len(truth)), accumulate=True)
        draw_confusion(matrix).save(args.work_dir / f"{name}_confusion.png")
        save_json(
            args.work_dir / f"{name}_log.json",
            {
                "step": step,
                "accuracy": (clean == truth).float().mean().item(),
                "accuracy_degraded": (degraded == truth).float().mean().item(),
                "accuracy_painted": (logits[: len(validation[0])].argmax(1) == labels_of(validation[0]))
                .float()
                .mean()
                .item(),
                "temperature": temperature,
                "confusion": {
                    e: {f: int(matrix[i, j]) for j, f in enumerate(EMOTIONS)} for i, e in enumerate(EMOTIONS)
                },
            },
        )

    bar = progress(start, args.steps, name)
    for step in bar:
        generator = generator_of(seed, step, args.device)
        chosen = numbers_of(seed, step).integers(len(pictures), size=args.batch_size)
        if previews is not None:
            chosen[: args.batch_size // 3] %= len(previews)
        batch = pictures[chosen]
        if previews is not None:
            batch[: args.batch_size // 3] = previews[chosen[: args.batch_size // 3]]
        pixels = mirror(to_pixels(batch, args.device), generator)
        pixels = cut_out(recolour(degrade(pixels, generator), generator), generator)
        model.train()
        with autocast(args.device):
            logits = model(normalise(pixels)).logits
        loss = F.cross_entropy(logits.float(), labels[chosen].to(args.device))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args.steps, args.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        update_average(average, model, step, 0.995)
        show_loss(bar, step, loss)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(step + 1)


if __name__ == "__main__":
    main()
