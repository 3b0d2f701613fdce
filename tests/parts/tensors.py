"""Random inputs, views, what modules give in a plain forward pass, and how far two tensors are apart."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from dtpipe.manifests.schema import ViewSpec


def randn(*shape: int, seed: int = 0) -> Tensor:
    """Standard normal, the same in every call."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def random_images(batch: int = 2, height: int = 64, width: int = 64, seed: int = 1) -> Tensor:
    """Uniform in [-1, 1]. Shapes: -> (B, 3, H, W)."""
    return torch.rand((batch, 3, height, width), generator=torch.Generator().manual_seed(seed)) * 2 - 1


def random_weights(shapes: Mapping[str, Sequence[int]]) -> dict[str, Tensor]:
    """Normal weights scaled by their fan-in, as `shapes` of a checkpoint says."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(tuple(shape), generator=generator) / max(1, int(np.prod(shape[1:]))) ** 0.5
        for name, shape in shapes.items()
    }


def view(timestep: int | None = 150, draw: int = 0, flip: bool = False) -> ViewSpec:
    """One encoding of an image."""
    return ViewSpec(draw=draw, timestep=timestep, flip=flip)


def views(*timesteps: int, flips: Sequence[bool] = (False,)) -> list[ViewSpec]:
    """Draw 0 at some timesteps."""
    return [view(timestep, flip=flip) for timestep in timesteps for flip in flips]


def hooked(network: nn.Module, taps: Mapping[str, str], run: Callable[[], object]) -> dict[str, Tensor]:
    """Outputs of the modules at some paths while `run` makes a whole forward pass, without gradients."""
    seen: dict[str, Tensor] = {}

    def keep(name: str, output: Tensor | tuple[Tensor, ...]) -> None:
        seen[name] = (output[0] if isinstance(output, tuple) else output).clone()

    handles = [
        network.get_submodule(path).register_forward_hook(lambda _m, _i, output, name=name: keep(name, output))
        for name, path in taps.items()
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return seen


def relative(found: Tensor, expected: Tensor | np.ndarray) -> float:
    """Largest difference over the largest expected value."""
    expected = torch.as_tensor(expected).double()
    return float((found.double() - expected).abs().max() / expected.abs().max())
