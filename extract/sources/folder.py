"""Images in a folder and its sub-folders, on a local disk or any fsspec URL; with or without class labels.

Every file with an image's extension is a sample, a broken one too: it becomes a bad sample with its reason. Other
files, and hidden ones, are ignored and counted.
"""

from __future__ import annotations

import errno
import os
import posixpath
import stat
import unicodedata
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote_from_bytes, unquote_to_bytes

from dtpipe.extract.sources.base import SourceItem, SourceKind, register_source
from dtpipe.extract.transforms import BadImage
from dtpipe.manifests.errors import InputError, MissingPackageError

EXTENSIONS = frozenset(
    (
        *("jpg", "jpeg", "jpe", "jfif", "png", "apng", "gif", "bmp", "dib", "webp", "tif", "tiff", "avif", "qoi"),
        *("jp2", "j2k", "jpx", "jpc", "j2c", "ppm", "pgm", "pbm", "pnm", "pfm", "tga", "ico", "icns", "sgi", "dds", "pcx"),
    )
)
_MAX_FILE_BYTES = 2**31
_QUOTED = "file-bytes:"  # URI of a local path that is not valid Unicode
_TRY_AGAIN = frozenset(
    {errno.EINTR, errno.EAGAIN, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ESTALE, errno.ETIMEDOUT, errno.ENOTCONN}
    | {errno.ECONNREFUSED, errno.ECONNRESET, errno.ECONNABORTED, errno.EHOSTDOWN, errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH}
)


class FolderSource:
    """Samples below one folder; the key is the POSIX path inside it, with extension."""

    def __init__(self, url: str, labelled: bool) -> None:
        """Raises: InputError when `url` is not a folder."""
        self.url = url
        self.labelled = labelled
        self._fs, self._root, self._local = _open_folder(url)
        self._files: list[tuple[str, str]] | None = None  # key, URI
        self._ignored: Counter[str] = Counter()

    @property
    def kind(self) -> str:
        """`class_folder` with labels, else `folder`."""
        return "class_folder" if self.labelled else "folder"

    def list(self) -> Sequence[SourceItem]:
        """All samples, sorted by key; the label is the first folder's name, of class folders only.

        Raises: InputError for a folder without images, or class folders with an image outside of any.
        """
        files = self._walked()
        if not self.labelled:
            return [SourceItem(key, uri) for key, uri in files]
        outside = next((key for key, _ in files if "/" not in key), None)
        if outside is not None:
            raise InputError(f"{self.url}: {outside} lies in no class folder; move it into one, or use extract.source.kind=folder")
        return [SourceItem(key, uri, key.split("/", 1)[0]) for key, uri in files]

    def ignored(self) -> Mapping[str, int]:
        """What lies in the folder and is no sample: extension, `hidden` or `special`, to count."""
        self._walked()
        return dict(self._ignored)

    def read(self, uri: str) -> bytes:
        """Bytes of one sample. Raises: BadImage when this file is gone or unreadable, InputError when the whole folder or store is."""
        if not self._local:
            return self._read_remote(uri)
        try:
            return _read_local(uri)
        except OSError as err:
            if err.errno in _TRY_AGAIN:
                raise InputError(f"{uri}: {err.strerror}; run again") from err
            if not _holds_anything(self._root):
                raise InputError(f"{uri}: {err.strerror}, and {self.url} is gone or empty: is it mounted? then run again") from err
            raise BadImage(f"unreadable: {err.strerror}") from err

    def has_only_class_folders(self) -> bool:
        """True when every image lies in a sub-folder."""
        return all("/" in key for key, _ in self._walked())

    def _read_remote(self, uri: str) -> bytes:
        try:
            return bytes(self._fs.cat_file(self._fs._strip_protocol(uri)))
        except (FileNotFoundError, IsADirectoryError) as err:
            raise BadImage(f"unreadable: {type(err).__name__}") from err
        except OSError as err:  # PermissionError too: what was listed may be read, unless credentials have expired
            raise InputError(f"{uri}: {type(err).__name__}: {err}; run again when the store answers") from err

    def _walked(self) -> Sequence[tuple[str, str]]:
        if self._files is None:
            self._ignored.clear()
            found = self._walk_local() if self._local else self._walk_remote()
            self._files = sorted(found)
        if not self._files:
            seen = ", ".join(f"{count} {name}" for name, count in self._ignored.most_common(5)) or "it is empty"
            raise InputError(f"{self.url}: no image in this folder ({seen}); images are files that end in {', '.join(sorted(EXTENSIONS))}")
        return self._files

    def _walk_local(self) -> Iterator[tuple[str, str]]:
        for parts in _local_files(self._root, self._ignored):
            if self._is_image(parts[-1]):
                yield _key("/".join(parts)), _local_uri(os.path.join(self._root, *parts))  # noqa: PTH118  os.fsencode'd names

    def _walk_remote(self) -> Iterator[tuple[str, str]]:
        try:
            paths = self._fs.find(self._root)
        except Exception as err:  # each file system raises its own
            raise InputError(f"{self.url}: cannot be listed ({type(err).__name__}: {err}); check the URL and your credentials") from err
        for path in paths:
            parts = posixpath.relpath(path, self._root or "/").split("/")
            if any(_is_hidden(part) for part in parts):
                self._ignored["hidden"] += 1
            elif self._is_image(parts[-1]):
                yield _key("/".join(parts)), self._fs.unstrip_protocol(path)

    def _is_image(self, name: str) -> bool:
        extension = posixpath.splitext(name)[1].lower()
        if extension[1:] in EXTENSIONS:
            return True
        self._ignored[extension or "without extension"] += 1
        return False


