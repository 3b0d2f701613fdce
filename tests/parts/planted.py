"""Feature datasets of hand-made levels that follow their images, with faults that can be planted one by one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dtpipe.manifests.schema import LevelSpec, SourceRecipe, ViewSpec
from parts.images import draw_image
from parts.memory import MemorySource, level_spec, write_dataset

Fault = Callable[[str, int, int, np.ndarray], np.ndarray]
"""Level, row, draw, and the features of a sound dataset -> those with the fault."""
PER_SHARD = 8
NOISE = 0.3
_MIXING = {
    name: np.random.default_rng(place).standard_normal((width, 3))
    for place, (name, width) in enumerate({"l2": 12, "l3": 10}.items())
}


@dataclass
class Planted(MemorySource):
    """48 samples in 6 shards, two noise draws, l2 and l3 at 32 px: mixed colours of each cell, and noise."""

    num_rows: int = 48
    bad: tuple[int, ...] = ()
    views: tuple[ViewSpec, ...] = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=1, timestep=50))
    levels: tuple[LevelSpec, ...] = (level_spec("l2", 4, 12, dtype="float32"), level_spec("l3", 8, 10, dtype="float32"))
    fault: Fault = lambda _level, _row, _draw, features: features

    def image(self, row: int) -> np.ndarray:
        return draw_image(row)

    def features(self, level: LevelSpec, row: int, view: int = 0) -> np.ndarray:
        cells = self.image(row).reshape(level.height, level.stride, level.width, level.stride, 3).mean(axis=(1, 3))
        mixed = np.einsum("kc,hwc->khw", _MIXING[level.name], cells / 127.5 - 1)
        noise = np.random.default_rng([row, view, level.stride]).standard_normal(mixed.shape)
        return self.fault(level.name, row, view, np.tanh(mixed) + NOISE * noise).astype(level.dtype)


def write_planted(root: Path, fault: Fault | None = None, **changes: object) -> Path:
    """The dataset in a folder; rows stand in the order of the source, eight a shard."""
    source = Planted(**({} if fault is None else {"fault": fault}), **changes)  # type: ignore[arg-type]
    return write_dataset(root, source, source=SourceRecipe(kind="folder", order="container"))


def constant_level(level: str, _row: int, _draw: int, features: np.ndarray) -> np.ndarray:
    return np.full_like(features, 0.5) if level == "l3" else features


def dead_channel(level: str, _row: int, _draw: int, features: np.ndarray) -> np.ndarray:
    if level == "l2":
        features[7] = 3.25
    return features


def exploding_channel(level: str, _row: int, _draw: int, features: np.ndarray) -> np.ndarray:
    if level == "l3":
        features[4] *= 1000
    return features


def shifted_shard(level: str, row: int, _draw: int, features: np.ndarray) -> np.ndarray:
    return features + 2.0 if level == "l2" and row // PER_SHARD == 4 else features


def louder_shard(level: str, row: int, _draw: int, features: np.ndarray) -> np.ndarray:
    return features * 4 if level == "l3" and row // PER_SHARD == 1 else features


def only_noise(level: str, row: int, draw: int, features: np.ndarray) -> np.ndarray:
    return np.random.default_rng([row, draw, len(level), 9]).standard_normal(features.shape)


def alike(level: str, row: int, draw: int, features: np.ndarray) -> np.ndarray:
    same = np.random.default_rng(len(level) + len(features)).standard_normal(features.shape)
    return same + 0.02 * features


def of_other_images(level: str, row: int, draw: int, features: np.ndarray) -> np.ndarray:
    own = Planted()
    spec = next(one for one in own.levels if one.name == level)
    return own.features(spec, (row + 11) % own.num_rows, draw)


def equal_draws(level: str, row: int, _draw: int, _features: np.ndarray) -> np.ndarray:
    own = Planted()
    return own.features(next(one for one in own.levels if one.name == level), row, 0)


def linear_level(level: str, row: int, draw: int, features: np.ndarray) -> np.ndarray:
    if level == "l2":
        return features
    own = Planted()
    fine = own.features(own.levels[0], row, draw).astype(np.float64)
    halved = fine.reshape(12, 4, 2, 4, 2).mean(axis=(2, 4))
    return 3 * halved[:10] - halved[1:11]
