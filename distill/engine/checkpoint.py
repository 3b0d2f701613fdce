"""Checkpoints: one file with everything a run needs to go on, readable with `weights_only=True`.

A file appears whole or not at all. `last.pt` is the newest; `checkpoints/` keeps a few ends of epochs. Nothing in a
file depends on how many processes trained.
"""

from __future__ import annotations

import json
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

CHECKPOINT_FORMAT = "dtpipe-run/2"


class CheckpointIO:
    """Saves and restores what it is given by name, so that nothing is written down twice.

    What has `state_dict` and `load_state_dict` is restored; any other value is only written, to say what it is of.
    """

    def __init__(self, kind: str, **named: Any) -> None:
        """kind: of which optimisation, a section of the settings document."""
        self.kind = kind
        self._named = named

    def save(self, path: Path) -> None:
        """Raises: StoreError when the disk is full or unwritable."""
        state = {name: value.state_dict() if _stateful(value) else value for name, value in self._named.items()}
        save_checkpoint(path, self.kind, state)

    def restore(self, state: Mapping[str, Any], where: str) -> None:
        """Take up the content of a checkpoint; what was not there when it was saved stays as it is.

        Raises: DamagedDataError when the checkpoint has no entry for a name.
        """
        if missing := sorted(self._named.keys() - state.keys()):
            raise DamagedDataError(f"{where}: the checkpoint lacks {missing}; use one of checkpoints/ beside it")
        for name, value in self._named.items():
            if _stateful(value) and state[name] is not None:
                value.load_state_dict(state[name])


def _stateful(value: Any) -> bool:
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def save_checkpoint(path: Path, kind: str, state: Mapping[str, Any]) -> None:
    """Write a checkpoint whole.

    Raises: StoreError when the disk is full or unwritable.
    """
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            torch.save({"format": CHECKPOINT_FORMAT, "kind": kind, **state}, file)
    except (OSError, RuntimeError) as err:  # torch's writer raises the latter on a full disk
        raise StoreError(
            f"{path}: the checkpoint cannot be written: {err}; free or change the disk and run again"
        ) from err


def load_checkpoint(path: Path, kind: str) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; no code from the file is run.

    Raises: InputError when there is none or it is another kind of file; DamagedDataError when it cannot be read whole.
    """
    command = f"dtpipe {kind.replace('_', '-')}"
    try:
        state = _in_todays_form(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as err:
        raise InputError(
            f"{path}: no checkpoint here; give the --out folder of {command}, its last.pt or an export"
        ) from err
    except (RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, ValueError, KeyError, OSError) as err:
        raise DamagedDataError(
            f"{path}: the checkpoint cannot be read: {_reason(err)}; use one of checkpoints/ beside it"
        ) from err
    if state.get("format") != CHECKPOINT_FORMAT or state.get("kind") != kind:
        raise InputError(
            f"{path}: not a checkpoint of {command} ({CHECKPOINT_FORMAT}); give its --out folder, last.pt or an export"
        )
    return state


def _reason(err: Exception) -> str:
    """Why a file cannot be read, without torch's advice to run what lies in it."""
    if isinstance(err, pickle.UnpicklingError):
        return "it is not a file of tensors and plain values, as torch.save writes it"
    return str(err)


def _in_todays_form(content: Any) -> dict[str, Any]:
    """Checkpoints of every format there was; empty for another kind of file."""
    if not isinstance(content, dict):
        return {}
    if content.get("format") == "dtpipe-run/1":  # distill's; the step stood beside the numbers of the schedule
        step = content.get("scheduler", {}).get("step")
        return content | {"format": CHECKPOINT_FORMAT, "kind": "distill", "scaler": None, "step": step}
    if "format" not in content and isinstance(
        content.get("config"), str
    ):  # train-teacher's; the settings were JSON text
        first: dict[str, Any] = {"classes": [], "scaler": None, "started_from": None}
        later = {"format": CHECKPOINT_FORMAT, "kind": "train_teacher", "config": json.loads(content["config"])}
        return first | content | later
    return content


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