def _open_folder(url: str) -> tuple[Any, str, bool]:
    """File system, path in it, and whether it is the local one."""
    from fsspec.core import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    try:
        fs, root = url_to_fs(url)
        is_folder, is_file = fs.isdir(root), fs.isfile(root)
    except ImportError as err:
        raise MissingPackageError(f"{url}: {err}") from err
    except Exception as err:  # each file system raises its own
        raise InputError(f"{url}: cannot be opened ({type(err).__name__}: {err}); check the URL and your credentials") from err
    if is_file and not is_folder:
        raise InputError(f"{url}: is a file, and images are read from folders; give the folder it lies in")
    if not is_folder:
        raise InputError(f"{url}: no such folder; check the path of your images")
    return fs, root, isinstance(fs, LocalFileSystem)


# --- local walk ------------------------------------------------------------------------------------------------------


def _local_files(root: str, ignored: Counter[str]) -> Iterator[tuple[str, ...]]:
    """Path parts of each file below `root`. Links are followed, but never back into a folder they came from."""
    stack: list[tuple[tuple[str, ...], frozenset[tuple[int, int]]]] = [((), frozenset())]
    while stack:
        parts, above = stack.pop()
        folder = os.path.join(root, *parts)  # noqa: PTH118  surrogates in names survive
        try:
            here = _identity(folder)
            entries = list(os.scandir(folder))
        except OSError as err:
            raise InputError(f"{folder}: cannot be listed ({err.strerror}); make it readable or move it away") from err
        if here in above:
            ignored["link loop"] += 1
            continue
        for entry in entries:
            path = (*parts, entry.name)
            if _is_hidden(entry.name):
                ignored["hidden"] += 1
            elif _is_folder(entry):
                stack.append((path, above | {here}))
            elif _is_special(entry):
                ignored["special"] += 1
            else:
                yield path


def _identity(folder: str) -> tuple[int, int]:
    found = Path(folder).stat()
    return found.st_dev, found.st_ino


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that points to itself
        return False


def _is_special(entry: os.DirEntry[str]) -> bool:
    """A pipe, socket or device, which might be read for ever. A dangling link is none: it becomes a bad sample."""
    try:
        mode = entry.stat().st_mode
    except OSError:
        return False
    return not stat.S_ISREG(mode)


# --- names -----------------------------------------------------------------------------------------------------------


def _key(path: str) -> str:
    """NFC; bytes of a name that are not Unicode are written as \\xNN."""
    text = path.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")
    return unicodedata.normalize("NFC", text)


def _local_uri(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        return _QUOTED + quote_from_bytes(os.fsencode(path))
    return path


def _read_local(uri: str) -> bytes:
    """Raises: BadImage for what is no file or too large, and OSError."""
    path = Path(os.fsdecode(unquote_to_bytes(uri[len(_QUOTED) :])) if uri.startswith(_QUOTED) else uri)
    found = path.stat()
    if not stat.S_ISREG(found.st_mode):
        raise BadImage("unreadable: not a regular file")
    if found.st_size > _MAX_FILE_BYTES:
        raise BadImage(f"file of {found.st_size} bytes is over the limit of {_MAX_FILE_BYTES}")
    return path.read_bytes()


def _holds_anything(folder: str) -> bool:
    """False for a folder that is gone, empty as a mount point without its mount is, or out of reach."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


# --- registration ----------------------------------------------------------------------------------------------------


def _recognise(url: str) -> FolderSource | None:
    """Class folders when every image lies in a sub-folder, else a plain folder; None when it is no folder."""
    source = FolderSource(url, labelled=False)
    source.labelled = source.has_only_class_folders()
    return source


register_source(
    SourceKind(
        kind="class_folder",
        reads="Images in sub-folders of a folder or URL; the first folder's name is the label.",
        open=lambda url: FolderSource(url, labelled=True),
        recognise=_recognise,
    )
)
register_source(
    SourceKind(
        kind="folder",
        reads="All images below a folder or URL, without labels.",
        open=lambda url: FolderSource(url, labelled=False),
        recognise=_recognise,
    )
)
