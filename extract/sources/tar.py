"""Images in tars, webdataset shards or any other: one tar, a folder of them, or a pattern (train-{0000..0099}.tar).

Every member that ends like an image is a sample, with the key `<tar path>/<member>`. The listing goes through the
headers of every tar once and keeps where each member lies, so that reading one is a single range read. It refuses a
tar that does not end where it says, since what lies behind damage would be missing without a trace.
"""

from __future__ import annotations

import json
import struct
import tarfile
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import BinaryIO, cast

from dtpipe.extract.sources.base import Container, SourceItem, SourceKind
from dtpipe.extract.sources.names import (
    MAX_FILE_BYTES,
    inner_path,
    is_hidden,
    key_of,
    labels_as_text,
    no_images,
    takes,
)
from dtpipe.extract.sources.places import Place, container_files, is_pattern, open_place, read_at, unreadable
from dtpipe.extract.sources.web import plain_path
from dtpipe.manifests.errors import BadImage, InputError

_ENDING = ".tar"
_COMPRESSED = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
_COMPRESSED_ENDINGS = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LABEL_BYTES = 2**20  # a longer .cls or .json is not read for a label
_MAX_HEADER_BYTES = 2**22  # of one member, with long names and extended fields
_TAIL_BYTES = 2**20  # of what follows the end mark, looked at
_TARS_AT_ONCE = 8
_LOOKED_AT = 1000  # members, where it is only asked whether a tar holds images
_BROKEN = (tarfile.TarError, ValueError, ArithmeticError, EOFError, struct.error)


@dataclass
class _Contents:
    """What one tar holds, while it is gone through."""

    samples: list[tuple[str, int, int]] = field(default_factory=list)  # member, offset, size
    places: dict[str, tuple[int, int]] = field(default_factory=dict)  # of images, for hard links
    cls: dict[str, object] = field(default_factory=dict)
    json: dict[str, object] = field(default_factory=dict)
    ignored: Counter[str] = field(default_factory=Counter)


class TarSource:
    """Images of tars in their order; labels come from the member of the same name in .cls, or from .json's `label`."""

    kind = "webdataset"

    def __init__(self, url: str) -> None:
        """Raises: InputError when the file system cannot be used."""
        self.url = url
        self._place = open_place(url)

    def list(self) -> Sequence[SourceItem]:
        """All samples: tars by name or in the pattern's order, members as they lie.

        A sample's label is the text of the member `<name up to its first dot>.cls`; without one, the value of `label`
        of `<..>.json`, where that is text, a whole number, true or false.
        Raises: InputError for no images, or a tar that is compressed, cut off or damaged, with the byte where.
        """
        return self._listed[0]

    def ignored(self) -> Mapping[str, int]:
        """What lies in the tars and is no sample: extension, `hidden` or `special`, to count."""
        return dict(self._listed[1])

    def members(self) -> Sequence[tuple[str, str]]:
        """(name, URI) of all files of one tar but hidden ones, images or not, sorted; `read` takes their URIs too.

        A hard link is the file that it names; of two members of one name the last counts, as when it is unpacked.
        """
        places: dict[str, tuple[int, int]] = {}
        for _, member in _members(self._place, self._place.path):
            place = places.get(member.linkname) if member.islnk() else (member.offset_data, member.size)
            if place is not None and (member.isreg() or member.islnk()) and not member.issparse():
                places[member.name] = place
        uri = self._place.uri(self._place.path)
        names = ((inner_path(name), place) for name, place in places.items())
        return sorted(
            (key_of(name), f"{uri}#{offset},{size}")
            for name, (offset, size) in names
            if not any(map(is_hidden, name.split("/")))
        )

    def read(self, uri: str) -> bytes:
        """Bytes of one sample. Raises: BadImage for an oversized one, InputError when its tar cannot be read."""
        path, _, numbers = uri.rpartition("#")
        offset, size = map(int, numbers.split(","))
        if size > MAX_FILE_BYTES:
            raise BadImage(f"file of {size} bytes is over the limit of {MAX_FILE_BYTES}")
        return read_at(self._place, path, offset, size)

    @cached_property
    def _listed(self) -> tuple[Sequence[SourceItem], Counter[str]]:
        """All samples, and what is ignored."""
        ignored: Counter[str] = Counter()
        tars = container_files(self._place, _ENDING, ignored)
        keys: list[str] = []
        uris: list[str] = []
        labels: list[object] = []
        with ThreadPoolExecutor(_TARS_AT_ONCE) as pool:
            all_contents = pool.map(lambda tar: _contents(self._place, tar[1]), tars)
            for (name, path), contents in zip(tars, all_contents, strict=True):
                keys += [f"{name}/{key_of(inner_path(member))}" for member, _, _ in contents.samples]
                uris += [f"{self._place.uri(path)}#{offset},{size}" for _, offset, size in contents.samples]
                labels += _labels(contents)
                ignored += contents.ignored
        if not keys:
            raise no_images(self.url, ignored)
        texts = labels_as_text(labels, "in .json", ignored)
        return [SourceItem(*sample) for sample in zip(keys, uris, texts, strict=True)], ignored


def _labels(contents: _Contents) -> list[object]:
    labels = {**contents.json, **contents.cls}
    return [labels.get(_stem(member)) for member, _, _ in contents.samples]


# --- one tar ---------------------------------------------------------------------------------------------------------


def _contents(place: Place, path: str) -> _Contents:
    """Go through a tar's headers. Raises: InputError."""
    contents = _Contents()
    for tar, member in _members(place, path):
        _take(contents, tar, member)
    return contents


