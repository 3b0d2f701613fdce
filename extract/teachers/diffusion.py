"""Diffusion teachers: an image goes to timestep T, then ONE denoising call is made and the decoder's levels are read.

The image is noised by q(x_T | x_0), the noise being an argument, or carried there by deterministic DDIM inversion
(DreamTeacher, section 3.1). `DiffusionTeacher` serves every family whose network is a `UNet2DModel`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from dtpipe.extract.teachers.base import TapSpec, TeacherSpec, makes_no_images
from dtpipe.extract.teachers.ddim import Schedule, alphas_cumprod, ddim_invert, ddim_sample, q_sample, to_pixels
from dtpipe.extract.teachers.unet_precision import compute_in
from dtpipe.manifests.errors import ConfigError, ShapeError, TeacherError
from dtpipe.manifests.schema import StrictModel, ViewSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtpipe.extract.config import TeacherConfig

FORWARD = "forward"  # the noise stream of q(x_T | x_0)


class EncodingOptions(StrictModel):
    """How an image comes to timestep T; options of every diffusion teacher."""

    encoding: Literal["stochastic", "ddim_inversion"] = Field(
        default="stochastic",
        description="stochastic: noise is added; ddim_inversion: deterministic, T / inversion_stride whole passes.",
    )
    ensemble: int = Field(default=1, ge=1, description="Noise draws per view whose features are averaged (DIFT); stochastic only.")
    inversion_stride: int = Field(default=10, ge=1, description="Timesteps per step of DDIM inversion; every T must be a multiple.")
    clip_denoised: bool = Field(default=False, description="DDIM inversion: clip each predicted image to [-1, 1].")
    channels_last: bool = Field(default=False, description="Keep tensors as NHWC in memory, which GPUs may run faster in half precision.")

    @model_validator(mode="after")
    def _one_encoding(self) -> EncodingOptions:
        if self.inverts and self.ensemble > 1:
            raise ValueError("ensemble averages over noise draws, and ddim_inversion has none; leave one out")
        return self

    @property
    def inverts(self) -> bool:
        """True for ddim_inversion."""
        return self.encoding == "ddim_inversion"

    @property
    def noise_shapes(self) -> dict[str, tuple[int, ...]]:
        """The `TeacherSpec.noise_shapes` of this encoding."""
        if self.inverts:
            return {}
        return {FORWARD: (3, -1, -1) if self.ensemble == 1 else (self.ensemble, 3, -1, -1)}

    def recipe(self) -> dict[str, Any]:
        """What of this is content of a dataset; nothing by default, so that datasets made before these options keep their digest."""
        names = ("encoding", "inversion_stride", "clip_denoised") if self.inverts else ("ensemble",) if self.ensemble > 1 else ()
        return {name: getattr(self, name) for name in names} | ({"channels_last": True} if self.channels_last else {})


@dataclass(frozen=True)
class LoadedUNet:
    """A checkpoint's UNet2DModel on the CPU, with all that a teacher says of it."""

    unet: nn.Module
    weights_blake3: str
    image_px: tuple[int, int]
    scheduler: Mapping[str, Any]
    """Noise schedule and what the network predicts, as a diffusers scheduler config."""
    options: Mapping[str, Any]
    """Content of the recipe besides the weights and the encoding."""
    where: str


