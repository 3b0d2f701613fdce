"""The tar store: one webdataset tar per shard, which plain `webdataset` reads.

One rule: the row number is webdataset's sample key, because its own rule (all up to the first dot) would merge
`a.0001.jpg` and `a.0002.jpg`. The true key stands in `key.json`. Members of a row lie together: one range read a row.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtpipe.manifests.canonical import canonical_json
from dtpipe.manifests.codecs.base import FittedArrays
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.image_coding import PLAIN, ImageCoding
from dtpipe.manifests.layout.arrays import (
    KEY,
    ArraySpec,
    Chunk,
    CodedRows,
    EncodedObject,
    MembersBuilder,
    ShardArrays,
    check_arrays,
    check_rows,
    stored_arrays,
)
from dtpipe.manifests.layout.symbols import decode_symbols, encode_symbols
from dtpipe.manifests.schema import IMAGE, IndexRow, Plan, Recipe

_BLOCK = tarfile.BLOCKSIZE
_END = bytes(2 * _BLOCK)


@dataclass(frozen=True)
class _ImageFile:
    """A lossless kind of image file, as Pillow writes it."""

    kind: str
    suffix: str
    options: Mapping[str, int | bool]


_IMAGE_FILES: Mapping[ImageCoding, _ImageFile] = {
    # of photographs in half the time of the default level, 3 % larger
    PLAIN: _ImageFile("PNG", "png", {"compress_level": 1}),
    # the fastest method: the others take 4 to 20 times as long for at most a tenth less
    "webp": _ImageFile("WEBP", "webp", {"lossless": True, "exact": True, "quality": 25, "method": 0}),
}


def tar_object_name(shard_idx: int) -> str:
    """Object name of a shard's tar."""
    return f"data/{shard_idx:05d}.tar"


def encode_tar_rows(recipe: Recipe, arrays: ShardArrays, fitted: FittedArrays) -> CodedRows:
    """The members of some rows; equal input gives equal bytes. Raises: as `check_arrays`."""
    specs = stored_arrays(recipe, fitted)
    checked = check_arrays(specs, arrays)
    chunks = {name: list[Chunk]() for name in [KEY, *specs]}
    for idx, row in enumerate(arrays.rows):
        for array, data in _row_chunks(row, specs, {name: values[idx] for name, values in checked.items()}):
            chunks[array].append(Chunk.of(data))
    return CodedRows(arrays.rows, chunks)


def join_tar_rows(plan: Plan, shard_idx: int, parts: Sequence[CodedRows]) -> Iterator[EncodedObject]:
    """The one object of a shard, from all its rows in order. Raises: as `check_rows`."""
    check_rows(plan, shard_idx, [row for part in parts for row in part.rows])
    suffixes = _suffixes(stored_arrays(plan.recipe))
    tables = {name: MembersBuilder() for name, _ in suffixes}
    pieces, offset = list[bytes](), 0
    for part in parts:
        members = {name: iter(chunks) for name, chunks in part.chunks.items()}
        for row in part.rows:
            for array, suffix in suffixes:
                chunk = next(members[array])
                tables[array].add(offset + _BLOCK, chunk)
                padding = bytes(-len(chunk.data) % _BLOCK)
                pieces += [_header(f"{row.row:08d}.{suffix}", len(chunk.data)), chunk.data, padding]
                offset += _BLOCK + len(chunk.data) + len(padding)
    pieces.append(_END)
    tables_of_all = {name: table.table() for name, table in tables.items()}
    yield EncodedObject(tar_object_name(shard_idx), tuple(pieces), tables_of_all)


def empty_tar_bytes(_recipe: Recipe) -> int:
    """Of a shard beside its members: the end of a tar."""
    return len(_END)


def _suffixes(specs: Mapping[str, ArraySpec]) -> list[tuple[str, str]]:
    """Array and file suffix of each member of a row, in their order in the tar."""
    suffixes = [(KEY, "key.json")]
    for name, spec in specs.items():
        if spec.num_views is None:
            suffixes.append((name, f"{name}.{_IMAGE_FILES[spec.image_coding].suffix}"))
        else:
            kind = "npy" if spec.tables is None else "rans"
            suffixes += [(name, f"{name}.v{view_idx}.{kind}") for view_idx in range(spec.num_views)]
    return suffixes


def _row_chunks(
    row: IndexRow, specs: Mapping[str, ArraySpec], values: Mapping[str, NDArray[np.generic]]
) -> Iterator[tuple[str, bytes]]:
    """Array and bytes of each member of a row."""
    yield KEY, encode_key(row)
    for name, spec in specs.items():
        if spec.num_views is None:
            yield name, _encode_image(spec, values[name])
        else:
            encode = _encode_npy if spec.tables is None else partial(encode_symbols, spec)
            yield from ((name, encode(chunk)) for chunk in values[name])


def encode_key(row: IndexRow) -> bytes:
    """What `key.json` holds of a row."""
    return canonical_json({"row": row.row, "key": row.key, "label": row.label, "ok": row.status == "ok"})


def _header(name: str, size: int) -> bytes:
    """A ustar header without times, owners or anything else that is not content."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _encode_image(spec: ArraySpec, image: NDArray[np.generic]) -> bytes:
    file, sink = _IMAGE_FILES[spec.image_coding], io.BytesIO()
    Image.fromarray(image).save(sink, file.kind, **file.options)
    return sink.getvalue()


def _encode_npy(chunk: NDArray[np.generic]) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.asarray(chunk), version=(1, 0), allow_pickle=False)
    return sink.getvalue()


def decode_tar_chunk(spec: ArraySpec, chunk: bytes, trailer: bytes, out: NDArray[np.generic]) -> None:  # noqa: ARG001  tar chunks have none
    """Decode one member into `out`, a contiguous array of the chunk's shape and dtype. `chunk` was compared with its
    entry.

    Raises: DamagedDataError when the content does not fit; the caller adds the place.
    """
    if spec.tables is not None:
        out[...] = decode_symbols(spec, chunk)
        return
    values = _read_image(spec, chunk) if spec.name == IMAGE else _read_npy(chunk)
    if values.shape != spec.chunk_shape or values.dtype != spec.dtype:
        raise DamagedDataError(f"it holds {values.dtype}{list(values.shape)}, not {spec.dtype}{list(spec.chunk_shape)}")
    out[...] = values


def _read_image(spec: ArraySpec, chunk: bytes) -> NDArray[np.generic]:
    kind = _IMAGE_FILES[spec.image_coding].kind
    try:
        with Image.open(io.BytesIO(chunk), formats=[kind]) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        raise DamagedDataError(f"it is no {kind} ({err})") from err


def _read_npy(chunk: bytes) -> NDArray[np.generic]:
    try:
        return np.asarray(np.lib.format.read_array(io.BytesIO(chunk), allow_pickle=False))
    except (ValueError, EOFError) as err:
        raise DamagedDataError(f"it is no npy ({err})") from err
