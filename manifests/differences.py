"""In which fields two settings differ, and the one way to refuse it: `name: stored -> wanted`.

Settings are JSON documents: what a plan, a run folder or a checkpoint stores, and what was asked for now.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from dtpipe.manifests.errors import PlanChangedError

_SHOWN = 8  # differences named in a message
_LONGEST = 80  # characters of a value


class Absent(Enum):
    """What stands for the value of a field that a document does not have."""

    ABSENT = "not set"


@dataclass(frozen=True)
class Difference:
    """One field, by its dotted name, and its two values."""

    name: str
    stored: Any
    wanted: Any

    def __str__(self) -> str:
        return f"{self.name}: {_short(self.stored)} -> {_short(self.wanted)}"


def differences(stored: Mapping[str, Any], wanted: Mapping[str, Any], prefix: str = "") -> list[Difference]:
    """Where two JSON documents differ, by name; `prefix` stands before each name."""
    return [
        difference
        for name in sorted({**stored, **wanted})
        for difference in _differences(
            f"{prefix}{name}", stored.get(name, Absent.ABSENT), wanted.get(name, Absent.ABSENT)
        )
    ]


def listed(clauses: Iterable[object]) -> str:
    """Differences, or other clauses, as part of a message; no more than a reader wants to see."""
    texts = [str(clause) for clause in clauses]
    return "; ".join(texts if len(texts) <= _SHOWN else [*texts[:_SHOWN], f"and {len(texts) - _SHOWN} more"])


def refuse_differences(
    holder: str, changes: Sequence[Difference], remedy: str = "set them back, or choose another --out"
) -> None:
    """See that there is none; `holder` says what lies where, as in `runs/a holds a run with other settings`.

    Raises: PlanChangedError.
    """
    if changes:
        raise PlanChangedError(f"{holder} ({listed(changes)}); {remedy}")


def _differences(name: str, stored: object, wanted: object) -> list[Difference]:
    if isinstance(stored, Mapping) and isinstance(wanted, Mapping):
        return differences(stored, wanted, f"{name}.")
    if isinstance(stored, list) and isinstance(wanted, list) and len(stored) == len(wanted):
        pairs = enumerate(zip(stored, wanted, strict=True))
        return [difference for idx, pair in pairs for difference in _differences(f"{name}[{idx}]", *pair)]
    if stored == wanted and isinstance(stored, bool) == isinstance(wanted, bool):
        return []
    return [Difference(name, stored, wanted)]


def _short(value: object) -> str:
    text = value.value if isinstance(value, Absent) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}.."
