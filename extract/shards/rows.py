"""From a row's number to pixels and noise, in threads that run a bounded number of batches ahead of the teacher.

A bad image is a value with a reason, never an exception; bytes that cannot be had right now are an exception, so that
the shard is tried again instead of a good image being written off.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.encode import Sample
from dtpipe.extract.latents import Latents, StoredLatents
from dtpipe.extract.noise import row_noise
from dtpipe.extract.sources.base import Source
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.teachers.base import TeacherSpec
from dtpipe.manifests.errors import BadImage, DamagedDataError, InputError
from dtpipe.manifests.schema import IndexRow, Recipe
from dtpipe.manifests.write.listing import Listing

BATCHES_AHEAD = 2  # decoded batches that wait for the teacher
READ_TRIES = 3
READ_PAUSE_S = 0.2  # before the second try; four times as long before each further one


@dataclass(frozen=True)
class PreparedRow:
    """One row ready for the teacher; a bad one has no sample, a synthesized one no image yet."""

    index: IndexRow
    sample: Sample | None


class StageSeconds:
    """Seconds of one shard by stage; decode threads add up, so `decode` may exceed the wall clock."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.values: dict[str, float] = {}

    def add(self, stage: str, since_s: float) -> None:
        """Add the time since `since_s` (time.perf_counter) to a stage."""
        with self._lock:
            self.values[stage] = round(self.values.get(stage, 0.0) + time.perf_counter() - since_s, 6)


@dataclass(frozen=True)
class RowReader:
    """Reads, decodes and resizes the images of a listing and draws their noise; thread-safe."""

    source: Source
    listing: Listing
    recipe: Recipe
    teacher: TeacherSpec
    max_pixels: int
    latents: StoredLatents | None = None
    """Where the source has them: the teacher starts from these."""

    def prepare(self, row: int, seconds: StageSeconds) -> PreparedRow:
        """One row; an image that cannot be decoded comes back as bad, with its reason.

        Raises: InputError when reading fails for a reason that may pass.
        """
        started_s = time.perf_counter()
        key, recipe = self.listing.keys[row], self.recipe
        image_px = (recipe.transform.height, recipe.transform.width)
        found: dict[str, Any] = {
            "row": row,
            "key": key,
            "shard": row // recipe.shard.samples,
            "label": self.listing.labels[row],
        }
        image = None
        try:
            if not recipe.synthesized:
                decoded = self._decode(row)
                found |= {"original_height": decoded.shape[0], "original_width": decoded.shape[1]}
                image = resize_image(decoded, recipe.transform)
        except BadImage as err:
            return PreparedRow(IndexRow(**found, status=f"bad: {err}"), None)
        noise = row_noise(recipe.noise_seed, key, recipe.views, self.teacher.noise_shapes, image_px)
        latents = self._latents(row)
        seconds.add("decode", started_s)
        return PreparedRow(IndexRow(**found), Sample(noise, image, latents))

    def image(self, row: int) -> NDArray[np.uint8]:
        """The teacher's input of one row. Shapes: -> [H, W, 3] uint8.

        Raises: BadImage; InputError when reading fails for a reason that may pass.
        """
        return resize_image(self._decode(row), self.recipe.transform)

    def _latents(self, row: int) -> Latents:
        """Raises: InputError when the dataset that has them is damaged there."""
        if self.latents is None:
            return {}
        try:
            rows = [int(self.listing.uris[row])]
            return {flip: self.latents.read(rows, flip)[0] for flip in {view.flip for view in self.recipe.views}}
        except DamagedDataError as err:
            raise InputError(str(err)) from err

    def _decode(self, row: int) -> NDArray[np.uint8]:
        return decode_image(self._read(self.listing.keys[row], self.listing.uris[row]), self.max_pixels)

    def _read(self, key: str, uri: str) -> bytes:
        """Bytes of one sample; a failure that may pass is tried again before it fails the shard."""
        for attempt in range(READ_TRIES):
            try:
                return self.source.read(uri)
            except BadImage:
                raise
            except (InputError, OSError) as err:
                failure = err
            time.sleep(READ_PAUSE_S * 4**attempt)
        raise InputError(
            f"sample {key}: reading {uri} failed {READ_TRIES} times ({failure}); check the source, then run the same command again"
        ) from failure


class BatchQueue:
    """Prepared rows in batches, in order; decoding runs BATCHES_AHEAD batches ahead of what was taken."""

    def __init__(self, reader: RowReader, pool: ThreadPoolExecutor, rows: range, seconds: StageSeconds) -> None:
        self._reader, self._pool, self._seconds = reader, pool, seconds
        size = reader.recipe.compute.batch_size
        self._batches = iter([rows[start : start + size] for start in range(0, len(rows), size)])
        self._waiting: deque[Sequence[Future[PreparedRow]]] = deque()
        for _ in range(BATCHES_AHEAD):
            self._submit()

    def _submit(self) -> None:
        """Start decoding one more batch, if there is one."""
        rows = next(self._batches, None)
        if rows is not None:
            self._waiting.append([self._pool.submit(self._reader.prepare, row, self._seconds) for row in rows])

    def take(self) -> list[PreparedRow] | None:
        """The next batch, waiting for it; None after the last."""
        if not self._waiting:
            return None
        batch = [future.result() for future in self._waiting[0]]
        self._waiting.popleft()
        self._submit()
        return batch

    def close(self) -> None:
        """Cancel what has not begun."""
        for futures in self._waiting:
            for future in futures:
                future.cancel()
