"""UPerNet's decoder: pyramid pooling on the coarsest level, a top-down path, and all levels joined at the finest size.

It is built of the regressor's blocks and keeps their names.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.student.blocks import conv_norm_relu, resize
from dtpipe.distill.student.regressors.base import lateral
from dtpipe.distill.student.regressors.fpn_ppm import pooling_lateral


class UPerNet(nn.Module):
    """Levels to logits of the finest level's size.

    `laterals.*` and `outputs.*` have the names and, at equal width and norm, the shapes that they have in a
    `FeatureRegressor` of kind fpn_ppm whose targets have all strides of the student. Laterals are 1x1 convolutions, the
    last is the pyramid pooling (`branches`, `join`); outputs are 3x3 convolutions of all levels but the coarsest. A
    regressor's `heads.*`, to the teacher's channels, have no counterpart here, nor have `fuse` and `classifier` there;
    its `pyramid.*` is that of `HeadLevels`, whose norms of a ConvNeXt's levels it lacks. So mix distillation trains
    regressor and decoder as one, and a task starts from that decoder (appendix G.4).

    Source: Xiao et al., arXiv 1807.10221; layers and sizes as mmsegmentation's UPerHead has them.
    """

    def __init__(
        self, channels: Sequence[int], num_classes: int, config: RegressorConfig, dropout: float = 0.1
    ) -> None:
        """`channels` of the levels, finest first; `config` gives width, norm and scales of the pooling."""
        super().__init__()
        width, norm, last = config.width, config.norm, len(channels) - 1
        self.laterals = nn.ModuleList(lateral(number, config) for number in channels[:-1])
        self.laterals.append(pooling_lateral(channels[-1], config))
        self.outputs = nn.ModuleDict({str(idx): conv_norm_relu(width, width, 3, norm) for idx in range(last)})
        self.fuse = conv_norm_relu(len(channels) * width, width, 3, norm)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(width, num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Shapes: [(B, channels[i], H_i, W_i)], finest first -> (B, K, H_0, W_0)."""
        merged = [convolve(level) for convolve, level in zip(self.laterals, levels, strict=True)]
        for idx in range(len(merged) - 2, -1, -1):
            merged[idx] = merged[idx] + resize(merged[idx + 1], merged[idx].shape[-2:])
        smooth = [output(level) for output, level in zip(self.outputs.values(), merged[:-1], strict=True)]
        return self.classify([*smooth, merged[-1]])

    def classify(self, smooth: Sequence[Tensor]) -> Tensor:
        """Logits from what laterals, top-down path and outputs made of the levels.

        Shapes: [(B, width, H_i, W_i)], finest first -> (B, K, H_0, W_0).
        """
        same = [resize(level, smooth[0].shape[-2:]) for level in smooth]
        logits: Tensor = self.classifier(self.dropout(self.fuse(torch.cat(same, dim=1))))
        return logits
