"""Any generator or encoder as a teacher: kind `module`, a torch module of your own code.

The class comes from a module that you name, installed or in the working directory; the weights come from a file of
tensors, and nothing in that file is executed.
Taps are named in `extract.teacher.taps`; without them the error lists what there is to name.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from dtpipe.extract.teachers.arithmetic import arithmetic, storable
from dtpipe.extract.teachers.base import TapSpec, Teacher, TeacherKind, TeacherSpec, parse_options
from dtpipe.extract.teachers.files.untrained import drawn_from
from dtpipe.extract.teachers.files.weights import read_weights, weights_digest
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.schema import StrictModel, ViewSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtpipe.extract.config import TeacherConfig

_LATENT = "z"  # the noise stream of a generator's input


class ModuleOptions(StrictModel):
    """What `extract.teacher.options` holds."""

    module: str = Field(
        pattern=r"^[\w.]+:[\w.]+$", description="Import path of the torch module's class: package.file:Class."
    )
    arguments: dict[str, Any] = Field(default={}, description="Keyword arguments of the class.")
    mode: Literal["synthesize", "encode"] = Field(
        default="synthesize",
        description="Makes images from a latent z, or takes images; it is called with that one argument.",
    )
    image_px: tuple[int, int] = Field(description="Height and width of the images, in px.")
    z_shape: tuple[int, ...] | None = Field(
        default=None, min_length=1, validate_default=True, description="Shape of one z, which is standard normal."
    )
    value_range: tuple[float, float] = Field(
        default=(-1.0, 1.0), description="What black and white are in the module's images."
    )

    @field_validator("z_shape")
    @classmethod
    def _goes_with_mode(cls, shape: tuple[int, ...] | None, info: ValidationInfo) -> tuple[int, ...] | None:
        if "mode" in info.data and (shape is not None) != (info.data["mode"] == "synthesize"):
            raise ValueError(
                "a module that makes images from z needs z_shape; one that takes images, mode=encode alone"
            )
        return shape

    @model_validator(mode="after")
    def _fit(self) -> ModuleOptions:
        if min(*self.image_px, *(self.z_shape or ())) < 1 or self.value_range[0] >= self.value_range[1]:
            raise ValueError("image_px and z_shape must be positive, and black less than white in value_range")
        return self


class ModuleEncoder:
    """A frozen torch module on its device that takes images."""

    def __init__(self, network: nn.Module, spec: TeacherSpec, options: ModuleOptions, dtype: str) -> None:
        from dtpipe.extract.teachers.taps import TapReader

        self.spec, self.network, self._dtype = spec, network, dtype
        self._black, self._white = options.value_range
        self._reader = TapReader(network, {level.name: level.tap for level in spec.levels})

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:  # noqa: ARG002
        """Features of images, stopped after the last tap; the draw plays no part.

        Shapes: images (B, 3, H, W) float32 in [-1, 1] -> {level: (B, V, C, h, w)}, float32 or float16.
        """
        import torch

        scaled = (images + 1) / 2 * (self._white - self._black) + self._black
        levels: dict[bool, dict[str, Tensor]] = {}
        with arithmetic(images.device, self._dtype):
            for flip in {view.flip for view in views}:
                levels[flip] = self._reader.read(partial(self.network, scaled.flip(-1) if flip else scaled))
        return {
            level.name: torch.stack([storable(levels[view.flip][level.name]) for view in views], dim=1)
            for level in self.spec.levels
        }


class ModuleGenerator:
    """A frozen torch module on its device that makes images from a latent z."""

    def __init__(self, network: nn.Module, spec: TeacherSpec, options: ModuleOptions, dtype: str) -> None:
        from dtpipe.extract.teachers.taps import TapReader

        self.spec, self.network, self._options, self._dtype = spec, network, options, dtype
        self._reader = TapReader(network, {level.name: level.tap for level in spec.levels})

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Images and the features they were made through.

        Shapes: noise["z"] (B, *z_shape) -> (B, 3, H, W) float32 in [-1, 1], {level: (B, C, h, w)}.
        """
        images: list[Tensor] = []
        latent = noise[_LATENT]
        with arithmetic(latent.device, self._dtype):
            levels = self._reader.read(
                lambda: images.append(_images_in(self.network(latent), self._options)), stop_early=False
            )
        black, white = self._options.value_range
        scaled = (images[0].float() - black) / (white - black) * 2 - 1
        return scaled, {name: storable(level) for name, level in levels.items()}


