"""Digests of images by their content, however many there are; those of many are made once and kept in a sealed file.

Images are read and forgotten, so that only numbers are in memory. Labelled images are kept by their key, their size and
the stamp of their file, so that a changed or another one is read, and no other. Objects of a store have no stamp; there
a changed image under an old key is seen once the file of digests is taken away.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from blake3 import blake3

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.errors import BadImage, DtpipeError, InputError
from dtpipe.manifests.phases import counted
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_images
from dtpipe.manifests.records.image_digests import Digests, image_digest, pack_digests, read_digests, short_digest
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.cli.console import Note

KEPT_FROM = 5_000
"""Images from which on digests are kept in a file, and progress is said."""
UNUSABLE = 0
"""In place of the digest of an image that cannot be read."""
BATCH = 256
"""Images that are read before the digests of the first are asked for."""
_THREADS = 8
_LABELLED = "labelled.blake3"
_Name = TypeVar("_Name")

DigestsOf = Callable[[LabelledSet, str], Digests]
"""Digests of a set's images by row, `UNUSABLE` for what cannot be read; none where nobody looks. The text says which
images they are."""


@dataclass(frozen=True)
class DigestStore:
    """Makes digests, and keeps those of many images in a folder, if there is one."""

    folder: Path | None
    note: Note

    def of_set(self, labelled: LabelledSet, which: str) -> Digests:
        """Digests of all images of a set, by row; what is made is kept on the way, so that a kill loses little.

        Raises: InputError when its source cannot be read.
        """
        if labelled.digests:
            return known_digests(labelled, which)
        names, known = _names_of(labelled), self._known()
        digests = _looked_up(known, names)
        unread = np.flatnonzero(digests == UNUSABLE)
        made = in_threads(lambda row: _digest(labelled, row), unread.tolist())
        part = max(1, -(-len(unread) // 10))
        for done, digest in enumerate(counted(made, len(unread), f"digests of {which} images"), 1):
            digests[unread[done - 1]] = UNUSABLE if digest is None else digest
            if len(unread) >= KEPT_FROM and (done % part == 0 or done == len(unread)):
                self.note(f"{which} images are looked at, to find copies: {done} of {len(unread)} read")
                rows = unread[:done]
                self._write(_LABELLED, np.concatenate([known, np.stack([names[rows], digests[rows]], axis=1)]))
        return digests

    def _known(self) -> Digests:
        """What was kept of labelled images. Shapes: -> (n, 2) name and digest."""
        try:
            values = read_digests(self.folder / _LABELLED) if self.folder is not None else np.zeros(0, np.uint64)
        except DtpipeError:  # they are made again
            values = np.zeros(0, np.uint64)
        return values[: len(values) // 2 * 2].reshape(-1, 2)

    def kept(self, digests: Iterable[int], num: int, name: str, doing: str) -> Digests:
        """The digests of a file, else made now, in their order, and kept there where there are many.

        name: hex, other for other images.
        """
        path = None if self.folder is None or num < KEPT_FROM else self.folder / f"{name[:32]}.blake3"
        if path is not None and path.is_file():
            with suppress(DtpipeError):
                return read_digests(path)
        made = np.fromiter(self._told(digests, num, doing), dtype=np.uint64)
        if path is not None:
            self._write(path.name, made)
        return made

    def of_dataset(self, dataset: FeatureDataset, doing: str) -> Digests:
        """Digests of the images that a dataset stores, in the order of its good rows. Raises: what reading raises."""
        rows = dataset.columns.ok_rows
        digest = dataset.manifest.digest if dataset.manifest else f"{dataset.url}/{len(rows)}"

        def made() -> Iterator[int]:
            for start in range(0, len(rows), BATCH):
                yield from map(image_digest, read_images(dataset, rows[start : start + BATCH]))

        return self.kept(made(), len(rows), blake3_hex(digest.encode()), doing)

    def _write(self, name: str, digests: Digests) -> None:
        if self.folder is not None:
            with suppress(OSError):  # they are made again the next time
                self.folder.mkdir(parents=True, exist_ok=True)
                write_whole(self.folder / name, pack_digests(digests))

    def _told(self, digests: Iterable[int], num: int, doing: str) -> Iterator[int]:
        """The same, with a word at every tenth of many."""
        for done, digest in enumerate(counted(digests, num, doing), 1):
            yield digest
            if num >= KEPT_FROM and done % max(1, num // 10) == 0:
                self.note(f"{doing}: {done} of {num} read")


def known_digests(labelled: LabelledSet, _which: str) -> Digests:
    """Those of images that were looked at when the set was opened, else none: reads nothing."""
    return np.fromiter(map(short_digest, labelled.digests), dtype=np.uint64)


def in_threads(digest: Callable[[_Name], int | None], names: Sequence[_Name]) -> Iterator[int | None]:
    """The digest of each, in order."""
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="digest") as pool:
        for start in range(0, len(names), BATCH):
            yield from pool.map(digest, names[start : start + BATCH])


def _digest(labelled: LabelledSet, row: int) -> int | None:
    try:
        return image_digest(labelled.image(row))
    except InputError as err:
        if isinstance(err.__cause__, BadImage):
            return None
        raise


def _names_of(labelled: LabelledSet) -> Digests:
    """64 bits for each image, of all that can be told of it without reading it. Shapes: -> (n,)."""

    def name(row: int) -> int:
        stamp = "" if labelled.stamp is None else labelled.stamp(row)
        return short_digest(blake3(f"{labelled.keys[row]}\0{stamp}".encode("utf-8", "surrogatepass")).hexdigest())

    return np.fromiter(map(name, range(len(labelled))), dtype=np.uint64)


def _looked_up(known: Digests, names: Digests) -> Digests:
    """The digest of each name, `UNUSABLE` for one that is not known. Shapes: known (m, 2), names (n,) -> (n,)."""
    digests = np.full(len(names), UNUSABLE, dtype=np.uint64)
    if len(known):
        ordered = known[np.argsort(known[:, 0], kind="stable")]
        places = np.searchsorted(ordered[:, 0], names).clip(max=len(ordered) - 1)
        there = ordered[places, 0] == names
        digests[there] = ordered[places[there], 1]
    return digests
