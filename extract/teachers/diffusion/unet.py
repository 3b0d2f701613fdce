"""Diffusion teachers: an image goes to timestep T, then ONE denoising call is made and the decoder's levels are read.

The image is noised by q(x_T | x_0), the noise being an argument, or carried there by deterministic DDIM inversion
(DreamTeacher, section 3.1). `DiffusionTeacher` serves every family whose network is a `UNet2DModel`, or built like one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from dtpipe.extract.pixels import to_pixels
from dtpipe.extract.teachers.arithmetic import arithmetic, storable
from dtpipe.extract.teachers.base import TapSpec, TeacherSpec, check_noise, check_sides
from dtpipe.extract.teachers.diffusion.compiled import compile_layers
from dtpipe.extract.teachers.diffusion.encoding import (
    FORWARD,
    EncodingOptions,
    check_views,
    levels_by_inversion,
    mean_levels,
    predicted_noise,
    timestep_of,
)
from dtpipe.extract.teachers.diffusion.precision import compute_in
from dtpipe.extract.teachers.diffusion.process import Schedule, alphas_cumprod, ddim_sample, q_sample
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.schema import ViewSpec

if TYPE_CHECKING:
    from torch import Tensor, nn

    from dtpipe.extract.config import TeacherConfig


class PixelOptions(EncodingOptions):
    """Options of the teachers whose process runs on pixels."""

    clip_denoised: bool = Field(default=False, description="DDIM inversion: clip each predicted image to [-1, 1].")


@dataclass(frozen=True)
class LoadedUNet:
    """A checkpoint's network on the CPU, a UNet2DModel or built like one, with all that a teacher says of it."""

    unet: nn.Module
    weights_blake3: str
    image_px: tuple[int, int]
    scheduler: Mapping[str, Any]
    """Noise schedule and what the network predicts, as a diffusers scheduler config."""
    options: Mapping[str, Any]
    """Content of the recipe besides the weights and the encoding."""
    where: str


