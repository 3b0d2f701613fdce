"""A step without room in memory says what to lower, and the run goes on where it was saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.loop import Loop
from dtpipe.manifests.errors import DeviceMemoryError
from parts.line import KIND, Line, LineConfig, Rows, fit
from parts.settings import build


@pytest.fixture
def config(tmp_path: Path) -> LineConfig:
    return build(LineConfig, {"out": str(tmp_path / "run")})


def test_a_step_without_room_says_what_to_lower_and_the_run_goes_on_where_it_was_saved(
    config: LineConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Memory that is asked for is really asked for, and nobody has it."""
    loss = Line.losses

    def large(line: Line, rows: Rows) -> Any:
        if (Path(config.run.out) / "last.pt").is_file():
            torch.empty(1 << 55)
        return loss(line, rows)

    monkeypatch.setattr(Line, "losses", large)
    said = r"^step 5: cpu has no memory for 2 images at once \(.*can't allocate memory.*\); widen it$"
    with pytest.raises(DeviceMemoryError, match=said):
        fit(config)
    assert load_checkpoint(Path(config.run.out) / "last.pt", KIND)["step"] == 4
    monkeypatch.undo()
    assert fit(config).resumed_step == 4


def test_an_optimiser_without_room_says_so_too(config: LineConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    line = Line(config)
    monkeypatch.setattr(line.optimizer, "step", lambda *_: torch.empty(1 << 55))
    with pytest.raises(DeviceMemoryError, match="step 1: cpu has no memory for 2 images at once"):
        next(Loop(line).steps())
