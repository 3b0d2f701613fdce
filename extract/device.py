"""Where networks run, and what to say where they do not fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from dtpipe.manifests.errors import ConfigError, DeviceMemoryError
from dtpipe.manifests.words import count_of

_NO_ROOM = ("out of memory", "can't allocate memory")  # what torch says of CUDA and MPS, and of the CPU
RECOMPUTE = "give --device cpu, or verify with --level decode"
NOTHING_YET = "nothing is written yet: give a smaller --batch-size"


def pick_device(name: str) -> str:
    """`cpu`, `cuda` or `mps`; auto takes a GPU of CUDA if there is one.

    Raises: ConfigError for a device that is not there.
    """
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "the device is to be cuda and torch sees no GPU; `dtpipe doctor` says why, or use --device cpu"
        )
    if name == "mps" and not torch.backends.mps.is_available():
        raise ConfigError(
            "the device is to be mps and torch finds no GPU of Apple's; `dtpipe doctor` says what is here, or use "
            "--device cpu"
        )
    return name


@contextmanager
def saying_what_to_lower(what: str, device: str, batch_size: int, remedy: str = "") -> Iterator[None]:
    """In this block `what` goes through a network in batches.

    `remedy`: what to do; empty: go on with a smaller batch, since what is committed stays.
    Raises: DeviceMemoryError where the device, or the host, has no room for a batch.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as err:
        text = str(err)
        if not isinstance(err, MemoryError) and not any(words in text for words in _NO_ROOM):
            raise
        reason = text.splitlines()[0] if text else type(err).__name__
        raise DeviceMemoryError(
            f"{what}: {device} has no memory for {count_of(batch_size, 'image')} at once ({reason}); "
            f"{remedy or _go_on(batch_size)}"
        ) from err


def _go_on(batch_size: int) -> str:
    stays = "all committed shards stay: run the same command again"
    if batch_size == 1:
        return f"{stays} where more memory is free"
    return f"{stays} with --lower-batch-to {batch_size // 2}, which the shards that are left will say of themselves"
