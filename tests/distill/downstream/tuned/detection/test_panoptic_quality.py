"""Panoptic quality by hand where its paper and torchmetrics differ, and by torchmetrics where they agree."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
import torch
from torchmetrics.functional.detection import panoptic_quality

from dtpipe.distill.downstream.tuned.detection.panoptic_quality import PanopticScores, match_segments
from dtpipe.distill.downstream.tuned.predictions import PanopticPrediction
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Panoptic

TABLE = ClassTable(("sky", "cat", "road", "dog", "never"), frozenset({1, 3, 4}))


def strips(lengths: list[tuple[int, int]]) -> np.ndarray:
    """(1, W) segments of so many pixels each: (id, pixels)."""
    return np.repeat([segment for segment, _ in lengths], [pixels for _, pixels in lengths])[None].astype(np.int32)


def random_map(seed: int) -> tuple[np.ndarray, dict[int, int]]:
    """Blocks of 4 px, one segment per class of stuff and several of things; all pixels say something."""
    rng = np.random.default_rng(seed)
    blocks = rng.choice([1, 2, 11, 12, 31], (5, 6), p=[0.3, 0.2, 0.2, 0.1, 0.2])
    segments = np.kron(blocks, np.ones((4, 4), int)).astype(np.int32)
    classes = {1: 0, 2: 2, 11: 1, 12: 1, 31: 3}
    return segments, {number: classes[number] for number in np.unique(segments).tolist()}


def perturbed(segments: np.ndarray, seed: int) -> np.ndarray:
    """Some pixels of the right, some rows of a neighbour."""
    rng = np.random.default_rng(seed)
    moved = np.where(rng.random(segments.shape) < 0.2, np.roll(segments, 4, axis=1), segments)
    return np.where(rng.random((5, 6)).repeat(4, 0).repeat(4, 1) < 0.2, np.roll(segments, 8, axis=0), moved)


def coloured(segments: np.ndarray, classes: dict[int, int]) -> np.ndarray:
    """Class and id of each pixel, as torchmetrics takes them; 99 is neither thing nor stuff. Shapes: -> (H, W, 2)."""
    return np.stack([np.vectorize(lambda segment: classes.get(segment, 99))(segments), segments], axis=-1)


def test_where_everything_is_said_and_nobody_is_a_crowd_it_equals_torchmetrics() -> None:
    """Within 1e-7, since torchmetrics divides in float32."""
    scores, maps = PanopticScores(TABLE), []
    for seed in range(8):
        segments, classes = random_map(seed)
        said = perturbed(segments, seed)
        truth = segments.copy()
        truth[:3, : 2 * seed] = 0  # nothing is known there
        scores.add(str(seed), PanopticPrediction(said, classes), Panoptic(truth, classes))
        maps.append([coloured(said, classes), coloured(truth, classes)])
    pair = [torch.tensor(np.stack(side)) for side in zip(*maps, strict=True)]
    settings = {"things": {1, 3, 4}, "stuffs": {0, 2}, "allow_unknown_preds_category": True, "return_sq_and_rq": True}
    found = scores.scores()
    overall = panoptic_quality(*pair, **settings).tolist()
    assert [found.value, found.others["SQ"], found.others["RQ"]] == pytest.approx(overall, abs=1e-7)
    by_class = panoptic_quality(*pair, **settings, return_per_class=True)
    order = [1, 3, 4, 0, 2]  # torchmetrics' own
    for name, column in zip(("PQ", "SQ", "RQ"), by_class.T, strict=True):
        values = [found.by_class[name][TABLE.names[number]] or 0.0 for number in order]
        assert values == pytest.approx(column.tolist(), abs=1e-7)
    assert 0.1 < found.value < 0.9
    things = [found.by_class["PQ"][name] for name in ("cat", "dog")]
    assert found.others["PQ things"] == pytest.approx(np.mean(things)) and found.by_class["PQ"]["never"] is None


def test_pixels_without_truth_leave_the_union_and_segments_mostly_there_are_not_counted() -> None:
    """By hand. A cat of 10 px; predicted 8 of them and 6 where nothing is known: 8 of 10, not 8 of 16."""
    truth = Panoptic(strips([(7, 10), (0, 6), (0, 4), (1, 4)]), {7: 1, 1: 0})
    said = PanopticPrediction(strips([(0, 2), (5, 8), (5, 6), (6, 4), (2, 4)]), {5: 1, 6: 1, 2: 0})
    counts = match_segments(said, truth, 5)
    assert counts[1].tolist() == [0.8, 1, 0, 0]  # segment 6 lies where nothing is known
    assert counts[0].tolist() == [1, 1, 0, 0]
    half = PanopticPrediction(strips([(5, 10), (6, 10), (2, 4)]), {5: 1, 6: 3, 2: 0})
    assert match_segments(half, truth, 5)[3].tolist() == [0, 0, 0, 0]
    edge = Panoptic(strips([(7, 5), (0, 5)]), {7: 0})
    assert match_segments(PanopticPrediction(strips([(5, 10)]), {5: 1}), edge, 5)[1].tolist() == [0, 0, 1, 0]


def test_crowds_are_never_missed_and_forgive_predictions_of_their_class_alone() -> None:
    truth = Panoptic(strips([(3, 12), (4, 8)]), {3: 1, 4: 0}, crowd=frozenset({3}))
    same = PanopticPrediction(strips([(5, 6), (6, 6), (7, 8)]), {5: 1, 6: 1, 7: 0})
    assert match_segments(same, truth, 5)[:2].tolist() == [[1, 1, 0, 0], [0, 0, 0, 0]]
    other = PanopticPrediction(strips([(5, 12), (7, 8)]), {5: 3, 7: 0})
    assert match_segments(other, truth, 5)[3].tolist() == [0, 0, 1, 0]


def test_pixels_without_a_prediction_forgive_nothing() -> None:
    """torchmetrics takes them out of the union, and does not count a true segment that is mostly left empty."""
    truth = Panoptic(strips([(3, 10), (4, 10)]), {3: 1, 4: 0})
    said = PanopticPrediction(strips([(0, 4), (5, 6), (0, 8), (6, 2)]), {5: 1, 6: 0})
    counts = match_segments(said, truth, 5)
    assert counts[1].tolist() == [0.6, 1, 0, 0] and counts[0].tolist() == [0, 0, 1, 1]
    pair = [torch.tensor(coloured(side.segments, dict(side.classes)))[None] for side in (said, truth)]
    settings = {"things": {1}, "stuffs": {0}, "allow_unknown_preds_category": True, "return_per_class": True}
    assert panoptic_quality(*pair, **settings)[0].tolist() == [1.0, 1.0]  # not 0.6 and 0


def test_a_perfect_map_scores_one_and_empty_ones_count_as_missed() -> None:
    segments, classes = random_map(1)
    scores = PanopticScores(TABLE)
    scores.add("a", PanopticPrediction(segments, classes), Panoptic(segments, classes))
    assert scores.scores().value == 1.0
    scores.add("b", PanopticPrediction(np.zeros_like(segments), {}), Panoptic(segments, classes))
    assert scores.scores().value == pytest.approx(2 / 3) and scores.scores().others["SQ"] == 1.0


def test_ranks_join_their_images_and_one_seen_twice_counts_once() -> None:
    whole, parts = PanopticScores(TABLE), [PanopticScores(TABLE), PanopticScores(TABLE)]
    for seed in range(5):
        segments, classes = random_map(seed)
        pair = PanopticPrediction(perturbed(segments, seed), classes), Panoptic(segments, classes)
        for scores in (whole, *(part for idx, part in enumerate(parts) if seed in ((0, 1, 2), (2, 3, 4))[idx])):
            scores.add(str(seed), *pair)
    joined = pickle.loads(pickle.dumps(parts[1]))
    joined.merge(parts[0])
    assert joined.scores() == whole.scores()


def test_images_without_known_segments_are_refused() -> None:
    scores = PanopticScores(TABLE)
    scores.add("a", PanopticPrediction(strips([(5, 9)]), {5: 1}), Panoptic(strips([(0, 9)]), {}))
    with pytest.raises(InputError, match="of 1 held-out image, none holds a segment that counts"):
        scores.scores()
