"""What a teacher is trained on: all images, decoded in memory, and the batch of each step.

A batch is a function of (seed, step): which images, flips, timesteps, noise and withheld classes. Each process draws
its own part of it and gets what one process alone would have drawn there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from torch import Tensor

from dtpipe.distill.stream.batch import scaled
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.network import null_class


@dataclass(frozen=True)
class TrainImages:
    """All usable images of the source, in the listing's order."""

    pixels: NDArray[np.uint8]
    """[N, H, W, 3]"""
    keys: tuple[str, ...]
    labels: NDArray[np.int64] | None = None
    """[N], positions in `classes`."""
    classes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()
    """`key: reason` of each image that was left out."""


OpenImages = Callable[[TrainTeacherConfig, int], TrainImages]
"""Decodes the images of a config, in as many processes of this machine as it is told."""


@dataclass(frozen=True)
class NoiseBatch:
    """One process's part of one step."""

    clean: Tensor
    """(b, 3, H, W) in [-1, 1]"""
    timesteps: Tensor
    """(b,)"""
    noise: Tensor
    """(b, 3, H, W)"""
    labels: Tensor | None
    """(b,)"""
    keys: tuple[str, ...]
    num_global: int
    """Images of the step, over all processes."""
    last: bool = True

    @property
    def weight(self) -> float:
        """Share of the step's images."""
        return len(self.keys) / self.num_global

    def to(self, device: torch.device) -> NoiseBatch:
        """The same on a device."""
        clean, timesteps, noise = (tensor.to(device) for tensor in (self.clean, self.timesteps, self.noise))
        labels = self.labels.to(device) if self.labels is not None else None
        return replace(self, clean=clean, timesteps=timesteps, noise=noise, labels=labels)


def batches_ahead(config: TrainTeacherConfig, images: TrainImages, start: int, part: range) -> Iterator[NoiseBatch]:
    """The parts of the steps from `start` to the last; a thread draws the next one while this one is trained on."""
    with ThreadPoolExecutor(1, thread_name_prefix="batch") as ahead:
        coming = ahead.submit(draw_batch, config, images, start, part)
        for step in range(start, config.run.steps):
            batch = coming.result()
            coming = ahead.submit(draw_batch, config, images, step + 1, part)
            yield batch


def draw_batch(config: TrainTeacherConfig, images: TrainImages, step: int, part: range | None = None) -> NoiseBatch:
    """The images at the places `part` of one step's batch, by default all; a function of (seed, step, place)."""
    part = part if part is not None else range(config.batch_size)
    rng, num = _generator(config.seed, "step", step), config.batch_size
    timesteps, turned, withheld = (
        rng.integers(config.timesteps, size=num),
        rng.random(num) < 0.5,
        rng.random(num) < config.label_dropout,
    )
    at = slice(part.start, part.stop)
    rows = _rows(config, len(images.pixels), range(step * num + part.start, step * num + part.stop))
    chosen = images.pixels[rows]  # (b, H, W, 3)
    if config.flip:
        chosen = np.where(turned[at, None, None, None], chosen[:, :, ::-1], chosen)
    noise = np.empty((len(part), 3, *config.image_px), np.float32)
    for place, values in zip(part, noise, strict=True):
        _generator(config.seed, f"noise/{step}", place).standard_normal(dtype=np.float32, out=values)
    return NoiseBatch(
        clean=scaled(torch.from_numpy(chosen)).contiguous(),
        timesteps=torch.from_numpy(timesteps[at]),
        noise=torch.from_numpy(noise),
        labels=_labels(config, images, rows, withheld[at]),
        keys=tuple(images.keys[row] for row in rows),
        num_global=num,
    )


def _labels(
    config: TrainTeacherConfig, images: TrainImages, rows: list[int], withheld: NDArray[np.bool_]
) -> Tensor | None:
    if images.labels is None:
        return None
    null = null_class(config, len(images.classes))
    labels = images.labels[rows]
    return torch.from_numpy(labels if null is None else np.where(withheld, null, labels))


def _rows(config: TrainTeacherConfig, num: int, positions: range) -> list[int]:
    """Images at positions of the endless sequence of shuffled epochs."""
    return [int(_permutation(config.seed, at // num, num)[at % num]) for at in positions]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num: int) -> NDArray[np.int64]:
    return _generator(seed, "epoch", epoch).permutation(num)


def _generator(seed: int, stream: str, index: int) -> np.random.Generator:
    digest = blake3(f"{seed}/train-teacher/{stream}/{index}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "big")))
