"""From a batch on the device to the bytes of its rows: symbols leave the device, and threads make bytes of them while
the teacher goes on.

On a GPU the copy of one batch overlaps with the forward pass of the next; nothing here waits for the device before
`CodedBatch.wait`. What is kept of a shard are bytes as they will be stored, so a shard never lies in memory twice.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.extract.shards.codecs import encode_on_device, encode_on_host
from dtpipe.extract.shards.memory import Room
from dtpipe.extract.shards.timeline import CODEC, CODING, NO_ROOM, TEACHING, ShardClock
from dtpipe.manifests.codecs.base import Array, LevelCodec, array_name, decode_level, parts_of
from dtpipe.manifests.fidelity import CODEC_ERROR, Fidelity, merged_records
from dtpipe.manifests.layout.arrays import CodedRows, ShardArrays, stored_arrays
from dtpipe.manifests.schema import IMAGE, MEASURED_SHARD, IndexRow, Recipe

KEPT_ROWS = 8  # of the measured shard, as arrays
EXACT = "cast"  # the codec that only rounds; what others lose is measured


class CodedBatch:
    """One batch of rows on its way from the device; without `start` it has no features (all rows bad)."""

    def __init__(self, rows: Sequence[IndexRow], images: Tensor | None = None) -> None:
        self.rows = list(rows)
        self._images = images  # (n, H, W, 3), where they are made or given here
        self._host: dict[str, tuple[LevelCodec, dict[str, Tensor], Tensor]] = {}
        self._true: dict[str, Tensor] = {}  # features of the row that is measured, (V, C, h, w)
        self._measured: int | None = None
        self._marks: tuple[torch.cuda.Event, torch.cuda.Event] | None = None  # before encoding, after the copy
        self.coding_s = 0.0
        """Seconds that encoding took, where the CPU is the device."""

    def start(
        self, features: Mapping[str, Tensor], codecs: Mapping[str, LevelCodec], measured: int | None = None
    ) -> None:
        """Encode on the device and begin the copy to the host.

        `measured`: a row whose features go along as they are, to see what its codecs make of them.
        Shapes: {level: (B, V, C, h, w)}, B at least the number of rows; the rest is padding.
        """
        started_s = time.perf_counter()
        before = _mark(features)
        self._images = None if self._images is None else _copy_to_host(self._images[: len(self.rows)])
        for name, level in features.items():
            sent, finite = encode_on_device(codecs[name], level[: len(self.rows)])
            on_host = {part: _copy_to_host(values) for part, values in sent.items()}
            self._host[name] = codecs[name], on_host, _copy_to_host(finite)
            if measured is not None and codecs[name].level.codec.name != EXACT:
                self._true[name] = _copy_to_host(level[measured].float().contiguous())
        self._measured = measured
        after = _mark(features)
        self._marks = None if before is None or after is None else (before, after)
        self.coding_s = 0.0 if self._marks else time.perf_counter() - started_s

    def wait(self) -> float:
        """Wait for a GPU's copy; seconds that encoding there and the copy took."""
        if self._marks is None:
            return 0.0
        before, after = self._marks
        after.synchronize()
        return float(before.elapsed_time(after)) / 1000

    @property
    def size_bytes(self) -> int:
        """Of what lies on the host."""
        tensors = [values for _, sent, _ in self._host.values() for values in sent.values()]
        return sum(values.nbytes for values in [*tensors, *([] if self._images is None else [self._images])])

    def arrays(self, recipe: Recipe) -> ShardArrays:
        """The rows as they are stored; valid after `wait`. A row with features that are not finite or do not fit their
        codec becomes bad: zeros.
        """
        levels = {
            name: encode_on_host(codec, {part: values.numpy() for part, values in sent.items()}, finite.numpy())
            for name, (codec, sent, finite) in self._host.items()
        }
        rows = [self._judged(idx, levels) for idx in range(len(self.rows))]
        named: dict[str, Array] = {} if self._images is None else {IMAGE: self._images.numpy()}
        for name, (parts, _) in levels.items():
            named |= {array_name(name, part): values for part, values in parts.items()}
        bad = [idx for idx, row in enumerate(rows) if row.status != "ok"]
        specs = stored_arrays(recipe)
        zeros = {name: np.zeros(spec.shape(len(rows)), spec.dtype) for name, spec in specs.items() if not levels}
        stored = zeros or {
            name: _zeroed(named[name], bad).astype(spec.dtype, copy=False) for name, spec in specs.items()
        }
        return ShardArrays(stored, rows)

    def fidelity(self, arrays: ShardArrays) -> dict[str, Fidelity]:
        """By level, of the row that is measured; none where it is bad. `arrays` are those of this batch."""
        idx = self._measured
        if idx is None or arrays.rows[idx].status != "ok":
            return {}
        measured = {}
        for name, true in self._true.items():
            codec = self._host[name][0]
            parts = {part: values[idx] for part, values in parts_of(codec, arrays.arrays).items()}
            measured[name] = Fidelity.of(true.numpy(), decode_level(codec, parts))
        return measured

    def _judged(self, idx: int, levels: Mapping[str, tuple[Mapping[str, Array], NDArray[np.bool_]]]) -> IndexRow:
        row = self.rows[idx]
        unfit = [name for name, (_, fits) in levels.items() if not fits[idx]]
        if row.status != "ok" or not unfit:
            return row
        dtype = self._host[unfit[0]][0].level.dtype
        return row.model_copy(update={"status": f"bad: features of {', '.join(unfit)} are not finite in {dtype}"})


