"""Figures of a look at a dataset against plain numpy over all of its arrays at once; each planted fault is named."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from dtpipe.manifests.errors import InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.pipeline.report.dataset import look as looking
from dtpipe.pipeline.report.dataset.findings import findings_of, verdict_of
from dtpipe.pipeline.report.dataset.look import Looked, look_at, pixel_features, pooled, sample_rows
from dtpipe.pipeline.report.dataset.moments import Moments, effective_rank, explained
from dtpipe.pipeline.report.dataset.opened import OpenedDatasets
from parts import planted
from parts.planted import Planted, write_planted


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_planted(tmp_path_factory.mktemp("sound") / "features")


def looked_at(root: Path, num: int = 1000) -> Looked:
    return look_at(OpenedDatasets.open([str(root)], join=False), num, seed=0)


def all_features(name: str, fault: planted.Fault | None = None) -> np.ndarray:
    """Shapes: -> (N, K, C, h, w) float64, without the dataset."""
    source = Planted() if fault is None else Planted(fault=fault)
    level = next(level for level in source.levels if level.name == name)
    rows, draws = range(source.num_rows), range(len(source.views))
    return np.array([[source.features(level, row, draw) for draw in draws] for row in rows], np.float64)


@pytest.mark.parametrize("name", ["l2", "l3"])
def test_figures_are_those_of_numpy_over_all_arrays(sound: Path, name: str) -> None:
    of, features = looked_at(sound).levels[name, 50], all_features(name)
    assert (of.num, of.num_draws, of.num_not_finite, of.dead, of.exploding) == (48, 2, 0, (), ())
    assert_allclose(of.mean, features.mean(), rtol=1e-9)
    assert_allclose(of.deviation, np.sqrt(features.var(axis=(0, 1, 3, 4)).mean()), rtol=1e-9)
    assert_allclose(of.largest, np.abs(features).max(), rtol=0)
    assert_allclose(of.strengths, np.sqrt(np.square(features).mean(axis=(0, 1, 3, 4))), rtol=1e-9)
    within = features.var(axis=1, ddof=1).mean()
    between = features[:, 0].var(axis=0, ddof=1).mean()
    assert_allclose(of.noise_share, within / between, rtol=1e-9)
    assert_allclose(of.image_share, between / features.var(axis=(0, 1, 3, 4)).mean(), rtol=1e-9)
    # a float32 is rounded by half the distance to its neighbour at most
    error = np.square(np.spacing(np.abs(features.astype(np.float32))).astype(np.float64) / 2).mean()
    assert_allclose(of.relative_error, error / features.var(axis=(0, 1, 3, 4)).mean(), rtol=1e-9)
    cells = features[:, 0].transpose(0, 2, 3, 1).reshape(-1, features.shape[2])
    shares = np.square(np.linalg.svd(cells - cells.mean(axis=0), compute_uv=False))
    shares /= shares.sum()
    assert_allclose(of.effective_rank, np.exp(-(shares * np.log(shares)).sum()), rtol=1e-9)


def linear_r2(inputs: np.ndarray, outputs: np.ndarray) -> float:
    """Least squares on every second sample, scored on the others, each output by its own scale.

    Shapes: (N, C, h, w), (N, C', h, w).
    """
    flat = [side.transpose(0, 2, 3, 1) for side in (inputs, outputs)]
    (x, xs), (y, ys) = ([side[start::2].reshape(-1, side.shape[-1]) for start in (0, 1)] for side in flat)
    beside = np.concatenate([np.ones((len(x), 1)), x], axis=1)
    weights = np.linalg.lstsq(beside, y, rcond=None)[0]
    errors = np.square(ys - np.concatenate([np.ones((len(xs), 1)), xs], axis=1) @ weights).sum(axis=0)
    spread = np.square(ys - y.mean(axis=0)).sum(axis=0)
    return float(1 - (errors / y.var(axis=0)).sum() / (spread / y.var(axis=0)).sum())


def test_levels_explain_each_other_and_pixels_them_as_least_squares_says(sound: Path) -> None:
    looked, fine, coarse = looked_at(sound), all_features("l2")[:, 0], all_features("l3")[:, 0]
    halved = fine.reshape(48, 12, 4, 2, 4, 2).mean(axis=(3, 5))
    assert_allclose(looked.between["l2", "l3"], linear_r2(halved, coarse), atol=1e-4)
    assert_allclose(looked.between["l3", "l2"], linear_r2(coarse, halved), atol=1e-4)
    images = np.stack([Planted().image(row) for row in range(48)]) / 127.5 - 1  # (N, 32, 32, 3)
    quarters = images.reshape(48, 8, 2, 2, 8, 2, 2, 3).mean(axis=(3, 6))  # (N, 8, top, 8, left, 3)
    means = quarters.mean(axis=(2, 4), keepdims=True)
    pixels = np.concatenate(
        [part.transpose(0, 1, 3, 2, 4, 5).reshape(48, 8, 8, 12) for part in (quarters, np.abs(quarters - means))],
        axis=-1,
    )
    assert_allclose(looked.of_pixels["l2"], linear_r2(pixels.transpose(0, 3, 1, 2), fine), atol=1e-4)
    assert looked.of_pixels["l2"] > 0.5


def test_shards_are_compared_in_deviations_of_samples(tmp_path: Path) -> None:
    shards = looked_at(write_planted(tmp_path / "f", planted.shifted_shard)).shards["l2"]
    means = all_features("l2", planted.shifted_shard)[:, 0].mean(axis=(2, 3)).reshape(6, 8, 12)
    by_shard = means.mean(axis=1)
    deviation = np.sqrt(np.square(means - by_shard[:, None]).sum(axis=(0, 1)) / (48 - 6))
    expected = np.sqrt(np.square((by_shard - np.median(by_shard, axis=0)) / deviation).mean(axis=1))
    assert_allclose([of.shift for of in shards], expected, rtol=1e-6)
    assert [of.shard for of in shards if of.differs] == [4] and {of.num for of in shards} == {8}


@pytest.mark.parametrize(
    ("fault", "expected"),
    [
        (None, set()),
        (planted.constant_level, {("wrong", "constant level", "l3")}),
        (planted.dead_channel, {("look", "dead channels", "l2")}),
        (planted.exploding_channel, {("wrong", "exploding channels", "l3"), ("look", "low rank", "l3")}),
        (planted.linear_level, {("look", "linear levels", "l3")}),
        (planted.shifted_shard, {("wrong", "drift", "l2")}),
        (planted.louder_shard, {("wrong", "drift", "l3")}),
        (planted.equal_draws, {("wrong", "equal draws", "l2"), ("wrong", "equal draws", "l3")}),
        (planted.of_other_images, {("look", "unrelated to images", "l2")}),
        (
            planted.alike,
            {("wrong", "images alike", "l2"), ("wrong", "images alike", "l3"), ("look", "unrelated to images", "l2")},
        ),
        (
            planted.only_noise,
            {("wrong", "noise", "l2"), ("wrong", "noise", "l3"), ("look", "unrelated to images", "l2")},
        ),
    ],
)
def test_each_planted_fault_is_named_and_nothing_else(
    tmp_path: Path, fault: planted.Fault | None, expected: set[tuple[str, str, str]]
) -> None:
    opened = OpenedDatasets.open([str(write_planted(tmp_path / "f", fault))], join=False)
    looked = look_at(opened, 1000, seed=0)
    findings = findings_of(looked, opened.source.levels, 0, 48)
    assert {(finding.severity, finding.code, finding.where) for finding in findings} == expected
    wrong = sum(severity == "wrong" for severity, _, _ in expected)
    assert verdict_of(findings, looked, 48).startswith("Nothing is wrong" if not wrong else f"{wrong} thing")
    if fault is planted.dead_channel:
        assert "1 of 12 channels never vary (7)" in findings[0].text
    if fault is planted.exploding_channel:
        assert "1 channel far stronger than all others (4" in findings[0].text


def test_figures_are_the_same_however_few_rows_are_read_at_once(sound: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, read = looked_at(sound), FeatureDataset.read
    nums = []

    def counting(self: FeatureDataset, rows: np.ndarray, *args: object, **options: object) -> object:
        nums.append(len(rows))
        return read(self, rows, *args, **options)

    monkeypatch.setattr(FeatureDataset, "read", counting)
    monkeypatch.setattr(looking, "_AT_ONCE_BYTES", 1)
    few = looked_at(sound)
    assert set(nums) == {1}
    assert few.levels == whole.levels and few.between == whole.between and few.shards == whole.shards


def test_a_sample_is_bounded_drawn_by_the_seed_and_even_over_shards() -> None:
    rows = np.arange(10_000, dtype=np.int64)
    chosen = sample_rows(rows, rows // 100, 200, 0)
    assert len(chosen) <= 200 and np.array_equal(chosen, sample_rows(rows, rows // 100, 200, 0))
    assert not np.array_equal(chosen, sample_rows(rows, rows // 100, 200, 1))
    shards, nums = np.unique(chosen // 100, return_counts=True)
    assert len(shards) == looking.MOST_SHARDS and nums.max() <= 4
    assert np.array_equal(sample_rows(rows[:7], rows[:7], 200, 0), rows[:7])


def test_a_dataset_without_a_good_sample_is_refused(tmp_path: Path) -> None:
    root = write_planted(tmp_path / "f", num_rows=8, bad=tuple(range(8)))
    with pytest.raises(InputError, match="no sample is good"):
        looked_at(root)


def test_effective_rank_of_equal_directions_is_their_number() -> None:
    assert_allclose(effective_rank(np.diag([2.0, 2.0, 2.0, 0.0])), 3)
    assert effective_rank(np.zeros((3, 3))) == 0


def test_too_few_vectors_explain_nothing_and_a_large_mean_costs_no_digits() -> None:
    x = np.random.default_rng(0).standard_normal((40, 3)) + 1e7
    pair = [Moments(6), Moments(6)]
    for side in (0, 1):
        pair[side].origin = pair[0].origin
        pair[side].add(np.concatenate([x[side::2], 2 * x[side::2] + 5], axis=1))
    assert_allclose(explained(*pair, 3), 1, atol=1e-5)
    small = Moments(6)
    small.add(np.concatenate([x[:5], x[:5]], axis=1))
    assert explained(small, pair[1], 3) is None


def test_cells_of_a_coarser_grid_are_means_also_where_it_does_not_divide() -> None:
    level = np.arange(2 * 4 * 6, dtype=np.float64).reshape(2, 4, 6)
    assert_allclose(pooled(level, (2, 3)), level.reshape(2, 2, 2, 3, 2).mean(axis=(2, 4)))
    assert_allclose(pooled(level, (3, 6))[:, 2], level[:, 2:4].mean(axis=1))
    assert pixel_features(np.zeros((4, 4, 3), np.uint8), (8, 8)).shape == (24, 8, 8)
