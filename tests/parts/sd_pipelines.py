"""Stable Diffusion pipelines of a few kilobytes in the published folder layout, and a plain forward pass through them.

The weights are random. Names are spelt as in the files of Stable Diffusion 1: the VAE's attention as before diffusers
0.14, the text encoder's tensors with their prefix and a position buffer.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DDPMScheduler, PNDMScheduler, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from parts.tensors import hooked

PX = 64
WIDTH = 16  # of the text embedding
TOKENS = 12
UNET = "unet/diffusion_pytorch_model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
TEXT = "text_encoder/model.safetensors"
BETAS = {"num_train_timesteps": 1000, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
OLD_NAMES = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}


def save_pipeline(root: Path, prediction: str = "epsilon", pad: str = "<|endoftext|>", **unet: Any) -> Path:
    """A tiny Stable Diffusion; keyword arguments replace settings of its U-Net."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _save_pipeline(root, prediction, pad, unet)


def _save_pipeline(root: Path, prediction: str, pad: str, unet: Mapping[str, Any]) -> Path:
    settings: dict[str, Any] = {
        "sample_size": PX // 8,
        "block_out_channels": (8, 16, 24, 32),
        "layers_per_block": 1,
        "norm_num_groups": 4,
        "cross_attention_dim": WIDTH,
        "attention_head_dim": 2,
    }
    UNet2DConditionModel(**{**settings, **unet}).save_pretrained(root / "unet")
    save_vae(root / "vae")
    save_text_encoder(root / "text_encoder")
    save_tokenizer(root / "tokenizer", pad)
    PNDMScheduler(**BETAS, prediction_type=prediction, steps_offset=1, skip_prk_steps=True).save_pretrained(
        root / "scheduler"
    )
    (root / "model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))
    return root


def save_vae(folder: Path) -> None:
    channels = (4, 8, 8, 8)
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * 4, "up_block_types": ("UpDecoderBlock2D",) * 4}
    AutoencoderKL(block_out_channels=channels, norm_num_groups=4, sample_size=PX, **blocks).save_pretrained(folder)
    path = folder / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(path).items():
        for new, old in OLD_NAMES.items():
            name = name.replace(f".attentions.0.{new}.", f".attentions.0.{old}.")
        renamed[name] = tensor
    save_file(renamed, path, metadata={"format": "pt"})


def save_text_encoder(folder: Path) -> None:
    config = CLIPTextConfig(
        vocab_size=58,
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=TOKENS,
        bos_token_id=56,
        eos_token_id=57,
    )
    encoder = CLIPTextModel(config)
    folder.mkdir(parents=True, exist_ok=True)
    settings = config.to_dict() | {"architectures": ["CLIPTextModel"], "model_type": "clip_text_model"}
    (folder / "config.json").write_text(json.dumps(settings))
    tensors = {
        f"text_model.{name.removeprefix('text_model.')}": tensor.contiguous()
        for name, tensor in encoder.state_dict().items()
    }
    tensors["text_model.embeddings.position_ids"] = torch.arange(TOKENS)[None]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(folder: Path, pad: str) -> None:
    """A byte-pair vocabulary of the letters and `cat`: a</w> is 27, cat</w> 55, begin 56, end 57, ! 26."""
    letters = "abcdefghijklmnopqrstuvwxyz!"
    begin, end = "<|startoftext|>", "<|endoftext|>"
    words = [*letters, *(f"{letter}</w>" for letter in letters), "ca", "cat</w>", begin, end]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({word: idx for idx, word in enumerate(words)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    special = {"bos_token": begin, "eos_token": end, "unk_token": end, "pad_token": pad}
    (folder / "special_tokens_map.json").write_text(json.dumps(special))
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": TOKENS, "do_lower_case": True, **special}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def plain_text(root: Path, prompt: str) -> torch.Tensor:
    """A prompt embedded by transformers alone. Shapes: -> (1, T, D)."""
    tokenizer = CLIPTokenizer.from_pretrained(root / "tokenizer", local_files_only=True)
    encoder = CLIPTextModel.from_pretrained(root / "text_encoder", local_files_only=True).eval()
    ids = tokenizer(prompt, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        embedding: torch.Tensor = encoder(ids).last_hidden_state
    return embedding


def plain_features(
    root: Path,
    images: torch.Tensor,
    noise: torch.Tensor,
    timestep: int,
    taps: Mapping[str, str],
    prompt: str = "",
    vae_noise: torch.Tensor | None = None,
) -> dict[str, torch.Tensor]:
    """Features by diffusers' own loading, VAE, scheduler and whole forward pass under the text, with hooks.

    Shapes: images (B, 3, H, W), noise (B, 4, H/8, W/8) -> {level: (B, C, h, w)}.
    """
    vae = AutoencoderKL.from_pretrained(root / "vae", local_files_only=True).eval()
    unet = UNet2DConditionModel.from_pretrained(root / "unet", local_files_only=True).eval()
    text = plain_text(root, prompt).expand(len(images), -1, -1)
    with torch.no_grad():
        posterior = vae.encode(images).latent_dist
        latents = posterior.mean if vae_noise is None else posterior.mean + posterior.std * vae_noise
        steps = torch.full((len(images),), timestep)
        noisy = DDPMScheduler(**BETAS).add_noise(latents * vae.config.scaling_factor, noise, steps)
    return hooked(unet, taps, lambda: unet(noisy, steps, text))
