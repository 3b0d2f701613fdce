"""Which tensors a checkpoint names, without loading it: cheap, and nothing in the file is run."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterable
from pathlib import Path

_HEAD_BYTES = 1 << 22  # enough for the names of a checkpoint's tensors
TORCH_ENDINGS = (".pt", ".pth", ".bin", ".ckpt")


def names_tensors(path: Path, names: Iterable[str]) -> bool:
    """True for a torch or safetensors file that holds a tensor of each name; False for all else, even damaged files."""
    try:
        if not path.is_file():
            return False
        if path.suffix == ".safetensors":
            return set(names) <= _safetensors_names(path)
        head = _pickle_head(path) if path.suffix in TORCH_ENDINGS else b""
    except Exception:  # a damaged archive raises many types, a strange file name others
        return False
    return all(any(mark in head for mark in pickled_name(name)) for name in names)


def _safetensors_names(path: Path) -> set[str]:
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        content = json.loads(file.read(min(size, _HEAD_BYTES)))
    return set(content) if isinstance(content, dict) else set()


def _pickle_head(path: Path) -> bytes:
    """The beginning of the pickled part: all names and none of the weights, in files of torch 1.6 and later."""
    if not zipfile.is_zipfile(path):
        with path.open("rb") as whole:
            return whole.read(_HEAD_BYTES)
    with zipfile.ZipFile(path) as archive:
        pickles = [name for name in archive.namelist() if name.endswith("/data.pkl")]
        if not pickles:
            return b""
        with archive.open(pickles[0]) as part:
            return part.read(_HEAD_BYTES)


def pickled_name(name: str) -> tuple[bytes, bytes]:
    """A whole string as pickle protocols 2 and 4 write it: with its length, so that a longer name does not match."""
    text, size = name.encode(), len(name)
    return b"X" + size.to_bytes(4, "little") + text, b"\x8c" + size.to_bytes(1, "little") + text
