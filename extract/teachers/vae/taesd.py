"""Tiny autoencoders in their authors' own layout: two files of weights, no config.

What varies between them (latent channels, stride 8 or 32, normalised blocks at the lowest resolution) is read off the
weights. Source: github madebyollin/taesd, taesd.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dtpipe.manifests.errors import TeacherError

WIDTHS = {3: (64, 64, 64, 64), 5: (256, 128, 64, 64, 64, 64)}
"""Decoder channels from the lowest resolution up, by the number of upsamplings."""

LATENT_BOUND = 3  # the decoder squashes latents into [-3, 3]


class TinyLatents(NamedTuple):
    """What diffusers calls the output of an encoder without a posterior."""

    latents: Tensor


class TinyImages(NamedTuple):
    """What diffusers calls the output of a decoder."""

    sample: Tensor


class TinyBlock(nn.Module):
    """Three convolutions beside a skip; where `pool`, normalised over the whole map first."""

    def __init__(self, width: int, pool: bool) -> None:
        super().__init__()
        self.conv = nn.Sequential(_conv(width, width), nn.ReLU(), _conv(width, width), nn.ReLU(), _conv(width, width))
        self.pool = (
            nn.Sequential(_mix(width, 4 * width), nn.GroupNorm(4, 4 * width), nn.ReLU(), _mix(4 * width, width))
            if pool
            else None
        )
        self.fuse = nn.ReLU()

    def forward(self, features: Tensor) -> Tensor:
        if self.pool is not None:
            features = features + self.pool(features)
        fused: Tensor = self.fuse(self.conv(features) + features)
        return fused


class Squash(nn.Module):
    """Latents smoothly bounded."""

    def forward(self, latents: Tensor) -> Tensor:
        return torch.tanh(latents / LATENT_BOUND) * LATENT_BOUND


class TinyAutoencoder(nn.Module):
    """Encoder and decoder, called as diffusers' are: images in [-1, 1]. The weights are for images in [0, 1]."""

    def __init__(self, latent_channels: int, num_upsamplings: int, pool: bool) -> None:
        super().__init__()
        self.encoder = nn.Sequential(*_encoder_layers(latent_channels, num_upsamplings, pool))
        self.decoder = nn.Sequential(*_decoder_layers(latent_channels, WIDTHS[num_upsamplings], pool))

    def encode(self, images: Tensor) -> TinyLatents:
        """Shapes: (B, 3, H, W) -> (B, latent channels, H/stride, W/stride)."""
        return TinyLatents(self.encoder((images + 1) / 2))

    def decode(self, latents: Tensor) -> TinyImages:
        """Shapes: (B, latent channels, h, w) -> (B, 3, H, W)."""
        return TinyImages(self.decoder(latents) * 2 - 1)


def build_tiny(
    encoder: Mapping[str, Tensor], decoder: Mapping[str, Tensor], where: Path
) -> tuple[TinyAutoencoder, dict[str, Tensor]]:
    """The network that the weights ask for, and the weights by its names; they are not loaded yet.

    Raises: TeacherError when the decoder's weights are of no known shape.
    """
    last = max((int(part) for part in (name.split(".")[0] for name in decoder) if part.isdigit()), default=0)
    num_upsamplings, rest = divmod(last - 4, 5)  # three layers before the stages of five, two after
    first = decoder.get("1.weight")
    if rest or num_upsamplings not in WIDTHS or first is None or first.ndim != 4:
        raise TeacherError(
            f"{where}: is not a decoder in the layout of taesd.py; "
            f"convert it to a diffusers AutoencoderTiny and give its folder"
        )
    network = TinyAutoencoder(first.shape[1], num_upsamplings, pool="3.pool.0.weight" in decoder)
    parts = {"encoder": encoder, "decoder": decoder}
    return network, {f"{part}.{name}": tensor for part, tensors in parts.items() for name, tensor in tensors.items()}


def _encoder_layers(latent_channels: int, num_upsamplings: int, pool: bool) -> Iterator[nn.Module]:
    if num_upsamplings == 5:
        yield from (_conv(3, 32, stride=2), nn.ReLU(), _conv(32, 64, stride=2), nn.ReLU())
    else:
        yield _conv(3, 64)
    yield TinyBlock(64, pool=False)
    for lowest in (False, False, True):
        yield _conv(64, 64, stride=2, bias=False)
        yield from (TinyBlock(64, pool and lowest) for _ in range(3))
    yield _conv(64, latent_channels)


def _decoder_layers(latent_channels: int, widths: tuple[int, ...], pool: bool) -> Iterator[nn.Module]:
    yield from (Squash(), _conv(latent_channels, widths[0]), nn.ReLU())
    for stage, (width, next_width) in enumerate(pairwise(widths)):
        yield from (TinyBlock(width, pool and stage == 0) for _ in range(3))
        yield from (nn.Upsample(scale_factor=2), _conv(width, next_width, bias=False))
    yield from (TinyBlock(widths[-1], pool=False), _conv(widths[-1], 3))


def _conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=bias)


def _mix(inputs: int, outputs: int) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, bias=False)
