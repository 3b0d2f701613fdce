"""What a tracker is: it shows the lines of metrics.jsonl elsewhere. metrics.jsonl stays the record of a run.

One rule: a run has one id, which its folder keeps, so that a part that goes on after a crash or a requeue is shown as
the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

NOT_CURVES = ("step", "num_steps", "num_epochs")
Outcome = Literal["finished", "stopped", "failed"]


@dataclass(frozen=True)
class TrackedRun:
    """One part of a run: from where it begins, or goes on, to where it ends or is stopped."""

    folder: Path
    kind: str
    """The section of the settings that the run follows from, such as `distill`."""
    config: Mapping[str, Any]
    """Resolved settings by section, plain values."""
    run_id: str
    """The same for all parts of the run."""
    first_step: int
    """The first that this part takes, from 1."""
    project: str | None = None
    """Where the tracker is to put it; None: where the tracker's own environment says."""

    @property
    def name(self) -> str:
        """The folder, for people."""
        return "/".join(self.folder.absolute().parts[-2:])


class Tracker(Protocol):
    """Shows one part of a run.

    Raises: of all methods, StoreError for what must stop the run. Any other exception is logged, and the run goes on
    without this tracker.
    """

    def add(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl: `step` and values by name, not all of them numbers."""
        ...

    def conclude(self, scores: Mapping[str, float], step: int) -> None:
        """Scores of what the run made after so many steps, by name."""
        ...

    def close(self, outcome: Outcome) -> None:
        """Nothing more comes from this part."""
        ...


@dataclass(frozen=True)
class TrackerKind:
    """One tracker that settings can name."""

    name: str
    summary: str
    open: Callable[[TrackedRun], Tracker]
    """Raises: MissingPackageError without its package; ConfigError or StoreError where it cannot begin."""


def scalars(record: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a line that make a curve over its step."""
    return {
        name: value
        for name, value in record.items()
        if name not in NOT_CURVES and isinstance(value, int | float) and not isinstance(value, bool)
    }
