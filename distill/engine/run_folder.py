"""The output folder of a run: config.yaml, data.json, metrics.jsonl, last.pt, previous.pt, checkpoints/; one writer.

A folder belongs to one config: resuming with another is refused, except for fields that only say how a run is carried
out.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

import yaml

from dtpipe.distill.engine.checkpoint import (
    CheckpointIO,
    disk_is_full,
    drop_epochs,
    drop_previous,
    keep_epoch,
    load_checkpoint,
)
from dtpipe.distill.engine.record import DATA_FILE, refuse_other_data, write_record
from dtpipe.distill.engine.recovery import newest_checkpoint
from dtpipe.distill.engine.trackers.base import Outcome, TrackedRun
from dtpipe.distill.engine.trackers.config import Tracking
from dtpipe.distill.engine.trackers.tracking import METRICS_FILE, TRACKING_FILE, RunTrackers, keep_id
from dtpipe.manifests.differences import Difference, differences, refuse_differences
from dtpipe.manifests.documents import Refusal, parse_yaml
from dtpipe.manifests.errors import (
    ConfigError,
    DamagedDataError,
    DtpipeError,
    InputError,
    LockHeldError,
    StoppedError,
    StoreError,
)
from dtpipe.manifests.records.ending import read_text, seal_text
from dtpipe.manifests.records.lines import Line, append_line, keep_lines, read_lines
from dtpipe.manifests.schema import Settings
from dtpipe.manifests.store.hold import hold
from dtpipe.manifests.store.outputs import refuse_other_folder
from dtpipe.manifests.store.publish import write_whole

_LAST, _CONFIG, _LOCK = "last.pt", "config.yaml", ".lock"
_REMEDY, _ROOM = "restore the file, or choose another --out", "free or change the disk and run again"
_LEFTOVERS = (DATA_FILE, METRICS_FILE, TRACKING_FILE, "checked_images.json", "targets.json")
"""Of a run that has no config yet, or none any more."""


@dataclass(frozen=True)
class RunSettings:
    """Which run a folder holds: where, of what, and by which settings and data."""

    out: Path
    kind: str
    """The section of the settings document that the run follows from; `-c <out>/config.yaml` reads it."""
    config: Settings
    identity: Mapping[str, Any] = field(default_factory=dict)
    """What a checkpoint must say of its data to be taken up; plain values."""
    data: Mapping[str, Any] | None = None
    """What the run trains on, by content, for data.json."""
    sections: Mapping[str, Any] = field(default_factory=dict)
    """Other sections of settings, to stand in config.yaml too."""
    fresh: bool = False
    """Refuse a folder that holds a run."""

    @property
    def last(self) -> Path:
        """The newest checkpoint."""
        return self.out / _LAST

    def refuse_other(self) -> None:
        """See that the folder, where there is one, holds this run or none; writes nothing but a lock for a moment.

        Raises: as `RunFolder.open`.
        """
        self.refuse_other_place()
        if self.out.is_dir():
            with _hold(self.out):
                self._refuse_other()

    def refuse_other_place(self) -> None:
        """See that the folder holds a run of this kind, or is one to begin a run in; writes nothing.

        Raises: ConfigError.
        """
        if self._begun():
            return
        try:
            refuse_other_folder(self.out, f"dtpipe {self.kind.replace('_', '-')}", _LEFTOVERS)
        except ConfigError:
            if not self._begun():  # else another process has begun it between the two looks
                raise

    def _begun(self) -> bool:
        """Whether the folder holds a run of this kind. Raises: ConfigError where it holds one of another."""
        try:
            return self._settings_there() is not None
        except InputError as err:
            raise ConfigError(str(err)) from err

    def _refuse_other(self) -> None:
        settings = self._settings_there()
        if self.fresh and settings is not None:
            raise ConfigError(f"{self.out} already holds a run; drop --fresh to go on with it, or choose another --out")
        if settings is not None:
            changes = changed_fields(settings, self.config, self.kind)
            refuse_differences(f"{self.out} holds a run with other settings", changes)
        if self.data is not None:
            refuse_other_data(self.out, self.data)

    def _settings_there(self) -> Mapping[str, Any] | None:
        """Those of the run in the folder, if there is one; old runs of train-teacher have them in the checkpoint."""
        if (self.out / _CONFIG).exists():
            return read_config(self.out, kind=self.kind)
        newest = newest_checkpoint(self.last, self.kind)
        return None if newest is None else newest.state.get("config", {})


class RunFolder:
    """A run folder held by this process; a context manager."""

    def __init__(self, settings: RunSettings, lock: TextIO) -> None:
        self.settings, self.path, self._lock = settings, settings.out, lock
        self._trackers = RunTrackers()
        self.metrics = self.path / METRICS_FILE
        self.last = settings.last

    @classmethod
    def open(cls, settings: RunSettings) -> RunFolder:
        """Create the folder, or take up the run that lies in it, and write the resolved config, and what the data is.

        Raises: ConfigError when `fresh` and a run exists, or something else does; PlanChangedError naming fields or
        data that differ; LockHeldError while another process trains here; StoreError when the folder cannot be written.
        """
        settings.refuse_other_place()
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
        except OSError as err:
            raise StoreError(f"{settings.out}: the run folder cannot be written: {err}; choose another --out") from err
        lock = _hold(settings.out)
        try:
            settings._refuse_other()
            folder = cls(settings, lock)
            folder._write_settings()
        except BaseException:
            lock.close()
            raise
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close("finished" if kind is None else "stopped" if issubclass(kind, StoppedError) else "failed")

    def close(self, outcome: Outcome = "finished") -> None:
        """Let another process have the folder; the operating system does so too, when this one is killed."""
        try:
            self._trackers.close(outcome)
        finally:
            self._lock.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, and show it in the trackers.

        Raises: StoreError when it cannot be written.
        """
        append_line(self.metrics, record)
        self._trackers.add(record)

    def conclude(self, scores: Mapping[str, float]) -> None:
        """Show scores of what the run made in its trackers. Raises: as `log`."""
        lines = _metrics(self.path)
        self._trackers.conclude(scores, lines[-1].record["step"] if lines else 0)

    def save(self, checkpoint: CheckpointIO, epoch: int | None = None, num_kept: int = 0) -> None:
        """Write last.pt; at the end of an epoch it is kept, with those of the epochs before.

        On a full disk, checkpoints that would be deleted afterwards are deleted first.
        Raises: StoreError when it cannot be written; LockHeldError when the folder is no longer this process's.
        """
        self._check()
        try:
            checkpoint.save(self.last)
        except StoreError as err:
            if not disk_is_full(err) or not self._make_room(None if epoch is None else max(num_kept - 1, 0)):
                raise
            checkpoint.save(self.last)
        if epoch is not None:
            try:
                keep_epoch(self.last, epoch, num_kept)
            except OSError as err:
                raise StoreError(f"{self.path}/checkpoints cannot be written: {err}; {_ROOM}") from err

    def _make_room(self, num_epochs: int | None) -> bool:
        """Delete the checkpoint before the last, if the last is whole, and ends of epochs beyond a number, where one is
        given; True if there was any."""
        try:
            load_checkpoint(self.last, self.settings.kind)
        except DtpipeError:
            return False
        return any([drop_previous(self.last), num_epochs is not None and drop_epochs(self.last, num_epochs)])

    def take_up(self, step: int, tracking: Tracking | None = None) -> str | None:
        """Go on after a step: forget lines of steps that are taken again, and what is left of a line cut short.

        Returns a sentence on the latter, if there was one.
        Raises: DamagedDataError as `read_metrics`; MissingPackageError and others when a tracker cannot begin.
        """
        torn = keep_lines(self.metrics, [line for line in _metrics(self.path) if line.record["step"] <= step])
        if tracking is not None and tracking.tracker_names:
            run_id = keep_id(self.path, tracking)
            run = TrackedRun(self.path, self.settings.kind, self._sections(), run_id, step + 1, tracking.project)
            self._trackers.begin(tracking, run)
        return f"{self.metrics}: its last {torn} bytes were no whole line and are cut off" if torn else None

    def _check(self) -> None:
        """A lock file that was removed keeps nobody out."""
        try:
            held = os.path.samestat(os.fstat(self._lock.fileno()), (self.path / _LOCK).stat())
        except FileNotFoundError:
            held = False
        if not held:
            raise LockHeldError(f"{self.path / _LOCK}: somebody removed this run's lock; run the command again")

    def _write_settings(self) -> None:
        settings = self.settings
        if settings.data is not None:
            write_record(self.path, settings.data)
        text = yaml.safe_dump(self._sections(), sort_keys=False, allow_unicode=True)
        _write(self.path / _CONFIG, seal_text(text))

    def _sections(self) -> dict[str, Any]:
        """The settings as config.yaml has them."""
        settings = self.settings
        return {settings.kind: settings.config.model_dump(mode="json"), **settings.sections}


