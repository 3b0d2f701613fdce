"""Weights as published: tensors only, never code.

safetensors files, or torch files through `weights_only`. The digest is of the tensors, so it does not change when
the same weights are stored in another layout.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from dtpipe.manifests.documents import Refusal, read_object
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from torch import Tensor, nn


def weights_digest(tensors: Mapping[str, Tensor]) -> str:
    """blake3 over the tensors in the order of their names: name, dtype, shape, bytes (little-endian, row-major)."""
    import torch

    digest = blake3()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        dtype = str(tensor.dtype).removeprefix("torch.")
        digest.update(f"{name}\0{dtype}\0{list(tensor.shape)}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_weights(path: Path) -> dict[str, Tensor]:
    """All tensors of one .safetensors file, or of a torch file (.bin, .pt, .pth, .ckpt), on the CPU.

    Raises: TeacherError when the file is damaged, or holds anything but tensors.
    """
    import torch
    from safetensors.torch import load_file

    try:
        with warnings.catch_warnings(action="ignore"):  # of pickle protocols; what matters is an error
            content = (
                load_file(path)
                if path.suffix == ".safetensors"
                else torch.load(path, map_location="cpu", weights_only=True)
            )
    except Exception as err:  # both libraries raise many types for a damaged file
        raise TeacherError(
            f"{path}: not readable as weights ({why_unreadable(err)}); download or export the teacher again"
        ) from err
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise TeacherError(
            f"{path}: holds other things than named tensors; give a plain state_dict or safetensors file"
        )
    return dict(content)


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises: TeacherError when the file is missing or is something else.
    """
    return read_object(path, Refusal(TeacherError, "download or export the teacher again"))


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put weights into a network; every name and shape must fit.

    Raises: TeacherError that names the first tensors that do not.
    """
    check_fit(tensors, {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}, where)
    network.load_state_dict({name: value.float() for name, value in tensors.items()})


def check_fit(tensors: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], where: Path) -> None:
    """Every name and shape must be the network's, every value finite.

    Raises: TeacherError that names the first tensors that do not fit.
    """
    problems = name_problems(tensors, shapes)
    for name in sorted(shapes.keys() & tensors.keys()):
        tensor = tensors[name]
        if tuple(tensor.shape) != shapes[name]:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, the network asks for {shapes[name]}")
        elif not tensor.is_floating_point() or not bool(tensor.isfinite().all()):
            problems.append(f"{name} holds values that are not finite floats")
    raise_unfit(problems, where)


def name_problems(tensors: Iterable[str], network: Iterable[str]) -> list[str]:
    """Which of a network's tensors a file lacks, and which it has beside them, a clause each."""
    names, expected = set(tensors), set(network)
    missing = [f"{name} is missing" for name in sorted(expected - names)]
    return missing + [f"{name} is unexpected" for name in sorted(names - expected)]


def raise_unfit(problems: Sequence[str], where: Path) -> None:
    """Raises: TeacherError naming the first of the problems, if there are any."""
    if problems:
        more = f" and {len(problems) - 3} more" if len(problems) > 3 else ""
        raise TeacherError(
            f"{where}: weights do not fit their network: {'; '.join(problems[:3])}{more}; "
            f"use files of one checkpoint, or download it again"
        )


def why_unreadable(err: Exception) -> str:
    """What a library says of a file that it could not read, in a few words."""
    text = str(err).strip() or type(err).__name__
    if isinstance(err, (FileNotFoundError, NotADirectoryError)):
        return "there is no such file"
    if text.startswith("Weights only load failed"):  # torch goes on about how to run what is in the file
        return "it holds other things than tensors, none of which was run"
    if isinstance(err, EOFError) or text.startswith("PytorchStreamReader failed"):  # torch's zip archive
        return "it is cut off or damaged"
    return text.splitlines()[0][:160]
