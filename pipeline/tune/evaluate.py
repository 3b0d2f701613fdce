"""The table of a task that trains backbone and head: arms, labels and trainings, in one process or many.

Every table holds the random initialisation of the same student, trained on the same labels by the same recipe, at a
learning rate of its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from dtpipe.distill.downstream.extractors import RANDOM_INIT
from dtpipe.distill.downstream.labelled import LabelledSet, check_apart, check_several_classes
from dtpipe.distill.downstream.result import ProbeResult
from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.examples import fit_targets
from dtpipe.distill.downstream.tuned.run import TuneResult, tune, tune_with_workers
from dtpipe.distill.downstream.tuned.trainer import TuneJob
from dtpipe.distill.engine.progress import TrainProgress
from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline.arms import Comparison, random_arm
from dtpipe.pipeline.cli.console import Note, ProgressLine, format_seconds
from dtpipe.pipeline.cli.settings import load_document, preset_names
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.tune.cells import TunedTable, run_cells
from dtpipe.pipeline.tune.earlier import earlier_table
from dtpipe.pipeline.tune.rates import Train


def tune_settings(config: EvalConfig) -> TuneConfig:
    """How to train. Raises: ConfigError when nothing says how long."""
    if config.tune is None:
        names = ", ".join(name for name in preset_names() if _task_of(name) == config.task)
        presets = f"one of the presets {names} with -c" if names else "a preset with -c"
        raise ConfigError(
            f"task {config.task} trains, and nothing says how long: give --steps or --epochs, or {presets}; "
            "`dtpipe list presets` says what each is"
        )
    return config.tune


def _task_of(preset: str) -> str | None:
    task: str | None = load_document(preset).get("eval", {}).get("task")
    return task


def tuned_table(
    config: EvalConfig,
    task: TunedTask[Any],
    comparison: Comparison,
    sets: tuple[LabelledSet, LabelledSet],
    num_labelled: Sequence[int | None],
) -> TunedTable:
    """What is to be trained and scored, the arm in question first.

    Raises: ConfigError for sets that overlap; as `earlier_table` and `EarlierTable.check`.
    """
    train, test = (fit_targets(task, labelled) for labelled in sets)
    check_apart(train, test)
    check_several_classes(train, test)
    arms = [comparison.arms[0], random_arm(comparison.spec), *comparison.arms[1:]]
    if len({arm.name for arm in arms}) < len(arms):
        raise ConfigError(f"{RANDOM_INIT} is the name of an arm that every table has; write --compare NAME=RUN")
    settings = tune_settings(config)
    table = TunedTable(task, arms, train, test, num_labelled, comparison.seeds, settings, config.resplit)
    if (earlier := earlier_table(config)) is None:
        return table
    earlier.check(config, table)
    of_each_seed = settings.lr_choice == "each_seed" and settings.lr_grid
    return replace(table, earlier=earlier.result, rates={} if of_each_seed else earlier.rates())


def tuned_result(config: EvalConfig, table: TunedTable, out: Path, note: Note) -> ProbeResult:
    """Train and score every cell in a folder of `out`. Raises: as `tune` of `distill.downstream.tuned.run`."""
    with ProgressLine("eval", tell_end=False) as line, _training(config, table.config, line) as train:
        result = run_cells(table, out, train, note)
    result = replace(result, subject=table.arms[0].name, reference=RANDOM_INIT)
    return result if table.earlier is None else ProbeResult.merge([table.earlier, result])


@contextmanager
def _training(config: EvalConfig, settings: TuneConfig, line: ProgressLine) -> Iterator[Train]:
    """How one training is done: in this process, which may be one of torchrun's, or on Ray's workers."""
    num_workers = settings.run.train_workers

    def here(job: TuneJob, test: LabelledSet, folder: Path, what: str) -> TuneResult:
        return tune(
            job,
            test,
            folder,
            config.device,
            lambda progress: _show(line, progress, what),
            on_scored=lambda done, total: line.update(done, total, f"{what}  held-out images predicted"),
        )

    if num_workers is None:
        yield here
        return
    from dtpipe.extract.cluster.connection import connect, disconnect, has_gpus

    connect(settings.run.ray_address)
    gpus = has_gpus() and config.device != "cpu"

    def there(job: TuneJob, test: LabelledSet, folder: Path, what: str) -> TuneResult:
        return tune_with_workers(
            job, test, folder, num_workers, gpus, config.device, lambda progress: _show(line, progress, what)
        )

    try:
        yield there
    finally:
        disconnect()


def _show(line: ProgressLine, progress: TrainProgress, what: str) -> None:
    text = f"{what}  loss {progress.losses['loss']:.4f}  {progress.throughput_img_s:.1f} img/s"
    line.update(
        progress.step, progress.num_steps, f"{text}  ETA {format_seconds(progress.remaining_s)} of this training"
    )
