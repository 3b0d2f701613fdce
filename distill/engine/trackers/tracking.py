"""The trackers of one run, and the id under which they know it, in tracking.json of its folder."""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from dtpipe.distill.engine.trackers.base import Outcome, TrackedRun, Tracker
from dtpipe.distill.engine.trackers.config import Tracking
from dtpipe.distill.engine.trackers.registry import TRACKERS
from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.records.document import read_document, write_document
from dtpipe.manifests.records.lines import read_lines

TRACKING_FILE = "tracking.json"
METRICS_FILE = "metrics.jsonl"
_REMEDY = "delete it: trackers then show what follows as another run"
_log = logging.getLogger(__name__)


class RunTrackers:
    """The open trackers of one part of a run; one that fails is left out from then on, which is logged."""

    def __init__(self) -> None:
        self._open: dict[str, Tracker] = {}

    def begin(self, tracking: Tracking, run: TrackedRun) -> None:
        """Open the trackers that settings name. Raises: as `TrackerKind.open`."""
        for name in tracking.tracker_names:
            self._open[name] = TRACKERS[name].open(run)

    def add(self, record: Mapping[str, Any]) -> None:
        """One line of metrics.jsonl. Raises: StoreError, of a tracker on a disk that is full."""
        self._each(lambda tracker: tracker.add(record))

    def conclude(self, scores: Mapping[str, float], step: int) -> None:
        """Scores of what the run made, by name. Raises: as `add`."""
        self._each(lambda tracker: tracker.conclude(scores, step))

    def close(self, outcome: Outcome) -> None:
        """End this part. Raises: as `add`."""
        self._each(lambda tracker: tracker.close(outcome))
        self._open.clear()

    def _each(self, act: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._open.items()):
            try:
                act(tracker)
            except DtpipeError:
                raise
            except Exception as err:  # a package of others, which must not end a run
                del self._open[name]
                _log.warning("tracker %s fails and is left out from here on, %s: %s", name, type(err).__name__, err)


def keep_id(folder: Path, tracking: Tracking) -> str:
    """The id of the run in a folder, made where there is none, beside the trackers that know it.

    Raises: StoreError when it cannot be written; DamagedDataError for a file that was changed.
    """
    record = _read(folder) or {"id": uuid.uuid4().hex}
    record |= {"trackers": list(tracking.tracker_names), "project": tracking.project}
    write_document(folder / TRACKING_FILE, record, "free or change the disk and run again")
    return str(record["id"])


def send_scores(folder: Path, kind: str, scores: Mapping[str, float]) -> None:
    """Send scores of a run that has ended to the trackers that know it, if any does, as of its last line.

    Raises: as `TrackerKind.open`.
    """
    record = _read(folder)
    if record is None or not record.get("trackers"):
        return
    lines = read_lines(folder / METRICS_FILE)
    step = lines[-1].record["step"] if lines else 0
    tracking = Tracking(trackers=tuple(record["trackers"]), project=record.get("project"))
    trackers = RunTrackers()
    trackers.begin(tracking, TrackedRun(folder, kind, {}, record["id"], step + 1, tracking.project))
    trackers.conclude(scores, step)
    trackers.close("finished")


def _read(folder: Path) -> dict[str, Any] | None:
    try:
        return read_document(folder / TRACKING_FILE, _REMEDY)
    except FileNotFoundError:
        return None