class DiffusionTeacher:
    """A frozen UNet2DModel on its device."""

    def __init__(
        self,
        unet: nn.Module,
        schedule: Schedule,
        spec: TeacherSpec,
        total_stride: int,
        prediction: str,
        encoding: EncodingOptions,
    ) -> None:
        from dtpipe.extract.teachers.taps import TapReader

        self.unet = unet
        self.schedule = schedule
        self.spec = spec
        self.total_stride = total_stride
        self.prediction = prediction
        self.encoding = encoding
        self._reader = TapReader(unet, {level.name: level.tap for level in spec.levels})

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Decoder features at each view's timestep, the last denoising call stopped after the last tap.

        Shapes: images (B, 3, H, W) float32 in [-1, 1]; noise["forward"] (B, V, 3, H, W), or (B, V, m, 3, H, W) for an ensemble of
        m, or none for ddim_inversion -> {level: (B, V, C, h, w)}, float32, or float16 where the teacher runs in it.
        Raises: ShapeError when the sides are no multiple of the total stride; ConfigError for an unknown timestep.
        """
        import torch

        self._check_input(images, noise, views)
        with torch.inference_mode(), _exact_convolutions(images):
            encoded = self._by_inversion(images, views) if self.encoding.inverts else list(self._by_noise(images, noise[FORWARD], views))
            return {level.name: torch.stack([levels[level.name] for levels in encoded], dim=1) for level in self.spec.levels}

    def synthesize(self, noise: Mapping[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """Raises: TeacherError; the paper's diffusion teachers encode."""
        raise makes_no_images(self.spec.kind)

    def noised(self, images: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x_T of q(x_T | x_0). Shapes: (B, 3, H, W) both -> the same, float32."""
        return q_sample(self.schedule, images, timestep, noise)

    def predict_noise(self, noisy: Tensor, timestep: int) -> Tensor:
        """The noise that one whole denoising call sees. Shapes: (B, 3, H, W) -> the same, float32."""
        output: Tensor = self._call(noisy, timestep)[0][:, :3].float()
        kept = float(self.schedule[timestep])
        if self.prediction == "v_prediction":  # v = sqrt(a) eps - sqrt(1 - a) x_0
            return math.sqrt(kept) * output + math.sqrt(1 - kept) * noisy
        if self.prediction == "sample":
            return (noisy - math.sqrt(kept) * output) / math.sqrt(1 - kept)
        return output

    def sample(self, num: int, seed: int = 0, steps: int = 50) -> NDArray[np.uint8]:
        """Images the teacher makes up, by DDIM: uint8 [num, H, W, 3]; image i depends on (seed, i) alone."""
        import torch

        draws = [
            np.random.Generator(np.random.Philox([seed, idx])).standard_normal((3, *self.spec.image_px), np.float32) for idx in range(num)
        ]
        start = torch.from_numpy(np.stack(draws)).to(next(self.unet.parameters()).device)
        with torch.inference_mode(), _exact_convolutions(start):
            return to_pixels(ddim_sample(self.predict_noise, self.schedule, start, steps))

    def _by_noise(self, images: Tensor, noise: Tensor, views: Sequence[ViewSpec]) -> Iterator[dict[str, Tensor]]:
        """Levels of each view, the mean over its noise draws."""
        for view_idx, view in enumerate(views):
            draws = noise[:, view_idx].reshape(len(images), -1, *images.shape[1:])  # (B, m, 3, H, W)
            shown, timestep = _shown(images, view), _timestep(view)
            yield _mean_levels(self._levels(self.noised(shown, draw, timestep), timestep) for draw in draws.unbind(1))

    def _by_inversion(self, images: Tensor, views: Sequence[ViewSpec]) -> list[dict[str, Tensor]]:
        """Levels of each view; the views of one flip share a trajectory."""
        found: dict[tuple[bool, int], dict[str, Tensor]] = {}
        options = self.encoding
        for first in {view.flip: view for view in views}.values():
            wanted = {_timestep(view) for view in views if view.flip == first.flip}
            path = range(0, max(wanted) + 1, options.inversion_stride)
            for timestep, noisy in ddim_invert(self.predict_noise, self.schedule, _shown(images, first), path, options.clip_denoised):
                if timestep in wanted:
                    found[first.flip, timestep] = self._levels(noisy, timestep)
        return [found[view.flip, _timestep(view)] for view in views]

    def _levels(self, noisy: Tensor, timestep: int) -> dict[str, Tensor]:
        import torch

        levels = self._reader.read(lambda: self._call(noisy, timestep))
        return {name: level.float() if level.dtype == torch.bfloat16 else level for name, level in levels.items()}

    def _call(self, noisy: Tensor, timestep: int) -> Any:
        import torch

        if self.encoding.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        return self.unet(noisy, timestep, return_dict=False)

    def _check_input(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> None:
        height, width = images.shape[-2:]
        if height % self.total_stride or width % self.total_stride:
            raise ShapeError(
                f"images are {height}x{width}; this teacher needs sides that are multiples of {self.total_stride}: set extract.transform.px"
            )
        if late := [view.timestep for view in views if _timestep(view) >= len(self.schedule)]:
            raise ConfigError(f"timestep {late[0]} is beyond this teacher's {len(self.schedule)} (0..{len(self.schedule) - 1}); lower it")
        if self.encoding.inverts:
            _check_inversion(views, self.encoding.inversion_stride)
            return
        members = (self.encoding.ensemble,) if self.encoding.ensemble > 1 else ()
        wanted = (len(images), len(views), *members, *images.shape[1:])
        found = tuple(noise[FORWARD].shape) if FORWARD in noise else None
        if found != wanted:
            raise ShapeError(f"noise[{FORWARD!r}] is {found}, images and views ask for {wanted}")


def _check_inversion(views: Sequence[ViewSpec], stride: int) -> None:
    if odd := [view.timestep for view in views if _timestep(view) % stride]:
        raise ConfigError(
            f"timestep {odd[0]} is no multiple of the inversion's stride {stride}; change extract.noise.timesteps or "
            f"extract.teacher.options.inversion_stride"
        )
    if len({(view.timestep, view.flip) for view in views}) < len(views):
        raise ConfigError("ddim_inversion has no noise, so all draws of an image are equal; leave out extract.noise.draws")


def _shown(images: Tensor, view: ViewSpec) -> Tensor:
    return images.flip(-1) if view.flip else images


def _mean_levels(members: Iterator[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The mean over an ensemble, summed in float32; a single member is given back as it is."""
    count, first = 1, next(members)
    total = first
    for count, levels in enumerate(members, 2):  # noqa: B007  the last one is the number of members
        total = {name: level.float() + levels[name].float() for name, level in total.items()}
    return first if count == 1 else {name: (total[name] / count).to(level.dtype) for name, level in first.items()}


def _timestep(view: ViewSpec) -> int:
    if view.timestep is None:
        raise ConfigError("a diffusion teacher needs a timestep in every view; set extract.noise.timesteps")
    return view.timestep


def _exact_convolutions(images: Tensor) -> Any:
    """On a GPU: float32 means float32, and no algorithm is chosen by timing."""
    import torch

    if images.device.type != "cuda":
        return nullcontext()
    return torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)


