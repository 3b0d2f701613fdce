"""What a teacher is: an encoder of images, or a generator of them.

A teacher holds frozen weights in memory. An encoder turns images and noise into feature levels; a generator makes
images and their features from noise alone. Neither draws noise or knows keys: noise is an argument, so that features
never depend on batch size, order or machine. A family declares itself as `KIND`, and `registry` collects them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import UnionType
from typing import TYPE_CHECKING, Any, Protocol, TypeVar, runtime_checkable

from pydantic import ValidationError

from dtpipe.manifests.errors import ConfigError, ShapeError
from dtpipe.manifests.schema import StrictModel, ViewSpec

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails
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
    timestep: int = 50
    """Where it is read unless settings say otherwise: the paper's for a teacher of its images' domain; no content."""
    is_noise: bool = False
    """Whether its levels are noise and no features; the recipe says so by their role."""
    student_scale: int = 1
    """How many times smaller than the teacher's image the student's is by default, so that its levels are l2 to l5."""


@runtime_checkable
class Encoder(Protocol):
    """A frozen model that takes images, loaded on its device: diffusion, a VAE, any module that encodes."""

    spec: TeacherSpec

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Features of real images, each level at its own resolution.

        Shapes: images (B, 3, H, W) float32 in [-1, 1], unflipped, on the teacher's device; noise[stream]
        (B, V, *shape) float32, one draw per view -> {level: (B, V, C, h, w)} on the device.
        """
        ...


@runtime_checkable
class LatentEncoder(Encoder, Protocol):
    """An encoder that works on latents of images, which can be kept and given to it in place of the images."""

    def encode_from_latents(
        self, moments: Mapping[bool, Tensor], noise: Mapping[str, Tensor], views: Sequence[ViewSpec]
    ) -> dict[str, Tensor]:
        """What `encode` gives for images whose latents, by flip, were kept.

        Shapes: {flip: (B, C, h, w)}; noise[stream] (B, V, *shape) -> {level: (B, V, C, h', w')}.
        """
        ...


@runtime_checkable
class Generator(Protocol):
    """A frozen model that makes images, loaded on its device: a GAN, any module that synthesizes."""

    spec: TeacherSpec

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images made from noise, and the features they were made through.

        Shapes: noise[stream] (B, *shape) float32 -> images (B, 3, H, W) in [-1, 1], {level: (B, C, h, w)}.
        """
        ...


Teacher = Encoder | Generator

Loader = Callable[["TeacherConfig", str], Teacher]  # config, device -> teacher
Matcher = Callable[[str], bool]  # does this path look like one of ours?


class NoOptions(StrictModel):
    """Options of a family that has none."""


@dataclass(frozen=True)
class TeacherKind:
    """One family, declared as `KIND` in its file or by an installed package."""

    kind: str
    reads: str
    """One sentence for `dtpipe list teachers`: which files it reads."""
    protocol: type[Any] | UnionType
    """What its teachers are: Encoder, Generator, or Teacher where its options say which."""
    matches: Matcher
    load: Loader
    options: type[StrictModel] = NoOptions
    """What `extract.teacher.options` may hold."""
    untrained: bool = False
    """Whether `load` can draw new weights from the seed `extract.teacher.untrained`."""


def check_sides(images: Tensor, multiple: int) -> None:
    """Raises: ShapeError when a side of the images is no multiple of the teacher's total stride."""
    height, width = images.shape[-2:]
    if height % multiple or width % multiple:
        raise ShapeError(
            f"images are {height}x{width}; this teacher needs sides that are multiples of {multiple}: "
            f"set extract.transform.px"
        )


def check_noise(noise: Mapping[str, Tensor], streams: Iterable[str], shape: tuple[int, ...]) -> None:
    """Raises: ShapeError when the noise of a stream is missing or of another shape."""
    for stream in streams:
        actual = tuple(noise[stream].shape) if stream in noise else None
        if actual != shape:
            raise ShapeError(f"noise[{stream!r}] is {actual}, images and views ask for {shape}")


def architecture(layout: Any) -> dict[str, Any]:
    """The sizes of a network, a dataclass, as the recipe holds them: readable, and plain JSON."""
    sizes: dict[str, Any] = json.loads(json.dumps(asdict(layout)))
    return sizes


Options = TypeVar("Options", bound=StrictModel)


def parse_options(config: TeacherConfig, model: type[Options]) -> Options:
    """`extract.teacher.options` as a family's own settings. Raises: ConfigError naming all that is wrong or missing."""
    try:
        return model.model_validate(config.options)
    except ValidationError as err:
        faults = "; ".join(_fault(fault, model) for fault in err.errors())
        raise ConfigError(f"{faults}; options of this teacher: {', '.join(model.model_fields) or 'none'}") from err


def _fault(fault: ErrorDetails, model: type[StrictModel]) -> str:
    """One wrong or missing option in a sentence."""
    name = ".".join(("extract.teacher.options", *map(str, fault["loc"])))
    if fault["type"] == "missing" and len(fault["loc"]) == 1:
        return f"{name} must be given ({model.model_fields[str(fault['loc'][0])].description})"
    return f"{name}: {fault['msg'].removeprefix('Value error, ')} (found {fault['input']!r})"
