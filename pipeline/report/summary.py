"""What stands on top of the page about a run: is it better than no training, and when, where and how it was made."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.downstream.extractors import RANDOM_INIT
from dtpipe.distill.downstream.paired import PairedDifference, difference_of
from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import format_seconds
from dtpipe.pipeline.report.history import read_commands
from dtpipe.pipeline.report.section import Section, render
from dtpipe.pipeline.report.tasks.results import TaskResult, task_results
from dtpipe.pipeline.report.training import Metrics


def summary_section(run: Path) -> Iterator[Section]:
    """A sentence for each task; nothing before any was scored."""
    sentences = [said for result in task_results(run, _silently) for said in against_random(result)]
    if sentences:
        yield Section("Verdict", render("summary.html", sentences=sentences))


def _silently(_what: str, _err: DtpipeError) -> None:
    """The section of the tasks says what cannot be read."""


def against_random(result: TaskResult) -> Iterator[tuple[bool, str]]:
    """For each arm asked about, that it is not worse than its random initialisation, and by how much, in a sentence.

    From the largest number of labelled images. Better or worse is what the 95 % interval of the paired differences
    says; deviations are those of the two arms over the seeds, pooled.
    """
    num = result.numbers[-1]
    other = result.arms.get(RANDOM_INIT, {}).get(num)
    for name in result.subjects:
        own = result.arms.get(name, {}).get(num)
        if own is None or other is None:
            continue
        difference = own.mean - other.mean
        unclear = _holds_zero(difference_of(name, RANDOM_INIT, num, own.by_seed, other.by_seed))
        clear = "better than" if difference > 0 else "worse than" if difference < 0 else "as good as"
        sentence = (
            f"{name} is {'not seen to differ from' if unclear else clear} {RANDOM_INIT} at {result.task} from "
            f"{count_of(num, 'labelled image')}: {result.metric} {own.mean:.3f} against {other.mean:.3f}"
        )
        if own.std is None or other.std is None:
            yield difference >= 0, f"{sentence}; one seed, which says nothing of chance."
            continue
        deviation = math.sqrt((own.std**2 + other.std**2) / 2)
        by = f"{abs(difference) / deviation:.1f} standard deviations of the seeds" if deviation else "with no spread"
        yield unclear or difference >= 0, f"{sentence}, {by}."


def _holds_zero(difference: PairedDifference | None) -> bool:
    if difference is None or difference.low is None or difference.high is None:
        return False
    return difference.low <= 0 <= difference.high


def context_of(run: Path, settings: DistillConfig, metrics: Metrics) -> dict[str, str]:
    """When, how long, where and with which versions; as far as the run's own records say."""
    try:
        records = read_commands(run)
    except DtpipeError:
        records = []
    trained = [record for record in records if " distill " in f"{record.get('command', '')} "] or records
    facts: dict[str, str] = {}
    if trained:
        facts["trained"] = str(trained[-1]["time"])[:10]
    if seconds := training_seconds(metrics, settings.batch_size):
        facts["duration"] = format_seconds(seconds)
    return facts | _machine(trained)


def _machine(records: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    if not records:
        return {}
    last = records[-1]
    versions = {"dtpipe": last.get("dtpipe"), **(last.get("versions") or {})}
    named = ", ".join(f"{name} {version}" for name, version in versions.items() if version)
    return {**({"hardware": last["machine"]} if last.get("machine") else {}), **({"versions": named} if named else {})}


def training_seconds(metrics: Metrics, batch_size: int) -> float:
    """Seconds of all steps, from the rates of the lines: those between two processes of one run are not counted."""
    seconds, before = 0.0, 0
    for line in metrics:
        if line["throughput_img_s"] > 0:
            seconds += max(0, line["step"] - before) * batch_size / line["throughput_img_s"]
        before = line["step"]
    return seconds
