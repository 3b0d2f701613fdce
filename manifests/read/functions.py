"""C functions of libraries that this process has, for compiled code: of libzstd and libcrc32c, which the packages
numcodecs and google-crc32c bring with them, and of the C library.

One rule: a function is looked for where these packages put it, and nothing is downloaded, built or configured.
"""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

SYMBOL_PREFIX = "dtpipe_"  # of the names that they are registered under
_FUNCTIONS = (
    "crc32c_extend",
    "ZSTD_createDCtx",
    "ZSTD_freeDCtx",
    "ZSTD_decompressDCtx",
    "preadv",
    "memcpy",
    "memcmp",
)


def register_functions() -> bool:
    """Make the functions known to compiled code; False where one is missing, or numbers have another byte order."""
    functions = _find_functions()
    if functions is None or sys.byteorder != "little":
        return False
    from llvmlite import binding

    for name, address in functions.items():
        binding.add_symbol(SYMBOL_PREFIX + name, address)
    return True


def _find_functions() -> dict[str, int] | None:
    """Addresses of the C functions; None where one is missing."""
    libraries = [library for library in map(_load, (*_library_files(), None)) if library is not None]
    functions = {}
    for name in _FUNCTIONS:
        holder = next((library for library in libraries if hasattr(library, name)), None)
        if holder is None:
            return None
        functions[name] = ctypes.cast(getattr(holder, name), ctypes.c_void_p).value or 0
    return functions


def _library_files() -> list[str]:
    import google_crc32c
    import numcodecs.zstd

    package = Path(google_crc32c.__file__).parent
    beside = [package.parent / "google_crc32c.libs", package / ".dylibs"]
    return [numcodecs.zstd.__file__, *(str(file) for folder in beside for file in sorted(folder.glob("libcrc32c*")))]


def _load(file: str | None) -> Any:
    """A library; None where it cannot be loaded. Without a file: what this process has loaded."""
    try:
        return ctypes.CDLL(file)
    except OSError:
        return None
