"""Student and regressor as the one module that is trained, built from a config and what the data holds."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dtpipe.distill.config import DistillRecipeConfig
from dtpipe.distill.labels.decoder import LabelDecoder, reads_maps, shares_layers
from dtpipe.distill.stream.order import num_parts
from dtpipe.distill.student.pyramid import PYRAMID_STRIDES
from dtpipe.distill.student.regressor import FeatureRegressor, TargetLevel
from dtpipe.distill.student.student import Student, StudentSpec, build_student, check_image_size, check_strides
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelSpec, height_width

_Config = TypeVar("_Config", bound=DistillRecipeConfig)
POSITIONS = {"*pos_embed*", "*rel_pos_[hw]"}  # embeddings of position; a few models of timm leave them out of theirs


class Distiller(nn.Module):
    """Images to f_r and to logits of the classes of soft labels, or to one of these.

    Everything that has gradients is in here, so that a data-parallel wrapper needs only this.
    """

    def __init__(
        self, student: Student, regressor: FeatureRegressor | None, decoder: LabelDecoder | None = None
    ) -> None:
        super().__init__()
        self.student = student
        self.regressor = regressor
        self.decoder = decoder

    def forward(self, images: Tensor, timesteps: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Shapes: images (B, 3, H, W) float32 in [-1, 1], timesteps[level] (B,) for heads that know it ->
        {level: (B, C, h, w)} of the teacher's sizes, among them the soft labels'."""
        levels = self.student(images)
        if self.regressor is None:
            assert self.decoder is not None
            logits: dict[str, Tensor] = self.decoder(levels)
            return logits
        smooth = self.regressor.trunk(levels)
        regressed = self.regressor.regress(smooth, timesteps)
        return regressed if self.decoder is None else regressed | self.decoder(levels, smooth)

    def no_weight_decay(self) -> set[str]:
        """Patterns of names of parameters that timm's optimisers spare from weight decay, beside biases and norms."""
        return {f"student.{name}" for name in self.student.no_weight_decay()} | POSITIONS


def choose_levels(stored: Sequence[LevelSpec], names: Sequence[str] | None) -> tuple[LevelSpec, ...]:
    """The levels to regress, finest first; by default all that hold features. Soft labels are not regressed.

    Raises: ConfigError when a level is named that is not stored, or some are noise.
    """
    by_name = {level.name: level for level in stored}
    if noise := [level.name for level in stored if level.role == "noise"]:
        raise ConfigError(
            f"levels {', '.join(noise)} are noise: teacher null, which is for measuring, wrote them in the place of "
            "features; extract with a real teacher"
        )
    unknown = [name for name in names or () if name not in by_name]
    if unknown:
        raise ConfigError(f"distill.levels names {unknown}, the dataset has {sorted(by_name)}; choose among those")
    chosen = names or [level.name for level in stored if level.role == "features"]
    regressed = (by_name[name] for name in chosen if by_name[name].role != "soft_labels")
    return tuple(sorted(regressed, key=lambda level: (level.stride, level.name)))


def student_size(config: DistillRecipeConfig, stored: tuple[int, int]) -> tuple[int, int]:
    """Height and width of the student's images in px: the config's, else the dataset's."""
    return height_width(config.student_px or stored)


def with_timed_heads(config: _Config, timed: bool) -> _Config:
    """The settings with their word on whether heads know the timestep, or this one where they leave it open."""
    if config.regressor.timestep is not None:
        return config
    return config.model_copy(update={"regressor": config.regressor.model_copy(update={"timestep": timed})})


