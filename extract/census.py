"""What a source held when its dataset was planned, for the record; and whether it holds something else by now.

A dataset keeps the samples of its plan. So resume needs no listing, and lists again only what was listed in a moment.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from dtpipe.extract.sources.base import Source
from dtpipe.extract.sources.names import bounded
from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.words import count_of

LISTED_AGAIN_S = 5.0  # a source whose listing took longer is not listed again to look for changes


@dataclass(frozen=True)
class Census:
    """A source at one moment, before `--keys` and `--limit`."""

    samples: int
    keys_blake3: str
    """Of the keys in code-point order, one a line."""
    ignored: Mapping[str, int]
    """What was not used, by extension or why."""
    seconds: float
    """How long listing took."""

    def record(self) -> dict[str, Any]:
        """As a plan's provenance keeps it."""
        return asdict(self)


def take_census(source: Source) -> Census:
    """List a source, or use the listing that it has. Raises: as `Source.list`."""
    started_s = time.monotonic()
    keys = sorted(item.key for item in source.list())
    seconds = time.monotonic() - started_s
    digest = blake3_hex("\n".join(keys).encode("utf-8", "surrogatepass"))
    return Census(len(keys), digest, bounded(source.ignored()), round(seconds, 3))


def change_since(record: Mapping[str, Any], source: Source, out: str) -> str | None:
    """What to say when a source no longer holds what its plan recorded; None where it does or looking is expensive.

    A source that cannot be listed now is no error here: what is still to be read of it fails by itself.
    """
    if record.get("seconds", LISTED_AGAIN_S) >= LISTED_AGAIN_S:
        return None
    planned = int(record["samples"])
    try:
        census = take_census(source)
    except (DtpipeError, OSError) as err:
        return f"the source cannot be listed now ({err}); {out} keeps the {_images(planned)} that it was planned from"
    if census.keys_blake3 == record["keys_blake3"]:
        return None
    others = ", of other names" if planned == census.samples else ""
    return (
        f"the source lists {_images(census.samples)} now{others}, and {out} was planned from {planned}: it keeps "
        f"them; for what the source holds now, extract into another --out"
    )


def _images(count: int) -> str:
    return f"{count_of(count, 'image')}"
