"""What a store says while it waits."""

from __future__ import annotations

from collections.abc import Callable

import pytest


@pytest.fixture
def notices(caplog: pytest.LogCaptureFixture) -> Callable[[], list[str]]:
    """What was said so far."""
    return lambda: [record.getMessage() for record in caplog.records if record.name.startswith("dtpipe.")]
