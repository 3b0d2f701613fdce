"""Workers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from parts.extractions import MakeConfig
from parts.workers import OpenWorker, workers


@pytest.fixture
def open_worker(make_config: MakeConfig) -> Iterator[OpenWorker]:
    """A worker on a fresh plan under a held lock; keyword arguments replace settings, `wrap` wraps the teacher."""
    yield from workers(make_config)
