"""The feature pyramid network of detection on the levels of any student, by torchvision's own part.

Source: Lin et al., Feature Pyramid Networks, arXiv 1612.03144; torchvision `ops/feature_pyramid_network.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial

from torch import Tensor, nn
from torchvision.ops.feature_pyramid_network import FeaturePyramidNetwork, LastLevelMaxPool

from dtpipe.distill.downstream.tuned.heads.levels import HeadLevels
from dtpipe.distill.student.blocks import build_norm, resize
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError

_FINEST = 4


def norm_layer(norm: str) -> Callable[[int], nn.Module] | None:
    """What torchvision's parts take as theirs; None for none, which gives their convolutions a bias."""
    return None if norm == "none" else partial(build_norm, norm)


class DetectionPyramid(nn.Module):
    """Levels of `width` channels at the student's strides from 4 on, named 0, 1, .., and one of twice the last stride.

    A plain transformer's single map is first made into strides 4 to 32; see `HeadLevels`.
    """

    def __init__(self, student: Student, width: int, norm: str) -> None:
        """The student itself stays outside. Raises: ConfigError for one without a level of stride 4 or more."""
        super().__init__()
        self.levels = HeadLevels(student, "group" if norm == "none" else norm)
        self.used = [idx for idx, stride in enumerate(self.levels.strides) if stride >= _FINEST]
        if not self.used:
            raise ConfigError(
                f"student {student.spec.name} has levels of strides {list(student.strides)} alone, and detection needs "
                f"{_FINEST} or more; choose another student"
            )
        self.strides = tuple(self.levels.strides[idx] for idx in self.used)
        self.names = tuple(str(idx) for idx in range(len(self.used)))
        """Of the levels that objects are read from."""
        channels = [self.levels.channels[idx] for idx in self.used]
        self.fpn = FeaturePyramidNetwork(channels, width, LastLevelMaxPool(), norm_layer(norm))

    def forward(self, levels: Sequence[Tensor], canvas_px: Sequence[int]) -> Mapping[str, Tensor]:
        """The pyramid's levels by name, the pooled one last.

        Shapes: levels of the student -> {name: (B, width, H / stride, W / stride)} of a canvas of H x W px.
        """
        given = self.levels(levels)
        grids = [[-(-side // stride) for side in canvas_px] for stride in self.strides]
        named = zip(self.names, (given[idx] for idx in self.used), grids, strict=True)
        pyramid: Mapping[str, Tensor] = self.fpn({name: resize(level, grid) for name, level, grid in named})
        return pyramid
