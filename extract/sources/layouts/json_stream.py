"""A large JSON document read entry by entry: what is not kept of it takes no memory."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Collection
from typing import Any

_WINDOW_BYTES = 1 << 20
_BEHIND = " \t\n\r,:]}"  # a value
_SPACE = re.compile(r"[ \t\n\r]*")


def read_entries(data: bytes, lists: Collection[str], take: Callable[[str, Any], None]) -> dict[str, bool]:
    """Hand each entry of some lists of an object to `take`, with the list's name, in the order of the file.

    Returns the names in the object, and whether each is one of `lists` that is a list.
    Raises: ValueError for what is no JSON, or a list that is there twice; TypeError for what is no object.
    """
    text, names = _Text(data), dict[str, bool]()
    if text.next() != "{":
        text.value()
        raise TypeError("is no object")
    text.skip("{")
    while text.next() != "}":
        if names:
            text.skip(",")
        name = text.value()
        if not isinstance(name, str):
            raise ValueError(f"{name!r} is no name")
        text.skip(":")
        if names.get(name):
            raise ValueError(f"{name} is there twice")
        names[name] = name in lists and text.next() == "["
        if names[name]:
            _read_list(text, name, take)
        else:
            text.value()
    text.skip("}")
    if text.next():
        raise ValueError(f"more follows the object, {text.next()!r} first")
    return names


def _read_list(text: _Text, name: str, take: Callable[[str, Any], None]) -> None:
    text.skip("[")
    first = True
    while text.next() != "]":
        if not first:
            text.skip(",")
        take(name, text.value())
        first = False
    text.skip("]")


class _Text:
    """The text of a document, decoded a window at a time."""

    def __init__(self, data: bytes) -> None:
        self._data, self._read = memoryview(data), 0
        self._decoder = codecs.getincrementaldecoder(json.detect_encoding(data))(errors="surrogatepass")
        self._text, self._place, self._before = "", 0, 0
        self._json = json.JSONDecoder()

    def next(self) -> str:
        """The next character that is no space; empty at the end."""
        while True:
            match = _SPACE.match(self._text, self._place)
            assert match is not None
            self._place = match.end()
            if self._place < len(self._text) or not self._more(_WINDOW_BYTES):
                return self._text[self._place : self._place + 1]

    def skip(self, char: str) -> None:
        """Raises: ValueError when another one is next."""
        if self.next() != char:
            raise ValueError(f"{self.next()!r} instead of {char!r} at character {self._before + self._place}")
        self._place += 1

    def value(self) -> Any:
        """The next value. Raises: ValueError."""
        self.next()
        size = _WINDOW_BYTES
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._place)
            except json.JSONDecodeError as err:
                if not self._more(size):
                    raise ValueError(f"{err.msg} at character {self._before + err.pos}") from err
            else:
                ends = end < len(self._text) and self._text[end] in _BEHIND
                if ends or not self._more(size):  # a number may go on in the next window
                    self._place = end
                    return value
            size *= 2

    def _more(self, size: int) -> bool:
        """Take in so many more bytes, and forget what was read; False at the end."""
        if self._read >= len(self._data):
            return False
        part = bytes(self._data[self._read : self._read + size])
        self._read += len(part)
        self._before += self._place
        fresh = self._decoder.decode(part, self._read >= len(self._data))
        self._text, self._place = self._text[self._place :] + fresh, 0
        return True
