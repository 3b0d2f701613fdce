"""Looking at every image once before live training, so that the order and the size of an epoch are fixed.

What was found is kept in the run folder: a run that goes on keeps to it, and does not look again.
"""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.extract.shards.reader import ImageReader
from dtpipe.extract.shards.task import BadSample, budget_message
from dtpipe.manifests.canonical import canonical_json
from dtpipe.manifests.errors import BadImage, ErrorBudgetError, StoreError
from dtpipe.manifests.records.document import read_document, write_document

CHECKED_FILE = "checked_images.json"
_AT_ONCE = 1024  # rows handed to the threads at a time
_MOST_THREADS = 16

OnChecked = Callable[[int, int, Sequence[BadSample]], None]
"""Images looked at, images in all, the bad ones so far."""


def check_images(
    reader: ImageReader,
    rows: NDArray[np.int64],
    run: Path,
    max_bad: Callable[[int], int],
    on_checked: OnChecked | None = None,
) -> dict[str, str]:
    """Decode and resize the images of some rows, if no earlier call for this run did; key to reason of the bad ones.

    `max_bad` gives how many of a number of images may be bad. Processes of one run on one machine take turns, so that
    one looks.
    Raises: ErrorBudgetError naming bad ones when there are more, and then nothing is kept; InputError when the source
    cannot be read; StoreError when the run folder cannot be written.
    """
    with _turn(run):
        bad = _kept(reader, rows, run)
        if bad is not None:
            return bad
        bad = _look(reader, rows, on_checked)
        if len(bad) > max_bad(len(rows)):
            raise ErrorBudgetError(budget_message("the source", len(bad), max_bad(len(rows)), _samples(bad)))
        document = {"of": _name(reader, rows), "num": len(rows), "bad": bad}
        write_document(run / CHECKED_FILE, document, "make room or choose another --out")
    return bad


def known_bad(reader: ImageReader, rows: NDArray[np.int64], run: Path) -> dict[str, str]:
    """What an earlier look at these images for this run found; nothing before it."""
    return _kept(reader, rows, run) or {}


def _kept(reader: ImageReader, rows: NDArray[np.int64], run: Path) -> dict[str, str] | None:
    """What the run folder says of these images, if it does. Raises: DamagedDataError when what it says was changed."""
    try:
        document = read_document(run / CHECKED_FILE, "delete it, and run again: all images are then looked at anew")
        return dict(document["bad"]) if document["of"] == _name(reader, rows) else None
    except (FileNotFoundError, KeyError, TypeError):
        return None


def _name(reader: ImageReader, rows: NDArray[np.int64]) -> str:
    """Digest of what decides which images are bad, as far as it is known without reading them."""
    listed = [(reader.listing.keys[row], reader.listing.uris[row]) for row in rows]
    transform = reader.transform.model_dump(mode="json")
    return blake3(canonical_json({"rows": listed, "transform": transform, "max_pixels": reader.max_pixels})).hexdigest()


def _look(reader: ImageReader, rows: NDArray[np.int64], on_checked: OnChecked | None) -> dict[str, str]:
    bad: dict[str, str] = {}
    with ThreadPoolExecutor(min(_MOST_THREADS, os.cpu_count() or 1), thread_name_prefix="dtpipe-check") as pool:
        for start in range(0, len(rows), _AT_ONCE):
            chosen = rows[start : start + _AT_ONCE]
            for row, reason in zip(chosen, pool.map(lambda row: _reason(reader, int(row)), chosen), strict=True):
                if reason is not None:
                    bad[reader.listing.keys[row]] = reason
            if on_checked is not None:
                on_checked(start + len(chosen), len(rows), _samples(bad))
    return bad


def _samples(bad: Mapping[str, str]) -> list[BadSample]:
    return [BadSample(key, reason) for key, reason in bad.items()]


def _reason(reader: ImageReader, row: int) -> str | None:
    """Why an image is bad; None for a good one."""
    try:
        reader.image(row)
    except BadImage as err:
        return err.reason
    return None


@contextmanager
def _turn(run: Path) -> Iterator[None]:
    with _writing(run):
        run.mkdir(parents=True, exist_ok=True)
        lock = (run / ".checking").open("a+")
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def _writing(run: Path) -> Iterator[None]:
    try:
        yield
    except OSError as err:
        raise StoreError(f"{run}: the run folder cannot be written: {err}; choose another --out") from err
