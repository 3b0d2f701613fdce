"""rANS: against a coder in whole numbers of any size, the entropy bound, and whatever bytes damage makes of a chunk."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dtpipe.manifests.codecs.rans import compress, decompress, decompress_joined
from dtpipe.manifests.codecs.rans_tables import (
    ESCAPE,
    PLACES,
    REACH,
    TOTAL,
    RansTables,
    expected_bytes,
    fit_tables,
)
from dtpipe.manifests.errors import ConfigError, DamagedDataError


def geometric(num: int, scales: np.ndarray, seed: int = 0) -> np.ndarray:
    """int8 symbols [num, n] around 0, of a mean magnitude for each place."""
    rng = np.random.Generator(np.random.Philox(seed))
    values = rng.laplace(0, np.maximum(scales, 1e-3), (num, len(scales)))
    return np.clip(np.rint(values), -128, 127).astype(np.int8)


def tables_of(symbols: np.ndarray, num_tables: int = 5) -> RansTables:
    classes = (np.arange(symbols.shape[1]) * num_tables // symbols.shape[1]).astype(np.uint8)
    return fit_tables(symbols, classes, num_tables)


def spelled_out(symbols: list[int], tables: RansTables) -> bytes:
    """A chunk as the module's first lines have it, in Python's whole numbers, lists and sums."""
    frequencies = [[int(value) for value in row] for row in tables.frequencies]
    states, words, escapes = [1 << 16] * tables.lanes, list[bytes](), list[int]()
    places = []
    for idx, symbol in enumerate(symbols):
        row = frequencies[tables.classes[idx]]
        known = -REACH <= symbol <= REACH and row[symbol + REACH] > 0
        places.append(symbol + REACH if known else ESCAPE)
        escapes += [] if known else [symbol % 256]
    for idx in reversed(range(len(symbols))):
        row, lane = frequencies[tables.classes[idx]], idx % tables.lanes
        frequency, before = row[places[idx]], sum(row[: places[idx]])
        while states[lane] >= frequency << 20:
            words.append((states[lane] % 65536).to_bytes(2, "little"))
            states[lane] //= 65536
        states[lane] = 4096 * (states[lane] // frequency) + states[lane] % frequency + before
    head = b"".join(state.to_bytes(4, "little") for state in states)
    return head + b"".join(reversed(words)) + bytes(reversed(escapes))


def read_back(chunk: bytes, tables: RansTables) -> Iterator[int]:
    """Symbols by search in the sums, the other way round than the loops do it."""
    states = [int.from_bytes(chunk[4 * lane : 4 * lane + 4], "little") for lane in range(tables.lanes)]
    at, end = 4 * tables.lanes, len(chunk)
    for idx, table in enumerate(tables.classes):
        lane = idx % tables.lanes
        remainder, before = states[lane] % TOTAL, 0
        row = [int(value) for value in tables.frequencies[table]]
        place = 0
        while remainder >= before + row[place]:
            before, place = before + row[place], place + 1
        frequency = row[place]
        states[lane] = frequency * (states[lane] // TOTAL) + remainder - before
        while states[lane] < 65536:
            states[lane] = states[lane] * 65536 + int.from_bytes(chunk[at : at + 2], "little")
            at += 2
        if place == ESCAPE:
            end -= 1
            yield int(np.uint8(chunk[end]).astype(np.int8))
        else:
            yield place - REACH
    assert at == end and states == [65536] * tables.lanes


@pytest.mark.parametrize("num", [0, 1, 7, 300, 4500])
def test_chunks_are_those_of_whole_numbers_and_come_back(num: int) -> None:
    symbols = geometric(3, np.linspace(20, 0.01, num))
    tables = tables_of(symbols) if num else RansTables(np.zeros((0, PLACES), np.uint16), np.zeros(0, np.uint8))
    chunks = [compress(row, tables) for row in symbols]
    assert tables.lanes == {4500: 2}.get(num, 1)
    assert chunks == [spelled_out(row.tolist(), tables) for row in symbols]
    np.testing.assert_array_equal(decompress(chunks, tables), symbols)
    assert [list(read_back(chunk, tables)) for chunk in chunks] == symbols.tolist()


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(-128, 127), min_size=1, max_size=60), st.integers(0, 3))
def test_symbols_that_no_table_expects_come_back(values: list[int], seed: int) -> None:
    sample = geometric(20, np.linspace(3, 0.01, len(values)), seed)
    symbols = np.array(values, np.int8)
    tables = tables_of(sample)
    assert decompress([compress(symbols, tables)] * 2, tables).tolist() == [values] * 2


def test_the_bytes_of_a_chunk_are_golden() -> None:
    frequencies = np.zeros((2, PLACES), np.uint16)
    frequencies[0, [REACH - 1, REACH, REACH + 1, ESCAPE]] = 1024, 2000, 1024, 48
    frequencies[1, [REACH, ESCAPE]] = 4095, 1
    tables = RansTables(frequencies, np.array([0] * 8 + [1] * 8, np.uint8))
    symbols = np.array([0, 1, -1, 0, 0, 1, 77, -1, 0, 0, 0, -5, 0, 0, 0, 0], np.int8)
    assert (
        compress(symbols, tables).hex() == "cc7be62d2241fb4d"
    )  # a state of four bytes, a word, and the bytes -5 and 77
    assert spelled_out(symbols.tolist(), tables) == compress(symbols, tables)


def test_size_is_within_a_hundredth_of_the_entropy_of_other_samples() -> None:
    scales = np.geomspace(15, 0.05, 12000)
    classes = (np.arange(12000) * 30 // 12000).astype(np.uint8)
    tables = fit_tables(geometric(60, scales), classes, 30)
    others = geometric(60, scales, seed=1)
    size = np.mean([len(compress(row, tables)) for row in others])
    bound = 0.0
    for table in range(30):  # of the true distribution in each table, mixed over its scales
        values = others[:, classes == table].ravel()
        shares = np.bincount(values.astype(int) + 128, minlength=256) / len(values)
        bound += -(shares[shares > 0] * np.log2(shares[shares > 0])).sum() * len(values) / 60 / 8
    print(f"{size:.0f} bytes, entropy {bound:.0f}, expected {expected_bytes(others, tables):.0f}")
    assert bound < size < 1.012 * bound
    np.testing.assert_allclose(size, expected_bytes(others, tables), rtol=0.002)


def test_a_damaged_chunk_is_an_error_or_other_symbols_and_touches_nothing_else() -> None:
    symbols = geometric(4, np.linspace(8, 0.01, 4100))
    tables = tables_of(symbols)
    chunks = [compress(row, tables) for row in symbols]
    whole = np.frombuffer(b"".join(chunks), np.uint8).copy()
    ends = np.cumsum([len(chunk) for chunk in chunks])
    starts = ends - [len(chunk) for chunk in chunks]
    rng, found = np.random.default_rng(0), 0
    for _ in range(300):
        data, out = whole.copy(), np.full((6, 4100), 99, np.int8)
        data[rng.integers(starts[1], ends[1])] ^= rng.integers(1, 256)
        try:
            decompress_joined(data, starts, ends, tables, out[1:5])
        except DamagedDataError as err:
            found += "chunk 1 of 4" in str(err)
        assert (out[[0, 5]] == 99).all() and np.array_equal(out[1], symbols[0])
    assert found > 280  # a byte of an escape is a symbol that nobody can doubt; crc32c finds it before


@pytest.mark.parametrize("keep", [0, 1, 3, 5, 100, -1])
def test_cut_and_foreign_bytes_are_errors(keep: int) -> None:
    symbols = geometric(1, np.full(500, 2.0))
    tables = tables_of(symbols)
    chunk = compress(symbols[0], tables)
    for wrong in (chunk[:keep], chunk + b"\0", bytes(np.random.default_rng(keep + 1).bytes(len(chunk)))):
        with pytest.raises(DamagedDataError, match="chunk 0 of 1 is not what rans makes"):
            decompress([wrong], tables)
    with pytest.raises(DamagedDataError, match="lie at"):
        decompress_joined(np.zeros(8, np.uint8), np.array([0]), np.array([9]), tables)


def test_tables_and_symbols_that_make_no_sense_are_refused() -> None:
    tables = tables_of(geometric(2, np.full(10, 1.0)))
    with pytest.raises(ConfigError, match="are for 10 symbols int8, found int8"):
        compress(np.zeros(9, np.int8), tables)
    short = tables.frequencies.copy()
    short[0, REACH] -= 1
    no_escape = tables.frequencies.copy()
    no_escape[0, REACH] += no_escape[0, ESCAPE]
    no_escape[0, ESCAPE] = 0
    for wrong in (short, no_escape):
        with pytest.raises(ConfigError, match="sum up to 4096"):
            RansTables(wrong, tables.classes)
    with pytest.raises(ConfigError, match="of table 9, and there are 5"):
        RansTables(tables.frequencies, np.full(3, 9, np.uint8))


@pytest.mark.parametrize(
    ("least", "most", "repeats"), [(1, 31, 40), (1, 110, 200), (16, 90, 200), (90, 90, 200), (127, 127, 6000)]
)
def test_tables_of_even_and_of_far_symbols_sum_up(least: int, most: int, repeats: int) -> None:
    # even shares are all rounded the same way; where all symbols are far from 0, no place but the escape is left
    even = np.arange(least, most + 1).astype(np.int8)
    for num_zeros in range(60):
        symbols = np.concatenate([np.tile([even, -even], repeats).ravel(), np.zeros(num_zeros, np.int8)])
        tables = tables_of(symbols[None], 1)
        assert tables.frequencies.sum() == TOTAL
    chunk = compress(symbols, tables)
    assert chunk == spelled_out(symbols.tolist(), tables)
    assert decompress([chunk], tables).tolist() == [symbols.tolist()]
