"""Teachers of other packages, found by the entry point group `dtpipe.teachers`.

An entry point names a TeacherKind, a function that returns one, or a module that declares one as `KIND`. A plugin that
fails takes no other teacher with it: its name stays listed, with the reason.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from functools import lru_cache
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING

from dtpipe.extract.teachers.base import Matcher, Teacher, TeacherKind
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from dtpipe.extract.config import TeacherConfig

GROUP = "dtpipe.teachers"

_log = logging.getLogger(__name__)


def installed_kinds(known: frozenset[str]) -> dict[str, TeacherKind]:
    """The families of installed packages by kind, none of which may be one of `known`; a broken one is logged, once."""
    kinds: dict[str, TeacherKind] = {}
    for entry in sorted(entry_points(group=GROUP)):
        kind = _kind_of(entry, known.union(kinds))
        kinds.setdefault(kind.kind, kind)
    return {name: kind for name, kind in kinds.items() if name not in known}


@lru_cache
def _kind_of(entry: EntryPoint, known: frozenset[str]) -> TeacherKind:
    """One plugin's family, or in its place one that says why it cannot be used."""
    try:
        kind = _declared(entry)
        if kind.kind in known:
            raise ValueError(f"kind {kind.kind!r} is registered already")
        return replace(kind, matches=_guarded(kind, entry))
    except (Exception, SystemExit) as err:  # code of others raises anything
        reason = (
            f"teacher plugin {_package(entry)} ({entry.name} = {entry.value}) is broken: "
            f"{type(err).__name__}: {' '.join(str(err).split())}"
        )
        _log.warning("%s; mend or uninstall the package", reason)
        return _broken(entry.name, reason)


def _declared(entry: EntryPoint) -> TeacherKind:
    loaded = entry.load()
    if isinstance(loaded, ModuleType):
        loaded = getattr(loaded, "KIND", None)
    elif callable(loaded):
        loaded = loaded()
    if loaded is None:
        raise ValueError("it declares no teacher")
    if not isinstance(loaded, TeacherKind):
        raise TypeError(f"it gives a {type(loaded).__name__}, not a TeacherKind")
    return loaded


def _guarded(kind: TeacherKind, entry: EntryPoint) -> Matcher:
    """`matches` that cannot keep other families from being asked."""

    def matches(path: str) -> bool:
        try:
            return bool(kind.matches(path))
        except Exception as err:  # code of others raises anything
            message = "teacher plugin %s: matches(%r) of kind %s raised %s: %s"
            _log.warning(message, _package(entry), path, kind.kind, type(err).__name__, err)
            return False

    return matches


def _broken(name: str, reason: str) -> TeacherKind:
    def load(_config: TeacherConfig, _device: str) -> Teacher:
        raise TeacherError(f"{reason}; mend or uninstall the package")

    return TeacherKind(name, f"Nothing: {reason}.", Teacher, lambda _: False, load)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "of an unknown package"
