"""The demo's folder: one demo at a time, one version and one set of settings; an interrupted demo is gone on with.

A marker says what the folder holds, so that nothing else is ever emptied, and numbers of two demos are never mixed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TextIO

from dtpipe.manifests.differences import differences, refuse_differences
from dtpipe.manifests.documents import Refusal, read_object
from dtpipe.manifests.errors import ConfigError, LockHeldError, StoreError
from dtpipe.manifests.store.hold import hold
from dtpipe.manifests.store.outputs import refuse_no_folder
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.config import DemoConfig

_MARKER, _LOCK = ".dtpipe-demo", ".lock"
_START_OVER = "start over with --fresh, which empties the folder, or give another --out"


@contextmanager
def held_folder(config: DemoConfig, fresh: bool, note: Note) -> Iterator[Path]:
    """The folder of a demo: a new one, or one with the same demo, finished or not; `fresh` empties that of any demo.

    Raises: ConfigError when something else lies there, or a demo of other settings or of another version;
    LockHeldError while another demo runs there; StoreError when it cannot be written.
    """
    out = Path(config.out)
    _refuse_foreign(out)
    with _hold(out):
        try:
            _prepare(out, _identity(config), fresh, note)
        except OSError as err:
            raise _unwritable(out, err) from err
        yield out


def _prepare(out: Path, identity: Mapping[str, Any], fresh: bool, note: Note) -> None:
    marker = out / _MARKER
    if fresh:
        _empty(out)
    elif marker.exists():
        _refuse_other(out, identity)
        note(f"goes on with the demo in {out}; --fresh starts over")
    write_whole(marker, json.dumps(identity, indent=2) + "\n")


def _identity(config: DemoConfig) -> dict[str, Any]:
    """What decides the demo's numbers."""
    return {"version": version("dtpipe"), **config.model_dump(mode="json", exclude={"out", "workers"})}


def _refuse_foreign(out: Path) -> None:
    refuse_no_folder(out)
    names = {path.name for path in out.iterdir()} if out.exists() else set()
    if names - {_LOCK} and _MARKER not in names:
        raise ConfigError(f"{out} holds something that no demo wrote; give another folder with --out")


def _refuse_other(out: Path, wanted: Mapping[str, Any]) -> None:
    marker = out / _MARKER
    if not marker.stat().st_size:  # it said nothing at first
        raise ConfigError(f"{out} holds a demo of an earlier version; {_START_OVER}")
    stored = read_object(marker, Refusal(ConfigError, _START_OVER))
    refuse_differences(f"{out} holds another demo", differences(stored, wanted), _START_OVER)


def _empty(out: Path) -> None:
    for path in out.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != _LOCK:
            path.unlink()


@contextmanager
def _hold(out: Path) -> Iterator[TextIO]:
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = (out / _LOCK).open("a+")
    except OSError as err:
        raise _unwritable(out, err) from err
    with lock:
        try:
            hold(lock)
        except BlockingIOError as err:
            raise LockHeldError(f"{out}: another demo runs in this folder; wait for it, or give another --out") from err
        except OSError as err:
            raise _unwritable(out, err) from err
        yield lock


def _unwritable(out: Path, err: OSError) -> StoreError:
    return StoreError(f"{out}: the demo's folder cannot be written: {err}; choose another --out")
