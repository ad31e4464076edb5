# Copyright 2026 The MUSE pipelines contributors. Licensed under the Apache License, Version 2.0.
"""Stage 3: the diffusion model on 16 x 16 x 8 latents. Writes `unet/` into the work folder.

MUSE moves tokens that stand behind the prompt, so the network must answer smoothly to embeddings that no text encodes.
Stable Diffusion learnt this from billions of captions; here the training conditions make up for it, see `Conditions`.

The text encoder starts as the CLIP's text tower and is trained along, which tells cues apart that often come together.
Writes `text_encoder/` as well.

With `--xl` the trained network grows into an SDXL-shaped one, `unet_xl/`: it reads the states of two text encoders,
the pooled state of the second, and the size and crop that a picture had. See `grow`.
"""

import copy
import itertools
import os
import random
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from common import (
    CHANNELS,
    SIZE,
    Clock,
    Halves,
    Muon,
    arguments,
    autocast,
    drawn_ahead,
    encode,
    generator_of,
    held_learning_rate,
    load_checkpoint,
    load_set,
    numbers_of,
    progress,
    save_array,
    save_checkpoint,
    save_json,
    show_loss,
    to_pixels,
    update_average,
)
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from diffusers.models.attention_processor import AttnProcessor
from PIL import Image
from torch.nn import functional as F
from train_clip import rank_content
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer
from world import (
    CUE_PHRASES,
    CUES,
    EMOTIONS,
    PLACES,
    SUBJECTS,
    Scene,
    caption,
    contact_sheet,
    content_prompt,
    contents,
)


MAX_EXTRA = 8  # tokens behind the prompt
SNR_CAP = 5.0  # min-SNR weighting, https://huggingface.co/papers/2303.09556
TIME_IDS = (SIZE, SIZE, 0, 0, SIZE, SIZE)  # original size, top left of the crop, target size: SDXL's conditioning
TEXT_RATE = 0.3  # the text encoder's learning rate, as a share of the network's
VARIED = 12000  # pictures that are also shown with other time ids


def build_unet(width: int, layers: int, sample_size: int = 16, cross_attention_dim: int = 128, **xl):
    """The network, with attention in its 8 x 8 and 4 x 4 levels; `xl` are the further settings of SDXL's."""
    return UNet2DConditionModel(
        sample_size=sample_size,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=(width, 2 * width, 4 * width),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=layers,
        cross_attention_dim=cross_attention_dim,
        attention_head_dim=(2, 4, 8),  # the number of heads, by diffusers' old mistake
        norm_num_groups=8,
        **xl,
    )


def shape_of_xl(encoder: CLIPTextModel, encoder_2: CLIPTextModelWithProjection) -> dict:
    """The settings that make a UNet SDXL's, for two text encoders."""
    time_id_width = 32
    return {
        "cross_attention_dim": encoder.config.hidden_size + encoder_2.config.hidden_size,
        "addition_embed_type": "text_time",
        "addition_time_embed_dim": time_id_width,
        "projection_class_embeddings_input_dim": len(TIME_IDS) * time_id_width + encoder_2.config.projection_dim,
        "use_linear_projection": True,
    }


def build_scheduler() -> DDIMScheduler:
    """Stable Diffusion's noise schedule and DDIM settings."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def text_encoder_of(clip: CLIPModel, kind: type = CLIPTextModel) -> CLIPTextModel | CLIPTextModelWithProjection:
    """The text tower of a CLIP as a text encoder of its own: of Stable Diffusion 1.x, or `kind`."""
    encoder = kind(clip.config.text_config)
    theirs = {name.removeprefix("text_model."): value for name, value in clip.state_dict().items()}
    encoder.load_state_dict({name: theirs[name.removeprefix("text_model.")] for name in encoder.state_dict()})
    return encoder.eval().requires_grad_(False)


def second_tokenizer(folder: Path) -> CLIPTokenizer:
    """The same tokenizer, but it pads with "!", as SDXL's second one does."""
    return CLIPTokenizer.from_pretrained(folder, pad_token="!")


