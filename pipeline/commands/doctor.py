"""`dtpipe doctor`: is everything here that the other commands need?"""

from __future__ import annotations

import click

from dtpipe.pipeline.cli.console import Console

HELP = """Check this machine, a store, a teacher.

Exits with the code of the first thing that is wrong; notes do not count.

\b
Example:
  dtpipe doctor
  dtpipe doctor --store s3://bucket/features --teacher teacher/
"""


@click.command("doctor", help=HELP)
@click.option("--store", metavar="URL", help="Write, read back and delete a probe there.")
@click.option("--teacher", metavar="PATH|NAME", help="Load it, on the CPU.")
@click.option("--ray-address", metavar="ADDRESS", help="Ray cluster to ask; default: RAY_ADDRESS, if set.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(store: str | None, teacher: str | None, ray_address: str | None, as_json: bool) -> None:
    """Run the checks and print one line for each."""
    from dtpipe.pipeline.doctor import examine

    console = Console(as_json)
    findings = examine(store, teacher, ray_address)
    console.table(("check", "state", "found"), [(finding.check, finding.state, finding.found) for finding in findings])
    for finding in findings:
        if finding.advice:
            console.result(f"{finding.check}: {finding.advice}")
    console.document(findings)
    wrong = [finding.exit_code for finding in findings if finding.state == "wrong"]
    if wrong:
        raise click.exceptions.Exit(wrong[0])
