"""What brings a student's levels to the logits of soft labels: UPerNet's decoder, or a linear head on pooled levels.

In mix distillation the decoder and the regressor are one up to their last layers: one forward pass serves both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from dtpipe.distill.config import DistillRecipeConfig, RegressorConfig
from dtpipe.distill.downstream.tuned.heads.upernet import UPerNet
from dtpipe.distill.student.blocks import resize
from dtpipe.distill.student.pyramid import PYRAMID_STRIDES, SimplePyramid
from dtpipe.distill.student.regressor import FeatureRegressor
from dtpipe.distill.student.student import Student
from dtpipe.manifests.schema import LevelSpec

DECODER, DECODER_EMA, DECODER_SPEC = "decoder", "decoder_ema", "decoder_spec"
"""Under which a checkpoint holds weights, their average, and what they are of."""
SHARING_KIND = "fpn_ppm"
"""The regressor whose laterals and outputs are UPerNet's."""


def reads_maps(labels: LevelSpec) -> bool:
    """Whether there is a class for each position; not where one cell stands for the whole image."""
    return (labels.height, labels.width) != (1, 1)


def decoder_config(config: DistillRecipeConfig) -> RegressorConfig:
    """Width, norm and scales of the pooling inside a decoder."""
    width = config.labels.width or config.regressor.width
    return config.regressor.model_copy(update={"width": width, "kind": SHARING_KIND, "timestep": False})


def shares_layers(config: DistillRecipeConfig, labels: LevelSpec) -> bool:
    """Whether a decoder takes the laterals and outputs of a regressor beside it: both are UPerNet's, of one width."""
    same_width = decoder_config(config).width == config.regressor.width
    return reads_maps(labels) and config.regressor.kind == SHARING_KIND and same_width


class LabelDecoder(nn.Module):
    """A student's levels to logits of the soft labels' size.

    `head` is UPerNet's decoder, or for labels of one cell a linear layer on the coarsest level's mean; `pyramid` makes
    several levels of a plain transformer's one.
    """

    def __init__(
        self, student: Student, labels: LevelSpec, config: DistillRecipeConfig, regressor: FeatureRegressor | None
    ) -> None:
        """`regressor`: what is trained beside it, whose layers it shares where `shares_layers`."""
        super().__init__()
        self.name, self.size = labels.name, (labels.height, labels.width)
        self.pyramid: nn.Module | None = None
        if not reads_maps(labels):
            self.head: nn.Module = PooledHead(student.channels[-1], labels.channels, config.labels.dropout)
            self.shared = False
            return
        channels, own = student.channels, decoder_config(config)
        shared = regressor if shares_layers(config, labels) else None
        self.shared = shared is not None
        if student.single_scale:
            pyramid = SimplePyramid(student.strides[0], channels[0], PYRAMID_STRIDES, own.norm)
            self.pyramid, channels = pyramid, pyramid.channels
        head = UPerNet(channels, labels.channels, own, config.labels.dropout)
        if shared is not None:
            self.pyramid = shared.pyramid
            head.laterals = shared.laterals
            head.outputs = nn.ModuleDict({place: shared.outputs[place] for place in head.outputs})
        self.head = head

    def forward(self, levels: Sequence[Tensor], smooth: Mapping[int, Tensor] | None = None) -> dict[str, Tensor]:
        """Logits under the labels' name; `smooth` is what the regressor's trunk made of the levels.

        Shapes: levels[i] (B, channels[i], H_i, W_i), smooth[i] (B, width, H_i, W_i) -> {name: (B, K, *size)}.
        """
        if self.shared and smooth is not None:
            assert isinstance(self.head, UPerNet)
            logits = self.head.classify([smooth[place] for place in sorted(smooth)])
        else:
            logits = self.head(levels if self.pyramid is None else self.pyramid(levels[0]))
        return {self.name: resize(logits, self.size)}


class PooledHead(nn.Module):
    """A linear layer on the mean of the coarsest level: classes of whole images."""

    def __init__(self, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.dropout = nn.Dropout(dropout)
        self.classifier = nn.Conv2d(channels, num_classes, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Shapes: the student's levels, finest first -> (B, K, 1, 1)."""
        logits: Tensor = self.classifier(self.dropout(levels[-1].mean(dim=(2, 3), keepdim=True)))
        return logits


def decoder_record(labels: LevelSpec, classes: Sequence[str], config: DistillRecipeConfig) -> dict[str, Any]:
    """Plain values that say what a checkpoint's decoder is: enough to build it again."""
    own = decoder_config(config)
    return {
        "kind": "masks" if reads_maps(labels) else "classes",
        "classes": list(classes),
        "width": own.width,
        "norm": own.norm,
        "ppm_scales": list(own.ppm_scales),
        "dropout": config.labels.dropout,
    }
