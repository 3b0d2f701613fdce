"""The names behind `dtpipe list`, read from the registries themselves."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable

from dtpipe.pipeline.resolve import load_document, preset_names

Rows = dict[str, str]


def _teachers() -> Rows:
    from dtpipe.extract.teachers.base import teacher_kinds

    return {name: kind.reads for name, kind in sorted(teacher_kinds().items())}


def _sources() -> Rows:
    from dtpipe.extract.sources import source_kinds

    return _texts(source_kinds())


def _codecs() -> Rows:
    from dtpipe.manifests import codec

    return _texts(codec.CODECS)


def _tasks() -> Rows:
    from dtpipe.pipeline.evaluate import TASKS

    return _texts(TASKS)


def _presets() -> Rows:
    return {name: f"settings for {', '.join(load_document(name))}" for name in preset_names()}


def _students() -> Rows:
    import timm

    return dict.fromkeys(timm.list_models(), "")


def _texts(registry: object) -> Rows:
    """Names and the first sentence that a registry holds about each."""
    if not isinstance(registry, dict):
        return dict.fromkeys(sorted(registry), "")  # type: ignore[call-overload]
    return {name: _text(entry) for name, entry in sorted(registry.items())}


def _text(entry: object) -> str:
    if isinstance(entry, str):
        return entry
    text = getattr(entry, "reads", None) or getattr(entry, "summary", None) or entry.__doc__ or ""
    return str(text).strip().splitlines()[0] if text else ""


_CATALOGUES: dict[str, Callable[[], Rows]] = {
    "teachers": _teachers,
    "sources": _sources,
    "codecs": _codecs,
    "tasks": _tasks,
    "presets": _presets,
    "students": _students,
}
KINDS = tuple(_CATALOGUES)


def catalogue(kind: str | None = None, match: str | None = None) -> dict[str, Rows]:
    """Names of one kind, or of every kind but students, each with a sentence; `match` is a shell pattern."""
    kinds = [kind] if kind else [name for name in KINDS if name != "students"]
    return {name: {key: text for key, text in _CATALOGUES[name]().items() if fnmatch.fnmatch(key, match or "*")} for name in kinds}
