"""Where networks run, and what to say where they do not fit."""

from __future__ import annotations

from dtpipe.manifests.errors import ConfigError

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


def go_on_with_less(batch_size: int) -> str:
    """What to do where a shard's batches of this size have no room."""
    stays = "all committed shards stay: run the same command again"
    if batch_size == 1:
        return f"{stays} where more memory is free"
    return f"{stays} with --lower-batch-to {batch_size // 2}, which the shards that are left will say of themselves"
