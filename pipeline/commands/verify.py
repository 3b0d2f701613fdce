"""`dtpipe verify`: is a feature dataset what was written?"""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any, get_args

import click

from dtpipe.manifests.errors import ConfigError, DtpipeError, IncompleteError, ProblemsFoundError
from dtpipe.manifests.schema import DeviceName
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Console, ProgressLine, format_bytes
from dtpipe.pipeline.cli.options import interruptible

if TYPE_CHECKING:
    from dtpipe.manifests.check.measured import Measured
    from dtpipe.manifests.check.verify import VerifyLevel, VerifyReport
    from dtpipe.pipeline.live.recompute import Recomputation
    from dtpipe.pipeline.soft_labels.recompute import LabelRecomputation

_LEVELS = ("listing", "digest", "decode", "recompute")  # those of `manifests.check.verify`, which help does not import
_MENDS = {
    "extract": "repair sends its shard back to work",
    "merge": "the next extract merges again",
    "rewrite": "repair writes it again",
    "source": "the next extract lists the source again",
    "fit": "the next extract fits again, and takes it if the very same comes out",
    "nobody": "put back a copy",
}
DEVICES = get_args(DeviceName)
SHOWN_PROBLEMS = 20
HELP = """Check a feature dataset against its manifest.

Levels, each with those before it: listing (metadata, names and sizes), digest (every object's bytes), decode (every
chunk), recompute (run the teacher again on a few samples). --repair sends damaged shards back to work; the next extract
writes just those. What it replaces is kept beside it, and where the files do not agree of which extraction they are, it
changes nothing.

\b
Example:
  dtpipe verify features/
  dtpipe verify features/ --level recompute --rows 64
  dtpipe verify features/ --repair
"""


@click.command("verify", help=HELP)
@click.argument("url")
@click.option(
    "--level",
    type=click.Choice(_LEVELS),
    metavar="|".join(_LEVELS),
    default="digest",
    show_default=True,
    help="How deep to look.",
)
@click.option("--repair", is_flag=True, help="Send damaged shards back to work; deletes nothing.")
@click.option(
    "--rows", default=16, show_default=True, type=click.IntRange(1), metavar="N", help="Samples to recompute."
)
@click.option(
    "--tolerance",
    default=1e-3,
    show_default=True,
    type=float,
    metavar="X",
    help="Relative error allowed when recomputing, beyond what the codec states.",
)
@click.option("--teacher", metavar="PATH|NAME", help="Teacher to recompute with, if it has moved since the extraction.")
@click.option("--interpreter", metavar="DIR", help="Interpreter to recompute soft labels with, if it has moved since.")
@click.option(
    "--device",
    type=click.Choice(DEVICES),
    metavar="|".join(DEVICES),
    default="auto",
    show_default=True,
    help="Where to recompute.",
)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(
    url: str,
    level: VerifyLevel,
    repair: bool,
    rows: int,
    tolerance: float,
    teacher: str | None,
    interpreter: str | None,
    device: str,
    as_json: bool,
) -> None:
    """Verify, or repair, and exit with 4 when something is wrong, 5 when work is left."""
    console = Console(as_json)
    if repair:
        if level == "recompute":
            raise ConfigError("--repair works on stored bytes; choose --level listing, digest or decode")
        with interruptible("what was put aside so far is beside it as .rejected; run the same command to go on"):
            _repair(console, url, level)
        return
    with interruptible("nothing was changed"), ProgressLine("verify"):
        from dtpipe.manifests.check.verify import verify

        recompute = _recomputation(url, teacher, interpreter, device) if level == "recompute" else None
        report = verify(url, level, recompute, rows, tolerance)
    measured = recompute.measured if recompute else None
    _print(console, report, measured)
    console.document({**_document(report), "flip_error": measured.flip_error if measured else {}})
    outcome = _outcome(report)
    if outcome is not None:
        raise outcome


def _recomputation(
    url: str, teacher: str | None, interpreter: str | None, device: str
) -> Recomputation | LabelRecomputation:
    from dtpipe.pipeline.live.recompute import Recomputation
    from dtpipe.pipeline.soft_labels import recompute as of_labels

    labels = of_labels.holds_labels(url)
    if interpreter is not None and not labels:
        raise ConfigError(f"{url} holds no soft labels; leave --interpreter out")
    again = partial(of_labels.LabelRecomputation, interpreter=interpreter) if labels else Recomputation
    return again(url, teacher, device)


def _print(console: Console, report: VerifyReport, measured: Measured | None = None) -> None:
    state = "complete" if report.complete else f"unfinished, {count_of(report.num_shards_missing, 'shard')} missing"
    checked = ", ".join(
        (count_of(report.num_shards, "shard"), count_of(report.num_objects, "object"), format_bytes(report.size_bytes))
    )
    if report.num_chunks:
        checked += f", {count_of(report.num_chunks, 'chunk')} decoded"
    console.pairs({"dataset": report.url, "state": state, "checked": f"{checked} (level {report.level})"})
    if report.max_relative_error:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in report.max_relative_error.items())
        console.result(f"recomputed {count_of(report.num_recomputed, 'sample')}; largest relative error: {errors}")
    if measured is not None:
        from dtpipe.pipeline.live.flip_error import format_errors

        errors = format_errors(measured.flip_error)
        console.result(f"mirrored features instead of encoded flips would have relative error: {errors}")
    if report.strays:
        num = count_of(len(report.strays), "object")
        console.result(f"{num} that belong to nothing and do no harm, e.g. {report.strays[0]}")
    for problem in report.problems[:SHOWN_PROBLEMS]:
        console.result(f"problem: {_words(problem.name, problem.what, problem.mend)}")
    if len(report.problems) > SHOWN_PROBLEMS:
        console.result(f"and {len(report.problems) - SHOWN_PROBLEMS} more; --json lists them all")
    console.result("nothing is wrong" if report.ok else count_of(len(report.problems), "problem"))


def _words(name: str, what: str, mend: str) -> str:
    """A problem: where, what, and who puts it right."""
    return f"{name}: {what} ({_MENDS[mend]})"


def _document(report: VerifyReport) -> dict[str, Any]:
    return {**asdict(report), "max_relative_error": dict(report.max_relative_error), "ok": report.ok}


def _outcome(report: VerifyReport) -> DtpipeError | None:
    if report.problems:
        hopeless = all(problem.mend == "nobody" for problem in report.problems)
        remedy = f"run `dtpipe verify --repair {report.url}`, then extract again"
        return ProblemsFoundError(
            f"{report.url} has {count_of(len(report.problems), 'problem')}; "
            f"{'repair can mend none of them: put back a copy, or what is missing' if hopeless else remedy}"
        )
    if not report.complete:
        return IncompleteError(f"{report.url} is unfinished; run the same `dtpipe extract` again")
    return None


def _repair(console: Console, url: str, level: VerifyLevel) -> None:
    with ProgressLine("repair"):
        from dtpipe.manifests.check.repair import repair

        result = repair(url, level)
    shards = ", ".join(map(str, result.shards)) or "none"
    console.pairs(
        {"dataset": result.url, "sent back": f"shards {shards}", "rewritten": ", ".join(result.rewritten) or "nothing"}
    )
    for name, kept in result.kept.items():
        console.result(f"put aside: {name}, now {kept}")
    for problem in result.left:
        console.result(f"left: {_words(problem.name, problem.what, problem.mend)}")
    if result.shards or result.left:
        console.result("next: run the same `dtpipe extract` again; it writes what is missing and merges")
    console.document(result)
