"""Checkpoints: one file with everything a run needs to go on, readable with `weights_only=True`.

A file appears whole or not at all, and ends in a seal that is checked before anything of it is used. `last.pt` is the
newest, `previous.pt` the one before; `checkpoints/` keeps a few ends of epochs. Nothing in a file depends on how many
processes trained.
"""

from __future__ import annotations

import errno
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, cast

import torch
from blake3 import blake3
from torch import Tensor

from dtpipe.manifests.documents import Refusal
from dtpipe.manifests.errors import DamagedDataError, InputError, StoreError
from dtpipe.manifests.records.ending import SealingFile, is_sealed
from dtpipe.manifests.records.pickles import check_pickle
from dtpipe.manifests.store.publish import whole_file

CHECKPOINT_FORMAT = "dtpipe-run/2"
_PREVIOUS, _EPOCHS = "previous.pt", "checkpoints"
_UNREADABLE = (
    *(RuntimeError, pickle.UnpicklingError, EOFError, zipfile.BadZipFile, NotImplementedError, ValueError, KeyError),
    *(AttributeError, TypeError, IndexError, OverflowError, MemoryError, OSError),
)
"""What torch and zipfile raise on nonsense."""


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
    """Write a checkpoint whole; the one that it replaces stays as previous.pt beside it.

    Raises: StoreError when the disk is full or unwritable.
    """
    sealing = None
    try:
        with whole_file(path) as temporary:
            with temporary.open("wb") as file:
                sealing = SealingFile(file)
                torch.save({"format": CHECKPOINT_FORMAT, "kind": kind, **state}, cast(IO[bytes], sealing))
                sealing.seal()
            if path.exists():
                link(path, path.with_name(_PREVIOUS))
    except (OSError, RuntimeError) as err:  # torch's writer raises the latter on a full disk
        cause = (sealing.error if sealing else None) or err
        raise StoreError(
            f"{path}: the checkpoint cannot be written: {cause}; free or change the disk and run again"
        ) from cause


def state_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """blake3 of names and weights, in their order."""
    digest = blake3()
    for name, value in named:
        digest.update(name.encode())
        digest.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def disk_is_full(err: StoreError) -> bool:
    """Whether a checkpoint could not be written for want of room."""
    return isinstance(err.__cause__, OSError) and err.__cause__.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def load_checkpoint(path: Path, kind: str, *others: str) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU; no code from the file is run, and nothing larger than it is unpacked.

    It is of one `kind`, or of `others` that do as well.

    Raises: InputError when there is none or it is another kind of file; DamagedDataError when its bytes were changed or
    it cannot be read whole.
    """
    command = f"dtpipe {kind.replace('_', '-')}"
    remedy = _remedy(path, command)
    try:
        _check_bytes(path, remedy)
        state = _in_todays_form(torch.load(path, map_location="cpu", weights_only=True))
    except FileNotFoundError as err:
        raise InputError(
            f"{path}: no checkpoint here; give the --out folder of {command}, its last.pt or an export"
        ) from err
    except _UNREADABLE as err:
        raise DamagedDataError(f"{path}: the checkpoint cannot be read: {_reason(err)}; {remedy}") from err
    if state.get("format") != CHECKPOINT_FORMAT or state.get("kind") not in (kind, *others):
        raise InputError(
            f"{path}: not a checkpoint of {command} ({CHECKPOINT_FORMAT}){_other_kind(state)}; "
            "give its --out folder, last.pt or an export"
        )
    return state


def _other_kind(state: Mapping[str, Any]) -> str:
    """What else it is, of those that dtpipe writes."""
    if state.get("format") != CHECKPOINT_FORMAT:
        return ""
    if state["kind"] == "eval":
        return " but of a backbone tuned with its head, which `dtpipe export --head` takes"
    return f" but of dtpipe {str(state['kind']).replace('_', '-')}"


def _check_bytes(path: Path, remedy: str) -> None:
    """See that a file is what torch.save wrote: by its seal or, without one, by the checksums of the zip archive.

    torch packs nothing, so that what is in an archive is no larger than the file; one that says otherwise is refused
    before any of it is unpacked.
    """
    sealed = is_sealed(path, remedy)
    with zipfile.ZipFile(path) as archive:
        members, size = archive.infolist(), path.stat().st_size
        unpacked = sum(member.file_size for member in members)
        if unpacked > size or any(member.compress_type != zipfile.ZIP_STORED for member in members):
            raise DamagedDataError(
                f"{path}: is a packed archive of {unpacked} bytes in a file of {size}, and a checkpoint is stored "
                f"unpacked; {remedy}"
            )
        for member in members:
            if member.filename.endswith("data.pkl"):
                with archive.open(member) as pickled:
                    check_pickle(pickled, path, Refusal(DamagedDataError, remedy))
        if not sealed and (bad := archive.testzip()) is not None:
            raise DamagedDataError(f"{path}: its part {bad} does not match its checksum; {remedy}")


def _remedy(path: Path, command: str) -> str:
    """What to do about a damaged checkpoint."""
    earlier = [other.name for other in earlier_checkpoints(path) if other != path]
    if path.name == "last.pt" and earlier:
        return f"run {command} again, which goes on from {earlier[0]}, or give another checkpoint"
    return "use another checkpoint, or train again"


def earlier_checkpoints(last: Path) -> Sequence[Path]:
    """The other checkpoints of a run, newest first."""
    others = [last.with_name(_PREVIOUS), *(last.parent / _EPOCHS).glob("epoch-*.pt")]
    return sorted(filter(Path.is_file, others), key=lambda path: path.stat().st_mtime_ns, reverse=True)


def _reason(err: Exception) -> str:
    """Why a file cannot be read, without torch's advice to run what lies in it."""
    if isinstance(err, pickle.UnpicklingError | zipfile.BadZipFile):
        return "it is not a file of tensors and plain values, as torch.save writes it"
    return str(err)


