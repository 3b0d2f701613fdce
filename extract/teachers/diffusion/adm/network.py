"""The network of ADM (Dhariwal & Nichol, arXiv 2105.05233, section 3), in every layout that guided-diffusion trains.

A U-Net of residual blocks. The timestep scales and shifts a norm of each block (section 3.1), blocks also halve and
double the resolution, and coarse levels attend over positions.

Modules have the names of diffusers' UNet2DModel, so that taps are spelled alike in all diffusion teachers. Where that
class holds a layout, this one computes the same bits, in the same order: datasets made with it stay what they were. It
does not hold layers of one number of heads at several widths (the 128 px model), other heads in the decoder, or a time
embedding that is wider than the first level (the 512 px model).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpipe.extract.teachers.diffusion.adm.layout import NORM_GROUPS, AdmLayout, AdmSettings

NORM_EPS = 1e-5
MAX_PERIOD = 10_000  # the slowest sinusoid's, in timesteps per radian


class AdmNetwork(nn.Module):
    """One denoising call. It has no dropout, which is off in a teacher, and no classes: see `adm.keys`."""

    def __init__(self, layout: AdmLayout, settings: AdmSettings) -> None:
        super().__init__()
        widths, per_level = layout.widths, layout.num_res_blocks
        num_channels = layout.num_channels or widths[0]
        residual = partial(ResidualBlock, time_channels=4 * num_channels, scale_shift=layout.scale_shift)
        self.time_proj = Sinusoids(num_channels)
        self.time_embedding = TimeEmbedding(num_channels, 4 * num_channels)
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)

        self.down_blocks = nn.ModuleList()
        skips = [widths[0]]  # channels of the maps that the decoder takes up again, last first
        for level, width in enumerate(widths):
            blocks = [residual(channels, width) for channels in (skips[-1], *[width] * (per_level - 1))]
            attentions = (
                [HeadedAttention(width, settings.heads(width)) for _ in blocks] if layout.attention[level] else []
            )
            is_last = level == len(widths) - 1
            halve = residual(width, width, resample=halved) if layout.resblock_updown else Downsample(width)
            self.down_blocks.append(DownStage(blocks, attentions, None if is_last else halve))
            skips += [width] * (per_level if is_last else per_level + 1)

        channels = widths[-1]
        blocks = [residual(channels, channels) for _ in range(2)]
        self.mid_block = MiddleStage(blocks, HeadedAttention(channels, settings.heads(channels)))

        self.up_blocks = nn.ModuleList()
        for level, width in reversed(list(enumerate(widths))):
            blocks = [residual(hidden + skips.pop(), width) for hidden in (channels, *[width] * per_level)]
            heads = settings.heads(width, decoder=True)
            attentions = [HeadedAttention(width, heads) for _ in blocks] if layout.attention[level] else []
            double = residual(width, width, resample=doubled) if layout.resblock_updown else Upsample(width)
            self.up_blocks.append(UpStage(blocks, attentions, double if level else None))
            channels = width

        self.conv_norm_out = group_norm(widths[0])
        self.conv_out = nn.Conv2d(widths[0], layout.out_channels, 3, padding=1)

    def forward(self, images: Tensor, timestep: int | Tensor, return_dict: bool = False) -> tuple[Tensor]:
        """What is predicted of noisy images, all at one timestep or each at its own.

        Shapes: (B, 3, H, W), timestep () or (B,) -> (B, out channels, H, W) in a tuple, as UNet2DModel gives it.
        """
        assert not return_dict
        timesteps = torch.as_tensor(timestep, device=images.device).expand(len(images))
        time = self.time_embedding(self.time_proj(timesteps))
        hidden = self.conv_in(images)
        skips = [hidden]
        for stage in self.down_blocks:
            hidden = stage(hidden, time, skips)
        hidden = self.mid_block(hidden, time)
        for stage in self.up_blocks:
            hidden = stage(hidden, time, skips)
        return (self.conv_out(F.silu(self.conv_norm_out(hidden))),)


class DownStage(nn.Module):
    """A level of the encoder: what each of its layers gives is added to `skips`."""

    def __init__(
        self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module], downsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.downsamplers = None if downsampler is None else nn.ModuleList([downsampler])

    def forward(self, hidden: Tensor, time: Tensor, skips: list[Tensor]) -> Tensor:
        """Shapes: (B, C, H, W), time (B, time channels) -> (B, width, H/2, W/2); (B, width, H, W) at the coarsest."""
        for idx, block in enumerate(self.resnets):
            hidden = block(hidden, time)
            if self.attentions is not None:
                hidden = self.attentions[idx](hidden)
            skips.append(hidden)
        if self.downsamplers is not None:
            hidden = self.downsamplers[0](hidden, time)
            skips.append(hidden)
        return hidden


class MiddleStage(nn.Module):
    """Between encoder and decoder: a block, attention, a block."""

    def __init__(self, blocks: Sequence[nn.Module], attention: nn.Module) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList([attention])

    def forward(self, hidden: Tensor, time: Tensor) -> Tensor:
        """Shapes: (B, C, H, W), time (B, time channels) -> the same."""
        first, last = self.resnets
        middle: Tensor = last(self.attentions[0](first(hidden, time)), time)
        return middle


class UpStage(nn.Module):
    """A level of the decoder: each of its blocks takes the last of `skips` beside what comes from below."""

    def __init__(
        self, blocks: Sequence[nn.Module], attentions: Sequence[nn.Module], upsampler: nn.Module | None
    ) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(blocks)
        self.attentions = nn.ModuleList(attentions) if attentions else None
        self.upsamplers = None if upsampler is None else nn.ModuleList([upsampler])

    def forward(self, hidden: Tensor, time: Tensor, skips: list[Tensor]) -> Tensor:
        """Shapes: (B, C, H, W), time (B, time channels) -> (B, width, 2H, 2W); (B, width, H, W) at the finest."""
        for idx, block in enumerate(self.resnets):
            hidden = block(torch.cat([hidden, skips.pop()], dim=1), time)
            if self.attentions is not None:
                hidden = self.attentions[idx](hidden)
        return hidden if self.upsamplers is None else self.upsamplers[0](hidden, time)


class ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut. With `resample`, both paths change resolution before the first of them."""

    def __init__(
        self,
        channels: int,
        width: int,
        time_channels: int,
        scale_shift: bool,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm1 = group_norm(channels)
        self.conv1 = nn.Conv2d(channels, width, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, 2 * width if scale_shift else width)
        self.norm2 = group_norm(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv_shortcut = None if channels == width else nn.Conv2d(channels, width, 1)

    def forward(self, block_input: Tensor, time: Tensor) -> Tensor:
        """Shapes: (B, channels, H, W), time (B, time channels) -> (B, width, H, W), H and W as `resample` has them."""
        hidden = F.silu(self.norm1(block_input))
        if self.resample is not None:
            block_input, hidden = self.resample(block_input), self.resample(hidden)
        hidden = self.conv1(hidden)
        modulation = self.time_emb_proj(F.silu(time))[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)  # (B, width, 1, 1) both
            hidden = self.norm2(hidden) * (1 + scale) + shift
        else:
            hidden = self.norm2(hidden + modulation)
        shortcut = block_input if self.conv_shortcut is None else self.conv_shortcut(block_input)
        block_output: Tensor = shortcut + self.conv2(F.silu(hidden))
        return block_output


class HeadedAttention(nn.Module):
    """Every position takes from all others, by each head in channels of its own. Shapes: (B, C, H, W) -> the same."""

    def __init__(self, channels: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.group_norm = group_norm(channels)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, hidden: Tensor) -> Tensor:
        positions = self.group_norm(hidden.flatten(2)).transpose(1, 2)  # (B, H W, C)
        q, k, v = (
            projection(positions).unflatten(2, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, H W, C / heads)
            for projection in (self.to_q, self.to_k, self.to_v)
        )
        values = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)  # (B, H W, C)
        output: Tensor = self.to_out[0](values).transpose(1, 2).unflatten(2, hidden.shape[2:]) + hidden
        return output


class Downsample(nn.Module):
    """Half the resolution by a convolution, where blocks do not. Shapes: (B, C, H, W) -> (B, C, H/2, W/2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, hidden: Tensor, _time: Tensor) -> Tensor:
        return self.conv(hidden)  # type: ignore[no-any-return]


class Upsample(nn.Module):
    """Twice the resolution, and a convolution. Shapes: (B, C, H, W) -> (B, C, 2H, 2W)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, hidden: Tensor, _time: Tensor) -> Tensor:
        return self.conv(doubled(hidden))  # type: ignore[no-any-return]


