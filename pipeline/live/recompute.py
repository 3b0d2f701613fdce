"""The teacher of a dataset run again on some of its samples: `dtpipe verify --level recompute`.

Where no flipped views are stored, it also measures what mirroring features in their place would cost.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.device import RECOMPUTE
from dtpipe.manifests.check.measured import Measured
from dtpipe.manifests.errors import saying_what_to_lower
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.pipeline.live.flip_error import measure
from dtpipe.pipeline.live.recorded import open_teacher


class Recomputation:
    """What `verify` calls with stored images for the features that they give; `measured` is what it found besides."""

    def __init__(self, url: str, teacher: str | None, device: str) -> None:
        """Raises: as `open_teacher`, with `teacher` in place of the path that the extraction recorded."""
        self._dataset = FeatureDataset.open(url, allow_incomplete=True)
        self._opened = open_teacher(self._dataset.plan, {"path": teacher} if teacher else {}, device)
        self.measured: Measured | None = None

    def __call__(
        self, images: NDArray[np.uint8], keys: Sequence[str], batch_size: int
    ) -> dict[str, NDArray[np.generic]]:
        """Shapes: images [N, H, W, 3] -> {level: [N, V, C, h, w] float32}. Raises: DeviceMemoryError."""
        with saying_what_to_lower("recomputing", self._opened.device, batch_size, RECOMPUTE):
            return self._encoded(images, keys, batch_size)

    def _encoded(
        self, images: NDArray[np.uint8], keys: Sequence[str], batch_size: int
    ) -> dict[str, NDArray[np.generic]]:
        recipe = self._opened.recipe
        if self.measured is None and not recipe.synthesized and not any(view.flip for view in recipe.views):
            self.measured = measure(self._opened, self._dataset, images, keys, batch_size)
        levels = self._opened.encode(images, keys, batch_size)
        return {name: features.float().cpu().numpy() for name, features in levels.items()}
