"""What a downstream task on frozen features declares. A new one is a file with `TASK`, and a line in `registry.py`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor
from dtpipe.distill.downstream.labelled import Draw, LabelledSet
from dtpipe.distill.downstream.result import Score
from dtpipe.manifests.labels import Target

ScoreDraws = Callable[[FeatureExtractor, LabelledSet, LabelledSet, Sequence[Draw], ProbeConfig], list[Score]]


@dataclass(frozen=True)
class Task:
    """One downstream use of frozen features."""

    name: str
    summary: str
    """One sentence for people who choose a task."""
    target: type[Target]
    """What it learns from."""
    metric: Callable[[int], str]
    """Name of its score, by the number of classes."""
    score: ScoreDraws
    """Held-out scores of one extractor, from labelled images, held-out images and the draws among the labelled."""
    reads: frozenset[str]
    """Settings of `eval.probe` that matter to it."""
    headline: Callable[[ProbeConfig], str]
    """What the candidate is that nothing is chosen for, whose scores have the level `FIXED`: a clause."""
