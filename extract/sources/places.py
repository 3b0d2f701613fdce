"""What lies under a URL, on a local disk or any fsspec store: the files of a folder or pattern, and their bytes.

One rule: BadImage is for one sample's own bytes. What is wrong with a store, a mount or a whole file is an InputError.
"""

from __future__ import annotations

import errno
import os
import posixpath
import re
import stat
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import quote_from_bytes, unquote_to_bytes, urlsplit

from dtpipe.extract.sources.names import extension, is_hidden, key_of
from dtpipe.extract.sources.web import find_links, is_web, plain_path
from dtpipe.manifests.errors import BadImage, DtpipeError, InputError, MissingPackageError, UnreachableError
from dtpipe.manifests.store.paths import path_on_disk
from dtpipe.manifests.store.reading import PatientFiles
from dtpipe.manifests.store.reasons import reason_of

_QUOTED = "file-bytes:"  # URI of a local path that is not valid Unicode
_PATTERN = re.compile(r"[*?\[{]")
_WEB_PATTERN = re.compile(r"[*\[{]")
_T = TypeVar("_T")


@dataclass(frozen=True)
class Place:
    """What a URL names; it may still be a pattern where it is neither folder nor file."""

    url: str
    fs: Any
    path: str
    is_local: bool
    is_folder: bool
    is_file: bool

    def uri(self, path: str) -> str:
        """A path of this file system, as a listing keeps it."""
        return local_uri(path) if self.is_local else str(self.fs.unstrip_protocol(path))

    def open(self, path: str) -> BinaryIO:
        """A seekable file. Raises: InputError."""
        try:
            file: BinaryIO = open(path, "rb") if self.is_local else self.fs.open(path)  # noqa: SIM115, PTH123  the caller's
        except Exception as err:  # each file system raises its own
            raise unreadable(path, err) from err
        return file

    def head(self, path: str, size: int = 16) -> bytes:
        """The first bytes of a file, to see what it is; none where it cannot be read."""
        try:
            return self.read_range(path, 0, size) if self.is_local else bytes(self.fs.first_bytes(path, size))
        except Exception:  # each file system raises its own
            return b""

    def path_of(self, uri: str) -> str:
        """The inverse of `uri`."""
        return local_path(uri) if self.is_local else str(self.fs.strip_protocol(uri))

    def read_range(self, uri: str, offset: int, size: int) -> bytes:
        """Bytes of a file, fewer where it ends; keeps no handle, so threads and forks share nothing.

        Raises: InputError, or BadImage where the disk cannot read these bytes.
        """
        try:
            if self.is_local:
                return _pread(local_path(uri), offset, size)
            return bytes(self.fs.cat_file(self.path_of(uri), start=offset, end=offset + size))
        except Exception as err:
            if isinstance(err, OSError) and self.is_local and err.errno == errno.EIO:
                raise BadImage(f"unreadable: {err.strerror}") from err
            raise unreadable(uri, err) from err


def open_place(url: str) -> Place:
    """Look at a URL. Raises: InputError or MissingPackageError when its file system cannot be used."""
    from fsspec.implementations.local import LocalFileSystem

    with _looking_at(url):
        if (local := path_on_disk(url)) is not None:
            fs, path = LocalFileSystem(), str(local)
            return Place(url, fs, path, True, fs.isdir(path), fs.isfile(path))
        files = PatientFiles(url)
        return Place(url, files, files.path, False, files.isdir(files.path), files.isfile(files.path))


@contextmanager
def _looking_at(url: str) -> Iterator[None]:
    try:
        yield
    except MissingPackageError:
        raise
    except DtpipeError as err:
        raise InputError(str(err)) from err
    except Exception as err:  # each file system raises its own
        raise _input_error(f"{url}: cannot be opened", err) from err


def unreadable(where: str, err: Exception) -> InputError:
    """What to say when a file or store does not give its bytes."""
    return _input_error(f"{where}: cannot be read", err)


def _input_error(what: str, err: Exception) -> InputError:
    reason = reason_of(err)
    kind = UnreachableError if reason.waited else InputError
    return kind(f"{what} ({reason}); {reason.advice_for_input}")


def read_at(place: Place, uri: str, offset: int, size: int) -> bytes:
    """Exactly `size` bytes of a file. Raises: InputError when it ends before them."""
    data = place.read_range(uri, offset, size)
    if len(data) < size:
        raise changed(uri, f"ends before byte {offset + size}")
    return data


def changed(where: str, difference: str) -> InputError:
    """What to say of a container that is not the one that was listed."""
    return InputError(
        f"{where} {difference}, so it changed since it was listed; restore it, or extract into another --out"
    )


