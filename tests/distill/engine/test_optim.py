"""The learning rate against the closed form and timm's own scheduler; the optimisers against one step by hand."""

from __future__ import annotations

import math

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from torch import nn

from dtpipe.distill.engine.optim import build_optimizer, set_learning_rate, warmup_cosine, warmup_hold_decay
from dtpipe.distill.student.distiller import build_distiller
from parts.memory import level_spec, tiny_config


def test_cosine_agrees_with_timms_scheduler_after_the_warm_up():
    num_steps, num_warmup, peak, minimum = 50, 10, 4e-3, 1e-4
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    theirs = CosineLRScheduler(
        optimizer, t_initial=num_steps - num_warmup, lr_min=minimum, warmup_t=num_warmup, warmup_prefix=True
    )
    for step in range(num_warmup, num_steps):
        theirs.step(step)
        assert warmup_cosine(step, num_steps, num_warmup, peak, minimum) == pytest.approx(
            optimizer.param_groups[0]["lr"], rel=1e-9
        )


def test_warm_up_rises_in_equal_steps_to_the_peak():
    rates = [warmup_cosine(step, 100, 4, 1.0) for step in range(6)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == 1.0
    assert rates[5] == pytest.approx(0.5 * (1 + math.cos(math.pi / 96)))


def test_rate_without_warm_up_or_with_nothing_but_it_is_defined():
    assert warmup_cosine(0, 10, 0, 1.0) == 1.0
    assert warmup_cosine(0, 1, 1, 1.0) == 1.0
    assert warmup_cosine(9, 10, 20, 1.0) == 0.5


def test_rate_rises_holds_and_falls_to_zero_after_the_last_step():
    rates = [warmup_hold_decay(step, 10, 2, 4, 1.0) for step in range(10)]
    assert rates == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]
    assert [warmup_hold_decay(step, 3, 0, 0, 0.5) for step in range(3)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("opt", ["adamw", "lamb"])
def test_weight_decay_spares_biases_and_norms(opt):
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    optimizer = build_optimizer(model, opt, 4e-3, 0.05, (0.9, 0.95))
    decay = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert decay[id(model[0].weight)] == 0.05
    assert [decay[id(p)] for p in (model[0].bias, model[1].weight, model[1].bias)] == [0, 0, 0]
    assert all(group["betas"] == (0.9, 0.95) for group in optimizer.param_groups)


@pytest.mark.parametrize(
    ("name", "spared"),
    [
        ("test_vit", {"cls_token", "pos_embed"}),
        ("swin_tiny_patch4_window7_224", {"relative_position_bias_table"}),
        ("hiera_tiny_224", {"pos_embed"}),
        ("visformer_tiny", {"pos_embed1", "pos_embed2", "pos_embed3"}),  # not among what timm names
        ("test_resnet", set()),
    ],
)
def test_weight_decay_spares_positions_and_class_tokens(name, spared, tmp_path):
    config = tiny_config(tmp_path, student={"name": name})
    model = build_distiller(config, [level_spec("l4", 16, 3)], (64, 64))
    decay = {
        id(p): group["weight_decay"]
        for group in build_optimizer(model, "adamw", 4e-3, 0.05, (0.9, 0.95)).param_groups
        for p in group["params"]
    }
    tensors = [(key, p) for key, p in model.named_parameters() if p.ndim > 1]
    assert {key.rpartition(".")[2] for key, p in tensors if decay[id(p)] == 0} == spared
    assert all(decay[id(p)] == 0.05 for key, p in tensors if key.endswith("weight"))


def test_adamw_takes_the_step_of_its_formula():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = build_optimizer(model, "adamw", 4e-3, 0.1, (0.9, 0.95))
    set_learning_rate(optimizer, 0.01)
    model(torch.ones(1, 1)).sum().backward()
    optimizer.step()
    assert model.weight.item() == pytest.approx(
        2.0 * (1 - 0.01 * 0.1) - 0.01, rel=1e-6
    )  # bias-corrected m / sqrt(v) is 1


def test_lamb_scales_the_step_by_the_trust_ratio():
    model = nn.Linear(1, 1, bias=False)
    model.weight.data.fill_(2.0)
    optimizer = build_optimizer(model, "lamb", 4e-3, 0.1, (0.9, 0.95))
    set_learning_rate(optimizer, 0.01)
    model(torch.full((1, 1), 0.5)).sum().backward()  # below LAMB's largest gradient norm of 1
    optimizer.step()
    update = 1 + 0.1 * 2.0  # m / sqrt(v), and weight decay
    assert model.weight.item() == pytest.approx(2.0 - 0.01 * (2.0 / update) * update, rel=1e-4)