def load_module_teacher(config: TeacherConfig, device: str = "cpu") -> Teacher:
    """The teacher that `config` names, frozen and in eval mode.

    Raises: TeacherError when the class or its weights cannot be had, do not fit, or the module draws noise of its own.
    """
    import torch

    options = parse_options(config, ModuleOptions)
    with drawn_from(config.untrained):
        network = _build(options)
    own = network.state_dict()
    tensors = read_weights(Path(config.path), own) if config.untrained is None else _initial(network, config, options)
    _load(network, tensors, config.path, options)
    spec = TeacherSpec(
        kind="module",
        weights_blake3=weights_digest(tensors),
        image_px=options.image_px,
        levels=_probe(network, options, config.taps),
        noise_shapes={_LATENT: options.z_shape} if options.z_shape else {},
        options=options.model_dump(mode="json"),
    )
    kind = ModuleGenerator if options.mode == "synthesize" else ModuleEncoder
    return kind(torch.nn.Module.to(network, device=device), spec, options, config.dtype)


def _initial(network: nn.Module, config: TeacherConfig, options: ModuleOptions) -> dict[str, Tensor]:
    """The weights that a module begins with. Raises: TeacherError when its code draws others from the same seed."""
    tensors = dict(network.state_dict())
    with drawn_from(config.untrained):
        again = _build(options).state_dict()
    if weights_digest(tensors) != weights_digest(again):
        raise TeacherError(
            f"{options.module} begins with other weights each time, whatever torch's seed is, so they cannot be made "
            f"again; leave out extract.teacher.untrained (found {config.untrained})"
        )
    return tensors


def _build(options: ModuleOptions) -> nn.Module:
    """An instance of the class that a person named.

    Raises: TeacherError with what its import or constructor raises.
    """
    from torch import nn

    package, _, path = options.module.partition(":")
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.append(here)  # last, so that nothing that is installed is hidden
    try:
        network_class: Any = importlib.import_module(package)
        for name in path.split("."):
            network_class = getattr(network_class, name)
        network = network_class(**options.arguments)
    except Exception as err:  # code of others raises anything
        raise TeacherError(
            f"extract.teacher.options.module: {options.module} with arguments {options.arguments} cannot be made "
            f"({_said(err)}); install its package in this environment, start from the folder it lies in, or correct "
            f"the path"
        ) from err
    if not isinstance(network, nn.Module):
        raise TeacherError(
            f"extract.teacher.options.module: {options.module} gives a {type(network).__name__}, no torch.nn.Module; "
            f"name a module's class"
        )
    for module in network.modules():
        if "inplace" in vars(module):
            vars(module)["inplace"] = False  # or what follows a tap would overwrite its level
    return network.float().requires_grad_(False).eval()


def _load(network: nn.Module, tensors: Mapping[str, Tensor], path: str, options: ModuleOptions) -> None:
    """Put every tensor in its place; integer ones too, such as a batch norm's counter.

    Raises: TeacherError when names or shapes differ, or a value is not finite.
    """
    if broken := [
        name for name, tensor in tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())
    ]:
        raise TeacherError(
            f"{path}: {broken[0]} holds values that are not finite; download or export the weights again"
        )
    try:
        network.load_state_dict(dict(tensors))
    except RuntimeError as err:
        raise TeacherError(
            f"{path}: weights do not fit {options.module} ({_said(err)}); check extract.teacher.options.arguments"
        ) from err


