"""Held-out images through a tuned network: the metric over all ranks, and what was predicted of each image."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from dtpipe.distill.downstream.kept import keep_keys, keep_prediction
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.base import Metric, TaskNetwork, TaskScores, TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.examples import fit_targets, in_order
from dtpipe.distill.engine.ranks import ALONE, Ranks
from dtpipe.distill.stream.batch import scaled
from dtpipe.manifests.errors import ConfigError, saying_what_to_lower
from dtpipe.manifests.labels import Pixels, Target

PASS_PX = 1 << 22
"""Pixels of the images that go through a network at once: 16 images of 512x512."""
OnScored = Callable[[int, int], None]
"""Hears how many images of how many have been predicted."""
_T = TypeVar("_T")
_SMALLER = "the training stays: run the same command again with a smaller eval.tune.run.score_batch"
_ROOM = "make room, or use eval.tune.run.keep_predictions=false"


def score_network(
    task: TunedTask[Any],
    network: nn.Module,
    test: LabelledSet,
    config: TuneConfig,
    ranks: Ranks = ALONE,
    folder: Path | None = None,
    on_scored: OnScored | None = None,
) -> TaskScores:
    """Scores on held-out images, each rank's share predicted there; the same on all ranks. `config` is resolved.

    In a folder the predictions are kept; `on_scored` hears of each image of the rank's own.
    Raises: ConfigError for targets of another kind; DeviceMemoryError; StoreError.
    """
    test = fit_targets(task, test)
    if not len(test):
        raise ConfigError("there is no held-out image to score on; give more images")
    metric: Metric[Any] = task.metric(test.classes, config)
    share = ranks.share(len(test))
    if folder is not None:
        ranks.first(lambda: keep_keys(folder, test.keys, _ROOM))
    predicted = _predicted(network, test, share, config.run.score_batch)
    for done, (row, prediction, target) in enumerate(predicted, start=1):
        metric.add(test.keys[row], prediction, target)
        if folder is not None:
            keep_prediction(folder, row, task.save(prediction, test.classes), _ROOM)
        if on_scored is not None:
            on_scored(done, len(share))
    whole, *others = ranks.gather(metric)
    for other in others:
        whole.merge(other)
    return whole.scores()


def _predicted(
    network: nn.Module, test: LabelledSet, rows: Sequence[int], batch_size: int
) -> Iterator[tuple[int, Any, Target]]:
    """Row, prediction and target of images."""
    network.eval()
    device = next(network.parameters()).device
    for batch in in_passes(in_order(test, rows), batch_size, lambda read: read[1].size // 3):
        with saying_what_to_lower("scoring", str(device), len(batch), _SMALLER), torch.inference_mode():
            images = [image_tensor(image).to(device) for _, image, _ in batch]
            predictions = cast(TaskNetwork, network).predict(images)
        for (row, _, target), prediction in zip(batch, predictions, strict=True):
            yield row, prediction, target


def in_passes(images: Iterable[_T], most: int, num_px: Callable[[_T], int]) -> Iterator[list[_T]]:
    """Neighbours together: at most so many, and no more than `PASS_PX` pixels, but for a larger image, which is alone.

    What a network predicts is as large as its images, so that memory is bounded whatever their size.
    """
    held: list[_T] = []
    held_px = 0
    for image in images:
        size_px = num_px(image)
        if held and (len(held) == most or held_px + size_px > PASS_PX):
            yield held
            held, held_px = [], 0
        held.append(image)
        held_px += size_px
    if held:
        yield held


def image_tensor(image: Pixels) -> Tensor:
    """Shapes: (H, W, 3) uint8 -> (3, H, W) float32 in [-1, 1]."""
    return scaled(torch.tensor(image)[None])[0]
