"""The teacher families there are, those of installed packages too, and the teacher that settings name.

A new family is a file that declares `KIND`, and a line here. Kind `auto` asks them in this order who reads a path.
"""

from __future__ import annotations

from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING

from dtpipe.extract.teachers import module, null
from dtpipe.extract.teachers.base import Teacher, TeacherKind, parse_options
from dtpipe.extract.teachers.biggan import icgan
from dtpipe.extract.teachers.biggan import teacher as biggan
from dtpipe.extract.teachers.diffusion import ddpm
from dtpipe.extract.teachers.diffusion.adm import teacher as adm
from dtpipe.extract.teachers.files.published import FILE_ENDINGS, find_published, locate, published_teachers
from dtpipe.extract.teachers.files.refusals import disguise_of
from dtpipe.extract.teachers.plugins import installed_kinds
from dtpipe.extract.teachers.stable_diffusion import teacher as stable_diffusion
from dtpipe.extract.teachers.stylegan2 import teacher as stylegan2
from dtpipe.extract.teachers.vae import teacher as vae
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from dtpipe.extract.config import TeacherConfig

_FAMILIES = (
    module,
    biggan,
    icgan,
    adm,
    ddpm,
    stable_diffusion,
    stylegan2,
    vae,
    null,
)
KINDS = {family.KIND.kind: family.KIND for family in _FAMILIES}


def teacher_kinds() -> dict[str, TeacherKind]:
    """All families by kind, those of installed packages last."""
    return KINDS | installed_kinds(frozenset(KINDS))


def load_teacher(config: TeacherConfig, device: str = "cpu") -> Teacher:
    """The teacher that `config` names, frozen and in eval mode on `device`.

    Raises: TeacherError when no family, or the wrong one, recognises the path; ConfigError for an option that the
    family does not have.
    """
    published = find_published(config, published_teachers())
    config = locate(config, published_teachers())
    kind = _kind_of(config)
    parse_options(config, kind.options)  # a family that reads none of them must not pass over them in silence
    if config.untrained is not None and not kind.untrained:
        raise TeacherError(
            f"{config.path}: kind {kind.kind} does not say what its weights are before training; leave out "
            f"extract.teacher.untrained (found {config.untrained})"
        )
    teacher: Teacher = kind.load(config, device)
    keeps_its_word = isinstance(teacher, kind.protocol)  # others' code declares what it likes
    if not keeps_its_word:
        raise TeacherError(
            f"{config.path}: kind {kind.kind} gives a {type(teacher).__name__}, which lacks the methods it declares "
            f"({kind.protocol}); mend the package it comes from"
        )
    if config.untrained is not None:
        teacher.spec = replace(teacher.spec, options={**teacher.spec.options, "untrained": config.untrained})
    if published is not None and published.timestep is not None:
        teacher.spec = replace(teacher.spec, timestep=published.timestep)
    return teacher


def _kind_of(config: TeacherConfig) -> TeacherKind:
    kinds = teacher_kinds()
    if config.kind != "auto":
        if config.kind not in kinds:
            raise TeacherError(f"teacher kind {config.kind!r} is unknown; choose one of {sorted(kinds)}")
        return kinds[config.kind]
    matching = next((kind for kind in kinds.values() if kind.matches(config.path)), None)
    if matching is None:
        raise _unrecognised(config.path)
    return matching


def _unrecognised(path: str) -> TeacherError:
    if (disguise := disguise_of(Path(path), text=Path(path).suffix not in FILE_ENDINGS)) is not None:
        return TeacherError(f"{path}: {disguise}")
    if Path(path).exists():
        return TeacherError(
            f"{path}: no teacher family recognises this path; `dtpipe list teachers` says what each reads, "
            f"or name one with -s extract.teacher.kind=..."
        )
    near = ", ".join(get_close_matches(path, [published.name for published in published_teachers()], cutoff=0.7))
    return TeacherError(
        f"{path}: no such file or folder, and no published teacher of this name; give a path, or a name that "
        f"`dtpipe list teachers` shows{f': perhaps {near}' if near else ''}"
    )
