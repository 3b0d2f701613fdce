"""Equations (1)-(3) against loops in float64 that share no code with them."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.backends.debugging import aot_eager

from dtpipe.distill.config import LossConfig
from dtpipe.distill.losses.attention import AttentionTransfer
from dtpipe.distill.losses.cosine import CosineDistance
from dtpipe.distill.losses.features import feature_loss, level_values
from dtpipe.distill.losses.mse import RegressionLoss
from dtpipe.distill.losses.registry import LOSSES
from dtpipe.distill.losses.whitening import whiten
from dtpipe.manifests.errors import ConfigError, ShapeError
from parts.ranks import fork_ranks

TOLERANCE = 2e-5  # float32 sums of up to a few thousand terms against float64


def loop_whiten(level: np.ndarray, over: str = "layer") -> np.ndarray:
    """LayerNorm over (C, H, W), sample by sample, in float64; or over C of each position, or nothing."""
    out = np.empty(level.shape, dtype=np.float64)
    if over == "none":
        return level.astype(np.float64)
    if over == "channel":
        for b, y, x in np.ndindex(level.shape[0], *level.shape[2:]):
            cell = [float(value) for value in level[b, :, y, x]]
            mean = sum(cell) / len(cell)
            variance = sum((value - mean) ** 2 for value in cell) / len(cell)
            out[b, :, y, x] = [(value - mean) / math.sqrt(variance + 1e-5) for value in cell]
        return out
    for b, sample in enumerate(level.astype(np.float64)):
        total = sum(float(value) for value in sample.ravel())
        mean = total / sample.size
        variance = sum((float(value) - mean) ** 2 for value in sample.ravel()) / sample.size
        out[b] = (sample - mean) / math.sqrt(variance + 1e-5)
    return out


def loop_mse(students: list[np.ndarray], teachers: list[np.ndarray], over: str = "layer") -> float:
    per_level = []
    for student, teacher in zip(students, teachers, strict=True):
        target = loop_whiten(teacher, over)
        squares = [(float(a) - float(b)) ** 2 for a, b in zip(student.ravel(), target.ravel(), strict=True)]
        per_level.append(sum(squares) / len(squares))
    return sum(per_level) / len(per_level)


def loop_map(sample: np.ndarray, power: int = 2) -> list[float]:
    channels, height, width = sample.shape
    energy = [
        sum(abs(float(sample[c, y, x])) ** power for c in range(channels)) for y in range(height) for x in range(width)
    ]
    norm = math.sqrt(sum(value**2 for value in energy))
    return [value / norm for value in energy]


def loop_at(students: list[np.ndarray], teachers: list[np.ndarray]) -> float:
    per_level = []
    for student, teacher in zip(students, teachers, strict=True):
        distances = []
        for one, other in zip(student, teacher, strict=True):
            distances.append(math.sqrt(sum((a - b) ** 2 for a, b in zip(loop_map(one), loop_map(other), strict=True))))
        per_level.append(sum(distances) / len(distances))
    return sum(per_level) / len(per_level)


def loop_cosine(students: list[np.ndarray], teachers: list[np.ndarray], over: str) -> float:
    per_level = []
    for student, teacher in zip(students, teachers, strict=True):
        target, distances = loop_whiten(teacher, over), []
        for b, y, x in np.ndindex(student.shape[0], *student.shape[2:]):
            one, other = ([float(value) for value in level[b, :, y, x]] for level in (student, target))
            norms = math.sqrt(sum(value**2 for value in one)) * math.sqrt(sum(value**2 for value in other))
            distances.append(1 - sum(p * q for p, q in zip(one, other, strict=True)) / norms)
        per_level.append(sum(distances) / len(distances))
    return sum(per_level) / len(per_level)


def random_levels(seed: int, batch: int, shapes: list[tuple[int, int, int]], scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [
        (rng.standard_normal((batch, *shape)) * scale + rng.standard_normal()).astype(np.float32) for shape in shapes
    ]


def as_tensors(levels: list[np.ndarray]) -> dict[str, torch.Tensor]:
    return {f"l{idx}": torch.from_numpy(level) for idx, level in enumerate(levels)}


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    batch=st.integers(1, 3),
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 5), st.integers(1, 6)), min_size=1, max_size=3),
    scale=st.sampled_from([0.01, 1.0, 50.0]),
    at_weight=st.sampled_from([0.0, 1.0, 10.0]),
)
def test_feature_loss_is_equations_1_to_3(seed, batch, shapes, scale, at_weight):
    students, teachers = random_levels(seed, batch, shapes), random_levels(seed + 1, batch, shapes, scale)
    loss = feature_loss(as_tensors(students), as_tensors(teachers), LossConfig(at_weight=at_weight))
    mse, at = loop_mse(students, teachers), loop_at(students, teachers)
    assert loss.terms["mse"].item() == pytest.approx(mse, rel=TOLERANCE, abs=TOLERANCE)
    if at_weight > 0:
        assert loss.terms["at"].item() == pytest.approx(at, rel=TOLERANCE, abs=TOLERANCE)
    assert loss.total.item() == pytest.approx(mse + at_weight * at, rel=TOLERANCE, abs=10 * TOLERANCE)


def compiled_steps(_rank: int) -> dict[str, Any]:
    """Losses and gradients of batches of 3, 2 and 3 samples, compiled but for the last stage, which writes C++."""
    graphs: list[list[tuple[int, ...]]] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Any:
        graphs.append(sorted({tuple(map(int, values.shape)) for values in inputs if values.dim() == 4}))
        return aot_eager(graph, inputs)

    compiled = torch.compile(level_values, dynamic=False, fullgraph=True, backend=backend)
    steps = []
    for batch in (3, 2, 3):  # the tail of an epoch between two whole batches
        students, teachers = random_levels(batch, batch, SHAPES), random_levels(7, batch, SHAPES, 4.0)
        terms, gradients = [], []
        for compute in (compiled, level_values):
            ready = {name: level.requires_grad_() for name, level in as_tensors(students).items()}
            loss = feature_loss(ready, as_tensors(teachers), LossConfig(), compute=compute)
            loss.total.backward()
            terms.append({name: term.item() for name, term in loss.terms.items()})
            gradients.append([level.grad.clone() for level in ready.values()])
            for level in ready.values():
                level.grad = None
        away = [float((one - other).abs().max()) for one, other in zip(*gradients, strict=True)]
        truth = {"mse": loop_mse(students, teachers), "at": loop_at(students, teachers)}
        steps.append({"terms": terms[0], "truth": truth, "away": max(away)})
    return {"graphs": graphs, "steps": steps}


SHAPES = [(4, 3, 5), (6, 2, 2)]


def test_compiled_losses_are_equations_1_to_3_in_one_graph_of_each_batch_size(tmp_path):
    """In a process of its own: who has compiled does not fork any more."""
    (found,) = fork_ranks(compiled_steps, tmp_path, 1)
    assert found["graphs"] == [[[batch, *shape] for shape in SHAPES] for batch in (3, 2)]
    for step in found["steps"]:
        assert step["terms"] == pytest.approx(step["truth"], rel=TOLERANCE)
        assert step["away"] < 1e-6


@pytest.mark.parametrize("over", ["layer", "channel", "none"])
def test_each_whitening_is_its_loop(over):
    shapes = [(4, 3, 5), (6, 2, 2)]
    students, teachers = random_levels(10, 3, shapes), random_levels(11, 3, shapes, scale=4.0)
    loss = feature_loss(as_tensors(students), as_tensors(teachers), LossConfig(whiten=over, cosine_weight=2.0))
    expected = {
        "mse": loop_mse(students, teachers, over),
        "at": loop_at(students, teachers),  # of the raw level, whatever the whitening
        "cosine": loop_cosine(students, teachers, over),
    }
    assert {name: term.item() for name, term in loss.terms.items()} == pytest.approx(expected, rel=TOLERANCE)
    assert loss.total.item() == pytest.approx(
        expected["mse"] + 10 * expected["at"] + 2 * expected["cosine"], rel=TOLERANCE
    )
    single = {
        f"mse/l{idx}": loop_mse([a], [b], over) for idx, (a, b) in enumerate(zip(students, teachers, strict=True))
    }
    assert {name: loss.levels[name].item() for name in single} == pytest.approx(single, rel=TOLERANCE)


def test_losses_of_weight_0_are_not_there_and_each_loss_has_a_weight():
    students, teachers = (as_tensors(random_levels(seed, 2, [(3, 4, 4)])) for seed in (0, 1))
    loss = feature_loss(students, teachers, LossConfig(mse_weight=0, at_weight=0, cosine_weight=0.5))
    assert set(loss.terms) == {"cosine"} and set(loss.levels) == {"cosine/l0"}
    assert loss.total.item() == pytest.approx(0.5 * loss.terms["cosine"].item())
    assert set(LossConfig().weights) == set(LOSSES)


def test_level_weights_make_a_weighted_mean_of_every_loss():
    shapes = [(3, 4, 4), (5, 2, 3), (2, 3, 3)]
    students, teachers = random_levels(0, 2, shapes), random_levels(1, 2, shapes)
    loss = feature_loss(as_tensors(students), as_tensors(teachers), LossConfig(), {"l0": 3.0, "l2": 0.0})
    for name, loop in (("mse", loop_mse), ("at", loop_at)):
        single = [loop([a], [b]) for a, b in zip(students, teachers, strict=True)]
        assert loss.terms[name].item() == pytest.approx((3 * single[0] + single[1]) / 4, rel=TOLERANCE)
    assert loss.total.item() == pytest.approx(loss.terms["mse"].item() + 10 * loss.terms["at"].item(), rel=TOLERANCE)
    equal = feature_loss(
        as_tensors(students), as_tensors(teachers), LossConfig(), dict.fromkeys(("l0", "l1", "l2"), 7.0)
    )
    assert equal.total.item() == pytest.approx(
        feature_loss(as_tensors(students), as_tensors(teachers), LossConfig()).total.item()
    )


@pytest.mark.parametrize("weights", [{"l9": 1.0}, {"l0": -1.0}, {"l0": 0.0}])
def test_level_weights_that_do_not_fit_are_refused(weights):
    level = {"l0": torch.ones(1, 2, 2, 2)}
    with pytest.raises(ConfigError, match=r"level weights .* do not fit levels \['l0'\]"):
        feature_loss(level, level, LossConfig(), weights)


def test_cosine_distance_ignores_strength_and_is_0_for_equal_and_2_for_opposite_directions():
    white = whiten(torch.from_numpy(random_levels(5, 2, [(8, 4, 4)])[0]))
    assert CosineDistance()(white * 7, white, white).item() == pytest.approx(0, abs=1e-6)
    assert CosineDistance()(-white, white, white).item() == pytest.approx(2, abs=1e-6)


def test_paper_weight_of_attention_transfer_is_the_default():
    students, teachers = random_levels(0, 2, [(3, 4, 4)]), random_levels(1, 2, [(3, 4, 4)])
    loss = feature_loss(as_tensors(students), as_tensors(teachers), LossConfig())
    assert loss.total.item() == pytest.approx(
        loop_mse(students, teachers) + 10 * loop_at(students, teachers), rel=TOLERANCE
    )


def test_whitening_is_torchs_layer_norm_over_channels_and_positions():
    level = torch.from_numpy(random_levels(3, 4, [(6, 5, 7)], scale=30.0)[0])
    torch.testing.assert_close(
        whiten(level), torch.nn.functional.layer_norm(level, level.shape[1:]), rtol=1e-4, atol=1e-5
    )


def test_whitening_by_channel_normalises_each_position_and_erases_the_energy_map():
    level = torch.from_numpy(random_levels(4, 2, [(16, 3, 3)], scale=5.0)[0])
    white = whiten(level, "channel")
    torch.testing.assert_close(white.mean(dim=1), torch.zeros(2, 3, 3), rtol=0, atol=1e-5)
    torch.testing.assert_close(white.var(dim=1, correction=0), torch.ones(2, 3, 3), rtol=1e-4, atol=1e-4)
    assert AttentionTransfer()(white, level) > 5 * AttentionTransfer()(torch.ones_like(level), white)


def test_attention_ignores_the_strength_and_the_number_of_channels():
    level = torch.from_numpy(random_levels(5, 2, [(8, 4, 4)])[0])
    doubled = torch.cat([level, level], dim=1) * 3
    assert AttentionTransfer()(doubled, level).item() < 1e-6
    torch.testing.assert_close(AttentionTransfer().attention_map(level).norm(dim=1), torch.ones(2))


@pytest.mark.parametrize("power", [1, 2, 3, 4])
def test_attention_maps_are_their_loop_at_every_power(power):
    level = random_levels(12, 2, [(5, 3, 4)])[0]
    expected = [loop_map(sample, power) for sample in level]
    maps = AttentionTransfer(power).attention_map(torch.from_numpy(level))
    np.testing.assert_allclose(maps.numpy(), expected, rtol=TOLERANCE)


def test_losses_of_parts_weighted_by_count_are_the_loss_of_the_whole():
    levels = [torch.from_numpy(random_levels(seed, 7, [(4, 3, 3)])[0]) for seed in (6, 7, 8)]
    for loss in (RegressionLoss(), AttentionTransfer(), CosineDistance()):
        parts = loss(*(level[:5] for level in levels)) * 5 / 7 + loss(*(level[5:] for level in levels)) * 2 / 7
        assert parts.item() == pytest.approx(loss(*levels).item(), rel=1e-6)


def test_half_precision_levels_are_reduced_in_float32():
    level = torch.full((1, 300, 4, 4), 60.0, dtype=torch.float16)  # the sum of squares is over float16's largest
    level[:, :, 0, 0] = 120.0
    assert torch.isfinite(AttentionTransfer().attention_map(level)).all()
    assert whiten(level).dtype == torch.float32


def test_a_silent_level_has_finite_gradients():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    teacher = torch.zeros(2, 3, 4, 4)
    feature_loss({"l2": student}, {"l2": teacher}, LossConfig(cosine_weight=1)).total.backward()
    assert torch.isfinite(student.grad).all()


def test_levels_that_do_not_fit_are_refused_with_both_shapes():
    with pytest.raises(ShapeError, match=r"\(4, 4\).*\(2, 2\)"):
        AttentionTransfer()(torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2))
    with pytest.raises(ShapeError, match=r"\(1, 3, 4, 4\).*\(1, 5, 4, 4\)"):
        RegressionLoss()(torch.zeros(1, 3, 4, 4), torch.zeros(1, 5, 4, 4), torch.zeros(1, 5, 4, 4))
    with pytest.raises(ShapeError, match=r"l2.*l3"):
        feature_loss({"l2": torch.zeros(1, 3, 4, 4)}, {"l3": torch.zeros(1, 3, 4, 4)}, LossConfig())
