"""Defaults are the paper's; combinations that cannot work are refused."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from dtpipe.distill.config import DistillConfig, DistillRun

BASE = {"datasets": ("features",), "run": {"out": "run"}}


def test_defaults_are_the_papers_for_adamw():
    """Table 17 and appendix D.1."""
    config = DistillConfig(**BASE)
    assert (config.opt, config.peak_lr, config.betas, config.weight_decay) == ("adamw", 4e-3, (0.9, 0.95), 0.05)
    assert (config.epochs, config.batch_size) == (100, 256)
    assert config.num_warmup_steps(steps_per_epoch=10) == 20 * 10
    assert config.loss.at_weight == 10
    assert config.loss.whiten == "layer"
    assert config.loss.weights == dict.fromkeys(config.loss.weights, 0) | {"mse": 1, "at": 10}
    assert config.regressor.kind == "fpn_ppm"
    assert (config.regressor.width, config.regressor.ppm_scales, config.regressor.norm) == (256, (1, 2, 3, 6), "batch")


def test_warm_up_is_a_fifth_of_a_short_run_unless_set():
    assert DistillConfig(**BASE, epochs=6).num_warmup_steps(10) == 12
    assert DistillConfig(**BASE, epochs=6, warmup_epochs=0.5).num_warmup_steps(10) == 5
    assert DistillConfig(**BASE, epochs=6, warmup_steps=3).num_warmup_steps(10) == 3


def test_linear_scaling_of_the_learning_rate_is_opt_in():
    assert DistillConfig(**BASE, batch_size=2048).peak_lr == 4e-3
    assert DistillConfig(**BASE, batch_size=2048, lr_scale="linear").peak_lr == pytest.approx(3.2e-2)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"epochs": 5, "warmup_epochs": 5}, "warmup_epochs is 5 of 5"),
        ({"warmup_epochs": 1, "warmup_steps": 1}, "both set"),
        ({"batch_size": 4, "micro_batch": 8}, "micro_batch 8 is larger"),
        ({"loss": {"mse_weight": 0, "at_weight": 0}}, "distill.loss.cosine_weight.* are all 0"),
        ({"loss": {"mse_weight": 0, "at_weight": 0}, "labels": {"weight": 0}}, "set distill.labels.weight too"),
        ({"labels": {"confidence": 1.0}}, "confidence"),
        ({"min_lr": 1.0}, "above the peak"),
        ({"learning_rate": 1.0}, "learning_rate"),
    ],
)
def test_settings_that_cannot_work_are_refused(values, said):
    with pytest.raises(ValidationError, match=said):
        DistillConfig(**{**BASE, **values})


def test_places_are_fields_and_every_field_is_described():
    assert DistillConfig.model_fields.keys() >= DistillConfig.PLACES
    fields = {**DistillConfig.model_fields, **DistillRun.model_fields}
    halves = {"student", "regressor", "loss", "labels", "run"}
    assert [name for name, field in fields.items() if not field.description and name not in halves] == []