def _zeroed(values: Array, bad: Sequence[int]) -> Array:
    """Some rows as zeros; what was given is left as it is, for a teacher may keep it."""
    if not bad:
        return values
    values = values.copy()
    values[list(bad)] = 0
    return values


def _mark(features: Mapping[str, Tensor]) -> torch.cuda.Event | None:
    """A point on the device's stream, where features lie on a GPU."""
    if not any(level.is_cuda for level in features.values()):
        return None
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


def _copy_to_host(values: Tensor) -> Tensor:
    """An asynchronous copy into pinned memory from a GPU of CUDA, the tensor itself on the CPU."""
    if not values.is_cuda:
        return values.cpu()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values, non_blocking=True)


class ShardBuffer:
    """The rows of one shard, batch by batch in their order, on their way to bytes in the threads of a pool."""

    def __init__(
        self,
        recipe: Recipe,
        shard_idx: int,
        encode: Callable[[ShardArrays], CodedRows],
        pool: ThreadPoolExecutor,
        ahead: int,
        room: Room,
        clock: ShardClock,
    ) -> None:
        """`encode` makes bytes of arrays; `ahead`: batches that may wait for the threads of the pool."""
        self._recipe, self._shard_idx, self._to_bytes = recipe, shard_idx, encode
        self._pool, self._ahead, self._room, self._clock = pool, ahead, room, clock
        self._waiting: deque[Future[CodedRows]] = deque()
        self._parts: list[CodedRows] = []
        self._kept: dict[int, ShardArrays] = {}
        self._fidelity: dict[int, dict[str, Fidelity]] = {}
        self.num_rows = 0

    def take(self, batch: CodedBatch) -> None:
        """Append one batch once it has left the device, waiting for it, for the threads and for room.

        Raises: what making bytes of earlier batches raised.
        """
        self._clock.lap(TEACHING, {CODEC: batch.wait()})
        while len(self._waiting) > self._ahead or (self._waiting and self._waiting[0].done()):
            self._parts.append(self._waiting.popleft().result())
        self._clock.lap(CODING)
        self._room.take(self._shard_idx, batch.size_bytes)
        self._clock.lap(NO_ROOM)
        self._waiting.append(self._pool.submit(self._encode, batch, self.num_rows))
        self.num_rows += len(batch.rows)

    def parts(self) -> list[CodedRows]:
        """All rows as bytes, waiting for them. Raises: as `take`."""
        while self._waiting:
            self._parts.append(self._waiting.popleft().result())
        return self._parts

    def first_rows(self) -> ShardArrays:
        """Arrays of the first `KEPT_ROWS` rows or more, of the shard that is measured; valid after `parts`."""
        kept = [self._kept[start] for start in sorted(self._kept)]
        arrays = {name: np.concatenate([part.arrays[name] for part in kept]) for name in kept[0].arrays}
        return ShardArrays(arrays, [row for part in kept for row in part.rows])

    def fidelity(self) -> dict[str, Any]:
        """For the record of the shard, by level, over the rows that were measured; valid after `parts`."""
        by_row = [self._fidelity[start] for start in sorted(self._fidelity)]
        lost = merged_records({name: of_level.record() for name, of_level in row.items()} for row in by_row)
        return {CODEC_ERROR: lost} if lost else {}

    def close(self) -> None:
        """Let go of what is not done, and of the room."""
        wait([future for future in self._waiting if not future.cancel()])
        self._room.give_back(self._shard_idx)

    def _encode(self, batch: CodedBatch, start: int) -> CodedRows:
        with self._clock.working("compress"):
            arrays = batch.arrays(self._recipe)
            if self._shard_idx == MEASURED_SHARD and start < KEPT_ROWS:
                self._kept[start] = arrays
            coded = self._to_bytes(arrays)
            self._fidelity[start] = batch.fidelity(arrays)
        self._room.exchange(self._shard_idx, batch.size_bytes, coded.size_bytes)
        return coded
