"""Stored state that lies: documents and tables that are changed and then sealed again, so that every checksum holds."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from dtpipe.manifests.canonical import blake3_hex, seal
from dtpipe.manifests.layout.tables import encode_table

Rows = list[dict[str, Any]]


def edit_document(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a sealed JSON document in place."""
    value = json.loads(path.read_bytes())
    value.pop("checksum")
    change(value)
    path.write_bytes(seal(value))


def edit_table(root: Path, name: str, change: Callable[[Rows], object]) -> None:
    """Change a table that the manifest names, and the manifest's digest of it."""
    table = pq.ParquetFile(io.BytesIO((root / name).read_bytes())).read()
    rows = table.to_pylist()
    change(rows)
    data = encode_table(pa.Table.from_pylist(rows, schema=table.schema))
    (root / name).write_bytes(data)
    rename_files(root, name)


def rename_files(root: Path, *names: str) -> None:
    """Let the manifest name files as they are now."""

    def note(manifest: dict[str, Any]) -> None:
        for name in names:
            data = (root / name).read_bytes()
            manifest["files"][name] = {"size_bytes": len(data), "blake3": blake3_hex(data)}

    edit_document(root / "manifest.json", note)


def swap(items: Sequence[dict[str, Any]], one: int, other: int, *fields: str) -> None:
    """Exchange fields of two records."""
    for field in fields:
        items[one][field], items[other][field] = items[other][field], items[one][field]
