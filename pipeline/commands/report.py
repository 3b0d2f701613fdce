"""`dtpipe report`: one HTML page about a run."""

from __future__ import annotations

from dtpipe.pipeline.cli.console import ProgressLine
from dtpipe.pipeline.cli.options import Call, Flag, settings_command

FLAGS = (
    Flag("run", "report.run", "RUN..."),
    Flag("--out", "report.out", "FILE"),
    Flag("--num-images", "report.num_images", "N"),
    Flag("--clusters", "report.clusters", "K"),
    Flag("--timesteps", "report.timesteps", "T,T"),
    Flag("--teacher", "report.teacher", "PATH|NAME"),
    Flag("--num-samples", "report.num_samples", "N"),
    Flag("--sample-steps", "report.sample_steps", "N"),
)
EXAMPLE = """
dtpipe report runs/r50
dtpipe report runs/r50 --teacher teacher/ --out r50.html
dtpipe report runs/r50 runs/r50-untrained --out both.html
"""


@settings_command(
    "report",
    FLAGS,
    EXAMPLE,
    dry_run=False,
    whole="no page was written, and one of before is as it was; nothing else is changed",
)
def command(call: Call) -> None:
    """Write one HTML page about a run, or about several beside each other.

    Verdicts and scores of tasks, training curves, maps of what teacher and student see, samples of the teacher, and the
    commands and settings behind them. Of several runs: settings that differ, curves and scores together, maps of the
    same images.
    """
    config = call.settings("report")
    with ProgressLine("report"):
        from dtpipe.pipeline.report.page import write_report

        path = write_report(config, call.console.note)
    call.console.result(f"wrote {path}")
    call.console.document({"path": str(path)})
