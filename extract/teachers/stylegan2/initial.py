"""What the weights of a StyleGAN2 generator are before training, by the names of `StyleGan2Network`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtpipe.extract.teachers.files.untrained import Initialise, TensorShapes

if TYPE_CHECKING:
    from torch import Tensor

_LATER = ("w_avg", "noise_strength")  # 0 at the beginning


def initial_stylegan2_weights(mapping_lr: float) -> Initialise:
    """Standard normal weights, constants and noise maps, those of the mapping over its learning rate; biases 0, and 1
    where they scale channels.

    Source: NVlabs/stylegan2-ada-pytorch, training/networks.py (lr_multiplier, bias_init of the affine layers).
    """

    def initialise(name: str, tensor: Tensor, _shapes: TensorShapes) -> None:
        layer, _, leaf = name.rpartition(".")
        if leaf in _LATER:
            tensor.zero_()
        elif leaf == "bias":
            tensor.fill_(float(layer.endswith(".affine")))
        else:
            tensor.normal_()
            if layer.startswith("mapping.fc"):
                tensor.div_(mapping_lr)

    return initialise
