"""Loops over single values, compiled by numba: they run at the speed of C, outside Python's lock.

One rule: a module of such loops is imported where one of them is needed and not before, for numba takes half a second.
"""

from __future__ import annotations

from collections.abc import Callable

import numba

Loop = Callable[..., None]


def compiled(signature: str) -> Callable[[Loop], Loop]:
    """Compiled for one signature when its module is imported; kept on disk for later imports, where that can be
    written."""

    def compile_it(loop: Loop) -> Loop:
        try:
            return numba.njit(signature, nogil=True, cache=True)(loop)
        except RuntimeError:  # numba finds no folder for compiled code
            return numba.njit(signature, nogil=True)(loop)

    return compile_it
