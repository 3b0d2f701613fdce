"""What goes wrong with files: flipped bytes, edited settings and weights, and pickles that run code."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor


class Attack:
    """Whoever trusts its pickle leaves a file."""

    def __init__(self, trap: Path) -> None:
        self.trap = trap

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.trap}",)


def flipped(data: bytes, place: int, bits: int = 1) -> bytes:
    """The same bytes but for some bits of one."""
    place %= len(data)
    return data[:place] + bytes([data[place] ^ bits]) + data[place + 1 :]


def flip(path: Path, place: int | None = None, bits: int = 1) -> None:
    """Flip bits of one byte of a file, by default of the middle one."""
    data = path.read_bytes()
    path.write_bytes(flipped(data, len(data) // 2 if place is None else place, bits))


def edit_json(path: Path, **changes: object) -> None:
    """Replace entries of a JSON object."""
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def edit_tensors(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of a safetensors file."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
