"""The kinds of source there are, and the source that a URL or the settings name.

A new kind is a file that declares `KIND`, and a line here. Kind `auto` asks them in this order who reads a URL; folders
come last, since they take whatever the others do not and say what is wrong with it. What is read of a folder follows
from which of its files hold images (`choice`).
"""

from __future__ import annotations

from dtpipe.extract.sources import features, folder, lmdb, tar, zip
from dtpipe.extract.sources.base import Source, SourceKind
from dtpipe.extract.sources.choice import source_of_folder
from dtpipe.extract.sources.numbered import SynthesizedSource
from dtpipe.extract.sources.parquet import source as parquet
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.schema import SYNTHESIZED

_DECLARED = (
    features.KIND,
    lmdb.KIND,
    parquet.KIND,
    tar.KIND,
    zip.KIND,
    folder.CLASS_FOLDER,
    folder.FOLDER,
)
SOURCES: dict[str, SourceKind] = {kind.kind: kind for kind in _DECLARED}


def open_source(url: str, kind: str = "auto") -> Source:
    """The source at `url`; with `auto` its kind follows from what the URL holds.

    Raises: ConfigError for an unknown kind; InputError when there is nothing of that kind at `url`.
    """
    if kind != "auto":
        if kind not in SOURCES:
            raise ConfigError(f"source kind {kind!r} is unknown; choose one of {sorted(SOURCES)}")
        return SOURCES[kind].open(url)
    for candidate in SOURCES.values():
        source = candidate.recognise(url)
        if source is not None:
            return source_of_folder(source, SOURCES.values()) if isinstance(source, folder.FolderSource) else source
    raise InputError(
        f"{url}: no source kind recognises this; `dtpipe list sources` says what each reads, or set extract.source.kind"
    )


def open_images(images: str | None, num_samples: int | None, kind: str) -> Source:
    """The source that settings name, or a synthesized dataset's numbered samples. Raises: ConfigError, InputError."""
    if images is None:
        return SynthesizedSource(num_samples or 0)
    if kind == SYNTHESIZED:
        raise ConfigError(f"{images}: this dataset is synthesized; run the command that began it, with --num-samples")
    return open_source(images, kind)
