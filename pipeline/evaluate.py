"""`dtpipe eval`: labelled images and networks into the functions of `distill.downstream`.

The table always holds the random initialisation of the same student; of frozen features also raw pixels, and the
teacher's own when it can be had.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

from dtpipe.distill.downstream.base import Task
from dtpipe.distill.downstream.compare import run_probe
from dtpipe.distill.downstream.config import ProbeConfig
from dtpipe.distill.downstream.extractors import RANDOM_INIT
from dtpipe.distill.downstream.frozen import probe, readout
from dtpipe.distill.downstream.idle import refuse_idle_settings
from dtpipe.distill.downstream.labelled import LabelledSet, join_sets
from dtpipe.distill.downstream.registry import TASKS, find_task
from dtpipe.distill.downstream.result import ProbeResult
from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.engine.ranks import join_ranks
from dtpipe.distill.engine.trackers.tracking import send_scores
from dtpipe.extract.sources.layouts.registry import LAYOUTS
from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.manifests.labels import KIND_WORDS, Class, Instances, Mask, Target
from dtpipe.manifests.phases import phase
from dtpipe.manifests.records.document import write_document
from dtpipe.manifests.schema import TransformRecipe, height_width
from dtpipe.manifests.store.outputs import refuse_other_file
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.arms import Comparison, open_comparison, run_notes, runs_of
from dtpipe.pipeline.classes import check_scorable, coverage_notes
from dtpipe.pipeline.cli.console import Note, say_nothing
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.extractors import extractors_of
from dtpipe.pipeline.rivals.apart import check_apart_by_content, without_copies
from dtpipe.pipeline.rivals.digests import DigestsOf, DigestStore
from dtpipe.pipeline.rivals.seen import overlap_notes
from dtpipe.pipeline.sets import label_kind, open_sets
from dtpipe.pipeline.trained_on import TrainedOn
from dtpipe.pipeline.tune.cells import TunedTable
from dtpipe.pipeline.tune.evaluate import tune_settings, tuned_result, tuned_table

FEW_MASKS = (5, 20, 80)
FEW_PER_CLASS = (1, 5, 20)


@dataclass(frozen=True)
class Evaluation:
    """A result, and the file it was written to."""

    result: ProbeResult
    path: Path
    rank: int = 0
    """Of several processes that trained together, which one this is; the first says it all."""


def evaluate(config: EvalConfig, note: Note) -> Evaluation:
    """Score a student beside its rivals and write the result as JSON.

    Raises: ConfigError, InputError, TeacherError in a sentence before features are computed.
    """
    if config.masks and config.task == probe.TASK.name:
        note(f"a probe of masks is task {readout.TASK.name}")
        config = config.model_copy(update={"task": readout.TASK.name})
    task = check_task(config)
    refuse_other_file(result_path(config), b'"test_share"', "dtpipe eval")
    if isinstance(task, TunedTask):
        return _evaluate_tuned(config, task, note)
    with phase("opening the students"):
        comparison = open_comparison(config, note)
    train, test = load_sets(config, comparison.spec.image_px, note)
    note(f"{count_of(len(train), 'image')} to draw labels from, {len(test)} held out")
    store = DigestStore(seen_folder(config), note)
    train, test = check_apart_by_content(train, test, config.test_images is None, store.of_set, note)
    trained_on = TrainedOn.of(runs_of(config)[0])
    at = task_transform(config, comparison.spec.image_px)
    with phase("opening the teacher"):
        arms = extractors_of(config, comparison, trained_on.teacher(), train, at, note)
    numbers = label_counts(config, train)
    path = result_path(config)
    keep_in = path.with_suffix("") if path.suffix else None
    result = run_probe(config.task, arms, train, test, numbers, comparison.seeds, config.probe, note, keep_in)
    said = [*run_notes(comparison), *coverage_notes(train, test), *overlap_notes(config, comparison, test, at, store)]
    subject = comparison.arms[0].name
    result = replace(result, notes=(*result.notes, *said), subject=subject, reference=RANDOM_INIT)
    return Evaluation(result, _write(config, result, note))


def _evaluate_tuned(config: EvalConfig, task: TunedTask[Any], note: Note) -> Evaluation:
    """Train every arm on the labels. Under torchrun each process does its part, and the first notes and writes."""
    cells_path(config)
    with join_ranks(config.device) as ranks:
        say = note if ranks.rank == 0 else say_nothing
        store = DigestStore(seen_folder(config), note)
        digests_of: DigestsOf = lambda labelled, which: ranks.first(lambda: store.of_set(labelled, which))  # noqa: E731
        comparison, table = open_table(config, task, digests_of, say)
        result = tuned_result(config, table, cells_path(config), say)
        held_out = join_sets(table.train, table.test) if config.resplit else table.test
        overlap = ranks.first(lambda: overlap_notes(config, comparison, held_out, tuned_transform(config), store))
        said = [*run_notes(comparison), *coverage_notes(table.train, table.test), *overlap]
        result = replace(result, notes=(*result.notes, *said))
        path = ranks.first(lambda: _write(config, result, note))
    return Evaluation(result, path, ranks.rank)


def open_table(
    config: EvalConfig, task: TunedTask[Any], digests_of: DigestsOf, note: Note
) -> tuple[Comparison, TunedTable]:
    """The arms and labels of a tuned task. Raises: InputError, ConfigError."""
    tune_settings(config)
    with phase("opening the students"):
        comparison = open_comparison(config, note)
    train, test = open_sets(config, tuned_transform(config), note)
    note(f"{count_of(len(train), 'image')} to draw labels from, {len(test)} held out")
    train, test = check_apart_by_content(train, test, config.test_images is None, digests_of, note)
    if config.resplit:
        train, test = (without_copies(side, digests_of, note) for side in (train, test))
    return comparison, tuned_table(config, task, comparison, (train, test), label_counts(config, train))


def tuned_transform(config: EvalConfig) -> TransformRecipe | None:
    """How images come to the size at which a tuned task takes them; None: whole."""
    return None if config.px is None else task_transform(config, height_width(config.px))


def check_task(config: EvalConfig) -> Task | TunedTask[Any]:
    """The task of the settings, if it learns from what is given. Raises: ConfigError naming those that do."""
    kind = label_kind(config)
    usable = {kind, Mask} if kind is Instances else {kind}
    entry = find_task(config.task)
    target = entry.target
    if target not in usable:
        fitting = ", ".join(name for name, task in TASKS.items() if task.target in usable) or "another layout"
        given = "--masks" if config.masks else config.images.partition(":")[0]
        if kind is Class:
            given = "class folders"
        places = "give --masks, or " if target is Mask else _layouts_of(target) if target is not Class else ""
        raise ConfigError(f"task {config.task} learns from {KIND_WORDS[target]}; {places}with {given} use {fitting}")
    _refuse_idle(config, entry)
    return entry


def _layouts_of(target: type[Target]) -> str:
    """A clause on where labels of a kind are to be had."""
    names = ", ".join(layout.name for layout in LAYOUTS.values() if layout.kind is target)
    return f"name a layout that has them in --images ({names}), as NAME:ROOT@SPLIT; "


def _refuse_idle(config: EvalConfig, task: Task | TunedTask[Any]) -> None:
    """Refuse settings that the task does not read. Raises: ConfigError naming one."""
    trains = isinstance(task, TunedTask)
    given = {
        "eval.teacher": trains and config.teacher is not None,
        "eval.timestep": trains and config.timestep is not None,
        "eval.tune": not trains and config.tune is not None,
        "eval.probe": trains and config.probe != ProbeConfig(),
        "eval.resplit": not trains and config.resplit,
        "eval.add_to": not trains and config.add_to is not None,
    }
    if idle := next((name for name, there in given.items() if there), None):
        how = "trains backbone and head" if trains else "reads frozen features"
        raise ConfigError(f"task {task.name} {how}, and {idle} is for the others; leave it out")
    if (own := config.tune if trains else config.probe) is not None:
        refuse_idle_settings(task.name, own)


def load_sets(config: EvalConfig, student_px: tuple[int, int], note: Note) -> tuple[LabelledSet, LabelledSet]:
    """Images to draw labels from, and images held out, at the task's size. Raises: InputError, ConfigError."""
    train, test = open_sets(config, task_transform(config, student_px), note, as_masks=True)
    check_scorable(train, test, config.ignore_value)
    return train, test


