"""Statistics of batch norms that no training measures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def batch_norms(module: nn.Module) -> list[_BatchNorm]:
    """All in a module."""
    return [part for part in module.modules() if isinstance(part, _BatchNorm)]


@contextmanager
def fresh_statistics(norms: Sequence[_BatchNorm]) -> Iterator[None]:
    """Running statistics begin anew, and become plain averages over the batches that pass inside.

    An untouched batch norm passes the first images on at a wild scale, which would make features look worse than they
    are. Norms are in eval mode afterwards.
    """
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    yield
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
        norm.eval()
