"""Where a shard gathers on the host while the teacher works: features leave the device in their stored dtype.

On a GPU the copy of one batch overlaps with the forward pass of the next; nothing here waits for the device before
`CodedBatch.levels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.extract.encode import cast_level
from dtpipe.manifests.schema import IndexRow, Recipe
from dtpipe.manifests.write.shard import ShardArrays


class CodedBatch:
    """One batch of rows on its way from the device; without `start` it has no features (all rows bad)."""

    def __init__(self, rows: Sequence[IndexRow], images: NDArray[np.uint8] | Tensor) -> None:
        self.rows = list(rows)
        self._images = torch.as_tensor(images)  # (n, H, W, 3), zeros where bad
        self._host: dict[str, tuple[Tensor, Tensor]] = {}
        self._copied: torch.cuda.Event | None = None

    def start(self, features: Mapping[str, Tensor], dtypes: Mapping[str, str]) -> None:
        """Round to the stored dtypes on the device and begin the copy to the host.

        Shapes: {level: (B, V, C, h, w)}, B at least the number of rows; the rest is padding.
        """
        self._images = _copy_to_host(self._images)
        for name, level in features.items():
            coded, fits = cast_level(level[: len(self.rows)], dtypes[name])
            self._host[name] = (_copy_to_host(coded), _copy_to_host(fits))
            if coded.is_cuda and self._copied is None:
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def levels(self) -> dict[str, tuple[NDArray[np.generic], NDArray[np.bool_]]]:
        """Wait for the copy: {level: ([n, V, C, h, w] in the stored dtype, [n] bool: all values finite)}."""
        if self._copied is not None:
            self._copied.synchronize()
        return {name: (coded.numpy(), fits.numpy()) for name, (coded, fits) in self._host.items()}

    def images(self) -> NDArray[np.uint8]:
        """[n, H, W, 3]; valid after `levels`."""
        images: NDArray[np.uint8] = self._images.numpy()
        return images


def _copy_to_host(values: Tensor) -> Tensor:
    """An asynchronous copy into pinned memory for a GPU tensor, the tensor itself on the CPU."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


class ShardBuffer:
    """The arrays of one shard, filled batch by batch in row order."""

    def __init__(self, recipe: Recipe, num_rows: int) -> None:
        transform, num_views = recipe.transform, len(recipe.views)
        self.dtypes = {level.name: level.dtype if recipe.codec.name == "cast" else "float32" for level in recipe.levels}
        self.rows: list[IndexRow] = []
        shape = (num_rows, transform.height, transform.width, 3)
        self._images = np.zeros(shape, np.uint8) if recipe.images == "stored" else None
        self._levels = {
            level.name: np.zeros(
                (num_rows, num_views, level.channels, level.height, level.width), self.dtypes[level.name]
            )
            for level in recipe.levels
        }

    def take(self, batch: CodedBatch) -> None:
        """Append one batch. A row whose features are not finite in the stored dtype becomes a bad sample, all zeros."""
        start, levels, images = len(self.rows), batch.levels(), batch.images()
        for idx, index_row in enumerate(batch.rows):
            row = index_row
            unfit = [name for name, (_, fits) in levels.items() if not fits[idx]]
            if row.status == "ok" and unfit:
                row = row.model_copy(
                    update={"status": f"bad: features of {', '.join(unfit)} are not finite in {self.dtypes[unfit[0]]}"}
                )
            self.rows.append(row)
            if row.status != "ok":
                continue
            if self._images is not None:
                self._images[start + idx] = images[idx]
            for name, (coded, _) in levels.items():
                self._levels[name][start + idx] = coded[idx]

    def arrays(self) -> ShardArrays:
        """The shard, once every row is in."""
        return ShardArrays(image=self._images, levels=self._levels, rows=self.rows)
