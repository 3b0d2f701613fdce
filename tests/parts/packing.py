"""Images in each kind of container, written with the tools that users write them with, and what sources read there."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dtpipe.extract.sources.base import Source
from dtpipe.manifests.errors import BadImage, InputError

Files = Mapping[str, bytes]


def folder_files(root: Path) -> dict[str, bytes]:
    """Every file of a folder by its path inside, sorted."""
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def write_zip(path: Path, files: Files, method: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Files, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", **options) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def write_parquet(
    path: Path, files: Files, labels: Sequence[int] | None = None, names: Sequence[str] = (), group: int = 3
) -> Path:
    """As `datasets` writes them: struct<bytes, path>, and the features in the schema's metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns: dict[str, Any] = {
        "image": pa.array(
            [{"bytes": data, "path": name} for name, data in files.items()],
            pa.struct({"bytes": "binary", "path": "string"}),
        )
    }
    features: dict[str, Any] = {"image": {"_type": "Image"}}
    if labels is not None:
        columns["label"] = pa.array(labels, pa.int64())
        features["label"] = {"names": list(names), "_type": "ClassLabel"}
    table = pa.table(columns).replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=group)
    return path


def write_lmdb(path: Path, files: Mapping[str | bytes, bytes], **options: Any) -> Path:
    import lmdb

    with lmdb.open(str(path), map_size=2**26, **options) as environment, environment.begin(write=True) as transaction:
        for name, data in files.items():
            transaction.put(name.encode() if isinstance(name, str) else name, data)
    for lock in (path / "lock.mdb", path.with_name(path.name + "-lock")):
        lock.unlink() if lock.exists() else None
    return path


@contextmanager
def no_fault_of_the_image(reason: str) -> Iterator[None]:
    """What is read here fails, by `reason`, without the image being written off as a bad one."""
    with pytest.raises(InputError, match=reason) as caught:
        yield
    assert not isinstance(caught.value, BadImage)


def contents(source: Source) -> dict[str, bytes]:
    """Key to bytes, as read from a source's listing."""
    return {item.key: source.read(item.uri) for item in source.list()}


def labels(source: Source) -> dict[str, str | None]:
    """Key to label."""
    return {item.key: item.label for item in source.list()}
