"""In which arithmetic a network runs: float32 that is float32, or low precision with sensitive parts kept out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor, device


@contextmanager
def arithmetic(where: device, dtype: str) -> Iterator[None]:
    """Inference in `dtype`. Weights stay float32: below it, convolutions and products are cast as they run, norms and softmax are not.

    On a GPU no algorithm is chosen by timing, and float32 is not shortened to TF32.
    """
    import torch

    exact = torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False)
    low = torch.autocast(where.type, getattr(torch, dtype)) if dtype != "float32" else nullcontext()
    with torch.inference_mode(), exact if where.type == "cuda" else nullcontext(), low:
        yield


def storable(level: Tensor) -> Tensor:
    """A level as float32 or float16; bfloat16 has no place in a dataset."""
    import torch

    return level if level.dtype in (torch.float16, torch.float32) else level.float()
