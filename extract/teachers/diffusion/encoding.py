"""How diffusion teachers bring an image to timestep T: by noise, as an ensemble of draws, or by DDIM inversion.

A family gives its network as a `Denoiser` and the image, or its latent, as what the process starts from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol

from pydantic import Field, model_validator

from dtpipe.extract.teachers.diffusion.process import Schedule, ddim_invert
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import StrictModel, ViewSpec

if TYPE_CHECKING:
    from torch import Tensor

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a network's output is
FORWARD = "forward"  # the noise stream of q(x_T | x_0)
Levels = dict[str, "Tensor"]


class EncodingOptions(StrictModel):
    """How an image comes to timestep T; options of every diffusion teacher."""

    encoding: Literal["stochastic", "ddim_inversion"] = Field(
        default="stochastic",
        description="stochastic: noise is added; ddim_inversion: deterministic, T / inversion_stride whole passes.",
    )
    ensemble: int = Field(
        default=1, ge=1, description="Noise draws per view whose features are averaged (DIFT); stochastic only."
    )
    inversion_stride: int = Field(
        default=10, ge=1, description="Timesteps per step of DDIM inversion; every T must be a multiple."
    )
    channels_last: bool = Field(
        default=False, description="Keep tensors as NHWC in memory, which GPUs may run faster in half precision."
    )

    compile: bool = Field(
        default=False, description="torch.compile the network's layers: a minute or more per worker, then faster."
    )

    @model_validator(mode="after")
    def _one_encoding(self) -> EncodingOptions:
        if self.inverts and self.ensemble > 1:
            raise ValueError("ensemble averages over noise draws, and ddim_inversion has none; leave one out")
        return self

    @property
    def inverts(self) -> bool:
        """True for ddim_inversion."""
        return self.encoding == "ddim_inversion"

    def members(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of one draw's noise, from that of one image; an ensemble's members come first."""
        return shape if self.ensemble == 1 else (self.ensemble, *shape)

    def recipe(self) -> dict[str, Any]:
        """What of this is content of a dataset; by default nothing, so that older datasets keep their digest."""
        chosen = (
            {"encoding", "inversion_stride", "clip_denoised"}
            if self.inverts
            else {"ensemble"}
            if self.ensemble > 1
            else set()
        )
        names = [name for name in type(self).model_fields if name in chosen]
        kernels = {name: True for name in ("channels_last", "compile") if getattr(self, name)}  # they round otherwise
        return {name: getattr(self, name) for name in names} | kernels


class Denoiser(Protocol):
    """A network in its two uses. Shapes: (B, C, H, W) both."""

    schedule: Schedule

    def predict_noise(self, noisy: Tensor, timestep: int) -> Tensor:
        """The noise that one whole denoising call sees."""
        ...

    def read_levels(self, noisy: Tensor, timestep: int) -> Levels:
        """The levels of one denoising call, stopped after the last tap."""
        ...


def predicted_noise(output: Tensor, noisy: Tensor, kept: float, prediction: str) -> Tensor:
    """The noise that a network's output means, `kept` being alphas_cumprod at its timestep.

    Shapes: (B, C, H, W) both -> the same. Source: Salimans & Ho, arXiv 2202.00512, appendix D, for v_prediction.
    """
    if prediction == "v_prediction":  # v = sqrt(a) eps - sqrt(1 - a) x_0
        return math.sqrt(kept) * output + math.sqrt(1 - kept) * noisy
    if prediction == "sample":
        return (noisy - math.sqrt(kept) * output) / math.sqrt(1 - kept)
    return output


def levels_by_inversion(
    denoiser: Denoiser,
    options: EncodingOptions,
    views: Sequence[ViewSpec],
    starts: Sequence[tuple[Hashable, Callable[[], Tensor]]],
    clip: bool = False,
) -> list[Levels]:
    """Levels of each view by DDIM inversion. `starts` has a (key, start) per view; equal keys share a trajectory."""
    levels: dict[tuple[Hashable, int], Levels] = {}
    for key, start in dict(starts).items():
        timesteps = {timestep_of(view) for view, (other, _) in zip(views, starts, strict=True) if other == key}
        path = range(0, max(timesteps) + 1, options.inversion_stride)
        for timestep, noisy in ddim_invert(denoiser.predict_noise, denoiser.schedule, start(), path, clip):
            if timestep in timesteps:
                levels[key, timestep] = denoiser.read_levels(noisy, timestep)
    return [levels[key, timestep_of(view)] for view, (key, _) in zip(views, starts, strict=True)]


def mean_levels(members: Iterator[Levels]) -> Levels:
    """The mean over an ensemble, summed in float32; a single member is given back as it is."""
    count, first = 1, next(members)
    total: Mapping[str, Tensor] = first
    for count, levels in enumerate(members, 2):  # noqa: B007  the last one is the number of members
        total = {name: level.float() + levels[name].float() for name, level in total.items()}
    return first if count == 1 else {name: (total[name] / count).to(level.dtype) for name, level in first.items()}


def timestep_of(view: ViewSpec) -> int:
    """Raises: ConfigError for a view without one."""
    if view.timestep is None:
        raise ConfigError("a diffusion teacher needs a timestep in every view; set extract.noise.timesteps")
    return view.timestep


def check_views(views: Sequence[ViewSpec], num_timesteps: int, options: EncodingOptions, draws_differ: bool) -> None:
    """Every timestep must be the teacher's and, by inversion, be on the way; without noise two draws would be one.

    Raises: ConfigError.
    """
    if late := [view.timestep for view in views if timestep_of(view) >= num_timesteps]:
        raise ConfigError(
            f"timestep {late[0]} is beyond this teacher's {num_timesteps} (0..{num_timesteps - 1}); lower it"
        )
    if not options.inverts:
        return
    if odd := [view.timestep for view in views if timestep_of(view) % options.inversion_stride]:
        raise ConfigError(
            f"timestep {odd[0]} is no multiple of the inversion's stride {options.inversion_stride}; "
            f"change extract.noise.timesteps or extract.teacher.options.inversion_stride"
        )
    if not draws_differ and len({(view.timestep, view.flip) for view in views}) < len(views):
        raise ConfigError(
            "ddim_inversion has no noise, so all draws of an image are equal; leave out extract.noise.draws"
        )
