"""Noise is a pure function of (seed, key, draw, stream), with golden values."""

from __future__ import annotations

import numpy as np
import pytest
from blake3 import blake3
from hypothesis import given
from hypothesis import strategies as st

from dtpipe.extract.noise import STREAMS, draw_noise, draw_seed
from dtpipe.manifests.errors import ConfigError

GOLDEN = {
    (0, "cat/001.png", 0, "forward"): (6345336423520829133, (-0.4565213, 0.20012644, 1.36518383, -1.35255182)),
    (0, "cat/001.png", 1, "forward"): (9205195853068607111, (-1.07341683, -0.32296836, -0.45217094, -0.98008281)),
    (7, "z/000000042", 0, "z"): (6633619072438666299, (0.26501098, 1.41171241, -0.63337237, 0.16373868)),
    (0, "Katze/ä b#3.jpg", 0, "vae"): (8335772191649209352, (0.47814691, -0.15851487, 0.72361827, 2.19974041)),
}


@pytest.mark.parametrize("arguments", GOLDEN, ids=lambda arguments: "-".join(map(str, arguments)))
def test_seed_and_values_are_golden(arguments: tuple[int, str, int, str]) -> None:
    seed, values = GOLDEN[arguments]
    assert draw_seed(*arguments) == seed
    drawn = draw_noise(*arguments, shape=(4,))
    assert drawn.dtype == np.float32
    assert drawn.tolist() == pytest.approx(values, abs=1e-7)


def test_seed_follows_the_written_rule() -> None:
    digest = int.from_bytes(blake3(b"3/forward/2/a/b.png").digest()[:8], "big")
    assert draw_seed(3, "a/b.png", 2, "forward") == digest // 2


@given(
    seed=st.integers(0, 2**63),
    key=st.text(st.characters(exclude_categories=["Cs"])),
    draw=st.integers(0, 10_000),
    stream=st.sampled_from(STREAMS),
)
def test_seed_fits_philox(seed: int, key: str, draw: int, stream: str) -> None:
    assert 0 <= draw_seed(seed, key, draw, stream) < 2**63


def test_each_argument_changes_the_noise() -> None:
    draws = [
        (0, "a", 0, "forward"),
        (1, "a", 0, "forward"),
        (0, "b", 0, "forward"),
        (0, "a", 1, "forward"),
        (0, "a", 0, "vae"),
    ]
    arrays = [draw_noise(*arguments, shape=(3, 16, 16)) for arguments in draws]
    for idx, first in enumerate(arrays):
        for second in arrays[idx + 1 :]:
            assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.15  # 768 values: 4 standard errors


def test_noise_is_standard_normal() -> None:
    drawn = draw_noise(0, "k", 0, "forward", (100_000,))
    assert abs(drawn.mean()) < 0.013  # 4 standard errors
    assert abs(drawn.std() - 1) < 0.009
    assert np.mean(np.abs(drawn) < 1) == pytest.approx(0.6827, abs=0.006)


def test_noise_ignores_and_spares_the_global_generator() -> None:
    np.random.seed(0)
    first = draw_noise(0, "k", 0, "z", (8,))
    before = np.random.random()
    np.random.seed(0)
    assert np.random.random() == before
    np.testing.assert_array_equal(first, draw_noise(0, "k", 0, "z", (8,)))


def test_unknown_stream_names_the_choices() -> None:
    with pytest.raises(ConfigError, match=r"'foward'.*'forward'"):
        draw_seed(0, "k", 0, "foward")


def test_negative_draw_is_refused() -> None:
    with pytest.raises(ConfigError, match="-1"):
        draw_noise(0, "k", -1, "z", (2,))
