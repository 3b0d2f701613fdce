"""Names of a StyleGAN2 generator's tensors: rosinality's, turned into those of NVlabs/stylegan2-ada-pytorch.

Source: rosinality/stylegan2-pytorch `model.py`; NVlabs/stylegan2-ada-pytorch `legacy.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING

from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout

_UNUSED = re.compile(r"synthesis\.(b4|b\d+\.conv1)\.resample_filter")  # stored, but these layers do not resample


def used_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those that the network has."""
    return {name: tensor for name, tensor in tensors.items() if not _UNUSED.fullmatch(name)}


def find_layout(
    tensors: Mapping[str, Tensor], where: str, conv_clamp: float | None, mapping_lr: float, scaled_epsilon: bool
) -> StyleGan2Layout:
    """Sizes by the tensors' shapes.

    Raises: TeacherError when the first of a kind is missing or has another rank, or the images are not RGB.
    """
    from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout, block_name

    def shape(name: str, rank: int) -> tuple[int, ...]:
        sides = tuple(tensors[name].shape) if name in tensors else None
        if sides is None or len(sides) != rank:
            problem = "is missing" if sides is None else f"has shape {sides}"
            raise TeacherError(
                f"{where}: holds no StyleGAN2 generator ({name} {problem}); "
                f"kind stylegan2 reads StyleGAN2 and StyleGAN2-ADA"
            )
        return sides

    num_blocks = 1
    while f"synthesis.{block_name(num_blocks)}.conv1.weight" in tensors:
        num_blocks += 1
    num_layers = 1
    while f"mapping.fc{num_layers}.weight" in tensors:
        num_layers += 1
    height, width = shape("synthesis.b4.const", 3)[1:]
    colours = shape("synthesis.b4.torgb.weight", 4)[0]
    if colours != 3:
        raise TeacherError(f"{where}: the generator makes images of {colours} channels; use one that makes RGB images")
    embed_dim, num_classes = shape("mapping.embed.weight", 2) if "mapping.embed.weight" in tensors else (0, 0)
    z_dim = shape("mapping.fc0.weight", 2)[1] - embed_dim
    if z_dim < 1:
        raise TeacherError(f"{where}: the mapping takes no latent beside the class; use a generator that has one")
    widths = tuple(shape(f"mapping.fc{idx}.weight", 2)[0] for idx in range(num_layers))
    return StyleGan2Layout(
        z_dim=z_dim,
        w_dim=widths[-1],
        num_classes=num_classes,
        embed_dim=embed_dim,
        mapping_widths=widths,
        base_px=(height, width),
        channels=tuple(shape(f"synthesis.{block_name(idx)}.conv1.weight", 4)[0] for idx in range(num_blocks)),
        conv_clamp=conv_clamp,
        mapping_lr=mapping_lr,
        scaled_epsilon=scaled_epsilon,
    )


_STYLED = {
    "conv.weight": "weight",
    "conv.modulation.weight": "affine.weight",
    "conv.modulation.bias": "affine.bias",
    "noise.weight": "noise_strength",
    "activate.bias": "bias",
    "conv.blur.kernel": "resample_filter",
}
_COLOURS = {key: _STYLED[key] for key in ("conv.weight", "conv.modulation.weight", "conv.modulation.bias")} | {
    "bias": "bias"
}
_MOST_BLOCKS = 12  # more than any image needs


def from_rosinality(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under NVIDIA's names and in its shapes; a name that is not known stays."""
    names = _rosinality_names()
    return {names.get(name, name): _reshaped(names.get(name, name), tensor) for name, tensor in tensors.items()}


def _rosinality_names() -> dict[str, str]:
    """Rosinality's names to NVIDIA's, all that there can be."""
    from dtpipe.extract.teachers.stylegan2.network import block_name

    names = {
        "input.input": "synthesis.b4.const",
        "noises.noise_0": "synthesis.b4.conv1.noise_const",
        "latent_avg": "mapping.w_avg",
    }
    names |= {
        f"style.{idx + 1}.{kind}": f"mapping.fc{idx}.{kind}"
        for idx in range(_MOST_BLOCKS)
        for kind in ("weight", "bias")
    }
    layers = [("conv1", "b4.conv1", _STYLED), ("to_rgb1", "b4.torgb", _COLOURS)]
    for idx in range(_MOST_BLOCKS):
        block = block_name(idx + 1)
        for conv in range(2):
            layers.append((f"convs.{2 * idx + conv}", f"{block}.conv{conv}", _STYLED))
            names[f"noises.noise_{2 * idx + 1 + conv}"] = f"synthesis.{block}.conv{conv}.noise_const"
        layers.append((f"to_rgbs.{idx}", f"{block}.torgb", _COLOURS))
        names[f"to_rgbs.{idx}.upsample.kernel"] = f"synthesis.{block}.resample_filter"
    return names | {
        f"{theirs}.{key}": f"synthesis.{ours}.{value}" for theirs, ours, parts in layers for key, value in parts.items()
    }


def _reshaped(name: str, tensor: Tensor) -> Tensor:
    """Without the axes of length one that rosinality keeps, and kernels without the gain of upsampling."""
    if name.endswith("resample_filter"):
        return tensor / 4
    if name.endswith("torgb.bias"):
        return tensor.flatten()
    if name.endswith("noise_const"):
        return tensor.squeeze(0).squeeze(0)
    if name.endswith(("noise_strength", "b4.const", "conv0.weight", "conv1.weight", "torgb.weight")):
        return tensor.squeeze(0)
    return tensor