def task_transform(config: EvalConfig, student_px: tuple[int, int]) -> TransformRecipe:
    """How images come to the size at which a task takes them."""
    height, width = height_width(config.px or student_px)
    return TransformRecipe(resize=config.resize, height=height, width=width)


def label_counts(config: EvalConfig, train: LabelledSet) -> list[int | None]:
    """Numbers of labelled images to score from; None is all of them."""
    if config.labelled is not None:
        return [None if num == "all" else int(num) for num in config.labelled]
    few = tuple(num * len(train.classes) for num in FEW_PER_CLASS) if train.kind is Class else FEW_MASKS
    return [*(num for num in few if num < len(train)), None]


def result_path(config: EvalConfig) -> Path:
    """Where the result goes. Raises: ConfigError for a checkpoint outside a run folder when no --out says."""
    if config.out:
        return Path(config.out)
    run = Path(runs_of(config)[0])
    run = run if run.is_dir() else run.parent
    return run / "eval" / f"{config.task}.json"


def seen_folder(config: EvalConfig) -> Path:
    """Where digests of many images are kept: beside the run, or beside the result where the student has no folder."""
    run = Path(runs_of(config)[0])
    return run / "eval" / "seen" if run.is_dir() else result_path(config).parent / "seen"


def cells_path(config: EvalConfig) -> Path:
    """The folder of a table's trainings. Raises: ConfigError where the result would have the same name."""
    path = result_path(config)
    if not path.suffix:
        raise ConfigError(f"eval.out is {path}, which is the folder of the trainings too; name a file, {path}.json")
    return path.with_suffix("")


def _write(config: EvalConfig, result: ProbeResult, note: Note) -> Path:
    path = result_path(config)
    document = {"config": config.model_dump(mode="json"), **result.to_json()}
    write_document(path, json.loads(json.dumps(document, default=str)), "make room or choose another --out")
    _show_scores(config, result, note)
    return path


def _show_scores(config: EvalConfig, result: ProbeResult, note: Note) -> None:
    """Show the student's headline scores in the trackers of its run, which may not stop what is done already."""
    run = Path(runs_of(config)[0])
    if result.subject is None or not run.is_dir():
        return
    of_subject = result.by_seed(result.subject).items()
    scores = {f"eval/{result.task}/{num}": mean(by_seed.values()) for num, by_seed in of_subject}
    try:
        send_scores(run, "eval", scores)
    except DtpipeError as err:
        note(f"the scores are not shown in the trackers of {run}: {err}")
