"""Numbers and nouns, and that no sentence of ours puts a plural after a number that may be one."""

from __future__ import annotations

import re

import pytest

from dtpipe.manifests.words import are, count_of, parse_bytes
from parts.paths import REPO

_NOUNS = "samples|shards|steps|epochs|problems|chunks|objects|images|keys|workers|nodes|datasets|classes|entries"
_COUNT = re.compile(rf"\{{(?:len\([^{{}}]*\)|[a-z_.]*num_\w+)\}} (?:{_NOUNS})\b")


@pytest.mark.parametrize(
    ("number", "text"), [(0, "0 entries are"), (1, "1 entry is"), (2, "2 entries are"), (1000, "1000 entries are")]
)
def test_one_is_singular(number: int, text: str) -> None:
    assert f"{count_of(number, 'entry', 'entries')} {are(number)}" == text
    assert count_of(number, "shard") == f"{number} shard" + "s" * (number != 1)


@pytest.mark.parametrize(
    ("text", "size"),
    [("300KB", 300_000), ("300kB", 300_000), ("1.5 tb", 1_500_000_000_000), ("2M", 2_000_000), ("7", 7)],
)
def test_sizes_in_any_case(text: str, size: int) -> None:
    assert parse_bytes(text) == size


@pytest.mark.parametrize("text", ["300KiB", "GB", "-1GB", "0", "1,5TB"])
def test_what_is_no_size_is_told_the_units(text: str) -> None:
    with pytest.raises(ValueError, match=rf"{text}.*kB, MB, GB, TB or PB \(powers of 1000\)"):
        parse_bytes(text)


def test_verify_and_summaries_use_it() -> None:
    for name in ("verify", "distill", "extract", "train_teacher"):
        text = (REPO / "pipeline" / "commands" / f"{name}.py").read_text(encoding="utf-8")
        assert _COUNT.findall(text) == [], name
