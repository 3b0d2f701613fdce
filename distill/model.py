"""Student and regressor as the one module that is trained, built from a config and what the data holds."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.regressor import FeatureRegressor, TargetLevel
from dtpipe.distill.student import Student, StudentSpec, build_student, check_image_size, check_strides
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelSpec

POSITIONS = {"*pos_embed*", "*rel_pos_[hw]"}  # embeddings of position; a few models of timm leave them out of theirs


class Distiller(nn.Module):
    """Images to f_r. Everything that has gradients is in here, so that a data-parallel wrapper needs only this."""

    def __init__(self, student: Student, regressor: FeatureRegressor) -> None:
        super().__init__()
        self.student = student
        self.regressor = regressor

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Shapes: images (B, 3, H, W) float32 in [-1, 1] -> {level: (B, C, h, w)} of the teacher's sizes."""
        regressed: dict[str, Tensor] = self.regressor(self.student(images))
        return regressed

    def no_weight_decay(self) -> set[str]:
        """Patterns of names of parameters that timm's optimisers spare from weight decay, beside biases and norms."""
        return {f"student.{name}" for name in self.student.no_weight_decay()} | POSITIONS


def choose_levels(stored: Sequence[LevelSpec], wanted: Sequence[str] | None) -> tuple[LevelSpec, ...]:
    """The levels to regress, finest first.

    Raises: ConfigError when a wanted level is not stored.
    """
    by_name = {level.name: level for level in stored}
    unknown = [name for name in wanted or () if name not in by_name]
    if unknown:
        raise ConfigError(f"distill.levels names {unknown}, the dataset has {sorted(by_name)}; choose among those")
    return tuple(sorted((by_name[name] for name in wanted or by_name), key=lambda level: (level.stride, level.name)))


def student_size(config: DistillConfig, stored: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the student's images in px: the config's, else the dataset's."""
    px = config.student_px
    if px is None:
        return stored
    return (px, px) if isinstance(px, int) else px


def build_distiller(config: DistillConfig, levels: Sequence[LevelSpec], image_px: tuple[int, int]) -> Distiller:
    """Student and regressor with initial weights from torch's global generator, which the caller seeds.

    Raises: ConfigError when the student cannot be built, lacks a stride or cannot take the images' size, or the micro-batch is
    too small for its norms.
    """
    targets = [TargetLevel(level.name, level.stride, level.channels, (level.height, level.width)) for level in levels]
    strides = [level.stride for level in levels]
    student = build_student(StudentSpec(config.student.name, min(strides), image_px), config.student.pretrained)
    check_strides(config.student.name, student, strides, [level.name for level in levels])
    check_image_size(student)
    distiller = Distiller(student, FeatureRegressor(student.strides, student.channels, targets, config.regressor))
    _check_micro_batch(distiller, config)
    return distiller


def _check_micro_batch(model: nn.Module, config: DistillConfig) -> None:
    if min(config.micro_batch or config.batch_size, config.batch_size) == 1 and any(True for _ in _batch_norms(model)):
        raise ConfigError(
            f"student {config.student.name} or the regressor uses batch norm, which has no statistics of single samples; "
            "use micro-batches of 2 or more, or a student without batch norm and distill.regressor.norm=group"
        )


def _batch_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    yield from (module for module in model.modules() if isinstance(module, _BatchNorm))


@contextmanager
def norms_for(model: nn.Module, num_samples: int) -> Iterator[None]:
    """Let batch norms use their running statistics while a single sample passes, as the tail of an epoch may be one.

    The statistics of one sample are undefined where a level is one cell, and misleading elsewhere.
    """
    switched = [norm for norm in _batch_norms(model) if norm.training] if num_samples == 1 else []
    for norm in switched:
        norm.eval()
    try:
        yield
    finally:
        for norm in switched:
            norm.train()


def pick_device(name: str) -> torch.device:
    """The device of a config: auto is the GPU where there is one.

    Raises: ConfigError when a GPU is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("distill.device is cuda and torch finds no GPU; use auto or cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def pick_precision(name: str, device: torch.device) -> torch.dtype:
    """Dtype of the forward pass: auto is bfloat16 where the GPU has it, else float32."""
    if name == "auto":
        fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16 if name == "bfloat16" else torch.float32
