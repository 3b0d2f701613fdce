"""The diffusion process a teacher was trained for: its noise schedule, q(x_t | x_0), DDIM sampling and its inversion.

Timesteps are 0-based: 0 is one noise step, as in guided-diffusion and diffusers. The schedule is kept in float64 on
the host and rounded to float32 only where it meets an image.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.phases import counted

if TYPE_CHECKING:
    from torch import Tensor

Schedule = NDArray[np.float64]
_CHECK = "check scheduler_config.json, or download or export the teacher again"


def alphas_cumprod(config: Mapping[str, Any]) -> Schedule:
    """Products of 1 - beta of a diffusers scheduler config, float64, (num_train_timesteps,).

    Raises: TeacherError for a beta schedule that is none of linear, scaled_linear, squaredcos_cap_v2 or trained betas,
    or that is no variances.
    """
    try:
        betas = _betas(config)
    except (TypeError, ValueError) as err:
        raise TeacherError(f"scheduler has no schedule of betas ({err}); {_CHECK}") from err
    if betas.ndim != 1 or not len(betas) or not ((betas >= 0) & (betas < 1)).all():
        raise TeacherError(f"scheduler has betas that are no variances between 0 and 1; {_CHECK}")
    return np.cumprod(1 - betas, dtype=np.float64)


def _betas(config: Mapping[str, Any]) -> Schedule:
    steps = int(config.get("num_train_timesteps", 1000))
    start, end = float(config.get("beta_start", 1e-4)), float(config.get("beta_end", 0.02))
    name = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None:
        return np.asarray(config["trained_betas"], dtype=np.float64)
    if name == "linear":
        return np.linspace(start, end, steps, dtype=np.float64)
    if name == "scaled_linear":
        return np.square(np.linspace(start**0.5, end**0.5, steps, dtype=np.float64))
    if name == "squaredcos_cap_v2":
        return _cosine_betas(steps)
    raise TeacherError(
        f"scheduler has beta_schedule {name!r}; linear, scaled_linear, squaredcos_cap_v2 and trained_betas are known"
    )


def _cosine_betas(steps: int) -> Schedule:
    """Source: Nichol & Dhariwal, arXiv 2102.09672, eq. 17, with betas capped at 0.999."""
    at = np.arange(steps + 1) / steps
    level = np.cos((at + 0.008) / 1.008 * np.pi / 2) ** 2
    betas: Schedule = np.minimum(1 - level[1:] / level[:-1], 0.999)
    return betas


def q_sample(schedule: Schedule, images: Tensor, timestep: int, noise: Tensor) -> Tensor:
    """x_t = sqrt(a) x_0 + sqrt(1 - a) eps, a = alphas_cumprod[timestep].

    Shapes: images, noise (B, C, H, W) -> the same, in the images' dtype.
    Source: Ho et al., arXiv 2006.11239, eq. 4; guided-diffusion's `q_sample`.
    """
    kept = schedule[timestep]
    return float(np.float32(np.sqrt(kept))) * images + float(np.float32(np.sqrt(1 - kept))) * noise


def ddim_timesteps(num_timesteps: int, steps: int) -> list[int]:
    """`steps` timesteps from the last to the first, evenly spaced, with both ends."""
    return [int(at) for at in np.rint(np.linspace(num_timesteps - 1, 0, min(steps, num_timesteps)))]


def ddim_sample(
    predict_noise: Callable[[Tensor, int], Tensor], schedule: Schedule, start: Tensor, steps: int
) -> Tensor:
    """Images from pure noise by deterministic DDIM; x_0 is clipped to [-1, 1] at each step.

    Shapes: start (B, C, H, W) of unit variance -> the same, in [-1, 1].
    Source: Song et al., arXiv 2010.02502, eq. 12 with sigma = 0.
    """
    order = ddim_timesteps(len(schedule), steps)
    current = start
    steps_taken = counted(zip(order, [*order[1:], None], strict=True), len(order), "denoising steps")
    for timestep, following in steps_taken:
        after = schedule[following] if following is not None else 1.0
        current = _ddim_step(current, predict_noise(current, timestep), schedule[timestep], after, clip=True)
    return current


def ddim_invert(
    predict_noise: Callable[[Tensor, int], Tensor],
    schedule: Schedule,
    images: Tensor,
    path: Sequence[int],
    clip: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """(T, x_T) at each timestep of `path`, ascending, by deterministic DDIM run backwards from the images.

    Each step's noise is predicted at the timestep that x is at; the images count as x at the first timestep of `path`.
    `clip`: clip x_0 to [-1, 1] at each step.
    Shapes: images (B, C, H, W) -> the same.
    Source: guided-diffusion's `ddim_reverse_sample`, `path` being its timestep_map. diffusers' DDIMInverseScheduler
    follows another rule: it predicts at the timestep that x goes to, and starts from a noiseless image.
    """
    current = images
    yield path[0], current
    for timestep, following in pairwise(path):
        current = _ddim_step(current, predict_noise(current, timestep), schedule[timestep], schedule[following], clip)
        yield following, current


def predict_clean(noisy: Tensor, noise: Tensor, kept: float) -> Tensor:
    """x_0 = (x_t - sqrt(1 - a) eps) / sqrt(a), `kept` = a. Shapes: (B, C, H, W) both -> the same."""
    return (noisy - float((1 - kept) ** 0.5) * noise) / float(kept**0.5)


def _ddim_step(current: Tensor, noise: Tensor, kept: float, after: float, clip: bool) -> Tensor:
    """From the noise level of alphas_cumprod `kept` to that of `after`, in either direction."""
    clean = predict_clean(current, noise, kept)
    if clip:
        clean = clean.clamp(-1, 1)
        noise = (current - float(kept**0.5) * clean) / float((1 - kept) ** 0.5)
    return float(after**0.5) * clean + float((1 - after) ** 0.5) * noise
