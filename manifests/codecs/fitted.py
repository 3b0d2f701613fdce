"""Arrays that a codec was fitted with: `codecs/<blake3>.safetensors` beside the data, named by a level's parameters.

One rule: a name is the digest of what the file holds, and nothing is used that does not have it. So a fit is part of
the recipe, which names it, and a changed byte is an error before one feature is decoded.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.codecs.base import Array, Arrays
from dtpipe.manifests.errors import ConfigError, DamagedDataError, MissingObjectError
from dtpipe.manifests.schema import LevelSpec
from dtpipe.manifests.store.open_files import ProcessLock
from dtpipe.manifests.store.store import Store

FITTED: Final = "fitted"
"""The codec parameter that holds the digest."""
FITTED_FOLDER: Final = "codecs/"
_SUFFIX = ".safetensors"
_DIGITS = frozenset("0123456789abcdef")
_KEPT = 8  # files whose arrays stay in memory; a dataset has one a level


class NotFitted:
    """For whoever asks a codec only what it stores: no array is at hand."""

    def load(self, digest: str) -> Arrays:
        """Raises: ConfigError."""
        raise ConfigError(f"a codec asks for its arrays {digest[:16]}.., and was opened without; open its dataset")


NOT_FITTED: Final = NotFitted()


@dataclass(frozen=True)
class HeldFitted:
    """Files in memory, by digest: of a fit that is not written yet."""

    files: Mapping[str, bytes]

    def load(self, digest: str) -> Arrays:
        """As `FittedArrays.load`."""
        return decode_fitted(self.files[digest], digest, fitted_name(digest))


class StoredFitted:
    """The files of one dataset."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._kept: OrderedDict[str, Arrays] = OrderedDict()
        self._turn = ProcessLock()

    def __getstate__(self) -> dict[str, Any]:
        return {"_store": self._store}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(state["_store"])  # type: ignore[misc]

    def load(self, digest: str) -> Arrays:
        """As `FittedArrays.load`."""
        with self._turn:
            if digest not in self._kept:
                self._kept[digest] = read_fitted(self._store, fitted_name(digest))
            self._kept.move_to_end(digest)
            while len(self._kept) > _KEPT:
                self._kept.popitem(last=False)
            return self._kept[digest]


def fitted_name(digest: str) -> str:
    """Object name of a fit."""
    return f"{FITTED_FOLDER}{digest}{_SUFFIX}"


def is_fitted_name(name: str) -> bool:
    """True for what `fitted_name` gives of a digest."""
    digest = name.removeprefix(FITTED_FOLDER).removesuffix(_SUFFIX)
    return name == fitted_name(digest) and len(digest) == 64 and _DIGITS.issuperset(digest)


def fitted_digest(level: LevelSpec) -> str | None:
    """Digest of the file that a level names; None where its codec needs none, or it names nothing that is a digest."""
    digest = level.codec.parameters.get(FITTED)
    return digest if isinstance(digest, str) and is_fitted_name(fitted_name(digest)) else None


def fitted_names(*levels: LevelSpec) -> tuple[str, ...]:
    """Object names of all that these levels were fitted with, each once."""
    return tuple(sorted({fitted_name(digest) for level in levels if (digest := fitted_digest(level)) is not None}))


def encode_fitted(arrays: Arrays) -> tuple[str, bytes]:
    """Digest and bytes of a file; equal arrays give equal bytes."""
    data = save({name: np.ascontiguousarray(arrays[name]) for name in sorted(arrays)})
    return blake3_hex(data), data


def decode_fitted(data: bytes, digest: str, where: str) -> dict[str, Array]:
    """The arrays of a file. Raises: DamagedDataError naming `where` when it is not the one that was fitted."""
    if blake3_hex(data) != digest:
        raise DamagedDataError(
            f"{where} is not what its levels were coded with (blake3 differs): damaged or swapped; put back a copy, or "
            "run `dtpipe verify --repair` on the dataset and extract again"
        )
    try:
        return dict(load(data))
    except (SafetensorError, KeyError, ValueError) as err:
        raise DamagedDataError(f"{where} holds no arrays ({err}); the dataset was not written by dtpipe") from err


def read_fitted(store: Store, name: str) -> dict[str, Array]:
    """The arrays of a dataset's file, by its object name. Raises: MissingObjectError, DamagedDataError."""
    try:
        data = store.read(name)
    except MissingObjectError as err:
        raise MissingObjectError(
            f"{store.where(name)} is missing, and its levels cannot be decoded without it; put back a copy, or run the "
            "same `dtpipe extract` again, which fits anew"
        ) from err
    return decode_fitted(data, name.removeprefix(FITTED_FOLDER).removesuffix(_SUFFIX), store.where(name))
