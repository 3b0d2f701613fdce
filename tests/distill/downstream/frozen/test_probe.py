"""Class probes: choice on the labelled images only, kNN and accuracy against scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

from dtpipe.distill.downstream.compare import run_probe
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor
from dtpipe.distill.downstream.frozen.knn import knn_votes, neighbours
from dtpipe.distill.downstream.frozen.probe import linear_probe, pooled_levels, stratified_folds
from dtpipe.distill.downstream.labelled import Draw, LabelledSet
from parts.labelled import all_images, with_classes


def colour_set(num: int, seed: int, num_classes: int = 3) -> LabelledSet:
    """Images of one noisy colour each; the class moves the red channel, the rest is noise."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % num_classes
    colours = rng.normal(128, 30, (num, 3))
    colours[:, 0] = 60 + 60 * labels + rng.normal(0, 18, num)
    pixels = colours[:, None, None] + rng.normal(0, 20, (num, 8, 8, 3))
    return with_classes(pixels.clip(0, 255).astype(np.uint8), [f"{seed}/{idx}" for idx in range(num)], labels)


def _encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
    scaled = images.permute(0, 3, 1, 2).float() / 255
    return {"l2": scaled[:, 1:], "l3": scaled}  # only l3 holds the red channel


COLOURS = FeatureExtractor("colours", _encode)


def test_probe_equals_scikit_learn_on_the_same_features() -> None:
    train, test = colour_set(90, 0), colour_set(200, 1)
    config = ProbeConfig(l2_grid=(1e-2,), max_iter=300)
    scores = linear_probe(COLOURS, train, test, [Draw(0, np.arange(90))], config)
    features = [
        pooled.astype(np.float64) for pooled in (all_images(part).mean(axis=(1, 2)) / 255 for part in (train, test))
    ]
    scaler = StandardScaler().fit(features[0])
    reference = LogisticRegression(C=1 / (1e-2 * 90), tol=1e-9, max_iter=5000).fit(
        scaler.transform(features[0]), train.read_classes()
    )
    accuracy = reference.score(scaler.transform(features[1]), test.read_classes())
    assert 0.6 < accuracy < 0.99
    by_level = {score.level: score for score in scores}
    assert by_level["l3"].value == pytest.approx(accuracy, abs=1.01 / 200)  # one image may lie on the boundary
    assert by_level["l2"].value < 0.5
    assert [score.level for score in scores if score.best] in (["l3"], ["all"])


def test_choices_do_not_look_at_the_held_out_images() -> None:
    train, test = colour_set(30, 0), colour_set(60, 1)
    scrambled = with_classes(all_images(test), test.keys, test.read_classes()[::-1])
    for task in ("probe", "knn"):
        first, second = (
            run_probe(task, [COLOURS], train, part, [12, None], [0, 1]).scores for part in (test, scrambled)
        )
        assert [(s.level, s.best, s.settings, s.selection) for s in first] == [
            (s.level, s.best, s.settings, s.selection) for s in second
        ]
        assert [s.value for s in first] != [s.value for s in second]


@pytest.mark.parametrize("k", [1, 7])
def test_votes_agree_with_scikit_learn(k: int) -> None:
    rng = np.random.default_rng(k)
    references, queries = rng.normal(size=(60, 5)), rng.normal(size=(40, 5))
    labels = rng.integers(0, 4, 60)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda distance: np.exp((1 - distance) / 0.07)
    )
    expected = theirs.fit(references, labels).predict_proba(queries)
    votes = knn_votes(
        *(torch.from_numpy(part) for part in (queries, references, labels)), num_classes=4, k=k, temperature=0.07
    )
    np.testing.assert_allclose((votes / votes.sum(dim=1, keepdim=True)).numpy(), expected, atol=1e-9)


def test_leave_one_out_agrees_with_a_loop() -> None:
    rng = np.random.default_rng(3)
    features, labels = rng.normal(size=(15, 4)), rng.integers(0, 3, 15)
    tensors = torch.from_numpy(features), torch.from_numpy(labels)
    votes = knn_votes(tensors[0], *tensors, num_classes=3, k=4, temperature=0.1, leave_one_out=True)
    for idx in range(15):
        rest = [other for other in range(15) if other != idx]
        alone = knn_votes(tensors[0][idx : idx + 1], tensors[0][rest], tensors[1][rest], 3, 4, 0.1)
        torch.testing.assert_close(votes[idx], alone[0])


