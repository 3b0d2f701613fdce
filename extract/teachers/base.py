"""What a teacher is, and the registry that finds one by kind.

A teacher holds frozen weights in memory and turns images and noise into feature levels. It draws no noise and knows
no keys: noise comes in as an argument, so that features never depend on batch size, order or machine.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.schema import ViewSpec

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
    """Stream name to the shape of one draw; a leading -1, -1 after channels means the image's own height and width."""
    options: Mapping[str, Any] = field(default_factory=dict)


class Teacher(Protocol):
    """A frozen generative model, loaded on its device."""

    spec: TeacherSpec

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Features of real images, each level at its own resolution.

        Shapes: images (B, 3, H, W) float32 in [-1, 1], unflipped, on the teacher's device; noise[stream]
        (B, V, *shape) float32, one draw per view -> {level: (B, V, C, h, w)} on the device.
        """
        ...


Loader = Callable[["TeacherConfig", str], Teacher]  # config, device -> teacher
Matcher = Callable[[str], bool]  # does this path look like one of ours?


@dataclass(frozen=True)
class TeacherKind:
    """One registered family."""

    kind: str
    reads: str
    """One sentence for `dtpipe list teachers`: which files it reads."""
    matches: Matcher
    load: Loader


_KINDS: dict[str, TeacherKind] = {}


def register_teacher(kind: TeacherKind) -> None:
    """Make a family known; its file in `extract/teachers/` calls this once."""
    _KINDS[kind.kind] = kind


def teacher_kinds() -> dict[str, TeacherKind]:
    """All registered families by kind."""
    from dtpipe.extract.teachers import diffusion  # noqa: F401  one import line per family

    return dict(_KINDS)


def load_teacher(config: TeacherConfig, device: str = "cpu") -> Teacher:
    """The teacher that `config` names, frozen and in eval mode on `device`.

    Raises: TeacherError when no family, or the wrong one, recognises the path.
    """
    kinds = teacher_kinds()
    if config.kind != "auto":
        if config.kind not in kinds:
            raise TeacherError(f"teacher kind {config.kind!r} is unknown; choose one of {sorted(kinds)}")
        return kinds[config.kind].load(config, device)
    for kind in kinds.values():
        if kind.matches(config.path):
            return kind.load(config, device)
    raise TeacherError(
        f"{config.path}: no teacher family recognises this path; `dtpipe list teachers` says what each reads, "
        f"or name one with -s extract.teacher.kind=..."
    )
