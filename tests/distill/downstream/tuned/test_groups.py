"""Layers, rates and decay of each weight: SparK's ids written down by their rules, and optimisers step by step."""

from __future__ import annotations

import math
import re
from typing import cast

import pytest
import torch
from torch import nn

from dtpipe.distill.downstream.tuned.base import TaskNetwork
from dtpipe.distill.downstream.tuned.groups import layer_ids, parameter_groups, task_optimizer
from dtpipe.distill.downstream.tuned.network import resolve
from dtpipe.distill.downstream.tuned.registry import find_tuned
from dtpipe.distill.engine.optim import clip_limit
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import ClassTable
from parts.tuning import tune_config


def student(name: str) -> Student:
    with torch.device("meta"):
        return build_student(StudentSpec(name, 4, (64, 64)))


def network(name: str, **changes: object) -> TaskNetwork:
    task, backbone, config = find_tuned("finetune"), student(name), tune_config(**changes)
    with torch.device("meta"):
        return cast(TaskNetwork, task.build(backbone, ClassTable.numbered(3), resolve(task, backbone, config)))


def imagenet_id(name: str) -> int:
    """SparK `downstream_imagenet/models`, of a ResNet-50: two blocks of layer2 and three of layer3 share an id."""
    match = re.match(r"layer(\d)\.(\d)", name)
    if match is None:
        return 0
    layer, block = map(int, match.groups())
    return {1: 1, 2: 2 + block // 2, 3: 4 + block // 3, 4: 6}[layer]


def coco_id(name: str) -> int:
    """SparK `downstream_d2`: stem 0, res2 1, res3 2, res4 3 + block // 3, res5 5."""
    match = re.match(r"layer(\d)\.(\d)", name)
    if match is None:
        return 0
    layer, block = map(int, match.groups())
    return {1: 1, 2: 2, 3: 3 + block // 3, 4: 5}[layer]


def convnext_id(name: str) -> int:
    """ConvNeXt's `optim_factory.py` with 12 layers: downsampling goes with the stage after it."""
    match = re.match(r"stages_(\d)\.(?:blocks\.(\d+))?", name)
    if match is None:
        return 0
    stage, block = int(match[1]), int(match[2] or 0)
    return {0: 1, 1: 2, 2: 3 + block // 3, 3: 12}[stage]


@pytest.mark.parametrize(
    ("name", "groups", "rule"),
    [
        ("resnet50", (3, 2, 3, 3), imagenet_id),
        ("resnet50", (3, 4, 3, 3), coco_id),
        ("convnext_base", (3, 3, 3, 3), convnext_id),
    ],
)
def test_layers_are_those_of_the_published_recipes(name, groups, rule) -> None:
    backbone = student(name)
    ids = layer_ids(backbone, groups)
    assert ids == {parameter: rule(parameter) for parameter, _ in backbone.net.named_parameters()}


def test_without_groups_each_block_is_a_layer() -> None:
    ids = layer_ids(student("resnet50"))
    assert (ids["conv1.weight"], ids["layer1.0.conv1.weight"], ids["layer4.2.bn3.bias"]) == (0, 1, 16)


def test_rates_fall_by_layer_and_vectors_have_no_decay() -> None:
    """SparK's ResNet-50: 0.7 to the power of 7 - id, the classifier's being 7."""
    model = network("resnet50", layer_decay=0.7, layer_groups=[3, 2, 3, 3], weight_decay=0.02, backbone_lr=0.5)
    by_parameter = {
        id(parameter): group
        for group in parameter_groups(model, tune_config(layer_decay=0.7, layer_groups=[3, 2, 3, 3], weight_decay=0.02))
        for parameter in group["params"]
    }
    for name, parameter in cast(nn.Module, model).named_parameters():
        group = by_parameter[id(parameter)]
        exponent = 0 if name.startswith("linear") else 7 - imagenet_id(name.removeprefix("student.net."))
        assert group["lr_scale"] == pytest.approx(0.7**exponent)
        assert group["weight_decay"] == (0.02 if parameter.ndim > 1 else 0.0)


def test_a_backbone_has_a_rate_of_its_own_and_a_frozen_one_none() -> None:
    config = tune_config(backbone_lr=0.1)
    scales = {group["lr_scale"] for group in parameter_groups(network("test_resnet"), config)}
    assert scales == {0.1, 1.0}
    frozen = network("test_resnet")
    frozen.student.requires_grad_(False)
    [decayed, spared] = parameter_groups(frozen, tune_config(backbone_lr=0.0))
    assert [len(group["params"]) for group in (decayed, spared)] == [1, 1]  # the classifier's weight and bias


def test_positions_of_transformers_have_no_decay() -> None:
    model = network("vit_tiny_patch16_224", weight_decay=0.1)
    spared = {
        id(p)
        for group in parameter_groups(model, tune_config(weight_decay=0.1))
        for p in group["params"]
        if not group["weight_decay"]
    }
    named = dict(cast(nn.Module, model).named_parameters())
    assert id(named["student.net.model.pos_embed"]) in spared


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [("resnet50", {"layer_groups": (3, 2)}, r"layer_groups has 2 numbers, and resnet50 has 4 stages")],
)
def test_groups_that_do_not_fit_the_model_are_refused(name, changes, sentence) -> None:
    with pytest.raises(ConfigError, match=sentence):
        layer_ids(student(name), **changes)


class OneWeight(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.student = build_student(StudentSpec("test_resnet", 4, (32, 32))).requires_grad_(False)
        self.weight = nn.Parameter(torch.full((2, 2), 2.0))
        self.bias = nn.Parameter(torch.full((2,), 2.0))


@pytest.mark.parametrize(
    ("opt", "weights", "biases"),
    [
        # plain momentum without Nesterov's look ahead: -lr * g, then -lr * (0.9 g + g)
        ("sgd", 2 - 0.1 * 1 - 0.1 * 1.9, 2 - 0.1 * 1 - 0.1 * 1.9),
        # LARS: g times 0.001 |w| / |g| on weights although nothing decays; biases as they are
        ("lars", 2 - 0.1 * (0.001 * 2) - 0.1 * (0.9 * 0.001 * 2 + 0.001 * (2 - 0.1 * 0.002)), 2 - 0.1 - 0.19),
    ],
)
def test_sgd_and_lars_step_as_by_hand(opt: str, weights: float, biases: float) -> None:
    model = OneWeight()
    optimizer = task_optimizer(
        cast(TaskNetwork, model), tune_config(opt=opt, lr=0.1, weight_decay=0.0), torch.device("cpu")
    )
    for _ in range(2):
        model.weight.grad, model.bias.grad = torch.ones(2, 2), torch.ones(2)
        optimizer.step()
    assert model.weight.flatten().tolist() == pytest.approx([weights] * 4, rel=1e-6)
    assert model.bias.tolist() == pytest.approx([biases] * 2, rel=1e-6)


def test_lamb_has_sparks_options() -> None:
    optimizer = task_optimizer(cast(TaskNetwork, OneWeight()), tune_config(opt="lamb"), torch.device("cpu"))
    options = {"max_grad_norm": 1e7, "always_adapt": True, "bias_correction": False}
    assert all(group[name] == value for group in optimizer.param_groups for name, value in options.items())


@pytest.mark.parametrize(("clip_grad", "largest"), [(None, 1e7), (5.0, 5.0)])
def test_lamb_is_told_the_largest_norm_and_the_loop_leaves_it_to_that(clip_grad, largest) -> None:
    optimizer = task_optimizer(cast(TaskNetwork, OneWeight()), tune_config(opt="lamb"), torch.device("cpu"))
    assert clip_limit(optimizer, clip_grad) == math.inf
    assert optimizer.defaults["max_grad_norm"] == largest
    sgd = task_optimizer(cast(TaskNetwork, OneWeight()), tune_config(opt="sgd"), torch.device("cpu"))
    assert clip_limit(sgd, clip_grad) == (clip_grad or math.inf)
