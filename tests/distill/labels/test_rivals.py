"""The rivals of the interpreter: pixel features as torch makes them, the published network and vote, the linear fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from dtpipe.distill.downstream.frozen.readout import masks_at_stride
from dtpipe.distill.labels.arms import score_arm
from dtpipe.distill.labels.ensemble import (
    LabelledPixels,
    ensemble_seconds,
    fit_ensemble,
    fit_pixels,
    majority_vote,
    pixel_classifier,
)
from dtpipe.distill.labels.linear import fit_linear, majority
from dtpipe.distill.labels.pixels import features_at
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Mask
from parts.interpreted import interpreted, interpreter_config

CPU = torch.device("cpu")


def test_features_of_pixels_are_those_of_levels_enlarged_by_torch() -> None:
    levels = {"l3": torch.randn(2, 3, 2, 3), "l2": torch.randn(2, 4, 4, 6), "l1": torch.randn(2, 1, 10, 15)}
    size = (10, 15)
    whole = torch.cat(
        [F.interpolate(levels[name], size=size, mode="bilinear", align_corners=False) for name in sorted(levels)], dim=1
    )
    images, pixels = (values.flatten() for values in torch.meshgrid(torch.arange(2), torch.arange(150), indexing="ij"))
    expected = whole.flatten(2).permute(0, 2, 1).reshape(300, 8)
    torch.testing.assert_close(features_at(levels, images, pixels, size), expected, rtol=1e-5, atol=1e-5)


def test_a_pixel_classifier_is_the_published_network() -> None:
    few, many = pixel_classifier(50, 29), pixel_classifier(50, 30)
    assert [layer.out_features for layer in few if isinstance(layer, nn.Linear)] == [128, 32, 29]
    assert [layer.out_features for layer in many if isinstance(layer, nn.Linear)] == [256, 128, 30]
    kinds = [nn.Linear, nn.ReLU, nn.BatchNorm1d] * 2 + [nn.Linear]
    assert [type(layer) for layer in few] == kinds
    assert float(many[0].weight.detach().std()) == pytest.approx(0.02, rel=0.05) and not many[0].bias.any()  # type: ignore[operator,union-attr,arg-type]


def test_most_votes_win_and_of_equals_the_lower_class() -> None:
    votes = torch.tensor([[2, 1, 0], [2, 1, 3], [0, 2, 3], [2, 2, 0]])
    assert majority_vote(votes).tolist() == [2, 1, 0]


def test_training_ends_51_steps_after_the_last_lower_loss_past_the_fourth_epoch(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With weights that never change all losses of equal batches are equal: one is lowest, and 51 are not lower."""
    steps = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda _self: steps.append(1))
    levels, some = {"l2": torch.ones(1, 2, 1, 1)}, torch.zeros(128, dtype=torch.int64)
    data = LabelledPixels(levels, (1, 1), some, some, some)
    fit_pixels(data, 2, num_epochs=100, seed=0)
    assert len(steps) == 4 * 2 + 1 + 51
    steps.clear()
    fit_pixels(data, 2, num_epochs=3, seed=0)
    assert len(steps) == 6


