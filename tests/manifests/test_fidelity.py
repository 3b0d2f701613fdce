"""Errors of decoded features are those that the losses see."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dtpipe.distill.losses.whitening import whiten
from dtpipe.manifests.fidelity import Fidelity, merged_records


@pytest.fixture
def pair() -> tuple[np.ndarray, np.ndarray]:
    """Features of five samples, far from zero mean, and the same with noise of a tenth of their deviation."""
    random = np.random.Generator(np.random.Philox(5))
    true = (random.standard_normal((5, 6, 4, 3)) * 3 + 2).astype(np.float32)
    return true, (true + 0.3 * random.standard_normal(true.shape)).astype(np.float16)


def test_errors_are_those_of_the_losses(pair: tuple[np.ndarray, np.ndarray]) -> None:
    """Against torch: LayerNorm of the loss, its cosine, and equation (2) written out; float32 against float64."""
    true, decoded = pair
    found = Fidelity.of(true, decoded)
    one, other = (whiten(torch.from_numpy(values).float(), "layer").flatten(1) for values in pair)
    errors = (one - other).square().mean(dim=1)
    assert found.num == 5
    assert found.relative_mse == pytest.approx(float(errors.mean()), rel=1e-4)
    assert found.worst == pytest.approx(float(errors.max()), rel=1e-4)
    assert 0.5 < found.relative_mse / 0.01 < 2
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=1)
    assert found.cosine == pytest.approx(float(cosine.mean()), rel=1e-5)
    maps = [
        torch.nn.functional.normalize(torch.from_numpy(values).float().square().sum(1).flatten(1)) for values in pair
    ]
    assert found.attention == pytest.approx(float((maps[0] - maps[1]).norm(dim=1).mean()), rel=1e-3)


def test_nothing_lost_is_no_error_and_a_constant_level_has_one_that_is_finite() -> None:
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 2, 2)
    assert Fidelity.of(values, values) == Fidelity(2, 0.0, 0.0, pytest.approx(1), 0.0)
    flat = Fidelity.of(np.zeros((1, 3, 2, 2), np.float16), np.zeros((1, 3, 2, 2), np.float16))
    assert (flat.relative_mse, flat.attention) == (0, 0)


def test_errors_of_parts_are_those_of_the_whole(pair: tuple[np.ndarray, np.ndarray]) -> None:
    true, decoded = pair
    parts = [Fidelity.of(true[cut], decoded[cut]) for cut in (slice(0, 2), slice(2, 5))]
    whole = Fidelity.of(true, decoded)
    merged = Fidelity.merged(parts)
    assert merged is not None
    assert merged.record() == pytest.approx(whole.record(), rel=1e-5)
    records = [{"l2": part.record()} for part in parts]
    assert merged_records([*records, {}, {"l3": whole.record()}]) == {
        "l2": pytest.approx(whole.record(), rel=1e-5),
        "l3": whole.record(),
    }
    assert Fidelity.merged([]) is None
