"""One training of a tuned task from start to scores, in its own folder, by one process, torchrun's or Ray Train's."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from dtpipe.distill.downstream.kept import PREDICTED
from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.downstream.tuned.base import TaskScores
from dtpipe.distill.downstream.tuned.scoring import OnScored, score_network
from dtpipe.distill.downstream.tuned.trainer import REMEDY, TuneJob, Tuning
from dtpipe.distill.engine.device import seeded, training_device
from dtpipe.distill.engine.loop import run_in
from dtpipe.distill.engine.progress import OnTrainProgress, RunResult
from dtpipe.distill.engine.ranks import join_ranks
from dtpipe.distill.engine.ray import train_on_ray
from dtpipe.distill.engine.run_folder import RunFolder
from dtpipe.manifests.errors import DivergedError
from dtpipe.manifests.records.document import read_document, write_document
from dtpipe.manifests.stopping import StopRequest

SCORE_FILE = "score.json"
"""What a finished training scored, in its folder."""
_REMEDY = "restore the file, or delete it to score the training again"


@dataclass(frozen=True)
class TuneResult(RunResult):
    """What a training left behind, and its held-out scores."""

    value: float = 0.0
    others: Mapping[str, float] = field(default_factory=dict)
    by_class: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def scores(self) -> TaskScores:
        """As the metric gave them."""
        return TaskScores(self.value, self.others, self.by_class)


def tune(
    job: TuneJob,
    test: LabelledSet,
    folder: Path,
    device: str = "auto",
    on_progress: OnTrainProgress | None = None,
    stop: StopRequest | None = None,
    on_scored: OnScored | None = None,
) -> TuneResult:
    """Train, or go on training, in a folder, then score on held-out images; a finished training is only read.

    Raises: ConfigError, PlanChangedError and LockHeldError before any step; else as the engine's `run`.
    """
    with join_ranks(device) as ranks:
        where = training_device(device)
        record = {"of": job.record(), "settings": job.config.identity(), "scored_on": test.content_digest()}
        done = ranks.first(lambda: finished(folder, record))
        if done is not None:
            return TuneResult.from_record(done)
        with ExitStack() as stack:  # holds the folder until the score is written
            with seeded(job.seed, where):
                trainer, settings = Tuning(job, where, ranks), job.settings(folder)
                held = ranks.only_first(lambda: stack.enter_context(RunFolder.open(settings)))
                done = ranks.first(lambda: finished(folder, record))
                if done is not None:  # meanwhile, by another process
                    return TuneResult.from_record(done)
                result = run_in(held, trainer, settings, ranks, on_progress, stop)
            check_finite(trainer.scored)
            keep = folder if trainer.config.run.keep_predictions else None
            ranks.first(lambda: shutil.rmtree(folder / PREDICTED, ignore_errors=True))  # of earlier images
            scores = score_network(job.task, trainer.scored, test, trainer.config, ranks, keep, on_scored)
            own = {each.name: getattr(result, each.name) for each in fields(result)}
            tuned = TuneResult(**own, value=scores.value, others=scores.others, by_class=scores.by_class)
            if held is not None:
                held.conclude({"score": scores.value, **scores.others})
            ranks.first(lambda: write_document(folder / SCORE_FILE, record | {"result": tuned.record()}, "make room"))
    return tuned


def check_finite(network: nn.Module) -> None:
    """See that weights can be scored: the last update may have spoiled them after the last loss was seen.

    Raises: DivergedError naming one that is not finite.
    """
    for name, weight in network.state_dict().items():
        if not bool(weight.isfinite().all()):
            raise DivergedError(f"after the last step {name} is not finite; {REMEDY}")


def finished(folder: Path, record: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result of a folder whose training of this record is finished and scored; None where there is more to do.

    Raises: DamagedDataError when it cannot be read.
    """
    try:
        stored = read_document(folder / SCORE_FILE, _REMEDY)
    except FileNotFoundError:
        return None
    return stored["result"] if all(stored.get(name) == value for name, value in record.items()) else None


def tune_with_workers(
    job: TuneJob,
    test: LabelledSet,
    folder: Path,
    num_workers: int,
    gpus: bool,
    device: str = "auto",
    on_progress: OnTrainProgress | None = None,
) -> TuneResult:
    """`tune` on workers of the Ray cluster that this process is connected to, in a folder that all nodes share."""
    folder = folder.absolute()
    work = partial(_work, job, test, folder, device)
    restarts = job.config.run.max_restarts
    return train_on_ray(work, TuneResult, folder, num_workers, gpus, restarts, on_progress)


def _work(job: TuneJob, test: LabelledSet, folder: Path, device: str, stop: StopRequest) -> TuneResult:
    return tune(job, test, folder, device, stop=stop)
