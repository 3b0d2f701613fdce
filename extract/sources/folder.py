"""Images in a folder and its sub-folders, on a local disk or any fsspec URL; with or without class labels.

Every file with an image's extension is a sample, a broken one too: it becomes a bad sample with its reason. Other
files, and hidden ones, are ignored and counted.
"""

from __future__ import annotations

import errno
import os
import stat
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from dtpipe.extract.sources.base import SourceItem, SourceKind
from dtpipe.extract.sources.names import (
    IMAGES_WITHOUT,
    MAX_FILE_BYTES,
    WITHOUT,
    extension,
    in_class_folders,
    key_of,
    labelled_by_folder,
    labels_lost,
    looks_like_image,
    no_images,
    takes,
)
from dtpipe.extract.sources.places import Place, find_files, local_path, open_place, spread, unreadable
from dtpipe.manifests.errors import BadImage, InputError
from dtpipe.manifests.store.reasons import NO_STORE, reason_of

_LOOKED_INTO = 3  # files without extension


@dataclass(frozen=True)
class FolderContent:
    """What lies in a folder and below it."""

    images: Sequence[tuple[str, str]]
    """(key, URI), sorted."""
    others: Sequence[tuple[str, str]]
    """(POSIX path inside, path) of other files, sorted."""
    ignored: Counter[str]


class FolderSource:
    """Samples below one folder; the key is the POSIX path inside it, with extension."""

    def __init__(self, url: str, labelled: bool) -> None:
        """Raises: InputError when `url` is not a folder."""
        self.url = url
        self.labelled = labelled
        self.chosen = False  # True where its images, not the user, said whether they are labelled
        self.place = _open_folder(url)

    @property
    def kind(self) -> str:
        """`class_folder` with labels, else `folder`."""
        return "class_folder" if self.labelled else "folder"

    def list(self) -> Sequence[SourceItem]:
        """All samples, sorted by key; the label is the first folder's name, of class folders only.

        Raises: InputError for a folder without images, or class folders with an image outside of any.
        """
        files = self.content.images
        if not files:
            raise no_images(self.url, self.content.ignored)
        if not self.labelled:
            return [SourceItem(key, uri) for key, uri in files]
        outside = next((key for key, _ in files if "/" not in key), None)
        if outside is not None:
            raise InputError(
                f"{self.url}: {outside} lies in no class folder; move it into one, or use extract.source.kind=folder"
            )
        return labelled_by_folder(files)

    def ignored(self) -> Mapping[str, int]:
        """What lies in the folder and is no sample: extension, `hidden` or `special`, to count; and labels not used."""
        lost = labels_lost([key for key, _ in self.content.images]) if self.chosen and not self.labelled else {}
        return dict(self.content.ignored) | lost

    def read(self, uri: str) -> bytes:
        """Bytes of one sample.

        Raises: BadImage when this file is gone or unreadable, InputError when the whole folder or store is.
        """
        if not self.place.is_local:
            return self._read_remote(uri)
        try:
            return _read_local(uri)
        except OSError as err:
            if err.errno != errno.EIO and reason_of(err).passes:
                raise InputError(f"{uri}: {err.strerror}; run again") from err
            if not _holds_anything(self.place.path):
                raise InputError(
                    f"{uri}: {err.strerror}, and {self.url} is gone or empty: is it mounted? then run again"
                ) from err
            raise BadImage(f"unreadable: {err.strerror}") from err

    def has_only_class_folders(self) -> bool:
        """True when every image lies in a sub-folder."""
        return in_class_folders([key for key, _ in self.content.images])

    def _read_remote(self, uri: str) -> bytes:
        try:
            data: bytes = self.place.fs.first_bytes(self.place.path_of(uri), MAX_FILE_BYTES + 1)
        except (FileNotFoundError, IsADirectoryError) as err:
            if reason_of(err).code in NO_STORE:
                raise unreadable(uri, err) from err
            raise BadImage(f"unreadable: {type(err).__name__}") from err
        except Exception as err:  # PermissionError too: what was listed may be read, unless credentials have expired
            raise unreadable(uri, err) from err
        if len(data) > MAX_FILE_BYTES:
            raise BadImage(f"file is over the limit of {MAX_FILE_BYTES} bytes")
        return data

    @cached_property
    def content(self) -> FolderContent:
        """All files by what they are. Raises: InputError when the folder cannot be listed."""
        ignored: Counter[str] = Counter()
        images: list[tuple[str, str]] = []
        others: list[tuple[str, str]] = []
        for name, path in find_files(self.place, ignored):
            if takes(name, ignored):
                images.append((key_of(name), self.place.uri(path)))
            else:
                others.append((name, path))
        nameless = [path for name, path in others if extension(name) == WITHOUT]
        if nameless and all(looks_like_image(self.place.head(path)) for path in spread(nameless, _LOOKED_INTO)):
            ignored[IMAGES_WITHOUT] = ignored.pop(WITHOUT)
        return FolderContent(sorted(images), others, ignored)


def _open_folder(url: str) -> Place:
    place = open_place(url)
    if place.is_file and not place.is_folder:
        raise InputError(
            f"{url}: is a file that no source recognises by its name; `dtpipe list sources` says what each reads; "
            "give the folder that the images lie in, or name what it is with extract.source.kind"
        )
    if not place.is_folder:
        raise InputError(f"{url}: no such file or folder; check the path of your images")
    return place


def _read_local(uri: str) -> bytes:
    """Raises: BadImage for what is no file or too large, and OSError."""
    path = Path(local_path(uri))
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise BadImage("unreadable: not a regular file")
    if status.st_size > MAX_FILE_BYTES:
        raise BadImage(f"file of {status.st_size} bytes is over the limit of {MAX_FILE_BYTES}")
    return path.read_bytes()


def _holds_anything(folder: str) -> bool:
    """False for a folder that is gone, out of reach, or empty, as a mount point is without its mount."""
    try:
        with os.scandir(folder) as entries:
            return next(entries, None) is not None
    except OSError:
        return False


def _recognise(url: str) -> FolderSource:
    """Class folders when every image lies in a sub-folder, else a plain folder. Raises: InputError for neither."""
    source = FolderSource(url, labelled=False)
    source.labelled, source.chosen = source.has_only_class_folders(), True
    return source


CLASS_FOLDER = SourceKind(
    kind="class_folder",
    reads="Images in sub-folders of a folder or URL; the first folder's name is the label.",
    open=lambda url: FolderSource(url, labelled=True),
    recognise=_recognise,
)
FOLDER = SourceKind(
    kind="folder",
    reads="All images below a folder or URL, without labels.",
    open=lambda url: FolderSource(url, labelled=False),
    recognise=_recognise,
)
