"""Bad samples of a dataset with their reasons, and what can still be shown of their images, from where they came."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.write.listing import read_listing_table
from dtpipe.pipeline.report.inspect import bad_records

MOST_SHOWN = 24
_THUMBNAIL_PX = 96


@dataclass(frozen=True)
class BadSampleShown:
    """One bad sample."""

    key: str
    reason: str
    thumbnail: NDArray[np.uint8] | None
    """What the file still shows, (h, w, 3); None where it shows nothing, or is not there any more."""


def shown_bad_samples(dataset: FeatureDataset) -> Iterator[BadSampleShown]:
    """The first `MOST_SHOWN`, in row order."""
    records = bad_records(dataset)[:MOST_SHOWN]
    uris = _uris(dataset) if records else []
    source = _source(dataset) if records else None
    for record in records:
        thumbnail = None if source is None else _thumbnail(source, uris[record["row"]])
        yield BadSampleShown(record["key"], record["reason"], thumbnail)


def _uris(dataset: FeatureDataset) -> list[str]:
    table = read_listing_table(dataset.store, dataset.plan.listing_blake3, ("uri",))
    uris: list[str] = table["uri"].to_pylist()
    return uris


def _source(dataset: FeatureDataset) -> Any:
    """Where the images came from, if that is known and there."""
    config = dataset.plan.provenance.get("config") or {}
    images = config.get("images")
    if not isinstance(images, str):
        return None
    try:
        return open_source(images, (config.get("source") or {}).get("kind") or "auto")
    except (DtpipeError, OSError):
        return None


@contextmanager
def _torn_files() -> Iterator[None]:
    """Inside, Pillow gives what there is of a file whose end is missing."""
    from PIL import ImageFile

    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = True
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def _thumbnail(source: Any, uri: str) -> NDArray[np.uint8] | None:
    """What can be decoded of a file, however little."""
    from PIL import Image

    try:
        with _torn_files():
            image = Image.open(io.BytesIO(source.read(uri))).convert("RGB")
        image.thumbnail((_THUMBNAIL_PX, _THUMBNAIL_PX))
    except Exception:
        return None
    return np.asarray(image)
