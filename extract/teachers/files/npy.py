"""Arrays in `.npy` files, without running anything in them.

numpy saves a dict as an object array without sides, which is a pickle behind a header; `numpy.load` would run it.
IC-GAN's stored instances are such files.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.lib import format as npy

from dtpipe.extract.teachers.files.pickle import NUMPY_NAMES, Record, numpy_array, read_pickles
from dtpipe.extract.teachers.files.refusals import unreadable_file
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from numpy.typing import NDArray


_HEADERS = {(1, 0): npy.read_array_header_1_0, (2, 0): npy.read_array_header_2_0}


def read_arrays(path: Path, names: tuple[str, ...]) -> dict[str, NDArray[Any]]:
    """The arrays of a saved dict that have these names, as far as it has them; a saved array has the first name.

    Raises: TeacherError when the file is missing, damaged, or its pickle asks for anything but arrays and plain values.
    """
    try:
        with path.open("rb") as file:
            shape, _, dtype = _HEADERS[npy.read_magic(file)](file)
            pickled = file.read() if dtype.hasobject else b""
        if not dtype.hasobject:
            mapped = np.load(path, mmap_mode="r", allow_pickle=False)  # so that a false size allocates nothing
            return {names[0]: np.array(mapped)}
    except Exception as err:  # numpy raises many types for a damaged header
        raise unreadable_file(path, err, "a .npy file", "download it again") from err
    if shape != ():
        raise TeacherError(f"{path}: is an array of objects; save an array of numbers, or a dict of such arrays")
    content = _saved_dict(pickled, str(path))
    return {name: _array(content[name], f"{path}: {name}") for name in names if name in content}


def _saved_dict(pickled: bytes, where: str) -> dict[Any, Any]:
    (outer,), _ = read_pickles(pickled, 1, NUMPY_NAMES, where)
    state = outer.state if isinstance(outer, Record) else None
    items = state[-1] if isinstance(state, tuple) and state else None
    if not isinstance(items, list) or len(items) != 1 or not isinstance(items[0], dict):
        raise TeacherError(f"{where}: holds no dict of arrays; save numpy.array of numbers, or a dict of such arrays")
    return items[0]


def _array(value: object, where: str) -> NDArray[Any]:
    """A numpy array, or a list of numbers as one."""
    if not isinstance(value, list):
        return numpy_array(value, where)
    items = [numpy_array(item, where).item() if isinstance(item, Record) else item for item in value]
    if not all(isinstance(item, (int, float)) for item in items):
        raise TeacherError(f"{where}: is a list of other things than numbers; save an array of numbers")
    return np.array(items)
