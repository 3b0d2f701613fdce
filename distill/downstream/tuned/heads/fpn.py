"""The feature pyramid network of detection on the levels of any student, by torchvision's own part.

Source: Lin et al., Feature Pyramid Networks, arXiv 1612.03144; torchvision `ops/feature_pyramid_network.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from dtpipe.distill.student.blocks import build_norm, resize
from dtpipe.distill.student.pyramid import PYRAMID_STRIDES, SimplePyramid
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError

FINEST_STRIDE = 4
POOLED = "pool"
"""Name of the level that only proposals are made on."""


def norm_layer(norm: str) -> Callable[[int], nn.Module] | None:
    """What torchvision's parts take as theirs; None for none, which gives their convolutions a bias."""
    return None if norm == "none" else partial(build_norm, norm)


class DetectionPyramid(nn.Module):
    """Levels of `width` channels at the student's strides from 4 on, named 0, 1, .., and one of twice the last stride.

    A plain transformer's single map is first made into strides 4 to 32; see `SimplePyramid`.
    """

    def __init__(self, student: Student, width: int, norm: str) -> None:
        """The student itself stays outside. Raises: ConfigError for one without a level of stride 4 or more."""
        super().__init__()
        self.used = [idx for idx, stride in enumerate(student.strides) if stride >= FINEST_STRIDE]
        self.simple: SimplePyramid | None = None
        channels: Sequence[int] = [student.channels[idx] for idx in self.used]
        strides: Sequence[int] = [student.strides[idx] for idx in self.used]
        if student.single_scale:
            inner = "group" if norm == "none" else norm
            self.simple = SimplePyramid(student.strides[0], student.channels[0], PYRAMID_STRIDES, inner)
            self.used, channels, strides = [0], self.simple.channels, PYRAMID_STRIDES
        if not self.used:
            raise ConfigError(
                f"student {student.spec.name} has levels of strides {list(student.strides)} alone, and detection needs "
                f"{FINEST_STRIDE} or more; choose another student"
            )
        self.strides = tuple(strides)
        self.names = tuple(str(idx) for idx in range(len(strides)))
        """Of the levels that objects are read from."""
        self.fpn = FeaturePyramidNetwork(list(channels), width, LastLevelMaxPool(), norm_layer(norm))

    def forward(self, levels: Sequence[Tensor], canvas_px: Sequence[int]) -> Mapping[str, Tensor]:
        """The pyramid's levels by name, the pooled one last.

        Shapes: levels of the student -> {name: (B, width, H / stride, W / stride)} of a canvas of H x W px.
        """
        levels = [levels[idx] for idx in self.used]
        levels = levels if self.simple is None else self.simple(levels[0])
        grids = [[-(-side // stride) for side in canvas_px] for stride in self.strides]
        named = zip(self.names, levels, grids, strict=True)
        pyramid: Mapping[str, Tensor] = self.fpn({name: resize(level, grid) for name, level, grid in named})
        return pyramid