class Conditions:
    """Turns scenes into text hidden states (batch, length, dim) and pooled ones (batch, pooled dim), all smooth.

    - many captions for one scene, words dropped, all cues or none named; a tenth is empty, for guidance;
    - hidden states blurred by noise of a random size, or mixed from two captions of the same scene;
    - 0 to 8 tokens behind the 32 of the prompt. Where the scene has cues these may be hidden states of cue phrases
      that the caption then leaves out, mixed with the state of padding as the cue is weaker; else noise or padding,
      which the network learns to ignore;
    - the word of an emotion means something in "an image of {emotion}" only. Beside content it is drawn at random, so
      that adding it to a prompt is as weak as it is with Stable Diffusion.

    Stable Diffusion has no pooled states (the pooled dim is 0); `ConditionsXL` has.
    """

    kinds, weights = ("content", "full", "cue", "emotion", "null"), (0.24, 0.50, 0.07, 0.08, 0.11)

    def __init__(self, tokenizer: CLIPTokenizer, encoder: CLIPTextModel, device: str, word_share: float):
        self.tokenizer, self.encoder, self.device, self.word_share = tokenizer, encoder, device, word_share
        self.pooled_std = 0.0
        self.phrases, self.rows = {}, 0  # cue -> for each of its phrases, which rows of `words` it has
        for cue, texts in CUE_PHRASES.items():
            lengths = [1 + len(self.tokenizer.tokenize(text)) for text in texts]  # the end token reads all of it
            ends = list(itertools.accumulate(lengths, initial=self.rows))
            self.phrases[cue], self.rows = [range(*pair) for pair in itertools.pairwise(ends)], ends[-1]
        self.refresh()

    def refresh(self):
        """Read the states of padding and of cue phrases anew from the encoder, which may have been trained."""
        self.padding, *states = self.hidden(["", *(text for texts in CUE_PHRASES.values() for text in texts)])
        self.padding = self.padding[-1]  # (dim,)
        lengths = [len(rows) for phrases in self.phrases.values() for rows in phrases]
        self.words = torch.cat([state[1 : 1 + n] for state, n in zip(states, lengths)])  # (rows, dim)
        self.std = self.words.std().item()

    def ids(self, texts: list[str]) -> list[torch.Tensor]:
        """Token ids of texts for each encoder, (batch, length)."""
        return [encode(self.tokenizer, texts)]

    def encoded(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Hidden states (batch, length, dim) and pooled ones (batch, pooled dim) of token ids."""
        states = self.encoder(ids[0].to(self.device)).last_hidden_state.float()
        return states, states.new_zeros((len(states), 0))

    @torch.no_grad()
    def hidden(self, texts: list[str]) -> torch.Tensor:
        return self.encoded(self.ids(texts))[0]

    def null(self, texts: list[str], rng: random.Random) -> list[int]:
        """Which rows stand for the null prompt and are zero."""
        return []

    def drop_words(self, text: str, rng: random.Random) -> str:
        if rng.random() > 0.15 or text.startswith("an image of"):
            return text
        return " ".join(word for word in text.split() if rng.random() > 0.15)

    def add_any_emotion(self, text: str, rng: random.Random) -> str:
        word = rng.choice(EMOTIONS)
        return rng.choice((f"{text}, {word}", f"{text} {word}", f"{word}, {text}", f"{text}, evoking {word}"))

    def extra_tokens(self, scene: Scene, number: int, use_cue: bool, rng: random.Random) -> list[tuple]:
        """How the tokens behind the prompt are made: of how much padding, of which row of `words` and of how much of
        it in the padding's place, and of how much noise."""
        filler = rng.choice(((0, 0, 0, 1), (0, 0, 0, rng.random()), (1, 0, 0, 0.5 * rng.random()), (1, 0, 0, 0)))
        if not use_cue:
            return [filler] * number
        tokens = []
        for name, intensity in rng.sample(scene.cues, rng.choice((1, len(scene.cues)))):
            share = 1.0 if rng.random() < 0.5 else min(1.0, intensity + 0.1)
            tokens += [(1, row, share, 0) for row in rng.choice(self.phrases[name])]
        if rng.random() < 0.3:  # the last state of a phrase has read all of it
            tokens = tokens[-1:] * number
        tokens = tokens[-number:]
        if len(tokens) < number:
            more = (tokens if rng.random() < 0.5 else [filler]) * number
            tokens = (tokens + more)[:number]
        return rng.sample(tokens, number) if rng.random() < 0.3 else tokens

    def draw(self, scenes: list[Scene], rng: random.Random, generator: torch.Generator) -> dict:
        """All that is chosen for a batch, before the encoders read it; no part of it is on the device."""
        number = rng.randint(1, MAX_EXTRA) if rng.random() < 0.6 else 0
        texts, others, extra = [], [], []
        for scene in scenes:
            kind = rng.choices(self.kinds, self.weights)[0]
            use_cue = number > 0 and bool(scene.cues) and kind != "emotion" and rng.random() < 0.6
            if use_cue and kind in ("full", "cue"):
                kind = rng.choice(("content", "content", "content", "full", "null"))
            text = self.drop_words(caption(scene, rng, kind, len(scene.cues)), rng)
            if kind in ("content", "full") and rng.random() < self.word_share:
                text = self.add_any_emotion(text, rng)
            texts.append(text)
            other = kind in ("content", "full") and rng.random() < 0.12
            others.append(caption(scene, rng, kind, len(scene.cues)) if other else text)
            extra.append(self.extra_tokens(scene, number, use_cue, rng) if number else [])
        mixed = [k for k, (text, other) in enumerate(zip(texts, others)) if text != other]
        size = torch.randn((len(scenes), 1, 1), generator=generator).abs() * 0.2
        return {
            "ids": self.ids(texts),
            "mixed": mixed,  # rows that are mixed with another caption of their scene
            "other_ids": self.ids([others[k] for k in mixed]) if mixed else [],
            "share": rng.random(),
            "null": self.null(texts, rng),
            "extra": torch.tensor(extra),  # (batch, number, 4)
            "noise": size * (torch.rand(size.shape, generator=generator) < 0.6),  # in units of `std`
        }

    def states(self, drawn: dict, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        """What `draw` chose as states and pooled states, with noise of the device's generator."""
        states, pooled = self.encoded(drawn["ids"])
        mixed, null = drawn["mixed"], drawn["null"]
        if mixed:
            other_states, other_pooled = self.encoded(drawn["other_ids"])
            states[mixed] = torch.lerp(states[mixed], other_states, drawn["share"])
            pooled[mixed] = torch.lerp(pooled[mixed], other_pooled, drawn["share"])
        states[null], pooled[null] = 0, 0
        if drawn["extra"].numel():
            padding, row, share, sigma = drawn["extra"].to(self.device).unsqueeze(-1).unbind(2)
            words = padding * self.padding + share * (self.words[row[..., 0].long()] - self.padding)
            noise = torch.randn(words.shape, generator=generator, device=self.device)
            states = torch.cat([states, words + sigma * self.std * noise], dim=1)
        size = drawn["noise"].to(self.device)
        states = states + size * self.std * torch.randn(states.shape, generator=generator, device=self.device)
        noise = torch.randn(pooled.shape, generator=generator, device=self.device)
        return states, pooled + size[:, 0] * self.pooled_std * noise


class ConditionsXL(Conditions):
    """The same for SDXL: the last states but one of two encoders side by side, and the second's projected pooled one.

    The null prompt is zero, as the SDXL pipeline makes it (`force_zeros_for_empty_prompt`); a part of the empty texts
    is encoded, as that pipeline does with "" in the place of a prompt.
    """

    def __init__(self, tokenizer, encoder, tokenizer_2, encoder_2, device: str, word_share: float):
        self.tokenizer_2, self.encoder_2 = tokenizer_2, encoder_2
        super().__init__(tokenizer, encoder, device, word_share)
        self.pooled_std = self.encoded(self.ids(contents()))[1].std().item()

    def ids(self, texts: list[str]) -> list[torch.Tensor]:
        return [encode(tokenizer, texts) for tokenizer in (self.tokenizer, self.tokenizer_2)]

    def encoded(self, ids: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        first = self.encoder(ids[0].to(self.device), output_hidden_states=True)
        second = self.encoder_2(ids[1].to(self.device), output_hidden_states=True)
        return torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1), second.text_embeds

    def null(self, texts: list[str], rng: random.Random) -> list[int]:
        return [k for k, text in enumerate(texts) if not text and rng.random() < 0.8]


@torch.no_grad()
def grow(small: UNet2DConditionModel, unet: UNet2DConditionModel, states: torch.Tensor, wide_states: torch.Tensor):
    """Start the SDXL-shaped `unet` as the trained `small` one.

    Its cross-attention reads other text states. By least squares they are mapped onto those that `small` knows, and
    the map is merged into its keys and values; the added conditioning starts without effect.

    Args:
        states: (samples, dim), text states that `small` reads.
        wide_states: (samples, wide dim), the states of the same tokens that `unet` reads.
    """
    bridge = torch.linalg.lstsq(wide_states.double().cpu(), states.double().cpu(), driver="gelsd").solution.float()
    ours, theirs = unet.state_dict(), small.state_dict()
    for name, value in ours.items():
        if name.startswith("add_embedding"):
            continue
        old = theirs[name]
        if old.numel() != value.numel():
            old = old @ bridge.T.to(old.device)
        value.copy_(old.reshape(value.shape))
    for value in unet.add_embedding.linear_2.parameters():
        value.zero_()


def variation(number: int) -> tuple[int, int, int]:
    """How picture number `number` of the world is shown with other time ids: size, top, left."""
    rng = random.Random(f"vary/{number}")
    if rng.random() < 0.5:
        return rng.randint(SIZE // 4, SIZE - 1), 0, 0
    size = rng.randint(SIZE + 4, 3 * SIZE // 2)
    return size, rng.randint(0, size - SIZE), rng.randint(0, size - SIZE)


def varied_time_ids(number: int) -> tuple[int, ...]:
    """The time ids that tell of `variation`."""
    size, top, left = variation(number)
    original = min(size, SIZE)  # a crop is of a picture that was large enough
    return (original, original, top, left, SIZE, SIZE)


def varied(picture: np.ndarray, number: int) -> np.ndarray:
    """A picture that was small once, or is a crop of a larger one."""
    size, top, left = variation(number)
    image = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
    if size < SIZE:
        return np.asarray(image.resize((SIZE, SIZE), Image.Resampling.BICUBIC))
    return np.asarray(image.crop((left, top, left + SIZE, top + SIZE)))


class Latents:
    """Scaled latents of pictures, each encoded when it is first asked for and kept in a file.

    Behind those of the pictures follow those of the first `VARIED` pictures once more, as `vary` changes them.
    On a CPU pictures are encoded one by one, a thread each; elsewhere together.
    """

    def __init__(self, path: Path, vae: AutoencoderKL, pictures: np.ndarray, pool: ThreadPoolExecutor, bfloat16=False):
        if not path.exists():
            save_array(path, np.full((len(pictures) + VARIED, CHANNELS, SIZE // 8, SIZE // 8), np.nan, np.float16))
        self.stored = np.load(path, mmap_mode="r+")
        self.vae, self.pictures, self.pool, self.bfloat16 = vae, pictures, pool, bfloat16

    def picture(self, index: int) -> np.ndarray:
        number = index % len(self.pictures)
        return self.pictures[number] if index < len(self.pictures) else varied(self.pictures[number], number)

    @torch.no_grad()
    def encode(self, indices: list[int], pictures: list[np.ndarray]):
        pixels = to_pixels(np.stack(pictures), self.vae.device)
        with autocast(self.vae.device.type, self.bfloat16):
            latents = self.vae.encode(pixels).latent_dist.mean.float() * self.vae.config.scaling_factor
        self.stored[indices] = latents.half().cpu().numpy()

    def __getitem__(self, indices: list[int]) -> torch.Tensor:
        missing = sorted({index for index in indices if np.isnan(self.stored[index, 0, 0, 0])})
        if missing and self.vae.device.type == "cpu":
            list(self.pool.map(lambda index: self.encode([index], [self.picture(index)]), missing))
        elif missing:
            self.encode(missing, list(self.pool.map(self.picture, missing)))
        return torch.from_numpy(self.stored[indices]).float()


def validation_prompts() -> list[str]:
    """Contents in the first rows, then each emotion's cues named, then the emotions alone."""
    rng = random.Random(0)
    chosen = [
        content_prompt(place, tuple(SUBJECTS)[(k + 3 * j) % 8]) for j in range(3) for k, place in enumerate(PLACES)
    ]
    cues = [f"{rng.choice(chosen)} {rng.choice(CUES[emotion])}" for _ in range(2) for emotion in EMOTIONS]
    return chosen + cues + [f"an image of {emotion}" for emotion in EMOTIONS]


def main():
    parser = arguments(__doc__, steps=5700, batch_size=96, learning_rate=1.5e-3)
    parser.add_argument("--average_decay", type=float, default=0.9995)
    parser.add_argument(
        "--word_share", type=float, default=0.5, help="captions of content with a random emotion's word"
    )
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--layers", type=int, default=1)
    beginning = parser.add_mutually_exclusive_group()
    beginning.add_argument("--xl", action="store_true", help="grow the trained network into an SDXL-shaped one")
    beginning.add_argument("--initial", help="name of the folder to start from, inside the work folder")
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    on_cpu = args.device == "cpu"
    halves, clock = Halves(args.device, args.batch_size), Clock(args.save_minutes)
    scenes, pictures = load_set("world", args.work_dir, SIZE)
    name = "unet_xl" if args.xl else "unet"
    folder, checkpoint = args.work_dir / name, args.work_dir / f"{name}.checkpoint"
    vae = (
        AutoencoderKL.from_pretrained(args.work_dir / "vae").to(args.device, memory_format=torch.channels_last).eval()
    )
    clip = CLIPModel.from_pretrained(args.work_dir / "clip_model").to(args.device).eval()
    tokenizer = CLIPTokenizer.from_pretrained(args.work_dir / "tokenizer")
    if args.xl or args.initial:
        encoder = CLIPTextModel.from_pretrained(
            args.work_dir / ("text_encoder" if args.xl else "text_encoder_initial")
        )
    else:
        encoder = text_encoder_of(clip)
    encoder.to(args.device).eval()
    if on_cpu:
        encoder.set_attn_implementation("eager")
    encoder.requires_grad_(not args.xl)
    conditions = Conditions(tokenizer, encoder, args.device, args.word_share)
    pool = halves.pool if on_cpu else ThreadPoolExecutor(os.cpu_count())
    latents_of = Latents(args.work_dir / "world_latents.npy", vae, pictures, pool, args.bfloat16)
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod.to(args.device)
    parts_of_pipeline = {"vae": vae, "text_encoder": encoder, "tokenizer": tokenizer, "scheduler": scheduler}

    if args.xl:
        clip_xl = CLIPModel.from_pretrained(args.work_dir / "clip_xl")
        encoder_2 = text_encoder_of(clip_xl, CLIPTextModelWithProjection).to(args.device)
        tokenizer_2 = second_tokenizer(args.work_dir / "tokenizer")
        parts_of_pipeline |= {"text_encoder_2": encoder_2, "tokenizer_2": tokenizer_2}
        small, sd_conditions = UNet2DConditionModel.from_pretrained(args.work_dir / "unet"), conditions
        conditions = ConditionsXL(tokenizer, encoder, tokenizer_2, encoder_2, args.device, args.word_share)
        unet = build_unet(args.width, args.layers, **shape_of_xl(encoder, encoder_2))
        rng = random.Random(args.seed)
        captions = [caption(scene, rng) for scene in scenes[:2000]]
        grow(small, unet, sd_conditions.hidden(captions).flatten(0, 1), conditions.hidden(captions).flatten(0, 1))
        time_ids = [varied_time_ids(number) for number in range(len(pictures[:VARIED]))]
        time_ids_of, scenes = torch.tensor([TIME_IDS] * len(scenes) + time_ids), scenes + scenes[:VARIED]
    elif args.initial:
        unet = UNet2DConditionModel.from_pretrained(args.work_dir / args.initial).train()
    else:
        unet = build_unet(args.width, args.layers)
    layout = torch.channels_last if on_cpu else torch.contiguous_format
    unet.to(args.device, memory_format=layout)
    if on_cpu:  # where the backward of the fused kernel is slow
        unet.set_attn_processor(AttnProcessor())
    twin = copy.deepcopy(unet).to(torch.bfloat16) if args.bfloat16 else unet  # computes the gradients
    average = copy.deepcopy(unet).eval().requires_grad_(False)
    optimizer = Muon(unet, args.learning_rate, pool=halves.pool, dtype=torch.bfloat16 if args.bfloat16 else None)
    parts = {"model": unet, "average": average, "optimizer": optimizer}
    if not args.xl:
        average_encoder = copy.deepcopy(encoder).requires_grad_(False)
        optimizer_of_text = torch.optim.AdamW(encoder.parameters(), betas=(0.9, 0.99), weight_decay=0.01)
        parts |= {"text": encoder, "average_text": average_encoder, "optimizer_of_text": optimizer_of_text}
        parts_of_pipeline["text_encoder"] = average_encoder
    start = 0
    if args.resume and checkpoint.exists():
        start = load_checkpoint(checkpoint, **parts)

    def save(step: int):
        save_checkpoint(checkpoint, step, **parts)
        average.save_pretrained(folder)
        if not args.xl:
            average_encoder.save_pretrained(args.work_dir / "text_encoder")

    def show(step: int):
        if args.xl:
            pipe = StableDiffusionXLPipeline(**parts_of_pipeline, unet=average, add_watermarker=False)
        else:
            none = {"safety_checker": None, "feature_extractor": None, "image_encoder": None}
            pipe = StableDiffusionPipeline(**parts_of_pipeline, **none, unet=average, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        prompts = validation_prompts()
        images = pipe(prompts, num_inference_steps=20, generator=torch.Generator().manual_seed(0)).images
        contact_sheet(images, 8).save(args.work_dir / f"{name}_{step:05d}.png")
        pixels = to_pixels(np.stack([np.asarray(image) for image in images[:24]]), args.device)
        truth = torch.tensor([contents().index(prompt) for prompt in prompts[:24]], device=args.device)
        first = (rank_content(clip, tokenizer, pixels).argmax(1) == truth).float().mean().item()
        save_json(args.work_dir / f"{name}_log.json", {"step": step, "first_of_64": first})

    def draw(step: int) -> tuple[list[int], dict]:
        chosen = numbers_of(args.seed, step).integers(len(scenes), size=args.batch_size).tolist()
        rng, generator = random.Random(f"{args.seed}/{step}"), generator_of(args.seed, step)
        return chosen, conditions.draw([scenes[k] for k in chosen], rng, generator)

    bar = progress(start, args.steps, name)
    for step, (chosen, drawn) in zip(bar, drawn_ahead(draw, start, args.steps, args.device)):
        generator = generator_of(args.seed, step, args.device)
        rate = held_learning_rate(step, args.steps, args.learning_rate)
        if not args.xl:
            conditions.refresh()
        with autocast(args.device, args.bfloat16):
            read, pooled = conditions.states(drawn, generator)
        states = read.detach().requires_grad_(not args.xl)
        added = {"text_embeds": pooled, "time_ids": time_ids_of[chosen].to(args.device)} if args.xl else None
        latents = latents_of[chosen].to(args.device)
        noise = torch.randn(latents.shape, generator=generator, device=args.device)
        timesteps = torch.randint(len(alphas), (args.batch_size,), generator=generator, device=args.device)
        signal = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = (signal.sqrt() * latents + (1 - signal).sqrt() * noise).contiguous(memory_format=layout)
        snr = alphas[timesteps] / (1 - alphas[timesteps])
        weight = (snr.clamp(max=SNR_CAP) / snr) / args.batch_size

        def loss_of(
            part: slice, noisy=noisy, noise=noise, timesteps=timesteps, states=states, added=added, weight=weight
        ) -> torch.Tensor:
            predicted = twin(
                noisy[part].to(twin.dtype),
                timesteps[part],
                states[part].to(twin.dtype),
                added_cond_kwargs=added and {key: value[part].to(twin.dtype) for key, value in added.items()},
            ).sample
            errors = F.mse_loss(predicted.float(), noise[part], reduction="none").mean((1, 2, 3))
            return (weight[part] * errors).sum()

        if twin is not unet:
            with torch.no_grad():
                torch._foreach_copy_(list(twin.parameters()), list(unet.parameters()))
        for group in optimizer.param_groups:
            group["lr"] = rate
        loss = halves.descend(loss_of, unet, twin, *([] if args.xl else [states]))
        optimizer.step()
        update_average(average, unet, step, args.average_decay)
        if not args.xl:
            for group in optimizer_of_text.param_groups:
                group["lr"] = TEXT_RATE * rate
            optimizer_of_text.zero_grad()
            read.backward(states.grad)
            torch.nn.utils.clip_grad_norm_(encoder.parameters(), 1.0)
            optimizer_of_text.step()
            update_average(average_encoder, encoder, step, args.average_decay)
        show_loss(bar, step, loss)
        if clock.due() or step + 1 == args.steps:
            save(step + 1)
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            show(step + 1)


if __name__ == "__main__":
    main()
