"""`dtpipe eval`: scores of a student with few labels, its features frozen or the whole trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline.cli.console import ProgressLine
from dtpipe.pipeline.cli.options import Call, Flag, settings_command
from dtpipe.pipeline.report.history import record_command

if TYPE_CHECKING:
    from dtpipe.pipeline.evaluate import Evaluation

FLAGS = (
    Flag("checkpoint", "eval.checkpoint", "RUN...", repeatable=True),
    Flag("task", "eval.task", "TASK"),
    Flag("--images", "eval.images", "URL|NAME:ROOT@SPLIT"),
    Flag("--masks", "eval.masks", "URL"),
    Flag("--foreground", "eval.foreground"),
    Flag("--ignore-value", "eval.ignore_value", "0..255|null"),
    Flag("--class-names", "eval.class_names", "FILE"),
    Flag("--keys", "eval.keys", "FILE"),
    Flag("--test-images", "eval.test_images", "URL|NAME:ROOT@SPLIT"),
    Flag("--test-masks", "eval.test_masks", "URL"),
    Flag("--test-share", "eval.test_share", "SHARE"),
    Flag("--resplit", "eval.resplit"),
    Flag("--labelled", "eval.labelled", "N,N,all"),
    Flag("--seeds", "eval.seeds", "N"),
    Flag("--compare", "eval.compare", "ARM", repeatable=True, aliases=("--against",)),
    Flag("--teacher", "eval.teacher", "PATH|NAME"),
    Flag("--timestep", "eval.timestep", "T"),
    Flag("--px", "eval.px", "PX"),
    Flag("--resize", "eval.resize", "center_crop|stretch|none"),
    Flag("--limit", "eval.limit", "N"),
    Flag("--steps", "eval.tune.steps", "N"),
    Flag("--epochs", "eval.tune.epochs", "N"),
    Flag("--batch-size", "eval.tune.batch_size", "N"),
    Flag("--lr", "eval.tune.lr", "LR"),
    Flag("--lr-grid", "eval.tune.lr_grid", "LR,LR"),
    Flag("--backbone-lr", "eval.tune.backbone_lr", "SHARE"),
    Flag("--train-workers", "eval.tune.run.train_workers", "N"),
    Flag("--device", "eval.device", "auto|cpu|cuda|mps"),
    Flag("--out", "eval.out", "FILE"),
    Flag("--add-to", "eval.add_to", "FILE"),
)
EXAMPLE = """
dtpipe eval runs/r50 probe --images labelled/
dtpipe eval runs/r50 readout --images scenes/images --masks scenes/semantic --foreground --labelled 5,20,80
dtpipe eval runs/s0 runs/s1 runs/s2 knn --images labelled/ --compare untrained=runs/u0,runs/u1,runs/u2
dtpipe eval runs/r50 probe --images labelled/ --compare dino=resnet50@dino_resnet50_pretrain.pth
dtpipe eval runs/r50 finetune -c finetune_small --images labelled/ --labelled 50,all --lr-grid 3e-4,1e-3,3e-3
dtpipe eval runs/r50 finetune -c finetune_resnet50 --images imagenet:data@train --test-images imagenet:data@val -n
"""


@settings_command(
    "eval",
    FLAGS,
    EXAMPLE,
    switches={"--levels": "Show every level, not only the best of each."},
    whole="no result was written; trainings that are finished are kept, and the same command goes on from them",
)
def command(call: Call, levels: bool) -> None:
    """Score a student with few labels: its features frozen, or backbone and head trained.

    TASK is, on frozen features, probe or knn (of classes) or readout (of masks); trained: linear, finetune (classes),
    fcn, segment, few-labels (masks), detect (objects), panoptic (segments). `dtpipe list tasks` says more.

    Always beside the random initialisation of the same student; of frozen features also beside raw pixels and, when it
    can be had, the teacher. Run it again after a crash: trainings that are finished are read, and the others go on.
    Tasks that train do so on several GPUs under torchrun, or with --train-workers as Ray workers, which need the output
    on a disk that all nodes share.
    """
    _see_task(call)
    if call.dry_run:
        from dtpipe.pipeline.plan.tuning import plan_tuning, print_tuning

        plan = plan_tuning(call.settings("eval"), call.console.note)
        print_tuning(call.console, plan)
        call.console.document(plan)
        return
    evaluation = scored(call)
    if evaluation.rank:
        return
    call.console.result(evaluation.result.to_table(levels))
    call.console.result(f"wrote {evaluation.path}")
    if evaluation.path.parent.name == "eval":
        call.console.result(f"next: dtpipe report {evaluation.path.parent.parent}")
    call.console.document(evaluation.result.to_json())


def _see_task(call: Call) -> None:
    """Raises: ConfigError where the last word is no task, such as when only a run was given."""
    given = call.document.get("eval") or {}
    if "checkpoint" in given or not isinstance(task := given.get("task"), str):
        return
    from dtpipe.distill.downstream.registry import TASKS

    if task not in TASKS:
        tasks = ", ".join(sorted(TASKS))
        raise ConfigError(
            f"no task is given, only {task}; write it after the run, as in "
            f"`dtpipe eval {task} probe --images LABELLED`; tasks: {tasks}"
        )


def scored(call: Call) -> Evaluation:
    """What the command does, without what it prints of the result. Raises: as `evaluate`."""
    config = call.settings("eval")
    with ProgressLine("eval"):
        from dtpipe.pipeline.arms import runs_of
        from dtpipe.pipeline.evaluate import evaluate

        evaluation = evaluate(config, call.console.note)
    for run in map(Path, runs_of(config)) if evaluation.rank == 0 else ():
        if run.is_dir():
            record_command(run)
    return evaluation
