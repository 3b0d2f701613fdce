"""The feature interpreter: from a teacher's levels to the logits of classes that few images are labelled with.

Section 3.2 and appendix D.2 of the paper. Any levels of any strides go in; several views of an image, such as
timesteps, lie one after the other in the channels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from dtpipe.distill.student.blocks import build_norm, resize
from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.labels import ClassTable

LabelKind = Literal["masks", "classes"]


@dataclass(frozen=True)
class InterpreterLevel:
    """One level that an interpreter reads."""

    name: str
    """As in the feature dataset."""
    stride: int
    channels: int
    """Of one view."""


@dataclass(frozen=True)
class InterpreterSpec:
    """What is needed to build an interpreter again."""

    levels: tuple[InterpreterLevel, ...]
    classes: ClassTable
    kind: LabelKind = "masks"
    """masks: a class for every position; classes: one for the whole image."""
    num_views: int = 1
    """Views of an image that are read together."""
    width: int = 256
    dropout: float = 0.1


class FeatureInterpreter(nn.Module):
    """Levels to logits, by a series of feature fusion layers from the coarsest level to the finest.

    Source: section 3.2 and appendix D.2. The order within a layer and the 1x1 convolution of the coarsest level, which
    the paper leaves open, are ours.
    """

    def __init__(self, spec: InterpreterSpec) -> None:
        """Raises: ConfigError for a spec without levels."""
        super().__init__()
        if not spec.levels:
            raise ConfigError("an interpreter reads at least one level")
        self.spec, width = spec, spec.width
        order = sorted(spec.levels, key=lambda level: (-level.stride, level.name))
        self.names = tuple(level.name for level in order)
        self.laterals = nn.ModuleList(conv_norm_swish(level.channels * spec.num_views, width) for level in order)
        self.fusions = nn.ModuleList(separable(2 * width, width) for _ in order[1:])
        self.dropout = nn.Dropout2d(spec.dropout) if spec.kind == "masks" else nn.Dropout(spec.dropout)
        self.classifier = nn.Conv2d(width, len(spec.classes), 1)

    def forward(self, levels: Mapping[str, Tensor]) -> Tensor:
        """Logits of the finest level's size, or one vector per image for a head of classes.

        Shapes: {level: (B, V * C, h, w)} of the spec's levels -> (B, K, H, W) or (B, K, 1, 1), float32.
        Raises: ShapeError for other levels or channels.
        """
        self._check(levels)
        laterals = (lateral(levels[name]) for name, lateral in zip(self.names, self.laterals, strict=True))
        fused = next(laterals)
        for lateral, fuse in zip(laterals, self.fusions, strict=True):
            fused = fuse(torch.cat([resize(fused, lateral.shape[-2:]), lateral], dim=1))
        if self.spec.kind == "classes":
            fused = fused.mean(dim=(2, 3), keepdim=True)
        logits: Tensor = self.classifier(self.dropout(fused))
        return logits.float()

    def _check(self, levels: Mapping[str, Tensor]) -> None:
        for level in self.spec.levels:
            expected = level.channels * self.spec.num_views
            if level.name not in levels:
                raise ShapeError(f"the interpreter reads level {level.name}, the features have {sorted(levels)}")
            if levels[level.name].shape[1] != expected:
                found = tuple(levels[level.name].shape)
                raise ShapeError(f"the interpreter reads {expected} channels of level {level.name}, found {found}")


def conv_norm_swish(channels_in: int, channels_out: int) -> nn.Sequential:
    """1x1 convolution, group norm of 32 groups, Swish. Shapes: (B, channels_in, H, W) -> (B, channels_out, H, W)."""
    conv = nn.Conv2d(channels_in, channels_out, 1, bias=False)
    return nn.Sequential(conv, build_norm("group", channels_out), nn.SiLU(inplace=True))


def separable(channels_in: int, channels_out: int) -> nn.Sequential:
    """3x3 convolution of each channel by itself, then `conv_norm_swish`.

    Shapes: (B, channels_in, H, W) -> (B, channels_out, H, W).
    """
    by_channel = nn.Conv2d(channels_in, channels_in, 3, padding=1, groups=channels_in, bias=False)
    return nn.Sequential(by_channel, *conv_norm_swish(channels_in, channels_out))


def views_in_channels(levels: Mapping[str, Sequence[Tensor]]) -> dict[str, Tensor]:
    """Views of the same images one after the other in the channels, as an interpreter reads them.

    Shapes: {level: [(B, C, h, w)] of V views} -> {level: (B, V * C, h, w)}.
    """
    return {name: torch.cat([view.float() for view in views], dim=1) for name, views in levels.items()}
