"""Read pickles of others without running anything in them.

A pickle is a program for a small machine. Here is that machine without the part that calls: names become `Symbol`s,
calls become `Record`s of what would have been called and with what, and only plain values and containers are built.
Nothing is imported, no attribute is read, and no function of the file's choosing runs.
"""

from __future__ import annotations

import mmap
import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from dtpipe.extract.teachers.files.refusals import disguise_of
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Buffer = bytes | memoryview

DICTS = frozenset({"collections.OrderedDict", "dnnlib.util.EasyDict"})
"""Classes that become a plain dict."""
NUMPY_NAMES = frozenset(
    {f"numpy.{core}.multiarray.{name}" for core in ("core", "_core") for name in ("scalar", "_reconstruct")}
    | {"numpy.dtype", "numpy.ndarray"}
)
"""What the pickle of an array mentions."""
PERSISTENT_ID = "persistent id"
MOST = 1e9
COPIED_BYTES = 4096  # longer byte strings stay views of the file
MOST_NESTED = 16  # tuples inside tuples: to hash or show deeper ones could overflow the stack
_KEYS = (str, int, float, type(None))
_DTYPES = frozenset({"f2", "f4", "f8", "i4", "i8"})
_DAMAGE = (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError, MemoryError)  # nonsense was read


@dataclass(frozen=True)
class Symbol:
    """A name that the pickle mentions, never looked up."""

    name: str


@dataclass(eq=False)
class Record:
    """An object as the pickle describes it: made by calling `name` with `args`, then given `state`."""

    name: str
    args: tuple[Any, ...]
    state: Any = None


def read_pickle(path: Path, allowed: frozenset[str]) -> Any:
    """The content of a pickle file; long byte strings are views of the file.

    `allowed` are full names of the classes and functions that may be mentioned.
    Raises: TeacherError when the file is missing, damaged, or uses other names or means than a checkpoint needs.
    """
    if (disguise := disguise_of(path)) is not None:
        raise TeacherError(f"{path}: {disguise}")
    try:
        with path.open("rb") as file:
            data = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    except (OSError, ValueError) as err:  # ValueError: an empty file
        raise TeacherError(f"{path}: cannot be read ({err}); give the path of a checkpoint") from err
    return read_pickles(data, 1, allowed, str(path))[0][0]


def read_pickles(
    data: Buffer, count: int, allowed: frozenset[str], where: str, persistent_ids: bool = False
) -> tuple[list[Any], Buffer]:
    """The contents of `count` pickles in a row, and the bytes after them.

    Raises: TeacherError as `read_pickle`.
    """
    view = _View(memoryview(data))
    try:
        return [_Machine(allowed, persistent_ids, where).run(view) for _ in range(count)], view.data[view.position :]
    except _DAMAGE as err:
        reason = (str(err) or type(err).__name__)[:120]
        raise TeacherError(f"{where}: is no whole pickle ({reason}); download the checkpoint again") from err


class _View:
    """A file over bytes in memory that cuts out long parts without a copy."""

    def __init__(self, data: memoryview) -> None:
        self.data = data
        self.position = 0

    def read(self, size: int) -> Buffer:
        part = self.data[self.position : self.position + size]
        self.position += len(part)
        return part if len(part) > COPIED_BYTES else bytes(part)

    def readline(self) -> bytes:
        part = bytes(self.data[self.position : self.position + COPIED_BYTES])
        line = part[: part.find(b"\n") + 1]
        self.position += len(line)
        return line

    def tell(self) -> int:
        return self.position


