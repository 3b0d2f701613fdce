"""Feature maps become pictures whose colours mean the same wherever they share a basis."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA

from dtpipe.manifests.errors import ShapeError
from dtpipe.pipeline.report.maps.pca import pca_to_rgb


def level(channels: int = 16, height: int = 8, width: int = 12, idx: int = 0) -> np.ndarray:
    rng = np.random.Generator(np.random.Philox(idx))
    mixing = rng.normal(size=(channels, channels)) * np.geomspace(8, 0.1, channels)
    return np.einsum("cd,dhw->chw", mixing, rng.normal(size=(channels, height, width)))


@pytest.mark.parametrize("channels", [3, 16, 200])  # fewer and more channels than the 96 positions
def test_colours_are_the_principal_components(channels: int) -> None:
    picture = pca_to_rgb(level(channels))
    assert picture.shape == (8, 12, 3) and picture.dtype == np.uint8
    scores = PCA(3, svd_solver="full").fit_transform(level(channels).reshape(channels, -1).T)
    for idx in range(3):
        assert abs(np.corrcoef(picture[..., idx].ravel(), scores[:, idx])[0, 1]) > 0.99  # clipped at 1 and 99 %


def test_equal_features_give_equal_pictures_in_any_dtype_and_scale() -> None:
    features = level().astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(pca_to_rgb(features), pca_to_rgb(features.astype(np.float16)))
    np.testing.assert_array_equal(pca_to_rgb(features), pca_to_rgb(features * 4))


def test_sign_follows_the_largest_weight() -> None:
    ramp = np.linspace(-1, 1, 64).reshape(1, 8, 8)
    rising = pca_to_rgb(np.concatenate([3 * ramp, -1 * ramp]))
    falling = pca_to_rgb(np.concatenate([-3 * ramp, 1 * ramp]))
    assert rising[0, 0, 0] == 0 and rising[-1, -1, 0] == 255
    np.testing.assert_array_equal(falling, rising[::-1, ::-1])


def test_shared_basis_gives_equal_features_equal_colours() -> None:
    first, second = level(idx=1), level(height=4, width=5, idx=2)
    second[:, 0, 0] = first[:, 3, 3]
    one, two = pca_to_rgb([first, second])
    assert (one.shape, two.shape) == ((8, 12, 3), (4, 5, 3))
    np.testing.assert_array_equal(one[3, 3], two[0, 0])
    assert not np.array_equal(one, pca_to_rgb(first))


def test_the_first_levels_alone_can_decide_the_colours() -> None:
    first, second, wild = level(idx=1), level(idx=2), 50 * level(height=4, width=5, idx=3)
    wild[:, 0, 0] = first[:, 3, 3]
    one, two, other = pca_to_rgb([first, second, wild], num_deciding=2)
    for picture, expected in zip((one, two), pca_to_rgb([first, second]), strict=True):
        np.testing.assert_array_equal(picture, expected)
    np.testing.assert_array_equal(other[0, 0], one[3, 3])
    assert set(np.unique(other[..., 0])) >= {0, 255}  # beyond the range


def test_flat_and_thin_levels_are_grey() -> None:
    assert (pca_to_rgb(np.full((5, 4, 4), 7.0)) == 128).all()
    single = pca_to_rgb(np.linspace(0, 1, 16).reshape(1, 4, 4))
    assert np.ptp(single[..., 0]) == 255
    assert (single[..., 1:] == 128).all()
    assert pca_to_rgb(np.ones((64, 1, 1))).shape == (1, 1, 3)


def test_lone_bright_position_is_seen() -> None:
    features = np.zeros((4, 20, 20))
    features[2, 5, 5] = 1
    picture = pca_to_rgb(features)
    assert picture[5, 5, 0] != picture[0, 0, 0]


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"\(16, 8\)"):
        pca_to_rgb(np.zeros((16, 8)))
    with pytest.raises(ShapeError, match="equal C"):
        pca_to_rgb([np.zeros((4, 2, 2)), np.zeros((5, 2, 2))])
    assert pca_to_rgb([]) == []
