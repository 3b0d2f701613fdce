"""Files that torch wrote: read without running anything in them, and within memory that follows from their size.

torch stores tensors unpacked, so a file takes about as much memory as it has bytes. A file that was packed, or whose
tensors repeat one number, can claim any amount: such a one is refused before it is unpacked.
"""

from __future__ import annotations

import warnings
import zipfile
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.extract.teachers.files.names import plain_names
from dtpipe.extract.teachers.files.refusals import unreadable_file
from dtpipe.manifests.documents import Refusal
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.records.pickles import check_pickle

if TYPE_CHECKING:
    from torch import Tensor

MOST_TIMES = 4  # weights are close to noise: packing saves a tenth of them
SPARE_BYTES = 1 << 26  # of small files, which may hold many zeros


def load_torch(
    path: Path, classes: Sequence[Any] = (), mapped: bool = False, advice: str = "download or export the teacher again"
) -> Any:
    """The content of a torch file on the CPU; `mapped`: its tensors stay in the file where its format allows.

    `classes` are those that may be made beside tensors and plain values; `advice` ends the message of damage.
    Raises: TeacherError when it is missing, damaged, holds other things, or unpacks to more than `most_bytes`.
    """
    import torch

    stored_plainly = _check_archive(path)
    _check_pickles(path)
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals(list(classes)):
            return torch.load(path, map_location="cpu", mmap=mapped and stored_plainly, weights_only=True)
    except Exception as err:  # torch raises many types for a damaged file
        raise unreadable_file(path, err, "weights", advice) from err


def most_bytes(path: Path) -> int:
    """The most memory that the content of a file may take."""
    return max(SPARE_BYTES, MOST_TIMES * path.stat().st_size)


def unwrapped(tensors: Mapping[str, Tensor], path: Path, network: Collection[str] = ()) -> dict[str, Tensor]:
    """A state_dict under its network's own names, without words of training wrappers; `network` as for `plain_names`.

    Raises: TeacherError when two stored names stand for one.
    """
    unwrapped: dict[str, Tensor] = {}
    for stored, name in plain_names(tensors, network).items():
        if name in unwrapped:
            raise TeacherError(f"{path}: holds {name} twice, once as {stored}; save the weights again")
        unwrapped[name] = tensors[stored]
    return unwrapped


def stored_tensors(content: object, path: Path) -> dict[str, Tensor]:
    """A state_dict under the names that it is stored with.

    Raises: TeacherError when it is something else, or has tensors without values of their own.
    """
    import torch

    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise TeacherError(
            f"{path}: holds other things than named tensors{_nested(content)}; "
            f"give a plain state_dict or safetensors file"
        )
    for name, tensor in content.items():
        if (odd := _not_dense(tensor)) is not None:
            raise TeacherError(f"{path}: {name} has {odd}; save the weights as dense tensors with their values")
    size_bytes = sum(tensor.numel() * tensor.element_size() for tensor in content.values())
    check_size(size_bytes, path, "its tensors repeat their values")
    return dict(content)


def _not_dense(tensor: Tensor) -> str | None:
    """What keeps a tensor from being an array of plain numbers."""
    import torch

    if tensor.layout != torch.strided:
        return f"a {tensor.layout} layout"
    if tensor.device.type != "cpu":
        return "values on no device"
    return "quantised values" if tensor.is_quantized else None


def _nested(content: object) -> str:
    """Which entries of a training checkpoint look like state_dicts."""
    from torch import Tensor

    parts = content.items() if isinstance(content, dict) else ()
    names = [
        str(name)
        for name, part in parts
        if isinstance(part, dict) and part and all(isinstance(value, Tensor) for value in part.values())
    ]
    return f" (its entries {', '.join(map(repr, names[:5]))} do: save one of them by itself)" if names else ""


def _check_archive(path: Path) -> bool:
    """Whether all members of a zip lie there as they are. Raises: TeacherError when they unpack to too much."""
    try:
        if not zipfile.is_zipfile(path):
            return False
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (OSError, ValueError, zipfile.BadZipFile):  # torch says what is wrong
        return False
    size_bytes = sum(member.file_size for member in members)
    check_size(size_bytes, path, "it was packed")
    return all(member.compress_type == zipfile.ZIP_STORED for member in members)


def _check_pickles(path: Path) -> None:
    """Look for what would end or fill the process. Raises: TeacherError."""
    refusal = Refusal(TeacherError, "get the file from its authors, or save it again where you trust it")
    with suppress(OSError, ValueError, zipfile.BadZipFile, RuntimeError):  # torch says what is wrong
        if not zipfile.is_zipfile(path):
            with path.open("rb") as file:  # of torch's old format: version, protocol, machine, content, keys
                check_pickle(file, path, refusal, 5)
            return
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.endswith("data.pkl"):
                    with archive.open(member) as pickled:
                        check_pickle(pickled, path, refusal)


def check_size(size_bytes: int, path: Path, why: str) -> None:
    """Raises: TeacherError when what a file holds, or claims to hold, takes more memory than `most_bytes`."""
    if size_bytes > most_bytes(path):
        raise TeacherError(
            f"{path}: has {path.stat().st_size:,} bytes and claims {size_bytes:,} in memory ({why}); "
            f"at most {most_bytes(path):,} are read from it, {MOST_TIMES} times its size or {SPARE_BYTES >> 20} MiB; "
            f"get it from its authors, or save it again where you trust it"
        )
