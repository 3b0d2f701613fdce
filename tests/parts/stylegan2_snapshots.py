"""Tiny StyleGAN2 files in the published layouts, and a plain float64 restatement of the generator to compare with.

The layouts are those of pickles that NVIDIA's code makes; the classes they name exist only while a pickle is written.
"""

from __future__ import annotations

import math
import pickle
import sys
from collections import OrderedDict
from collections.abc import Mapping
from types import ModuleType
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.signal import convolve2d, correlate2d

from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout, StyleGan2Network

Array = NDArray[np.float64]


def random_weights(layout: StyleGan2Layout, seed: int = 0) -> dict[str, torch.Tensor]:
    """Normal weights under NVIDIA's names; the filters are not symmetric, so that a flipped one shows."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(tensor.shape, generator=generator)
        for name, tensor in StyleGan2Network(layout).state_dict().items()
    }
    for name, tensor in tensors.items():
        if name.endswith("resample_filter"):
            rows, columns = torch.tensor([1.0, 3, 3, 1]), torch.tensor([1.0, 2, 4, 1])
            tensor.copy_(torch.outer(rows, columns) / 64)
        elif name.startswith("mapping.fc"):
            tensor.mul_(100)  # the learning rate multiplier makes it 1 again
    return tensors


class EasyDict(dict[str, Any]):
    """As dnnlib's."""


class Made:
    """Pickled as a call of `function` with one argument."""

    def __init__(self, function: Any, argument: Any) -> None:
        self.call = (function, (argument,))

    def __reduce__(self) -> Any:
        return self.call


class Network:
    """As dnnlib.tflib's: its state is its dict."""

    def __init__(self, **state: Any) -> None:
        self.__dict__.update(state)


def _reconstruct_persistent_obj(_meta: Any) -> None:
    raise AssertionError("only its name is pickled")


_PLACES = {
    "torch_utils.persistence": _reconstruct_persistent_obj,
    "dnnlib.util": EasyDict,
    "dnnlib.tflib.network": Network,
}


def dumps(content: Any, protocol: int = 4) -> bytes:
    """Pickled under the published names."""
    modules = {name: ModuleType(name) for name in ("torch_utils", "dnnlib", "dnnlib.tflib", *_PLACES)}
    for place, thing in _PLACES.items():
        thing.__module__ = place
        setattr(modules[place], thing.__name__, thing)
    with patch.dict(sys.modules, modules):
        return pickle.dumps(content, protocol)


def module(
    class_name: str, tensors: Mapping[str, Any], modules: Mapping[str, Any], source: str = "", **settings: Any
) -> Made:
    """One persistent module; its tensors are parameters, or buffers where the original has them."""
    buffers = {name: tensor for name, tensor in tensors.items() if name in ("noise_const", "resample_filter", "w_avg")}
    state = {
        "training": False,
        "_parameters": {
            name: torch.nn.Parameter(value, False) for name, value in tensors.items() if name not in buffers
        },
        "_buffers": buffers,
        "_modules": OrderedDict(modules),
        "_init_kwargs": EasyDict(some=np.float64(1.5)),
        **settings,
    }
    meta = {"type": "class", "version": 6, "module_src": source, "class_name": class_name, "state": state}
    return Made(_reconstruct_persistent_obj, meta)


CLASSES = {"mapping": "MappingNetwork", "synthesis": "SynthesisNetwork", "torgb": "ToRGBLayer", "": "Generator"}


def persistent(
    tensors: Mapping[str, Any], layout: StyleGan2Layout, path: str = "", source: str = "", **changed: Any
) -> Made:
    """A generator as NVIDIA pickles it; `changed` replaces settings of all synthesis layers and blocks."""
    own = {name: tensor for name, tensor in tensors.items() if "." not in name}
    parts = sorted({name.split(".")[0] for name in tensors if "." in name})
    inside = {
        part: persistent(
            {n.removeprefix(f"{part}."): t for n, t in tensors.items() if n.startswith(f"{part}.")},
            layout,
            f"{path}.{part}",
            source,
            **changed,
        )
        for part in parts
    }
    last = path.rpartition(".")[2]
    settings: dict[str, Any] = {}
    class_name = CLASSES.get(last, "FullyConnectedLayer")
    if last in ("conv0", "conv1"):
        class_name = "SynthesisLayer"
        settings = {
            "activation": "lrelu",
            "use_noise": True,
            "conv_clamp": layout.conv_clamp,
            "act_gain": np.sqrt(2),
        } | changed
    elif last == "torgb":
        settings = {"conv_clamp": layout.conv_clamp}
    elif last[:1] == "b" and last[1:].isdecimal():
        class_name, settings = "SynthesisBlock", {"architecture": "skip"} | changed
    elif last.startswith("fc"):
        settings = {"activation": "lrelu", "bias_gain": layout.mapping_lr}
    return module(class_name, own, inside, source, **settings)


