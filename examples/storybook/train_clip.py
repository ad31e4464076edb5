# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Stage 2: a small CLIP on pictures and captions. Writes `clip_model/` into the work folder, and `tokenizer/` first.

A tokenizer that is there is read, as the networks beside it know its tokens.

Its text tower becomes the text encoder of the diffusion model, as in Stable Diffusion 1.x. With another `--seed` and
`--output` it gives the CLIP that is held out for evaluation; with `--xl` as well, one with a wider text tower, that is
the second text encoder of the SDXL-shaped model.
"""

import contextlib
import copy
import random
from dataclasses import replace

import numpy as np
import torch
from common import (
    MAX_LENGTH,
    arguments,
    autocast,
    build_tokenizer,
    degrade,
    drawn_ahead,
    encode,
    generator_of,
    learning_rate_at,
    load_checkpoint,
    load_set,
    mirror,
    normalise,
    numbers_of,
    progress,
    save_checkpoint,
    save_json,
    show_loss,
    to_pixels,
    update_average,
)
from PIL import Image
from torch.nn import functional as F
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig
from world import (
    COLOURS,
    CUE_PHRASES,
    EMOTION_CUES,
    EMOTIONS,
    PLACES,
    SUBJECTS,
    Scene,
    caption,
    contact_sheet,
    contents,
)


TEXT_WIDTH, TEXT_WIDTH_XL = 128, 192
PARTS = (*CUE_PHRASES, *PLACES, *SUBJECTS)  # what the probe tells apart
PROBE_SCALE = 10.0  # of features, whose norm is 1, before the probe
NEGATIVES = 2  # captions for each picture that are wrong in one word
# cue -> those that go with one of its emotions
COMPANIONS = {
    cue: sorted({other for cues in EMOTION_CUES.values() if cue in cues for other in cues} - {cue})
    for cue in CUE_PHRASES
}
KINDS, KIND_WEIGHTS = ("content", "full", "cue", "emotion"), (0.4, 0.42, 0.12, 0.06)


def build_clip(tokenizer: CLIPTokenizer, text_width: int) -> CLIPModel:
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=text_width,
        intermediate_size=4 * text_width,
        num_hidden_layers=3,
        num_attention_heads=4,
        hidden_act="gelu",
        max_position_embeddings=MAX_LENGTH,
        projection_dim=128,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=4,
        hidden_act="gelu",
        image_size=64,
        patch_size=8,
        projection_dim=128,
    )
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=128))


def one_word_off(scene: Scene, rng: random.Random, kind: str) -> Scene:
    """The scene with another place, subject, colour or cue: its caption is a hard negative.

    Where cues are named, half of the negatives swap one, and half of these for a cue that goes with the same emotions:
    balloons and flags often stand in one picture, so that nothing else tells their words apart.
    """
    if kind in ("full", "cue") and scene.cues and rng.random() < 0.5:
        k, present = rng.randrange(len(scene.cues)), dict(scene.cues)
        companions = [name for name in COMPANIONS[scene.cues[k][0]] if name not in present]
        others = [name for name in CUE_PHRASES if name not in present]
        other = rng.choice(companions if companions and rng.random() < 0.5 else others)
        return replace(scene, cues=tuple((other if i == k else name, a) for i, (name, a) in enumerate(scene.cues)))
    part = rng.choice(("place", "subject", "subject", "colour"))
    if part == "place":
        return replace(scene, place=rng.choice([place for place in PLACES if place != scene.place]))
    if part == "colour":
        return replace(scene, colour=rng.choice([name for name in COLOURS if name != scene.colour]))
    return replace(scene, subject=rng.choice([subject for subject in SUBJECTS if subject != scene.subject]))


def captions_of(scenes: list[Scene], rng: random.Random) -> tuple[list[str], list[str], list[str]]:
    """Captions, their kinds, and `NEGATIVES` for each in a row that are wrong in one word (or in the emotion)."""
    texts, kinds, wrong = [], rng.choices(KINDS, KIND_WEIGHTS, k=len(scenes)), []
    for k, scene in enumerate(scenes):
        if kinds[k] == "emotion" and scene.emotion is None or kinds[k] == "cue" and not scene.cues:
            kinds[k] = "content"
        words = rng.getrandbits(32)
        texts.append(caption(scene, random.Random(words), kinds[k]))
        for _ in range(NEGATIVES):
            other = one_word_off(scene, rng, kinds[k])
            if kinds[k] == "emotion":
                other = replace(scene, emotion=rng.choice([name for name in EMOTIONS if name != scene.emotion]))
            wrong.append(caption(other, random.Random(words), kinds[k]))
    return texts, kinds, wrong


def ids_of(tokenizer: CLIPTokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids of texts, (batch, length): what follows the longest text's end changes nothing."""
    ids = encode(tokenizer, texts)
    return ids[:, : int((ids == tokenizer.eos_token_id).int().argmax(1).max()) + 1]


