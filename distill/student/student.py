"""The student: a timm `features_only` backbone whose levels are found by stride.

A plain vision transformer has one level; the regressor makes the other strides from it (`pyramid.py`). Images come in
as float32 in [-1, 1]; `Student.forward` is the one place where they get the mean and deviation that timm lists for the
model, so an exported backbone takes images normalised as timm's own weights do.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from dtpipe.distill.student.pyramid import PYRAMID_STRIDES
from dtpipe.manifests.errors import ConfigError, InputError


@dataclass(frozen=True)
class StudentSpec:
    """What is needed to build a student again."""

    name: str
    """timm's name of the model."""
    min_stride: int
    """Its levels of this stride and coarser are given."""
    image_px: tuple[int, int]
    """Height and width of the images it is trained on."""


class Student(nn.Module):
    """A backbone with its input normalisation. `strides` and `channels` describe its levels, finest first.

    `strides` are powers of two: patches of 14 px count as stride 16, and the regressor brings their maps to the
    teacher's size.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, spec: StudentSpec, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.spec = spec
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        reductions, channels = net.feature_info.reduction(), net.feature_info.channels()  # type: ignore[operator, union-attr]
        last_of_stride = {power_of_two(reduction): idx for idx, reduction in enumerate(reductions)}
        self.single_scale = len(last_of_stride) == 1
        self.all_strides = tuple(sorted({*last_of_stride, *PYRAMID_STRIDES} if self.single_scale else last_of_stride))
        """Strides that the backbone or, for a single level, the regressor's pyramid gives."""
        self.level_idxs = tuple(
            idx for stride, idx in sorted(last_of_stride.items()) if stride >= spec.min_stride or self.single_scale
        )
        self.strides = tuple(power_of_two(reductions[idx]) for idx in self.level_idxs)
        self.channels = tuple(int(channels[idx]) for idx in self.level_idxs)
        self.channels_last = str(getattr(net, "output_fmt", "NCHW")).endswith("NHWC")

    def normalise(self, images: Tensor) -> Tensor:
        """From [-1, 1] to timm's mean and deviation of the [0, 1] image. Shapes: (B, 3, H, W) -> (B, 3, H, W)."""
        return (images.mul(0.5).add(0.5) - self.mean) / self.std

    def forward(self, images: Tensor) -> list[Tensor]:
        """Levels of the backbone, finest first.

        Shapes: images (B, 3, H, W) float32 in [-1, 1] -> [(B, channels[i], H/strides[i], W/strides[i])].
        """
        levels = self.net(self.normalise(images))
        chosen = [levels[idx] for idx in self.level_idxs]
        return [level.permute(0, 3, 1, 2) for level in chosen] if self.channels_last else chosen

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that timm spares from weight decay, such as embeddings of position and class tokens.

        They are those of timm's full model, since its `features_only` models do not say; biases and norms are not
        among them.
        """
        with torch.device("meta"):
            full: Any = timm.create_model(self.spec.name, num_classes=0, **model_options(self.spec))
        own = {name for name, _ in self.net.named_parameters()}
        aliases = (student_name(name, own) for name in getattr(full, "no_weight_decay", set)())
        return {f"net.{alias}" for alias in aliases if alias is not None}


def power_of_two(reduction: float) -> int:
    """The stride that a model's reduction counts as: 14 is 16, 7 is 8."""
    return int(2 ** round(math.log2(reduction)))


def student_name(name: str, names: Collection[str]) -> str | None:
    """A full model's name in a `features_only` model: as it is, behind `model.`, or its first two parts joined."""
    return next((alias for alias in (name, f"model.{name}", name.replace(".", "_", 1)) if alias in names), None)


def build_student(spec: StudentSpec, pretrained: bool = False, drop_path: float = 0.0) -> Student:
    """The student of a spec, with timm's random initial weights or its published ones, and stochastic depth.

    Raises: ConfigError when timm has no such model or it cannot give levels; InputError when weights cannot be had.
    """
    check_student_name(spec.name)
    net = _features_only(spec, pretrained, {"drop_path_rate": drop_path} if drop_path else {})
    _check_patches(spec, net)
    return Student(spec, net, *normalisation(spec.name))


def check_student_name(name: str) -> None:
    """Raises: ConfigError with close names when timm has no such model."""
    if not timm.is_model(name):
        close = ", ".join(difflib.get_close_matches(name, timm.list_models(), n=5))
        near = f", did you mean {close}?" if close else ""
        raise ConfigError(f"student {name!r} is no timm model{near}; `dtpipe list students` names them")


