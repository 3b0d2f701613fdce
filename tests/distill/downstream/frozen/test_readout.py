"""Dense read-out: masks and IoU by hand, features against whole upsampling, scores against scikit-learn."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler

from dtpipe.distill.downstream.compare import run_probe
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor
from dtpipe.distill.downstream.frozen.readout import (
    Readout,
    at_grid,
    confusion_matrix,
    dense_readout,
    draw_cells,
    iou_by_class,
    iou_score,
    masks_at_stride,
)
from dtpipe.distill.downstream.frozen.shown import MOST_KEPT
from dtpipe.distill.downstream.labelled import IGNORE, Draw, LabelledSet
from dtpipe.manifests.errors import ConfigError, ShapeError
from parts.labelled import all_images, all_masks, with_masks


def square_set(num: int, seed: int, num_classes: int = 2, px: int = 32) -> LabelledSet:
    """Grey noise with one 12 px square per image, whose colour is its class's; noise makes single pixels ambiguous."""
    rng = np.random.default_rng(seed)
    pixels = rng.normal(110, 25, (num, px, px, 3))
    masks = np.zeros((num, px, px), np.uint8)
    for idx in range(num):
        top, left = rng.integers(0, px - 12, 2)
        value = 1 + idx % (num_classes - 1)
        masks[idx, top : top + 12, left : left + 12] = value
        pixels[idx, top : top + 12, left : left + 12, value - 1] += 25
    return with_masks(pixels.clip(0, 255).astype(np.uint8), [f"{seed}/{idx}" for idx in range(num)], masks)


def _encode(images: torch.Tensor) -> dict[str, torch.Tensor]:
    scaled = images.permute(0, 3, 1, 2).float() / 255
    return {"l1": F.avg_pool2d(scaled, 2), "l2": F.avg_pool2d(scaled, 4), "l3": F.avg_pool2d(scaled, 8)}


PYRAMID = FeatureExtractor("pyramid", _encode)


def test_cells_take_the_majority_and_ignored_pixels() -> None:
    mask = torch.tensor([[[0, 0, 2, 2], [1, 0, 2, 1], [IGNORE, IGNORE, 1, 1], [IGNORE, 1, 0, 0]]])
    expected = torch.tensor([[[0, 2], [IGNORE, 0]]])  # the tie of 0 and 1 goes to 0
    assert torch.equal(masks_at_stride(mask, 2, 3), expected)
    with pytest.raises(ShapeError, match="stride 3 does not divide"):
        masks_at_stride(mask, 3, 3)


def test_iou_by_hand() -> None:
    truth = torch.tensor([0, 0, 0, 1, 1, 1, 1, IGNORE])
    predicted = torch.tensor([0, 1, 0, 1, 1, 0, 0, 1])
    confusion = confusion_matrix(truth, predicted, 2)
    assert confusion.tolist() == [[2, 1], [2, 2]]
    assert iou_by_class(confusion).tolist() == [
        2 / 5,
        2 / 5,
    ]  # background: 2 of {0,1,2,5,6}; foreground: 2 of {1,3,4,5,6}
    assert iou_score(confusion) == pytest.approx(0.4)


def test_mean_iou_leaves_out_absent_classes_only() -> None:
    truth, predicted = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 1, 3])
    ious = iou_by_class(confusion_matrix(truth, predicted, 4))
    assert ious[:2].tolist() == [1.0, 0.5] and ious[2].isnan() and ious[3] == 0  # 2 is nowhere, 3 is predicted wrongly
    assert iou_score(confusion_matrix(truth, predicted, 4)) == pytest.approx(0.5)


def test_iou_agrees_with_sets_of_random_masks() -> None:
    rng = np.random.default_rng(0)
    truth, predicted = rng.integers(0, 3, (2, 6, 9, 9))
    ious = iou_by_class(confusion_matrix(torch.from_numpy(truth), torch.from_numpy(predicted), 3))
    for label in range(3):
        inside, claimed = set(np.flatnonzero(truth == label)), set(np.flatnonzero(predicted == label))
        assert ious[label] == pytest.approx(len(inside & claimed) / len(inside | claimed))


