"""Whose a BigGAN generator is, as far as its tensors tell: its epsilons follow from that, and no tensor holds them.

ajbrock's own training leaves the largest singular value of each layer in `sv0`. Conversions of DeepMind's models never
trained: they lack `sv0`, or have the 1 that it begins with, and some keep attention's gain as a vector of one number.
Source: ajbrock/BigGAN-PyTorch, layers.py, SN, and TFHub/converter.py; lukemelas/pytorch-pretrained-gans, BigBiGAN.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dtpipe.manifests.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from dtpipe.extract.teachers.biggan.network import BigGanLayout

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Epsilons:
    """Of conditional batch norms, and of spectral norms."""

    batch_norm: float
    spectral_norm: float


TRAINED, CONVERTED = Epsilons(1e-5, 1e-6), Epsilons(1e-4, 1e-4)
BIGBIGAN = {"bn_eps": CONVERTED.batch_norm, "sn_eps": CONVERTED.spectral_norm, "class_label": 0}
_WIDTHS_128, _CHUNK_128 = (1536, 1536, 768, 384, 192, 96), 20  # of DeepMind's BigGAN and BigBiGAN, and of ajbrock's


def default_epsilons(tensors: Mapping[str, Tensor]) -> Epsilons:
    """Those that a file's origin implies."""
    return CONVERTED if _never_trained(tensors) else TRAINED


def _never_trained(tensors: Mapping[str, Tensor]) -> bool:
    """True for a conversion, which brings spectral norms that no training step of PyTorch has seen."""
    if "linear.u0" not in tensors:
        return False
    gains = [tensor for name, tensor in tensors.items() if name.endswith(".1.gamma")]
    return not _values(tensors) or _values_are_first(tensors) or any(gain.ndim for gain in gains)


def _values(tensors: Mapping[str, Tensor]) -> list[Tensor]:
    return [tensor for name, tensor in tensors.items() if name.endswith(".sv0")]


def _values_are_first(tensors: Mapping[str, Tensor]) -> bool:
    values = _values(tensors)
    return bool(values) and all(bool((value == 1).all()) for value in values)


def check_origin(tensors: Mapping[str, Tensor], given: Collection[str], path: str) -> None:
    """Refuse what may be a BigBiGAN as long as a person has not said what it is; `given` are the options that are set.

    Its 128 px generator has the shapes of a class-conditional BigGAN and means class 0 alone.
    Raises: ConfigError that names the options.
    """
    if _values_are_first(tensors) and "class_label" not in given:
        raise ConfigError(
            f"{path}: was converted from another framework, perhaps from BigBiGAN, which knows class 0 only; set "
            f"extract.teacher.options.class_label to 0 for a BigBiGAN, to sampled for a class-conditional BigGAN"
        )
    missing = [name for name in BIGBIGAN if name not in given]
    if "bigbigan" in Path(path).name.lower() and not _never_trained(tensors) and missing:
        values = ", ".join(f"{name}: {value}" for name, value in BIGBIGAN.items())
        raise ConfigError(
            f"{path}: is called a BigBiGAN, and its tensors do not show where it was trained; set "
            f"extract.teacher.options to {{{values}}} for DeepMind's, or to what it was trained with"
        )


def say_what_is_assumed(tensors: Mapping[str, Tensor], layout: BigGanLayout, given: Collection[str], path: str) -> None:
    """Warnings of what no tensor tells and a wrong value would not show."""
    if (layout.widths, layout.z_chunk) == (_WIDTHS_128, _CHUNK_128) and "bn_eps" not in given:
        _log.warning(
            "%s: has the shapes of ajbrock's, DeepMind's and BigBiGAN's generators of 128 px; it is taken for "
            "%s (-s extract.teacher.options.bn_eps=.. says otherwise)",
            path,
            "a conversion of DeepMind's, with epsilons 1e-4" if _never_trained(tensors) else "ajbrock's, with 1e-5",
        )
    if "blocks.0.0.bn1.bn.running_mean" in tensors and "output_layer.0.gain" in tensors:
        _log.warning(
            "%s: was trained with ajbrock's synchronised batch norm (cross_replica), whose own code multiplies by the "
            "gain in training and adds it in evaluation; here it always multiplies",
            path,
        )