class _Machine:
    """The pickle machine's stack, marks and memo, for one pickle."""

    def __init__(self, allowed: frozenset[str], persistent_ids: bool, where: str) -> None:
        self.allowed = allowed
        self.persistent_ids = persistent_ids
        self.where = where
        self.stack: list[Any] = []
        self.outer: list[list[Any]] = []  # stacks below the marks
        self.memo: dict[int, Any] = {}

    def run(self, view: _View) -> Any:
        for opcode, argument, _ in pickletools.genops(cast(Any, view)):
            if opcode.name in _CONSTANTS:
                self.stack.append(_CONSTANTS[opcode.name])
            elif opcode.name in _NEW:
                self.stack.append(_NEW[opcode.name]())
            elif opcode.name in _GIVEN:
                self.stack.append(argument)
            elif opcode.name in _STEPS:
                _STEPS[opcode.name](self, argument)
            elif opcode.name not in _IGNORED:
                raise self.refusal(f"uses {opcode.name}")
        (result,) = self.stack
        return result

    def refusal(self, what: str) -> TeacherError:
        return TeacherError(
            f"{self.where}: the pickle {what[:160]}, which no checkpoint of this kind needs; nothing in it was run; "
            f"get the file from its authors, or convert it to safetensors where you trust it"
        )

    def mark(self, _: object) -> None:
        self.outer.append(self.stack)
        self.stack = []

    def popped_to_mark(self) -> list[Any]:
        items, self.stack = self.stack, self.outer.pop()
        return items

    def tuple_to_mark(self, _: object) -> None:
        self.push_tuple(tuple(self.popped_to_mark()))

    def tuple_of(self, size: int) -> None:
        items = tuple(self.stack.pop() for _ in range(size))
        self.push_tuple(items[::-1])

    def push_tuple(self, items: tuple[Any, ...]) -> None:
        level = [items]
        for _ in range(MOST_NESTED):
            level = list({id(inner): inner for outer in level for inner in outer if type(inner) is tuple}.values())
        if level:
            raise self.refusal(f"nests more than {MOST_NESTED} tuples")
        self.stack.append(items)

    def append(self, items: list[Any]) -> None:
        self.top(list).extend(items)

    def add_items(self, _: object) -> None:
        items = [self.key(item) for item in self.popped_to_mark()]
        self.top(set).update(items)

    def set_items(self, items: list[Any]) -> None:
        keys = [self.key(item) for item in items[::2]]
        self.top(dict).update(zip(keys, items[1::2], strict=True))

    def key(self, value: Any) -> Any:
        if not isinstance(value, _KEYS):
            raise self.refusal(f"has a {type(value).__name__} as a key")
        return value

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise self.refusal(f"fills a {type(self.stack[-1]).__name__} as if it were a {kind.__name__}")
        return self.stack[-1]

    def remember(self, index: int | None) -> None:
        self.memo[len(self.memo) if index is None else index] = self.stack[-1]

    def symbol(self, module: str, name: str) -> None:
        if "." in name or f"{module}.{name}" not in self.allowed:
            raise self.refusal(f"asks for {module}.{name}")
        self.stack.append(Symbol(f"{module}.{name}"))

    def stack_symbol(self, _: object) -> None:
        name, module = self.stack.pop(), self.stack.pop()
        if not isinstance(module, str) or not isinstance(name, str):
            raise self.refusal("asks for something without a name")
        self.symbol(module, name)

    def make(self, _: object) -> None:
        arguments, made_by = self.stack.pop(), self.stack.pop()
        if type(made_by) is not Symbol or type(arguments) is not tuple:
            raise self.refusal(f"calls a {type(made_by).__name__}")
        if made_by.name in DICTS and arguments:
            raise self.refusal(f"calls {made_by.name} with arguments")
        self.stack.append({} if made_by.name in DICTS else Record(made_by.name, arguments))

    def build(self, _: object) -> None:
        state, record = self.stack.pop(), self.stack[-1]
        if type(record) is not Record:
            raise self.refusal(f"sets the state of a {type(record).__name__}")
        record.state = state

    def persistent(self, _: object) -> None:
        if not self.persistent_ids:
            raise self.refusal("uses a persistent id")
        self.stack.append(Record(PERSISTENT_ID, (self.stack.pop(),)))


_IGNORED = frozenset({"PROTO", "FRAME", "STOP"})
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_NEW: dict[str, Callable[[], Any]] = {"EMPTY_TUPLE": tuple, "EMPTY_LIST": list, "EMPTY_DICT": dict, "EMPTY_SET": set}
_GIVEN = frozenset(
    {"BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"}
    | {"SHORT_BINBYTES", "BINBYTES", "BINBYTES8"}
)
_STEPS: dict[str, Callable[[_Machine, Any], object]] = {
    "MARK": _Machine.mark,
    "POP_MARK": lambda machine, _: machine.popped_to_mark(),
    "POP": lambda machine, _: machine.stack.pop(),
    "TUPLE": _Machine.tuple_to_mark,
    "TUPLE1": lambda machine, _: machine.tuple_of(1),
    "TUPLE2": lambda machine, _: machine.tuple_of(2),
    "TUPLE3": lambda machine, _: machine.tuple_of(3),
    "APPEND": lambda machine, _: machine.append([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.append(machine.popped_to_mark()),
    "SETITEM": lambda machine, _: machine.set_items([machine.stack.pop(), machine.stack.pop()][::-1]),
    "SETITEMS": lambda machine, _: machine.set_items(machine.popped_to_mark()),
    "ADDITEMS": _Machine.add_items,
    "MEMOIZE": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "LONG_BINGET": lambda machine, index: machine.stack.append(machine.memo[index]),
    "GLOBAL": lambda machine, names: machine.symbol(*names.split(" ", 1)),
    "STACK_GLOBAL": _Machine.stack_symbol,
    "REDUCE": _Machine.make,
    "NEWOBJ": _Machine.make,
    "BUILD": _Machine.build,
    "BINPERSID": _Machine.persistent,
}


def shown(value: object) -> str:
    """A value of the file in short, for a message; nested ones only by type, since they may be endless."""
    return repr(value)[:40] if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"


def is_size(value: object) -> bool:
    """True for a positive number of a size that settings have."""
    return isinstance(value, (int, float)) and 0 < value < MOST


def numpy_array(record: object, where: str) -> NDArray[np.generic]:
    """The array or scalar of numbers that a numpy `Record` describes, copied out of the file.

    Raises: TeacherError when it is something else, or its bytes do not fit its shape.
    """
    import numpy as np

    try:
        if not isinstance(record, Record):
            raise TypeError(f"a {type(record).__name__}")
        if record.name.endswith(".scalar"):
            dtype, data = record.args
            shape: tuple[int, ...] = ()
            fortran = False
        else:
            _, shape, dtype, fortran, data = record.state
        code, order = dtype.args[0], dtype.state[1]
        if not isinstance(code, str) or code not in _DTYPES or order not in ("<", ">"):
            raise ValueError(f"numbers of type {shown(code)}")
        return np.frombuffer(data, np.dtype(order + code)).reshape(shape, order="F" if fortran else "C").copy()
    except _DAMAGE as err:
        raise TeacherError(
            f"{where}: holds something that is no array of numbers ({err}); download the checkpoint again"
        ) from err
