"""Images in one zip archive, on a local disk or any fsspec URL, without unpacking it.

A sample has the key that it would have in the unpacked folder. The listing keeps where each member lies, so that
reading one is a single range read that shares no handle with other threads.
"""

from __future__ import annotations

import re
import stat
import struct
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple

from dtpipe.extract.sources.base import Container, SourceItem, SourceKind
from dtpipe.extract.sources.names import (
    MAX_FILE_BYTES,
    MAX_RATIO,
    RATIO_FROM_BYTES,
    in_class_folders,
    inner_path,
    is_hidden,
    key_of,
    labelled_by_folder,
    labels_lost,
    no_images,
    takes,
)
from dtpipe.extract.sources.places import Place, open_place, read_at, unreadable
from dtpipe.extract.sources.web import is_web, plain_path
from dtpipe.manifests.errors import BadImage, InputError

_ENCRYPTED, _UTF8_NAME = 0x1, 0x800
_UNICODE_NAME = 0x7075  # Info-ZIP's extra field
_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, length of the name, length of the extra fields
_NAME_BYTES = 512  # read along with a member for its name and extra fields; more only where they are longer
_DOS = 0  # archives made there may part folders by backslashes
_SPLIT = re.compile(r"(.*\.zip)(?:/(.*))?", re.IGNORECASE | re.DOTALL)


class _Member(NamedTuple):
    """Where a member lies and what it must unpack to; the part of a URI behind `#`."""

    offset: int  # of its local header
    stored_bytes: int
    size_bytes: int  # unpacked
    crc32: int
    method: int


class ZipSource:
    """Images of an archive, or with `archive.zip/folder` of one folder in it; labels as in class folders."""

    kind = "zip"

    def __init__(self, url: str) -> None:
        """Raises: InputError when the archive is not there."""
        self.url = url
        archive, self._inside = _split(url)
        self._place = open_place(archive)
        if not self._place.is_file:
            raise InputError(f"{archive}: no such zip file; check the path of your images")

    def list(self) -> Sequence[SourceItem]:
        """All samples, sorted by key; when every image lies in a sub-folder, the first folder's name is the label.

        Raises: InputError for no images, or an archive that is damaged, encrypted or packed by an unknown method.
        """
        files = self._listed[0]
        if in_class_folders([key for key, _ in files]):
            return labelled_by_folder(files)
        return [SourceItem(key, uri) for key, uri in files]

    def ignored(self) -> Mapping[str, int]:
        """What lies in the archive and is no sample, to count: extension, `hidden`, `special`; and labels not used."""
        return dict(self._listed[1]) | labels_lost([key for key, _ in self._listed[0]])

    def members(self) -> Sequence[tuple[str, str]]:
        """(name, URI) of all files but hidden ones, images or not, sorted; `read` takes their URIs too."""
        return sorted(
            (key_of(name), self._uri(name, info, size))
            for name, info, size in _files(self._place, self._inside, Counter())
            if not any(map(is_hidden, name.split("/")))
        )

    def read(self, uri: str) -> bytes:
        """Bytes of one sample.

        Raises: BadImage for a damaged or oversized member, InputError when the archive cannot be read.
        """
        archive, _, numbers = uri.rpartition("#")
        member = _Member(*map(int, numbers.split(",")))
        largest = max(member.size_bytes, member.stored_bytes)
        if largest > MAX_FILE_BYTES:
            raise BadImage(f"file of {largest} bytes is over the limit of {MAX_FILE_BYTES}")
        if member.size_bytes > max(RATIO_FROM_BYTES, MAX_RATIO * member.stored_bytes):
            raise BadImage(
                f"unpacks to {member.size_bytes} bytes from {member.stored_bytes}, more than {MAX_RATIO} times"
            )
        return _unpack(_stored_bytes(self._place, archive, member), member)

    @cached_property
    def _listed(self) -> tuple[Sequence[tuple[str, str]], Counter[str]]:
        """(key, URI) of all samples, and what is ignored."""
        ignored: Counter[str] = Counter()
        files = [
            (key_of(name), self._uri(name, info, size))
            for name, info, size in _images(self._place, self._inside, ignored)
        ]
        if not files:
            raise no_images(self.url, ignored)
        return sorted(files), ignored

    def _uri(self, name: str, info: zipfile.ZipInfo, archive_bytes: int) -> str:
        numbers = _member(self.url, name, info, archive_bytes)
        return f"{self._place.uri(self._place.path)}#{','.join(map(str, numbers))}"


# --- listing ---------------------------------------------------------------------------------------------------------


def _split(url: str) -> tuple[str, str]:
    """The archive of a URL, and the folder in it that a path behind `.zip/` names."""
    address, mark, query = url.partition("?") if is_web(url) else (url, "", "")
    match = _SPLIT.fullmatch(address)
    return (match[1] + mark + query, (match[2] or "").strip("/")) if match else (url, "")


def _images(place: Place, inside: str, ignored: Counter[str]) -> Iterator[tuple[str, zipfile.ZipInfo, int]]:
    """As `_files`, of images alone."""
    for name, info, size in _files(place, inside, ignored):
        if takes(name, ignored):
            yield name, info, size


