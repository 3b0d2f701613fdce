"""`dtpipe.open`: a feature dataset to look into, by key, by position or one sample after another.

It reads when something is looked at; what comes back is what was written, or an error says what and where.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import composed
from dtpipe.manifests.read.source import FeatureSource, read_image, read_level
from dtpipe.manifests.schema import LevelSpec, ViewSpec
from dtpipe.manifests.words import count_of

if TYPE_CHECKING:
    from PIL.Image import Image

    from dtpipe.distill.stream.samples import FeatureSamples

_Value = TypeVar("_Value")
_SHOWN_KEYS = 3


def open_dataset(*urls: str | os.PathLike[str], join: bool = False, allow_incomplete: bool = False) -> Dataset:
    """Open a feature dataset: a folder or any URL. Several are read one after the other, or joined by key.

    allow_incomplete: of an unfinished one, the samples that are written.
    Raises: InputError when there is none; IncompleteError when it is unfinished; ManifestError naming what is damaged;
    ConfigError naming what does not fit together.
    """
    if not urls:
        raise ConfigError("no dataset is named; give the URL of one")
    source = composed([FeatureDataset.open(url, allow_incomplete) for url in urls], join)
    return Dataset(source, source.columns.ok_rows)


class Dataset:
    """Samples of a feature dataset; bad ones are left out. `len`, `in`, iteration, a key, a position or a slice."""

    def __init__(self, source: FeatureSource, rows: NDArray[np.int64]) -> None:
        self.source, self._rows = source, rows

    @property
    def levels(self) -> tuple[LevelSpec, ...]:
        """What each level is: stride, channels, height and width, dtype, tap."""
        return self.source.levels

    @property
    def views(self) -> tuple[ViewSpec, ...]:
        """The stored encodings of each image: noise draw, timestep, flipped or not."""
        return self.source.views

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width of the stored images."""
        return self.source.image_px

    @property
    def keys(self) -> Sequence[str]:
        """Stable names of the samples, in order."""
        return _Chosen(self.source.columns.keys, self._rows)

    @property
    def labels(self) -> Sequence[str | None]:
        """Labels of the samples, in order; None where the source had none."""
        return _Chosen(self.source.columns.labels, self._rows)

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, key: object) -> bool:
        return isinstance(key, str) and self._position(key) is not None

    def __iter__(self) -> Iterator[FeatureSample]:
        return (self[idx] for idx in range(len(self)))

    @overload
    def __getitem__(self, which: str | int) -> FeatureSample: ...
    @overload
    def __getitem__(self, which: slice | Sequence[int]) -> Dataset: ...
    def __getitem__(self, which: str | int | slice | Sequence[int]) -> FeatureSample | Dataset:
        """A sample by key or position; of a slice, or of several positions, a dataset of these.

        Raises: InputError for an unknown key or position.
        """
        if isinstance(which, str):
            return self._sample(int(self._rows[self._require(which)]))
        if isinstance(which, slice):
            return Dataset(self.source, self._rows[which])
        if isinstance(which, int | np.integer):
            return self._sample(int(self._rows[self._within(int(which))]))
        return Dataset(self.source, self._rows[[self._within(int(idx)) for idx in which]])

    def torch(
        self,
        levels: Sequence[str] | None = None,
        view: int | None = 0,
        images: bool = True,
        transform: Callable[[dict[str, Any]], Any] | None = None,
    ) -> FeatureSamples:
        """A map-style dataset for torch's `DataLoader`, with workers or without; see `FeatureSamples` for its items.

        levels: which to read; default: all. view: which stored encoding; None draws one each time.
        Raises: ConfigError for an unknown level or view.
        """
        from dtpipe.distill.stream.samples import FeatureSamples

        known = [level.name for level in self.levels]
        chosen = known if levels is None else list(levels)
        if unknown := [name for name in chosen if name not in known]:
            raise ConfigError(f"{self} has no level {unknown[0]!r}; choose from {', '.join(known)}")
        if view is not None:
            _check_view(self.source, view)
        return FeatureSamples(self.source, self._rows, chosen, view, images, transform)

    def show(self, key: str | int, view: int = 0) -> Image:
        """The image and its levels side by side, as a picture that a notebook displays; see `FeatureSample.show`."""
        return self[key].view(view).show()

    def __repr__(self) -> str:
        height, width = self.image_px
        levels = ", ".join(f"{level.name} {level.channels}x{level.height}x{level.width}" for level in self.levels)
        views = count_of(len(self.views), "view")
        where, num = self.source.columns.where, count_of(len(self), "sample")
        return f"Dataset({where}: {num}, {height}x{width} px, {levels}, {views})"

    def _sample(self, row: int) -> FeatureSample:
        columns = self.source.columns
        return FeatureSample(columns.keys[row], columns.labels[row], row, self.source)

    def _position(self, key: str) -> int | None:
        row = self.source.columns.find(key)
        place = -1 if row is None else int(np.searchsorted(self._rows[self._order], row))
        return int(self._order[place]) if 0 <= place < len(self) and self._rows[self._order[place]] == row else None

    @cached_property
    def _order(self) -> NDArray[np.int64]:
        return np.argsort(self._rows, kind="stable")

    def _require(self, key: str) -> int:
        place = self._position(key)
        if place is None:
            columns = self.source.columns
            status = columns.status[columns.row_of(key)]
            raise InputError(f"sample {key!r} is {'not in this part of the dataset' if status == 'ok' else status}")
        return place

    def _within(self, idx: int) -> int:
        if not -len(self) <= idx < len(self):
            raise InputError(f"there is no sample {idx}; positions are 0 to {len(self) - 1}")
        return idx % len(self)