def _probe(network: nn.Module, options: ModuleOptions, taps: Mapping[str, str] | None) -> tuple[TapSpec, ...]:
    """The levels, from fine to deep, found by running the module on one input.

    Raises: TeacherError when it does not run, gives other images, no such level, or something else the second time.
    """
    import torch

    shape = options.z_shape or (3, *options.image_px)
    probe = torch.linspace(-1, 1, torch.Size(shape).numel()).reshape(1, *shape)

    def forward() -> Tensor | None:
        output = network(probe)
        return _images_in(output, options) if options.z_shape else None

    try:
        with torch.inference_mode():
            if not taps:
                raise TeacherError(
                    f"extract.teacher.taps is not set; a module's levels must be named: "
                    f"{_suggest(network, forward, options)}"
                )
            return _read_twice(network, forward, options, taps)
    except TeacherError:
        raise
    except Exception as err:  # code of others raises anything
        raise TeacherError(
            f"{options.module}: does not run on an input of shape {(1, *shape)} ({_said(err)}); "
            f"check extract.teacher.options"
        ) from err


def _read_twice(
    network: nn.Module, forward: Callable[[], object], options: ModuleOptions, taps: Mapping[str, str]
) -> tuple[TapSpec, ...]:
    import torch

    from dtpipe.extract.teachers.taps import TapReader, named_levels

    outputs: list[Any] = []
    reader = TapReader(network, taps)
    first, second = (reader.read(lambda: outputs.append(forward()), stop_early=False) for _ in range(2))
    height, width = options.image_px
    levels = named_levels(network, forward, width, taps)
    for level in levels.values():
        side, other = first[level.name].shape[-2:]
        if (side * level.stride, other * level.stride) != options.image_px:
            raise TeacherError(
                f"tap {level.name}={level.tap} is {side}x{other}, no whole part of {height}x{width} px; "
                f"name another tap"
            )
    same_images = not options.z_shape or torch.equal(*outputs)
    if not same_images or any(not torch.equal(first[name], second[name]) for name in taps):
        raise TeacherError(
            f"{options.module}: gave two results for one input, so it draws noise of its own; "
            f"make it a function of its input in eval mode"
        )
    return tuple(sorted(levels.values(), key=lambda level: (level.stride, level.name)))


def _suggest(network: nn.Module, forward: Callable[[], object], options: ModuleOptions) -> str:
    """The last module at each resolution, as a setting to copy."""
    from torch import Tensor

    from dtpipe.extract.teachers.taps import DEFAULT_STRIDES, level_name

    last: dict[str, str] = {}

    def note(path: str, _module: object, _args: object, output: object) -> None:
        for stride in DEFAULT_STRIDES:
            if (
                isinstance(output, Tensor)
                and output.ndim == 4
                and tuple(side * stride for side in output.shape[-2:]) == options.image_px
            ):
                last[level_name(stride)] = path

    with ExitStack() as hooks:
        for path, module in network.named_modules():
            if not path:  # the whole, which has no name to copy
                continue
            hooks.callback(module.register_forward_hook(partial(note, path)).remove)
        forward()
    if not last:
        return "none of its modules has stride 4, 8, 16 or 32"
    taps = ", ".join(f"{name}: {path}" for name, path in sorted(last.items()))
    return f"-s 'extract.teacher.taps={{{taps}}}' has the last module of each stride"


def _said(err: Exception) -> str:
    return f"{type(err).__name__}: {' '.join(str(err).split())[:300]}"


def _images_in(output: object, options: ModuleOptions) -> Tensor:
    """A generator's images; some return more beside them."""
    from torch import Tensor

    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor) or tuple(first.shape[1:]) != (3, *options.image_px):
        output_type = f"shape {tuple(first.shape)}" if isinstance(first, Tensor) else f"a {type(first).__name__}"
        height, width = options.image_px
        raise TeacherError(
            f"{options.module} gives {output_type}, the options say images (B, 3, {height}, {width}); correct them"
        )
    return first


KIND = TeacherKind(
    kind="module",
    reads="Weights of a torch module of your own code, named in the options; ask for it by kind.",
    protocol=Teacher,
    matches=lambda _: False,
    load=load_module_teacher,
    options=ModuleOptions,
    untrained=True,
)
