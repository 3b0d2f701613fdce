"""Fully convolutional heads: a few 3x3 convolutions and a classifier of pixels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dtpipe.distill.student.blocks import conv_norm_relu, resize


class FullyConvolutional(nn.Module):
    """Some of the levels, joined at the finest one's size, through convolutions to logits.

    Source: Long et al., arXiv 1411.4038; layers as mmsegmentation's FCNHead has them, which with several levels is its
    input_transform resize_concat, and with `skip` its concat_input: what went in is joined with what comes out.
    """

    def __init__(
        self,
        channels: Sequence[int],
        num_classes: int,
        width: int,
        norm: str,
        num_convs: int = 1,
        skip: bool = False,
        dropout: float = 0.1,
    ) -> None:
        """`channels` of the levels that it reads, finest first."""
        super().__init__()
        joined = sum(channels)
        self.convs = nn.Sequential(
            *(conv_norm_relu(width if idx else joined, width, 3, norm) for idx in range(num_convs))
        )
        self.skip = conv_norm_relu(joined + width, width, 3, norm) if skip else None
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Shapes: [(B, channels[i], H_i, W_i)], finest first -> (B, K, H_0, W_0)."""
        joined = torch.cat([resize(level, levels[0].shape[-2:]) for level in levels], dim=1)
        features = self.convs(joined)
        if self.skip is not None:
            features = self.skip(torch.cat([joined, features], dim=1))
        logits: Tensor = self.classifier(self.dropout(features))
        return logits
