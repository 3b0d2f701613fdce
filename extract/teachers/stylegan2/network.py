"""StyleGAN2's generator: a mapping network and a synthesis network of skip architecture.

Modules are named as in NVlabs/stylegan2-ada-pytorch, so that its state dicts fit and taps read the same. A level is
what `synthesis.b{r}.conv1` gives: the block's output before toRGB.
Source: Karras et al., arXiv 1912.04958.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, repeat
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

EPSILON = 1e-8
SLOPE, GAIN = 0.2, math.sqrt(2)  # of every leaky ReLU; the gain keeps the second moment
FILTER_TAPS = 4


@dataclass(frozen=True)
class StyleGan2Layout:
    """Sizes of a generator, and what its weights do not tell."""

    z_dim: int
    w_dim: int
    num_classes: int
    embed_dim: int
    """Width of a class's embedding; 0 without classes."""
    mapping_widths: tuple[int, ...]
    """Outputs of each fully connected layer; the last is w_dim."""
    base_px: tuple[int, int]
    """Height and width of the learned constant, 4x4 as published."""
    channels: tuple[int, ...]
    """Of each block, from the constant's resolution up; each block doubles the sides."""
    conv_clamp: float | None = None
    mapping_lr: float = 0.01
    scaled_epsilon: bool = False
    """Whether the demodulation's epsilon is added to weights scaled by 1/sqrt(fan in) (rosinality) or as stored."""

    @property
    def num_styles(self) -> int:
        """Styles that an image takes: one per convolution, and one for the last toRGB."""
        return 2 * len(self.channels)

    def side_px(self, block_idx: int) -> tuple[int, int]:
        """Height and width of a block's output."""
        return self.base_px[0] << block_idx, self.base_px[1] << block_idx

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width of the image."""
        return self.side_px(len(self.channels) - 1)

    @property
    def noise_px(self) -> tuple[tuple[int, int], ...]:
        """Height and width of each noise map, in the layers' order: one for the first block, two for the others."""
        return tuple(self.side_px(idx) for idx in range(len(self.channels)) for _ in range(2 if idx else 1))


def block_name(block_idx: int) -> str:
    """b4, b8, b16 ..., also where the constant is not 4x4."""
    return f"b{4 << block_idx}"


