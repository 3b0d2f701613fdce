"""A shard is the sum of its rows' bytes, whoever makes them, and goes to the store once."""

from __future__ import annotations

from pathlib import Path

import blake3
import pytest

from dtpipe.manifests.errors import ShapeError
from dtpipe.manifests.layout.arrays import CodedRows, ShardArrays
from dtpipe.manifests.pieces import blake3_of, in_blocks
from dtpipe.manifests.schema import Plan
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.shard import encode_rows, encode_shard, join_rows, write_rows
from parts import golden


@pytest.fixture(params=["zarr", "webdataset"])
def shard(request: pytest.FixtureRequest) -> tuple[Plan, ShardArrays]:
    """Five rows, of which one is bad, in one shard."""
    settings = golden.Settings(format=request.param, num_rows=5, samples=5)
    recipe, listing = golden.make_recipe(settings), golden.make_listing(settings)
    plan = Plan(recipe=recipe, num_rows=5, num_shards=1, listing_blake3="0" * 64)
    return plan, golden.shard_arrays(plan, listing, 0, settings)


def cut(shard: ShardArrays, start: int, end: int) -> ShardArrays:
    return ShardArrays({name: values[start:end] for name, values in shard.arrays.items()}, shard.rows[start:end])


def in_parts(plan: Plan, shard: ShardArrays, *ends: int) -> list[CodedRows]:
    return [encode_rows(plan.recipe, cut(shard, start, end)) for start, end in zip((0, *ends), ends, strict=False)]


@pytest.mark.parametrize("ends", [(5,), (1, 5), (2, 3, 5)])
def test_rows_may_be_made_in_any_parts(shard: tuple[Plan, ShardArrays], ends: tuple[int, ...]) -> None:
    plan, arrays = shard
    parts = in_parts(plan, arrays, *ends)
    assert list(join_rows(plan, 0, parts)) == list(encode_shard(plan, 0, arrays))
    assert len(parts) == len(ends)


def test_rows_in_another_order_or_too_few_are_refused(shard: tuple[Plan, ShardArrays]) -> None:
    plan, arrays = shard
    first, second = in_parts(plan, arrays, 2, 5)
    for parts in ([second, first], [first], [first, first, second]):
        with pytest.raises(ShapeError, match="shard 0 holds rows 0 to 4"):
            list(join_rows(plan, 0, parts))


def test_each_object_is_written_once_and_is_what_its_entry_says(
    shard: tuple[Plan, ShardArrays], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, arrays = shard
    store, names, stages, write = Store(tmp_path / "features"), list[str](), list[str](), Store.write

    def noted(self: Store, name: str, data: object) -> object:
        names.append(name)
        return write(self, name, data)  # type: ignore[arg-type]

    class Stage:
        def __init__(self, name: str) -> None:
            stages.append(name)

        def __enter__(self) -> None: ...
        def __exit__(self, *_: object) -> None: ...

    monkeypatch.setattr(Store, "write", noted)
    entry = write_rows(store, plan, "0" * 64, 0, in_parts(plan, arrays, 2, 5), 1, {}, Stage)
    assert names == [stored.name for stored in entry.objects]
    assert sorted(stages) == ["digest"] * len(names) + ["store"] * len(names)
    for stored in entry.objects:
        data = store.read(stored.name)
        assert (len(data), blake3.blake3(data).hexdigest()) == (stored.size_bytes, stored.blake3)
        assert store.identity(stored.name) == stored.identity
    assert sorted(store.list()) == sorted(names)
    assert entry.rows == tuple(arrays.rows)


def kernel_bytes() -> int:
    """What this process sent towards storage so far, as the kernel counts it."""
    counters = Path("/proc/self/io")
    if not counters.exists():
        pytest.skip("the kernel shows no counters of what a process writes (/proc/self/io)")
    return next(int(line.split()[1]) for line in counters.read_text().splitlines() if line.startswith("write_bytes"))


def test_nothing_is_written_twice(tmp_path: Path) -> None:
    """By the kernel's count, in pages of 4 KiB: no copy under another name, and no second pass for the digest."""
    content = [bytes([idx]) * 1_000_000 for idx in range(24)]
    before = kernel_bytes()
    (tmp_path / "plain").write_bytes(b"".join(content))
    plain = kernel_bytes() - before
    if plain < 24_000_000:
        pytest.skip(f"the kernel counts {plain} bytes for a plain file of 24 MB here: it lies in memory")
    Store(tmp_path / "features").write("data/00000.tar", content)
    assert kernel_bytes() - before - plain < 1.02 * plain


def test_blocks_of_pieces_are_the_content() -> None:
    pieces = [b"a" * 10, b"", b"b" * 3_000_000, *[b"cd" * 100_000] * 11, b"e"]
    blocks = list(in_blocks(pieces))
    assert b"".join(blocks) == b"".join(pieces)
    assert len(blocks) == 4  # what comes before the large one, that one, 1.2 MB, and the rest
    assert blake3_of(pieces) == blake3.blake3(b"".join(pieces)).hexdigest()
    assert list(in_blocks([])) == []
