"""The stored images of a feature dataset: more draws, timesteps or teachers for the same images, without their source.

A stored image is the teacher's input as it was, so nothing is decoded or resized twice; keys and labels stay. The new
dataset joins with the old one by key.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from functools import cached_property

from PIL import Image

from dtpipe.extract.sources.base import SourceItem, SourceKind
from dtpipe.extract.sources.places import Place, open_place, unreadable
from dtpipe.manifests.errors import DtpipeError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image
from dtpipe.manifests.write.commit import MANIFEST_FILE
from dtpipe.manifests.write.plan import PLAN_FILE

_FORMAT = b"dtpipe-features/"


class FeaturesSource:
    """Every good sample of a complete dataset that stores images; a URI is the sample's row."""

    kind = "features"

    def __init__(self, url: str) -> None:
        """Raises: InputError when there is no complete dataset, or it stores no images."""
        self.url = url
        try:
            self.dataset = FeatureDataset.open(url)
        except InputError:
            raise
        except DtpipeError as err:
            raise InputError(f"{url} cannot be a source of images: {err}") from err
        if self.dataset.recipe.images != "stored":
            raise InputError(
                f"{url} stores no images, so it is no source of them; name the dataset that it is joined with"
            )

    def list(self) -> Sequence[SourceItem]:
        """All good samples, sorted by key."""
        return self._listed

    def ignored(self) -> Mapping[str, int]:
        """Bad samples of the dataset."""
        num_bad = len(self.dataset.columns) - len(self.dataset.columns.ok_rows)
        return {"bad": num_bad} if num_bad else {}

    def read(self, uri: str) -> bytes:
        """The stored image as an uncompressed PNG. Raises: InputError when the dataset is damaged there."""
        try:
            pixels = read_image(self.dataset, int(uri))
        except InputError:
            raise
        except DtpipeError as err:
            raise InputError(str(err)) from err
        data = io.BytesIO()
        Image.fromarray(pixels).save(data, "PNG", compress_level=0)
        return data.getvalue()

    @cached_property
    def _listed(self) -> Sequence[SourceItem]:
        columns = self.dataset.columns
        items = (SourceItem(columns.keys[row], str(row), columns.labels[row]) for row in columns.ok_rows)
        return sorted(items, key=lambda item: item.key)


def _recognise(url: str) -> FeaturesSource | None:
    """A folder with a manifest of ours, or a plan: web pages and other tools have a manifest.json too."""
    place = open_place(url)
    ours = place.is_folder and any(_is_ours(place, file) for file in (MANIFEST_FILE, PLAN_FILE))
    return FeaturesSource(url) if ours else None


def _is_ours(place: Place, file: str) -> bool:
    path = f"{place.path.rstrip('/')}/{file}"
    try:
        return bool(place.fs.isfile(path)) and _FORMAT in place.fs.cat_file(path)
    except Exception as err:  # each file system raises its own
        raise unreadable(path, err) from err


KIND = SourceKind(
    kind="features",
    reads="A feature dataset that stores images: they are encoded again, by another teacher or with other draws and "
    "timesteps.",
    open=FeaturesSource,
    recognise=_recognise,
)
