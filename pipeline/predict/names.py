"""File names of keys: every key has one of its own, below the folder it is put into, whatever characters it has."""

from __future__ import annotations

from blake3 import blake3

_LONGEST = 200  # bytes of a name; most file systems take 255
_HARMLESS = frozenset(" !#$&'()+,-.;=@[]^_`{}~")
_EMPTY = "%_"  # unlike any character that is encoded


def path_of_key(key: str, ending: str) -> str:
    """A relative path for a key: its folders stay folders, its ending stays, and `ending` is added.

    What no name may hold is percent-encoded, `%` itself too; long names end in a digest. A folder never ends as the
    files do, so that `a.png` beside `a.png/b` is no trouble.
    """
    *folders, name = key.split("/")
    return "/".join([*(_folder(part, ending) for part in folders), f"{_short(_encoded(name), len(ending))}{ending}"])


def _folder(part: str, ending: str) -> str:
    encoded = _encoded(part)
    if encoded.lower().endswith(ending.lower()):
        encoded = f"{encoded[: -len(ending)]}%2E{encoded[len(encoded) - len(ending) + 1 :]}"
    return _short(encoded)


def _encoded(part: str) -> str:
    if part in ("", ".", ".."):
        return _EMPTY if not part else part.replace(".", "%2E")
    return "".join(char if char.isalnum() or char in _HARMLESS else _percent(char) for char in part)


def _percent(char: str) -> str:
    return "".join(f"%{byte:02X}" for byte in char.encode("utf-8", "surrogateescape"))


def _short(name: str, more: int = 0) -> str:
    if len(name.encode()) + more <= _LONGEST:
        return name
    return f"{name.encode()[:100].decode(errors='ignore')}%~{blake3(name.encode()).hexdigest()[:32]}"
