"""Where a shard gathers on the host while the teacher works: features leave the device coded.

On a GPU the copy of one batch overlaps with the forward pass of the next; nothing here waits for the device before
`CodedBatch.levels`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.extract.shards.codecs import encode_on_device, encode_on_host
from dtpipe.manifests.codecs.base import Array, LevelCodec, array_name
from dtpipe.manifests.layout.arrays import ShardArrays, stored_arrays
from dtpipe.manifests.schema import IMAGE, IndexRow, Recipe


class CodedBatch:
    """One batch of rows on its way from the device; without `start` it has no features (all rows bad)."""

    def __init__(self, rows: Sequence[IndexRow], images: Tensor | None = None) -> None:
        self.rows = list(rows)
        self._images = images  # (n, H, W, 3), where they are made or given here
        self._host: dict[str, tuple[LevelCodec, dict[str, Tensor], Tensor]] = {}
        self._copied: torch.cuda.Event | None = None

    def start(self, features: Mapping[str, Tensor], codecs: Mapping[str, LevelCodec]) -> None:
        """Encode on the device and begin the copy to the host.

        Shapes: {level: (B, V, C, h, w)}, B at least the number of rows; the rest is padding.
        """
        self._images = None if self._images is None else _copy_to_host(self._images)
        for name, level in features.items():
            sent, finite = encode_on_device(codecs[name], level[: len(self.rows)])
            on_host = {part: _copy_to_host(values) for part, values in sent.items()}
            self._host[name] = codecs[name], on_host, _copy_to_host(finite)
            if level.is_cuda and self._copied is None:
                self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
        if self._copied is not None:
            self._copied.record()

    def levels(self) -> dict[str, tuple[Mapping[str, Array], NDArray[np.bool_]]]:
        """Wait for the copy: {level: ({part: [n, V, ..]}, [n] bool: the codec holds all values)}."""
        if self._copied is not None:
            self._copied.synchronize()
        return {
            name: encode_on_host(codec, {part: values.numpy() for part, values in sent.items()}, finite.numpy())
            for name, (codec, sent, finite) in self._host.items()
        }

    def images(self) -> NDArray[np.uint8] | None:
        """[n, H, W, 3], where there are any; valid after `levels`."""
        return None if self._images is None else self._images.numpy()


def _copy_to_host(values: Tensor) -> Tensor:
    """An asynchronous copy into pinned memory for a GPU tensor, the tensor itself on the CPU."""
    if not values.is_cuda:
        return values
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


class ShardBuffer:
    """The arrays of one shard, filled batch by batch in row order."""

    def __init__(self, recipe: Recipe, num_rows: int, codecs: Mapping[str, LevelCodec]) -> None:
        self.codecs, self.rows = codecs, list[IndexRow]()
        specs = stored_arrays(recipe).items()
        self._arrays = {name: np.zeros(spec.shape(num_rows), spec.dtype) for name, spec in specs}

    def take(self, batch: CodedBatch) -> None:
        """Append one batch. A row with features that are not finite or do not fit their codec becomes bad: zeros."""
        start, levels, images = len(self.rows), batch.levels(), batch.images()
        for idx, index_row in enumerate(batch.rows):
            row = index_row
            unfit = [name for name, (_, fits) in levels.items() if not fits[idx]]
            if row.status == "ok" and unfit:
                dtype = self.codecs[unfit[0]].level.dtype
                status = f"bad: features of {', '.join(unfit)} are not finite in {dtype}"
                row = row.model_copy(update={"status": status})
            self.rows.append(row)
            if row.status != "ok":
                continue
            if IMAGE in self._arrays:
                assert images is not None
                self._arrays[IMAGE][start + idx] = images[idx]
            for name, (parts, _) in levels.items():
                for part, values in parts.items():
                    self._arrays[array_name(name, part)][start + idx] = values[idx]

    def arrays(self) -> ShardArrays:
        """The shard, once every row is in."""
        return ShardArrays(self._arrays, self.rows)
