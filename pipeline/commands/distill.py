"""`dtpipe distill`: feature datasets in, or images and a teacher; a run folder with a pre-trained student out."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Console, ProgressLine, format_seconds, speed
from dtpipe.pipeline.cli.options import Call, Flag, settings_command
from dtpipe.pipeline.report.history import record_command

if TYPE_CHECKING:
    from dtpipe.distill.config import DistillConfig
    from dtpipe.distill.engine.progress import OnTrainProgress, TrainProgress
    from dtpipe.distill.stream.data import TrainingData
    from dtpipe.distill.trainer import DistillResult

SHOWN_SHARE = 0.005
FLAGS = (
    Flag("url", "distill.datasets", "URL..."),
    Flag("--student", "distill.student.name", "TIMM_NAME"),
    Flag("--out", "distill.run.out", "DIR"),
    Flag("--join", "distill.join"),
    Flag("--sample-weights", "distill.sample_weights", "W,W"),
    Flag("--loss-weights", "distill.loss_weights", "W,W"),
    Flag("--levels", "distill.levels", "L2,L3"),
    Flag("--keys", "distill.keys", "FILE"),
    Flag("--include", "distill.include", "GLOB", repeatable=True),
    Flag("--exclude", "distill.exclude", "GLOB", repeatable=True),
    Flag("--limit", "distill.limit", "N"),
    Flag("--student-px", "distill.student_px", "PX"),
    Flag("--pretrained", "distill.student.pretrained"),
    Flag("--epochs", "distill.epochs", "N"),
    Flag("--batch-size", "distill.batch_size", "N"),
    Flag("--micro-batch", "distill.micro_batch", "N"),
    Flag("--opt", "distill.opt", "adamw|lamb"),
    Flag("--lr", "distill.lr", "LR"),
    Flag("--warmup-epochs", "distill.warmup_epochs", "N"),
    Flag("--weight-decay", "distill.weight_decay", "WD"),
    Flag("--equivariant", "distill.equivariant"),
    Flag("--reencode", "distill.reencode", "P"),
    Flag("--interpreter", "distill.interpreter", "DIR"),
    Flag("--mismatch", "distill.mismatch", "SEED"),
    Flag("--images", "extract.images", "URL"),
    Flag("--num-samples", "extract.num_samples", "N"),
    Flag("--teacher", "extract.teacher.path", "PATH|NAME"),
    Flag("--timesteps", "extract.noise.timesteps", "T,T"),
    Flag("--max-bad", "extract.run.max_bad", "N|SHARE"),
    Flag("--allow-incomplete", "distill.run.allow_incomplete"),
    Flag("--seed", "distill.seed", "N"),
    Flag("--device", "distill.run.device", "auto|cpu|cuda|mps"),
    Flag("--train-workers", "distill.run.train_workers", "N"),
    Flag("--ray-address", "distill.run.ray_address", "ADDRESS"),
)
EXAMPLE = """
dtpipe distill features/ --student resnet50 --out runs/r50
dtpipe distill features/ --out runs/half-live --reencode 0.5
dtpipe distill --images photos/ --teacher teacher/ --out runs/live
dtpipe distill -c imagenet_r50 -c cached s3://bucket/features --out runs/imagenet-r50 --micro-batch 64
torchrun --nproc-per-node 8 --no-python dtpipe distill features/ --student resnet50 --out runs/r50
dtpipe distill features/ --student resnet50 --out /shared/runs/r50 --train-workers 16 --ray-address HEAD:6379
"""


@settings_command(
    "distill",
    FLAGS,
    EXAMPLE,
    switches={"--fresh": "Refuse to start when --out holds a run; default: go on where it stopped."},
    whole="the checkpoints of --out are whole; run the same command to go on",
)
def command(call: Call, fresh: bool) -> None:
    """Pre-train a student on feature datasets.

    Run it again after a crash: it goes on in mid-epoch and takes the same steps. With --reencode, --teacher is needed
    only when the teacher has moved since the extraction. Without a dataset, give --images (or --num-samples) and
    --teacher: every sample is encoded live, with new noise in each epoch, as the `extract` settings say. Several GPUs
    share each batch under torchrun, or as Ray workers, which need --out on a disk that all nodes share.
    """
    if call.dry_run:
        from dtpipe.pipeline.plan.training import plan_training, print_training

        plan = plan_training(*_checked(call), call.settings("plan"))
        print_training(call.console, plan)
        call.console.document(plan)
        return
    result = distilled(call, fresh)
    if result.rank == 0:  # the first process says it for all
        _print_result(call.console, result)


def distilled(call: Call, fresh: bool) -> DistillResult:
    """What the command does, without what it prints of the result. Raises: as `train`."""
    with ProgressLine("distill") as line:
        from dtpipe.pipeline.live.data import warnings

        config, data = _checked(call)
        for warning in warnings(call, config, data):
            call.console.note(warning)
        result = _train(config, data, lambda progress: _show(line, progress), fresh)
    if result.rank == 0:
        record_command(result.run_dir)
    return result


def _checked(call: Call) -> tuple[DistillConfig, TrainingData]:
    """The settings and the data, and a place to write to that is fit for it."""
    from dtpipe.distill.trainer import run_settings
    from dtpipe.pipeline.live.data import training_data

    config, data = training_data(call)
    run_settings(config).refuse_other_place()
    return config, data


def _train(config: DistillConfig, data: TrainingData, on_progress: OnTrainProgress, fresh: bool) -> DistillResult:
    """In this process, which may be one of torchrun's, or on Ray workers."""
    from dtpipe.distill.trainer import train, train_with_workers

    if config.run.train_workers is None:
        return train(config, data, on_progress, fresh)
    from dtpipe.extract.cluster.connection import connect, disconnect, has_gpus

    # What is wrong is said, and images are looked at, before workers start; this machine's GPUs are left to them.
    data.open_checked(config.model_copy(update={"run": config.run.model_copy(update={"device": "cpu"})}))
    connect(config.run.ray_address)
    try:
        gpus = has_gpus() and config.run.device != "cpu"
        return train_with_workers(config, config.run.train_workers, gpus, data, on_progress, fresh)
    finally:
        disconnect()


