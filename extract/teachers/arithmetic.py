"""In which arithmetic a network runs: float32 that is float32, or low precision with sensitive parts kept out of it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor


@contextmanager
def exact(device: torch.device, threads: int | None = None) -> Iterator[None]:
    """Fix what results depend on, whatever the process has chosen for itself, and restore it afterwards.

    On a GPU no algorithm is chosen by timing, and float32 is not shortened to TF32. `threads` is the number of CPU
    threads; it holds for the calling thread, since OpenMP keeps the number per thread.
    """
    with _threads(threads), _exact_kernels() if device.type == "cuda" else nullcontext():
        yield


@contextmanager
def _threads(number: int | None) -> Iterator[None]:
    import torch

    before = torch.get_num_threads()
    if number is None or number == before:
        yield
        return
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def _exact_kernels() -> Iterator[None]:
    import torch

    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            yield
    finally:
        torch.set_float32_matmul_precision(precision)


@contextmanager
def arithmetic(device: torch.device, dtype: str = "float32") -> Iterator[None]:
    """Inference in `dtype`. Weights stay float32; convolutions and products are cast as they run, norms are not."""
    import torch

    low = torch.autocast(device.type, getattr(torch, dtype)) if dtype != "float32" else nullcontext()
    with torch.inference_mode(), exact(device), low:
        yield


def storable(level: Tensor) -> Tensor:
    """A level as float32 or float16; bfloat16 has no place in a dataset."""
    import torch

    return level if level.dtype in (torch.float16, torch.float32) else level.float()