@pytest.mark.parametrize(("num", "steps"), [(100, 2), (129, 2), (130, 3)])
def test_the_last_batch_of_an_epoch_may_be_smaller_but_for_one_pixel(
    num: int, steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in ddpm-segmentation, whose loader keeps it; a batch of one is an error there."""
    taken = []
    monkeypatch.setattr(torch.optim.Adam, "step", lambda _self: taken.append(1))
    some = torch.zeros(num, dtype=torch.int64)
    fit_pixels(LabelledPixels({"l2": torch.ones(1, 2, 1, 1)}, (1, 1), some, some, some), 2, num_epochs=1, seed=0)
    assert len(taken) == steps


def test_the_time_of_the_ensemble_lies_between_its_first_stop_and_its_last_epoch(tmp_path: Path) -> None:
    """Six masks of 240 pixels that count are 23 batches: 4 epochs of them and 52 steps, or all 100 epochs."""
    least, most = ensemble_seconds(interpreter_config(tmp_path).rivals, interpreted(6, 0), 0, CPU)
    assert least > 0 and most / least == pytest.approx(100 * 23 / (4 * 23 + 52))
    few = interpreter_config(tmp_path, rivals={"pixel_epochs": 3}).rivals
    least, most = ensemble_seconds(few, interpreted(6, 0), 0, CPU)
    assert least == most


def test_the_ensemble_learns_and_its_members_differ(tmp_path: Path) -> None:
    train, test = interpreted(6, 0), interpreted(6, 1)
    config = interpreter_config(tmp_path, rivals={"pixel_models": 3, "pixel_epochs": 2}).rivals
    score = score_arm("pixels", fit_ensemble(config, train, 0, CPU), test, CPU, 1)
    assert score.value > 0.6, score
    assert "foreground AP" in score.others and score.drawn[0].numbers.shape == (16, 16)  # type: ignore[union-attr]
    again = score_arm("pixels", fit_ensemble(config, train, 0, CPU), test, CPU, 1)
    assert again.value == score.value
    assert fit_ensemble(config, train, 1, CPU) is not None
    empty = interpreter_config(tmp_path, rivals={"max_pixels": 1}).rivals
    with pytest.raises(ConfigError, match="fewer than two pixels"):
        fit_ensemble(empty, train, 0, CPU)


def test_a_linear_read_out_has_the_answers_of_scikit_learn(tmp_path: Path) -> None:
    """Of classes, on the same standardised means. Of two classes scikit-learn has one weight, their difference, whose
    square is twice that of both: its C is twice ours."""
    train, test = interpreted(20, 0, classes=True), interpreted(10, 1, classes=True)
    config = interpreter_config(tmp_path, rivals={"l2_grid": [0.1]}).rivals
    predict = fit_linear(config, train, 0, CPU)

    def pooled(data: object, row: int) -> np.ndarray:
        levels = data.read(row, 0, False)  # type: ignore[attr-defined]
        return torch.cat([levels[name].mean(dim=(1, 2)) for name in ("l2", "l3")]).numpy()

    features = np.stack([pooled(train, row) for row in range(20)])
    mean, std = features.mean(axis=0), features.std(axis=0)
    reference = LogisticRegression(C=2 / (0.1 * 20), tol=1e-8, max_iter=1000)
    reference.fit((features - mean) / std, np.arange(20) % 2)
    for row in range(10):
        levels = {name: level[None] for name, level in test.read(row, 0, False).items()}
        expected = reference.predict_proba(((pooled(test, row) - mean) / std)[None])[0]
        np.testing.assert_allclose(predict(levels, (1, 1)).probabilities, expected, atol=2e-3)


def test_a_linear_read_out_of_masks_chooses_its_regularisation_and_learns(tmp_path: Path) -> None:
    train, test = interpreted(8, 0), interpreted(6, 1)
    config = interpreter_config(tmp_path).rivals
    score = score_arm("linear", fit_linear(config, train, 0, CPU), test, CPU, 0)
    assert score.value > 0.7, score
    one = fit_linear(config, interpreted(1, 0), 0, CPU)
    assert score_arm("linear", one, test, CPU, 0).value > 0.3


def test_a_linear_read_out_learns_from_the_cells_that_count_and_refuses_none(tmp_path: Path) -> None:
    """With room for one cell an image, an ignored one is never the one that is drawn."""
    train = interpreted(8, 0)
    config = interpreter_config(tmp_path, rivals={"max_cells": 8, "l2_grid": [0.1]}).rivals
    one_cell = replace(train, labelled=train.labelled.changed(only_the_first_cell))
    assert score_arm("linear", fit_linear(config, one_cell, 0, CPU), train, CPU, 0).value > 0
    nothing = replace(train, labelled=train.labelled.changed(ignored))
    with pytest.raises(ConfigError, match="every cell of the labelled masks is mostly ignored"):
        fit_linear(config, nothing, 0, CPU)


def only_the_first_cell(target: Mask) -> Mask:
    numbers = np.full_like(target.numbers, 255)
    numbers[:4, :4] = target.numbers[:4, :4]
    return Mask(numbers)


def ignored(target: Mask) -> Mask:
    return Mask(np.full_like(target.numbers, 255))


def test_a_cell_has_the_class_that_the_read_out_of_eval_gives_it() -> None:
    masks = torch.randint(-1, 3, (4, 8, 8), generator=torch.Generator().manual_seed(0))
    expected = masks_at_stride(masks, 4, 3)
    assert torch.equal(torch.stack([majority(mask, (2, 2), 3) for mask in masks]), expected)
