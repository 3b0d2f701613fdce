"""Backbone and head as they are trained: what is frozen, what the settings do not fit, and what a checkpoint says."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from timm.layers.norm_act import convert_sync_batchnorm
from torch import nn

from dtpipe.distill.downstream.tuned.base import Example, TaskNetwork, TunedTask
from dtpipe.distill.downstream.tuned.batches import BatchOrder
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.engine.checkpoint import state_digest
from dtpipe.distill.engine.ranks import Ranks
from dtpipe.distill.student.norms import batch_norms, fresh_statistics
from dtpipe.distill.student.student import Student, with_drop_path
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import ClassTable


def resolve(task: TunedTask[Any], student: Student, config: TuneConfig) -> TuneConfig:
    """The settings with what follows from task and student: the size of crops, and whether the backbone is trained."""
    augment = config.augment
    crop = augment.crop_px or (student.spec.image_px if task.crops else None)
    frozen = {"backbone_lr": 0.0} if task.frozen else {}
    return config.model_copy(update={"augment": augment.model_copy(update={"crop_px": crop}), **frozen})


def build_tuned(
    task: TunedTask[Any],
    student: Student,
    classes: ClassTable,
    config: TuneConfig,
    ranks: Ranks,
    device: torch.device,
) -> nn.Module:
    """A copy of a student with the task's head in training mode, on the device; `config` is resolved.

    Raises: ConfigError as `TunedTask.build`, and for batch norms over all devices on CPUs.
    """
    start = copy.deepcopy(with_drop_path(student, config.drop_path))
    network = task.build(start, classes, config).to(device)
    if config.sync_bn and ranks.size > 1:
        if device.type != "cuda":
            raise ConfigError("eval.tune.sync_bn needs GPUs; leave it out, or use eval.tune.head.norm=group")
        network = convert_sync_batchnorm(network)  # type: ignore[no-untyped-call]
    if config.run.channels_last:
        network = network.to(memory_format=torch.channels_last)
    set_modes(network, config)
    return network


def set_modes(network: nn.Module, config: TuneConfig) -> None:
    """Training mode, but for a frozen backbone and norms that keep their statistics."""
    student = cast(TaskNetwork, network).student
    network.train()
    if not config.backbone_lr:
        student.requires_grad_(False).eval()
    for norm in batch_norms(student) if config.frozen_norms else ():
        norm.eval()


def check_parts(network: nn.Module, order: BatchOrder, ranks: Ranks) -> None:
    """Refuse a batch with too few images for all processes, and batch norms that would see one image at a time.

    Raises: ConfigError.
    """
    if order.batch_size < ranks.size:
        raise ConfigError(f"a batch has {order.batch_size} images, too few for {ranks.size} processes; start fewer")
    learning = any(norm.training for norm in batch_norms(network))
    if learning and order.num_parts(ranks.size)[1] == 1:
        raise ConfigError(
            "a batch norm has no statistics of single images, and each pass of a process has one; make batches or "
            "eval.tune.micro_batch larger, or use eval.tune.frozen_norms=true and eval.tune.head.norm=group"
        )


def measure_untouched(network: nn.Module, examples: Iterator[Example], device: torch.device) -> None:
    """Give the backbone's norms that stay as they are, and never saw an image, the statistics of some training views.

    They are taken over batches of views of one size.
    """
    student = cast(TaskNetwork, network).student
    kept = [norm for norm in batch_norms(student) if not norm.training and _is_untouched(norm)]
    with torch.no_grad(), fresh_statistics(kept):
        for images in _of_one_size(examples) if kept else ():
            student(images.to(device))


def _of_one_size(examples: Iterator[Example]) -> Iterator[torch.Tensor]:
    """The views in batches; one that is alone of its size with its mirror image, since one has no statistics."""
    by_size: dict[torch.Size, list[torch.Tensor]] = {}
    for example in examples:
        by_size.setdefault(example.image.shape, []).append(example.image)
    for images in by_size.values():
        yield torch.stack(images if len(images) > 1 else [images[0], images[0].flip(-1)])


def _is_untouched(norm: nn.Module) -> bool:
    mean, var = norm.running_mean, norm.running_var
    return (
        isinstance(mean, torch.Tensor) and isinstance(var, torch.Tensor) and not mean.any() and bool((var == 1).all())
    )


def freeze_idle(network: nn.Module, examples: Sequence[Example], device: torch.device) -> None:
    """Exclude weights of the backbone that take no part in a loss: processes would wait for the gradients of these."""
    probe = copy.deepcopy(network)
    images, targets = (
        [example.image.to(device) for example in examples],
        [to_device(e.target, device) for e in examples],
    )
    probe(images, targets)["loss"].backward()
    idle = {name for name, parameter in probe.named_parameters() if parameter.grad is None}
    for name, parameter in network.named_parameters():
        if name in idle and name.startswith("student."):
            parameter.requires_grad_(False)


def to_device(target: Mapping[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """A target on the device."""
    return {name: value.to(device) for name, value in target.items()}


def weights_fingerprint(student: Student) -> str:
    """blake3 of all weights and statistics of a student by name: what a training starts from."""
    return state_digest(sorted(student.state_dict().items()))


def classes_to_dict(classes: ClassTable) -> dict[str, Any]:
    """Plain values for a checkpoint."""
    numbers = [[number, own] for number, own in sorted(classes.numbers.items())]
    return {"names": list(classes.names), "things": sorted(classes.things), "numbers": numbers}


def classes_from_dict(values: Mapping[str, Any]) -> ClassTable:
    """Inverse of `classes_to_dict`."""
    numbers = {int(number): int(own) for number, own in values["numbers"]}
    return ClassTable(tuple(values["names"]), frozenset(values["things"]), numbers)
