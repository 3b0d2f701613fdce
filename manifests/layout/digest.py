"""The digest of a dataset's content: equal for any number of workers and after kills.

One rule: it is the blake3 of one canonical JSON document, which is put together here piece by piece from columns,
because ten million keys need not be Python strings for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from blake3 import blake3

from dtpipe.manifests.canonical import canonical_json
from dtpipe.manifests.schema import BatchRange, Recipe

_PIECE = 1 << 16  # items put together at a time
_QUOTE, _BACKSLASH, _SPACE = b'"\\ '  # JSON escapes the first two, and all that comes before a space


def dataset_digest(
    recipe: Recipe,
    keys: pa.ChunkedArray | Sequence[str],
    objects: pa.Table,
    batch_sizes: Sequence[BatchRange] = (),
) -> str:
    """Digest of `{format, recipe, keys, objects: [{name, size, blake3}] by name}`, and of `batch_sizes` where there are
    any.

    `keys` by row; `objects` with the columns `name`, `size_bytes` and `blake3` of shards.parquet, in any order. Times,
    hosts, URIs and versions stay out.
    """
    texts = keys if isinstance(keys, pa.ChunkedArray) else pa.chunked_array([pa.array(keys, pa.string())])
    digest = blake3()
    for piece in _document(recipe, texts, objects.select(["name", "size_bytes", "blake3"]), batch_sizes):
        digest.update(piece)
    return digest.hexdigest()


def _document(
    recipe: Recipe, keys: pa.ChunkedArray, objects: pa.Table, batch_sizes: Sequence[BatchRange]
) -> Iterator[bytes]:
    """The canonical JSON: fields in alphabetical order."""
    lower = [same.model_dump(mode="json") for same in batch_sizes]
    yield b'{"batch_sizes":' + canonical_json(lower) + b"," if lower else b"{"
    yield b'"format":' + canonical_json(recipe.format) + b',"keys":['
    yield from _joined(_quoted(piece) for piece in _pieces(keys))
    yield b'],"objects":['
    ordered = objects.sort_by([(name, "ascending") for name in ("name", "size_bytes", "blake3")])
    yield from _joined(_listed(piece) for piece in ordered.to_batches(max_chunksize=_PIECE))
    yield b'],"recipe":' + canonical_json(recipe.model_dump(mode="json")) + b"}"


def _pieces(column: pa.ChunkedArray) -> Iterator[pa.Array]:
    for chunk in column.iterchunks():
        for first in range(0, len(chunk), _PIECE):
            yield chunk.slice(first, _PIECE)


def _joined(pieces: Iterator[bytes]) -> Iterator[bytes]:
    for idx, piece in enumerate(piece for piece in pieces if piece):
        yield b"," + piece if idx else piece


def _quoted(texts: pa.Array) -> bytes:
    """Texts as JSON, with commas between them."""
    if _needs_escapes(texts):
        return canonical_json(texts.to_pylist())[1:-1]
    return b'"' + _concatenated(texts, '","') + b'"' if len(texts) else b""


def _listed(objects: pa.RecordBatch) -> bytes:
    """Objects as JSON, with commas between them."""
    names, sizes, digests = (objects[name] for name in ("name", "size_bytes", "blake3"))
    if _needs_escapes(names):
        rows = zip(names.to_pylist(), sizes.to_pylist(), digests.to_pylist(), strict=True)
        return canonical_json([{"name": name, "size": size, "blake3": digest} for name, size, digest in rows])[1:-1]
    fields = ['{"blake3":"', digests, '","name":"', names, '","size":', sizes.cast(pa.string()), "}"]
    return _concatenated(pc.binary_join_element_wise(*fields, ""), ",") if len(names) else b""


def _needs_escapes(texts: pa.Array) -> bool:
    """True if JSON cannot hold these texts as they are."""
    _, offsets, data = texts.buffers()
    if not len(texts) or data is None:
        return False
    bounds = np.frombuffer(offsets, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    letters = np.frombuffer(data, np.uint8)[bounds[0] : bounds[-1]]
    return bool((letters < _SPACE).any() or (letters == _QUOTE).any() or (letters == _BACKSLASH).any())


def _concatenated(texts: pa.Array, between: str) -> bytes:
    whole = pa.ListArray.from_arrays(pa.array([0, len(texts)], pa.int32()), texts)
    return bytes(pc.binary_join(whole, between)[0].as_buffer())