class Linear(nn.Module):
    """Fully connected, with the weight scaled as it is used ("equalised learning rate"); always in float32."""

    def __init__(self, inputs: int, outputs: int, learning_rate: float = 1.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.learning_rate = learning_rate

    def forward(self, x: Tensor) -> Tensor:
        with _float32(x):
            scale = self.learning_rate / math.sqrt(x.shape[1])
            return F.linear(x, self.weight * scale, self.bias * self.learning_rate)


class Mapping(nn.Module):
    """From a latent and a class to a style. Shapes: (B, z_dim), (B, num_classes) or None -> (B, w_dim)."""

    def __init__(self, layout: StyleGan2Layout) -> None:
        super().__init__()
        self.embed = Linear(layout.num_classes, layout.embed_dim) if layout.num_classes else None
        widths = (layout.z_dim + layout.embed_dim, *layout.mapping_widths)
        for idx, (inputs, outputs) in enumerate(pairwise(widths)):
            self.add_module(f"fc{idx}", Linear(inputs, outputs, layout.mapping_lr))
        self.num_layers = len(layout.mapping_widths)
        self.register_buffer("w_avg", torch.empty(layout.w_dim))

    def forward(self, z: Tensor, one_hot: Tensor | None = None) -> Tensor:
        x = _unit_second_moment(z)
        if self.embed is not None:
            x = torch.cat([x, _unit_second_moment(self.embed(one_hot))], dim=1)
        for idx in range(self.num_layers):
            x = _activate(getattr(self, f"fc{idx}")(x))
        return x


class StyledConv(nn.Module):
    """Modulated 3x3 convolution, noise, bias, leaky ReLU; `up` doubles the sides first.

    The style scales the input's channels and the demodulation the output's, which equals scaling the weights of each
    sample apart (eq. 1-3), needs no weights per sample and mixes no samples.
    """

    def __init__(self, inputs: int, outputs: int, layout: StyleGan2Layout, side_px: tuple[int, int], up: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(outputs, inputs, 3, 3))
        self.bias = nn.Parameter(torch.empty(outputs))
        self.affine = Linear(layout.w_dim, inputs)
        self.noise_strength = nn.Parameter(torch.empty(()))
        self.register_buffer("noise_const", torch.empty(side_px))
        self.register_buffer("resample_filter", torch.empty(FILTER_TAPS, FILTER_TAPS) if up else None)
        self.conv_clamp = layout.conv_clamp
        fan_in = inputs * 9
        self.scale = 1 / math.sqrt(fan_in)  # keeps the convolution's output in float16's range
        self.epsilon = EPSILON * fan_in if layout.scaled_epsilon else EPSILON

    def forward(self, x: Tensor, style: Tensor, noise: Tensor | None) -> Tensor:
        """Shapes: (B, I, h, w), (B, w_dim), (B or 1, 1, H, W) -> (B, O, H, W), float32."""
        scales = self.affine(style)  # (B, I)
        x = x * _per_channel(scales * self.scale)
        x = self._up(x) if self.resample_filter is not None else F.conv2d(x, self.weight, padding=1)
        x = x * _per_channel(self._demodulation(scales) / self.scale)
        if noise is not None:
            x = x + noise * self.noise_strength
        return _clamp(_activate(x + _per_channel(self.bias[None])), self.conv_clamp)

    def _demodulation(self, scales: Tensor) -> Tensor:
        """One over the norm of each output channel's scaled weights. Shapes: (B, I) -> (B, O)."""
        with _float32(scales):
            return (F.linear(scales.square(), self.weight.square().sum((2, 3))) + self.epsilon).rsqrt()

    def _up(self, x: Tensor) -> Tensor:
        """Transposed convolution, then the low-pass filter. Shapes: (B, I, h, w) -> (B, O, 2h, 2w)."""
        x = F.conv_transpose2d(x, self.weight.transpose(0, 1), stride=2)  # (B, O, 2h + 1, 2w + 1)
        kernel = cast(Tensor, self.resample_filter).flip((0, 1)) * 4
        return F.conv2d(x, kernel.expand(x.shape[1], 1, -1, -1), padding=1, groups=x.shape[1])


class ToRgb(nn.Module):
    """Modulated 1x1 convolution to colours, without demodulation. Shapes: (B, I, H, W), (B, w_dim) -> (B, 3, H, W)."""

    def __init__(self, inputs: int, layout: StyleGan2Layout) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(3, inputs, 1, 1))
        self.bias = nn.Parameter(torch.empty(3))
        self.affine = Linear(layout.w_dim, inputs)
        self.conv_clamp = layout.conv_clamp

    def forward(self, x: Tensor, style: Tensor) -> Tensor:
        scales = self.affine(style) / math.sqrt(x.shape[1])
        colours = F.conv2d(x * _per_channel(scales), self.weight).float()
        return _clamp(colours + _per_channel(self.bias[None]), self.conv_clamp)


