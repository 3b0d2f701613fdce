"""torch.compile for the residual and attention layers of diffusers' U-Nets, one by one.

The pass around them stays as it is, so that taps can be read between layers and the pass can stop at the last. Each
layer is compiled for the first size it sees, which in extraction is the only one. Batches of other sizes, as in live
encoding, run uncompiled, since compiling would cost more than they gain.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from torch import nn

_LAYER = re.compile(r".*\b(resnets|attentions)\.\d+")


def compile_layers(unet: nn.Module, taps: Iterable[str]) -> int:
    """Mark for compilation, at their first run, the layers that hold no tap inside; returns how many."""
    import torch

    taps = tuple(taps)
    layers = {
        path: module
        for path, module in unet.named_modules()
        if _LAYER.fullmatch(path) and not any(tap.startswith(f"{path}.") for tap in taps)
    }
    limits: Any = torch._dynamo.config  # layers of one class share code, and each of its shapes is a recompilation
    name = "recompile_limit" if hasattr(limits, "recompile_limit") else "cache_size_limit"  # before torch 2.7
    setattr(limits, name, max(getattr(limits, name), len(layers)))
    for module in layers.values():
        module.forward = _Compiled(module.forward)
    return len(layers)


class _Compiled:
    """A layer's forward, compiled for the shape of its first input."""

    def __init__(self, forward: Callable[..., Any]) -> None:
        import torch

        self._forward = forward
        self._compiled = torch.compile(forward, dynamic=False)
        self._shape: tuple[int, ...] | None = None

    def __call__(self, hidden: Any, *args: Any, **kwargs: Any) -> Any:
        import torch

        shape = tuple(hidden.shape)
        if self._shape is None:
            self._shape = shape
        if shape != self._shape:
            return self._forward(hidden, *args, **kwargs)
        try:
            return self._compiled(hidden, *args, **kwargs)
        except torch._dynamo.exc.TorchDynamoException as err:
            reason = str(err).strip().splitlines()[0][:160]
            raise TeacherError(
                f"torch.compile fails here ({reason}); leave out extract.teacher.options.compile"
            ) from err