def _example(place: Place, path: str) -> str | None:
    """The first image among the first members. Raises: InputError."""
    members = (member for _, member in islice(_members(place, path), _LOOKED_AT) if not member.isdir())
    return next((name for member in members if takes(name := inner_path(member.name), Counter())), None)


def _members(place: Place, path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """All members as they lie, with the tar that is gone through. Raises: InputError."""
    try:
        with place.open(path) as file:
            _refuse_compressed(path, file.read(6))
            num_bytes = file.seek(0, 2)
            file.seek(0)
            yield from _walk(path, _Headers(file), num_bytes)
    except InputError:
        raise
    except Exception as err:  # each file system raises its own
        raise unreadable(path, err) from err


class _Headers:
    """A tar's file for `tarfile`, which reads as much as a header claims: a few bytes may claim terabytes."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._left = file, _MAX_HEADER_BYTES
        self.tell, self.seekable = file.tell, file.seekable

    def seek(self, offset: int) -> int:
        return self._file.seek(offset)

    def begin(self, offset: int) -> None:
        """Go to the next member."""
        self._file.seek(offset)
        self._left = _MAX_HEADER_BYTES

    def read(self, size: int) -> bytes:
        """Raises: ValueError when a member's headers are longer than any honest ones."""
        self._left -= size
        if self._left < 0:
            raise ValueError(f"a header of over {_MAX_HEADER_BYTES} bytes")
        return self._file.read(size)


def _walk(path: str, file: _Headers, num_bytes: int) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    at = 0
    try:
        with tarfile.open(fileobj=cast(BinaryIO, file), mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
            tar.offset = 0
            # not TarFile.next, which keeps all members and takes damage for the end
            while (member := _next(path, file, tar)) is not None:
                if member.size < 0 or member.offset_data + member.size > num_bytes:
                    raise _damaged(path, at, f"member {member.name} is cut off or has a wrong size")
                yield tar, member
                at = tar.offset
    except _BROKEN as err:
        raise _damaged(path, at, str(err)) from err
    file.begin(at)
    if any(file.read(_TAIL_BYTES)):
        raise _damaged(path, at, "more follows behind the end mark; tars are joined with `tar --concatenate`")


def _next(path: str, file: _Headers, tar: tarfile.TarFile) -> tarfile.TarInfo | None:
    """The member at `tar.offset`, or None at the end mark, a block of zeros."""
    file.begin(tar.offset)
    header = file.read(tarfile.BLOCKSIZE)
    if not header:
        mend = f"if nothing else is, add it by `head -c 1024 /dev/zero >> {path}`"
        raise _damaged(path, tar.offset, f"the end mark is missing; {mend}")
    if header == bytes(tarfile.BLOCKSIZE):
        return None
    file.begin(tar.offset)
    return tarfile.TarInfo.fromtarfile(tar)


def _take(contents: _Contents, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    if member.isdir():
        return
    place = contents.places.get(member.linkname) if member.islnk() else (member.offset_data, member.size)
    if place is None or not (member.isreg() or member.islnk()) or member.issparse():
        contents.ignored["special"] += 1
    elif takes(inner_path(member.name), contents.ignored):
        contents.places[member.name] = place
        contents.samples.append((member.name, *place))
    elif member.isreg():
        _take_label(contents, tar, member)


def _take_label(contents: _Contents, tar: tarfile.TarFile, member: tarfile.TarInfo) -> None:
    ending = member.name.rpartition("/")[2].partition(".")[2]
    if ending not in ("cls", "json"):
        return
    contents.ignored[f".{ending}"] -= 1  # as it was counted by its ending
    if member.size > _LABEL_BYTES:
        contents.ignored[f".{ending} over {_LABEL_BYTES} bytes, not read for a label"] += 1
        return
    content = tar.extractfile(member)
    assert content is not None
    text = content.read().decode("utf-8", "replace").strip()
    try:
        label = text if ending == "cls" else _json_label(text)
    except (ValueError, RecursionError):
        contents.ignored[f".{ending} that is damaged"] += 1
        return
    if label in (None, ""):
        contents.ignored[f".{ending}"] += 1
    else:
        (contents.cls if ending == "cls" else contents.json)[_stem(member.name)] = label


def _json_label(text: str) -> object:
    """`label` of a JSON object; None where there is none. Raises: ValueError, RecursionError."""
    document = json.loads(text)
    return document.get("label") if isinstance(document, dict) else None


def _stem(member: str) -> str:
    """What the members of one webdataset sample share: the path up to the file name's first dot."""
    folder, _, name = member.rpartition("/")
    return f"{folder}/{name.partition('.')[0]}"


def _refuse_compressed(path: str, first: bytes) -> None:
    method = next((name for magic, name in _COMPRESSED.items() if first.startswith(magic)), None)
    if method:
        raise InputError(
            f"{path}: is compressed by {method}, so that no image in it can be read by itself; "
            f"decompress it to a plain .tar"
        )


def _damaged(path: str, offset: int, problem: str) -> InputError:
    return InputError(f"{path}: damaged or cut off at byte {offset} ({problem}); fetch or write this tar again")


def _recognise(url: str) -> TarSource | None:
    """A name or pattern that ends in .tar."""
    path = plain_path(url).lower()
    if path.endswith(_COMPRESSED_ENDINGS):
        return TarSource(url)
    named = path.endswith(_ENDING)
    return TarSource(url) if named and (is_pattern(url) or not open_place(url).is_folder) else None


KIND = SourceKind(
    kind="webdataset",
    reads="Images in one tar, a folder of tars or a pattern (train-{0000..0099}.tar); "
    "labels from .cls or .json's `label` beside them.",
    open=TarSource,
    recognise=_recognise,
    order="container",  # tars are written in a random order, to be read in runs
    container=Container(_ENDING, _example),
)
