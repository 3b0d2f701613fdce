"""Files, JSON and YAML that others wrote: read whole, or refused in one sentence of the caller's own kind of error.

One rule: whatever lies there (a folder, a link into nothing, lists within lists without end, a number of 5,000
digits), a value or that error comes back.
"""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from dtpipe.manifests.errors import DtpipeError

_DEEPEST = 100  # lists and mappings within each other
_MOST_BITS = 64  # of an integer
_MOST_NODES = 200_000  # of YAML, each counted as often as it is named
_TOO_DEEP = "nests lists or mappings too deep"


@dataclass(frozen=True)
class Refusal:
    """How a caller says no: the kind of error, and what to do next."""

    error: type[DtpipeError]
    advice: str

    def of(self, where: object, what: str) -> DtpipeError:
        """The error; `what` is wrong, as in `is a folder`."""
        return self.error(f"{where}: {what}; {self.advice}")


def _read_bytes(path: Path, refusal: Refusal, where: str | None = None) -> bytes:
    """All bytes of a file; `where` is how messages name it. Raises: the refusal."""
    try:
        return path.read_bytes()
    except (OSError, ValueError) as err:  # the latter: a name with a NUL
        raise refusal.of(where or path, why_not_read(path, err)) from err


def read_utf8(path: Path, refusal: Refusal, where: str | None = None) -> str:
    """A file as UTF-8. Raises: the refusal."""
    try:
        return _read_bytes(path, refusal, where).decode()
    except UnicodeDecodeError as err:
        raise refusal.of(where or path, f"is no UTF-8 text (byte {err.start})") from err


def parse_json(text: str, where: object, refusal: Refusal) -> Any:
    """A value from JSON. Raises: the refusal."""
    try:
        value = json.loads(text)
    except RecursionError as err:
        raise refusal.of(where, _TOO_DEEP) from err
    except ValueError as err:
        raise refusal.of(where, f"is not readable as JSON ({err})") from err
    if problem := _problem(value):
        raise refusal.of(where, problem)
    return value


def read_object(path: Path, refusal: Refusal) -> dict[str, Any]:
    """The value of a JSON file that holds an object. Raises: the refusal."""
    value = parse_json(read_utf8(path, refusal), path, refusal)
    if not isinstance(value, dict):
        raise refusal.of(path, f"holds a JSON {type(value).__name__}, not an object")
    return value


def why_not_read(path: Path, err: Exception) -> str:
    """What is the matter with a file that could not be opened: a clause to stand after its name."""
    code = getattr(err, "errno", None)
    if code == errno.EISDIR:
        return "is a folder, not a file"
    if code == errno.ELOOP:
        return "is a link that leads back to itself"
    if code == errno.ENOENT and path.is_symlink():
        return f"is a link to {path.readlink()}, which is not there"
    if code in (errno.ENOENT, errno.ENOTDIR):
        return "there is no such file"
    if code is None and "null byte" in str(err):
        return "no file has a NUL in its name"
    return f"cannot be read ({getattr(err, 'strerror', None) or err})"


def what_lies_at(path: Path) -> str | None:
    """What lies in a file's place that is none: a clause to stand after its name; None for a file, or nothing."""
    if path.is_symlink():
        try:
            path.stat()
        except OSError as err:
            return why_not_read(path, err)
    return "is a folder, not a file" if path.is_dir() else None


def _problem(value: object) -> str | None:
    """What keeps a value from being worked on: depth, numbers beyond 64 bits, text that is no Unicode."""
    left = [(value, 0)]
    while left:
        item, depth = left.pop()
        if isinstance(item, dict | list):
            if depth == _DEEPEST:
                return _TOO_DEEP
            parts = [*item, *item.values()] if isinstance(item, dict) else item
            left += [(part, depth + 1) for part in parts]
        elif isinstance(item, int) and item.bit_length() > _MOST_BITS:
            return f"holds a number of {item.bit_length()} bits, more than any setting or count has"
        elif isinstance(item, str) and not _is_unicode(item):
            return f"holds text that is no Unicode, {item[:40]!r}"
    return None


def _is_unicode(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


# --- YAML ------------------------------------------------------------------------------------------------------------


class _Loader(yaml.SafeLoader):
    """YAML whose `4e-3` is a number, as everyone expects, and not the text that YAML 1.1 makes of it."""

    def fetch_flow_collection_start(self, TokenClass: type[yaml.Token]) -> None:  # noqa: N803  PyYAML's signature
        """As PyYAML's, which takes seconds over a thousand open brackets."""
        if self.flow_level > _DEEPEST:
            raise RecursionError
        super().fetch_flow_collection_start(TokenClass)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789")
)


def parse_yaml(text: str, where: object, refusal: Refusal) -> Any:
    """A value from YAML; keys that come twice are refused too. Raises: the refusal."""
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        problem = node and _node_problem(node)
        value = loader.construct_document(node) if node and not problem else None
    except RecursionError as err:
        raise refusal.of(where, _TOO_DEEP) from err
    except yaml.YAMLError as err:
        raise refusal.of(where, f"not valid YAML{_line(getattr(err, 'problem_mark', None))}") from err
    except Exception as err:  # PyYAML lets through what int, float and dates raise, and KeyError of its own tables
        raise refusal.of(where, f"holds a value that cannot be read ({str(err).partition(';')[0]})") from err
    if problem := problem or _problem(value):
        raise refusal.of(where, problem)
    return value


def _line(mark: yaml.Mark | None) -> str:
    return f" in line {mark.line + 1}" if mark else ""


def _node_problem(root: yaml.Node) -> str | None:
    """What keeps a document from being built: depth, anchors that hold themselves or multiply, keys that come twice."""
    sizes: dict[int, int] = {}
    open_nodes: set[int] = set()

    def problem_of(node: yaml.Node, depth: int) -> str | None:
        if id(node) in open_nodes:
            return f"an anchor{_line(node.start_mark)} holds itself"
        if id(node) in sizes:
            return None
        if depth > _DEEPEST:
            return _TOO_DEEP
        open_nodes.add(id(node))
        parts = list(_parts(node))
        for part in parts:
            if problem := problem_of(part, depth + 1):
                return problem
        open_nodes.remove(id(node))
        sizes[id(node)] = 1 + sum(sizes[id(part)] for part in parts)
        if sizes[id(node)] > _MOST_NODES:
            return f"its anchors come to more than {_MOST_NODES} values"
        return _own_problem(node)

    return problem_of(root, 0)


def _parts(node: yaml.Node) -> Iterator[yaml.Node]:
    if isinstance(node, yaml.SequenceNode):
        yield from node.value
    elif isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield from (key, value)


def _own_problem(node: yaml.Node) -> str | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    seen: set[str] = set()
    for key, _ in node.value:
        if isinstance(key, yaml.ScalarNode) and key.value in seen:
            return f"key {key.value!r} comes twice, again{_line(key.start_mark)}"
        seen.add(str(key.value))
    return None
