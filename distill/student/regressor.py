"""The feature regressor: laterals, top-down path, output convolutions, and a 1x1 convolution to each teacher level.

The rows of the paper's table 8 differ in what the kinds of `regressors/` add to that.

The one place where a level changes its spatial size to the teacher's is `FeatureRegressor.forward`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.student.blocks import conv_norm_relu, resize
from dtpipe.distill.student.pyramid import PYRAMID_STRIDES, SimplePyramid
from dtpipe.distill.student.regressors.base import RegressorKind, lateral
from dtpipe.distill.student.regressors.registry import REGRESSORS
from dtpipe.distill.student.timed import ScaleShift
from dtpipe.manifests.errors import ConfigError, ShapeError


@dataclass(frozen=True)
class TargetLevel:
    """One teacher level to regress: `size` is its height and width."""

    name: str
    stride: int
    channels: int
    size: tuple[int, int]


class FeatureRegressor(nn.Module):
    """Student levels to teacher levels (appendix D.1 and table 8).

    Every student level from the finest target's stride on takes part, so the whole backbone is trained even where the
    teacher has no level of the coarsest strides. A student with a single level first goes through a simple pyramid.
    """

    def __init__(
        self,
        strides: Sequence[int],
        channels: Sequence[int],
        targets: Sequence[TargetLevel],
        config: RegressorConfig,
        decoded: bool = False,
    ) -> None:
        """`strides` and `channels` of the student's levels, finest first; `decoded`: a decoder reads `trunk`, so that
        it has all levels of the student.

        Raises: ConfigError for a kind that is not in `REGRESSORS`; ShapeError when a target has a stride that the
        student does not have.
        """
        super().__init__()
        kind = _find_kind(config.kind)
        self.targets = tuple(targets)
        self.pyramid = _pyramid(strides, channels, targets, config, decoded)
        if self.pyramid is not None:
            strides, channels = _pyramid_strides(targets, decoded), self.pyramid.channels
        self.level_of = [_index_of(target, strides) for target in targets]
        last = len(channels) - 1
        self.laterals = nn.ModuleList(lateral(width, config) for width in channels[:-1])
        self.laterals.append(kind.coarsest(channels[-1], config))
        smoothed = (
            range(last + 1 if decoded else max(self.level_of) + 1)
            if decoded or kind.path
            else sorted(set(self.level_of))
        )
        bare = set() if kind.smooth_coarsest else {last}
        width, norm = config.width, config.norm
        self.outputs = nn.ModuleDict(
            {str(i): nn.Identity() if i in bare else conv_norm_relu(width, width, 3, norm) for i in smoothed}
        )
        self.path = kind.path(len(smoothed), config) if kind.path else None
        self.heads = nn.ModuleList(nn.Conv2d(config.width, target.channels, 1) for target in targets)
        self.timed = nn.ModuleList(ScaleShift(config.width) for _ in targets) if config.timestep else None

    def forward(self, levels: Sequence[Tensor], timesteps: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Student levels, finest first, to f_r by teacher level; `timesteps` are those of f_g, for heads that know it.

        Shapes: levels[i] (B, channels[i], H_i, W_i), timesteps[name] (B,) int64 ->
        {name: (B, target.channels, *target.size)}.
        """
        return self.regress(self.trunk(levels), timesteps)

    def trunk(self, levels: Sequence[Tensor]) -> dict[int, Tensor]:
        """What the heads read, by place of the student's level; a place that no head reads may be left out.

        Shapes: levels[i] (B, channels[i], H_i, W_i) -> {i: (B, width, H_i, W_i)}.
        """
        if self.pyramid is not None:
            levels = self.pyramid(levels[0])
        merged = [
            convolve(level) for convolve, level in zip(self.laterals, levels, strict=True)
        ]  # (B, width, H_i, W_i)
        for i in range(len(merged) - 2, -1, -1):
            merged[i] = merged[i] + resize(merged[i + 1], merged[i].shape[-2:])
        smooth = {int(idx): output(merged[int(idx)]) for idx, output in self.outputs.items()}
        if self.path is not None:
            smooth = dict(enumerate(self.path(list(smooth.values()))))
        return smooth

    def regress(self, smooth: Mapping[int, Tensor], timesteps: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The heads on what `trunk` gives. Shapes: as `forward`."""
        sized = [
            resize(smooth[idx], target.size) for target, idx in zip(self.targets, self.level_of, strict=True)
        ]  # a 1x1 commutes with the resize
        if self.timed is not None:
            sized = self._with_timesteps(sized, timesteps or {})
        return {target.name: head(level) for target, head, level in zip(self.targets, self.heads, sized, strict=True)}

    def _with_timesteps(self, levels: Sequence[Tensor], timesteps: Mapping[str, Tensor]) -> list[Tensor]:
        assert self.timed is not None
        if absent := [target.name for target in self.targets if target.name not in timesteps]:
            raise ShapeError(f"the heads know the timestep, and none is given for {absent}; give one for each sample")
        by_target = zip(self.targets, self.timed, levels, strict=True)
        return [timed(level, timesteps[target.name]) for target, timed, level in by_target]


def _find_kind(name: str) -> RegressorKind:
    if name not in REGRESSORS:
        raise ConfigError(f"distill.regressor.kind is {name!r}; choose one of {', '.join(REGRESSORS)}")
    return REGRESSORS[name]


def _pyramid(
    strides: Sequence[int],
    channels: Sequence[int],
    targets: Sequence[TargetLevel],
    config: RegressorConfig,
    decoded: bool,
) -> SimplePyramid | None:
    """A simple pyramid where the student has one level, and the targets are more than that or a decoder reads it."""
    if len(strides) > 1 or (not decoded and {target.stride for target in targets} <= set(strides)):
        return None
    return SimplePyramid(strides[0], channels[0], _pyramid_strides(targets, decoded), config.norm)


def _pyramid_strides(targets: Sequence[TargetLevel], decoded: bool) -> tuple[int, ...]:
    """From the finest target's on; all of them for a decoder."""
    finest = PYRAMID_STRIDES[0] if decoded else min(target.stride for target in targets)
    return tuple(stride for stride in PYRAMID_STRIDES if stride >= finest)


def _index_of(target: TargetLevel, strides: Sequence[int]) -> int:
    if target.stride not in strides:
        raise ShapeError(f"level {target.name} has stride {target.stride}, the student's levels have {list(strides)}")
    return list(strides).index(target.stride)
