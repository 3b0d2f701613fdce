"""JSON documents beside runs, teachers and scores: sealed like those of datasets; older ones without a seal are read.

`checksum`, their last field, is that of `manifests.canonical`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dtpipe.manifests.canonical import CHECKSUM, seal
from dtpipe.manifests.documents import Refusal, parse_json
from dtpipe.manifests.errors import DamagedDataError, ManifestError, StoreError
from dtpipe.manifests.records.bounded import read_bounded
from dtpipe.manifests.store.publish import unique_temporary, write_whole

_MOST_BYTES = 64 * 2**20
_SEALED_END = re.compile(rb'(?<!"blake3)": "[0-9a-f]{64}"\n\}\s*$')  # `blake3` ended records before they had seals


def write_document(path: Path, value: Mapping[str, Any], remedy: str) -> None:
    """Write plain values as a sealed document, whole; of processes that write one at once, the last one's stays.

    Raises: StoreError when it cannot be written, ending in `remedy`; ManifestError for what JSON cannot hold.
    """
    try:
        write_whole(path, seal(value), unique_temporary(path))
    except OSError as err:
        raise StoreError(f"{path} cannot be written: {err}; {remedy}") from err


def read_document(path: Path, remedy: str) -> dict[str, Any]:
    """The value of a document, without its checksum; `remedy` ends the sentence on what is wrong.

    Raises: FileNotFoundError; DamagedDataError naming the file when it is no document, larger than 64 MiB, or its bytes
    were changed; InputError when it may not be read.
    """
    data = read_bounded(path, _MOST_BYTES, remedy)
    document = parse_json(data.decode(errors="surrogateescape"), path, Refusal(DamagedDataError, remedy))
    if not isinstance(document, dict):
        raise DamagedDataError(f"{path}: holds a JSON {type(document).__name__}, not an object; {remedy}")
    value = {name: field for name, field in document.items() if name != CHECKSUM}
    sealed = CHECKSUM in document or _SEALED_END.search(data[-100:])  # its name or its value: one flip hides one
    if sealed and not _is_intact(value, data):
        raise DamagedDataError(f"{path}: does not match its own checksum: bytes were changed; {remedy}")
    return value


def _is_intact(value: Mapping[str, Any], data: bytes) -> bool:
    try:
        return seal(value) == data
    except (ManifestError, RecursionError):
        return False
