"""Which samples a dataset holds and in which rows; fixed once, before any work.

One rule: a row follows from the keys and the seed alone, never from the order in which a store lists files.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import pyarrow as pa

from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.documents import Refusal, read_utf8
from dtpipe.manifests.errors import InputError, ManifestError
from dtpipe.manifests.layout.tables import LISTING_FILE, LISTING_SCHEMA, decode_rows, encode_table
from dtpipe.manifests.schema import Order
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of

_SHOWN = 5  # names listed in a message


class ListedSample(Protocol):
    """What a source gives for one sample."""

    @property
    def key(self) -> str: ...
    @property
    def uri(self) -> str: ...
    @property
    def label(self) -> str | None: ...


@dataclass(frozen=True)
class ListingRow:
    """One sample in its row."""

    row: int
    key: str
    uri: str
    label: str | None


@dataclass(frozen=True)
class Listing:
    """The samples by row: entry i of each column is row i."""

    keys: tuple[str, ...]
    uris: tuple[str, ...]
    labels: tuple[str | None, ...]

    def __len__(self) -> int:
        return len(self.keys)

    def __iter__(self) -> Iterator[ListingRow]:
        return (self[row] for row in range(len(self)))

    def __getitem__(self, row: int) -> ListingRow:
        return ListingRow(row, self.keys[row], self.uris[row], self.labels[row])

    def rows(self, rows: Iterable[int]) -> list[ListingRow]:
        """The samples of some rows, such as `plan.shard_rows(3)`."""
        return [self[row] for row in rows]


def build_listing(
    items: Iterable[ListedSample],
    order: Order = "permuted",
    seed: int = 0,
    limit: int | None = None,
    keys: Iterable[str] | None = None,
) -> Listing:
    """Give every sample its row: filter by `keys`, order, then take the first `limit`.

    `permuted` is a seeded permutation of the keys in code-point order; `container` keeps the order of items. Keys are
    NFC.
    Raises: InputError for no samples, an empty or undecodable key, two samples of one key, or one of `keys` that no
    sample has.
    """
    samples = [(_normal_key(item.key, item.uri), item.uri, item.label) for item in items]
    _refuse_duplicates(samples)
    if keys is not None:
        samples = _select(samples, keys)
    if order == "permuted":
        samples.sort(key=lambda sample: sample[0])
        samples = [samples[place] for place in permutation(len(samples), seed)]
    samples = samples[:limit]
    if not samples:
        raise InputError("the source has no samples to extract; check the path, `--keys` and `--limit`")
    columns = tuple(zip(*samples, strict=True))
    return Listing(keys=columns[0], uris=columns[1], labels=columns[2])


def permutation(count: int, seed: int) -> list[int]:
    """A seeded order of 0..count-1, equal on every machine and with every numpy.

    Sorts raw 64-bit outputs of Philox, which numpy keeps stable for ever; `Generator.permutation` it does not.
    """
    raw = np.random.Philox(seed).random_raw(count)
    return [int(place) for place in np.argsort(raw, kind="stable")]


def encode_listing(listing: Listing) -> bytes:
    """listing.parquet's bytes."""
    columns = {"row": range(len(listing)), "key": listing.keys, "uri": listing.uris, "label": listing.labels}
    return encode_table(pa.table({name: list(column) for name, column in columns.items()}, schema=LISTING_SCHEMA))


def write_listing(store: Store, listing: Listing) -> str:
    """Write listing.parquet and return its digest."""
    data = encode_listing(listing)
    store.write(LISTING_FILE, data)
    return blake3_hex(data)


def read_listing(store: Store, listing_blake3: str) -> Listing:
    """Read listing.parquet and see that it is the planned one.

    Raises: MissingObjectError, or ManifestError when a byte of it changed.
    """
    table = read_listing_table(store, listing_blake3)
    return Listing(*(tuple(table[name].to_pylist()) for name in ("key", "uri", "label")))


def read_listing_table(store: Store, listing_blake3: str, columns: Sequence[str] | None = None) -> pa.Table:
    """As `read_listing`, as a table, or some of its columns. Raises: as `read_listing`."""
    where = store.where(LISTING_FILE)
    data = store.read(LISTING_FILE)
    if blake3_hex(data) != listing_blake3:
        raise ManifestError(
            f"{where} is not the listing that plan.json names: bytes were changed; "
            f"run `dtpipe verify --repair {store.url}`"
        )
    return decode_rows(data, LISTING_SCHEMA, where, columns)


def read_key_file(path: str, field: str) -> list[str]:
    """Keys of a `--keys` file, one per line; `field` is the setting that names it. Raises: InputError."""
    refusal = Refusal(InputError, "give a UTF-8 text file with one key per line")
    lines = read_utf8(Path(path), refusal, f"{field}: {path}").splitlines()
    return [line for line in lines if line.strip()]


def normal_keys(keys: Iterable[str]) -> set[str]:
    """Keys in the form that listings hold, Unicode NFC."""
    return {unicodedata.normalize("NFC", key) for key in keys}


def missing_keys(chosen: set[str], keys: Iterable[str]) -> str:
    """`2 of 9 wanted keys ('a.png', 'b.png')` for the chosen ones that are not among `keys`; empty when all are."""
    lost = sorted(chosen.difference(keys))
    if not lost:
        return ""
    shown = ", ".join(repr(key) for key in lost[:_SHOWN])
    more = f" and {len(lost) - _SHOWN} more" if len(lost) > _SHOWN else ""
    return f"{len(lost)} of {count_of(len(chosen), 'wanted key')} ({shown}{more})"


def _normal_key(key: str, uri: str) -> str:
    normal = unicodedata.normalize("NFC", key)
    try:
        normal.encode()
    except UnicodeEncodeError as err:
        raise InputError(f"{uri!r}: the sample's key is not valid UTF-8; rename the file") from err
    if not normal or any(unicodedata.category(char) == "Cc" for char in normal):
        raise InputError(f"{uri!r}: the sample's key {key!r} is empty or has control characters; rename the file")
    return normal


def _refuse_duplicates(samples: Sequence[tuple[str, str, str | None]]) -> None:
    seen: dict[str, str] = {}
    for key, uri, _ in samples:
        if key in seen:
            raise InputError(
                f"two samples have the key {key!r} (after Unicode NFC): {seen[key]} and {uri}; rename or remove one"
            )
        seen[key] = uri


def _select(samples: list[tuple[str, str, str | None]], keys: Iterable[str]) -> list[tuple[str, str, str | None]]:
    chosen = normal_keys(keys)
    if lost := missing_keys(chosen, (key for key, _, _ in samples)):
        raise InputError(f"{lost} are not in the source; check `--keys` against `--images`")
    return [sample for sample in samples if sample[0] in chosen]
