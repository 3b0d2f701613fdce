"""The output folder of a run: config.yaml, data.json, metrics.jsonl, last.pt, checkpoints/; one process at a time writes it.

A folder belongs to one config: resuming with another is refused, except for fields that only say how a run is carried
out.
"""

from __future__ import annotations

import fcntl
import json
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TextIO

import yaml

from dtpipe.distill.config import EXECUTION, DistillConfig
from dtpipe.distill.engine.tensorboard import ScalarWriter
from dtpipe.distill.stream.record import DATA_FILE, refuse_other_data
from dtpipe.manifests.differences import Difference, differences, refuse_differences
from dtpipe.manifests.errors import ConfigError, InputError, LockHeldError, StoreError
from dtpipe.manifests.store.publish import write_whole

if TYPE_CHECKING:
    from dtpipe.distill.stream.data import OpenedData

LAST = "last.pt"
SECTION = "distill"  # of the settings document, so that `-c <run>/config.yaml` reads it


class RunFolder:
    """A run folder held by this process; a context manager."""

    def __init__(self, path: Path, lock: TextIO) -> None:
        self.path, self._lock = path, lock
        self._scalars: ScalarWriter | None = None
        self.metrics = path / "metrics.jsonl"
        self.last = path / LAST

    @classmethod
    def open(cls, config: DistillConfig, fresh: bool = False, data: OpenedData | None = None) -> RunFolder:
        """Create the folder, or take up the run that lies in it, and write the resolved config, and what `data` is, beside it.

        Raises: ConfigError when `fresh` and a run exists; PlanChangedError naming fields or data that differ; LockHeldError
        while another process trains here; StoreError when the folder cannot be written.
        """
        path = Path(config.out)
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a+")
        except OSError as err:
            raise StoreError(f"{path}: the run folder cannot be written: {err}; choose another --out") from err
        try:
            _hold(lock, path)
            folder = cls(path, lock)
            folder._take_config(config, fresh, data)
        except BaseException:
            lock.close()
            raise
        return folder

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let another process have the folder; the operating system does so too, when this one is killed."""
        self._lock.close()
        if self._scalars is not None:
            self._scalars.close()

    def log(self, record: Mapping[str, Any]) -> None:
        """Append one line to metrics.jsonl, and to TensorBoard's events where they are kept."""
        with self.metrics.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
        if self._scalars is not None:
            self._scalars.add(record)

    def take_up(self, step: int, tensorboard: bool) -> None:
        """Go on after a step: forget lines of steps that are taken again, and a last line that was cut short.

        Raises: MissingPackageError when TensorBoard's events are wanted and cannot be written.
        """
        if self.metrics.exists():
            kept = [json.dumps(record) + "\n" for record in read_metrics(self.path) if record["step"] <= step]
            _write(self.metrics, "".join(kept))
        if tensorboard:
            self._scalars = ScalarWriter(self.path, step + 1)

    def _take_config(self, config: DistillConfig, fresh: bool, data: OpenedData | None) -> None:
        file = self.path / "config.yaml"
        if fresh and (file.exists() or self.last.exists()):
            raise ConfigError(
                f"{self.path} already holds a run; drop --fresh to go on with it, or choose another --out"
            )
        if file.exists():
            changes = changed_fields(read_config(self.path), config)
            refuse_differences(f"{self.path} holds a run with other settings", changes)
        if data is not None:
            refuse_other_data(self.path, data.record)
            _write(self.path / DATA_FILE, json.dumps(data.record, indent=1) + "\n")
        sections = {SECTION: config.model_dump(mode="json"), **(data.sections if data is not None else {})}
        _write(file, yaml.safe_dump(sections, sort_keys=False, allow_unicode=True))


def read_config(path: Path, section: str = SECTION) -> dict[str, Any]:
    """A resolved section of a run folder's config.yaml, as plain values; empty for another than `distill` that is not there.

    Raises: InputError when there is none or it is not the config of a run.
    """
    file = path / "config.yaml"
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError, UnicodeDecodeError) as err:
        raise InputError(f"{file}: the run's config cannot be read: {err}; choose another --out") from err
    if not isinstance(values, dict) or not isinstance(values.get(SECTION), dict):
        raise InputError(f"{file}: not the config of a run, which has a section `{SECTION}:`; choose another --out")
    found: dict[str, Any] = values.get(section) or {}
    return found


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order; a last line cut short by a kill is left out."""
    file = path / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").split("\n") if file.exists() else [""]
    return [json.loads(line) for line in lines[:-1]]  # what follows the last newline was not written whole


def changed_fields(old: Mapping[str, Any], config: DistillConfig) -> list[Difference]:
    """Fields that decide the result and differ; the old config lacks those that did not exist when its run began."""
    stored, wanted = _over(DistillConfig(out="").model_dump(mode="json"), old), config.model_dump(mode="json")
    for name in EXECUTION:
        stored.pop(name, None)
        wanted.pop(name, None)
    return differences(stored, wanted, "distill.")


def _over(defaults: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Values, and the defaults of those that are not there."""
    nested = {
        name: _over(default, values[name])
        for name, default in defaults.items()
        if isinstance(default, Mapping) and isinstance(values.get(name), Mapping)
    }
    return {**defaults, **values, **nested}


def _hold(lock: TextIO, path: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as err:
        raise LockHeldError(
            f"{path}: another process trains in this folder; wait for it, or choose another --out"
        ) from err


def _write(path: Path, text: str) -> None:
    try:
        write_whole(path, text)
    except OSError as err:
        raise StoreError(f"{path} cannot be written: {err}; free or change the disk and run again") from err
