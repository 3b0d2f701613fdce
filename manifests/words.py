"""Numbers and their nouns in sentences for people."""

from __future__ import annotations


def count_of(number: int, noun: str, plural: str = "") -> str:
    """`1 shard`, `2 shards`, `0 shards`; `plural` where it is more than the noun with an s."""
    return f"{number} {noun if number == 1 else plural or f'{noun}s'}"


def are(number: int) -> str:
    """The verb after a count: `is` for one."""
    return "is" if number == 1 else "are"
