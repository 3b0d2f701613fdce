"""Numbers and their nouns, and teachers, in sentences for people."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any


def count_of(number: int, noun: str, plural: str = "") -> str:
    """`1 shard`, `2 shards`, `0 shards`; `plural` where it is more than the noun with an s."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def are(number: int) -> str:
    """The verb after a count: `is` for one."""
    return "is" if number == 1 else "are"


def teacher_in_words(teacher: Mapping[str, Any]) -> str:
    """A teacher as a recipe records it, as plain values: its kind and weights, loudly where nobody trained them."""
    if teacher["kind"] == "null":
        return "null: NOISE for measuring speed, no features"
    seed = teacher.get("options", {}).get("untrained")
    untrained = "" if seed is None else f", UNTRAINED: new weights from seed {seed}"
    return f"{teacher['kind']}{untrained}, weights {teacher['weights_blake3'][:16]}"


_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([kmgtp]?)b?", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """`500GB`, `300 kb`, `2000000`: bytes, in powers of 1000, in any case. Raises: ValueError."""
    match = _BYTES.fullmatch(text.strip())
    size = float(match[1]) * 1000 ** " kmgtp".index(match[2].lower() or " ") if match else 0
    if size < 1:
        raise ValueError(
            f" is {text!r}; write a size in B, kB, MB, GB, TB or PB (powers of 1000), such as 500GB or 1.5TB"
        )
    return int(size)
