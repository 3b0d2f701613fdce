"""What a teacher is, and the registry that finds one by kind.

A teacher holds frozen weights in memory. One that encodes turns images and noise into feature levels; one that
synthesizes makes images and their features from noise alone. It draws no noise and knows no keys: noise comes in as an
argument, so that features never depend on batch size, order or machine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, TypeVar

from pydantic import ValidationError

from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.schema import StrictModel, ViewSpec

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.config import TeacherConfig


@dataclass(frozen=True)
class TapSpec:
    """One level that a teacher can give: `name` l{n}, stride 2^n of the teacher's image."""

    name: str
    stride: int
    channels: int
    tap: str


@dataclass(frozen=True)
class TeacherSpec:
    """What a loaded teacher is; everything here is content of the recipe."""

    kind: str
    weights_blake3: str
    image_px: tuple[int, int]  # height, width the teacher was trained on
    levels: tuple[TapSpec, ...]
    num_timesteps: int | None = None  # None: not a diffusion model
    noise_shapes: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    """Stream name to the shape of one draw; a trailing -n, -n means an n-th of the image's own height and width."""
    options: Mapping[str, Any] = field(default_factory=dict)
    synthesizes: bool = False
    """True for a GAN: it makes its own images, and cannot encode others."""
    student_scale: int = 1
    """The student's image is by default so many times smaller than the teacher's, for the levels to be l2 to l5."""


class Teacher(Protocol):
    """A frozen generative model, loaded on its device; one of the two methods raises, `spec.synthesizes` says which."""

    spec: TeacherSpec

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Features of real images, each level at its own resolution.

        Shapes: images (B, 3, H, W) float32 in [-1, 1], unflipped, on the teacher's device; noise[stream]
        (B, V, *shape) float32, one draw per view -> {level: (B, V, C, h, w)} on the device.
        """
        ...

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images made from noise, and the features they were made through.

        Shapes: noise[stream] (B, *shape) float32 -> images (B, 3, H, W) in [-1, 1], {level: (B, C, h, w)}, on the device.
        """
        ...


class LatentTeacher(Teacher, Protocol):
    """A teacher that works on latents of images, which can be kept and given to it in place of the images."""

    def encode_from_latents(
        self, moments: Mapping[bool, Tensor], noise: Mapping[str, Tensor], views: Sequence[ViewSpec]
    ) -> dict[str, Tensor]:
        """What `encode` gives for images whose latents, by flip, were kept.

        Shapes: {flip: (B, C, h, w)}; noise[stream] (B, V, *shape) -> {level: (B, V, C, h', w')}.
        """
        ...


def makes_no_images(kind: str) -> TeacherError:
    """What `synthesize` of a teacher raises that only encodes."""
    return TeacherError(f"a {kind} teacher encodes images and makes none; give --images instead of --num-samples")


def takes_no_images(kind: str) -> TeacherError:
    """What `encode` of a teacher raises that only synthesizes."""
    return TeacherError(
        f"a {kind} teacher makes its own images and cannot encode others; give --num-samples instead of --images"
    )


Loader = Callable[["TeacherConfig", str], Teacher]  # config, device -> teacher
Matcher = Callable[[str], bool]  # does this path look like one of ours?


class NoOptions(StrictModel):
    """Options of a family that has none."""


@dataclass(frozen=True)
class PublishedTeacher:
    """One checkpoint that its authors published: `dtpipe list teachers` names it, and its name can stand for its path."""

    name: str
    url: str
    licence: str
    levels: str
    """Level, stride and channels in short: `l2 256, l3 512, l4 512, l5 1024`."""
    image_px: tuple[int, int]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Family options that this file needs."""


@dataclass(frozen=True)
class TeacherKind:
    """One registered family."""

    kind: str
    reads: str
    """One sentence for `dtpipe list teachers`: which files it reads."""
    matches: Matcher
    load: Loader
    options: type[StrictModel] = NoOptions
    """What `extract.teacher.options` may hold."""
    published: tuple[PublishedTeacher, ...] = ()


_KINDS: dict[str, TeacherKind] = {}


def register_teacher(kind: TeacherKind) -> None:
    """Make a family known; its file in `extract/teachers/` calls this once."""
    _KINDS[kind.kind] = kind


def teacher_kinds() -> dict[str, TeacherKind]:
    """All registered families by kind, those of installed plugins too."""
    from dtpipe.extract.teachers import module  # noqa: F401  one line per family
    from dtpipe.extract.teachers.biggan import icgan, teacher  # noqa: F401
    from dtpipe.extract.teachers.diffusion import adm, ddpm  # noqa: F401
    from dtpipe.extract.teachers.plugins import load_plugins
    from dtpipe.extract.teachers.stable_diffusion import teacher as stable_diffusion  # noqa: F401
    from dtpipe.extract.teachers.stylegan2 import teacher as stylegan2  # noqa: F401
    from dtpipe.extract.teachers.vae import teacher as vae  # noqa: F401

    load_plugins()
    return dict(_KINDS)


def load_teacher(config: TeacherConfig, device: str = "cpu") -> Teacher:
    """The teacher that `config` names, frozen and in eval mode on `device`.

    Raises: TeacherError when no family, or the wrong one, recognises the path.
    """
    from dtpipe.extract.teachers.files.published import locate

    kinds = teacher_kinds()
    config = locate(config, kinds)
    if config.kind != "auto":
        if config.kind not in kinds:
            raise TeacherError(f"teacher kind {config.kind!r} is unknown; choose one of {sorted(kinds)}")
        return kinds[config.kind].load(config, device)
    for kind in kinds.values():
        if kind.matches(config.path):
            return kind.load(config, device)
    raise _unrecognised(config.path, kinds)


def _unrecognised(path: str, kinds: Mapping[str, TeacherKind]) -> TeacherError:
    if Path(path).exists():
        return TeacherError(
            f"{path}: no teacher family recognises this path; `dtpipe list teachers` says what each reads, "
            f"or name one with -s extract.teacher.kind=..."
        )
    names = [published.name for kind in kinds.values() for published in kind.published]
    near = ", ".join(get_close_matches(path, names, cutoff=0.7))
    return TeacherError(
        f"{path}: no such file or folder, and no published teacher of this name; give a path, or a name that `dtpipe list teachers` shows"
        + (f": perhaps {near}" if near else "")
    )


def architecture(layout: Any) -> dict[str, Any]:
    """The sizes of a network, a dataclass, as the recipe holds them: readable, and plain JSON."""
    sizes: dict[str, Any] = json.loads(json.dumps(asdict(layout)))
    return sizes


Options = TypeVar("Options", bound=StrictModel)


def parse_options(config: TeacherConfig, model: type[Options]) -> Options:
    """`extract.teacher.options` as a family's own settings. Raises: ConfigError that names the option."""
    try:
        return model.model_validate(config.options)
    except ValidationError as err:
        first = err.errors()[0]
        name = ".".join(("extract.teacher.options", *map(str, first["loc"])))
        known = ", ".join(model.model_fields) or "none"
        raise ConfigError(
            f"{name}: {first['msg']} (found {first['input']!r}); options of this teacher: {known}"
        ) from err
