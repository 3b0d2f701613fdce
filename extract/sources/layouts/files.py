"""Any files below one root, for layouts: images, masks and tables side by side in a folder, a zip or a tar.

A root is a folder on a disk or any fsspec URL, `data.zip`, a folder in it (`data.zip/voc`), or one tar. Names are
POSIX paths below the root, NFC.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import NoReturn

from dtpipe.extract.sources import folder, tar, zip
from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.names import is_image, key_of
from dtpipe.extract.sources.places import find_files, open_place, unreadable
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.store.paths import is_url

_SHOWN = 5  # names in a sentence


class Tree:
    """The files below one root. A copy made by pickling opens the root anew."""

    def __init__(self, root: str) -> None:
        """Raises: InputError when there is no such folder or archive."""
        self.root = root.rstrip("/") or root
        self._archive = _archive(self.root)
        self._source = self._archive or folder.FolderSource(self.root, labelled=False)
        self._members: Sequence[tuple[str, str]] | None = None

    def __reduce__(self) -> tuple[type[Tree], tuple[str]]:
        return Tree, (self.root,)

    def files(self, under: str = "") -> Mapping[str, str]:
        """Name below the root to URI, of all files in a folder of it and below; hidden ones are left out.

        Raises: InputError when there is no such folder, naming what lies there.
        """
        inside = _inside(under)
        if self._archive is not None:
            members = {name: uri for name, uri in self._listed() if name.startswith(inside)}
            if inside and not members:
                self.refuse_missing(under)
            return members
        place = open_place(self._path(under))
        if not place.is_folder:
            self.refuse_missing(under)
        return {inside + key_of(name): place.uri(path) for name, path in find_files(place, Counter())}

    def images(self, under: str = "") -> dict[str, SourceItem]:
        """Those of `files` that are images by their name; their keys are paths below `under`. Raises: as `files`."""
        start = len(_inside(under))
        return {name: SourceItem(name[start:], uri) for name, uri in self.files(under).items() if is_image(name)}

    def has(self, name: str) -> bool:
        """True where a file or folder is there."""
        if self._archive is not None:
            return any(f"{member}/".startswith(f"{name}/") for member, _ in self._listed())
        place = open_place(self._path(name))
        return place.is_file or place.is_folder

    def has_file(self, name: str) -> bool:
        """True where a file is there."""
        if self._archive is not None:
            return any(member == name for member, _ in self._listed())
        return open_place(self._path(name)).is_file

    def read(self, uri: str) -> bytes:
        """Bytes of a file. Raises: BadImage when it cannot be read whatever one does, else InputError."""
        return self._source.read(uri)

    def read_named(self, name: str) -> bytes:
        """Bytes of a file that says something of many images; on a disk or URL it may have any size.

        An absolute path or a URL names a file elsewhere. Raises: InputError, for a file that is not there naming what
        lies there.
        """
        if is_elsewhere(name):
            return read_file(name)
        if self._archive is not None:
            uri = dict(self._listed()).get(name)
            try:
                return self.read(uri) if uri is not None else self.refuse_missing(name)
            except BadImage as err:
                raise InputError(f"{self.root}: {name} cannot be read: {err.reason}; unpack or pack it again") from err
        if not open_place(self._path(name)).is_file:
            self.refuse_missing(name)
        return read_file(self._path(name))

    def refuse_missing(self, name: str) -> NoReturn:
        """Raises: InputError for a file or folder that is not there, naming what lies there."""
        above = name.strip("/")
        while above:
            above = above.rpartition("/")[0]
            if seen := self.names(above):
                lies = f"{few(seen)} in {above}" if above else few(seen)
                raise InputError(f"{self.root}: there is no {name}; it holds {lies}; check root and split")
        raise InputError(f"{self.root}: there is no {name}; it is empty; check root and split")

    def _listed(self) -> Sequence[tuple[str, str]]:
        if self._members is None:
            assert self._archive is not None
            self._members = self._archive.members()
        return self._members

    def _path(self, name: str) -> str:
        return f"{self.root}/{name.strip('/')}".rstrip("/")

    def names(self, under: str = "") -> Sequence[str]:
        """Names of what lies right in a folder; none where there is no such folder."""
        if self._archive is not None:
            start = len(_inside(under))
            names = (name for name, _ in self._listed() if name.startswith(_inside(under)))
            return sorted({name[start:].partition("/")[0] for name in names})
        place = open_place(self._path(under))
        paths = place.fs.ls(place.path, detail=False) if place.is_folder else []
        return sorted(key_of(str(path).rstrip("/").rpartition("/")[2]) for path in paths)


def is_elsewhere(name: str) -> bool:
    """True for an absolute path or a URL, in the place of a name below a root."""
    return name.startswith(("/", "~")) or is_url(name)


def read_file(url: str) -> bytes:
    """A file on a disk or any URL, whatever its size. Raises: InputError."""
    place = open_place(url)
    if not place.is_file:
        raise InputError(f"{url}: no such file; check its path")
    try:
        with place.open(place.path) as file:
            return file.read()
    except InputError:
        raise
    except Exception as err:  # each file system raises its own
        raise unreadable(url, err) from err


def few(names: Sequence[str]) -> str:
    """The first few of some names, and how many more there are."""
    more = len(names) - _SHOWN
    return ", ".join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _inside(under: str) -> str:
    return f"{under.strip('/')}/" if under.strip("/") else ""


def _archive(root: str) -> zip.ZipSource | tar.TarSource | None:
    source = zip.KIND.recognise(root) or tar.KIND.recognise(root)
    assert source is None or isinstance(source, zip.ZipSource | tar.TarSource)
    return source
