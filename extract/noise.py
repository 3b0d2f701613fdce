"""Which noise a sample sees: a pure function of (seed, key, draw, stream).

Nothing here depends on batch size, worker, order or machine: numpy's Philox generator on the host, in float32.
(torch's CPU generator differs between CPU kernels.) Stored draws are k < K, live ones K + epoch.
"""

from __future__ import annotations

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.manifests.errors import ConfigError

STREAMS = ("forward", "vae", "z", "style_noise", "label")
"""What the noise is for: diffusion's forward process, a VAE's posterior, a GAN's latent, StyleGAN's noise maps, a class."""


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
