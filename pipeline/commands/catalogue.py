"""`dtpipe list`: names that other commands take."""

from __future__ import annotations

import click

from dtpipe.pipeline.console import Console
from dtpipe.pipeline.listing import KINDS, catalogue

HELP = """Name the teachers, sources, codecs, tasks, presets and students there are.

\b
Example:
  dtpipe list
  dtpipe list students --match 'convnext*'
"""


@click.command(
    "list",
    help=HELP,
)
@click.argument("kind", type=click.Choice(KINDS), required=False)
@click.option("--match", metavar="GLOB", help="Only names that match.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(kind: str | None, match: str | None, as_json: bool) -> None:
    """Print the names of one kind, or of all kinds but the hundreds of students."""
    console = Console(as_json)
    found = catalogue(kind, match)
    for name, rows in found.items():
        console.result(f"{name}:")
        for entry, text in rows.items():
            console.result(f"  {entry:<16} {text}".rstrip())
    if kind is None:
        console.result("students: any timm model that gives features; `dtpipe list students` names them")
    console.document(found)