def test_knn_finds_the_level_that_tells_classes_apart() -> None:
    result = run_probe("knn", [COLOURS], colour_set(60, 0), colour_set(90, 1), [30], [0, 1, 2])
    assert result.best("colours", 30).levels == {"l3": 3}
    assert result.best("colours", 30).mean > 0.55


@pytest.mark.parametrize("task", ["probe", "knn"])
def test_what_is_said_of_each_held_out_image_is_kept_and_has_the_headlines_scores(task: str, tmp_path: Path) -> None:
    """Six classes of which one occurs in the labelled images alone, so that the tables of both sets differ."""
    train, test = colour_set(60, 0, 6), colour_set(50, 1, 5)
    result = run_probe(task, [COLOURS], train, test, [30, None], [2, 3], None, None, tmp_path)
    (fixed,) = [score for score in result.scores if "folder" in score.settings]
    assert (fixed.level, fixed.num_labelled, fixed.seed, fixed.settings["folder"]) == ("fixed", 60, 2, "colours-60-2")
    folder = tmp_path / "colours-60-2" / "predictions"
    assert json.loads((folder / "keys.json").read_text())["keys"] == list(test.keys)
    likely = [json.loads((folder / f"{row:05d}.json").read_text())["classes"] for row in range(50)]
    truth = [str(number) for number in test.read_classes()]
    assert all(sum(of_image.values()) == pytest.approx(1, abs=0.05) for of_image in likely)  # five of six are kept
    right = np.array([max(of_image, key=of_image.__getitem__) for of_image in likely]) == truth
    assert fixed.value == right.mean()
    shares = {name: float(right[np.array(truth) == name].mean()) for name in "01234"}
    assert fixed.by_class == {"accuracy": {**shares, "5": None}}
    among = [name in of_image for name, of_image in zip(truth, likely, strict=True)]
    expected = {"accuracy of the mean class": np.mean(list(shares.values())), "top-5 accuracy": np.mean(among)}
    assert fixed.others == pytest.approx(expected, abs=1e-6)  # float32
    plain = run_probe(task, [COLOURS], train, test, [30, None], [2, 3])
    assert [score.value for score in plain.scores] == [score.value for score in result.scores]


def test_few_labels_let_fewer_neighbours_vote() -> None:
    assert neighbours(1000, 10, 20) == 20
    assert neighbours(50, 10, 20) == 5
    assert neighbours(10, 10, 20) == 1


def test_folds_spread_every_class() -> None:
    labels = np.array([0] * 7 + [1] * 5 + [2] * 6)
    folds = stratified_folds(labels, 3)
    assert folds is not None
    table = np.array([[np.sum((labels == label) & (folds == fold)) for fold in range(3)] for label in range(3)])
    assert (table.max(axis=1) - table.min(axis=1) <= 1).all()
    assert stratified_folds(np.arange(5), 3) is None


def test_one_image_per_class_falls_back_and_says_so() -> None:
    result = run_probe("probe", [COLOURS], colour_set(30, 0), colour_set(30, 1), [3], [0])
    assert [(score.level, score.selection) for score in result.scores if score.best] == [("all", None)]
    assert "3 labelled images are too few to choose" in result.to_table()


def test_flattened_and_mean_pooling() -> None:
    labelled = colour_set(4, 0)
    images = all_images(labelled)
    mean = pooled_levels(COLOURS, labelled, 3)
    flat = pooled_levels(FeatureExtractor("flat", _encode, pool="flatten"), labelled, 3)
    assert {name: tuple(level.shape) for name, level in mean.items()} == {"l2": (4, 2), "l3": (4, 3), "all": (4, 5)}
    np.testing.assert_allclose(mean["l3"].numpy(), images.mean(axis=(1, 2)) / 255, atol=1e-6)
    np.testing.assert_allclose(
        flat["l2"].numpy(), images[..., 1:].transpose(0, 3, 1, 2).reshape(4, -1) / np.float32(255), atol=1e-6
    )