def test_classifying_before_or_after_the_resize_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    levels = {"l1": torch.randn(2, 3, 16, 16, generator=generator), "l4": torch.randn(2, 5, 2, 2, generator=generator)}
    weights = {"l1": torch.randn(4, 3, generator=generator), "l4": torch.randn(4, 5, generator=generator)}
    bias = torch.randn(4, generator=generator)
    stacked = torch.cat([at_grid(level, (8, 8)) for level in levels.values()], dim=1)  # (2, 8, 8, 8)
    logits = torch.einsum("kc,bchw->bkhw", torch.cat(list(weights.values()), dim=1), stacked) + bias[:, None, None]
    assert torch.allclose(
        Readout(weights, bias).logits(levels, (8, 8)), logits, atol=1e-5
    )  # float32, sums in two orders


def test_drawn_cells_match_whole_levels_and_stay_within_the_limit() -> None:
    labelled = square_set(6, 0)
    whole = draw_cells(PYRAMID, labelled, 2, 0, ProbeConfig(batch_size=4))
    assert len(whole.targets) == 6 * 64
    levels = PYRAMID(torch.from_numpy(all_images(labelled)))
    for name in ("l1", "l3"):
        expected = at_grid(levels[name], (8, 8)).flatten(2).permute(0, 2, 1).reshape(-1, 3)
        torch.testing.assert_close(whole.features[name].sort(dim=0).values, expected.sort(dim=0).values)
    few = draw_cells(PYRAMID, labelled, 2, 0, ProbeConfig(max_cells=60))
    assert len(few.targets) == 60
    assert torch.bincount(few.image_idx).tolist() == [10] * 6
    assert not torch.equal(
        few.features["l2"], draw_cells(PYRAMID, labelled, 2, 1, ProbeConfig(max_cells=60)).features["l2"]
    )


@pytest.mark.parametrize("num_classes", [2, 3])
def test_readout_equals_scikit_learn_on_whole_features(num_classes: int) -> None:
    train, test = square_set(10, 0, num_classes), square_set(20, 1, num_classes)
    scores = dense_readout(PYRAMID, train, test, [Draw(0, np.arange(10))], ProbeConfig(l2_grid=(1e-3,), max_iter=300))
    features, targets = [], []
    for part in (train, test):
        levels = PYRAMID(torch.from_numpy(all_images(part)))
        stacked = torch.cat([at_grid(level, (8, 8)) for level in levels.values()], dim=1)
        features.append(stacked.permute(0, 2, 3, 1).reshape(-1, 9).double().numpy())
        targets.append(masks_at_stride(torch.from_numpy(all_masks(part)), 4, num_classes).flatten().numpy())
    scaler = StandardScaler().fit(features[0])
    penalty = 1e-3 * len(targets[0]) * (0.5 if num_classes == 2 else 1)
    reference = LogisticRegression(C=1 / penalty, tol=1e-9, max_iter=5000).fit(
        scaler.transform(features[0]), targets[0]
    )
    predicted = reference.predict(scaler.transform(features[1]))
    ious = [
        np.sum((predicted == k) & (targets[1] == k)) / np.sum((predicted == k) | (targets[1] == k))
        for k in range(num_classes)
    ]
    expected = ious[1] if num_classes == 2 else np.mean(ious)
    assert 0.1 < expected < 0.95
    value = next(score.value for score in scores if score.level == "all")
    assert value == pytest.approx(expected, abs=0.01)  # a few of 1280 cells lie on the boundary


def test_choices_come_from_the_labelled_images_alone() -> None:
    train, test = square_set(12, 0), square_set(8, 1)
    inverted = with_masks(all_images(test), test.keys, 1 - all_masks(test))
    first, second = (run_probe("readout", [PYRAMID], train, part, [4, 12], [0, 1]).scores for part in (test, inverted))
    assert [(s.level, s.best, s.selection, s.settings["l2"]) for s in first] == [
        (s.level, s.best, s.selection, s.settings["l2"]) for s in second
    ]
    assert all(ours.value != theirs.value for ours, theirs in zip(first, second, strict=True))


def test_run_is_equal_every_time() -> None:
    runs = [run_probe("readout", [PYRAMID], square_set(6, 0), square_set(6, 1), [3], [0]).to_json() for _ in range(2)]
    assert runs[0] == runs[1]


