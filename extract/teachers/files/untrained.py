"""Teachers without training: the networks of checkpoints with the weights that their authors' code begins with.

What a student learns from such a teacher it learns from the architecture and the noise alone, which makes it the
control of a distillation. Weights are drawn from a seed by torch's generator on the CPU, the same wherever torch and
the kind of CPU are; the recipe has the seed, and the digest of what was drawn.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

TensorShapes = Mapping[str, tuple[int, ...]]
Initialise = Callable[[str, "Tensor", TensorShapes], object]
"""Fills a tensor, given its name and the shapes of all, by torch's global generator."""


@contextmanager
def drawn_from(seed: int | None) -> Iterator[None]:
    """Let torch's global generator on the CPU begin with a seed inside, and go on as before; None changes nothing."""
    import torch

    if seed is None:
        yield
        return
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def redrawn(tensors: Mapping[str, Tensor], initialise: Initialise, seed: int | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint as they are without a seed, else drawn anew, in the order of their names.

    Whole numbers, which count batches, become 0.
    """
    import torch

    if seed is None:
        return dict(tensors)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    fresh: dict[str, Tensor] = {}
    with drawn_from(seed), torch.no_grad():
        for name in sorted(tensors):
            if tensors[name].is_floating_point():
                fresh[name] = torch.empty(shapes[name])
                initialise(name, fresh[name], shapes)
            else:
                fresh[name] = torch.zeros_like(tensors[name])
    return fresh


def torchs_default(name: str, tensor: Tensor, shapes: TensorShapes) -> None:
    """Weights and biases of convolutions and linear layers as torch begins with; norms with 1 and 0.

    Both are uniform within 1/sqrt(fan in). Source: torch.nn.Linear and _ConvNd, reset_parameters.
    """
    layer, _, leaf = name.rpartition(".")
    weight = shapes.get(f"{layer}.weight", ())
    if len(weight) < 2:
        tensor.fill_(float(leaf == "weight"))
        return
    bound = 1 / math.sqrt(math.prod(weight[1:]))
    tensor.uniform_(-bound, bound)