def build_distiller(
    config: DistillRecipeConfig,
    levels: Sequence[LevelSpec],
    image_px: tuple[int, int],
    num_ranks: int = 1,
    labels: LevelSpec | None = None,
) -> Distiller:
    """Student, regressor of `levels` and decoder of `labels`, each where there are any, with initial weights from
    torch's global generator, which the caller seeds.

    Heads know the timestep where the settings say so; all other weights are the same with it and without. A decoder
    of maps reads the student's levels from stride 4 on, or from a finer one that is regressed.

    Raises: ConfigError when the student cannot be built, lacks a stride or cannot take the images' size, or the
    micro-batch is too small for its norms.
    """
    strides = [level.stride for level in levels]
    decoded = [PYRAMID_STRIDES[0]] if labels is not None and (reads_maps(labels) or not levels) else []
    spec = StudentSpec(config.student.name, min(strides + decoded), image_px)
    student = build_student(spec, config.student.pretrained)
    check_strides(config.student.name, student, strides, [level.name for level in levels])
    check_image_size(student)
    regressor = _build_regressor(config, student, levels, labels) if levels else None
    decoder = None if labels is None else LabelDecoder(student, labels, config, regressor)
    distiller = Distiller(student, regressor, decoder)
    _check_parts(distiller, config, num_ranks)
    return distiller


def _build_regressor(
    config: DistillRecipeConfig, student: Student, levels: Sequence[LevelSpec], labels: LevelSpec | None
) -> FeatureRegressor:
    targets = [TargetLevel(level.name, level.stride, level.channels, (level.height, level.width)) for level in levels]
    decoded = labels is not None and shares_layers(config, labels)
    return FeatureRegressor(student.strides, student.channels, targets, config.regressor, decoded)


def _check_parts(model: nn.Module, config: DistillRecipeConfig, num_ranks: int) -> None:
    if num_parts(config.batch_size, config.micro_batch, num_ranks)[1] == 1 and any(True for _ in _batch_norms(model)):
        raise ConfigError(
            f"student {config.student.name} or the regressor uses batch norm, which has no statistics of single "
            "samples; use micro-batches of 2 or more on each device, or a student without batch norm and "
            "distill.regressor.norm=group"
        )


def synchronise_norms(model: Distiller, device: torch.device) -> Distiller:
    """Batch norms whose statistics are those of the global micro-batch, over all ranks.

    By timm's converter: torch's own drops the activation that timm keeps inside some batch norms.
    Raises: ConfigError on the CPU, where torch has none.
    """
    if device.type != "cuda":
        raise ConfigError(
            "distill.sync_bn needs GPUs; leave it out, or use distill.regressor.norm=group and a student without "
            "batch norm"
        )
    converted: Distiller = convert_sync_batchnorm(model)  # type: ignore[no-untyped-call]
    return converted


def freeze_unused(model: Distiller, device: torch.device) -> None:
    """Exclude weights that take no part in any level, such as finer laterals where only coarse levels are taught.

    Ranks would wait for the gradients of these; without gradients they never change anyway.
    """
    training = model.training
    targets = () if model.regressor is None else model.regressor.targets
    timesteps = {target.name: torch.zeros(1, dtype=torch.int64, device=device) for target in targets}
    outputs = model.eval()(torch.zeros(1, 3, *model.student.spec.image_px, device=device), timesteps)
    torch.stack([level.sum() for level in outputs.values()]).sum().backward()  # type: ignore[no-untyped-call]
    for parameter in model.parameters():
        parameter.requires_grad_(parameter.grad is not None)
    model.zero_grad(set_to_none=True)
    model.train(training)


def _batch_norms(model: nn.Module) -> Iterator[_BatchNorm]:
    yield from (module for module in model.modules() if isinstance(module, _BatchNorm))


@contextmanager
def norms_for(model: nn.Module, num_samples: int) -> Iterator[None]:
    """Let batch norms use their running statistics while a single sample passes on some rank.

    That is so in the tail of an epoch; the statistics of one sample are undefined where a level is one cell, and
    misleading elsewhere.
    """
    switched = [norm for norm in _batch_norms(model) if norm.training] if num_samples == 1 else []
    for norm in switched:
        norm.eval()
    try:
        yield
    finally:
        for norm in switched:
            norm.train()
