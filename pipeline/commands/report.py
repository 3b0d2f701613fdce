"""`dtpipe report`: one HTML page about a run."""

from __future__ import annotations

from typing import Any

from dtpipe.pipeline.cli.console import ProgressLine
from dtpipe.pipeline.cli.options import Call, Flag, settings_command

FLAGS = (
    Flag("run", "report.run", "RUN|FEATURES..."),
    Flag("--out", "report.out", "FILE"),
    Flag("--join", "report.join"),
    Flag("--samples", "report.samples", "N"),
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
dtpipe report features/
dtpipe report features/ labels/ --join --samples 1000
"""


@settings_command(
    "report",
    FLAGS,
    EXAMPLE,
    dry_run=False,
    whole="no page was written, and one of before is as it was; nothing else is changed",
)
def command(call: Call) -> None:
    """Write one HTML page about a run, about several beside each other, or about a feature dataset.

    Verdicts and scores of tasks, training curves, maps of what teacher and student see, samples of the teacher, and the
    commands and settings behind them. Of several runs: settings that differ, curves and scores together, maps of the
    same images. Of a dataset: is it one to train on? A verdict from a sample of it: dead and exploding channels, noise
    between draws, drift over shards, effective rank, what levels say of each other, bytes and errors, labels, bad
    samples; --json has the figures.
    """
    config = call.settings("report")
    with ProgressLine("report"):
        from dtpipe.pipeline.report.dataset.page import datasets_of
        from dtpipe.pipeline.report.page import write_dataset_report, write_report

        document: dict[str, Any] = {}
        if datasets_of(config):
            path, document = write_dataset_report(config, call.console.note)
        else:
            path = write_report(config, call.console.note)
    for finding in document.get("findings", ()):
        call.console.result(f"{finding['severity']}: {finding['text']}")
    if "verdict" in document:
        call.console.result(document["verdict"])
    call.console.result(f"wrote {path}")
    call.console.document({"path": str(path), **document})