def _show(line: ProgressLine, progress: TrainProgress) -> None:
    losses = "  ".join(f"{name} {value:.4f}" for name, value in progress.losses.items() if "/" not in name)
    fit = f"  R2 {by_level}" if (by_level := _by_level(progress.losses)) else ""
    text = (
        f"{speed(progress)}  epoch {progress.epoch}/{progress.num_epochs}  {losses}{fit}  lr {progress.lr:.2e}  "
        f"{_shares(progress.shares)}"
    )
    line.update(progress.step, progress.num_steps, text + (f"  {progress.advice}" if progress.advice else ""))


def _by_level(losses: Mapping[str, float]) -> str:
    """R² of each level; empty without a regression."""
    values = {name.removeprefix("r2/"): value for name, value in losses.items() if name.startswith("r2/")}
    return "  ".join(f"{level} {value:.2f}" for level, value in values.items())


def _shares(shares: Mapping[str, float]) -> str:
    """Where the time went, what took next to nothing left out."""
    return ", ".join(f"{share:.0%} {name}" for name, share in shares.items() if share >= SHOWN_SHARE)


def _print_result(console: Console, result: DistillResult) -> None:
    course = f"{count_of(result.num_steps, 'step')}, {count_of(result.num_epochs, 'epoch')} of "
    course += count_of(result.num_samples, "sample")
    course += f", peak learning rate {result.peak_lr:g}"
    course += f", on {result.num_ranks} devices" if result.num_ranks > 1 else ""
    course += f", from step {result.resumed_step}" if result.resumed_step else ""
    console.pairs(
        {
            "run": result.run_dir,
            "checkpoint": result.checkpoint,
            "trained": course,
            "losses": "  ".join(f"{name} {value:.4f}" for name, value in result.losses.items() if "/" not in name)
            or "-",
            **({"R2": by_level} if (by_level := _by_level(result.losses)) else {}),
            "took": f"{format_seconds(result.seconds)}, {result.throughput_img_s:.1f} img/s ({_shares(result.shares)})",
        }
    )
    if any(name.startswith("r2/") and value < 0 for name, value in result.losses.items()):
        console.result("R2 below 0 is worse than predicting the mean: train for more steps, or at another --lr")
    console.result(f"next: dtpipe eval {result.run_dir} probe --images LABELLED")
    console.result(f"      dtpipe export {result.run_dir} --out student/")
    console.document(result)
