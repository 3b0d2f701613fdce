"""Weights as published: tensors only, never code.

safetensors files, or torch files through `weights_only`. The digest is of the tensors, so it does not change when
the same weights are stored in another layout.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blake3 import blake3

from dtpipe.extract.teachers.files.names import plain_names
from dtpipe.extract.teachers.files.refusals import disguise_of, unreadable_file
from dtpipe.extract.teachers.files.torch_files import load_torch, stored_tensors, unwrapped
from dtpipe.manifests.documents import Refusal, read_object
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from torch import Tensor, nn


_ANSWER = {"error", "errors", "message", "detail", "status", "code", "documentation_url"}  # and no settings


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


def read_weights(path: Path, network: Collection[str] = ()) -> dict[str, Tensor]:
    """All tensors of a .safetensors file or a torch file (.bin, .pt, .pth, .ckpt), or of an index of shards (.json).

    They are on the CPU, under their network's own names: words that training wraps around it are taken away, as far as
    `network`, names that are known, does not have them.
    Raises: TeacherError when a file is missing or damaged, or holds anything but tensors.
    """
    files: Mapping[Path, Iterable[str] | None] = shard_files(path) if path.suffix == ".json" else {path: None}
    stored: dict[str, Tensor] = {}
    for file, names in files.items():
        tensors = stored_tensors(_content(file), file)
        raise_unfit(name_problems(tensors, names or tensors), file)
        stored |= tensors
    return unwrapped(stored, path, network)


def _content(path: Path) -> object:
    from safetensors.torch import load_file

    if path.suffix != ".safetensors":
        return load_torch(path)
    try:
        return load_file(path)
    except Exception as err:  # the library raises many types for a damaged file
        raise unreadable_file(path, err, "weights") from err


def shard_files(index: Path) -> dict[Path, list[str]]:
    """The files that an index of shards names, each with its tensors' stored names.

    Raises: TeacherError when the index is damaged, or a file is not there.
    """
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not places or not all(isinstance(file, str) for file in places.values()):
        raise TeacherError(f"{index}: has no weight_map of tensors to files; download or export the teacher again")
    shards: dict[Path, list[str]] = {}
    for name, file in places.items():
        if file != Path(file).name or file in ("", ".."):
            raise TeacherError(
                f"{index}: puts {name[:80]} into {file[:80]!r}, which is no file beside it; use another copy"
            )
        shards.setdefault(index.with_name(file), []).append(name)
    there = {file.name for file in index.parent.iterdir()}
    if missing := [file.name for file in shards if file.name not in there]:
        raise TeacherError(
            f"{index}: {len(missing)} of {len(shards)} files that it names are not there ({missing[0][:80]!r}); "
            f"download the teacher again"
        )
    return shards


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object.

    Raises: TeacherError when the file is missing or is something else.
    """
    if (disguise := disguise_of(path, text=True)) is not None:
        raise TeacherError(f"{path}: {disguise}")
    content = read_object(path, Refusal(TeacherError, "download or export the teacher again"))
    if content and content.keys() <= _ANSWER:
        said = " ".join(str(content).split())[:80]
        raise TeacherError(f"{path}: is an answer of a server ({said}), not the file itself; download the file itself")
    return content


def load_strictly(network: nn.Module, tensors: Mapping[str, Tensor], where: Path) -> None:
    """Put weights into a network; every name and shape must fit. Its own memory is made then where it has none yet.

    Raises: TeacherError that names the first tensors that do not.
    """
    import torch

    shapes = {name: tuple(tensor.shape) for name, tensor in network.state_dict().items()}
    own = {plain: name for name, plain in plain_names(shapes).items()}  # a network may have words of wrappers itself
    names = {name: name if name in shapes else own.get(name, name) for name in tensors}
    fitting = {names[name]: _as_scalar(tensor, shapes.get(names[name])) for name, tensor in tensors.items()}
    check_fit(fitting, shapes, where)
    empty = any(parameter.is_meta for parameter in network.parameters())
    values = {name: tensor.to(torch.float32, copy=empty).contiguous() for name, tensor in fitting.items()}
    network.load_state_dict(values, assign=empty)


def _as_scalar(tensor: Tensor, shape: tuple[int, ...] | None) -> Tensor:
    """A vector of one number where the network has a scalar, as torch's own loader takes it."""
    return tensor.reshape(()) if shape == () and tuple(tensor.shape) == (1,) else tensor


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