def snapshot(tensors: Mapping[str, Any], layout: StyleGan2Layout, **changed: Any) -> dict[str, Any]:
    """A network snapshot; its G has all weights doubled."""
    doubled = {name: tensor * 2 for name, tensor in tensors.items()}
    return {
        "training_set_kwargs": EasyDict(path="/data/x.zip"),
        "G": persistent(doubled, layout),
        "D": None,
        "G_ema": persistent(tensors, layout, **changed),
        "augment_pipe": None,
    }


def state_of(content: dict[str, Any], *path: str) -> dict[str, Any]:
    """The state of the averaged network of a snapshot, or of a module in it, to be changed before it is pickled."""
    state: dict[str, Any] = content["G_ema"].call[1][0]["state"]
    for name in path:
        state = state["_modules"][name].call[1][0]["state"]
    return state


def tensorflow(tensors: Mapping[str, torch.Tensor], version: int = 5, **settings: Any) -> tuple[Network, ...]:
    """The same weights as the TensorFlow code pickles them. Source of names: `legacy.py` of stylegan2-ada-pytorch."""
    parts: dict[str, list[tuple[str, Any]]] = {
        "": [("dlatent_avg", tensors["mapping.w_avg"].numpy())],
        "mapping": [],
        "synthesis": [],
    }
    for name, tensor in tensors.items():
        words, value = name.split("."), tensor.numpy()
        if words[0] == "mapping" and words[1] != "w_avg":
            layer = "LabelEmbed" if words[1] == "embed" else words[1].replace("fc", "Dense")
            parts["mapping"].append((f"{layer}/{words[2]}", value.T))
        elif words[0] == "synthesis" and words[-1] != "resample_filter":
            parts["synthesis"].append(_tensorflow_variable(words, value))
    parts["synthesis"].append(("lod", np.float32(0)))
    components = {name: _network(parts[name], {}, version) for name in ("mapping", "synthesis")}
    whole = _network(parts[""], {"label_size": 0, "resample_kernel": [1, 3, 3, 1]} | settings, version, **components)
    return Network(version=version), Network(version=version), whole


def _network(
    variables: list[tuple[str, Any]], settings: dict[str, Any], version: int, **components: Network
) -> Network:
    source = {"build_module_src": "raise RuntimeError('executed')", "build_func_name": "G_main"}
    return Network(version=version, static_kwargs=settings, components=components, variables=variables, **source)


def _tensorflow_variable(words: list[str], value: Any) -> tuple[str, Any]:
    res = int(words[1][1:])
    size = f"{res}x{res}"
    if words[2] == "const":
        return f"{size}/Const/const", value[None]
    layer = {"conv0": "Conv0_up", "conv1": "Conv1" if res > 4 else "Conv", "torgb": "ToRGB"}[words[2]]
    if words[3] == "noise_const":
        return f"noise{0 if res == 4 else int(math.log2(res)) * 2 - (5 if words[2] == 'conv0' else 4)}", value[
            None, None
        ]
    if words[3] == "affine":
        return f"{size}/{layer}/mod_{words[4]}", value.T if words[4] == "weight" else value - 1
    if words[3] == "weight":
        value = value.transpose(2, 3, 1, 0)
        return f"{size}/{layer}/weight", value[::-1, ::-1] if words[2] == "conv0" else value
    return f"{size}/{layer}/{words[3]}", np.float32(value) if value.ndim == 0 else value


