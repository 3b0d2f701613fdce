"""The supervised baseline learns what labels say, from them alone, the same way every time."""

from __future__ import annotations

import os
import signal

import numpy as np
import pytest
import torch

from dtpipe.distill.downstream.compare import run_probe
from dtpipe.distill.downstream.config import SupervisedConfig
from dtpipe.distill.downstream.extractors import raw_pixels
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.result import ProbeResult
from dtpipe.distill.downstream.tuned.supervised import (
    SupervisedTraining,
    draw_steps,
    flip_both,
    run_supervised,
    train_supervised,
)
from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.student.student import StudentSpec
from dtpipe.manifests.errors import PlanChangedError
from parts.labelled import all_images, with_classes, with_masks
from parts.ranks import fork_ranks

SPEC = StudentSpec("test_resnet", 4, (32, 32))


def bright_halves(num: int, seed: int, masked: bool = False) -> LabelledSet:
    """Noise with one bright half, upper (class 0) or lower (class 1); or with masks of the bright half."""
    rng = np.random.default_rng(seed)
    labels = np.arange(num) % 2
    pixels = rng.integers(0, 100, (num, 32, 32, 3))
    masks = np.zeros((num, 32, 32), np.uint8)
    for idx, label in enumerate(labels):
        masks[idx, 16 * label : 16 * label + 16] = 1
    pixels += 120 * masks[..., None]
    images, keys = pixels.astype(np.uint8), [f"{seed}/{idx}" for idx in range(num)]
    return with_masks(images, keys, masks) if masked else with_classes(images, keys, labels)


def test_both_heads_learn_and_stand_in_one_table() -> None:
    config = SupervisedConfig(steps=60, batch_size=8, lr=3e-3)
    for task in ("probe", "readout"):
        train, test = (bright_halves(*part, masked=task == "readout") for part in ((16, 0), (12, 1)))
        supervised = run_supervised(task, SPEC, train, test, [8], [0], config)
        probed = run_probe(task, [raw_pixels()], train, test, [8], [0])
        merged = ProbeResult.merge([probed, supervised])
        assert merged.best("supervised", 8).mean > 0.8
        assert "supervised" in merged.to_table()


def test_training_follows_its_seed() -> None:
    train = bright_halves(6, 0)
    config = SupervisedConfig(steps=2, batch_size=4, flip=True)
    runs = [train_supervised(SPEC, train, 2, config, seed) for seed in (0, 0, 1)]
    weights = [run.net.heads[0].weight for run in runs]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert list(runs[0].extractor(torch.from_numpy(all_images(train)))) == ["l2", "l3", "l4", "l5"]


def test_a_training_that_was_killed_goes_on_in_its_folder_bit_for_bit(tmp_path, monkeypatch) -> None:
    config = SupervisedConfig(steps=12, batch_size=4, flip=True)
    train, test = bright_halves(6, 0), bright_halves(4, 1)
    arguments = ("probe", SPEC, train, test, [6], [3], config)
    unbroken = run_supervised(*arguments)

    def die(_trainer: SupervisedTraining, step: int) -> None:
        if step == 9:
            os.kill(os.getpid(), signal.SIGKILL)

    def killed(_rank: int) -> None:
        monkeypatch.setattr(SupervisedTraining, "updated", die)
        run_supervised(*arguments, folder=tmp_path)

    assert fork_ranks(killed, tmp_path, 1) == [None]
    assert load_checkpoint(tmp_path / "probe-6-3" / "last.pt", "supervised")["step"] == 8
    assert run_supervised(*arguments, folder=tmp_path).scores == unbroken.scores
    assert load_checkpoint(tmp_path / "probe-6-3" / "last.pt", "supervised")["step"] == 12
    assert run_supervised(*arguments, folder=tmp_path).scores == unbroken.scores  # nothing is left to train
    with pytest.raises(PlanChangedError, match=r"supervised\.lr: 0\.001 -> 0\.1"):
        run_supervised(*arguments[:-1], SupervisedConfig(steps=12, batch_size=4, flip=True, lr=0.1), folder=tmp_path)


def test_every_image_is_seen_before_any_is_seen_again() -> None:
    steps = [rows for rows, _ in draw_steps(10, SupervisedConfig(steps=7, batch_size=4), seed=0)]
    assert [len(rows) for rows in steps] == [4] * 7
    seen = np.concatenate(steps)
    assert sorted(seen[:10].tolist()) == sorted(seen[10:20].tolist()) == list(range(10))
    assert [len(rows) for rows, _ in draw_steps(1, SupervisedConfig(steps=2, batch_size=4), seed=0)] == [2, 2]


def test_flip_mirrors_images_with_their_masks() -> None:
    images = torch.arange(24, dtype=torch.uint8).view(2, 2, 2, 3)
    masks = torch.tensor([[[0, 1], [2, 3]], [[4, 5], [6, 7]]])
    flipped, targets = flip_both(images, masks, torch.tensor([False, True]))
    assert torch.equal(flipped[0], images[0]) and torch.equal(flipped[1], images[1].flip(1))
    assert targets.tolist() == [[[0, 1], [2, 3]], [[5, 4], [7, 6]]]