@dataclass(frozen=True, eq=False)
class FeatureSample:
    """One image with its levels under one view; both are read when they are looked at, once."""

    key: str
    label: str | None
    row: int
    """In the dataset's listing."""
    source: FeatureSource = field(repr=False)
    view_idx: int = 0

    @cached_property
    def image(self) -> NDArray[np.uint8]:
        """The image that the levels are of: as it is stored, or mirrored where the view is flipped.

        Shapes: [H, W, 3] uint8. Raises: DamagedDataError; ConfigError where no images are stored.
        """
        image = read_image(self.source, self.row)
        return image[:, ::-1] if self.source.views[self.view_idx].flip else image

    @cached_property
    def levels(self) -> Mapping[str, NDArray[np.generic]]:
        """Decoded features by level. Shapes: each [C, h, w], in the level's dtype. Raises: DamagedDataError."""
        return _Levels(self)

    def view(self, idx: int) -> FeatureSample:
        """The same sample under another view. Raises: ConfigError when there are fewer."""
        _check_view(self.source, idx)
        return FeatureSample(self.key, self.label, self.row, self.source, idx)

    def show(self) -> Image:
        """The image, and of each level its three directions of most variance as red, green and blue.

        Colours of one level and of another have nothing to do with each other. Raises: as `image` and `levels`.
        """
        from dtpipe.pipeline.library.pictures import sheet

        return sheet(self.image, self.levels)


class _Levels(Mapping[str, NDArray[np.generic]]):
    """Levels of one sample, read when they are asked for."""

    def __init__(self, sample: FeatureSample) -> None:
        self._sample = sample
        self._read: dict[str, NDArray[np.generic]] = {}

    def __getitem__(self, name: str) -> NDArray[np.generic]:
        if name not in self._read:
            sample = self._sample
            self._read[name] = read_level(sample.source, name, sample.row, sample.view_idx)
        return self._read[name]

    def __iter__(self) -> Iterator[str]:
        return (level.name for level in self._sample.source.levels)

    def __len__(self) -> int:
        return len(self._sample.source.levels)

    def __repr__(self) -> str:
        return f"levels {', '.join(self)}"


class _Chosen(Sequence[_Value]):
    """Some rows of a column, which may be as long as a dataset."""

    def __init__(self, column: Sequence[_Value], rows: NDArray[np.int64]) -> None:
        self._column, self._rows = column, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, idx: int) -> _Value: ...
    @overload
    def __getitem__(self, idx: slice) -> Sequence[_Value]: ...
    def __getitem__(self, idx: int | slice) -> _Value | Sequence[_Value]:
        if isinstance(idx, slice):
            return _Chosen(self._column, self._rows[idx])
        return self._column[int(self._rows[idx])]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and list(self) == list(other)

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        shown = ", ".join(repr(value) for value in self[:_SHOWN_KEYS])
        return f"[{shown}{', ..' if len(self) > _SHOWN_KEYS else ''}] ({len(self)})"


def _check_view(source: FeatureSource, view: int) -> None:
    if not 0 <= view < len(source.views):
        raise ConfigError(f"{source.columns.where} has no view {view}; it has views 0 to {len(source.views) - 1}")
