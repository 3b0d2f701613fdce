"""What an interpreter would take: where its features come from, steps and hours, from a few of each that are timed."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dtpipe.distill.engine.device import seeded, training_device
from dtpipe.distill.labels.config import InterpreterConfig
from dtpipe.distill.labels.data import LabelledFeatures
from dtpipe.distill.labels.ensemble import ensemble_seconds
from dtpipe.distill.labels.train import InterpreterTraining, interpreter_run
from dtpipe.manifests.labels import Mask
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.interpret.config import InterpretConfig
from dtpipe.pipeline.interpret.places import FoundRows
from dtpipe.pipeline.interpret.run import open_labels
from dtpipe.pipeline.rivals.digests import DigestStore, known_digests

if TYPE_CHECKING:
    import torch

_TIMED_STEPS = 2


@dataclass(frozen=True)
class InterpretPlan:
    """What a training would take."""

    num_labelled: int
    num_held_out: int
    num_by_key: int
    """Labelled and held-out images whose features are in the dataset under their key."""
    num_by_content: int
    num_live: int
    """Images that the teacher encodes."""
    flips: bool
    levels: Sequence[str]
    num_views: int
    num_parameters: int
    num_steps: int
    feature_bytes: int
    """Of all labelled images, each read once."""
    train_s: float
    """Of all steps, once features are read."""
    read_s: float
    """Of all features, each read or encoded once; more where they do not fit into `interpret.run.kept_bytes`."""
    rivals_s: tuple[float, float] | None
    """Least and most of the pixel classifiers; None without."""
    device: str


def plan_interpreter(config: InterpretConfig, note: Note) -> InterpretPlan:
    """Open all that a training needs, count it, and time some of it; nothing is written. Raises: as `open_labels`."""
    import torch

    interpreter_run(config).refuse_other_place()
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    sides = open_labels(config, DigestStore(None, note), known_digests, note).sides
    train, both = sides.train, (sides.found, sides.held_out)
    device = training_device(config.run.device)
    with seeded(config.seed, device):
        trainer = InterpreterTraining(config, train, device)
        step_s = _step_seconds(trainer)
    encodings = train.num_readings * (2 if train.flips else 1)
    one = sum(level.numel() * level.element_size() for level in train.read(0, 0, False).values())
    return InterpretPlan(
        num_labelled=len(train),
        num_held_out=len(sides.test),
        num_by_key=sum(found.num_by_key for found in both),
        num_by_content=sum(found.num_by_content for found in both),
        num_live=sum(found.num_missing for found in both),
        flips=train.flips,
        levels=[level.name for level in train.levels],
        num_views=train.num_views,
        num_parameters=sum(parameter.numel() for parameter in trainer.network.parameters()),
        num_steps=trainer.course.num_steps,
        feature_bytes=one * len(train) * encodings,
        train_s=step_s * trainer.course.num_steps,
        read_s=encodings * _read_seconds(train, sides.found) + _read_seconds(sides.test, sides.held_out),
        rivals_s=_rivals_seconds(config, train, device),
        device=device.type,
    )


def _step_seconds(trainer: InterpreterTraining) -> float:
    """Of a step on images that are read already, the quickest of some after a warm-up."""
    batch = next(iter(trainer.batches(0)))

    def step() -> None:
        trainer.losses(batch)["loss"].backward()  # type: ignore[no-untyped-call]
        trainer.optimizer.step()
        trainer.optimizer.zero_grad()

    return min([_seconds(step, trainer.device) for _ in range(1 + _TIMED_STEPS)][1:])


def _read_seconds(side: LabelledFeatures, found: FoundRows) -> float:
    """Of the first reading of all images of a side; one that is stored and one that the teacher encodes are timed."""
    total = 0.0
    for live, num in ((True, found.num_missing), (False, len(found.rows) - found.num_missing)):
        rows = [row for row, place in enumerate(found.rows) if (place is None) is live]
        # the last ones, since the first may be kept; the first of two to warm up
        seconds = [_seconds(lambda row=row: side.read(row, 0, False)) for row in rows[-2:]]  # type: ignore[misc]
        total += num * min(seconds, default=0.0)
    return total


def _rivals_seconds(
    config: InterpreterConfig, train: LabelledFeatures, device: torch.device
) -> tuple[float, float] | None:
    if not config.rivals.pixel_models or train.labelled.kind is not Mask:
        return None
    return ensemble_seconds(config.rivals, train, config.seed, device)


def _seconds(work: Callable[[], object], device: torch.device | None = None) -> float:
    import torch

    started = time.perf_counter()
    work()
    if device is not None and device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - started
