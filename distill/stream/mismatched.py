"""A control that must fail: images with the features of other images, so that nothing about an image can be learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.codecs.coded import CodedLevels
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.read.source import Columns, FeatureSource, Integers, read_images
from dtpipe.manifests.schema import LevelSpec, ViewSpec


class MismatchedPairs:
    """A `FeatureSource` whose rows in use keep their images and get each other's levels, always the same ones.

    All that features have in common stays: their scale, and what any image would show at a place.
    """

    def __init__(self, source: FeatureSource, rows: NDArray[np.int64], seed: int) -> None:
        """`rows` are those in use; none of them keeps its own levels. Raises: ConfigError for a single one."""
        if len(rows) < 2:
            raise ConfigError(
                "distill.mismatch gives images each other's features, and there is one image; leave it out"
            )
        self.source = source
        order = np.random.default_rng(seed).permutation(rows)
        self._partner = np.arange(len(source.columns), dtype=np.int64)
        self._partner[order] = np.roll(order, 1)  # one cycle: nobody is left with itself

    @property
    def columns(self) -> Columns:
        """Those of the images."""
        return self.source.columns

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        """Those of the source."""
        return self.source.levels

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """Those of the source."""
        return self.source.views

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width."""
        return self.source.image_px

    def read(
        self, rows: Integers, names: Sequence[str], views: Integers, images: bool = True
    ) -> tuple[NDArray[np.uint8], CodedLevels]:
        """As `FeatureSource.read`."""
        rows = np.asarray(rows, np.int64)
        _, coded = self.source.read(self._partner[rows], names, views, images=False)
        pixels = read_images(self.source, rows) if images else np.empty((0, *self.image_px, 3), np.uint8)
        return pixels, coded
