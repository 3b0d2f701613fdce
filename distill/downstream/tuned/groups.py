"""The optimiser of a tuned network, and the rate and decay of each weight: head, backbone, layers of the backbone.

Layers are timm's groups of the whole model, by name; `layer_groups` joins the blocks of a stage into fewer of them, as
recipes with fixed layer ids do. With (3, 2, 3, 3) a ResNet-50 has SparK's for ImageNet, with (3, 4, 3, 3) those for
COCO, and a ConvNeXt with (3, 3, 3, 3) those of ConvNeXt's and SparK's.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence
from typing import Any

import timm
import torch
from timm.models import group_parameters
from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # its documented name
from torch import nn
from torch.optim import Optimizer

from dtpipe.distill.downstream.tuned.base import TaskNetwork
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.student.distiller import POSITIONS
from dtpipe.distill.student.student import Student, model_options, student_name
from dtpipe.manifests.errors import ConfigError

_LAMB = {"max_grad_norm": 1e7, "always_adapt": True, "bias_correction": False}  # SparK's
_TIMM = {"adamw": "adamw", "lamb": "lamb", "sgd": "momentum", "lars": "lars"}  # timm's sgd is Nesterov's


def layer_ids(student: Student, layer_groups: Sequence[int] = ()) -> dict[str, int]:
    """Layer of each parameter of `student.net`, from 0 for the stem on, by its name there.

    Raises: ConfigError for a model whose layers timm does not name, or a number of stages that it has not.
    """
    name = student.spec.name
    with torch.device("meta"):
        full: Any = timm.create_model(name, num_classes=0, **model_options(student.spec))
    if not hasattr(full, "group_matcher"):
        raise ConfigError(f"timm names no layers of {name}, so its rates cannot fall by layer; use layer_decay 1")
    blocks, stages = (
        group_parameters(full, full.group_matcher(coarse=coarse), reverse=True) for coarse in (False, True)
    )
    own = {parameter for parameter, _ in student.net.named_parameters()}
    names = {full_name: alias for full_name in blocks if (alias := student_name(full_name, own)) is not None}
    within = {names[full_name]: (stages[full_name], blocks[full_name]) for full_name in names}
    if layer_groups:
        within = _joined(within, layer_groups, name)
    order = {place: idx for idx, place in enumerate(sorted(set(within.values())))}
    return {alias: order[place] for alias, place in within.items()}


def _joined(within: dict[str, tuple[int, int]], layer_groups: Sequence[int], name: str) -> dict[str, tuple[int, int]]:
    """(stage, block) of each parameter with so many blocks of a stage as one; stage 0 is the stem."""
    stages = sorted({stage for stage, _ in within.values() if stage > 0})
    if len(layer_groups) != len(stages):
        raise ConfigError(
            f"eval.tune.layer_groups has {len(layer_groups)} numbers, and {name} has {len(stages)} stages; "
            "give one each"
        )
    first = {stage: min(block for other, block in within.values() if other == stage) for stage in stages}
    sizes = dict(zip(stages, layer_groups, strict=True))
    return {
        alias: (stage, (block - first[stage]) // sizes[stage] if stage else 0)
        for alias, (stage, block) in within.items()
    }


def parameter_groups(network: TaskNetwork, config: TuneConfig) -> list[dict[str, Any]]:
    """Trained parameters by rate and decay: `lr_scale` is what the engine multiplies the rate of a step by.

    The head has rate 1, layer i of n of the backbone `backbone_lr * layer_decay ** (n - i)`. Vectors, scalars and what
    timm spares of the backbone have no decay.
    """
    student = network.student
    ids = layer_ids(student, config.layer_groups) if config.layer_decay < 1 else {}
    num_layers = 1 + max(ids.values(), default=0)
    spared = {f"student.{name}" for name in student.no_weight_decay()} | {f"student.net.{name}" for name in POSITIONS}
    groups: dict[tuple[float, bool], dict[str, Any]] = {}
    assert isinstance(network, nn.Module)
    for name, parameter in network.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = 1.0
        if name.startswith("student."):
            layer = ids.get(name.removeprefix("student.net."), num_layers)
            scale = config.backbone_lr * config.layer_decay ** (num_layers - layer)
        decays = parameter.ndim > 1 and not any(fnmatch.fnmatch(name, pattern) for pattern in spared)
        decay = config.weight_decay if decays else 0.0
        group = groups.setdefault((scale, decays), {"params": [], "lr_scale": scale, "weight_decay": decay})
        group["params"].append(parameter)
        if config.opt == "lars":
            group["always_adapt"] = decays  # timm's skips groups without decay, and linear probes have none
    return list(groups.values())


def task_optimizer(network: TaskNetwork, config: TuneConfig, device: torch.device) -> Optimizer:
    """timm's optimiser over the groups of a network."""
    options: dict[str, Any] = {"momentum": config.momentum}
    if config.opt in ("adamw", "lamb"):
        options = {"betas": config.betas, **(_LAMB if config.opt == "lamb" else {})}
    if config.opt == "adamw" and device.type == "cuda":
        options["fused"] = True
    groups = parameter_groups(network, config)
    optimizer: Optimizer = create_optimizer_v2(
        groups, opt=_TIMM[config.opt], lr=config.lr, weight_decay=config.weight_decay, **options
    )
    return optimizer