def text_features(model: CLIPModel, ids: torch.Tensor) -> torch.Tensor:
    """Normalised features of texts, (batch, dim)."""
    return F.normalize(model.get_text_features(ids.to(model.device)).pooler_output.float(), dim=-1)


def parts_of(scene: Scene, text: str | None = None, kind: str = "full") -> list[float]:
    """Which of PARTS a scene has, or which of them its caption of that kind names."""
    present = {name for name, _ in scene.cues}
    if text is not None:
        present = {cue for cue in present if any(phrase in text for phrase in CUE_PHRASES[cue])}
    if kind in ("content", "full"):
        present |= {scene.place, scene.subject}
    return [float(part in present) for part in PARTS]


def pairs_of(scenes: list[Scene], tokenizer: CLIPTokenizer, rng: random.Random) -> dict[str, torch.Tensor]:
    """What captions a batch is compared with.

    Returns:
        `ids`, of the captions, the wrong ones and all 64 contents; `also_true` (batch, captions and wrong ones), which
        of them hold for a picture they were not made for; `contents` (batch,), the right one of the 64; `parts`
        (2 * batch, 43), of the pictures and as named in their captions.
    """
    texts, kinds, wrong = captions_of(scenes, rng)
    in_other_words = [f"a {rng.choice(s[0])} {rng.choice(p[0])}" for p in PLACES.values() for s in SUBJECTS.values()]
    keys = torch.tensor([content_index(scene) for scene in scenes])
    emotions = torch.tensor([EMOTIONS.index(scene.emotion) if scene.emotion else -1 for scene in scenes])
    same = torch.zeros((len(texts), len(texts)), dtype=torch.bool)
    for kind, values in (("content", keys), ("emotion", emotions)):
        same |= (values[:, None] == values) & torch.tensor([k == kind for k in kinds])
    same.fill_diagonal_(False)
    unchanged = torch.tensor([negative == texts[k // NEGATIVES] for k, negative in enumerate(wrong)])
    return {
        "ids": ids_of(tokenizer, texts + wrong + in_other_words),
        "also_true": torch.cat([same, unchanged.expand(len(texts), -1)], dim=1),
        "contents": keys,
        "parts": torch.tensor([*map(parts_of, scenes), *map(parts_of, scenes, texts, kinds)]),
    }


def clip_loss(
    model: CLIPModel, probe: torch.nn.Linear, pixels: torch.Tensor, pairs: dict[str, torch.Tensor], lock_text: bool
) -> torch.Tensor:
    """CLIP's symmetric cross-entropy, that of the right content among all 64, and the error of `probe`.

    Pictures also see `NEGATIVES` hard negatives each; captions that hold for another picture of the batch as well are
    not counted as wrong for it.

    The probe reads from features, of pictures as of captions, which places, subjects and cues these have. It is thrown
    away; both towers learn faster by it than by pairs alone.
    """
    also_true, content, parts = (pairs[name].to(pixels.device) for name in ("also_true", "contents", "parts"))
    images = F.normalize(model.get_image_features(pixels).pooler_output.float(), dim=-1)
    with torch.no_grad() if lock_text else contextlib.nullcontext():
        words = text_features(model, pairs["ids"])
    logits = model.logit_scale.exp() * images @ words.T  # (batch, (1 + NEGATIVES) * batch + 64)
    logits, content_logits = logits.split((also_true.shape[1], logits.shape[1] - also_true.shape[1]), dim=1)
    logits = logits.masked_fill(also_true, -1e4)
    target = torch.arange(len(images), device=pixels.device)
    loss = 0.5 * (F.cross_entropy(logits, target) + F.cross_entropy(logits[:, : len(images)].T, target))
    loss = loss + F.cross_entropy(content_logits, content)
    answers = probe(PROBE_SCALE * torch.cat([images, words[: len(images)]])).float()
    return loss + F.binary_cross_entropy_with_logits(answers, parts, reduction="sum") / len(parts)


@torch.no_grad()
def rank_content(model: CLIPModel, tokenizer: CLIPTokenizer, pixels: torch.Tensor) -> torch.Tensor:
    """For pictures in [-1, 1]: the similarities (batch, 64) to the prompts of all places x subjects, as cosines."""
    words = text_features(model, ids_of(tokenizer, contents()))
    images = F.normalize(model.get_image_features(normalise(pixels)).pooler_output, dim=-1)
    return images @ words.T


def content_index(scene: Scene) -> int:
    return tuple(PLACES).index(scene.place) * len(SUBJECTS) + tuple(SUBJECTS).index(scene.subject)


def main():
    parser = arguments(__doc__, steps=2200, batch_size=80, learning_rate=1e-3)
    parser.add_argument("--output", default="clip_model", help="name of the folder to write, inside the work folder")
    parser.add_argument(
        "--lock_text", action="store_true", help="train the image side of --initial, to which its text is fixed"
    )
    parser.add_argument("--initial", help="name of the folder to start from, inside the work folder")
    parser.add_argument(
        "--degraded", type=float, default=0.5, help="share of the pictures that are blurred, paled or noisy"
    )
    parser.add_argument("--xl", action="store_true", help="a wider text tower")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    scenes, pictures = load_set("world", args.work_dir)
    held_out_scenes, held_out = load_set("world_held_out", args.work_dir)
    folder, checkpoint = args.work_dir / args.output, args.work_dir / f"{args.output}.checkpoint"

    words = args.work_dir / "tokenizer"
    tokenizer = CLIPTokenizer.from_pretrained(words) if words.is_dir() else build_tokenizer(words)
    model = build_clip(tokenizer, TEXT_WIDTH_XL if args.xl else TEXT_WIDTH).to(args.device)
    if args.initial:
        model = CLIPModel.from_pretrained(args.work_dir / args.initial).to(args.device)
    if args.lock_text:
        model.text_model.requires_grad_(False)
        model.text_projection.requires_grad_(False)
    model.set_attn_implementation("eager")  # on a CPU the backward of the fused kernel takes half of the step
    probe = torch.nn.Linear(model.config.projection_dim, len(PARTS)).to(args.device)
    average = copy.deepcopy(model).eval().requires_grad_(False)
    trained = [parameter for part in (model, probe) for parameter in part.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05)
    start = 0
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, model=model, probe=probe, average=average, optimizer=optimizer)

    def save(step: int):
        save_checkpoint(checkpoint, step, model=model, probe=probe, average=average, optimizer=optimizer)
        average.save_pretrained(folder)
        similarities = rank_content(average, tokenizer, to_pixels(held_out[:1024], args.device))
        truth = torch.tensor([content_index(scene) for scene in held_out_scenes[:1024]], device=args.device)
        right = similarities.argmax(1) == truth
        save_json(
            args.work_dir / f"{args.output}_log.json",
            {
                "step": step,
                "first_of_64": right.float().mean().item(),
                "cosine_of_truth": similarities.gather(1, truth[:, None]).mean().item(),
                "logit_scale": average.logit_scale.exp().item(),
            },
        )
        missed = (~right).nonzero().flatten().tolist()[:40] or [0]
        contact_sheet([Image.fromarray(held_out[k]) for k in missed], 10).save(
            args.work_dir / f"{args.output}_missed.png"
        )

    def draw(step: int) -> tuple[np.ndarray, dict[str, torch.Tensor]]:
        chosen = numbers_of(args.seed, step).integers(len(pictures), size=args.batch_size)
        return chosen, pairs_of([scenes[k] for k in chosen], tokenizer, random.Random(f"{args.seed}/{step}"))

    bar = progress(start, args.steps, args.output)
    for step, (chosen, pairs) in zip(bar, drawn_ahead(draw, start, args.steps, args.device)):
        generator = generator_of(args.seed, step, args.device)
        pixels = normalise(
            degrade(mirror(to_pixels(pictures[chosen], args.device), generator), generator, args.degraded)
        )
        with autocast(args.device):
            loss = clip_loss(model, probe, pixels, pairs, args.lock_text)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(step, args.steps, args.learning_rate)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=4.6052)
        update_average(average, model, step, 0.998)
        show_loss(bar, step, loss)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save(step + 1)


if __name__ == "__main__":
    main()
