"""The student: a timm `features_only` backbone whose levels are found by stride.

Images come in as float32 in [-1, 1]; `Student.forward` is the one place where they get the mean and deviation that
timm lists for the model, so an exported backbone takes images normalised as timm's own weights do.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

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
    """A backbone with its input normalisation. `strides` and `channels` describe its levels, finest first."""

    mean: Tensor
    std: Tensor

    def __init__(self, spec: StudentSpec, net: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.spec = spec
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        strides, channels = net.feature_info.reduction(), net.feature_info.channels()  # type: ignore[operator, union-attr]
        last_of_stride = {stride: idx for idx, stride in enumerate(strides)}
        self.level_idxs = tuple(idx for stride, idx in sorted(last_of_stride.items()) if stride >= spec.min_stride)
        self.strides = tuple(int(strides[idx]) for idx in self.level_idxs)
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


def build_student(spec: StudentSpec, pretrained: bool = False) -> Student:
    """The student of a spec, with timm's random initial weights or its published ones.

    Raises: ConfigError when timm has no such model or it cannot give levels; InputError when weights cannot be had.
    """
    if not timm.is_model(spec.name):
        close = difflib.get_close_matches(spec.name, timm.list_models(), n=5)
        raise ConfigError(f"student {spec.name!r} is not a timm model; close names: {close}; `timm.list_models()` lists all")
    net = _features_only(spec, pretrained)
    cfg = timm.get_pretrained_cfg(spec.name)
    return Student(spec, net, cfg.mean if cfg else IMAGENET_DEFAULT_MEAN, cfg.std if cfg else IMAGENET_DEFAULT_STD)


def _features_only(spec: StudentSpec, pretrained: bool) -> nn.Module:
    try:
        net: nn.Module = timm.create_model(spec.name, pretrained=pretrained, features_only=True, **model_options(spec))
    except OSError as err:
        raise InputError(f"weights of {spec.name} cannot be fetched: {err}; check the network or leave out student.pretrained") from err
    except (RuntimeError, AttributeError, AssertionError, TypeError) as err:
        raise ConfigError(
            f"student {spec.name} cannot be built as features_only at {spec.image_px} px: {err}; choose another model"
        ) from err
    return net


def model_options(spec: StudentSpec) -> dict[str, Any]:
    """Arguments that timm needs beside the name: the image size, for models that are tied to one."""
    cfg = timm.get_pretrained_cfg(spec.name)
    return {"img_size": spec.image_px} if cfg is not None and cfg.fixed_input_size else {}


def check_strides(name: str, student: Student, wanted: Sequence[int], levels: Sequence[str]) -> None:
    """Refuse teacher levels that the student has no stride for.

    Raises: ConfigError listing the student's strides and the levels that would fit.
    """
    missing = sorted(set(wanted) - set(student.strides))
    if not missing:
        return
    have = sorted(set(student.net.feature_info.reduction()))  # type: ignore[operator, union-attr]
    fitting = [level for level, stride in zip(levels, wanted, strict=True) if stride in have]
    advice = f"keep {','.join(fitting)} with -s distill.levels=... or choose another student" if fitting else "choose another student"
    raise ConfigError(
        f"student {name} has no level of stride {missing}, which the dataset's levels {list(levels)} need; it has {have}; {advice}"
    )


def spec_to_dict(spec: StudentSpec) -> dict[str, Any]:
    """Plain values for a checkpoint or an export."""
    return asdict(spec) | {"image_px": list(spec.image_px)}


def spec_from_dict(values: dict[str, Any]) -> StudentSpec:
    """Inverse of `spec_to_dict`."""
    height, width = values["image_px"]
    return StudentSpec(str(values["name"]), int(values["min_stride"]), (int(height), int(width)))


def load_student(path: str | Path, ema: bool = True) -> Student:
    """The trained student from a run folder, a checkpoint (`last.pt`) or an export, on the CPU and in eval mode.

    With `ema`, a checkpoint that holds an average gives that.

    Raises: InputError when the path holds neither.
    """
    from dtpipe.distill.checkpoint import read_student
    from dtpipe.distill.export import is_export, read_export

    path = Path(path)
    if is_export(path):
        return read_export(path)
    return read_student(path / "last.pt" if path.is_dir() else path, ema)
