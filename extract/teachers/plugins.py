"""Teachers of other packages, found by the entry point group `dtpipe.teachers`.

An entry point names a module that calls `register_teacher`, a function that does or returns a TeacherKind, or a
TeacherKind. A plugin that fails takes no other teacher with it: its name stays listed, with the reason.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from importlib.metadata import EntryPoint, entry_points
from types import ModuleType
from typing import TYPE_CHECKING

from dtpipe.extract.teachers.base import _KINDS, Matcher, Teacher, TeacherKind, register_teacher
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from dtpipe.extract.config import TeacherConfig

GROUP = "dtpipe.teachers"

_log = logging.getLogger(__name__)
_seen: set[EntryPoint] = set()


def load_plugins() -> None:
    """Register every installed plugin, once per process; a broken one is logged."""
    for entry in sorted(entry_points(group=GROUP)):
        if entry not in _seen:
            _seen.add(entry)  # first, since a plugin may ask for the registry while it loads
            _load(entry)


def _load(entry: EntryPoint) -> None:
    """Register one plugin's families, or in their place one that says why it cannot be used."""
    before = dict(_KINDS)
    try:
        _register(entry, before)
    except (Exception, SystemExit) as err:  # code of others raises anything
        _KINDS.clear()
        _KINDS.update(before)
        reason = f"teacher plugin {_package(entry)} ({entry.name} = {entry.value}) is broken: {type(err).__name__}: {' '.join(str(err).split())}"
        _log.warning("%s; mend or uninstall the package", reason)
        if entry.name not in before:
            register_teacher(_broken(entry.name, reason))


def _register(entry: EntryPoint, before: dict[str, TeacherKind]) -> None:
    found = entry.load()
    if callable(found):
        found = found()
    if isinstance(found, TeacherKind):
        register_teacher(found)
    elif found is not None and not isinstance(found, ModuleType):
        raise TypeError(f"it gives a {type(found).__name__}, not a TeacherKind")
    added = {name: kind for name, kind in _KINDS.items() if before.get(name) is not kind}
    if taken := sorted(before.keys() & added.keys()):
        raise ValueError(f"kind {taken[0]!r} is registered already")
    if not added:
        raise ValueError("it registers no teacher")
    for kind in added.values():
        register_teacher(replace(kind, matches=_guarded(kind, entry)))


def _guarded(kind: TeacherKind, entry: EntryPoint) -> Matcher:
    """`matches` that cannot keep other families from being asked."""

    def matches(path: str) -> bool:
        try:
            return bool(kind.matches(path))
        except Exception as err:  # code of others raises anything
            _log.warning(
                "teacher plugin %s: matches(%r) of kind %s raised %s: %s",
                _package(entry),
                path,
                kind.kind,
                type(err).__name__,
                err,
            )
            return False

    return matches


def _broken(name: str, reason: str) -> TeacherKind:
    def load(_config: TeacherConfig, _device: str) -> Teacher:
        raise TeacherError(f"{reason}; mend or uninstall the package")

    return TeacherKind(kind=name, reads=f"Nothing: {reason}.", matches=lambda _: False, load=load)


def _package(entry: EntryPoint) -> str:
    return f"{entry.dist.name} {entry.dist.version}" if entry.dist else "of an unknown package"