def _files(place: Place, inside: str, ignored: Counter[str]) -> Iterator[tuple[str, zipfile.ZipInfo, int]]:
    """Name inside, entry and size of the archive, for each file."""
    entries, size = _entries(place)
    folder = inside + "/" if inside else ""
    for info in entries:
        name = inner_path(_name(info))
        if info.is_dir() or not name.startswith(folder):
            continue
        if stat.S_IFMT(info.external_attr >> 16) not in (0, stat.S_IFREG):  # links, mostly
            ignored["special"] += 1
        else:
            yield name[len(folder) :], info, size


def _entries(place: Place) -> tuple[Sequence[zipfile.ZipInfo], int]:
    """The archive's directory, and its size in bytes."""
    try:
        with place.open(place.path) as file, zipfile.ZipFile(file) as archive:
            return archive.infolist(), file.seek(0, 2)
    except InputError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OverflowError, struct.error) as err:
        raise InputError(
            f"{place.url}: is no whole zip archive ({err}); it may be cut off: fetch or pack it again"
        ) from err
    except Exception as err:  # each file system raises its own
        raise unreadable(place.url, err) from err


def _member(url: str, name: str, info: zipfile.ZipInfo, archive_bytes: int) -> _Member:
    """Raises: InputError for a member that can never be read, or one that lies outside of the file."""
    again = "pack the archive again with `zip -r`"
    if info.flag_bits & _ENCRYPTED:
        raise InputError(f"{url}: {name} is encrypted; {again} and without a password")
    if info.compress_type not in _METHODS:
        raise InputError(
            f"{url}: {name} is packed by method {info.compress_type}; read are 0 (stored) and 8 (deflate); {again}"
        )
    if info.header_offset < 0 or info.header_offset + info.compress_size > archive_bytes:
        raise InputError(
            f"{url}: {name} lies outside of the file, which is cut off or one part of a split archive; "
            f"fetch or pack it again"
        )
    return _Member(info.header_offset, info.compress_size, info.file_size, info.CRC, info.compress_type)


def _name(info: zipfile.ZipInfo) -> str:
    """A member's name as unzip would write it: UTF-8 where it says so or is, else code page 437.

    From the bytes, not `info.filename`, which differs between Python versions.
    """
    name = info.orig_filename
    if not info.flag_bits & _UTF8_NAME:
        raw = name.encode("cp437")
        try:
            name = _unicode_name(info.extra, zlib.crc32(raw)) or raw.decode()
        except UnicodeDecodeError:
            name = raw.decode("cp437")
    return name.replace("\\", "/") if info.create_system == _DOS else name


def _unicode_name(extra: bytes, crc32: int) -> str | None:
    """The name in Info-ZIP's Unicode field, when that belongs to the name with this checksum."""
    while len(extra) >= 4:
        field, length = struct.unpack_from("<HH", extra)
        if field == _UNICODE_NAME and extra[4:9] == struct.pack("<BI", 1, crc32):
            return extra[9 : 4 + length].decode()
        extra = extra[4 + length :]
    return None


# --- reading ---------------------------------------------------------------------------------------------------------


def _stored_bytes(place: Place, archive: str, member: _Member) -> bytes:
    """A member's bytes as they lie in the archive."""
    data = place.read_range(archive, member.offset, _LOCAL_HEADER.size + _NAME_BYTES + member.stored_bytes)
    if len(data) < _LOCAL_HEADER.size or not data.startswith(b"PK\3\4"):
        raise BadImage("damaged in the archive: its header is gone")
    start = _LOCAL_HEADER.size + sum(_LOCAL_HEADER.unpack_from(data)[1:])
    stored = data[start : start + member.stored_bytes]
    whole = len(stored) == member.stored_bytes
    return stored if whole else read_at(place, archive, member.offset + start, member.stored_bytes)


def _unpack(data: bytes, member: _Member) -> bytes:
    """Never more than one byte over what the directory says, whatever the data would inflate to."""
    if member.method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, member.size_bytes + 1)
        except zlib.error as err:
            raise BadImage(f"damaged in the archive: {err}") from err
    if len(data) != member.size_bytes or zlib.crc32(data) != member.crc32:
        raise BadImage("damaged in the archive: size or checksum is not that of its directory")
    return data


def _example(place: Place, path: str) -> str | None:
    """The first image in an archive's directory. Raises: InputError."""
    images = _images(replace(place, url=path, path=path), "", Counter())
    return next((name for name, _, _ in images), None)


def _recognise(url: str) -> ZipSource | None:
    """By name: `photos.zip`, `photos.zip/train`."""
    archive, inside = _split(url)
    if not plain_path(archive).lower().endswith(".zip"):
        return None
    place = open_place(archive)
    return None if place.is_folder or (inside and not place.is_file) else ZipSource(url)


KIND = SourceKind(
    kind="zip",
    reads="Images in a zip archive, or in one folder of it (photos.zip/train); "
    "keys and labels as in the unpacked folder.",
    open=ZipSource,
    recognise=_recognise,
    container=Container(".zip", _example, fills_folders=False),
)
