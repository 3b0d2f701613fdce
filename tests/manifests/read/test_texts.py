"""A column of text is the tuple of its values, in every way that is used."""

from __future__ import annotations

import pickle

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtpipe.manifests.read.texts import Texts, one_after_another, rows_with, texts_of

VALUES = st.lists(st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=3), max_size=9)


@given(VALUES, st.integers(0, 9))
def test_texts_are_their_tuple(values: list[str | None], cut: int) -> None:
    texts: Texts[str | None] = Texts(
        pa.chunked_array([pa.array(part, pa.string()) for part in (values[:cut], values[cut:])])
    )
    expected = tuple(values)
    assert (len(texts), tuple(texts), list(reversed(texts))) == (len(expected), expected, list(reversed(expected)))
    assert texts == expected
    assert (texts == (*expected, "more")) is False
    assert texts == pickle.loads(pickle.dumps(texts))
    assert [texts[np.int64(row)] for row in range(len(values))] == list(expected)
    assert (texts[1:3], texts[::-2]) == (expected[1:3], expected[::-2])
    for columns in ([texts, texts], [texts, expected], [texts]):
        assert tuple(one_after_another(columns)) == expected * len(columns)
    rows = np.array([*range(len(values)), *range(0, len(values), 2)], np.int64)
    assert texts_of(texts, rows) == texts_of(expected, rows) == tuple(expected[row] for row in rows)
    for value in (*values[:2], "ok"):
        if value is not None:
            assert rows_with(texts, value).tolist() == rows_with(expected, value).tolist()
            assert (value in texts) == (value in expected)


def test_a_row_beyond_the_last_is_an_index_error() -> None:
    with pytest.raises(IndexError):
        Texts(pa.chunked_array([["a"]]))[1]
