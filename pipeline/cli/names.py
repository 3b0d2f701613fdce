"""The names behind `dtpipe list`, read from the registries themselves."""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dtpipe.pipeline.cli.console import format_bytes
from dtpipe.pipeline.cli.settings import preset_names, preset_summary

if TYPE_CHECKING:
    from dtpipe.extract.teachers.base import TeacherKind
    from dtpipe.extract.teachers.files.published import PublishedTeacher

Rows = dict[str, str]


@dataclass(frozen=True)
class Published:
    """One checkpoint that can be named instead of given by path."""

    name: str
    kind: str
    px: tuple[int, int]
    levels: str
    size_bytes: int  # of one view's float16 levels and the uint8 image
    licence: str
    url: str
    cached: bool

    @property
    def size(self) -> str:
        return format_bytes(self.size_bytes)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def published(match: str | None = None) -> list[Published]:
    """Every published checkpoint of every family, by name; `match` is a shell pattern."""
    from dtpipe.extract.teachers.files.published import published_teachers

    teachers = (teacher for teacher in published_teachers() if fnmatch.fnmatch(teacher.name, match or "*"))
    return sorted(map(_published, teachers), key=lambda entry: entry.name)


def _published(teacher: PublishedTeacher) -> Published:
    from dtpipe.extract.teachers.files.published import cached_file

    levels = ", ".join(f"{name} {channels}" for name, channels in teacher.levels.items())
    cached = cached_file(teacher) is not None
    return Published(
        teacher.name, teacher.kind, teacher.image_px, levels, _bytes(teacher), teacher.licence, teacher.url, cached
    )


def _bytes(teacher: PublishedTeacher) -> int:
    """Bytes of one image and its levels: channels * (height * width / 4^n) of l{n}, two bytes each."""
    height, width = teacher.image_px
    levels = ((int(name.removeprefix("l")), channels) for name, channels in teacher.levels.items())
    return 3 * height * width + sum(2 * channels * height * width // (1 << 2 * level) for level, channels in levels)


def _teachers() -> Rows:
    from dtpipe.extract.teachers.registry import teacher_kinds

    return _texts(teacher_kinds())


def teacher_options(match: str | None = None) -> dict[str, str]:
    """What `extract.teacher.options` may hold, by family, with defaults."""
    from dtpipe.extract.teachers.registry import teacher_kinds

    kinds = {name: kind for name, kind in sorted(teacher_kinds().items()) if fnmatch.fnmatch(name, match or "*")}
    return {name: _options(kind) for name, kind in kinds.items() if kind.options.model_fields}


def _options(kind: TeacherKind) -> str:
    """The family's own settings with their defaults."""
    fields = kind.options.model_fields.items()
    return ", ".join(
        name if field.is_required() else f"{name}={json.dumps(field.default, default=str)}" for name, field in fields
    )


def _sources() -> Rows:
    from dtpipe.extract.sources.registry import SOURCES

    return _texts(SOURCES)


def _codecs() -> Rows:
    from dtpipe.manifests.codecs.registry import CODECS

    return _texts(CODECS)


def _tasks() -> Rows:
    from dtpipe.distill.downstream.registry import TASKS

    return _texts(TASKS)


def _presets() -> Rows:
    return {name: preset_summary(name) for name in preset_names()}


def _students() -> Rows:
    from dtpipe.distill.student.catalogue import stride_text, students

    return {name: stride_text(strides) for name, strides in students().items()}


def _regressors() -> Rows:
    from dtpipe.distill.student.regressors.registry import REGRESSORS

    return _texts(REGRESSORS)


def _losses() -> Rows:
    from dtpipe.distill.losses.registry import LOSSES

    return _texts(LOSSES)


def _exports() -> Rows:
    from dtpipe.distill.export.registry import EXPORTS

    return _texts(EXPORTS)


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
    "regressors": _regressors,
    "losses": _losses,
    "exports": _exports,
    "students": _students,
}
KINDS = tuple(_CATALOGUES)


def catalogue(kind: str | None = None, match: str | None = None) -> dict[str, Rows]:
    """Names of one kind, or of every kind but students, each with a sentence; `match` is a shell pattern."""
    kinds = [kind] if kind else [name for name in KINDS if name != "students"]
    return {
        name: {key: text for key, text in _CATALOGUES[name]().items() if fnmatch.fnmatch(key, match or "*")}
        for name in kinds
    }
