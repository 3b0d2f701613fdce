"""Which columns of a Parquet schema hold the images, their paths and their labels, by what the schema itself says."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from dtpipe.manifests.errors import InputError

_IMAGE_NAMES = ("image", "img", "jpg", "png")  # in this order, where several columns could be the images
_LABEL_NAMES = ("label", "labels")


@dataclass(frozen=True)
class ParquetColumns:
    """Names of the columns to read, nested ones with a dot."""

    image: str
    path: str | None
    label: str | None
    label_names: tuple[str, ...] | None  # of Hugging Face's ClassLabel, by number
    texts: tuple[str, ...] = ()
    """Those of paths and labels that hold text."""
    unused_labels: str | None = None
    """Columns that seem to be labels and cannot be used, and why."""

    def label_of(self, value: object, where: str) -> object:
        """A label as it is or its name; None for a null, and for -1, which Hugging Face gives unlabelled rows.

        Raises: InputError for a number that has no name.
        """
        if self.label_names is None:
            return value
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if not isinstance(value, int):
            return value
        if value == -1:
            return None
        if not 0 <= value < len(self.label_names):
            raise InputError(
                f"{where}: label {value} is not among the {len(self.label_names)} names of column {self.label}; "
                f"mend the file"
            )
        return self.label_names[value]


def find_columns(where: str, schema: Any) -> ParquetColumns:
    """The columns of images, paths and labels.

    Images: a struct with binary `bytes`, else plain binary; of several, the one named image, img, jpg or png.
    Labels: the column `label` or `labels`, else the only ClassLabel; none unless it holds numbers, text or booleans.
    Raises: InputError when no column can be the images, or several can.
    """
    import pyarrow as pa

    features = _features(schema)
    image = _choose(where, image_columns(schema), schema)
    kind = schema.field(image).type
    path = f"{image}.path" if pa.types.is_struct(kind) and _is_text(kind, "path") else None
    label, unused = _label(schema, features)
    names = features.get(label, {}).get("names") if label else None
    return ParquetColumns(
        image=image_leaf(schema, image),
        path=path,
        label=label,
        label_names=tuple(map(str, names)) if isinstance(names, list) else None,
        texts=(*([path] if path else []), *([label] if label and _is_string(schema.field(label).type) else [])),
        unused_labels=unused,
    )


def image_columns(schema: Any) -> list[str]:
    """Names of the columns that could be the images, by their types."""
    import pyarrow as pa

    structs = [field.name for field in schema if pa.types.is_struct(field.type) and _has_bytes(field.type)]
    return structs or [field.name for field in schema if _is_binary(field.type)]


def image_leaf(schema: Any, column: str) -> str:
    """Where the bytes of a column of images lie."""
    import pyarrow as pa

    return f"{column}.bytes" if pa.types.is_struct(schema.field(column).type) else column


def _choose(where: str, candidates: list[str], schema: Any) -> str:
    if len(candidates) == 1:
        return candidates[0]
    named = [name for name in _IMAGE_NAMES if name in candidates]
    if named:
        return named[0]
    if candidates:
        raise InputError(
            f"{where}: columns {', '.join(candidates)} could all be the images; rename the right one to `image`"
        )
    columns = ", ".join(f"{field.name} ({field.type})" for field in schema)
    raise InputError(f"{where}: no column of images, only {columns}; they are a struct with `bytes`, or binary")


def _label(schema: Any, features: dict[str, dict[str, Any]]) -> tuple[str | None, str | None]:
    """The column of labels; without one, those that seem to be labels, and why they are none."""
    classes = [name for name, feature in features.items() if feature.get("_type") == "ClassLabel"]
    classes = [name for name in classes if name in schema.names]
    named = [name for name in _LABEL_NAMES if name in schema.names]
    candidates = [*named, *(classes if len(classes) == 1 else [])]
    usable = [name for name in candidates if _holds_classes(schema.field(name).type)]
    if usable:
        return usable[0], None
    if candidates:
        return None, f"of column {candidates[0]} ({schema.field(candidates[0]).type})"
    return None, f"of one of the columns {', '.join(classes)}: rename one to label" if classes else None


def _holds_classes(kind: Any) -> bool:
    import pyarrow.types as types

    kind = kind.value_type if types.is_dictionary(kind) else kind
    numbers = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind) or types.is_boolean(kind)
    return bool(numbers or _is_string(kind) or types.is_string_view(kind) or types.is_null(kind))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """Hugging Face's description of the columns; empty where there is none that can be read."""
    try:
        features = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))["info"]["features"]
        return {name: feature for name, feature in features.items() if isinstance(feature, dict)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return {}


def _has_bytes(struct: Any) -> bool:
    return any(
        struct.field(idx).name == "bytes" and _is_binary(struct.field(idx).type) for idx in range(struct.num_fields)
    )


def _is_string(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))


def _is_binary(kind: Any) -> bool:
    import pyarrow as pa

    return bool(pa.types.is_binary(kind) or pa.types.is_large_binary(kind))


def _is_text(struct: Any, name: str) -> bool:
    import pyarrow as pa

    return any(
        struct.field(idx).name == name and pa.types.is_string(struct.field(idx).type)
        for idx in range(struct.num_fields)
    )
