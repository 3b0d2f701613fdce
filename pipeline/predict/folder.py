"""The folder of predictions: which images are done, under which names their files lie, and who may write.

Each image's files are written whole, then its line; so a line says that an image is done. A second run of the command
goes on with the others.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
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


class PredictionFolder:
    """Predictions of one predictor on one source."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.done: dict[str, Done] = {}

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
            for record in (line.record for line in lines):
                self.done[record["key"]] = Done((record["px"][0], record["px"][1]), record["files"], record["said"])

    def is_whole(self, key: str, folders: Sequence[str]) -> bool:
        """True when an image is done, its files are there, and it has one in each of `folders`."""
        done = self.done.get(key)
        if done is None or any(not any(name.startswith(f"{folder}/") for name in done.files) for folder in folders):
            return False
        return all(_size(self.path / name) == size for name, size in done.files.items())

    def add(self, key: str, px: tuple[int, int], files: Mapping[str, bytes], said: Any) -> None:
        """Write an image's files, by path below the folder, then its line. Raises: StoreError."""
        for name, content in files.items():
            try:
                write_whole(self.path / name, content)
            except OSError as err:
                raise StoreError(f"{self.path / name} cannot be written: {err}; {_ROOM}") from err
        done = Done(px, {name: len(content) for name, content in files.items()}, said)
        lines = self.path / _LINES / f"{len(self.done) // _PER_FILE:05d}.jsonl"
        lines.parent.mkdir(exist_ok=True)
        append_line(lines, {"key": key, "px": list(px), "files": done.files, "said": said})
        self.done[key] = done


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