def _in_todays_form(content: Any) -> dict[str, Any]:
    """Checkpoints of every format there was; empty for another kind of file."""
    if not isinstance(content, dict):
        return {}
    if content.get("format") == "dtpipe-run/1":  # distill's; the step stood beside the numbers of the schedule
        step = content.get("scheduler", {}).get("step")
        return content | {"format": CHECKPOINT_FORMAT, "kind": "distill", "scaler": None, "step": step, "flips": None}
    if "format" not in content and isinstance(
        content.get("config"), str
    ):  # train-teacher's; the settings were JSON text
        first: dict[str, Any] = {"classes": [], "scaler": None, "started_from": None}
        later = {"format": CHECKPOINT_FORMAT, "kind": "train_teacher", "config": json.loads(content["config"])}
        return first | content | later
    if content.get("kind") == "distill":  # which did not say whether images were flipped
        return {"flips": None} | content
    return content


def keep_epoch(last: Path, epoch: int, num_kept: int) -> None:
    """Keep `last` as the checkpoint of an epoch's end, and drop the oldest beyond `num_kept`."""
    if num_kept > 0:
        link(last, last.parent / _EPOCHS / f"epoch-{epoch:05d}.pt", ".epoch.tmp")
    drop_epochs(last, num_kept)


def drop_epochs(last: Path, num_kept: int) -> bool:
    """Delete the oldest ends of epochs beyond `num_kept`; True if there was one."""
    old = sorted((last.parent / _EPOCHS).glob("epoch-*.pt"))[: -num_kept or None]
    for path in old:
        path.unlink()
    return bool(old)


def drop_previous(last: Path) -> bool:
    """Delete the checkpoint before the last; True if there was one."""
    previous = last.with_name(_PREVIOUS)
    there = previous.exists()
    previous.unlink(missing_ok=True)
    return there


def link(path: Path, name: Path, temporary: str | None = None) -> None:
    """Give a checkpoint another name, in place of what has it."""
    with whole_file(name, temporary) as linked:
        try:
            os.link(path, linked)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, linked)
