"""Which noise a sample sees: a pure function of (seed, key, draw, stream).

Nothing here depends on batch size, worker, order or machine: numpy's Philox generator on the host, in float32.
(torch's CPU generator differs between CPU kernels.) Stored draws are k < K, live ones K + epoch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import ViewSpec

STREAMS = ("forward", "vae", "z", "style_noise", "label")
"""What the noise is for: diffusion's forward process, a VAE's posterior, a GAN's latent, StyleGAN's noise maps, a
class."""

RowNoise = Mapping[str, NDArray[np.float32]]
"""All noise of one sample: stream -> [K, *shape], one entry per distinct draw."""


def draw_seed(seed: int, key: str, draw: int, stream: str) -> int:
    """Seed of one noise draw for numpy's Philox, equal on every machine. Range [0, 2**63).

    Raises: ConfigError for a stream that is not in `STREAMS`, or a negative draw.
    """
    if stream not in STREAMS:
        raise ConfigError(f"noise stream {stream!r} is unknown; choose one of {list(STREAMS)}")
    if draw < 0:
        raise ConfigError(f"noise draw {draw} of {key} is negative; draws count from 0")
    digest = blake3(f"{seed}/{stream}/{draw}/{key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


def draw_noise(seed: int, key: str, draw: int, stream: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Standard normal noise of one draw of one sample, on the host.

    Shapes: -> `shape` float32.
    Raises: as `draw_seed`.
    """
    generator = np.random.Generator(np.random.Philox(draw_seed(seed, key, draw, stream)))
    return generator.standard_normal(shape, dtype=np.float32)


def distinct_draws(views: Sequence[ViewSpec]) -> tuple[int, ...]:
    """Noise draws that the views use, ascending; views that share a draw share its noise."""
    return tuple(sorted({view.draw for view in views}))


def row_noise(
    seed: int,
    key: str,
    views: Sequence[ViewSpec],
    shapes: Mapping[str, tuple[int, ...]],
    image_px: tuple[int, int],
) -> RowNoise:
    """All noise that one sample needs; `shapes` are those of a teacher, `TeacherSpec.noise_shapes`.

    Shapes: {stream: [K, *shape]} float32, K distinct draws in ascending order.
    """
    draws = distinct_draws(views)
    return {
        stream: np.stack([draw_noise(seed, key, draw, stream, _shape_of_draw(shape, image_px)) for draw in draws])
        for stream, shape in shapes.items()
    }


def _shape_of_draw(shape: tuple[int, ...], image_px: tuple[int, int]) -> tuple[int, ...]:
    """A spec's shape with a trailing -n, -n replaced by an n-th of the image's height and width."""
    return (*shape[:-2], *(px // -size if size < 0 else size for px, size in zip(image_px, shape[-2:], strict=False)))
