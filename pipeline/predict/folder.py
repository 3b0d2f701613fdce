"""The folder of predictions: which images are done, under which names their files lie, and who may write.

Each image's files are written whole, then its line; so a line says that an image is done. A second run of the command
goes on with the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from dtpipe.manifests.differences import Difference, refuse_differences
from dtpipe.manifests.errors import LockHeldError, StoreError
from dtpipe.manifests.records.document import read_document, write_document
from dtpipe.manifests.records.lines import append_line, keep_lines, read_lines
from dtpipe.manifests.store.hold import hold
from dtpipe.manifests.store.outputs import refuse_other_folder
from dtpipe.manifests.store.publish import write_whole

RECORD = "predictions.json"
"""What the folder holds predictions of, and by which predictor."""
_LINES = "done"
_PER_FILE = 20_000  # lines of one file, which is read whole
_FIELDS = ("files", "said", "image", "stamp", "min_score")
_REMEDY = "choose another --out, or move the file away to begin anew"
_ROOM = "make room or choose another --out; what is done is kept"


@dataclass(frozen=True)
class Done:
    """What was made of one image."""

    px: tuple[int, int]
    """Height and width of what was predicted on."""
    files: Mapping[str, int]
    """Bytes by path below the folder."""
    said: Any = None
    """What goes into a table alone, and is no file."""
    image: str | None = None
    """blake3 of the image's bytes; None in folders written before this was kept."""
    stamp: str = ""
    """Of its file, as `file_stamp` gives it."""
    min_score: float | None = None
    """Lowest score drawn on its overlay, where that has objects."""


class PredictionFolder:
    """Predictions of one predictor on one source."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, Done] = {}
        self._num_lines = 0

    @classmethod
    @contextmanager
    def open(cls, path: Path, of: Mapping[str, Any]) -> Iterator[PredictionFolder]:
        """Begin a folder or go on in it, alone.

        Raises: ConfigError when it holds something else; PlanChangedError when it is `of` others; LockHeldError;
        StoreError; DamagedDataError when a line was changed.
        """
        there = (path / RECORD).is_file()
        if not there:
            refuse_other_folder(path, "dtpipe predict", (_LINES,))
        try:
            path.mkdir(parents=True, exist_ok=True)
            lock = (path / ".lock").open("a+")
        except OSError as err:
            raise _unwritable(path, err) from err
        with lock:
            try:
                hold(lock)
            except BlockingIOError as err:
                raise LockHeldError(f"{path}: another process predicts into this folder; wait for it") from err
            except OSError as err:
                raise _unwritable(path, err) from err
            if there:
                _refuse_changes(path, read_document(path / RECORD, _REMEDY), of)
            else:
                write_document(path / RECORD, of, _ROOM)
            folder = cls(path)
            folder._read()
            yield folder

    def _read(self) -> None:
        for file in sorted((self.path / _LINES).glob("*.jsonl")):
            lines = read_lines(file)
            keep_lines(file, lines)  # without what a kill left of the last
            self._num_lines += len(lines)
            for record in (line.record for line in lines):
                if record["px"] is None:
                    self.done.pop(record["key"], None)
                    continue
                values = {name: record[name] for name in _FIELDS if name in record}
                self.done[record["key"]] = Done((record["px"][0], record["px"][1]), **values)

    def is_whole(self, key: str, folders: Sequence[str], min_score: float | None = None) -> bool:
        """True when an image is done, its files are there, and it has one in each of `folders`; with `min_score`, drawn
        from that."""
        done = self.done.get(key)
        if min_score is not None and (done is None or done.min_score != min_score):
            return False
        if done is None or any(not any(name.startswith(f"{folder}/") for name in done.files) for folder in folders):
            return False
        return all(_size(self.path / name) == size for name, size in done.files.items())

    def add(self, key: str, done: Done, files: Mapping[str, bytes]) -> None:
        """Write an image's files, by path below the folder, then its line. Raises: StoreError."""
        for name, content in files.items():
            try:
                write_whole(self.path / name, content)
            except OSError as err:
                raise StoreError(f"{self.path / name} cannot be written: {err}; {_ROOM}") from err
        done = replace(done, files={name: len(content) for name, content in files.items()})
        self._append({"key": key, **asdict(done)})
        self.done[key] = done

    def forget(self, key: str) -> None:
        """Take away what was made of an image that has changed. Raises: StoreError."""
        self._append({"key": key, "px": None})
        for name in self.done.pop(key).files:
            try:
                (self.path / name).unlink(missing_ok=True)
            except OSError as err:
                raise StoreError(f"{self.path / name} cannot be removed: {err}; remove it and run again") from err

    def _append(self, record: Mapping[str, Any]) -> None:
        """Later lines stand in the same file or a later one, and count."""
        lines = self.path / _LINES / f"{self._num_lines // _PER_FILE:05d}.jsonl"
        lines.parent.mkdir(exist_ok=True)
        append_line(lines, record)
        self._num_lines += 1


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


def _refuse_changes(path: Path, stored: Mapping[str, Any], of: Mapping[str, Any]) -> None:
    changes = [Difference(name, stored.get(name), value) for name, value in of.items() if stored.get(name) != value]
    refuse_differences(f"{path} holds other predictions", changes, "choose another --out")


def _unwritable(path: Path, err: OSError) -> StoreError:
    return StoreError(f"{path} cannot be written: {err}; {_ROOM}")
