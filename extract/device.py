"""Where networks run."""

from __future__ import annotations

from dtpipe.manifests.errors import ConfigError


def pick_device(name: str) -> str:
    """`cpu` or `cuda`; auto takes a GPU if there is one. Raises: ConfigError for cuda without a GPU."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "the device is to be cuda and torch sees no GPU; `dtpipe doctor` says why, or use --device cpu"
        )
    return name