class DiffusionTeacher:
    """A frozen network on its device."""

    def __init__(
        self,
        unet: nn.Module,
        schedule: Schedule,
        spec: TeacherSpec,
        total_stride: int,
        prediction: str,
        encoding: PixelOptions,
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

        Shapes: images (B, 3, H, W) float32 in [-1, 1]; noise["forward"] (B, V, 3, H, W), or (B, V, m, 3, H, W) for an
        ensemble of m, or none for ddim_inversion -> {level: (B, V, C, h, w)} float32 or float16.
        Raises: ShapeError when the sides are no multiple of the total stride; ConfigError for an unknown timestep.
        """
        import torch

        self._check_input(images, noise, views)
        with arithmetic(images.device):
            encoded = (
                self._by_inversion(images, views)
                if self.encoding.inverts
                else list(self._by_noise(images, noise[FORWARD], views))
            )
            return {
                level.name: torch.stack([levels[level.name] for levels in encoded], dim=1) for level in self.spec.levels
            }

    def noised(self, images: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x_T of q(x_T | x_0). Shapes: (B, 3, H, W) both -> the same, float32."""
        return q_sample(self.schedule, images, timestep, noise)

    def predict_noise(self, noisy: Tensor, timestep: int) -> Tensor:
        """The noise that one whole denoising call sees. Shapes: (B, 3, H, W) -> the same, float32."""
        output: Tensor = self._call(noisy, timestep)[0][:, :3].float()
        return predicted_noise(output, noisy, float(self.schedule[timestep]), self.prediction)

    def sample(self, num: int, seed: int = 0, steps: int = 50) -> NDArray[np.uint8]:
        """Images the teacher makes up, by DDIM: uint8 [num, H, W, 3]; image i depends on (seed, i) alone."""
        import torch

        draws = [
            np.random.Generator(np.random.Philox([seed, idx])).standard_normal((3, *self.spec.image_px), np.float32)
            for idx in range(num)
        ]
        start = torch.from_numpy(np.stack(draws)).to(next(self.unet.parameters()).device)
        with arithmetic(start.device):
            images = to_pixels(ddim_sample(self.predict_noise, self.schedule, start, steps))
        return images.cpu().numpy()

    def read_levels(self, noisy: Tensor, timestep: int) -> dict[str, Tensor]:
        """As `Denoiser.read_levels`, in float32, or float16 where the teacher runs in it."""
        return {name: storable(level) for name, level in self._reader.read(lambda: self._call(noisy, timestep)).items()}

    def _by_noise(self, images: Tensor, noise: Tensor, views: Sequence[ViewSpec]) -> Iterator[dict[str, Tensor]]:
        """Levels of each view, the mean over its noise draws."""
        for view_idx, view in enumerate(views):
            draws = noise[:, view_idx].reshape(len(images), -1, *images.shape[1:])  # (B, m, 3, H, W)
            shown, timestep = _shown(images, view), timestep_of(view)
            yield mean_levels(
                self.read_levels(self.noised(shown, draw, timestep), timestep) for draw in draws.unbind(1)
            )

    def _by_inversion(self, images: Tensor, views: Sequence[ViewSpec]) -> list[dict[str, Tensor]]:
        """Levels of each view; the views of one flip share a trajectory."""
        starts = [(view.flip, partial(_shown, images, view)) for view in views]
        return levels_by_inversion(self, self.encoding, views, starts, self.encoding.clip_denoised)

    def _call(self, noisy: Tensor, timestep: int) -> Any:
        import torch

        if self.encoding.channels_last:
            noisy = noisy.contiguous(memory_format=torch.channels_last)
        return self.unet(noisy, timestep, return_dict=False)

    def _check_input(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> None:
        check_sides(images, self.total_stride)
        check_views(views, len(self.schedule), self.encoding, draws_differ=False)
        shape = (len(images), len(views), *self.encoding.members(tuple(images.shape[1:])))
        check_noise(noise, self.spec.noise_shapes, shape)


def _shown(images: Tensor, view: ViewSpec) -> Tensor:
    return images.flip(-1) if view.flip else images


def make_diffusion_teacher(
    kind: str, loaded: LoadedUNet, config: TeacherConfig, encoding: PixelOptions, device: str
) -> DiffusionTeacher:
    """A loaded network as a teacher on its device, in the arithmetic and memory layout asked for.

    Raises: TeacherError when a tap is unknown, the decoder has no level, or the network cannot run in half precision.
    """
    import torch

    unet: Any = loaded.unet.requires_grad_(False).eval()
    total_stride = 2 ** sum(block.downsamplers is not None for block in unet.down_blocks)
    try:
        levels = _levels_of(unet, total_stride, config.taps)
    except (RuntimeError, TypeError, ValueError, IndexError) as err:  # of layers whose settings do not go together
        reason = str(err).strip().splitlines()[0][:160]
        raise TeacherError(
            f"{loaded.where}: the network cannot be run ({reason}); check its settings, or export the teacher again"
        ) from err
    if not levels:
        raise TeacherError(
            f"{loaded.where}: the decoder has none of the strides 4, 8, 16, 32; name taps in extract.teacher.taps"
        )
    schedule = alphas_cumprod(loaded.scheduler)
    spec = TeacherSpec(
        kind=kind,
        weights_blake3=loaded.weights_blake3,
        image_px=loaded.image_px,
        levels=tuple(levels.values()),
        num_timesteps=len(schedule),
        noise_shapes={} if encoding.inverts else {FORWARD: encoding.members((3, -1, -1))},
        options={**loaded.options, **encoding.recipe()},
    )
    if config.dtype != "float32":
        compute_in(unet, getattr(torch, config.dtype), loaded.where)
    placed = torch.nn.Module.to(unet, device=device)
    if encoding.channels_last:
        placed = placed.to(memory_format=torch.channels_last)
    if encoding.compile:
        compile_layers(placed, (level.tap for level in levels.values()))
    return DiffusionTeacher(placed, schedule, spec, total_stride, loaded.scheduler["prediction_type"], encoding)


def _levels_of(unet: Any, total_stride: int, taps: Mapping[str, str] | None) -> dict[str, TapSpec]:
    """Levels found by stride, or at the named taps, in a pass that has shapes and no values."""
    import torch

    from dtpipe.extract.teachers.taps import decoder_layers, find_levels, named_levels

    side = 2 * total_stride  # group norms refuse a single value per group
    shapes = {name: value.to("meta") for name, value in unet.state_dict().items()}
    blank = torch.zeros(1, 3, side, side, device="meta")

    def forward() -> object:
        return torch.func.functional_call(unet, shapes, (blank, 0))

    with torch.inference_mode():
        return (
            named_levels(unet, forward, side, taps) if taps else find_levels(unet, forward, side, decoder_layers(unet))
        )