def test_masks_of_the_headline_are_kept_of_one_draw_and_have_its_score(tmp_path: Path) -> None:
    """Of most labelled images and the first seed; at stride 2, where cells and pixels have one score by hand."""
    train, test = square_set(8, 0), square_set(6, 1)
    config = ProbeConfig(stride=2, max_iter=20, batch_size=4)
    stale = tmp_path / "pyramid-8-3" / "predictions" / "00009.png"
    stale.parent.mkdir(parents=True)
    stale.touch()
    kept = run_probe(
        "readout", [PYRAMID, replace(PYRAMID, name="a/b")], train, test, [4, 8], [3, 1], config, None, tmp_path
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-b-8-3", "pyramid-8-3"]
    named = [score for score in kept.scores if "folder" in score.settings]
    assert [(one.extractor, one.level, one.num_labelled, one.seed, one.settings["folder"]) for one in named] == [
        ("pyramid", "fixed", 8, 3, "pyramid-8-3"),
        ("a/b", "fixed", 8, 3, "a-b-8-3"),
    ]
    folder = stale.parent
    assert json.loads((folder / "keys.json").read_text())["keys"] == list(test.keys)
    assert sorted(path.name for path in folder.glob("*.png")) == [f"{idx:05d}.png" for idx in range(6)]
    masks = torch.from_numpy(np.stack([np.asarray(Image.open(folder / f"{idx:05d}.png")) for idx in range(6)])).long()
    assert masks.shape == (6, 32, 32)
    cells = masks[:, ::2, ::2]
    assert torch.equal(cells.repeat_interleave(2, dim=1).repeat_interleave(2, dim=2), masks)
    truth = masks_at_stride(torch.from_numpy(all_masks(test)), 2, 2)
    assert iou_score(confusion_matrix(truth, cells, 2)) == named[0].value
    plain = run_probe("readout", [PYRAMID], train, test, [4, 8], [3, 1], config)
    assert [one.value for one in plain.scores] == [one.value for one in kept.scores if one.extractor == "pyramid"]


def test_masks_of_many_held_out_images_are_kept_at_equal_steps(tmp_path: Path) -> None:
    test = square_set(MOST_KEPT * 2 + 9, 1, px=16)
    config = ProbeConfig(max_iter=2, l2_grid=(0.1,))
    run_probe("readout", [PYRAMID], square_set(4, 0, px=16), test, [None], [0], config, None, tmp_path)
    folder = tmp_path / "pyramid-4-0" / "predictions"
    rows = [test.keys.index(key) for key in json.loads((folder / "keys.json").read_text())["keys"]]
    assert len(rows) == len(list(folder.glob("*.png"))) == MOST_KEPT
    assert (rows[0], rows[-1]) == (0, len(test) - 1) and set(np.diff(rows)) == {2, 3}


@pytest.mark.parametrize("value", [0, 1])
def test_masks_of_one_class_are_refused(value: int) -> None:
    images, masks = all_images(square_set(4, 0)), np.full((4, 32, 32), value, np.uint8)
    empty, other = (with_masks(images, keys, masks) for keys in ("1234", "abcd"))
    with pytest.raises(ConfigError, match=f"all labelled masks hold pixels of one class, '{value}'"):
        run_probe("readout", [PYRAMID], empty, other, [2], [0])


def test_masks_of_another_size_than_their_images_are_refused() -> None:
    small = with_masks(all_images(square_set(4, 0)), "1234", np.eye(16, dtype=np.uint8)[None].repeat(4, 0))
    with pytest.raises(ShapeError, match=r"masks are \(16, 16\), images \(32, 32\)"):
        run_probe("readout", [PYRAMID], small, square_set(4, 1), [2], [0])


def test_ignored_pixels_are_not_learned_from_whatever_their_value() -> None:
    labelled = square_set(8, 0)
    cells = []
    for value in (255, 9):
        masks = all_masks(labelled).astype(np.uint8)
        masks[:, :, 16:] = value
        part = with_masks(all_images(labelled), labelled.keys, masks, ignore=value)
        cells.append(draw_cells(PYRAMID, part, 2, 0, ProbeConfig()))
    assert len(cells[0].targets) == 8 * 32  # the left half of 64 cells
    assert set(cells[0].targets.tolist()) == {0, 1}
    assert torch.equal(cells[0].targets, cells[1].targets)
    assert torch.equal(cells[0].features["l2"], cells[1].features["l2"])
    few = draw_cells(PYRAMID, part, 2, 0, ProbeConfig(max_cells=8))
    assert len(few.targets) == 8  # one of each image, of those that count
    nothing = with_masks(all_images(labelled), labelled.keys, np.full_like(masks, 9), ignore=9)
    with pytest.raises(ConfigError, match="every cell of 8 labelled masks is mostly ignored"):
        draw_cells(PYRAMID, nothing, 2, 0, ProbeConfig())
