"""Scores of masks equal loops over pixels, on cases with absent classes, ignored pixels and empty images."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, jaccard_score

from dtpipe.distill.downstream.tuned.predictions import MaskPrediction
from dtpipe.distill.downstream.tuned.segmentation.metrics import DDPM_MIOU, FOREGROUND_AP, MIOU, MaskMetric
from dtpipe.manifests.errors import ConfigError, InputError, ShapeError
from dtpipe.manifests.labels import ClassTable, Mask

TWO = ClassTable(("background", "foreground"))


def scored(truths, predictions, num: int, headline: str = MIOU, ignore: int | None = 255):
    metric = MaskMetric(ClassTable.numbered(num), headline)
    for idx, (truth, predicted) in enumerate(zip(truths, predictions, strict=True)):
        metric.add(str(idx), MaskPrediction(np.asarray(predicted)), Mask(np.asarray(truth), ignore))
    return metric.scores()


def test_a_case_by_hand() -> None:
    """Class 2 occurs nowhere; class 3 is only predicted; two pixels are ignored, and class 3 is predicted on one."""
    truths = [[[0, 0, 1], [1, 1, 255]], [[0, 0, 0], [0, 0, 255]]]
    seen = [[[0, 1, 1], [1, 3, 3]], [[0, 0, 0], [0, 0, 0]]]
    scores = scored(truths, seen, 4)
    ious = {"0": 6 / 7, "1": 2 / 4, "3": 0 / 1}
    assert scores.value == pytest.approx(sum(ious.values()) / 3)
    assert scores.by_class["IoU"] == pytest.approx({**ious, "2": None})
    assert scores.others["pixel accuracy"] == pytest.approx(8 / 10)
    by_ddpm = (6 / 8 + 2 / 4 + 0 + 0 / 2) / 4  # the ignored pixels count in unions, absent classes as 0
    assert scores.others[DDPM_MIOU] == pytest.approx(by_ddpm, abs=1e-7)
    assert scored(truths, seen, 4, DDPM_MIOU).value == pytest.approx(by_ddpm, abs=1e-7)
    assert MIOU in scored(truths, seen, 4, DDPM_MIOU).others


def test_the_other_rule_is_left_out_where_the_masks_give_both_the_same() -> None:
    """Whatever is predicted, so that all arms of a table have the same scores."""
    everywhere, seen = [[[0, 1], [2, 2]]], [[[1, 1], [0, 1]]]
    scores = scored(everywhere, seen, 3)
    assert DDPM_MIOU not in scores.others
    assert scored(everywhere, seen, 3, DDPM_MIOU).value == pytest.approx(scores.value, abs=1e-6)
    assert DDPM_MIOU in scored([[[0, 1], [2, 255]]], seen, 3).others
    assert DDPM_MIOU in scored([[[0, 1], [1, 1]]], seen, 3).others


def ddpm_by_loops(truths, predictions, num: int, ignore: int) -> float:
    """compute_iou of ddpm-segmentation, said in loops: sums over images, then the mean over all but the ignored."""
    ious = []
    for number in range(num):
        if number == ignore:
            continue
        hits = sum(int(((t == number) & (p == number)).sum()) for t, p in zip(truths, predictions, strict=True))
        union = sum(int(((t == number) | (p == number)).sum()) for t, p in zip(truths, predictions, strict=True))
        ious.append(hits / (1e-8 + union))
    return sum(ious) / len(ious)


@pytest.mark.parametrize("ignore", [255, 0])
def test_random_masks_agree_with_loops_and_scikit_learn(ignore) -> None:
    """With 0 ignored, as in bedroom-28, that class is in no mean, though it may be predicted."""
    rng = np.random.default_rng(0)
    truths = [rng.choice([0, 1, 2, 4, 255 if ignore else 0], (9, 7)) for _ in range(4)]
    truths[1][:] = ignore  # an image in which nothing is known
    seen = [rng.integers(0, 5, (9, 7)) for _ in range(4)]
    scores = scored(truths, seen, 6, ignore=ignore)
    assert scores.others[DDPM_MIOU] == pytest.approx(ddpm_by_loops(truths, seen, 6, ignore), rel=1e-9)
    truth, predicted = np.concatenate(truths).ravel(), np.concatenate(seen).ravel()
    known = truth != ignore
    labels = [number for number in np.unique([*truth[known], *predicted[known]]) if number != ignore]
    expected = jaccard_score(truth[known], predicted[known], labels=labels, average=None)
    assert scores.value == pytest.approx(expected.mean(), rel=1e-6)  # torchmetrics counts in float32
    table = {name: iou for name, iou in scores.by_class["IoU"].items() if iou is not None}
    assert table == pytest.approx(dict(zip(map(str, labels), expected, strict=True)), rel=1e-6)


def foregrounds(num: int, seed: int = 0):
    """Truths with ignored pixels, and probabilities near 0 and 1, as of a trained network."""
    rng = np.random.default_rng(seed)
    for _ in range(num):
        truth = rng.choice([0, 0, 0, 1, 255], (40, 30))
        logits = rng.normal(size=truth.shape) * 3 + 5 * (truth == 1) - 4
        yield truth, (1 / (1 + np.exp(-logits))).astype(np.float32)


def test_average_precision_of_the_foreground_agrees_with_scikit_learn() -> None:
    """Within 3e-4: probabilities lie in bins of 1/256 in the logit, inside which no order is known."""
    metric, pairs = MaskMetric(TWO), list(foregrounds(5))
    for truth, probability in pairs:
        metric.add("a", MaskPrediction((probability > 0.5).astype(np.uint8), probability), Mask(truth))
    truth, probability = (np.concatenate(parts).ravel() for parts in zip(*pairs, strict=True))
    known = truth != 255
    scores = metric.scores()
    expected = average_precision_score(truth[known], probability[known])
    assert 0.5 < expected < 0.95
    assert scores.others[FOREGROUND_AP] == pytest.approx(expected, abs=3e-4)
    iou = jaccard_score(truth[known], probability[known] > 0.5)
    assert scores.others["foreground IoU"] == pytest.approx(iou, rel=1e-6)


def test_without_foreground_there_is_no_average_precision() -> None:
    metric = MaskMetric(TWO)
    nothing = np.zeros((3, 3), np.uint8)
    metric.add("a", MaskPrediction(nothing, np.full((3, 3), 0.1, np.float32)), Mask(nothing))
    scores = metric.scores()
    assert scores.value == 1.0  # of the background alone: torchmetrics leaves out what is neither there nor predicted
    assert FOREGROUND_AP not in scores.others
    assert scores.by_class["IoU"] == {"background": 1.0, "foreground": None}


def test_counts_of_ranks_are_joined_through_pickles() -> None:
    pairs = list(foregrounds(4))
    whole, parts = MaskMetric(TWO), [MaskMetric(TWO), MaskMetric(TWO)]
    for idx, (truth, probability) in enumerate(pairs):
        for metric in (whole, parts[idx % 2]):
            metric.add(str(idx), MaskPrediction((probability > 0.5).astype(np.uint8), probability), Mask(truth))
    first, second = (pickle.loads(pickle.dumps(part)) for part in parts)
    first.merge(second)
    assert first.scores() == whole.scores()


def test_what_cannot_be_scored_is_refused() -> None:
    metric = MaskMetric(TWO)
    with pytest.raises(ShapeError, match=r"^c: the mask is \(2, 2\) px, what was seen \(2, 3\) px"):
        metric.add("c", MaskPrediction(np.zeros((2, 3), np.uint8)), Mask(np.zeros((2, 2), np.uint8)))
    with pytest.raises(InputError, match="holds class 7, and there are 2 classes"):
        metric.add("c", MaskPrediction(np.zeros((1, 1), np.uint8)), Mask(np.full((1, 1), 7)))
    metric.add("c", MaskPrediction(np.zeros((1, 1), np.uint8)), Mask(np.full((1, 1), 255)))
    with pytest.raises(ConfigError, match="no pixel of the held-out masks counts"):
        metric.scores()
