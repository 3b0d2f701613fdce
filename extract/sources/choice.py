"""What kind of source a folder is: the kind of those of its files that hold images.

One stray file decides nothing. Where files of several kinds lie there, a few of each are looked into; what holds no
image is ignored, and a folder with images in two kinds of files is refused, since either choice would leave images out.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from dtpipe.extract.sources.base import Container, Source, SourceItem, SourceKind
from dtpipe.extract.sources.folder import FolderSource
from dtpipe.extract.sources.names import extension, no_images
from dtpipe.extract.sources.places import spread
from dtpipe.manifests.errors import DtpipeError, InputError
from dtpipe.manifests.words import count_of

_LOOKED_INTO = 3  # files of one kind


@dataclass(frozen=True)
class _Files:
    """Files of one kind in a folder, and what was seen of them."""

    kind: SourceKind
    container: Container
    files: Sequence[tuple[str, str]]
    """(POSIX path inside, path), sorted."""
    example: str | None = None
    """An image in one of them."""

    @property
    def on_top(self) -> bool:
        """True where the folder itself can be read as their source."""
        return self.container.fills_folders and any("/" not in name for name, _ in self.files)

    @property
    def counted(self) -> str:
        """Such as `3 .tar files`."""
        ending = self.container.ending.lstrip("/")
        return f"{len(self.files)} {ending} file{'' if len(self.files) == 1 else 's'}"


@dataclass(frozen=True)
class ChosenSource:
    """A source beside files that were looked into and hold no image."""

    source: Source
    looked_into: Mapping[str, str] = field(default_factory=dict)
    """Extension to what to call such files."""

    @property
    def kind(self) -> str:
        """Of the source."""
        return self.source.kind

    def list(self) -> Sequence[SourceItem]:
        """As the source."""
        return self.source.list()

    def ignored(self) -> Mapping[str, int]:
        """As the source, with files that were looked into named so."""
        return {self.looked_into.get(name, name): count for name, count in self.source.ignored().items()}

    def read(self, uri: str) -> bytes:
        """As the source."""
        return self.source.read(uri)


def source_of_folder(folder: FolderSource, kinds: Iterable[SourceKind]) -> Source:
    """The folder's image files, or the one kind of container in it that holds images.

    Lists the folder once, and opens at most three files of a kind, where there are several kinds.
    Raises: InputError for images in several kinds of files, or a file that cannot be looked into.
    """
    present = [found for kind in kinds if (found := _find(kind, folder)) is not None]
    images = folder.content.images
    if not present or (len(present) == 1 and not images):
        return present[0].kind.open(folder.url) if present and present[0].on_top else _image_files(folder, {})
    present = [_look(folder, files) for files in present]
    holding = [files for files in present if files.example is not None]
    if len(holding) + bool(images) > 1:
        raise _mixed(folder, holding)
    names = {extension(files.files[0][0]): _name(files) for files in present if files.example is None}
    if not images and holding and holding[0].on_top:
        return ChosenSource(holding[0].kind.open(folder.url), names)
    return _image_files(folder, names)


def _image_files(folder: FolderSource, names: Mapping[str, str]) -> Source:
    """The folder without what is packed. Raises: InputError when nothing is left."""
    source = ChosenSource(folder, names) if names else folder
    if not folder.content.images:
        raise no_images(folder.url, source.ignored())
    return source


def _find(kind: SourceKind, folder: FolderSource) -> _Files | None:
    if kind.container is None:
        return None
    ending = kind.container.ending
    files = [(name, path) for name, path in folder.content.others if f"/{name.lower()}".endswith(ending)]
    return _Files(kind, kind.container, files) if files else None


def _look(folder: FolderSource, files: _Files) -> _Files:
    for name, path in spread(files.files, _LOOKED_INTO):
        try:
            example = files.container.example(folder.place, path)
        except DtpipeError as err:
            raise InputError(
                f"{folder.url}: {name} lies beside other files, and whether it holds images cannot be told: {err}; "
                f"move it away, or say what to read by the kind of the source ({_kind_names(folder, [files])})"
            ) from err
        if example is not None:
            return _Files(files.kind, files.container, files.files, f"{name} holds {example}")
    return files


def _name(files: _Files) -> str:
    num = min(_LOOKED_INTO, len(files.files))
    looked = f" ({num} looked into)" if len(files.files) > num else ""
    return f"{extension(files.files[0][0])} without images{looked}"


def _mixed(folder: FolderSource, holding: Sequence[_Files]) -> InputError:
    images = folder.content.images
    parts = [f"{count_of(len(images), 'image file')} ({images[0][0]})"] if images else []
    parts += [f"{files.counted} ({files.example})" for files in holding]
    return InputError(
        f"{folder.url}: images lie in files of {len(parts)} kinds, {' and '.join(parts)}, and a source has one; "
        f"move the others away, or say what to read by the kind of the source ({_kind_names(folder, holding)})"
    )


def _kind_names(folder: FolderSource, holding: Sequence[_Files]) -> str:
    """How to name each kind: as a setting, or by the file itself."""
    names = [folder.kind] if folder.content.images else []
    names += [files.kind.kind for files in holding if files.on_top]
    settings = [f"extract.source.kind={name}" for name in names]
    return " or ".join(settings + [f"give {files.files[0][0]} itself" for files in holding if not files.on_top])
