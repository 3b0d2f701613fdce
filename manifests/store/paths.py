"""Which texts name a place on a disk and which a URL, and the spelling of it that means the same from any folder.

One rule: `~` is the home folder at the beginning of every path, wherever a path may be given; write `./~` for a folder
of that name.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

_FILE = ("file://", "local://")
_LOCAL = ("/", "./", "../", "~", *_FILE)
Names = TypeVar("Names", str, tuple[str, ...], None)


def is_url(text: str) -> bool:
    """True for `s3://bucket/photos`, and for chains of fsspec such as `simplecache::s3://..`; a folder may be called
    `a::b`.
    """
    if text.startswith(_LOCAL):
        return False
    protocol, chained, _ = text.partition("::")
    return "://" in text or (bool(chained) and _is_protocol(protocol) and not os.path.lexists(text))


def _is_protocol(name: str) -> bool:
    from fsspec import available_protocols

    return name in available_protocols()


def path_on_disk(text: str) -> Path | None:
    """The path from the root that a text names; None for a URL."""
    return None if is_url(text) else Path(_at_home(text)).absolute()


def _at_home(text: str) -> str:
    for prefix in _FILE:
        text = text.removeprefix(prefix)
    return os.path.expanduser(text)  # noqa: PTH111  pathlib takes `./~` for `~`, and fails where there is no such user


def _each(change: Callable[[str], str]) -> Callable[[Names], Names]:
    """A check of a field of settings that may name one place, several or none."""

    def changed(names: Names) -> Names:
        if isinstance(names, tuple):
            return tuple(map(_checked, names))
        return None if names is None else _checked(names)

    def _checked(text: str) -> str:
        whole = change(text)
        refuse_unwritable(whole)
        return whole

    return changed


def refuse_unwritable(text: str) -> None:
    """Raises: ValueError for a path that no settings file can hold: a clause to stand after the setting's name."""
    if "\0" in text:
        raise ValueError(f" is {text!r}; no path has a NUL in it")
    try:
        text.encode()
    except UnicodeEncodeError as err:
        shown = os.fsencode(text).decode("utf-8", "backslashreplace")
        raise ValueError(f" is {shown}, which is not UTF-8; rename it, or make a link to it with another name") from err


def _whole(text: str) -> str:
    return text if is_url(text) else os.path.abspath(_at_home(text))  # noqa: PTH100  drops `..`, follows no links


def _whole_if_there(text: str) -> str:
    path = _at_home(text)
    return os.path.abspath(path) if "\0" not in path and os.path.lexists(path) else path  # noqa: PTH100


def _local(text: str) -> str:
    if is_url(text):
        raise ValueError(f" is {text}; write into a local or mounted folder, and copy from there")
    return _at_home(text)


whole_place = _each(_whole)
"""A local path from the root, be it a pattern or a folder in an archive; a URL as it is."""
whole_if_there = _each(_whole_if_there)
"""An existing local path from the root; a name that is no path, or a URL, as it is."""
local_place = _each(_local)
"""A path on a local disk, as it was given but for `~`."""
any_place = _each(lambda text: text if is_url(text) else _at_home(text))
"""A path as it was given but for `~`, or a URL."""
