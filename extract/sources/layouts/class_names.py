"""Names of classes by number, from a text or JSON file, or as part of another document."""

from __future__ import annotations

import json
from typing import Any

from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import ClassTable


def parse_class_names(data: bytes, where: str) -> ClassTable:
    """Names of classes by number: lines of text, the first for 0; or JSON, as a list, number to name or name to number.

    Raises: InputError for what is none of these, a number without a name, or a name of two numbers.
    """
    try:
        text = data.decode("utf-8-sig")
        document = json.loads(text) if where.endswith(".json") else text.rstrip().splitlines()
    except (ValueError, RecursionError) as err:
        raise InputError(f"{where}: class names cannot be read ({err}); write a line for each class, 0 first") from err
    return names_of(document, where)


def names_of(document: Any, where: str) -> ClassTable:
    """Names of classes as a document states them. Raises: as `parse_class_names`."""
    try:
        names = [name.strip() for name in _by_number(document)]
    except ValueError as err:
        raise InputError(f"{where}: class names cannot be read ({err}); list them, that of class 0 first") from err
    if not names or not all(names):
        lacking = f"class {names.index('')} has none" if names else "it is empty"
        raise InputError(f"{where}: must name every class, and {lacking}; list the names, that of class 0 first")
    try:
        return ClassTable(tuple(names))
    except ConfigError as err:
        raise InputError(f"{where}: {err}") from err


def _by_number(document: Any) -> list[str]:
    if isinstance(document, list):
        return list(map(_name, document))
    if not isinstance(document, dict):
        raise ValueError("they are neither a list nor an object")
    if document and all(map(_is_whole, document.values())):
        document = {number: name for name, number in document.items()}
    by_number = {_number(number): _name(name) for number, name in document.items()}
    if len(by_number) < len(document) or set(by_number) != set(range(len(by_number))):
        raise ValueError("their numbers are not 0, 1, 2 .., each once")
    return [by_number[number] for number in range(len(by_number))]


def _name(value: object) -> str:
    """Raises: ValueError for what YAML and JSON do not read as text, such as `no` without quotes."""
    if not isinstance(value, str) and not _is_whole(value):
        raise ValueError(f"one of them is read as {value!r}, which is no text; put it in quotes")
    return str(value)


def _number(value: object) -> int:
    """Raises: ValueError for a date, a fraction or nothing in a number's place."""
    if not isinstance(value, str) and not _is_whole(value):
        raise ValueError(f"{value!r} stands where a class's number does")
    return int(str(value))


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
