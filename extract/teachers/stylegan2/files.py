"""Files that hold a StyleGAN2 generator: NVIDIA's `.pkl` snapshots, those of TensorFlow, and rosinality's `.pt`.

A `.pkl` carries the source text of its classes, which the authors' loader executes. Here it is data: only weights and
settings are taken, and no part of any file is run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.extract.teachers.files.pickle import (
    NUMPY_NAMES,
    PERSISTENT_ID,
    Record,
    Symbol,
    read_pickle,
    read_pickles,
    shown,
)
from dtpipe.extract.teachers.files.refusals import no_file
from dtpipe.extract.teachers.files.torch_files import load_torch, stored_tensors, unwrapped
from dtpipe.extract.teachers.stylegan2.keys import find_layout, from_rosinality, used_tensors
from dtpipe.extract.teachers.stylegan2.settings import NvidiaModule, read_settings
from dtpipe.extract.teachers.stylegan2.tensorflow import NETWORK, tensorflow_generator
from dtpipe.manifests.errors import ConfigError, TeacherError

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout

MODULE = "torch_utils.persistence._reconstruct_persistent_obj"
PARAMETER = "torch._utils._rebuild_parameter"
TENSOR = "torch._utils._rebuild_tensor_v2"
STORAGE = "torch.storage._load_from_bytes"
NAMES = frozenset(
    {MODULE, PARAMETER, TENSOR, STORAGE, NETWORK, "collections.OrderedDict", "dnnlib.util.EasyDict", "builtins.set"}
    | NUMPY_NAMES
)
STORAGES = {
    "torch.FloatStorage": "float32",
    "torch.HalfStorage": "float16",
    "torch.BFloat16Storage": "bfloat16",
    "torch.DoubleStorage": "float64",
    "torch.LongStorage": "int64",
    "torch.IntStorage": "int32",
    "torch.BoolStorage": "bool",
}
_STORAGE_HEADER = 5  # pickles before a storage's numbers: magic number, version, system, the storage, its keys


def read_checkpoint(
    path: Path, ema: bool, lr_mlp: float | None = None, ignored: Collection[str] = ()
) -> tuple[dict[str, Tensor], StyleGan2Layout]:
    """A generator's tensors under NVIDIA's names, on the CPU: the averaged ones (`ema`) or those of the last step.

    `lr_mlp` is the mapping's learning rate where the file does not tell it, 0.01 by default; `ignored` as for
    `read_settings`.
    Raises: TeacherError when the file is missing, damaged, unsafe, or holds something else; ConfigError for an lr_mlp
    beside the file's own.
    """
    if not path.is_file():
        raise no_file(path, "StyleGAN2")
    if path.suffix != ".pkl":
        return _read_torch(path, ema, 0.01 if lr_mlp is None else lr_mlp)
    if lr_mlp is not None:
        raise ConfigError(f"{path}: tells the mapping's learning rate; leave out extract.teacher.options.lr_mlp")
    return _read_pkl(path, ema, ignored)


def _read_torch(path: Path, ema: bool, lr_mlp: float) -> tuple[dict[str, Tensor], StyleGan2Layout]:
    content = load_torch(path, [argparse.Namespace], mapped=True)  # a training checkpoint's flags
    name = "g_ema" if ema else "g"
    generator = content.get(name) if isinstance(content, dict) else None
    if not isinstance(generator, dict) or not generator:
        raise TeacherError(
            f"{path}: holds no state dict {name!r}, as rosinality/stylegan2-pytorch saves it; "
            f"give one of its checkpoints"
        )
    stored = unwrapped(stored_tensors(generator, path), path)
    if "iwt.ll" in stored:
        raise TeacherError(f"{path}: is a SWAGAN, which makes wavelets; kind stylegan2 reads --arch stylegan2")
    if "latent_avg" in content:
        stored |= stored_tensors({"latent_avg": content["latent_avg"]}, path)
    tensors = from_rosinality(stored)
    return tensors, find_layout(tensors, str(path), None, lr_mlp, scaled_epsilon=True)


def _read_pkl(path: Path, ema: bool, ignored: Collection[str]) -> tuple[dict[str, Tensor], StyleGan2Layout]:
    content = read_pickle(path, NAMES)
    if (
        isinstance(content, tuple)
        and len(content) == 3
        and all(isinstance(record, Record) and record.name == NETWORK for record in content)
    ):
        tensors, conv_clamp, mapping_lr = tensorflow_generator(content[2 if ema else 0], str(path))
        return tensors, find_layout(tensors, str(path), conv_clamp, mapping_lr, scaled_epsilon=False)
    name = "G_ema" if ema else "G"
    network = content.get(name) if isinstance(content, dict) else None
    modules = list(_modules(network, str(path))) if isinstance(network, Record) else []
    if not modules or modules[0].class_name != "Generator":
        other = f" (it is a {modules[0].class_name[:40]})" if modules else ""
        raise TeacherError(
            f"{path}: holds no network {name!r} of NVlabs/stylegan2-ada-pytorch{other}; give one of its network "
            f"snapshots"
        )
    tensors = used_tensors(stored_tensors(dict(_tensors(modules, str(path))), path))
    settings = read_settings(
        modules, {name: tuple(tensor.shape) for name, tensor in tensors.items()}, ignored, str(path)
    )
    return tensors, find_layout(tensors, str(path), settings.conv_clamp, settings.mapping_lr, scaled_epsilon=False)


def _modules(network: Record, where: str) -> Iterator[NvidiaModule]:
    """A network and all inside it.

    Raises: TeacherError when a part is no module, or contains itself.
    """
    waiting, seen = [("", network)], set()
    while waiting:
        path, record = waiting.pop()
        meta = record.args[0] if isinstance(record, Record) and record.name == MODULE and len(record.args) == 1 else {}
        state = meta.get("state") if isinstance(meta, dict) else None
        if not isinstance(state, dict) or any(
            not isinstance(state.get(kind), dict) for kind in ("_parameters", "_buffers", "_modules")
        ):
            raise TeacherError(
                f"{where}: {path or 'the network'} is no module as persistence of NVlabs saves it; download it again"
            )
        if id(record) in seen:
            raise TeacherError(
                f"{where}: {path} is in the network twice; give a network snapshot as its authors publish it"
            )
        seen.add(id(record))
        class_name = meta.get("class_name")
        yield NvidiaModule(path, class_name if isinstance(class_name, str) else "", state)
        waiting += [
            (f"{path}.{name}".lstrip("."), part) for name, part in state["_modules"].items() if part is not None
        ]


def _tensors(modules: list[NvidiaModule], where: str) -> Iterator[tuple[str, Tensor]]:
    storages: dict[int, Tensor] = {}
    for module in modules:
        for name, value in (*module.state["_parameters"].items(), *module.state["_buffers"].items()):
            if value is not None:
                full_name = f"{module.path}.{name}".lstrip(".")
                yield full_name, _tensor(value, f"{where}: {full_name}", storages)


def _tensor(record: object, where: str, storages: dict[int, Tensor]) -> Tensor:
    """The tensor that a `Record` describes; each storage is copied out of the file once, into `storages`.

    Raises: TeacherError when it is something else, or reaches beyond its storage.
    """
    try:
        if isinstance(record, Record) and record.name == PARAMETER:
            record = record.args[0]
        if not isinstance(record, Record) or record.name != TENSOR:
            raise TypeError(f"a {type(record).__name__}")
        storage, offset, size, stride = record.args[:4]
        if storage.name != STORAGE:
            raise TypeError(f"a {storage.name}")
        if id(storage) not in storages:
            storages[id(storage)] = _storage(storage.args[0], where)
        numbers = storages[id(storage)]
        if math.prod(size) > len(numbers):
            raise ValueError(f"more values than the {len(numbers)} of its storage")
        return numbers.as_strided(size, stride, offset)
    except (TypeError, ValueError, AttributeError, IndexError, OverflowError, RuntimeError) as err:
        reason = str(err).splitlines()[0][:120]
        raise TeacherError(f"{where}: is no tensor of numbers ({reason}); download the checkpoint again") from err


def _storage(data: bytes | memoryview, where: str) -> Tensor:
    """The numbers of one storage in torch's format before 1.6. Shapes: -> (N,)."""
    import torch

    header, rest = read_pickles(data, _STORAGE_HEADER, frozenset(STORAGES), where, persistent_ids=True)
    reference: tuple[Any, ...] = (
        header[3].args[0] if isinstance(header[3], Record) and header[3].name == PERSISTENT_ID else ()
    )
    kind = reference[1] if len(reference) == 6 and reference[0] == "storage" and reference[5] is None else None
    if not isinstance(kind, Symbol):
        raise TypeError("no storage of torch")
    dtype = getattr(torch, STORAGES[kind.name])
    count = int.from_bytes(rest[:8], "little")
    size_bytes = count * dtype.itemsize
    if count != reference[4] or len(rest) != 8 + size_bytes:
        raise ValueError(f"{len(rest) - 8} bytes for {shown(reference[4])} numbers")
    return torch.frombuffer(bytearray(rest[8:]), dtype=dtype) if count else torch.empty(0, dtype=dtype)
