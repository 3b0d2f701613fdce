"""What networks and classifiers said of held-out images, kept as files for the report.

`ARM-NUMBER-SEED/predictions/00042.png` is of the image that `keys.json` beside it has at 42.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from dtpipe.manifests.errors import StoreError
from dtpipe.manifests.records.document import write_document

PREDICTED = "predictions"
"""Folder of what was predicted, in that of a training or a draw."""
KEYS_FILE = "keys.json"


def folder_names(names: Sequence[str]) -> list[str]:
    """A folder's name for each arm: what disks take, and no two alike."""
    plain = [re.sub(r"[^\w.+]+", "-", name).strip("-.") or "arm" for name in names]
    return [name if plain.count(name) == 1 else f"{name}-{place}" for place, name in enumerate(plain)]


def keep_keys(folder: Path, keys: Sequence[str], room: str) -> None:
    """Begin the predictions of a folder: whose they will be. Raises: StoreError that says how to get `room`."""
    try:
        (folder / PREDICTED).mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"{folder / PREDICTED} cannot be written: {err}; {room}") from err
    write_document(folder / PREDICTED / KEYS_FILE, {"keys": list(keys)}, room)


def keep_prediction(folder: Path, row: int, files: Iterable[tuple[str, bytes]], room: str) -> None:
    """What was said of the image at a place among the keys: ending and content of each file. Raises: StoreError."""
    for ending, content in files:
        path = folder / PREDICTED / f"{row:05d}{ending}"
        try:
            path.write_bytes(content)
        except OSError as err:
            raise StoreError(f"{path} cannot be written: {err}; {room}") from err
