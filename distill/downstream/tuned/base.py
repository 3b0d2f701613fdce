"""What a tuned task declares: the head it puts on a backbone, its augmentation, its predictions and its metric.

The engine trains backbone and head together (`trainer.py` beside this). A new task is a file in `tasks/` with `TASK`,
and a line in `registry.py`; heads and losses are in `heads/`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, Protocol, TypeVar

from torch import Tensor, nn

from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.student.student import Student
from dtpipe.manifests.labels import ClassTable, Pixels, Target

LearnTarget = Mapping[str, Tensor]
"""What a head learns from one image, as its losses read it; on the device there."""


@dataclass(frozen=True)
class Example:
    """One image as the network takes it in training, on the CPU."""

    image: Tensor
    """(3, H, W) float32 in [-1, 1]."""
    target: LearnTarget


class TaskNetwork(Protocol):
    """A student with a head: a module that also predicts. `student` is the backbone, all other parameters are new."""

    student: Student

    def __call__(self, images: Sequence[Tensor], targets: Sequence[LearnTarget]) -> Mapping[str, Tensor]:
        """Losses in training mode: `loss`, which is minimised, and its parts; means over the images.

        Shapes: images (3, H, W) in [-1, 1] each, of one size where the task's augmentation crops to one.
        """
        ...

    def predict(self, images: Sequence[Tensor]) -> Sequence[Any]:
        """What is seen in whole images, in eval mode: one prediction of the task's kind per image, at its size, on the
        CPU.

        Shapes: images (3, H, W) float32 in [-1, 1] each, of any size.
        """
        ...


MixExamples = Callable[[Tensor, Sequence[LearnTarget]], tuple[Tensor, Sequence[LearnTarget]]]
"""Mixes the images (B, 3, H, W) and targets of one pass with each other."""


@dataclass(frozen=True)
class TaskScores:
    """Held-out scores of one network."""

    value: float
    """The task's own score in [0, 1]."""
    others: Mapping[str, float] = field(default_factory=dict)
    """By name; what cannot be computed is left out."""
    by_class: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)
    """Name of score to name of class to value; None where the class does not occur."""


Prediction = TypeVar("Prediction")


class Metric(Protocol[Prediction]):
    """Adds up predictions of held-out images, and then says the scores. Pickles, so that ranks can join theirs."""

    def add(self, key: str, prediction: Prediction, target: Target) -> None: ...

    def merge(self, other: Metric[Prediction]) -> None:
        """Take in what another has added up."""
        ...

    def scores(self) -> TaskScores: ...


@dataclass(frozen=True)
class TunedTask(Generic[Prediction]):
    """One downstream use of a backbone that is trained on labels."""

    name: str
    summary: str
    """One sentence for people who choose a task."""
    kind: type[Target]
    """What it learns from. Where masks are learned from, `Instances` with masks will do: see `LabelledSet.as_masks`."""
    metric_name: str
    """What its score is."""
    build: Callable[[Student, ClassTable, TuneConfig], nn.Module]
    """A `TaskNetwork` on a student; the head's weights are drawn from torch's global generator.

    Raises: ConfigError for a student or classes that the head has no place for.
    """
    augment: Callable[[ClassTable, TuneConfig], Callable[[Pixels, Target], Example]]
    """The training view of an image (H, W, 3) and its target; `augment.crop_px` is set where the task `crops`. Random
    numbers come from torch's, numpy's and Python's global generators, which are seeded for each sample and pass."""
    metric: Callable[[ClassTable, TuneConfig], Metric[Prediction]]
    save: Callable[[Prediction, ClassTable], Iterator[tuple[str, bytes]]] = lambda _prediction, _classes: iter(())
    """A prediction as files: ending (such as `.png`) and content; `predict` and the report read them."""
    reads: frozenset[str] = frozenset()
    """Settings of `eval.tune` that matter to it, of those that not all tasks read: see `reads.py`."""
    crops: bool = True
    """Training views have the student's size unless the settings name another; else they are whole images."""
    frozen: bool = False
    """The backbone is never trained, whatever the settings say: `backbone_lr` is 0."""
    mix: Callable[[ClassTable, TuneConfig], MixExamples | None] = lambda _classes, _config: None
    """What is done to images of one size together, such as mixup, on the device; random numbers come from numpy's
    global generator, which is seeded for each step, rank and pass."""

    @property
    def target(self) -> type[Target]:
        """What it learns from, under the name that tasks on frozen features have for it."""
        return self.kind
