"""A look at a pickle before a library reads it: for what no tensors need and would end or fill the process.

Nothing in it is run. Libraries that make only what they know still hash a key of tuples within tuples until the stack
is full, and make a byte array of any size that is asked for.
"""

from __future__ import annotations

import pickletools
from contextlib import suppress
from typing import IO, Any

from dtpipe.manifests.documents import Refusal

_MOST_NESTED = 16  # tuples within each other
_TUPLES = {"EMPTY_TUPLE": 0, "TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}
_BYTE_ARRAYS = ("bytearray", "builtins bytearray", "__builtin__ bytearray")


def check_pickle(file: IO[bytes], where: object, refusal: Refusal, count: int = 1) -> None:
    """See that `count` pickles in a row nest no tuples without end and make no byte array; their readers find other
    damage.

    Raises: the refusal.
    """
    with suppress(ValueError, IndexError, KeyError, TypeError, OverflowError, MemoryError):
        for _ in range(count):
            if problem := _problem(file):
                raise refusal.of(where, f"holds a pickle that {problem}, which no tensors need; nothing in it was run")


def _problem(file: IO[bytes]) -> str | None:
    """The machine's stack, with the depth of tuples in place of each value; marks are None."""
    stack: list[int | None] = []
    memo: dict[int, int] = {}
    argument: Any
    for opcode, argument, _ in pickletools.genops(file):
        name = opcode.name
        if name == "BYTEARRAY8" or argument in _BYTE_ARRAYS:
            return "asks for a byte array"
        if name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            memo[len(memo) if name == "MEMOIZE" else argument] = stack[-1] or 0
        elif name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[int(argument)])
        elif name in _TUPLES or name == "TUPLE":
            stack.append(1 + max(_popped(stack, _TUPLES.get(name)), default=0))
            if (stack[-1] or 0) > _MOST_NESTED:
                return f"nests more than {_MOST_NESTED} tuples"
        else:
            _apply(stack, opcode)
    return None


def _apply(stack: list[int | None], opcode: Any) -> None:
    """Any other opcode: a value that it makes is no tuple."""
    if opcode.name == "MARK":
        stack.append(None)
        return
    if opcode.name == "DUP":
        stack.append(stack[-1])
        return
    before = opcode.stack_before
    if pickletools.markobject in before:
        _popped(stack, None)
        before = before[: before.index(pickletools.markobject)]
    elif opcode.name == "POP":
        before = [None]
    _popped(stack, len(before))
    stack.extend(0 for _ in opcode.stack_after)


def _popped(stack: list[int | None], num: int | None) -> list[int]:
    """The last values, as many as are named or those after the last mark."""
    if num is None:
        num = next((idx for idx, depth in enumerate(reversed(stack)) if depth is None), None)
        if num is None:
            raise IndexError("has no mark")
        values = stack[len(stack) - num :]
        del stack[len(stack) - num - 1 :]
    else:
        if num > len(stack):
            raise IndexError("takes more than there is")
        values = stack[len(stack) - num :]
        del stack[len(stack) - num :]
    return [depth or 0 for depth in values]
