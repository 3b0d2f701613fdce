"""Each key has a file of its own, below its folder, whatever it is made of."""

from __future__ import annotations

import itertools
from pathlib import Path, PurePosixPath

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtpipe.pipeline.predict.names import path_of_key

KEYS = st.text(st.sampled_from("ab./%~\0\n\\:é\udc80 png.."), min_size=1, max_size=12)
CLASHING = [
    *("a", "a.png", "a.png/b", "a.png.png", "a.PNG/b", "a/b", "a//b", "/a", "a/", ".", "..", "../a", "a/../b"),
    *("%2E", "a%2Epng/b", "x" * 300, "x" * 301, f"{'x' * 300}/y", "shard.tar/0001.jpg", "rows.parquet#12", "a\0b"),
    *("/", "/\0", "\0/", "\0/\0", "/b", "\0/b", "%00/b", "%_/b"),
]


@given(st.lists(KEYS, unique=True, max_size=8), st.sampled_from([".png", ".json"]))
def test_no_two_keys_have_one_file_or_a_file_where_another_has_a_folder(keys: list[str], ending: str) -> None:
    paths = [PurePosixPath(path_of_key(key, ending)) for key in keys]
    assert len(set(paths)) == len(keys)
    assert not set(paths) & {parent for path in paths for parent in path.parents}
    assert all(not path.is_absolute() and ".." not in path.parts for path in paths)


@pytest.mark.parametrize("ending", [".png", ".json"])
def test_keys_that_would_clash_lie_side_by_side_on_a_disk(ending: str, tmp_path: Path) -> None:
    for number, key in enumerate(CLASHING):
        path = tmp_path / path_of_key(key, ending)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(str(number))
    contents = sorted(int(path.read_text()) for path in tmp_path.rglob("*") if path.is_file())
    assert contents == list(range(len(CLASHING)))
    assert {path_of_key(a, ending) for a, b in itertools.combinations(CLASHING, 2)}


def test_an_ordinary_key_stays_as_it_is() -> None:
    assert path_of_key("train/n01440764/a 1.JPEG", ".png") == "train/n01440764/a 1.JPEG.png"
