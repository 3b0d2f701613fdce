"""Published checkpoints by name: `--teacher adm-imagenet` stands for a file in a local cache, fetched once.

Which there are is data: `published.yaml`, beside the families.

The cache is `$DTPIPE_CACHE`, else `~/.cache/dtpipe`; beside each file lies a record of where it came from, with its
size and blake3. Offline mode (`HF_HUB_OFFLINE=1`) fetches nothing. A path always works in place of a name.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from functools import lru_cache
from http.client import HTTPException
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse
from urllib.request import urlopen

from pydantic import Field

from dtpipe.extract.teachers.files.refusals import disguise_of
from dtpipe.extract.teachers.files.remote import fetch_remote
from dtpipe.manifests.errors import DamagedDataError, StoreError, TeacherError
from dtpipe.manifests.records.document import read_document, write_document
from dtpipe.manifests.records.files import file_digest
from dtpipe.manifests.schema import StrictModel
from dtpipe.manifests.store.client import server_of
from dtpipe.manifests.store.paths import is_url, path_on_disk
from dtpipe.manifests.store.patience import STORE_PATIENCE, Request, patiently
from dtpipe.manifests.store.publish import unique_temporary, whole_file
from dtpipe.manifests.store.reasons import reason_of

if TYPE_CHECKING:
    from dtpipe.extract.config import TeacherConfig

PUBLISHED_FILE = Path(__file__).parents[1] / "published.yaml"
CACHE_VARIABLE, OFFLINE_VARIABLE = "DTPIPE_CACHE", "HF_HUB_OFFLINE"
TIMEOUT_S = 60
HUB = "hf://"  # hf://owner/name@commit
FILE_ENDINGS = frozenset({".pt", ".pth", ".pkl", ".bin", ".ckpt", ".safetensors"})


class PublishedTeacher(StrictModel):
    """One checkpoint that its authors published: its name can stand for its path."""

    name: str
    kind: str
    url: str
    licence: str
    image_px: tuple[int, int]
    levels: dict[str, int]
    """Channels by level; l{n} has stride 2^n."""
    timestep: int | None = None
    """Where it is read by default, if not where others of its family are."""
    options: dict[str, Any] = Field(default={}, description="Settings of the family that this file needs.")


@lru_cache(maxsize=1)
def published_teachers() -> tuple[PublishedTeacher, ...]:
    """Every published checkpoint that is known, family by family."""
    import yaml

    documents = yaml.safe_load(PUBLISHED_FILE.read_text(encoding="utf-8"))
    return tuple(PublishedTeacher.model_validate(document) for document in documents)


def locate(config: TeacherConfig, published: Sequence[PublishedTeacher]) -> TeacherConfig:
    """The settings with a URL replaced by its local copy, and a published name by its file, family and options.

    Raises: TeacherError when the file cannot be had.
    """
    if (teacher := find_published(config, published)) is not None:
        path, revision = _place(teacher, config)
        options = {**teacher.options, **config.options}
        place = {"path": path, "revision": revision, "kind": teacher.kind, "options": options}
        return config.model_copy(update=place)
    if not Path(config.path).exists() and is_url(config.path):
        return config.model_copy(update={"path": str(fetch_remote(config.path, cache_folder()))})
    return config


def find_published(config: TeacherConfig, published: Sequence[PublishedTeacher]) -> PublishedTeacher | None:
    """The published checkpoint that the settings name; a path that is there comes before a name."""
    if Path(config.path).exists():
        return None
    named = (teacher for teacher in published if teacher.name == config.path)
    return next((teacher for teacher in named if config.kind in ("auto", teacher.kind)), None)


def _place(published: PublishedTeacher, config: TeacherConfig) -> tuple[str, str | None]:
    if published.url.startswith(HUB):
        path, _, commit = published.url.removeprefix(HUB).partition("@")
        return path, config.revision or commit
    return str(fetch(published)), config.revision


def cache_folder() -> Path:
    """Where fetched checkpoints lie."""
    return (path_on_disk(os.environ.get(CACHE_VARIABLE) or "~/.cache/dtpipe") or Path()) / "teachers"


def fetch(published: PublishedTeacher) -> Path:
    """The checkpoint's file in the cache, downloaded if it is not there yet.

    Raises: TeacherError offline, when the authors' page has no direct link, and when the download fails or the cached
    file is not the one that was fetched.
    """
    path = _cache_path(published)
    if path.is_file():
        _check_unchanged(path)
        return path
    if path.suffix not in FILE_ENDINGS:
        raise TeacherError(
            f"{published.name}: its authors give it by hand at {published.url}; download it and put it at {path}, "
            f"or give its path{_with_options(published)}"
        )
    if os.environ.get(OFFLINE_VARIABLE, "").upper() in {"1", "TRUE", "YES", "ON"}:
        raise TeacherError(
            f"{published.name} is not at {path}, and {OFFLINE_VARIABLE} is set; "
            f"download {published.url} and put it there"
        )
    _download(published, path)
    return path


def _with_options(published: PublishedTeacher) -> str:
    """The settings that a name stands for, to copy, where its file has any."""
    if not published.options:
        return ""
    options = ", ".join(f"{name}: {value}" for name, value in published.options.items())
    return f" with -s extract.teacher.kind={published.kind} -s 'extract.teacher.options={{{options}}}'"


def cached_file(published: PublishedTeacher) -> Path | None:
    """The checkpoint in the cache, None when it is not there or on the hub, which has a cache of its own."""
    path = _cache_path(published)
    return path if path.is_file() else None


def _cache_path(published: PublishedTeacher) -> Path:
    return cache_folder() / published.name / PurePosixPath(urlparse(published.url).path).name


def _download(published: PublishedTeacher, path: Path) -> None:
    """Fetch beside its place, record, then move there: a file without its record is never taken for whole."""
    try:
        with whole_file(path, unique_temporary(path)) as partial:
            request = Request(server_of(published.url), "read", published.url)
            size = patiently(lambda _limit_s: _copy(published.url, partial), request, STORE_PATIENCE)
            if (disguise := disguise_of(partial)) is not None:
                raise OSError(f"what came {disguise}")
            record = {"url": published.url, "licence": published.licence, "size_bytes": size}
            write_document(_record_path(path), record | {"blake3": file_digest(partial)}, "make room")
    except (OSError, StoreError, ValueError, HTTPException) as err:  # urllib's network errors are OSErrors
        raise TeacherError(
            f"{published.name}: {published.url} cannot be fetched ({reason_of(err)}); download it and put it at {path}"
        ) from err


def _copy(url: str, path: Path) -> int:
    """Bytes of what came from a URL and was written to `path`. Raises: OSError, also when the connection was cut."""
    with urlopen(url, timeout=TIMEOUT_S) as response, path.open("wb") as file:
        shutil.copyfileobj(response, file, 1 << 20)
        expected = response.headers.get("Content-Length")
        size = file.tell()
    if expected is not None and size != int(expected):  # urllib takes a cut connection for the end
        raise ConnectionError(f"the connection ended after {size} of {expected} bytes")
    return size


def _check_unchanged(path: Path) -> None:
    """Size and content by the record, where there is one."""
    remedy = "delete the folder to fetch the teacher again"
    try:
        record = read_document(_record_path(path), remedy)
    except FileNotFoundError:
        return  # put there by hand
    if path.stat().st_size != record.get("size_bytes"):
        raise TeacherError(
            f"{path}: has {path.stat().st_size} bytes, {record.get('size_bytes')} were fetched; {remedy}"
        )
    if file_digest(path) != record.get("blake3"):
        raise DamagedDataError(f"{path}: is not the file that was fetched: bytes were changed; {remedy}")


def _record_path(path: Path) -> Path:
    return path.with_name(f"{path.name}.json")
