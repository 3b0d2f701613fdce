"""The zarr store: one zarr v3 array per stored array, one zarr shard of it per dtpipe shard, one chunk per row and
view.

One rule: any zarr v3 reader must read what is written here. Shards are put together by hand, because their bytes must
follow from the content alone and because each chunk's place and checksum goes into the shard's entry: chunks in (row,
view) order, each zstd (unless the recipe says 0) or rans and then crc32c, and the shard's index with its own crc32c at
the end. What is under rans needs our codec, which zarr-python finds where dtpipe is installed.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numcodecs.zstd import Zstd
from numpy.typing import NDArray

from dtpipe.manifests.codecs.base import FittedArrays
from dtpipe.manifests.codecs.fitted import NOT_FITTED, StoredFitted
from dtpipe.manifests.codecs.rans_tables import tables_to_json
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
from dtpipe.manifests.layout.symbols import decode_symbols, encode_symbols
from dtpipe.manifests.schema import Plan, Recipe
from dtpipe.manifests.store.store import Store

ROOT = "data.zarr"
PREDICTED_CODEC = "dtpipe.predicted"  # `zarr_codecs` has these for zarr-python
RANS_CODEC = "dtpipe.rans"
TRAILER_BYTES = 4  # the stored crc32c behind each chunk
SLOT_BYTES = 16  # of the index: where a chunk lies
_EMPTY = np.uint64(2**64 - 1)  # index mark of a chunk beyond the last row


def shard_object_name(spec: ArraySpec, shard_idx: int) -> str:
    """Object name of one array's zarr shard."""
    return "/".join([ROOT, spec.name, "c", str(shard_idx), *["0"] * (len(spec.shape(1)) - 1)])


def encode_zarr_rows(recipe: Recipe, arrays: ShardArrays, fitted: FittedArrays) -> CodedRows:
    """The chunks of some rows; equal input gives equal bytes. Raises: as `check_arrays`."""
    specs = stored_arrays(recipe, fitted)
    checked = check_arrays(specs, arrays)
    return CodedRows(arrays.rows, {name: _encode_array(spec, checked[name]) for name, spec in specs.items()})


def _encode_array(spec: ArraySpec, values: NDArray[np.generic]) -> list[Chunk]:
    chunks = values.reshape(-1, *spec.chunk_shape)
    if spec.tables is not None:
        return [Chunk.of(encode_symbols(spec, chunk)) for chunk in chunks]
    if spec.image_coding == "predicted":
        from dtpipe.manifests.layout.prediction import predicted

        chunks = predicted(chunks.astype(np.uint8, copy=False))
    if spec.zstd_level == 0:
        return [Chunk.of(chunk.tobytes()) for chunk in chunks]
    zstd = Zstd(level=spec.zstd_level, checksum=False)
    return [Chunk.of(bytes(zstd.encode(chunk))) for chunk in chunks]


def join_zarr_rows(plan: Plan, shard_idx: int, parts: Sequence[CodedRows]) -> Iterator[EncodedObject]:
    """The objects of one shard, array by array, from all its rows in order. Raises: as `check_rows`."""
    check_rows(plan, shard_idx, [row for part in parts for row in part.rows])
    for name, spec in stored_arrays(plan.recipe).items():
        chunks = [chunk for part in parts for chunk in part.chunks[name]]
        num_slots = plan.recipe.shard.samples * spec.chunks_per_row
        yield _join_array(name, chunks, num_slots, shard_object_name(spec, shard_idx))


def empty_zarr_bytes(recipe: Recipe) -> int:
    """Of a shard beside its chunks: a slot for each that it may have."""
    slots = [recipe.shard.samples * spec.chunks_per_row for spec in stored_arrays(recipe).values()]
    return sum(SLOT_BYTES * num_slots + TRAILER_BYTES for num_slots in slots)


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
    if spec.tables is not None:
        out[...] = decode_symbols(spec, chunk)
        return
    try:
        plain = Zstd().decode(chunk) if spec.zstd_level else chunk
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
    """Write the zarr.json files of group and arrays where they are not as they should be; what levels were fitted with
    is there.
    """
    for name, data in zarr_metadata(plan, StoredFitted(store)).items():
        try:
            intact = store.read(name) == data
        except MissingObjectError:
            intact = False
        if not intact:
            store.write(name, data)


def zarr_metadata_names(plan: Plan) -> list[str]:
    """Object names of the zarr.json documents; none in another store."""
    arrays = stored_arrays(plan.recipe) if plan.recipe.shard.format == "zarr" else None
    return [] if arrays is None else [f"{ROOT}/zarr.json", *(f"{ROOT}/{name}/zarr.json" for name in arrays)]


def zarr_metadata(plan: Plan, fitted: FittedArrays = NOT_FITTED) -> dict[str, bytes]:
    """The zarr.json documents by object name; they follow from the plan and what it names."""
    return {name: zarr_document(plan, name, fitted) for name in zarr_metadata_names(plan)}


def zarr_document(plan: Plan, name: str, fitted: FittedArrays) -> bytes:
    """One of them, as the zarr v3 specification has it. Raises: as `FittedArrays.load`, where it holds tables."""
    document: dict[str, Any] = {"zarr_format": 3, "node_type": "group", "attributes": {"format": plan.format}}
    if name != f"{ROOT}/zarr.json":
        array = name.removeprefix(f"{ROOT}/").removesuffix("/zarr.json")
        document = _array_document(stored_arrays(plan.recipe, fitted)[array], plan)
    return (json.dumps(document, indent=2) + "\n").encode()


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
        "codecs": [_sharding(spec, [*row_axes, *spec.chunk_shape])],
        "dimension_names": axes,
        "attributes": {},
        "storage_transformers": [],
    }


_LITTLE: dict[str, Any] = {"name": "bytes", "configuration": {"endian": "little"}}


def _sharding(spec: ArraySpec, chunk_shape: list[int]) -> dict[str, Any]:
    checksum = {"name": "crc32c"}
    configuration = {
        "chunk_shape": chunk_shape,
        "codecs": [*_inner_codecs(spec), checksum],
        "index_codecs": [_LITTLE, checksum],
        "index_location": "end",
    }
    return {"name": "sharding_indexed", "configuration": configuration}


def _inner_codecs(spec: ArraySpec) -> list[dict[str, Any]]:
    """Of a chunk, without its checksum."""
    if spec.tables is not None:
        return [{"name": RANS_CODEC, "configuration": tables_to_json(spec.tables())}]
    filters = [{"name": PREDICTED_CODEC}] if spec.image_coding == "predicted" else []
    zstd = {"name": "zstd", "configuration": {"level": spec.zstd_level, "checksum": False}}
    to_bytes = _LITTLE if spec.dtype.itemsize > 1 else {"name": "bytes"}
    return [*filters, to_bytes, *([zstd] if spec.zstd_level else [])]
