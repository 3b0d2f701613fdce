"""The tar store: one webdataset tar per shard, which plain `webdataset` reads.

One rule: the row number is webdataset's sample key, because its own rule (all up to the first dot) would merge
`a.0001.jpg` and `a.0002.jpg`. The true key stands in `key.json`. Members of a row lie together: one range read a row.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtpipe.manifests.canonical import canonical_json
from dtpipe.manifests.errors import DamagedDataError
from dtpipe.manifests.layout.arrays import (
    KEY,
    ArraySpec,
    EncodedObject,
    MembersBuilder,
    ShardArrays,
    check_arrays,
    stored_arrays,
)
from dtpipe.manifests.schema import IMAGE, IndexRow, Plan

_BLOCK = tarfile.BLOCKSIZE


def tar_object_name(shard_idx: int) -> str:
    """Object name of a shard's tar."""
    return f"data/{shard_idx:05d}.tar"


def encode_tar_shard(plan: Plan, shard_idx: int, arrays: ShardArrays) -> Iterator[EncodedObject]:
    """The one object of a shard; equal input gives equal bytes.

    Raises: ShapeError when the arrays are not those of the plan.
    """
    checked, specs = check_arrays(plan, shard_idx, arrays), stored_arrays(plan.recipe)
    tables = {name: MembersBuilder() for name in [KEY, *specs]}
    parts: list[bytes] = []
    offset = 0
    for idx, row in enumerate(arrays.rows):
        for array, suffix, data in _row_members(row, specs, {name: values[idx] for name, values in checked.items()}):
            tables[array].add(offset + _BLOCK, data)
            padded = data + bytes(-len(data) % _BLOCK)
            parts += [_header(f"{row.row:08d}.{suffix}", len(data)), padded]
            offset += _BLOCK + len(padded)
    parts.append(bytes(2 * _BLOCK))
    yield EncodedObject(
        tar_object_name(shard_idx), b"".join(parts), {name: table.table() for name, table in tables.items()}
    )


def _row_members(
    row: IndexRow, specs: dict[str, ArraySpec], values: dict[str, NDArray[np.generic]]
) -> Iterator[tuple[str, str, bytes]]:
    """Array, file suffix and bytes of each member of a row, in their order in the tar."""
    yield KEY, "key.json", encode_key(row)
    for name, spec in specs.items():
        if spec.num_views is None:
            yield name, f"{name}.png", _encode_png(values[name])
        else:
            for view_idx, chunk in enumerate(values[name]):
                yield name, f"{name}.v{view_idx}.npy", _encode_npy(chunk)


def encode_key(row: IndexRow) -> bytes:
    """What `key.json` holds of a row."""
    return canonical_json({"row": row.row, "key": row.key, "label": row.label, "ok": row.status == "ok"})


def _header(name: str, size: int) -> bytes:
    """A ustar header without times, owners or anything else that is not content."""
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    return member.tobuf(tarfile.USTAR_FORMAT)


def _encode_png(image: NDArray[np.generic]) -> bytes:
    sink = io.BytesIO()
    Image.fromarray(image).save(
        sink, "PNG", compress_level=1
    )  # on photographs half the time of the default, 3 % larger
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
    values = _read_png(chunk) if spec.name == IMAGE else _read_npy(chunk)
    if values.shape != spec.chunk_shape or values.dtype != spec.dtype:
        raise DamagedDataError(f"it holds {values.dtype}{list(values.shape)}, not {spec.dtype}{list(spec.chunk_shape)}")
    out[...] = values


def _read_png(chunk: bytes) -> NDArray[np.generic]:
    try:
        with Image.open(io.BytesIO(chunk), formats=["PNG"]) as image:
            return np.asarray(image)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as err:
        raise DamagedDataError(f"it is no PNG ({err})") from err


def _read_npy(chunk: bytes) -> NDArray[np.generic]:
    try:
        return np.asarray(np.lib.format.read_array(io.BytesIO(chunk), allow_pickle=False))
    except (ValueError, EOFError) as err:
        raise DamagedDataError(f"it is no npy ({err})") from err
