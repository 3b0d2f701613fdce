"""The transform codec: its two transforms against other code, fits that hold on other samples, and hard inputs."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numcodecs import Zstd
from scipy.fft import dctn, idctn
from threadpoolctl import threadpool_limits

from dtpipe.manifests.codecs.base import decode_level, encode_level
from dtpipe.manifests.codecs.basis import cosines, fit_basis, frequency_regions, from_cosines, normalise
from dtpipe.manifests.codecs.fit import FitTarget
from dtpipe.manifests.codecs.quantise import NO_BAND, Quantiser, from_symbols, to_symbols
from dtpipe.manifests.codecs.rans import compress, decompress
from dtpipe.manifests.codecs.rans_tables import Coder
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.codecs.transform import TransformLevel
from dtpipe.manifests.codecs.transform_fit import fit_transform
from dtpipe.manifests.errors import ConfigError, DamagedDataError, TeacherError
from parts.fits import fitted_codec, level_of, opened, relative_mse, smooth_features
from parts.paths import REPO

LOOSE = FitTarget(relative_mse=0.05)


def test_cosines_are_scipys_and_turn_back() -> None:
    maps = np.random.default_rng(0).standard_normal((3, 5, 7))
    np.testing.assert_allclose(cosines(maps), dctn(maps, axes=(1, 2), norm="ortho"), atol=1e-12)
    np.testing.assert_allclose(from_cosines(maps), idctn(maps, axes=(1, 2), norm="ortho"), atol=1e-12)


def test_the_bases_are_those_of_a_loop_over_regions() -> None:
    normal = normalise(smooth_features(400).astype(np.float64))[0]
    basis = fit_basis(normal, 6, frequency_regions(8, 8))
    waves = dctn(normal, axes=(2, 3), norm="ortho")
    waves[:, :, 0, 0] -= waves[:, :, 0, 0].mean(axis=0)
    runs = [range(1), range(1, 3), range(3, 7), range(7, 8)]
    regions = [[(u, v) for u in down for v in across] for down in runs for across in runs]
    for (_cells, rows), region in zip(basis.regions(), regions, strict=True):
        values = np.array([sample[:, u, v] for sample in waves for u, v in region])
        variances, vectors = np.linalg.eigh(values.T @ values / len(values))
        np.testing.assert_allclose(rows @ rows.T, np.eye(6), atol=0.01)  # 127 steps an entry
        assert (rows[np.arange(6), np.abs(rows).argmax(axis=1)] > 0).all()
        along = np.square(values @ rows.T).mean(axis=0)
        np.testing.assert_allclose(
            along, variances[::-1], rtol=0.02, atol=0.03
        )  # all regions have a little say in each
        np.testing.assert_allclose(abs(rows[0] @ vectors[:, -1]), 1, atol=0.01)


def test_coefficients_are_a_rotation_and_turn_back() -> None:
    normal = normalise(smooth_features(3, 5, 4).astype(np.float64))[0]
    basis = fit_basis(normal, 5, frequency_regions(4, 4))
    coefficients = basis.forward(normal)
    centred = normal - basis.centre[:, None, None]
    np.testing.assert_allclose(np.square(coefficients).sum(), np.square(centred).sum(), rtol=1e-2)
    np.testing.assert_allclose(basis.inverse(coefficients), normal, atol=0.03)


def test_numbers_by_hand() -> None:
    band = np.array([[[1, 0], [NO_BAND, 1]]], np.uint8)
    floats = [np.array(values, np.float32) for values in ([0.6, 0.9], [0.4, 0.5], [[0.1, 0.0], [0.25, 0.125]])]
    quantiser = Quantiser(2.0, band, *floats)
    coefficients = np.array([[[1.7, -1.3], [9.0, -5.2]]])  # in steps: .85 and -2.6 of band 1, -.65 of band 0
    numbers = quantiser.quantise(coefficients)
    assert numbers.tolist() == [-1, 0, -3]
    np.testing.assert_allclose(quantiser.restore(numbers), [[[0, -1.8], [0, -5.75]]], atol=1e-6)


@given(st.lists(st.integers(-32639, 32639), min_size=1, max_size=20), st.integers(0, 20))
def test_two_bytes_hold_every_number_and_one_the_small_ones(values: list[int], wide: int) -> None:
    wide, numbers = min(wide, len(values)), np.array(values, np.int16)
    expected = np.where(np.arange(len(values)) < wide, numbers, np.clip(numbers, -127, 127))
    np.testing.assert_array_equal(from_symbols(to_symbols(numbers, wide), wide), expected)


@pytest.mark.parametrize("target", [0.01, 0.03, 0.1])
def test_a_fit_meets_its_error_on_samples_it_never_saw_and_states_what_each_lost(target: float) -> None:
    fit_on, others = smooth_features(64), smooth_features(64, seed=1)
    codec = fitted_codec(fit_on, FitTarget(relative_mse=target), dtype="float16")
    parts = encode_level(codec, others)
    decoded = decode_level(codec, parts)
    assert decoded.dtype == np.float16
    np.testing.assert_allclose(relative_mse(decoded, others), target, rtol=0.2)  # of 16 held samples
    lost = np.sqrt(np.square(decoded.astype(np.float64) - others).mean(axis=(1, 2, 3)))
    assert (lost <= codec.error(parts)).all()
    np.testing.assert_allclose(codec.error(parts), lost, rtol=0.02)  # beside what decoders may round in float16


@pytest.mark.parametrize("target", [1e-5, 0.02, 0.3])
def test_a_fit_takes_the_largest_step_within_its_error(target: float) -> None:
    features = smooth_features(32, 6, 16)
    fit = fit_transform(level_of(features), features)(FitTarget(relative_mse=target))
    assert 0.99 * target < fit.coded_mse <= target


@pytest.mark.parametrize("target", [1e-6, 1e-5, 1e-4, 1e-3, 0.01])
def test_a_fit_counts_what_its_rounded_basis_loses(target: float) -> None:
    """At small errors that is most. Where steps are coarse, some of it is gone with what they drop."""
    features, others = smooth_features(96, 24), smooth_features(96, 24, seed=1)
    level = level_of(features)
    fit = fit_transform(level, features)(FitTarget(relative_mse=target))
    codec = opened(level, fit)
    lost = relative_mse(decode_level(codec, encode_level(codec, others)), others)
    assert 0.5 * fit.fixed_mse + fit.coded_mse < 1.25 * lost and lost < 1.25 * fit.relative_mse
    if target < fit.fixed_mse / 2 or target > 20 * fit.fixed_mse:
        np.testing.assert_allclose(fit.relative_mse, lost, rtol=0.25)  # of 24 held samples


def test_a_fit_for_less_than_any_step_loses_takes_the_least() -> None:
    features = smooth_features(32, 6, 16)
    fit = fit_transform(level_of(features), features)(FitTarget(relative_mse=1e-12))
    assert fit.parameters["step"] == pytest.approx(2.0**-10) and 1e-12 < fit.coded_mse < 1e-6


@pytest.mark.parametrize("entropy", ["zstd", "rans"])
@pytest.mark.parametrize(
    ("features", "max_error"),
    [
        (np.zeros((12, 4, 8, 8), np.float32), 0.03),  # a dead level
        (np.full((1, 4, 8, 8), 7.0, np.float32), 0.03),
        (np.random.default_rng(0).standard_normal((12, 4, 8, 8)).astype(np.float32), 2.0),  # all may be lost
    ],
)
def test_a_level_of_which_nothing_need_be_kept_still_has_symbols(
    features: np.ndarray, max_error: float, entropy: Coder
) -> None:
    level, target = level_of(features), FitTarget(relative_mse=max_error, entropy=entropy)
    fit = fit_transform(level, features)(target)
    assert fit.parameters["symbols"] == 1 and fit.relative_mse <= max_error and fit.size_bytes > 12
    codec = opened(level, fit)
    parts = encode_level(codec, features)
    lost = decode_level(codec, parts).astype(np.float64) - features
    assert (np.sqrt(np.square(lost).mean(axis=(1, 2, 3))) <= codec.error(parts)).all()
    assert fit.relative_mse == pytest.approx(np.square(lost).mean() / max(features.var(), 1e-9), abs=0.1)


def test_a_fit_is_the_same_bytes_for_any_number_of_threads() -> None:
    features = smooth_features(16, 24)
    fits = []
    for threads in (1, 2):
        with threadpool_limits(threads):
            fits.append(fit_transform(level_of(features), features)(LOOSE))
    one, other = fits
    assert one.parameters == other.parameters
    assert all(one.arrays[name].tobytes() == other.arrays[name].tobytes() for name in one.arrays)


@settings(max_examples=15, deadline=None)
@given(
    st.integers(1, 5),
    st.sampled_from([(1, 1), (1, 4), (3, 2)]),
    st.sampled_from([1e-42, 1e-30, 1.0, 1e30]),
    st.booleans(),
)
def test_any_shape_and_scale_comes_back_within_what_is_stated(
    channels: int, side: tuple[int, int], scale: float, moved: bool
) -> None:
    rng = np.random.default_rng(channels)
    features = (rng.standard_normal((9, 2, channels, *side)) + 5 * moved) * scale
    features[0, 1] = 3 * scale  # no variance
    features = features.astype(np.float32)
    codec = fitted_codec(features[:, 0], LOOSE)
    parts = encode_level(codec, features)
    lost = decode_level(codec, parts).astype(np.float64) - features
    assert (np.sqrt(np.square(lost).mean(axis=(-3, -2, -1))) <= codec.error(parts)).all()
    np.testing.assert_allclose(decode_level(codec, parts)[0, 1], features[0, 1], rtol=1e-6)


def test_samples_are_coded_by_themselves_and_codecs_travel() -> None:
    features = smooth_features(9)
    codec = fitted_codec(features, LOOSE)
    together = encode_level(codec, features)
    for idx in (0, 5):
        alone = encode_level(pickle.loads(pickle.dumps(codec)), features[idx])
        assert all(np.array_equal(alone[part], together[part][idx]) for part in codec.parts)


def test_what_cannot_be_fitted_or_stored_is_refused() -> None:
    features = smooth_features(9)
    spoiled = features.copy()
    spoiled[3, 0, 0, 0] = np.nan
    with pytest.raises(ConfigError, match="codec transform of level l2: sample 3 of the fit is not finite"):
        fit_transform(level_of(features), spoiled)
    with pytest.raises(ConfigError, match="is fitted on samples of"):
        fit_transform(level_of(features), features[:0])
    for wrong in (0.0, -0.1, float("nan"), float("inf")):
        with pytest.raises(ConfigError, match="for an error above 0"):
            FitTarget(relative_mse=wrong)
    codec = fitted_codec(features, LOOSE, dtype="float16")
    with pytest.raises(TeacherError, match="1 of 384 features not finite"):
        encode_level(codec, spoiled[3])
    with pytest.raises(ConfigError, match="does not fit float16"):
        encode_level(codec, features[0] + 1e6)


def test_parameters_and_arrays_that_do_not_fit_each_other_are_refused() -> None:
    features = smooth_features(9)
    level, fit = level_of(features), fit_transform(level_of(features), features)(LOOSE)
    with pytest.raises(ConfigError, match="takes components, symbols, wide, step, entropy, fitted, which a fit gives"):
        open_codec(level_of(features, "transform", step=1.0))
    with pytest.raises(ConfigError, match="fit it again"):
        codec = opened(level, fit)
        assert isinstance(codec, TransformLevel)
        open_codec(level_of(features, "transform", **{**codec.level.codec.parameters, "wide": 10**6}))
    unfitted = open_codec(codec.level)
    assert unfitted.parts == codec.parts  # plans need no arrays
    with pytest.raises(ConfigError, match="was opened without"):
        unfitted.encode(features)
    for name, wrong in (
        ("basis", fit.arrays["basis"][:, :-1]),
        ("band", np.zeros_like(fit.arrays["band"])),
        ("shift", fit.arrays["shift"] * np.float32(np.nan)),
        ("zone", fit.arrays["zone"][:1]),
    ):
        damaged = type(fit)(fit.parameters, {**fit.arrays, name: wrong}, 0, 0)
        with pytest.raises(DamagedDataError, match=r"fitted arrays [0-9a-f]{12} of level l2"):
            opened(level, damaged).encode(features)


def _coded(row: np.ndarray, codec: TransformLevel, entropy: str, zstd_level: int) -> bytes:
    if entropy == "rans":
        return compress(row, codec.load_tables())
    return bytes(Zstd(zstd_level).encode(row)) if zstd_level else row.tobytes()


def test_symbols_of_other_samples_take_the_bytes_that_the_fit_foretold() -> None:
    fit_on, others = smooth_features(64, 12, 16), smooth_features(64, 12, 16, seed=1)
    for entropy, zstd_level in (("zstd", 3), ("zstd", 12), ("zstd", 0), ("rans", 3)):
        target = FitTarget(relative_mse=0.005, entropy=entropy, zstd_level=zstd_level)
        fit = fit_transform(level_of(fit_on), fit_on)(target)
        codec = opened(level_of(fit_on), fit)
        assert isinstance(codec, TransformLevel) and (codec.parts[""].tables is not None) == (entropy == "rans")
        symbols = codec.encode(others)[""].astype(np.int8)
        chunks = [_coded(row, codec, entropy, zstd_level) for row in symbols]
        np.testing.assert_allclose(np.mean([len(chunk) for chunk in chunks]) + 12, fit.size_bytes, rtol=0.08)
        if entropy == "rans":
            np.testing.assert_array_equal(decompress(chunks, codec.load_tables()), symbols)


def test_the_page_of_the_format_says_how_to_decode() -> None:
    page = (REPO / "manifests" / "README.md").read_text(encoding="utf-8")
    snippet = page[page.index("from scipy.fft import idctn") :].split("```")[0]
    names: dict[str, Any] = {"np": np}
    exec(snippet, names)
    true = smooth_features(16)
    codec = fitted_codec(true, FitTarget(relative_mse=0.001))
    assert isinstance(codec, TransformLevel) and codec.parameters.wide
    parts, arrays, known = codec.encode(true), codec.arrays.load(codec.parameters.fitted), codec.parameters
    for idx in (0, 7):
        symbols, norm = parts[""][idx], parts["norm"][idx]
        decoded = names["features"](symbols, norm, arrays, known.symbols, known.wide, known.step)
        np.testing.assert_allclose(decoded, codec.decode(parts)[idx], atol=1e-5 * norm[0])