class Sinusoids(nn.Module):
    """A timestep as cosines and sines of ever slower phases, and a zero where channels are odd.

    Shapes: (B,) -> (B, channels), float32.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.channels = channels

    def forward(self, timesteps: Tensor) -> Tensor:
        num = self.channels // 2
        exponents = -math.log(MAX_PERIOD) * torch.arange(num, dtype=torch.float32, device=timesteps.device)
        phases = timesteps[:, None].float() * (exponents / num).exp()
        return F.pad(torch.cat([phases.cos(), phases.sin()], dim=1), (0, self.channels % 2))


class TimeEmbedding(nn.Module):
    """What each residual block is told of the timestep. Shapes: (B, channels) -> (B, time channels)."""

    def __init__(self, channels: int, time_channels: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(channels, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, sinusoids: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sinusoids)))  # type: ignore[no-any-return]


def group_norm(channels: int) -> nn.GroupNorm:
    """A norm as ADM has them all."""
    return nn.GroupNorm(NORM_GROUPS, channels, eps=NORM_EPS)


def halved(hidden: Tensor) -> Tensor:
    """Shapes: (B, C, H, W) -> (B, C, H/2, W/2), the mean of each four."""
    return F.avg_pool2d(hidden, 2)


def doubled(hidden: Tensor) -> Tensor:
    """Shapes: (B, C, H, W) -> (B, C, 2H, 2W), each value four times."""
    if len(hidden) >= 64:  # as diffusers does: torch's kernel for channels_last fails on large batches
        hidden = hidden.contiguous()
    return F.interpolate(hidden, scale_factor=2.0, mode="nearest")
