# Copyright 2026 The MUSE authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Measures what a small `preview_vae` saves on Storybook, and what it costs, against the full VAE.

The gradients first: those of the loss with respect to the emotional tokens, through either decoder, with the same
tokens on the same path, step by step. Then time and memory of a decoder's forward and backward pass. Writes
`preview_vae.json`. Whole runs are rows of `frontier.py`.

    python examples/storybook/train_preview_vae.py
    python examples/storybook/preview_vae.py
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import save_json
from diffusers import AutoencoderKL, AutoencoderTiny
from muse_examples.evaluation.data import Case, Content, plan
from muse_examples.measuring import processor
from muse_examples.pipelines import settings_of
from repository import ROOT
from test_sets import SEED, prompts
from world import EMOTIONS

from pipeline_muse import MusePipeline


DECODERS = ("vae", "preview_vae")
CALL = settings_of(str(ROOT))["call"]
STANDSTILL = 1e-12  # a learning rate that moves no token, so that both decoders are asked along the same path


def pairs(count: int) -> list[Case]:
    """So many prompts, each with another emotion."""
    cases = plan([Content(prompt) for prompt in prompts(count)], EMOTIONS, None, seed=SEED)
    return [cases[(len(EMOTIONS) + 1) * number % len(cases)] for number in range(count)]


def latent_shape(vae: AutoencoderKL) -> tuple[int, int, int]:
    """The shape of a picture's latents."""
    side = vae.config.sample_size // 2 ** (len(vae.config.block_out_channels) - 1)
    return vae.config.latent_channels, side, side


def token_gradients(pipe: MusePipeline, case: Case, steps: int, tokens: torch.Tensor | None) -> torch.Tensor:
    """The gradients at `tokens`, or at those that a run starts with, of all denoising steps: (steps, n * D)."""
    gradients: list[torch.Tensor] = []

    def see(unet: torch.nn.Module, arguments: tuple, keywords: dict) -> None:
        embeds = keywords["encoder_hidden_states"]
        if embeds.requires_grad:  # the tokens stand behind the prompt
            length = pipe.tokenizer.model_max_length
            embeds.register_hook(lambda gradient: gradients.append(gradient[:, length:].flatten()))

    hook = pipe.unet.register_forward_pre_hook(see, with_kwargs=True)
    try:
        pipe(
            case.prompt,
            emotion=case.emotion,
            emotion_tokens="random" if tokens is None else tokens,
            generator=torch.Generator().manual_seed(case.seed),
            num_inference_steps=steps,
            semantic_threshold=0.0,
            max_inner_steps=1,
            emotion_learning_rate=STANDSTILL,
            loss_threshold=0.0,
            inherent_weight=0.0,  # with these terms a loss may fall below the threshold, which ends the loop
            similar_weight=0.0,
            output_type="latent",
        )
    finally:
        hook.remove()
    return torch.stack(gradients)


def compare_gradients(preview_vae: AutoencoderTiny, cases: list[Case], steps: int) -> dict[str, Any]:
    """Cosines of the gradients through either decoder, by denoising step, at the first and at the final tokens."""
    pipe = MusePipeline.from_pretrained(ROOT, trust_remote_code=True)
    pipe.set_progress_bar_config(disable=True)
    final = pipe(
        [case.prompt for case in cases],
        emotion=[case.emotion for case in cases],
        generator=[torch.Generator().manual_seed(case.seed) for case in cases],
        num_inference_steps=steps,
        semantic_threshold=0.0,
        output_type="latent",
    ).emotion_tokens
    result: dict[str, Any] = {"pairs": len(cases)}
    for name, starts in (("first tokens", [None] * len(cases)), ("final tokens", final)):
        gradients = []
        for decoder in (None, preview_vae):
            pipe.register_modules(preview_vae=decoder)
            told = [token_gradients(pipe, case, steps, start) for case, start in zip(cases, starts)]
            gradients.append(torch.stack(told, dim=1))
        cosines = F.cosine_similarity(*gradients, dim=-1)  # (steps, cases)
        ratios = gradients[1].norm(dim=-1) / gradients[0].norm(dim=-1)
        result[name] = {
            "mean": cosines.mean().item(),
            "least": cosines.min().item(),
            "by_step": [round(value, 4) for value in cosines.mean(dim=1).tolist()],
            "least_by_step": [round(value, 4) for value in cosines.amin(dim=1).tolist()],
            "median ratio of norms": ratios.median().item(),
        }
        pipe.register_modules(preview_vae=None)
    return result


def cost_of(decoder: AutoencoderKL | AutoencoderTiny, latents: torch.Tensor) -> dict[str, float]:
    """Milliseconds of CPU time per image of a decoder's passes forth and back, and MiB that it keeps in between."""
    decoder.requires_grad_(False)
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {weight.untyped_storage().data_ptr() for weight in decoder.parameters()}
    latents = latents.clone().requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        decoder.decode(latents).sample.sum().backward()
    activations = sum(size for place, size in kept.items() if place not in weights)
    best = float("inf")
    for _ in range(5):
        start = time.process_time()
        decoder.decode(latents).sample.sum().backward()
        best = min(best, time.process_time() - start)
    return {
        "parameters": sum(weight.numel() for weight in decoder.decoder.parameters()),
        "milliseconds": 1000 * best / len(latents),
        "MiB": activations / len(latents) / 2**20,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    trained = Path(tempfile.gettempdir()) / "storybook" / "preview_vae"
    parser.add_argument("--preview_vae", type=Path, default=trained, help="Default: %(default)s.")
    parser.add_argument("--pairs", type=int, default=8, help="prompts with emotions whose gradients are compared")
    parser.add_argument("--steps", type=int, default=CALL["num_inference_steps"], help="denoising steps")
    parser.add_argument("--batch_size", type=int, default=16, help="of the passes that are timed")
    parser.add_argument("--results_dir", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    torch.set_num_threads(1)
    tiny = AutoencoderTiny.from_pretrained(args.preview_vae).eval()
    full = AutoencoderKL.from_pretrained(ROOT / "vae").eval()
    latents = torch.randn((args.batch_size, *latent_shape(full)), generator=torch.Generator().manual_seed(0))
    record = {
        "protocol": {"pairs": args.pairs, "steps": args.steps, "batch_size": args.batch_size},
        "hardware": f"one core of {os.cpu_count()} of an {processor()}, torch {torch.__version__}",
        "gradients": compare_gradients(tiny, pairs(args.pairs), args.steps),
        "cost": {name: cost_of(part, latents) for name, part in zip(DECODERS, (full, tiny))},
    }
    save_json(args.results_dir / "preview_vae.json", record)
    print(json.dumps(record, indent=1))


if __name__ == "__main__":
    main()