def with_drop_path(student: Student, rate: float) -> Student:
    """The same weights in a student with stochastic depth. Raises: ConfigError when timm's model has none."""
    if not rate:
        return student
    other = build_student(student.spec, drop_path=rate)
    other.load_state_dict(student.state_dict())
    return other


def normalisation(name: str) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and deviation of [0, 1] images that timm lists for a model, or ImageNet's."""
    cfg = timm.get_pretrained_cfg(name)
    return (cfg.mean, cfg.std) if cfg else (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)


def _features_only(spec: StudentSpec, pretrained: bool, options: Mapping[str, Any]) -> nn.Module:
    options = {**model_options(spec), **options}
    try:
        net: nn.Module = timm.create_model(spec.name, pretrained=pretrained, features_only=True, **options)
    except OSError as err:
        raise InputError(
            f"weights of {spec.name} cannot be fetched: {err}; check the network, name a file of them as MODEL@FILE "
            "where arms are compared, or train from random ones, without --pretrained"
        ) from err
    except (RuntimeError, AttributeError, AssertionError, TypeError) as err:
        raise ConfigError(
            f"student {spec.name} cannot be built as features_only at {spec.image_px} px: {err}; choose another model"
        ) from err
    return net


def _check_patches(spec: StudentSpec, net: nn.Module) -> None:
    """Refuse image sizes that a plain transformer's patches do not divide: timm would leave out the rest."""
    reductions = set(net.feature_info.reduction())  # type: ignore[operator, union-attr]
    patch = next(iter(reductions))
    if len(reductions) == 1 and any(px % patch for px in spec.image_px):
        height, width = (max(1, round(px / patch)) * patch for px in spec.image_px)
        raise ConfigError(
            f"student {spec.name} has patches of {patch} px, which do not divide its images of "
            f"{spec.image_px[0]}x{spec.image_px[1]} px; give -s distill.student_px=[{height},{width}]"
        )


def untagged(name: str) -> str:
    """timm's name without the tag of published weights: `resnet50` of `resnet50.a1_in1k`."""
    return name.partition(".")[0]


def model_options(spec: StudentSpec) -> dict[str, Any]:
    """Arguments that timm needs beside the name: the image size, for models that are tied to one."""
    cfg = timm.get_pretrained_cfg(spec.name)
    return {"img_size": spec.image_px} if cfg is not None and cfg.fixed_input_size else {}


def check_strides(name: str, student: Student, strides: Sequence[int], levels: Sequence[str]) -> None:
    """Refuse teacher levels that the student has no stride for.

    Raises: ConfigError listing the student's strides and the levels that would fit.
    """
    missing = sorted(set(strides) - set(student.all_strides))
    if not missing:
        return
    fitting = [level for level, stride in zip(levels, strides, strict=True) if stride in student.all_strides]
    advice = (
        f"keep {','.join(fitting)} with -s distill.levels=... or choose another student"
        if fitting
        else "choose another student"
    )
    raise ConfigError(
        f"student {name} has no level of stride {missing}, which the dataset's levels {list(levels)} need; "
        f"it has {list(student.all_strides)}; {advice}"
    )


def check_image_size(student: Student) -> None:
    """Send one black image through, so that a size which the model cannot take is refused before training.

    Raises: ConfigError naming the size and timm's own.
    """
    name, (height, width) = student.spec.name, student.spec.image_px
    training = student.training
    try:
        with torch.no_grad():
            student.eval()(torch.zeros(1, 3, height, width))
    except (RuntimeError, AssertionError, ValueError) as err:
        cfg = timm.get_pretrained_cfg(name)
        own = f" (timm's own is {cfg.input_size[1]}x{cfg.input_size[2]})" if cfg else ""
        raise ConfigError(
            f"student {name} cannot take images of {height}x{width} px: {str(err) or type(err).__name__}; "
            f"give another size as distill.student_px{own}, or choose another student"
        ) from err
    student.train(training)


def spec_to_dict(spec: StudentSpec) -> dict[str, Any]:
    """Plain values for a checkpoint or an export."""
    return asdict(spec) | {"image_px": list(spec.image_px)}


def spec_from_dict(values: dict[str, Any]) -> StudentSpec:
    """Inverse of `spec_to_dict`."""
    height, width = values["image_px"]
    return StudentSpec(str(values["name"]), int(values["min_stride"]), (int(height), int(width)))
