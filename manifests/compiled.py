"""Loops over single values, compiled by numba: they run at the speed of C, outside Python's lock.

One rule: a module of such loops is imported where one of them is needed and not before, for numba takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba


def compiled(signature: str | None = None) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Compiled for a signature when its module is imported, or when first called; kept on disk where that can be
    written."""

    def compile_it(function: Callable[..., Any]) -> Callable[..., Any]:
        try:
            return numba.njit(signature, nogil=True, cache=True)(function)
        except RuntimeError:  # no folder for compiled code
            return numba.njit(signature, nogil=True)(function)

    return compile_it
