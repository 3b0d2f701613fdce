"""On which device, in which arithmetic and from which random numbers an optimisation runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

import torch

from dtpipe.manifests.errors import ConfigError

_WITHOUT_FLOAT64: Final = frozenset({"mps"})


def training_device(name: str) -> torch.device:
    """The device of a config: auto is a GPU of CUDA where there is one.

    Raises: ConfigError when a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device is cuda and torch finds no GPU; `dtpipe doctor` says why, or use auto or cpu")
    if name == "mps":
        if not torch.backends.mps.is_available():
            raise ConfigError(
                "device is mps and torch finds no GPU of Apple's; `dtpipe doctor` says what is here, or use auto or cpu"
            )
        return torch.device("mps")
    if name == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())  # by number: each thread has a current GPU of its own


def as_float64(values: torch.Tensor) -> torch.Tensor:
    """On the device of the values, or on the CPU where that device has no float64."""
    return (values.cpu() if values.device.type in _WITHOUT_FLOAT64 else values).double()


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Dtype of the forward pass: auto is bfloat16 where the GPU has it, else float32.

    Raises: ConfigError for float16 on a CPU, where its gradients are not scaled.
    """
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    if name == "float16" and device.type == "cpu":
        raise ConfigError("precision is float16, which trains on a GPU only; use bfloat16 or float32")
    precision: torch.dtype = getattr(torch, name)
    return precision


def autocast(precision: torch.dtype, device: torch.device) -> torch.autocast:
    """Around a forward pass: float32 leaves it as it is."""
    return torch.autocast(device.type, precision, enabled=precision != torch.float32)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's global generators begin at `seed` inside, and are afterwards as they were before."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
