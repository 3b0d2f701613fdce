"""What a stream asks of a teacher that runs live; `pipeline` makes one and passes it in.

Two steps, because noise is drawn on the host: `prepare` runs in the reading threads, ahead of time, and `encode` where
the training loop runs, in the order of the batches. So the result does not depend on timing.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from dtpipe.manifests.read.source import FeatureSource


@dataclass(frozen=True)
class LiveSamples:
    """Samples to encode anew, an entry each."""

    keys: tuple[str, ...]
    views: NDArray[np.int64]
    """Index on the source's V axis: says the timestep, and which of several joined datasets the view is of."""
    flip: NDArray[np.bool_]
    """True where the flipped image is to be encoded, whatever the view says."""
    fresh: NDArray[np.int64]
    """Which fresh noise draw, from 0; draw K + fresh, where the dataset stores draws k < K."""

    @classmethod
    def first(cls, keys: Sequence[str]) -> LiveSamples:
        """Each image unflipped, at the first view, with its first fresh draw."""
        zeros = np.zeros(len(keys), np.int64)
        return cls(tuple(keys), zeros, zeros.astype(bool), zeros)

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, chosen: NDArray[np.int64]) -> LiveSamples:
        """Some of them, in the order of `chosen`."""
        return LiveSamples(
            tuple(self.keys[idx] for idx in chosen), self.views[chosen], self.flip[chosen], self.fresh[chosen]
        )


class LiveTeacher(Protocol):
    """A teacher on the trainer's device."""

    @property
    def makes_images(self) -> bool:
        """True for a GAN: its images come with the features, a new one for each fresh draw, and are never flipped."""
        ...

    def prepare(self, samples: LiveSamples) -> Any:
        """All that can be done ahead of time on the host, from any thread."""
        ...

    def encode(self, images: Tensor, samples: LiveSamples, prepared: Any) -> tuple[Tensor, Mapping[str, Tensor]]:
        """Images and fresh features of samples that were prepared.

        Shapes: images (B, H, W, 3) uint8, unflipped, on the device (anything for a teacher that makes images) ->
        images (B, H, W, 3) uint8 unflipped, {level: (B, C, h, w)}, on the device.
        """
        ...


OpenLive = Callable[["FeatureSource", "torch.device"], LiveTeacher]
"""Opens the live teacher of a source on a device; picklable."""
