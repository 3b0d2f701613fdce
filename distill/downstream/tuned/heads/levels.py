"""A student's levels as heads take them: several strides also of a plain transformer, normed ones of a ConvNeXt."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager

from timm.layers.norm import LayerNorm2d
from torch import Tensor, nn

from dtpipe.distill.student.pyramid import PYRAMID_STRIDES, SimplePyramid
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError


class HeadLevels(nn.Module):
    """What stands between a student and a head; of most students, nothing. `strides` and `channels` are what it gives.

    A student of a single stride goes through a simple pyramid, as before the regressor: `pyramid.*` has the names and
    shapes that it has there. A ConvNeXt's levels get layer norms over channels, norm0 to norm3 of its own detection
    and segmentation (facebookresearch/ConvNeXt), since no norm ends its stages.
    """

    def __init__(self, student: Student, norm: str, level_norms: bool = True) -> None:
        """norm: batch or group, inside the pyramid; level_norms: those of a ConvNeXt."""
        super().__init__()
        self.strides, self.channels = student.strides, student.channels
        self.pyramid: SimplePyramid | None = None
        if student.single_scale:
            self.pyramid = SimplePyramid(student.strides[0], student.channels[0], PYRAMID_STRIDES, norm)
            self.strides, self.channels = PYRAMID_STRIDES, self.pyramid.channels
        self.norms: nn.ModuleList | None = None
        if level_norms and "convnext" in student.spec.name:
            self.norms = nn.ModuleList(LayerNorm2d(channels, eps=1e-6) for channels in self.channels)

    def keep_only(self, used: Collection[int]) -> None:
        """Drop the weights of levels at other places than these: what is never used would never get a gradient."""
        for parts in (self.norms, self.pyramid.levels if self.pyramid is not None else None):
            for idx in range(len(parts or ())):
                if parts is not None and idx not in used:
                    parts[idx] = nn.Identity()

    def forward(self, levels: Sequence[Tensor]) -> list[Tensor]:
        """Shapes: the student's levels, finest first -> [(B, channels[i], H/strides[i], W/strides[i])]."""
        if self.pyramid is not None:
            finer: list[Tensor] = self.pyramid(levels[0])
            return finer
        if self.norms is not None:
            return [norm(level) for norm, level in zip(self.norms, levels, strict=True)]
        return list(levels)


@contextmanager
def enough_for_norms() -> Iterator[None]:
    """Of one value per channel, as a whole image's mean or its coarsest level may be, a batch norm makes nothing.

    Raises: ConfigError in place of torch's ValueError.
    """
    try:
        yield
    except ValueError as err:
        if "more than 1 value per channel" not in str(err):
            raise
        raise ConfigError(
            "batch norms cannot be trained on one image at a time; give eval.tune.batch_size and micro_batch of 2 or "
            "more, or -s eval.tune.head.norm=group and larger images"
        ) from err
