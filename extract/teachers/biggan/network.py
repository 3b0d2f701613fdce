"""BigGAN's generator in evaluation, as IC-GAN uses it too; what any image is conditioned on comes in as a vector.

Weights are plain: `keys` works spectral norm and standing statistics into them when they are loaded. Modules have the
published names, so a tap `blocks.3.1` is the attention layer of the fourth block and `linear` the first 4x4 map.
Source: Brock et al., arXiv 1809.11096, appendix B; ajbrock/BigGAN-PyTorch, BigGAN.py and layers.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

OUTPUT_EPS = 1e-5  # of the last batch norm, whatever the others have


@dataclass(frozen=True)
class BigGanLayout:
    """What a generator's tensors tell about it."""

    start_px: int
    """Side of the first map; every block doubles it."""
    widths: tuple[int, ...]
    """Channels of the first map, then of each block's output."""
    attention: tuple[bool, ...]
    """For each block, whether an attention layer follows it."""
    z_chunk: int
    """Latent numbers that the first layer takes."""
    condition: int
    """Size of the condition: class embedding, instance embedding, or both."""
    hierarchical: bool
    """Whether each block, too, gets `z_chunk` latent numbers of its own."""

    @property
    def z_size(self) -> int:
        """Latent numbers per image."""
        return self.z_chunk * (len(self.widths) if self.hierarchical else 1)

    @property
    def image_px(self) -> int:
        """Side of the images."""
        return self.start_px << len(self.attention)


class ConditionalNorm(nn.Module):
    """Batch norm with stored statistics whose gain and bias follow from the condition; float32 in any arithmetic."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int, inputs: int, eps: float) -> None:
        super().__init__()
        self.gain = nn.Linear(inputs, channels, bias=False)
        self.bias = nn.Linear(inputs, channels, bias=False)
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))
        self.eps = eps

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """Shapes: (B, C, h, w), (B, inputs) -> (B, C, h, w) float32."""
        with torch.autocast(features.device.type, enabled=False):
            centred = F.batch_norm(features.float(), self.mean, self.var, eps=self.eps)
            gain: Tensor = 1 + self.gain(condition)
            bias: Tensor = self.bias(condition)
            return centred * gain[:, :, None, None] + bias[:, :, None, None]


class OutputNorm(nn.Module):
    """Batch norm with stored statistics and one gain and bias for all images; float32 in any arithmetic."""

    mean: Tensor
    var: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("mean", torch.zeros(channels))
        self.register_buffer("var", torch.ones(channels))

    def forward(self, features: Tensor) -> Tensor:
        """Shapes: (B, C, h, w) -> (B, C, h, w) float32."""
        with torch.autocast(features.device.type, enabled=False):
            return F.batch_norm(features.float(), self.mean, self.var, self.gain, self.bias, eps=OUTPUT_EPS)


class UpBlock(nn.Module):
    """Two convolutions at twice the resolution, beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, condition: int, eps: float) -> None:
        super().__init__()
        self.bn1 = ConditionalNorm(inputs, condition, eps)
        self.bn2 = ConditionalNorm(outputs, condition, eps)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        self.conv_sc = nn.Conv2d(inputs, outputs, 1)

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:
        """Shapes: (B, C, h, w), (B, condition) -> (B, C', 2h, 2w)."""
        hidden: Tensor = self.conv1(_double(F.relu(self.bn1(features, condition))))
        hidden = self.conv2(F.relu(self.bn2(hidden, condition)))
        return hidden + _double(self.conv_sc(features))  # a 1x1 convolution and repeated pixels may swap


class Attention(nn.Module):
    """Every position attends to the maxima of 2x2 positions, beside a skip. Source: SAGAN, arXiv 1805.08318."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.theta = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.phi = nn.Conv2d(channels, channels // 8, 1, bias=False)
        self.g = nn.Conv2d(channels, channels // 2, 1, bias=False)
        self.o = nn.Conv2d(channels // 2, channels, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, features: Tensor, condition: Tensor) -> Tensor:  # noqa: ARG002
        """Shapes: (B, C, h, w) -> (B, C, h, w); the condition, which blocks take, is not used."""
        query = _as_sequence(self.theta(features))  # (B, 1, hw, C/8)
        key = _as_sequence(F.max_pool2d(self.phi(features), 2))  # (B, 1, hw/4, C/8)
        value = _as_sequence(F.max_pool2d(self.g(features), 2))  # (B, 1, hw/4, C/2)
        seen = F.scaled_dot_product_attention(query, key, value, scale=1.0)  # softmax in float32
        mixed: Tensor = self.o(seen.squeeze(1).transpose(1, 2).reshape(len(features), -1, *features.shape[2:]))
        return self.gamma * mixed + features


class BigGanNetwork(nn.Module):
    """From a latent and a condition to an image."""

    def __init__(self, layout: BigGanLayout, bn_eps: float) -> None:
        super().__init__()
        self.layout = layout
        self.bn_eps = bn_eps
        inputs = layout.condition + (layout.z_chunk if layout.hierarchical else 0)
        first, *outputs = layout.widths
        start = (first, layout.start_px, layout.start_px)
        self.linear = nn.Sequential(nn.Linear(layout.z_chunk, first * layout.start_px**2), nn.Unflatten(1, start))
        self.blocks = nn.ModuleList()
        for width, output, attends in zip(layout.widths, outputs, layout.attention, strict=False):
            block = [UpBlock(width, output, inputs, bn_eps), *([Attention(output)] if attends else [])]
            self.blocks.append(nn.ModuleList(block))
        self.output_layer = nn.Sequential(OutputNorm(outputs[-1]), nn.ReLU(), nn.Conv2d(outputs[-1], 3, 3, padding=1))

    def forward(self, z: Tensor, condition: Tensor) -> Tensor:
        """Shapes: (B, z_size), (B, condition) -> (B, 3, H, W) float32 in [-1, 1]."""
        chunks = torch.split(z, self.layout.z_chunk, dim=1)
        features: Tensor = self.linear(chunks[0])
        for block_idx, layers in enumerate(self.blocks):
            seen = torch.cat([condition, chunks[block_idx + 1]], dim=1) if self.layout.hierarchical else condition
            for layer in layers:  # type: ignore[attr-defined]  # a ModuleList of ModuleLists
                features = layer(features, seen)
        image: Tensor = self.output_layer(features)
        return image.float().tanh()


def _double(features: Tensor) -> Tensor:
    return F.interpolate(features, scale_factor=2)


def _as_sequence(features: Tensor) -> Tensor:
    """Shapes: (B, C, h, w) -> (B, 1, hw, C)."""
    return features.flatten(2).transpose(1, 2).unsqueeze(1)
