"""What the weights of a BigGAN generator are before training, by their published names."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtpipe.extract.teachers.files.untrained import TensorShapes, torchs_default

if TYPE_CHECKING:
    from torch import Tensor


def initial_biggan_weight(name: str, tensor: Tensor, shapes: TensorShapes) -> None:
    """Orthogonal weights and tables, torch's biases; attention starts at 0, norms at 1 and 0 without statistics.

    Source: ajbrock/BigGAN-PyTorch, BigGAN.py (init_weights, G_init ortho) and layers.py (u0, sv0, gamma, stored_*).
    """
    from torch import nn

    leaf = name.rpartition(".")[2]
    if leaf.startswith("u") and leaf[1:].isdigit():
        tensor.normal_()
    elif leaf in ("gamma", "accumulation_counter") or leaf.endswith("_mean"):
        tensor.zero_()
    elif leaf == "gain" or leaf.endswith("_var") or leaf.startswith("sv"):
        tensor.fill_(1)
    elif leaf == "weight" and tensor.ndim > 1:
        nn.init.orthogonal_(tensor)
    else:
        torchs_default(name, tensor, shapes)
