"""StyleGAN2 generators pickled by the TensorFlow implementations, NVlabs/stylegan2 and NVlabs/stylegan2-ada.

Such a file holds `dnnlib.tflib.network.Network` objects: named arrays, settings, and the source text that builds the
graph, which is left alone. Source of the names: NVlabs/stylegan2-ada-pytorch `legacy.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.extract.teachers.files.pickle import Record, is_size, numpy_array, shown
from dtpipe.extract.teachers.files.torch_files import check_size
from dtpipe.manifests.errors import TeacherError

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

NETWORK = "dnnlib.tflib.network.Network"
OLDEST_VERSION = 4
_FILTER = (1, 3, 3, 1)
_FIXED: dict[str, tuple[Any, ...]] = {  # the values, besides None, under which the graph is our network
    "architecture": ("skip",),
    "nonlinearity": ("lrelu",),
    "mapping_nonlinearity": ("lrelu",),
    "num_channels": (3,),
    "resample_kernel": (list(_FILTER), _FILTER),
    "use_noise": (True,),
}
_OTHERS = frozenset(
    {"latent_size", "label_size", "dlatent_size", "resolution", "mapping_layers", "label_fmaps", "mapping_fmaps"}
    | {"mapping_lrmul", "w_avg_beta", "fmap_base", "fmap_max", "num_fp16_res", "conv_clamp"}
    | {"truncation_psi", "truncation_cutoff", "style_mixing_prob", "structure", "fused_modconv"}
)
_LAYERS = {"Conv": "conv1", "Conv0_up": "conv0", "Conv1": "conv1", "ToRGB": "torgb"}
_PARTS = {
    "weight": "weight",
    "bias": "bias",
    "noise_strength": "noise_strength",
    "mod_weight": "affine.weight",
    "mod_bias": "affine.bias",
}


def tensorflow_generator(network: Record, where: str) -> tuple[dict[str, Tensor], float | None, float]:
    """(tensors under NVlabs/stylegan2-ada-pytorch's names, clamp of convolutions, learning rate of the mapping).

    Raises: TeacherError when the network has settings that change its graph, or is too old.
    """
    import torch

    settings = _settings(network, where)
    arrays: dict[str, NDArray[np.generic]] = {}
    size_bytes = 0
    for name, array in _arrays(network, "", where):
        size_bytes += array.nbytes
        check_size(size_bytes, Path(where), "its arrays repeat their values")
        arrays[name] = array
    if settings.get("label_size") and "mapping/LabelEmbed/weight" not in arrays:
        raise _other(where, "labels that are not embedded")
    tensors = {}
    for name, array in arrays.items():
        if (ours := _our_name(name)) is not None:
            tensors[ours] = torch.from_numpy(_our_shape(ours, array).copy())
    taps = torch.tensor(_FILTER, dtype=torch.float32)
    blocks = [name.removesuffix(".conv0.weight") for name in tensors if name.endswith(".conv0.weight")]
    for block in blocks:
        tensors |= {
            f"{layer}.resample_filter": torch.outer(taps, taps) / taps.sum() ** 2 for layer in (block, f"{block}.conv0")
        }
    rate = _number(settings, "mapping_lrmul", where)
    return tensors, _number(settings, "conv_clamp", where), 0.01 if rate is None else rate


def _settings(network: Record, where: str) -> Mapping[str, Any]:
    state = network.state
    if (
        not isinstance(state, dict)
        or not isinstance(state.get("version"), int)
        or not isinstance(state.get("static_kwargs"), dict)
    ):
        raise _other(where, "no settings")
    if state["version"] < OLDEST_VERSION:
        raise _other(where, f"version {shown(state['version'])}, so is of StyleGAN or older")
    settings: dict[str, Any] = state["static_kwargs"]
    for name, value in settings.items():
        if name not in _OTHERS and (name not in _FIXED or value not in (None, *_FIXED[name])):
            raise _other(where, f"{shown(name)} = {shown(value)}")
    return settings


def _number(settings: Mapping[str, Any], name: str, where: str) -> float | None:
    value = settings.get(name)
    if value is not None and not is_size(value):
        raise _other(where, f"{name} = {shown(value)}")
    return value


def _other(where: str, what: str) -> TeacherError:
    return TeacherError(
        f"{where}: the TensorFlow network has {what}; kind stylegan2 reads StyleGAN2 generators with skip connections "
        f"(config-e, config-f, ADA); legacy.py of NVlabs/stylegan2-ada-pytorch converts some others"
    )


def _arrays(network: object, prefix: str, where: str) -> Iterator[tuple[str, NDArray[np.generic]]]:
    """Own variables, then those of the components, one level deep."""
    if not isinstance(network, Record) or network.name != NETWORK or not isinstance(network.state, dict):
        raise _other(where, f"a component {shown(prefix)} that is no network")
    try:
        for name, value in network.state["variables"]:
            if isinstance(name, str) and _our_name(f"{prefix}{name}") is not None:
                yield f"{prefix}{name}", numpy_array(value, where)
        components: dict[str, object] = {} if prefix else {**network.state["components"]}
    except (KeyError, TypeError, ValueError) as err:
        raise _other(where, f"no list of variables ({err})") from err
    for name, component in components.items():
        yield from _arrays(component, f"{name}/", where)


def _our_name(name: str) -> str | None:
    """None for a variable that the generator does not use."""
    if name == "dlatent_avg":
        return "mapping.w_avg"
    if match := re.fullmatch(r"mapping/(?:Dense(\d+)|LabelEmbed)/(weight|bias)", name):
        return f"mapping.{'embed' if match[1] is None else f'fc{match[1]}'}.{match[2]}"
    if name == "synthesis/4x4/Const/const":
        return "synthesis.b4.const"
    if match := re.fullmatch(r"synthesis/noise(\d{1,2})", name):
        block, second = divmod(int(match[1]) + 1, 2)
        return f"synthesis.b{4 << block}.conv{second}.noise_const"
    if (match := re.fullmatch(r"synthesis/(\d+)x\d+/(\w+)/(\w+)", name)) and match[2] in _LAYERS and match[3] in _PARTS:
        return f"synthesis.b{match[1]}.{_LAYERS[match[2]]}.{_PARTS[match[3]]}"
    return None


def _our_shape(name: str, array: NDArray[np.generic]) -> NDArray[np.generic]:
    """TensorFlow has inputs before outputs, weights of transposed convolutions flipped, and scales without their 1."""
    if name.endswith("const"):
        ones = (1, 1) if name.endswith("noise_const") else (1,)
        return array.reshape(array.shape[len(ones) :]) if array.shape[: len(ones)] == ones else array
    if name.endswith("affine.bias"):
        return array + 1
    if array.ndim == 4:
        return (array[::-1, ::-1] if ".conv0." in name else array).transpose(3, 2, 0, 1)
    return array.T if array.ndim == 2 else array
