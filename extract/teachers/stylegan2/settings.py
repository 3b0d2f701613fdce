"""Settings of NVIDIA's pickled modules that their tensors do not tell.

A module's attributes say what it computes. Those that our network has in one value only must have it; those that its
tensors tell, or that change no result, are passed over; any other one may make it another network, so it is refused.
Source: NVlabs/stylegan2-ada-pytorch `training/networks.py`, NVlabs/stylegan3 `training/networks_stylegan2.py`.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dtpipe.extract.teachers.files.pickle import Record, is_size, numpy_array, shown
from dtpipe.manifests.errors import TeacherError

_SIZES = frozenset({"in_channels", "out_channels", "w_dim", "resolution", "img_channels", "img_resolution", "z_dim"})
_PASSED_OVER: dict[str, frozenset[str]] = {
    "Generator": _SIZES | {"c_dim", "num_ws"},
    "MappingNetwork": _SIZES | {"c_dim", "num_ws", "num_layers", "w_avg_beta", "trainable_layers"},
    "SynthesisNetwork": _SIZES | {"img_resolution_log2", "num_fp16_res", "block_resolutions", "num_ws"},
    "SynthesisBlock": _SIZES
    | {"is_last", "use_fp16", "channels_last", "fused_modconv_default", "num_conv", "num_torgb"},
    "SynthesisLayer": _SIZES | {"conv_clamp"},
    "ToRGBLayer": _SIZES | {"conv_clamp"},
    "FullyConnectedLayer": frozenset({"in_features", "out_features", "bias_gain"}),
}
"""Attributes by class that tensors tell, that `NvidiaSettings` has, or that change no more than the last bits."""

_MEANINGS = {
    "use_noise": " (it was trained without noise maps)",
    "h_dim": " (it is IC-GAN's, conditioned on an instance's features; kind icgan reads those of a BigGAN backbone)",
    "architecture": " (its images are not sums over toRGB layers)",
}


@dataclass(frozen=True)
class NvidiaModule:
    """One module of a pickled network."""

    path: str
    class_name: str
    state: Mapping[str, Any]

    @property
    def settings(self) -> Mapping[str, Any]:
        """Attributes but for torch's own, numpy's numbers as plain ones."""
        return {
            name: _plain(value)
            for name, value in self.state.items()
            if isinstance(name, str) and not name.startswith("_") and name != "training"
        }


@dataclass(frozen=True)
class NvidiaSettings:
    """What our network takes of the settings."""

    conv_clamp: float | None
    mapping_lr: float


def read_settings(
    modules: Sequence[NvidiaModule], shapes: Mapping[str, Sequence[int]], ignored: Collection[str], where: str
) -> NvidiaSettings:
    """What weights do not tell; `ignored` are names of settings that are known to change nothing.

    Raises: TeacherError when a setting makes it another network than ours, or may do so.
    """
    if any(module.class_name == "SynthesisInput" for module in modules):
        raise TeacherError(f"{where}: is a StyleGAN3 generator; kind stylegan2 reads StyleGAN2 and StyleGAN2-ADA")
    for module in modules:
        _check(module, shapes, ignored, where)
    clamp = _shared(modules, ("SynthesisLayer", "ToRGBLayer"), "conv_clamp", where)
    layers = [module for module in modules if _is_mapping_layer(module)]
    rate = _shared(layers, ("FullyConnectedLayer",), "bias_gain", where)
    return NvidiaSettings(clamp, 0.01 if rate is None else rate)


def _check(module: NvidiaModule, shapes: Mapping[str, Sequence[int]], ignored: Collection[str], where: str) -> None:
    if module.class_name not in _PASSED_OVER:
        raise TeacherError(
            f"{where}: {module.path or 'the network'} is a {module.class_name or 'module without a class'}, as in no "
            f"StyleGAN2 of NVlabs with skip connections; give one of its network snapshots"
        )
    fixed = dict(_fixed(module, shapes))
    for name, value in module.settings.items():
        if name in fixed and not _equal(value, fixed[name]):
            raise TeacherError(
                f"{where}: {module.path or 'the network'} has {name} {shown(value)}{_MEANINGS.get(name, '')}; "
                f"kind stylegan2 reads networks with {fixed[name]!r}"
            )
        if name not in fixed and name not in _PASSED_OVER[module.class_name] and name not in ignored:
            raise TeacherError(
                f"{where}: {module.path or 'the network'} has a setting {name} ({shown(value)}) that no "
                f"{module.class_name} of NVlabs has, so it may compute something else; where it changes no output of "
                f"the generator, set extract.teacher.options.ignored_settings=[{name}]"
            )


def _fixed(module: NvidiaModule, shapes: Mapping[str, Sequence[int]]) -> Iterator[tuple[str, Any]]:
    """The settings of a module that our network has in one value."""
    shape = shapes.get(f"{module.path}.weight", ())
    fan_in = math.prod(shape[1:])
    if module.class_name in ("Generator", "MappingNetwork"):
        yield "h_dim", 0
    elif module.class_name == "SynthesisBlock":
        yield "architecture", "skip"
    elif module.class_name == "SynthesisLayer":
        up = 2 if module.path.endswith(".conv0") else 1
        yield from {"use_noise": True, "activation": "lrelu", "act_gain": math.sqrt(2), "up": up, "padding": 1}.items()
    elif module.class_name == "ToRGBLayer":
        yield "weight_gain", 1 / math.sqrt(fan_in or 1)
    elif module.class_name == "FullyConnectedLayer":
        rate = module.settings.get("bias_gain", 1) if _is_mapping_layer(module) else 1
        yield "activation", "lrelu" if _is_mapping_layer(module) else "linear"
        yield "bias_gain", rate
        if is_size(rate):  # else `_shared` says what is wrong
            yield "weight_gain", rate / math.sqrt(fan_in or 1)


def _is_mapping_layer(module: NvidiaModule) -> bool:
    return module.path.startswith("mapping.fc")


def _equal(value: object, fixed: object) -> bool:
    if isinstance(fixed, bool) or not isinstance(fixed, (int, float)):
        return type(value) is type(fixed) and value == fixed
    return type(value) in (int, float) and math.isclose(cast(float, value), fixed, rel_tol=1e-6)


def _plain(value: object) -> object:
    return numpy_array(value, "a setting").item() if isinstance(value, Record) and _is_scalar(value) else value


def _is_scalar(record: Record) -> bool:
    return record.name.endswith(".scalar")


def _shared(modules: Sequence[NvidiaModule], class_names: tuple[str, ...], attribute: str, where: str) -> float | None:
    """A number, or None, that all modules of some classes have.

    Raises: TeacherError when it is something else, or differs.
    """
    values = [module.settings.get(attribute) for module in modules if module.class_name in class_names]
    if not all(value is None or is_size(value) for value in values) or len(set(values)) > 1:
        raise TeacherError(
            f"{where}: {attribute} is not one number throughout the network; give a network snapshot of NVlabs"
        )
    return values[0] if values else None
