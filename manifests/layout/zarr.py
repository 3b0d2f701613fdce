"""The zarr store: one zarr v3 array per stored array, one zarr shard of it per dtpipe shard, one chunk per row and
view.

One rule: any zarr v3 reader must read what is written here. Shards are put together by hand, because their bytes must
follow from the content alone and because each chunk's place and checksum goes into the shard's entry: chunks in (row,
view) order, each zstd (unless the recipe says 0) and then crc32c, and the shard's index with its own crc32c at the end.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from dtpipe.manifests.errors import DamagedDataError, MissingObjectError
from dtpipe.manifests.layout.arrays import (
    ArraySpec,
    Chunk,
    CodedRows,
    EncodedObject,
    MembersBuilder,
    ShardArrays,
    check_arrays,
    check_rows,
    crc32c,
    stored_arrays,
)
from dtpipe.manifests.schema import Plan, Recipe
from dtpipe.manifests.store.store import Store

ROOT = "data.zarr"
PREDICTED_CODEC = "dtpipe.predicted"  # `zarr_codecs` has it for zarr-python
TRAILER_BYTES = 4  # the stored crc32c behind each chunk
_EMPTY = np.uint64(2**64 - 1)  # index mark of a chunk beyond the last row


def shard_object_name(spec: ArraySpec, shard_idx: int) -> str:
    """Object name of one array's zarr shard."""
    return "/".join([ROOT, spec.name, "c", str(shard_idx), *["0"] * (len(spec.shape(1)) - 1)])


def encode_zarr_rows(recipe: Recipe, arrays: ShardArrays) -> CodedRows:
    """The chunks of some rows; equal input gives equal bytes. Raises: as `check_arrays`."""
    checked = check_arrays(recipe, arrays)
    chunks = {name: _encode_array(recipe, spec, checked[name]) for name, spec in stored_arrays(recipe).items()}
    return CodedRows(arrays.rows, chunks)


def _encode_array(recipe: Recipe, spec: ArraySpec, values: NDArray[np.generic]) -> list[Chunk]:
    chunks = values.reshape(-1, *spec.chunk_shape)
    if spec.image_coding == "predicted":
        from dtpipe.manifests.layout.prediction import predicted

        chunks = predicted(chunks.astype(np.uint8, copy=False))
    if not spec.zstd:
        return [Chunk.of(chunk.tobytes()) for chunk in chunks]
    zstd = Zstd(level=_zstd_level(recipe, spec), checksum=False)
    return [Chunk.of(bytes(zstd.encode(chunk))) for chunk in chunks]


def _zstd_level(recipe: Recipe, spec: ArraySpec) -> int:
    """Of residuals 1: they repeat by chance only, and higher levels, which look for it, make them larger."""
    return 1 if spec.image_coding == "predicted" else recipe.codec.zstd_level


def join_zarr_rows(plan: Plan, shard_idx: int, parts: Sequence[CodedRows]) -> Iterator[EncodedObject]:
    """The objects of one shard, array by array, from all its rows in order. Raises: as `check_rows`."""
    check_rows(plan, shard_idx, [row for part in parts for row in part.rows])
    for name, spec in stored_arrays(plan.recipe).items():
        chunks = [chunk for part in parts for chunk in part.chunks[name]]
        num_slots = plan.recipe.shard.samples * spec.chunks_per_row
        yield _join_array(name, chunks, num_slots, shard_object_name(spec, shard_idx))


def _join_array(array: str, chunks: Sequence[Chunk], num_slots: int, name: str) -> EncodedObject:
    index = np.full((num_slots, 2), _EMPTY, dtype="<u8")
    members, pieces, offset = MembersBuilder(), list[bytes](), 0
    for slot, chunk in enumerate(chunks):
        members.add(offset, chunk)
        pieces += [chunk.data, _trailer(chunk.crc32c)]
        index[slot] = offset, len(chunk.data) + TRAILER_BYTES
        offset += len(chunk.data) + TRAILER_BYTES
    table = index.tobytes()
    return EncodedObject(name, (*pieces, table, _trailer(crc32c(table))), {array: members.table()})


def _trailer(checksum: int) -> bytes:
    return checksum.to_bytes(TRAILER_BYTES, "little")


def decode_zarr_chunk(spec: ArraySpec, chunk: bytes, trailer: bytes, out: NDArray[np.generic]) -> None:
    """Decode one chunk into `out`, a contiguous array of the chunk's shape and dtype. `chunk` was compared with its
    entry.

    Raises: DamagedDataError when the stored checksum or the content does not fit; the caller adds the place.
    """
    if trailer != _trailer(crc32c(chunk)):
        raise DamagedDataError("its stored checksum differs")
    try:
        plain = Zstd().decode(chunk) if spec.zstd else chunk
    except RuntimeError as err:
        raise DamagedDataError(f"it is no zstd frame ({err})") from err
    if len(plain) != out.nbytes:
        raise DamagedDataError(
            f"it holds {len(plain)} bytes, not the {out.nbytes} of {spec.dtype}{list(spec.chunk_shape)}"
        )
    out[...] = np.frombuffer(plain, spec.dtype).reshape(spec.chunk_shape)
    if spec.image_coding == "predicted":
        from dtpipe.manifests.layout.prediction import restore

        restore(out[None].view(np.uint8))


def write_zarr_metadata(store: Store, plan: Plan) -> None:
    """Write the zarr.json files of group and arrays where they are not as they should be."""
    for name, data in zarr_metadata(plan).items():
        try:
            intact = store.read(name) == data
        except MissingObjectError:
            intact = False
        if not intact:
            store.write(name, data)


def zarr_metadata(plan: Plan) -> dict[str, bytes]:
    """The zarr.json documents by object name, as the zarr v3 specification has them; they follow from the plan."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": {"format": plan.format}}
    documents: dict[str, dict[str, Any]] = {f"{ROOT}/zarr.json": group}
    for name, spec in stored_arrays(plan.recipe).items():
        documents[f"{ROOT}/{name}/zarr.json"] = _array_document(spec, plan)
    return {name: (json.dumps(document, indent=2) + "\n").encode() for name, document in documents.items()}


def _array_document(spec: ArraySpec, plan: Plan) -> dict[str, Any]:
    row_axes, samples = (1,) * (len(spec.shape(1)) - len(spec.chunk_shape)), plan.recipe.shard.samples
    axes = ["row", *(["view"] if spec.num_views else []), *spec.chunk_axes]
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(spec.shape(plan.num_rows)),
        "data_type": spec.dtype.name,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(spec.shape(samples))}},
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
        "fill_value": 0.0 if spec.dtype.kind == "f" else 0,
        "codecs": [_sharding(spec, [*row_axes, *spec.chunk_shape], _zstd_level(plan.recipe, spec))],
        "dimension_names": axes,
        "attributes": {},
        "storage_transformers": [],
    }


def _sharding(spec: ArraySpec, chunk_shape: list[int], zstd_level: int) -> dict[str, Any]:
    little: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}
    filters = [{"name": PREDICTED_CODEC}] if spec.image_coding == "predicted" else []
    zstd = [{"name": "zstd", "configuration": {"level": zstd_level, "checksum": False}}] if spec.zstd else []
    checksum = {"name": "crc32c"}
    configuration = {
        "chunk_shape": chunk_shape,
        "codecs": [*filters, little if spec.dtype.itemsize > 1 else {"name": "bytes"}, *zstd, checksum],
        "index_codecs": [little, checksum],
        "index_location": "end",
    }
    return {"name": "sharding_indexed", "configuration": configuration}
