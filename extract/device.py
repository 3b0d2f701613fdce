"""Where networks run."""

from __future__ import annotations

from dtpipe.manifests.errors import ConfigError


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
