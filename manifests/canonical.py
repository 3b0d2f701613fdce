"""JSON whose bytes are fixed by its value, and documents sealed by a checksum.

One rule: whatever dtpipe writes as JSON beside the data is sealed. Reading it again serialises the parsed value and
compares bytes, so that no flipped byte survives, not even in white space.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from blake3 import blake3
from pydantic import BaseModel, ValidationError
from pydantic_core import PydanticSerializationError

from dtpipe.manifests.errors import ManifestError
from dtpipe.manifests.schema import FORMAT, FORMATS

CHECKSUM = "checksum"
_Record = TypeVar("_Record", bound=BaseModel)


def blake3_hex(data: bytes) -> str:
    """blake3 of bytes as 64 hexadecimal digits."""
    return blake3(data).hexdigest()


def canonical_json(value: object) -> bytes:
    """The one JSON text of a value: sorted keys, no spaces, UTF-8.

    Raises: ManifestError for what JSON cannot hold faithfully: NaN, infinities, keys that are no text, lone surrogates.
    """
    _refuse_other_keys(value)
    return _canonical(value)


def seal(document: BaseModel | Mapping[str, Any]) -> bytes:
    """A pretty JSON document that ends in `checksum`, the blake3 of the canonical JSON of all else."""
    value = _plain(document) if isinstance(document, BaseModel) else dict(document)
    assert CHECKSUM not in value, "a sealed document may not have a field `checksum`"
    _refuse_other_keys(value)
    return _sealed(value)


def unseal(data: bytes, where: str) -> dict[str, Any]:
    """The value of a sealed document, without its checksum.

    Raises: ManifestError naming `where` when one byte differs from what `seal` wrote.
    """
    try:
        document = json.loads(data.decode(), parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as err:
        raise ManifestError(f"{where} is not readable as JSON ({err}); {_NEXT}") from err
    if not isinstance(document, dict) or CHECKSUM not in document:
        raise ManifestError(f"{where} has no checksum; {_NEXT}")
    value = {name: field for name, field in document.items() if name != CHECKSUM}
    try:
        intact = _sealed(value) == data
    except ManifestError:
        intact = False
    if not intact:
        raise ManifestError(f"{where} does not match its own checksum: bytes were changed; {_NEXT}")
    return value


def dump_record(record: BaseModel) -> bytes:
    """A record as a sealed document."""
    return seal(record)


def load_record(model: type[_Record], data: bytes, where: str) -> _Record:
    """A record from a sealed document.

    Raises: ManifestError naming `where` when the bytes were changed or are no record of this kind.
    """
    value = unseal(data, where)
    if (stated := value.get("format", FORMAT)) not in FORMATS:
        raise ManifestError(
            f"{where} has format {stated!r}, this dtpipe reads {' and '.join(map(repr, FORMATS))}; "
            "install the version that wrote it or a newer one"
        )
    try:
        return model.model_validate(value)
    except ValidationError as err:
        first = err.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "the document"
        raise ManifestError(f"{where} is no {model.__name__}: {field}: {first['msg']}; {_NEXT}") from err


_NEXT = "restore the file from a copy, or run `dtpipe verify --repair` on the dataset"


_ONE_LINE, _SORTED = (
    json.JSONEncoder(sort_keys=sort_keys, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    for sort_keys in (False, True)
)
_CONTAINERS, _SCALARS = (dict, list, tuple), frozenset({str, int, float, bool, type(None)})


def _plain(record: BaseModel) -> dict[str, Any]:
    try:
        return record.model_dump(mode="json")
    except (PydanticSerializationError, RecursionError) as err:
        raise _not_json(err) from err


def _sealed(value: dict[str, Any]) -> bytes:
    """As `seal`, of a value whose keys are text."""
    checksum = blake3_hex(_canonical(value))
    try:
        return (_pretty({**value, CHECKSUM: checksum}) + "\n").encode()
    except (ValueError, TypeError, RecursionError) as err:
        raise _not_json(err) from err


def _canonical(value: object) -> bytes:
    try:
        return _SORTED.encode(value).encode()
    except (ValueError, TypeError, RecursionError) as err:
        raise _not_json(err) from err


def _not_json(err: Exception) -> ManifestError:
    return ManifestError(f"a value cannot be stored as JSON: {err}; use text, finite numbers, lists and text keys")


def _refuse_other_keys(value: object) -> None:
    if isinstance(value, Mapping):
        for key, field in value.items():
            if not isinstance(key, str):
                raise ManifestError(f"JSON key {key!r} is not text; write it as text")
            _refuse_other_keys(field)
    elif isinstance(value, list | tuple):
        for field in value:
            if isinstance(field, dict | list | tuple):
                _refuse_other_keys(field)


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _pretty(value: object, indent: int = 0) -> str:
    """Indented JSON with flat lists, and flat items of lists, on one line: entries stay readable by eye."""
    if _is_flat(value) and not (isinstance(value, dict) and value):
        return _ONE_LINE.encode(value)
    pad, end = " " * (indent + 1), " " * indent
    if isinstance(value, dict):
        fields = [f"{pad}{_ONE_LINE.encode(name)}: {_pretty(field, indent + 1)}" for name, field in value.items()]
        return "{\n" + ",\n".join(fields) + f"\n{end}}}"
    assert isinstance(value, list | tuple)
    items = [pad + (_ONE_LINE.encode(item) if _is_flat(item) else _pretty(item, indent + 1)) for item in value]
    return "[\n" + ",\n".join(items) + f"\n{end}]"


def _is_flat(value: object) -> bool:
    """True for a scalar and for a container of scalars."""
    if not isinstance(value, _CONTAINERS):
        return True
    fields = value.values() if isinstance(value, dict) else value
    return _SCALARS.issuperset(map(type, fields)) or not any(isinstance(field, _CONTAINERS) for field in fields)
