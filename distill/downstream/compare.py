"""Runs one downstream task for several extractors, numbers of labelled images and seeds."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from dtpipe.distill.downstream.base import Task
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor, PerSeed, extractor_for
from dtpipe.distill.downstream.kept import folder_names
from dtpipe.distill.downstream.labelled import (
    Draw,
    LabelledSet,
    check_apart,
    check_several_classes,
    count_classes,
    draw_labelled,
)
from dtpipe.distill.downstream.registry import find_frozen
from dtpipe.distill.downstream.result import FIXED, HEAD, ProbeResult, Score
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.phases import phase


def run_probe(
    task: str,
    extractors: Sequence[FeatureExtractor | PerSeed],
    train: LabelledSet,
    test: LabelledSet,
    num_labelled: Sequence[int | None],
    seeds: Sequence[int],
    config: ProbeConfig | None = None,
    on_progress: Callable[[str], None] | None = None,
    keep_in: Path | None = None,
) -> ProbeResult:
    """Score every extractor on held-out images from each number of labelled ones (None: all), over the seeds.

    Each seed draws other labelled images, the same ones for every extractor, and another `PerSeed` extractor. With all
    images labelled a fixed extractor has nothing that a seed could change, so it is scored once. A task that predicts
    masks keeps some in `keep_in`, a folder for each extractor.

    Raises: ConfigError when sets overlap, lack what the task needs, or are too small; when names repeat.
    """
    entry, config = find_frozen(task), config or ProbeConfig()
    names = [extractor.name for extractor in extractors]
    if len(set(names)) != len(names) or not names or not seeds or not num_labelled:
        raise ConfigError(
            "a comparison needs extractors of different names, seeds and numbers of labels; "
            f"got {names}, {seeds}, {num_labelled}"
        )
    check_apart(train, test)
    metric = metric_of(entry, train, test)
    draws = make_draws(train, num_labelled, seeds)
    scores: list[Score] = []
    for extractor, name in zip(extractors, folder_names(names), strict=True):
        if on_progress is not None:
            on_progress(f"{task}: {extractor.name}")
        with phase(f"{task} of {extractor.name}"):
            own = draws if keep_in is None else _one_kept(draws, keep_in, name)
            scores += _score_extractor(entry, extractor, train, test, own, config)
    return ProbeResult(task, metric, len(test), tuple(scores), _notes(scores), entry.headline(config))


def make_draws(train: LabelledSet, num_labelled: Sequence[int | None], seeds: Sequence[int]) -> list[Draw]:
    """The labelled rows for every number and seed; a number that comes twice is drawn once."""
    nums = dict.fromkeys(len(train) if num is None else num for num in num_labelled)
    return [
        Draw(seed, draw_labelled(train, None if num == len(train) else num, seed)) for num in nums for seed in seeds
    ]


def _one_kept(draws: Sequence[Draw], keep_in: Path, name: str) -> list[Draw]:
    """The draws, the first of most images with the folder of its predictions: the one that a page shows."""
    shown = max(draws, key=lambda draw: len(draw.rows))
    folder = keep_in / f"{name}-{len(shown.rows)}-{shown.seed}"
    return [replace(draw, keep=folder) if draw is shown else draw for draw in draws]


def _score_extractor(
    task: Task,
    extractor: FeatureExtractor | PerSeed,
    train: LabelledSet,
    test: LabelledSet,
    draws: Sequence[Draw],
    config: ProbeConfig,
) -> list[Score]:
    if isinstance(extractor, FeatureExtractor):
        return task.score(extractor, train, test, _distinct(draws, len(train)), config)
    scores = []
    for seed in dict.fromkeys(draw.seed for draw in draws):
        own = [draw for draw in draws if draw.seed == seed]
        scores += task.score(extractor_for(extractor, seed), train, test, own, config)
    return scores


def _distinct(draws: Sequence[Draw], num_images: int) -> list[Draw]:
    """The draws, those of all images once only."""
    first_seed = draws[0].seed
    return [draw for draw in draws if len(draw.rows) < num_images or draw.seed == first_seed]


def metric_of(task: Task, train: LabelledSet, test: LabelledSet) -> str:
    """What the task's scores are.

    Raises: ConfigError when a set lacks the labels or masks that the task needs, or a second class.
    """
    for labelled in (train, test):
        labelled.need(task.target)
    check_several_classes(train, test)
    return task.metric(count_classes(train, test))


def _notes(scores: Sequence[Score]) -> tuple[str, ...]:
    chosen = [score for score in scores if score.level not in (HEAD, FIXED)]
    few = sorted({score.num_labelled for score in chosen if score.selection is None})
    if not few:
        return ()
    counts = ", ".join(str(num) for num in few)
    return (f"{counts} labelled images are too few to choose a best level from; there the last one was taken",)
