"""Runs one downstream task for several extractors, numbers of labelled images and seeds.

A new task is one file with a function of `TaskFunction`'s type, and one line in `TASKS`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from dtpipe.distill.downstream.base import (
    Draw,
    FeatureExtractor,
    LabelledSet,
    PerSeed,
    check_apart,
    draw_labelled,
    extractor_for,
    need_labels,
    need_masks,
)
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.frozen.knn import knn_probe
from dtpipe.distill.downstream.frozen.probe import linear_probe
from dtpipe.distill.downstream.frozen.readout import FOREGROUND_IOU, MEAN_IOU, count_mask_classes, dense_readout
from dtpipe.distill.downstream.result import HEAD, ProbeResult, Score
from dtpipe.manifests.errors import ConfigError

ACCURACY = "accuracy"
TaskFunction = Callable[[FeatureExtractor, LabelledSet, LabelledSet, Sequence[Draw], ProbeConfig], list[Score]]


@dataclass(frozen=True)
class Task:
    """One registered downstream task on frozen features."""

    name: str
    needs: Literal["labels", "masks"]
    run: TaskFunction
    describes: str
    """One sentence for people who choose a task."""


TASKS = {
    "probe": Task("probe", "labels", linear_probe, "linear classifier on the pooled features of each level; accuracy"),
    "knn": Task("knn", "labels", knn_probe, "weighted nearest neighbours by cosine of pooled features; accuracy"),
    "readout": Task(
        "readout",
        "masks",
        dense_readout,
        "linear classifier per cell on the levels; foreground IoU, or mIoU of several classes",
    ),
}


def find_task(name: str) -> Task:
    """The registered task. Raises: ConfigError listing the choices."""
    if name not in TASKS:
        raise ConfigError(f"downstream task {name!r} is unknown; choose one of {sorted(TASKS)}")
    return TASKS[name]


def run_probe(
    task: str,
    extractors: Sequence[FeatureExtractor | PerSeed],
    train: LabelledSet,
    test: LabelledSet,
    num_labelled: Sequence[int | None],
    seeds: Sequence[int],
    config: ProbeConfig | None = None,
    on_progress: Callable[[str], None] | None = None,
) -> ProbeResult:
    """Score every extractor on held-out images from each number of labelled ones (None: all), over the seeds.

    Each seed draws other labelled images, the same ones for every extractor, and another `PerSeed` extractor. With all
    images labelled a fixed extractor has nothing that a seed could change, so it is scored once.

    Raises: ConfigError when sets overlap, lack what the task needs, or are too small; when names repeat.
    """
    found, config = find_task(task), config or ProbeConfig()
    names = [extractor.name for extractor in extractors]
    if len(set(names)) != len(names) or not names or not seeds or not num_labelled:
        raise ConfigError(
            f"a comparison needs extractors of different names, seeds and numbers of labels; got {names}, {seeds}, {num_labelled}"
        )
    check_apart(train, test)
    metric = metric_of(found, train, test)
    draws = make_draws(found, train, num_labelled, seeds)
    scores: list[Score] = []
    for extractor in extractors:
        if on_progress is not None:
            on_progress(f"{task}: {extractor.name}")
        scores += _score_extractor(found, extractor, train, test, draws, config)
    return ProbeResult(task, metric, len(test), tuple(scores), _notes(scores))


def make_draws(task: Task, train: LabelledSet, num_labelled: Sequence[int | None], seeds: Sequence[int]) -> list[Draw]:
    """The labelled rows for every number and seed; a number that comes twice is drawn once."""
    nums = dict.fromkeys(len(train) if num is None else num for num in num_labelled)
    wanted = [(None if num == len(train) else num, seed) for num in nums for seed in seeds]
    return [Draw(seed, draw_labelled(train, num, seed, task.needs == "labels")) for num, seed in wanted]


def _score_extractor(
    task: Task,
    extractor: FeatureExtractor | PerSeed,
    train: LabelledSet,
    test: LabelledSet,
    draws: Sequence[Draw],
    config: ProbeConfig,
) -> list[Score]:
    if isinstance(extractor, FeatureExtractor):
        return task.run(extractor, train, test, _distinct(draws, len(train)), config)
    scores = []
    for seed in dict.fromkeys(draw.seed for draw in draws):
        own = [draw for draw in draws if draw.seed == seed]
        scores += task.run(extractor_for(extractor, seed), train, test, own, config)
    return scores


def _distinct(draws: Sequence[Draw], num_images: int) -> list[Draw]:
    """The draws, those of all images once only."""
    first_seed = draws[0].seed
    return [draw for draw in draws if len(draw.rows) < num_images or draw.seed == first_seed]


def metric_of(task: Task, train: LabelledSet, test: LabelledSet) -> str:
    """What the task's scores are. Raises: ConfigError when a set lacks the labels or masks that the task needs."""
    if task.needs == "masks":
        return FOREGROUND_IOU if count_mask_classes(need_masks(train), need_masks(test)) == 2 else MEAN_IOU
    for labelled in (train, test):
        need_labels(labelled)
    return ACCURACY


def _notes(scores: Sequence[Score]) -> tuple[str, ...]:
    few = sorted({score.num_labelled for score in scores if score.selection is None and score.level != HEAD})
    if not few:
        return ()
    counts = ", ".join(str(num) for num in few)
    return (f"{counts} labelled images are too few to choose a level from; there the last candidate was taken",)
