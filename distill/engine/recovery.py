"""The newest whole checkpoint of a run, where the last one is damaged or gone.

One rule: nothing is deleted. A damaged last.pt is moved aside, since the disk or the memory may be what is broken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtpipe.distill.engine.checkpoint import earlier_checkpoints, link, load_checkpoint
from dtpipe.manifests.errors import DamagedDataError, StoreError
from dtpipe.manifests.store.publish import rename


@dataclass(frozen=True)
class Newest:
    """A checkpoint that is whole."""

    path: Path
    state: dict[str, Any]
    problem: str | None = None
    """What is the matter with the last, where this is another."""


def newest_checkpoint(last: Path, kind: str) -> Newest | None:
    """The last checkpoint, else the newest whole one before it; None for a run that has none. Changes nothing.

    Raises: DamagedDataError when those that are there are damaged; InputError as `load_checkpoint`.
    """
    damage = None
    for path in (last, *earlier_checkpoints(last)):
        if path == last and not path.exists():
            continue
        try:
            state = load_checkpoint(path, kind)
        except DamagedDataError as err:
            damage = damage or err
            continue
        if path == last:
            return Newest(path, state)
        return Newest(path, state, f"{last}: is not there" if damage is None else str(damage).partition(";")[0])
    if damage is not None:
        raise damage
    return None


def take_up(newest: Newest, last: Path) -> str | None:
    """Put a checkpoint in the last one's place, if it is another; a sentence that says so.

    Raises: StoreError when the folder cannot be written.
    """
    if newest.problem is None:
        return None
    aside = last.with_name(f"{last.name}.damaged")
    there = last.exists()
    try:
        if there:
            rename(last, aside)
        link(newest.path, last)
    except OSError as err:
        raise StoreError(f"{last} cannot be written: {err}; free or change the disk and run again") from err
    kept = f"; the damaged file is now {aside.name}" if there else ""
    return f"{newest.problem}; going on from step {newest.state['step']}, which {newest.path.name} holds{kept}"
