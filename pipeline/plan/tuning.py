"""What a table of tuned arms would take: hours and memory, from a few steps on some of its labelled images."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.batches import BatchOrder
from dtpipe.distill.downstream.tuned.trainer import TuneJob, Tuning
from dtpipe.distill.engine.device import seeded, training_device
from dtpipe.distill.engine.loop import Loop
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Console, Note, format_bytes, format_seconds
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.evaluate import check_task, open_table
from dtpipe.pipeline.plan.probe import peak_memory
from dtpipe.pipeline.rivals.digests import known_digests
from dtpipe.pipeline.tune.cells import TunedTable
from dtpipe.pipeline.tune.rates import fold_numbers

TIMED_TUNE_STEPS = 2
CPU_TUNE_IMAGES = 4  # per timed pass on a CPU


@dataclass(frozen=True)
class TuningPlan:
    """What training all arms would take; steps are timed on some of the labelled images, scoring is not."""

    task: str
    arms: tuple[str, ...]
    student: str
    num_parameters: int
    head_parameters: int
    num_labelled: tuple[int, ...]
    num_seeds: int
    num_trainings: int
    """With those that choose rates."""
    num_steps: int
    """Of all trainings together."""
    seconds: float
    throughput_img_s: float
    memory_bytes: int
    """With `timed_images` at a time."""
    timed_images: int
    batch_size: int
    device: str
    start: str | None = None
    """What the first arm's head starts from, where its run distilled soft labels."""


def plan_tuning(config: EvalConfig, note: Note) -> TuningPlan:
    """Time a few steps of the first arm. Raises: ConfigError for a task that trains nothing; what opening raises."""
    import torch

    task = check_task(config)
    if not isinstance(task, TunedTask):
        raise ConfigError(f"task {task.name} trains no network, so there is nothing to plan; leave out -n")
    _, table = open_table(config, task, known_digests, note)
    counts = [count for *_, count in trainings(table)]
    arm, seed = table.arms[0], table.seeds[0]
    begun = TuneJob(task, arm.student_for(seed), table.train, table.config, config.seed)
    job, start = begun.started_from(lambda: arm.decoder_for(seed))
    device = training_device(config.device)
    num = min(job.config.micro_batch or job.config.batch_size, job.config.batch_size, max(len(table.train), 2))
    num = min(num, CPU_TUNE_IMAGES) if device.type == "cpu" else num
    with seeded(config.seed, device):
        trainer = Tuning(_timed(job, num), device)
        per_image_s = min(itertools.islice(_time_steps(trainer), 1, 1 + TIMED_TUNE_STEPS)) / num
    memory = torch.cuda.max_memory_allocated() if device.type == "cuda" else peak_memory()
    student = trainer.model.student
    assert isinstance(student, torch.nn.Module)
    of_student = sum(parameter.numel() for parameter in student.parameters())
    return TuningPlan(
        task=task.name,
        start=None if start is None else f"{arm.name} {start}",
        arms=tuple(arm.name for arm in table.arms),
        student=job.student.spec.name,
        num_parameters=of_student,
        head_parameters=sum(parameter.numel() for parameter in trainer.model.parameters()) - of_student,
        num_labelled=tuple(dict.fromkeys(len(cell.labelled) for cell in table.cells())),
        num_seeds=len(table.seeds),
        num_trainings=len(counts),
        num_steps=sum(order.num_steps for order in counts),
        seconds=per_image_s * sum(order.num_steps * order.batch_size for order in counts),
        throughput_img_s=1 / per_image_s,
        memory_bytes=memory,
        timed_images=num,
        batch_size=max(order.batch_size for order in counts),
        device=device.type,
    )


def trainings(table: TunedTable) -> Iterator[tuple[str, int, BatchOrder]]:
    """Arm, labelled images and steps of every training, those on folds before that of their cell."""
    config, chosen = table.config, set[tuple[str, int]]()
    for cell in table.cells():
        arm, num = cell.arm, len(cell.labelled)
        folds = fold_numbers(cell.labelled, config.folds) if len(config.lr_grid) > 1 else None
        again = config.lr_choice == "first_seed" and (arm.name, num) in {*chosen, *table.rates}
        chosen.add((arm.name, num))
        if folds is not None and not again:
            for fold in range(int(folds.max()) + 1):
                order = BatchOrder.of(config, int((folds != fold).sum()), cell.seed)
                yield from ((arm.name, num, order) for _ in config.lr_grid)
        yield arm.name, num, BatchOrder.of(config, num, cell.seed)


def _timed(job: TuneJob, num: int) -> TuneJob:
    """The job with passes of so many images, read by this process."""
    run = job.config.run.model_copy(update={"workers": 0})
    steps = {"steps": 1 + TIMED_TUNE_STEPS, "epochs": None, "batch_size": num, "micro_batch": None, "run": run}
    few = job.labelled.subset(range(min(num, len(job.labelled))))
    return replace(job, labelled=few, config=job.config.model_copy(update=steps))


def _time_steps(trainer: Tuning) -> Iterator[float]:
    """Seconds of one step after another, with the reading of its images."""
    import torch

    started = time.perf_counter()
    for _ in Loop(trainer).steps():
        if trainer.device.type == "cuda":
            torch.cuda.synchronize()
        yield time.perf_counter() - started
        started = time.perf_counter()


def print_tuning(console: Console, plan: TuningPlan) -> None:
    """The plan as lines."""
    parameters, head = f"{plan.num_parameters / 1e6:.1f} M", f"{plan.head_parameters / 1e6:.1f} M"
    numbers = ", ".join(map(str, plan.num_labelled))
    rate = f"{plan.throughput_img_s:.{0 if plan.throughput_img_s >= 10 else 2}f}"
    console.pairs(
        {
            "student": f"{plan.student}, {parameters} parameters; head {head}",
            "table": f"{plan.task}: {', '.join(plan.arms)}; {numbers} labelled, {count_of(plan.num_seeds, 'seed')}",
            "training": f"about {format_seconds(plan.seconds)} for {count_of(plan.num_trainings, 'training')}, "
            f"{count_of(plan.num_steps, 'step')} of {plan.batch_size} images at most ({plan.device})",
            "rate": f"{rate} img/s reading, forward and backward, measured; scoring comes on top",
            "memory": f"about {format_bytes(plan.memory_bytes)} with {count_of(plan.timed_images, 'image')} at a time",
        }
    )
    if plan.start is not None:
        console.result(plan.start)
