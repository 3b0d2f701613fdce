"""Heads that know the timestep: against diffusers' embedding and a float64 loop; nothing changes before they learn."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from torch import nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.student.regressor import FeatureRegressor, TargetLevel
from dtpipe.distill.student.timed import ScaleShift, has_timed_heads, sinusoids
from dtpipe.manifests.errors import ShapeError

TARGETS = [TargetLevel("l2", 4, 5, (8, 8)), TargetLevel("l3", 8, 7, (4, 4))]


def regressor(timestep: bool | None) -> FeatureRegressor:
    with torch.random.fork_rng():
        torch.manual_seed(4)
        return FeatureRegressor((4, 8), (6, 8), TARGETS, RegressorConfig(width=16, timestep=timestep)).eval()


@pytest.fixture
def levels() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, channels, px, px, generator=generator) for channels, px in ((6, 8), (8, 4))]


def timesteps(*values: int) -> dict[str, torch.Tensor]:
    return {target.name: torch.tensor(values) for target in TARGETS}


def stir(module: nn.Module) -> None:
    """Weights as after training: none is at zero."""
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


def test_sinusoids_are_those_of_diffusers():
    steps = torch.tensor([0, 1, 50, 150, 999])
    theirs = get_timestep_embedding(steps, 64, flip_sin_to_cos=True, downscale_freq_shift=0)
    torch.testing.assert_close(sinusoids(steps), theirs, rtol=0, atol=1e-4)  # float32 angles of up to 999


def test_scale_and_shift_are_those_of_a_loop_by_hand(levels):
    module, steps = ScaleShift(6), (0, 50, 150)
    stir(module)
    weights = {name: value.detach().numpy().astype(np.float64) for name, value in module.named_parameters()}
    changed = module(levels[0], torch.tensor(steps)).detach()
    for idx, step in enumerate(steps):
        frequencies = [10_000 ** (-i / 32) for i in range(32)]
        waves = [math.cos(step * f) for f in frequencies] + [math.sin(step * f) for f in frequencies]
        hidden = weights["hidden.weight"] @ waves + weights["hidden.bias"]
        said = weights["output.weight"] @ (hidden / (1 + np.exp(-hidden))) + weights["output.bias"]
        for channel in range(6):
            by_hand = levels[0][idx, channel].double() * (1 + said[channel]) + said[6 + channel]
            torch.testing.assert_close(changed[idx, channel].double(), by_hand, rtol=1e-3, atol=1e-3)  # float32 angles


def test_heads_that_have_learned_nothing_change_nothing(levels):
    """Neither outputs nor the weights beside them: two runs of one seed begin alike with and without."""
    plain, timed = regressor(None), regressor(True)
    assert all(torch.equal(timed.state_dict()[name], value) for name, value in plain.state_dict().items())
    before, after = plain(levels), timed(levels, timesteps(0, 50, 999))
    assert all(torch.equal(after[name], before[name]) for name in before)


@pytest.mark.parametrize("timestep", [None, False])
def test_a_regressor_without_them_has_the_weights_it_had(timestep):
    names = set(regressor(timestep).state_dict())
    assert not has_timed_heads(names)
    extra = set(regressor(True).state_dict()) - names
    assert has_timed_heads(extra) and {name.split(".")[0] for name in extra} == {"timed"}


def test_each_sample_is_seen_at_its_own_timestep_and_each_level_at_its_own(levels):
    model = regressor(True)
    stir(model.timed)
    mixed = model(levels, {"l2": torch.tensor([50, 150, 50]), "l3": torch.tensor([20, 20, 40])})
    for idx, (fine, coarse) in enumerate(((50, 20), (150, 20), (50, 40))):
        alone = model([level[idx : idx + 1] for level in levels], timesteps_of(fine, coarse))
        for name in mixed:
            torch.testing.assert_close(mixed[name][idx : idx + 1], alone[name], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(mixed["l2"], model(levels, timesteps(50, 50, 50))["l2"])


def timesteps_of(fine: int, coarse: int) -> dict[str, torch.Tensor]:
    return {"l2": torch.tensor([fine]), "l3": torch.tensor([coarse])}


def test_scale_and_shift_come_before_the_one_by_one(levels):
    model = regressor(True)
    stir(model.timed)
    seen = {}
    model.heads[1].register_forward_pre_hook(lambda _module, inputs: seen.update(head=inputs[0]))
    model.timed[1].register_forward_hook(lambda _module, _inputs, output: seen.update(timed=output))
    out = model(levels, timesteps(1, 2, 3))
    assert torch.equal(seen["head"], seen["timed"])
    assert torch.equal(out["l3"], model.heads[1](seen["timed"]))


def test_absent_timesteps_are_refused(levels):
    with pytest.raises(ShapeError, match=r"heads know the timestep, and none is given for \['l3'\]"):
        regressor(True)(levels, {"l2": torch.tensor([1, 2, 3])})