def read_config(path: Path, section: str | None = None, kind: str = "distill") -> dict[str, Any]:
    """A resolved section of a run folder's config.yaml, by default the run's own; empty for another that is not there.

    Raises: InputError when there is none or it is not the config of a run of that kind; DamagedDataError when its bytes
    were changed.
    """
    file = path / _CONFIG
    try:
        values = parse_yaml(read_text(file, _REMEDY), file, Refusal(DamagedDataError, _REMEDY))
    except FileNotFoundError as err:
        raise InputError(f"{file}: there is no such file, so no run here; choose another --out") from err
    if not isinstance(values, dict) or not isinstance(values.get(kind), dict):
        raise InputError(f"{file}: not the config of a run, which has a section `{kind}:`; choose another --out")
    settings: dict[str, Any] = values.get(section or kind) or {}
    return settings


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; what a kill left of the last is left out.

    Raises: DamagedDataError naming file and line for one that is none, or was changed.
    """
    return [line.record for line in _metrics(path)]


def _metrics(path: Path) -> list[Line]:
    file = path / METRICS_FILE
    lines = read_lines(file)
    for number, line in enumerate(lines, 1):
        if not isinstance(line.record.get("step"), int):
            raise DamagedDataError(f"{file}, line {number} names no step; delete this line to go on without it")
    return lines


def changed_fields(old: Mapping[str, Any], config: Settings, section: str) -> list[Difference]:
    """Fields that decide the result and differ; the old config lacks those that did not exist when its run began."""
    model = type(config)
    stored = _over(model.model_construct().identity(), model.identity_of(old))
    return differences(stored, config.identity(), f"{section}.")


def _over(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values, and the defaults of those that are not there."""
    nested = {
        name: _over(default, values[name])
        for name, default in defaults.items()
        if isinstance(default, Mapping) and isinstance(values.get(name), Mapping)
    }
    return {**defaults, **values, **nested}


def _hold(path: Path) -> TextIO:
    """The folder's lock file, locked until it is closed."""
    with ExitStack() as stack:
        try:
            lock = stack.enter_context((path / _LOCK).open("a+"))
            hold(lock)
        except BlockingIOError as err:
            raise LockHeldError(
                f"{path}: another process trains in this folder; wait for it, or choose another --out"
            ) from err
        except OSError as err:
            raise StoreError(f"{path}: the run folder cannot be written: {err}; choose another --out") from err
        stack.pop_all()  # it stays open
    return lock


def _write(path: Path, content: bytes) -> None:
    try:
        write_whole(path, content)
    except OSError as err:
        raise StoreError(f"{path} cannot be written: {err}; {_ROOM}") from err
