"""A feature source held in memory, as fixtures."""

from __future__ import annotations

import pytest

from dtpipe.distill.stream.data import OpenedData
from parts.memory import PX, MemorySource


@pytest.fixture
def source() -> MemorySource:
    """21 rows, 19 of them good, one view, levels of strides 4, 8 and 16 of a 32 px image."""
    return MemorySource()


@pytest.fixture
def data(source: MemorySource) -> OpenedData:
    return OpenedData(source, (PX, PX), "0" * 64)