def make_teacher(kind: str, loaded: LoadedUNet, config: TeacherConfig, encoding: EncodingOptions, device: str) -> DiffusionTeacher:
    """A loaded network as a teacher on its device, in the arithmetic and memory layout asked for.

    Raises: TeacherError when a tap is unknown, the decoder has no level, or the network cannot run in half precision.
    """
    import torch

    unet: Any = loaded.unet.requires_grad_(False).eval()
    total_stride = 2 ** sum(block.downsamplers is not None for block in unet.down_blocks)
    levels = _levels_of(unet, total_stride, config.taps)
    if not levels:
        raise TeacherError(f"{loaded.where}: the decoder has none of the strides 4, 8, 16, 32; name taps in extract.teacher.taps")
    schedule = alphas_cumprod(loaded.scheduler)
    spec = TeacherSpec(
        kind=kind,
        weights_blake3=loaded.weights_blake3,
        image_px=loaded.image_px,
        levels=tuple(levels.values()),
        num_timesteps=len(schedule),
        noise_shapes=encoding.noise_shapes,
        options={**loaded.options, **encoding.recipe()},
    )
    if config.dtype != "float32":
        compute_in(unet, getattr(torch, config.dtype), loaded.where)
    placed = torch.nn.Module.to(unet, device=device)
    if encoding.channels_last:
        placed = placed.to(memory_format=torch.channels_last)
    return DiffusionTeacher(placed, schedule, spec, total_stride, loaded.scheduler["prediction_type"], encoding)


def _levels_of(unet: Any, total_stride: int, taps: Mapping[str, str] | None) -> dict[str, TapSpec]:
    """Levels found by stride, or at the named taps, on a copy of the network that has shapes and no values."""
    import torch

    from dtpipe.extract.teachers.taps import find_levels, named_levels

    side = 2 * total_stride  # group norms refuse a single value per group
    with torch.device("meta"), torch.inference_mode():
        shapes = type(unet).from_config(unet.config).eval()
        blank = torch.zeros(1, 3, side, side)
        if taps:
            return named_levels(shapes, lambda: shapes(blank, 0), side, taps)
        return find_levels(shapes, lambda: shapes(blank, 0), side, _decoder_layers(shapes))


def _decoder_layers(unet: Any) -> list[str]:
    """Residual and attention layers of the up blocks, without their upsamplers."""
    return [
        f"up_blocks.{block_idx}.{kind}.{idx}"
        for block_idx, block in enumerate(unet.up_blocks)
        for kind in ("resnets", "attentions")
        for idx, _ in enumerate(getattr(block, kind, None) or [])
    ]
