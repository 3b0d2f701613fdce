"""The names behind `dtpipe list`, read from the registries themselves."""

from __future__ import annotations

import fnmatch
import importlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from dtpipe.pipeline.cli.console import format_bytes
from dtpipe.pipeline.cli.settings import preset_names, preset_summary

if TYPE_CHECKING:
    from dtpipe.extract.teachers.base import TeacherKind
    from dtpipe.extract.teachers.files.published import PublishedTeacher

Sentences = dict[str, str]  # by name


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

    @property
    def here(self) -> str:
        return "yes" if self.cached else ""

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


def teacher_options() -> dict[str, str]:
    """What `extract.teacher.options` may hold, by family, with defaults."""
    from dtpipe.extract.teachers.registry import teacher_kinds

    return {name: _options(kind) for name, kind in sorted(teacher_kinds().items()) if kind.options.model_fields}


def _options(kind: TeacherKind) -> str:
    """The family's own settings with their defaults."""
    fields = kind.options.model_fields.items()
    return ", ".join(
        name if field.is_required() else f"{name}={json.dumps(field.default, default=str)}" for name, field in fields
    )


def _presets() -> Sentences:
    return {name: preset_summary(name) for name in preset_names()}


def _students() -> Sentences:
    from dtpipe.distill.student.catalogue import stride_text, students

    return {name: stride_text(strides) for name, strides in students().items()}


def _teachers() -> Sentences:
    from dtpipe.extract.teachers.registry import teacher_kinds

    return {name: kind.reads for name, kind in sorted(teacher_kinds().items())}


def _sources() -> Sentences:
    from dtpipe.extract.sources.registry import SOURCES

    return {name: kind.reads for name, kind in sorted(SOURCES.items())}


def _layouts() -> Sentences:
    from dtpipe.extract.sources.layouts.registry import LAYOUTS

    return {name: layout.reads for name, layout in sorted(LAYOUTS.items())}


def _summaries(registry: str) -> Callable[[], Sentences]:
    """The sentences of a registry, `module:NAME`, which is imported when they are asked for."""

    def read() -> Sentences:
        module, _, name = registry.partition(":")
        entries = getattr(importlib.import_module(f"dtpipe.{module}"), name)
        return {key: entry.summary for key, entry in sorted(entries.items())}

    return read


_CATALOGUES: dict[str, Callable[[], Sentences]] = {
    "teachers": _teachers,
    "sources": _sources,
    "layouts": _layouts,
    "codecs": _summaries("manifests.codecs.registry:CODECS"),
    "tasks": _summaries("distill.downstream.registry:TASKS"),
    "presets": _presets,
    "regressors": _summaries("distill.student.regressors.registry:REGRESSORS"),
    "losses": _summaries("distill.losses.registry:LOSSES"),
    "exports": _summaries("distill.export.registry:EXPORTS"),
    "trackers": _summaries("distill.engine.trackers.registry:TRACKERS"),
    "students": _students,
}
LISTED = tuple(_CATALOGUES)


def catalogue(kind: str | None = None, match: str | None = None) -> dict[str, Sentences]:
    """Names of one kind, or of every kind but students, each with a sentence; `match` is a shell pattern."""
    kinds = [kind] if kind else [name for name in LISTED if name != "students"]
    return {
        name: {key: text for key, text in _CATALOGUES[name]().items() if fnmatch.fnmatch(key, match or "*")}
        for name in kinds
    }
