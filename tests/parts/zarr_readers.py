"""What zarr-python finds of ours where dtpipe is installed."""

from __future__ import annotations

import tomllib
from importlib.metadata import EntryPoint

from zarr.registry import register_codec

from parts.paths import REPO


def register_entry_points() -> None:
    """Make our zarr codecs known by what pyproject.toml declares, whatever is installed here."""
    points = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]["entry-points"]["zarr.codecs"]
    for name, value in points.items():
        register_codec(name, EntryPoint(name, value, "zarr.codecs").load())