def reference(
    tensors: Mapping[str, torch.Tensor], layout: StyleGan2Layout, styles: Array, noise: list[Array] | None
) -> tuple[Array, dict[str, Array]]:
    """The image and every convolution's output of one sample, with the weights scaled as in the paper (eq. 1 and 3).

    Shapes: styles (num_styles, w_dim), noise (h, w) each -> (3, H, W), {path: (C, h, w)}.
    """
    weights = {name.removeprefix("synthesis."): tensor.double().numpy() for name, tensor in tensors.items()}
    clamp = layout.conv_clamp or math.inf
    maps = iter(noise) if noise is not None else None
    outputs: dict[str, Array] = {}

    def modulated(name: str, style: Array, gain: float, demodulate: bool) -> Array:
        scales = weights[f"{name}.affine.weight"] @ style / math.sqrt(layout.w_dim) + weights[f"{name}.affine.bias"]
        kernel = weights[f"{name}.weight"] * gain * scales[None, :, None, None]
        return kernel / np.sqrt((kernel**2).sum((1, 2, 3), keepdims=True) + 1e-8) if demodulate else kernel

    def conv(name: str, x: Array, style: Array, up: bool) -> Array:
        fan_in = weights[f"{name}.weight"][0].size
        kernel = modulated(name, style, 1 / math.sqrt(fan_in) if layout.scaled_epsilon else 1, True)
        if up:
            spread = np.stack([zero_stuffed(each)[:-1, :-1] for each in x])
            x = np.stack([sum(convolve2d(each, k) for each, k in zip(spread, row, strict=True)) for row in kernel])
            x = np.stack([convolve2d(np.pad(each, 1), weights[f"{name}.resample_filter"] * 4, "valid") for each in x])
        else:
            x = np.stack([sum(correlate2d(each, k, "same") for each, k in zip(x, row, strict=True)) for row in kernel])
        if maps is not None:
            x = x + next(maps) * weights[f"{name}.noise_strength"]
        x = x + weights[f"{name}.bias"][:, None, None]
        outputs[f"synthesis.{name}"] = np.clip(np.where(x > 0, x, 0.2 * x) * math.sqrt(2), -clamp, clamp)
        return outputs[f"synthesis.{name}"]

    x, image, slot = weights["b4.const"], np.zeros((3, 1, 1)), 0
    for idx in range(len(layout.channels)):
        name = f"b{4 * 2**idx}"
        if idx:
            x = conv(f"{name}.conv0", x, styles[slot], True)
            padded = [np.pad(zero_stuffed(each), ((2, 1), (2, 1))) for each in image]
            image = np.stack([convolve2d(each, weights[f"{name}.resample_filter"] * 4, "valid") for each in padded])
            slot += 1
        x = conv(f"{name}.conv1", x, styles[slot], False)
        slot += 1
        kernel = modulated(f"{name}.torgb", styles[slot], 1 / math.sqrt(len(x)), False)[:, :, 0, 0]
        colours = np.einsum("oi,ihw->ohw", kernel, x) + weights[f"{name}.torgb.bias"][:, None, None]
        image = image + np.clip(colours, -clamp, clamp)
    return image, outputs


def zero_stuffed(x: Array) -> Array:
    """A zero after each value, on both axes."""
    out = np.zeros((2 * x.shape[0], 2 * x.shape[1]))
    out[::2, ::2] = x
    return out


def mapped(tensors: Mapping[str, torch.Tensor], layout: StyleGan2Layout, z: Array, label: int | None = None) -> Array:
    """The style of one latent. Shapes: (z_dim,) -> (w_dim,)."""
    weights = {name: tensor.double().numpy() for name, tensor in tensors.items()}

    def normalised(x: Array) -> Array:
        return x / np.sqrt((x**2).mean() + 1e-8)

    x = normalised(z)
    if label is not None:
        weight = weights["mapping.embed.weight"]
        x = np.concatenate(
            [x, normalised(weight[:, label] / math.sqrt(layout.num_classes) + weights["mapping.embed.bias"])]
        )
    for idx in range(len(layout.mapping_widths)):
        weight, bias = weights[f"mapping.fc{idx}.weight"], weights[f"mapping.fc{idx}.bias"]
        x = (weight @ x / math.sqrt(len(x)) + bias) * layout.mapping_lr
        x = np.where(x > 0, x, 0.2 * x) * math.sqrt(2)
    return x
