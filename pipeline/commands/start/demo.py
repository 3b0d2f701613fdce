"""`dtpipe demo`: everything once, on digit scenes or on the user's own folder."""

from __future__ import annotations

from dtpipe.pipeline.cli.options import Call, Flag, settings_command

FLAGS = (
    Flag("--out", "demo.out", "DIR"),
    Flag("--images", "demo.images", "DIR"),
    Flag("--teacher", "demo.teacher", "PATH|NAME"),
    Flag("--num-images", "demo.num_images", "N"),
    Flag("--epochs", "demo.epochs", "N"),
    Flag("--teacher-steps", "demo.teacher_steps", "N"),
    Flag("--workers", "demo.workers", "N"),
    Flag("--seed", "demo.seed", "N"),
)
EXAMPLE = """
dtpipe demo
dtpipe demo --images photos/ --out demo-photos
"""


@settings_command(
    "demo",
    FLAGS,
    EXAMPLE,
    dry_run=False,
    switches={"--fresh": "Empty the folder of an earlier demo first; default: go on with it."},
    whole="the steps that are finished are kept; run the same command to go on",
)
def command(call: Call, fresh: bool) -> None:
    """Run everything on digit scenes, or on your own folder.

    Runs extract, verify, distill, eval and report as you would, and prints each command line. With --images, trains a
    small teacher of your images first, and scores with a class probe if they lie in class folders. An interrupted demo,
    run again, goes on where it stopped.
    """
    config = call.settings("demo")
    from dtpipe.pipeline.demo.run import print_result, run_demo

    print_result(call.console, run_demo(config, call.console, fresh))
