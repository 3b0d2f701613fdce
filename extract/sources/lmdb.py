"""Images in an LMDB database, as LSUN publishes them: each key's value is an image file.

Needs the package `lmdb` (extra `lmdb`). The database is opened read-only and without its lock file, so it may lie on a
read-only disk, and must not be written to meanwhile.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote_from_bytes, unquote_to_bytes

from dtpipe.extract.sources.base import Container, SourceItem, SourceKind
from dtpipe.extract.sources.names import MAX_FILE_BYTES, key_of, looks_like_image
from dtpipe.extract.sources.places import Place, local_path, local_uri, open_place
from dtpipe.manifests.errors import BadImage, InputError, MissingPackageError
from dtpipe.manifests.store.open_files import ProcessLock
from dtpipe.manifests.words import count_of

if TYPE_CHECKING:
    import lmdb

_DATA_FILE = "data.mdb"
_COUNTS = frozenset({b"length", b"__len__", b"__keys__", b"num-samples", b"num_samples"})  # some tools write these
_ENVIRONMENTS: dict[str, lmdb.Environment] = {}
_LOCK = ProcessLock()
_LOOKED_AT = 100  # entries, where it is only asked whether a database holds images


class LmdbSource:
    """Every entry of the main database; the key is the entry's key."""

    kind = "lmdb"

    def __init__(self, url: str) -> None:
        """Raises: InputError when there is no database, MissingPackageError without the package."""
        place = open_place(url)
        if not place.is_local:
            raise InputError(f"{url}: LMDB is read from a local disk only; copy the database there")
        self.url = url
        self._path = place.path
        _environment(self._path)

    def list(self) -> Sequence[SourceItem]:
        """All samples, sorted by key. Raises: InputError for an empty or damaged database."""
        return self._listed[0]

    def ignored(self) -> Mapping[str, int]:
        """Entries that hold a count of the others, as `metadata`."""
        return {"metadata": self._listed[1]} if self._listed[1] else {}

    def read(self, uri: str) -> bytes:
        """Bytes of one sample. Raises: BadImage when they cannot be had, InputError when the database cannot."""
        import lmdb

        path, _, quoted = uri.rpartition("#")
        try:
            with _environment(local_path(path)).begin(buffers=True) as transaction:
                value = transaction.get(unquote_to_bytes(quoted))
                if value is not None and len(value) > MAX_FILE_BYTES:
                    raise BadImage(f"file of {len(value)} bytes is over the limit of {MAX_FILE_BYTES}")
                data = None if value is None else bytes(value)
        except lmdb.Error as err:
            raise BadImage(f"unreadable: {_said(err, path)}") from err
        if data is None:
            raise BadImage("unreadable: its key is gone from the database")
        return data

    @cached_property
    def _listed(self) -> tuple[Sequence[SourceItem], int]:
        """All samples, and how many entries are none."""
        import lmdb

        try:
            with _environment(self._path).begin() as transaction:
                keys = [bytes(key) for key in transaction.cursor().iternext(keys=True, values=False)]
        except lmdb.Error as err:
            raise InputError(
                f"{self.url}: the database cannot be listed ({_said(err, self._path)}); fetch or write it again"
            ) from err
        where = local_uri(self._path)
        items = [
            SourceItem(key_of(os.fsdecode(key)), f"{where}#{quote_from_bytes(key)}")
            for key in keys
            if key not in _COUNTS
        ]
        if not items:
            raise InputError(
                f"{self.url}: the database has no image in it ({count_of(len(keys), 'entry', 'entries')}); "
                "check the path of your images"
            )
        return sorted(items, key=lambda item: item.key), len(keys) - len(items)


def _environment(path: str) -> lmdb.Environment:
    """The open database, one per path, since a process cannot open one twice; threads share it, a fork inherits it."""
    real = os.path.realpath(os.path.join(path, _DATA_FILE) if Path(path).is_dir() else path)  # noqa: PTH118  surrogates
    with _LOCK:
        if real not in _ENVIRONMENTS:
            _ENVIRONMENTS[real] = _open(real)
        return _ENVIRONMENTS[real]


def _open(path: str) -> lmdb.Environment:
    try:
        import lmdb
    except ImportError as err:
        raise MissingPackageError(
            f"{path}: reading LMDB needs the package lmdb; run `pip install 'dtpipe[lmdb]'`"
        ) from err
    file = Path(path)
    if not file.is_file():
        raise InputError(f"{path}: no LMDB database; give the folder that {_DATA_FILE} lies in")
    try:
        opened = lmdb.open(path, subdir=False, readonly=True, lock=False, readahead=False, create=False)
        num_bytes = (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]
    except lmdb.Error as err:
        raise InputError(
            f"{path}: is no LMDB database that can be read ({_said(err, path)}); fetch or write it again"
        ) from err
    if file.stat().st_size < num_bytes:  # pages behind the end of a mapped file kill the process that touches them
        opened.close()
        raise InputError(f"{file}: is cut off, {file.stat().st_size} of {num_bytes} bytes are there; fetch it again")
    return opened


def _said(err: Exception, path: str) -> str:
    """LMDB's own words, without the path."""
    return str(err).removeprefix(f"{path}: ")


def _example(place: Place, path: str) -> str | None:
    """The key of an image among a database's first entries. Raises: InputError, MissingPackageError."""
    import lmdb

    folder = os.path.dirname(path)  # noqa: PTH120  surrogates in names survive
    source = LmdbSource(folder if place.is_local else place.url)
    try:
        with _environment(source._path).begin(buffers=True) as transaction:
            for key, value in islice(transaction.cursor(), _LOOKED_AT):
                if looks_like_image(bytes(value[:16])):
                    return key_of(os.fsdecode(bytes(key)))
    except lmdb.Error as err:
        raise InputError(
            f"{folder}: the database cannot be read ({_said(err, folder)}); fetch or write it again"
        ) from err
    return None


def _recognise(url: str) -> LmdbSource | None:
    """A local file that ends in .mdb or .lmdb."""
    named = url.lower().endswith((".mdb", ".lmdb"))
    return LmdbSource(url) if named and (place := open_place(url)).is_local and place.is_file else None


KIND = SourceKind(
    kind="lmdb",
    reads="Images in an LMDB database (a folder with data.mdb), as LSUN has them; needs the extra `lmdb`.",
    open=LmdbSource,
    recognise=_recognise,
    container=Container(f"/{_DATA_FILE}", _example),
)
