"""Checkpoints: one file with everything a run needs to go on, readable with `weights_only=True`.

A file appears whole or not at all. `last.pt` is the newest; `checkpoints/` keeps a few ends of epochs.
"""

from __future__ import annotations

import os
import pickle
import shutil
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from dtpipe.manifests.errors import DamagedDataError, InputError, StoreError
from dtpipe.manifests.store.publish import whole_file

FORMAT = "dtpipe-run/1"


def save_checkpoint(path: Path, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole.

    Raises: StoreError when the disk is full or unwritable.
    """
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": FORMAT, **state}, file)
    except OSError as err:
        raise StoreError(
            f"{path}: the checkpoint cannot be written: {err}; free or change the disk and run again"
        ) from err


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; no code from the file is run.

    Raises: InputError when there is none or it is another kind of file; DamagedDataError when it cannot be read whole.
    """
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError as err:
        raise InputError(f"{path}: no checkpoint here; give a run folder, its last.pt or an export") from err
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as err:
        raise DamagedDataError(
            f"{path}: the checkpoint cannot be read: {err}; use one of checkpoints/ beside it"
        ) from err
    if not isinstance(state, dict) or state.get("format") != FORMAT:
        raise InputError(
            f"{path}: not a checkpoint of dtpipe distill ({FORMAT}); give a run folder, its last.pt or an export"
        )
    return state


def keep_epoch(last: Path, epoch: int, num_kept: int) -> None:
    """Keep `last` as the checkpoint of an epoch's end, and drop the oldest beyond `num_kept`."""
    folder = last.parent / "checkpoints"
    if num_kept > 0:
        with whole_file(folder / f"epoch-{epoch:05d}.pt", ".epoch.tmp") as temporary:
            try:
                os.link(last, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(last, temporary)
    for old in sorted(folder.glob("epoch-*.pt"))[: -num_kept or None]:
        old.unlink()
