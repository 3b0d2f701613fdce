"""Rates by step against PyTorch's own schedulers and numbers by hand."""

from __future__ import annotations

import pytest
import torch

from dtpipe.distill.downstream.tuned.schedule import rate_share
from parts.tuning import tune_config


def rates(num: int, **changes: object) -> list[float]:
    config = tune_config(**changes)
    return [rate_share(step, num, config) for step in range(num)]


def of_torch(make: object, num: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    scheduler = make(optimizer)  # type: ignore[operator]
    found = []
    for _ in range(num):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return found


@pytest.mark.parametrize(
    ("changes", "make"),
    [
        ({"schedule": "cosine", "min_lr": 0.1}, lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 20, 0.1)),
        ({"schedule": "poly", "power": 0.9}, lambda o: torch.optim.lr_scheduler.PolynomialLR(o, 20, 0.9)),
        (
            {"schedule": "steps", "milestones": [0.5, 0.75], "gamma": 0.2},
            lambda o: torch.optim.lr_scheduler.MultiStepLR(o, [10, 15], 0.2),
        ),
        ({"schedule": "constant"}, lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda _: 1.0)),
    ],
)
def test_schedules_are_torchs(changes, make) -> None:
    assert rates(20, warmup=0, **changes) == pytest.approx(of_torch(make, 20), abs=1e-9)


def test_the_warm_up_rises_from_its_start_to_the_peak() -> None:
    found = rates(20, warmup=0.2, warmup_start=0.2, schedule="constant")
    assert found[:5] == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0])
    poly = rates(20, warmup=0.2, schedule="poly", power=1.0, min_lr=0.5)
    assert poly[3:5] == [1.0, 1.0] and poly[-1] == pytest.approx(0.5 + 0.5 / 16)
