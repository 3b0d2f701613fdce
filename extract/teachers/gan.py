"""From noise to a GAN's latent and condition: pure functions of each sample's own noise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Table:
    """What images are conditioned on, a row each: always the same row, or a uniformly sampled one."""

    rows: Tensor  # (n, size) float32
    constant: int | None = None


def truncate(noise: Tensor, truncation: str, threshold: float | None) -> Tensor:
    """Latent numbers within [-threshold, threshold]: cut off there, or distributed as the truncated normal.

    The latter by inverse transform, in float64: the same quantile of the truncated distribution.
    Shapes: (B, n) -> (B, n) float32.
    """
    import torch

    if threshold is None:
        return noise
    if truncation == "clamp":
        return noise.clamp(-threshold, threshold)
    ndtr, ndtri = torch.special.ndtr, torch.special.ndtri
    bound = torch.tensor(threshold, dtype=torch.float64)
    low, high = ndtr(-bound), ndtr(bound)
    latent: Tensor = ndtri(low + ndtr(noise.cpu().double()) * (high - low))  # some devices have no float64
    return latent.clamp(-bound, bound).float().to(noise.device)


def choose_rows(tables: Sequence[Table], noise: Tensor | None, batch: int) -> Tensor:
    """The condition of each image: a row of each table, side by side; sampled where its part of the noise is largest.

    Shapes: noise (B, rows of all sampled tables), in the tables' order -> (B, sum of sizes).
    """
    import torch

    chosen, start = [], 0
    for table in tables:
        if table.constant is not None:
            chosen.append(table.rows[table.constant].expand(batch, -1))
        else:
            assert noise is not None
            part = noise[:, start : start + len(table.rows)]
            chosen.append(table.rows[part.argmax(dim=1)])
            start += len(table.rows)
    return torch.cat(chosen, dim=1)
