"""`dtpipe eval`: scores of frozen features with few labels."""

from __future__ import annotations

from pathlib import Path

from dtpipe.pipeline.cli.options import Call, Flag, settings_command
from dtpipe.pipeline.report.history import record_command

FLAGS = (
    Flag("checkpoint", "eval.checkpoint", "RUN...", repeatable=True),
    Flag("task", "eval.task", "TASK"),
    Flag("--images", "eval.images", "URL|NAME:ROOT@SPLIT"),
    Flag("--masks", "eval.masks", "URL"),
    Flag("--foreground", "eval.foreground"),
    Flag("--ignore-value", "eval.ignore_value", "0..255|null"),
    Flag("--class-names", "eval.class_names", "FILE"),
    Flag("--test-images", "eval.test_images", "URL|NAME:ROOT@SPLIT"),
    Flag("--test-masks", "eval.test_masks", "URL"),
    Flag("--test-share", "eval.test_share", "SHARE"),
    Flag("--labelled", "eval.labelled", "N,N,all"),
    Flag("--seeds", "eval.seeds", "N"),
    Flag("--compare", "eval.compare", "ARM", repeatable=True, aliases=("--against",)),
    Flag("--teacher", "eval.teacher", "PATH|NAME"),
    Flag("--timestep", "eval.timestep", "T"),
    Flag("--px", "eval.px", "PX"),
    Flag("--resize", "eval.resize", "center_crop|stretch|none"),
    Flag("--limit", "eval.limit", "N"),
    Flag("--device", "eval.device", "auto|cpu|cuda"),
    Flag("--out", "eval.out", "FILE"),
)
EXAMPLE = """
dtpipe eval runs/r50 probe --images labelled/
dtpipe eval runs/r50 readout --images scenes/images --masks scenes/semantic --foreground --labelled 5,20,80
dtpipe eval runs/s0 runs/s1 runs/s2 knn --images labelled/ --compare untrained=runs/u0,runs/u1,runs/u2
dtpipe eval runs/r50 probe --images labelled/ --compare dino=resnet50@dino_resnet50_pretrain.pth
"""


@settings_command(
    "eval", FLAGS, EXAMPLE, dry_run=False, switches={"--levels": "Show every level, not only the best of each."}
)
def command(call: Call, levels: bool) -> None:
    """Score frozen features with few labels.

    Always beside raw pixels, the random initialisation of the same student and, when it can be had, the teacher.
    """
    config = call.settings("eval")
    from dtpipe.pipeline.arms import runs_of
    from dtpipe.pipeline.evaluate import evaluate

    evaluation = evaluate(config, call.console.note)
    for run in map(Path, runs_of(config)):
        if run.is_dir():
            record_command(run)
    call.console.result(evaluation.result.to_table(levels))
    call.console.result(f"wrote {evaluation.path}")
    call.console.document(evaluation.result.to_json())
