"""A teacher that knows nothing and costs nothing: levels of noise in ADM-256's shapes, to measure all but a teacher.

One rule: what it gives can't be taken for features. Its levels have the role `noise`, which nothing regresses, and
each image has the same ones.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from dtpipe.extract.teachers.base import (
    Encoder,
    TapSpec,
    TeacherKind,
    TeacherSpec,
    check_sides,
    parse_options,
)
from dtpipe.manifests.schema import StrictModel, ViewSpec

if TYPE_CHECKING:
    from torch import Tensor

_PATH = "measure-only"
_ADM_256 = {"l2": 512, "l3": 512, "l4": 1024, "l5": 1024}  # channels; 5.6 MiB an image in float16


class NullOptions(StrictModel):
    """Which levels, and on images of which size."""

    channels: dict[str, int] = Field(
        default=_ADM_256, description="Channels by level, l{n} of stride 2^n; default: ADM-256's."
    )
    px: int = Field(default=256, ge=1, description="Side of its images in px.")


class NullTeacher:
    """Gives standard normal noise that is drawn once and is the same for each image, view and batch."""

    def __init__(self, options: NullOptions, device: str) -> None:
        taps = tuple(
            TapSpec(name, 2 ** int(name[1:]), number, f"noise.{name}") for name, number in options.channels.items()
        )
        side = options.px
        self.spec = TeacherSpec("null", "0" * 64, (side, side), taps, options=options.model_dump(), is_noise=True)
        self._device = device
        self._drawn: dict[tuple[str, int, int], Tensor] = {}

    def encode(
        self,
        images: Tensor,
        noise: Mapping[str, Tensor],  # noqa: ARG002  it sees none
        views: Sequence[ViewSpec],
    ) -> dict[str, Tensor]:
        """Shapes: images (B, 3, H, W) -> {level: (B, V, C, h, w)}, views of one row that lies in memory once."""
        check_sides(images, max(tap.stride for tap in self.spec.levels))
        height, width = images.shape[-2:]
        return {
            tap.name: self._row(tap, height // tap.stride, width // tap.stride).expand(
                len(images), len(views), -1, -1, -1
            )
            for tap in self.spec.levels
        }

    def _row(self, tap: TapSpec, height: int, width: int) -> Tensor:
        import torch

        place = tap.name, height, width
        if place not in self._drawn:
            generator = np.random.Generator(np.random.Philox(tap.stride))
            drawn = generator.standard_normal((1, 1, tap.channels, height, width), dtype=np.float32)
            self._drawn[place] = torch.from_numpy(drawn).to(self._device)
        return self._drawn[place]


KIND = TeacherKind(
    "null",
    "The word measure-only; nothing to load. FOR MEASURING ONLY: its levels, in ADM-256's shapes, are noise and no "
    "features; nothing trains on them.",
    Encoder,
    lambda path: path == _PATH,
    lambda config, device: NullTeacher(parse_options(config, NullOptions), device),
    options=NullOptions,
)
