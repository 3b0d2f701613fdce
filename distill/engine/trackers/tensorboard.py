"""TensorBoard's event files in `tensorboard/` of the run folder."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

from dtpipe.distill.engine.trackers.base import Outcome, TrackedRun, TrackerKind, scalars
from dtpipe.manifests.errors import MissingPackageError, StoreError


class ScalarWriter:
    """Writes events of one part of a run; a resumed run adds a file, and its first step hides what was after it."""

    def __init__(self, run: TrackedRun) -> None:
        """Raises: MissingPackageError without the package tensorboard; StoreError when nothing can be written."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as err:
            raise MissingPackageError(
                "tracker tensorboard needs a package; run `pip install 'dtpipe[tensorboard]'`, or leave it out"
            ) from err
        self._folder = run.folder / "tensorboard"
        with self._writing():
            self._writer = SummaryWriter(str(self._folder), purge_step=run.first_step)

    def add(self, record: Mapping[str, Any]) -> None:
        """As `Tracker.add`. Raises: StoreError when it cannot be written."""
        self._write(scalars(record), record["step"])

    def conclude(self, scores: Mapping[str, float], step: int) -> None:
        """Scores as curves of one point. Raises: StoreError when they cannot be written."""
        self._write(scores, step)

    def close(self, _outcome: Outcome) -> None:
        """Close the file; what does not find room any more was said by `add`."""
        with suppress(OSError):
            self._writer.close()

    def _write(self, values: Mapping[str, float], step: int) -> None:
        with self._writing():
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)
            self._writer.flush()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as err:
            raise StoreError(
                f"{self._folder} cannot be written: {err}; free or change the disk, or leave tracker tensorboard out"
            ) from err


TRACKER = TrackerKind("tensorboard", "Event files in tensorboard/ of the run folder.", ScalarWriter)