def _pread(path: str, offset: int, size: int) -> bytes:
    parts: list[bytes] = []
    with Path(path).open("rb", buffering=0) as file:
        while size > 0 and (part := os.pread(file.fileno(), size, offset)):
            parts.append(part)
            offset, size = offset + len(part), size - len(part)
    return b"".join(parts)


# --- several files as one source -------------------------------------------------------------------------------------


def is_pattern(url: str) -> bool:
    """True for a URL with glob or brace characters; on the web, `?` is none, and `[` may be part of a host."""
    return (_WEB_PATTERN.search(urlsplit(url).path) if is_web(url) else _PATTERN.search(url)) is not None


def spread(values: Sequence[_T], count: int) -> list[_T]:
    """The first, the last, and some evenly between, at most `count`."""
    last = len(values) - 1
    return (
        [values[idx] for idx in sorted({round(last * step / (count - 1)) for step in range(count)})] if values else []
    )


def container_files(place: Place, ending: str, ignored: Counter[str]) -> list[tuple[str, str]]:
    """(name, path) of one file, of a folder's files with that ending, sorted, or of a pattern's files in its order.

    A name is the POSIX path below the folder, or below the fixed part of a pattern. Raises: InputError for none.
    """
    if place.is_file:
        return [(key_of(posixpath.basename(plain_path(place.path))), place.path)]
    if place.is_folder:
        files = [(name, path) for name, path in find_files(place, ignored) if _ends(name, ending, ignored)]
    elif is_pattern(place.path):
        root = _PATTERN.split(place.path, maxsplit=1)[0].rpartition("/")[0]
        files = [(posixpath.relpath(plain_path(path), plain_path(root) or "/"), path) for path in _matching(place)]
    else:
        raise InputError(f"{place.url}: no such file or folder; check the path of your images")
    if not files:
        raise InputError(f"{place.url}: no {ending} file in it; check the path of your images")
    return [(key_of(name), path) for name, path in files]


def find_files(place: Place, ignored: Counter[str]) -> list[tuple[str, str]]:
    """(POSIX path inside, path) of all files below a folder, sorted; counts hidden and special ones.

    Raises: InputError.
    """
    if place.is_local:
        files = _local_files(place.path, ignored)
        return sorted(("/".join(parts), os.path.join(place.path, *parts)) for parts in files)  # noqa: PTH118  surrogates in names survive
    with _looking_at(place.url):
        if is_web(place.path):
            paths = find_links(place.fs, place.path)
        else:
            paths = [(posixpath.relpath(path, place.path or "/"), path) for path in place.fs.find(place.path)]
    return sorted((name, path) for name, path in paths if not _counted_hidden(name, ignored))


def _counted_hidden(name: str, ignored: Counter[str]) -> bool:
    hidden = any(is_hidden(part) for part in name.split("/"))
    ignored.update(["hidden"] if hidden else [])
    return hidden


def _ends(name: str, ending: str, ignored: Counter[str]) -> bool:
    if not name.lower().endswith(ending):
        ignored[extension(name)] += 1
        return False
    return True


def _matching(place: Place) -> list[str]:
    from braceexpand import braceexpand

    try:
        patterns = list(braceexpand(place.path, escape=False))
    except ValueError as err:
        raise InputError(
            f"{place.url}: its braces are not in pairs; write a pattern such as train-{{0000..0099}}.tar"
        ) from err
    paths: list[str] = []
    with _looking_at(place.url):
        for pattern in patterns:  # a file that is named and not there shows when it is opened
            paths += sorted(place.fs.glob(pattern)) if is_pattern(pattern) else [pattern]
    return paths


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
            if is_hidden(entry.name):
                ignored["hidden"] += 1
            elif _is_folder(entry):
                stack.append((path, above | {here}))
            elif _is_special(entry):
                ignored["special"] += 1
            else:
                yield path


def _identity(folder: str) -> tuple[int, int]:
    status = Path(folder).stat()
    return status.st_dev, status.st_ino


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


def local_uri(path: str) -> str:
    """A local path as text that any listing can hold."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return _QUOTED + quote_from_bytes(os.fsencode(path))
    return path


def local_path(uri: str) -> str:
    """The inverse of `local_uri`."""
    return os.fsdecode(unquote_to_bytes(uri[len(_QUOTED) :])) if uri.startswith(_QUOTED) else uri


def file_stamp(uri: str) -> str:
    """What tells a local file that a URI names, or the archive that it names before a `#`, from a changed one: size and
    time of change. Empty where there is none: for an object of a store, or a row of a container."""
    for path in (local_path(uri), local_path(uri.rpartition("#")[0])):
        if Path(path).is_absolute():
            try:
                status = Path(path).stat()
            except (OSError, ValueError):
                continue
            return f"{status.st_size},{status.st_mtime_ns}"
    return ""
