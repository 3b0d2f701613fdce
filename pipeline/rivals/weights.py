"""Files of weights that other projects publish, read without running anything in them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from dtpipe.extract.teachers.files.pickle import NUMPY_NAMES, Record, numpy_array, read_pickle
from dtpipe.extract.teachers.files.refusals import unreadable_file
from dtpipe.extract.teachers.files.torch_files import load_torch
from dtpipe.manifests.documents import what_lies_at
from dtpipe.manifests.errors import InputError

_ENDINGS = (".safetensors", ".pth", ".pt", ".bin", ".ckpt", ".tar", ".pkl")
_AGAIN = "download the file again"


def read_weights_file(path: Path) -> Mapping[str, Any]:
    """What a file holds: tensors by name, maybe in dictionaries inside one another, beside other things.

    safetensors, torch files (their pickle makes nothing but tensors, plain values and argparse's Namespace), and
    detectron2's pickles of arrays.
    Raises: InputError when it is missing, damaged, holds what weights do not need, or is another kind of file.
    """
    if not path.is_file():
        raise InputError(f"{path}: {what_lies_at(path) or 'there is no such file'}; give a file of weights")
    if path.suffix not in _ENDINGS:
        raise InputError(f"{path}: weights are read from files named {', '.join(_ENDINGS)}; rename it if it is one")
    content = _CONTENTS.get(path.suffix, _torch)(path)
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__} in place of tensors by name; save a state_dict")
    return content


def _torch(path: Path) -> object:
    return load_torch(path, [argparse.Namespace], advice=_AGAIN)


def _safetensors(path: Path) -> object:
    try:
        return load_file(path)
    except Exception as err:  # the library raises many types for a damaged file
        raise unreadable_file(path, err, "weights", _AGAIN) from err


def _pickle(path: Path) -> object:
    return _as_tensors(read_pickle(path, NUMPY_NAMES), str(path))


def _as_tensors(value: object, where: str) -> object:
    """The same with tensors in place of arrays."""
    import torch

    if isinstance(value, Mapping):
        return {name: _as_tensors(inner, where) for name, inner in value.items()}
    return torch.from_numpy(numpy_array(value, where)) if isinstance(value, Record) else value


_CONTENTS = {".safetensors": _safetensors, ".pkl": _pickle}
