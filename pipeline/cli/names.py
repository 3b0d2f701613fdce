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
    from dtpipe.extract.teachers.base import PublishedTeacher, TeacherKind

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


def published_teachers(match: str | None = None) -> list[Published]:
    """Every published checkpoint of every family, by name; `match` is a shell pattern."""
    from dtpipe.extract.teachers.base import teacher_kinds
    from dtpipe.extract.teachers.files.published import cached_file

    found = [
        Published(
            each.name,
            kind.kind,
            each.image_px,
            each.levels,
            _bytes(each),
            each.licence,
            each.url,
            cached_file(each) is not None,
        )
        for kind in teacher_kinds().values()
        for each in kind.published
    ]
    return sorted((each for each in found if fnmatch.fnmatch(each.name, match or "*")), key=lambda each: each.name)


def _bytes(published: PublishedTeacher) -> int:
    """Bytes of one image and its levels, `l2 256, l3 512`: channels * (height * width / 4^n), two bytes each."""
    height, width = published.image_px
    levels = (part.split() for part in published.levels.split(","))
    per_cell = [(int(name[1]), int(channels)) for name, channels in levels]
    return 3 * height * width + sum(2 * channels * height * width // (1 << 2 * level) for level, channels in per_cell)


def _teachers() -> Rows:
    from dtpipe.extract.teachers.base import teacher_kinds

    return _texts(teacher_kinds())


def teacher_options(match: str | None = None) -> dict[str, str]:
    """What `extract.teacher.options` may hold, by family, with defaults."""
    from dtpipe.extract.teachers.base import teacher_kinds

    kinds = {name: kind for name, kind in sorted(teacher_kinds().items()) if fnmatch.fnmatch(name, match or "*")}
    return {name: _options(kind) for name, kind in kinds.items() if kind.options.model_fields}


def _options(kind: TeacherKind) -> str:
    """The family's own settings with their defaults."""
    fields = kind.options.model_fields.items()
    return ", ".join(
        name if field.is_required() else f"{name}={json.dumps(field.default, default=str)}" for name, field in fields
    )


def _sources() -> Rows:
    from dtpipe.extract.sources import source_kinds

    return _texts(source_kinds())


def _codecs() -> Rows:
    from dtpipe.manifests.codecs import base as codec

    return _texts(codec.CODECS)


def _tasks() -> Rows:
    from dtpipe.pipeline.evaluate import TASKS

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
