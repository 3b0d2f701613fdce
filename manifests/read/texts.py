"""A column of text, as long as a dataset: a Python string is made of a row when that row is looked at.

One rule: it behaves as the tuple of its values would, but for its memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, TypeVar, overload

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

_Text = TypeVar("_Text", bound="str | None")
_AT_ONCE = 4096  # strings made at a time where all are asked for


class Texts(Sequence[_Text]):
    """Texts by row, over an Arrow column of strings."""

    def __init__(self, column: pa.ChunkedArray) -> None:
        self.column = column

    def __len__(self) -> int:
        return len(self.column)

    @overload
    def __getitem__(self, row: int) -> _Text: ...

    @overload
    def __getitem__(self, row: slice) -> Sequence[_Text]: ...

    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return tuple(self[idx] for idx in range(len(self))[row])
        return self.column[int(row)].as_py()

    def take(self, rows: NDArray[np.integer]) -> tuple[_Text, ...]:
        """The texts of some rows, in their order."""
        chunk_of = np.searchsorted(self._ends, rows, side="right")
        texts = np.empty(len(rows), object)
        for number in np.unique(chunk_of).tolist():  # Arrow's own `take` would join the chunks first
            here, chunk = chunk_of == number, self.column.chunk(number)
            first = int(self._ends[number]) - len(chunk)
            texts[here] = chunk.take(pa.array(rows[here] - first)).to_pylist()
        return tuple(texts.tolist())

    @cached_property
    def _ends(self) -> NDArray[np.int64]:
        """By chunk of the column, the row behind its last one."""
        return np.cumsum([len(chunk) for chunk in self.column.iterchunks()], dtype=np.int64)

    def __iter__(self) -> Iterator[_Text]:
        for chunk in self.column.iterchunks():
            for first in range(0, len(chunk), _AT_ONCE):
                yield from chunk.slice(first, _AT_ONCE).to_pylist()

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Texts):
            return bool(self.column.equals(other.column))
        return isinstance(other, Sequence) and len(self) == len(other) and all(map(_same, self, other))

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        return f"Texts({len(self)} rows)"


def texts_of(texts: Sequence[_Text], rows: NDArray[np.integer]) -> tuple[_Text, ...]:
    """The texts of some rows, in their order."""
    return texts.take(rows) if isinstance(texts, Texts) else tuple(texts[row] for row in rows)


def one_after_another(columns: Sequence[Sequence[_Text]]) -> Sequence[_Text]:
    """Several columns as one."""
    texts = [column for column in columns if isinstance(column, Texts)]
    if len(texts) < len(columns):
        return tuple(text for column in columns for text in column)
    return Texts(pa.chunked_array([chunk for column in texts for chunk in column.column.iterchunks()], pa.string()))


def _same(one: object, other: object) -> bool:
    return one == other


def rows_with(texts: Sequence[str | None], text: str) -> NDArray[np.bool_]:
    """Where a column has this text. Shapes: [N] -> [N]."""
    if isinstance(texts, Texts):
        return np.asarray(pc.fill_null(pc.equal(texts.column, text), False).to_numpy(), np.bool_)
    return np.array([each == text for each in texts], np.bool_)