class SynthesisBlock(nn.Module):
    """One resolution: the constant or an upsampling convolution, a convolution, and colours added to the image."""

    def __init__(self, layout: StyleGan2Layout, idx: int) -> None:
        super().__init__()
        outputs, side_px = layout.channels[idx], layout.side_px(idx)
        if idx == 0:
            self.const = nn.Parameter(torch.empty(outputs, *side_px))
        else:
            self.conv0 = StyledConv(layout.channels[idx - 1], outputs, layout, side_px, up=True)
            self.register_buffer("resample_filter", torch.empty(FILTER_TAPS, FILTER_TAPS))
        self.conv1 = StyledConv(outputs, outputs, layout, side_px, up=False)
        self.torgb = ToRgb(outputs, layout)

    def forward(
        self, x: Tensor | None, image: Tensor | None, styles: Iterator[Tensor], noise: Iterator[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """The features and the image so far; `styles` gives those of this block, toRGB's last."""
        style = next(styles)
        if x is None:
            x = self.const.expand(len(style), -1, -1, -1)
        else:
            x = self.conv0(x, style, next(noise))
            style = next(styles)
        x = self.conv1(x, style, next(noise))
        colours = self.torgb(x, next(styles))
        return x, colours if image is None else colours + _up_image(image, cast(Tensor, self.resample_filter))


class Synthesis(nn.Module):
    """From styles to an image."""

    def __init__(self, layout: StyleGan2Layout) -> None:
        super().__init__()
        self.num_blocks = len(layout.channels)
        for idx in range(self.num_blocks):
            self.add_module(block_name(idx), SynthesisBlock(layout, idx))

    def forward(self, styles: Tensor, noise: Sequence[Tensor] | None) -> Tensor:
        """Shapes: (B, num_styles, w_dim), one (B or 1, 1, h, w) per convolution or None -> (B, 3, H, W), float32."""
        by_conv, maps = styles.unbind(1), repeat(None) if noise is None else iter(noise)
        x: Tensor | None = None
        image: Tensor | None = None
        for idx in range(self.num_blocks):
            first = max(2 * idx - 1, 0)  # toRGB's style is also the next block's first
            x, image = getattr(self, block_name(idx))(x, image, iter(by_conv[first:]), maps)
        return cast(Tensor, image)


class StyleGan2Network(nn.Module):
    """Mapping and synthesis. Its parameters are empty until weights are loaded."""

    def __init__(self, layout: StyleGan2Layout) -> None:
        super().__init__()
        self.layout = layout
        self.mapping = Mapping(layout)
        self.synthesis = Synthesis(layout)

    def styles(
        self, z: Tensor, one_hot: Tensor | None, truncation_psi: float = 1.0, truncation_cutoff: int | None = None
    ) -> Tensor:
        """A style for each convolution, the first `truncation_cutoff` (default: all) drawn towards the mean style.

        Shapes: (B, z_dim), (B, num_classes) or None -> (B, num_styles, w_dim).
        """
        style = self.mapping(z, one_hot)
        drawn = torch.lerp(cast(Tensor, self.mapping.w_avg), style, truncation_psi) if truncation_psi != 1 else style
        num_drawn = self.layout.num_styles if truncation_cutoff is None else truncation_cutoff
        return torch.stack([drawn if idx < num_drawn else style for idx in range(self.layout.num_styles)], dim=1)

    def noise_maps(self, flat: Tensor) -> list[Tensor]:
        """One map per convolution. Shapes: (B, all values) -> (B, 1, h, w) each."""
        sizes = self.layout.noise_px
        parts = torch.split(flat, [height * width for height, width in sizes], dim=1)
        return [part.reshape(-1, 1, *side_px) for part, side_px in zip(parts, sizes, strict=True)]

    def constant_noise(self) -> list[Tensor]:
        """The maps that the checkpoint holds. Shapes: (1, 1, h, w) each."""
        layers = [module for module in self.synthesis.modules() if isinstance(module, StyledConv)]
        return [cast(Tensor, layer.noise_const)[None, None] for layer in layers]


def _unit_second_moment(x: Tensor) -> Tensor:
    return x * (x.square().mean(dim=1, keepdim=True) + EPSILON).rsqrt()


def _activate(x: Tensor) -> Tensor:
    return F.leaky_relu(x, SLOPE) * GAIN


def _clamp(x: Tensor, limit: float | None) -> Tensor:
    return x if limit is None else x.clamp(-limit, limit)


def _per_channel(values: Tensor) -> Tensor:
    return values[:, :, None, None]


def _up_image(image: Tensor, resample_filter: Tensor) -> Tensor:
    """Zeros put between the pixels, then the low-pass filter. Shapes: (B, 3, h, w) -> (B, 3, 2h, 2w)."""
    with _float32(image):
        kernel = (resample_filter * 4).expand(image.shape[1], 1, -1, -1)
        return F.conv_transpose2d(image, kernel, stride=2, padding=1, groups=image.shape[1])


def _float32(x: Tensor) -> Any:
    """No lower precision inside, whatever surrounds it."""
    return torch.autocast(x.device.type, enabled=False)
