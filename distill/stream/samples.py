"""Feature datasets as torch's map-style `Dataset`, for training loops that are not dtpipe's own.

One rule: image and levels of an item belong together. Where the levels are of the mirrored image, so is the image.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset as TorchDataset

from dtpipe.manifests.read.source import FeatureSource

Item = dict[str, Any]
_NO_CLASS = -1


class FeatureSamples(TorchDataset[Item]):
    """Samples by position; pickles, forks and spawns, so that a `DataLoader` with workers can have it.

    An item is a dict of `key`, `image` (3, H, W) uint8, `levels` {name: (C, h, w) in the level's dtype}, `view`, its
    number, and `label`, the place of the sample's label among `classes`, or -1. All of a batch are read at once.
    """

    def __init__(
        self,
        source: FeatureSource,
        rows: NDArray[np.int64],
        levels: Sequence[str],
        view: int | None = 0,
        images: bool = True,
        transform: Callable[[Item], Any] | None = None,
    ) -> None:
        """view: which one is read of each sample; None draws one each time, from torch's generator."""
        self.source, self.rows, self.levels = source, rows, tuple(levels)
        self.view, self.images, self.transform = view, images, transform
        labels = source.columns.labels
        of_rows = [labels[int(row)] for row in rows]
        self.classes = sorted({label for label in of_rows if label is not None})
        places = {name: idx for idx, name in enumerate(self.classes)}
        self._labels = [_NO_CLASS if label is None else places[label] for label in of_rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, idx: int) -> Any:
        """One item. Raises: what the reader raises."""
        return self.__getitems__([idx])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """The items of a batch, which a `DataLoader` asks for at once."""
        rows, views = self.rows[list(indices)], self._views(len(indices))
        pixels, coded = self.source.read(rows, self.levels, views, self.images)
        levels = {name: torch.from_numpy(values) for name, values in coded.decode().items()}  # each (B, C, h, w)
        items = []
        for idx, (row, view) in enumerate(zip(rows, views, strict=True)):
            item: Item = {
                "key": self.source.columns.keys[int(row)],
                "label": self._labels[indices[idx]],
                "view": int(view),
            }
            item["levels"] = {name: values[idx] for name, values in levels.items()}
            if self.images:
                image = pixels[idx, :, ::-1] if self.source.views[view].flip else pixels[idx]
                item["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))  # (3, H, W)
            items.append(item if self.transform is None else self.transform(item))
        return items

    def _views(self, num: int) -> NDArray[np.int64]:
        if self.view is not None:
            return np.full(num, self.view, np.int64)
        drawn: NDArray[np.int64] = torch.randint(len(self.source.views), (num,)).numpy()
        return drawn
