"""Where things lie that tests read. Tests of what is shared between projects skip where it is not there."""

from __future__ import annotations

from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
SHARED = REPO.parent / "shared"
PARITY = SHARED / "parity"
FIXTURES = REPO / "tests" / "extract" / "fixtures"
GOLDEN = REPO / "tests" / "golden"
PRESETS = REPO / "pipeline" / "presets"
PARTS = REPO / "tests" / "parts"
