"""`dtpipe list`: names that other commands take."""

from __future__ import annotations

import click

from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.cli.names import KINDS, catalogue, published, teacher_options

HELP = """Name the teachers, sources, codecs, tasks, presets, regressors, losses, exports and students there are.

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
        width = max(map(len, rows), default=0)
        for entry, text in rows.items():
            console.result(f"  {entry:<{width}} {text}".rstrip())
    if kind == "teachers":
        _print_options(console, match)
        _print_published(console, match)
    if kind is None:
        console.result(
            "students: timm's models; `dtpipe list students` names them and says at which strides each gives levels"
        )
    console.document(
        {**found, "published": [each.to_json() for each in published(match)]} if kind == "teachers" else found
    )


def _print_options(console: Console, match: str | None) -> None:
    """What each family may be told, wrapped."""
    console.result("\noptions, as -s extract.teacher.options.NAME=VALUE:")
    for kind, text in teacher_options(match).items():
        console.result(click.wrap_text(text, 110, f"  {kind:<16} ", " " * 19))


def _print_published(console: Console, match: str | None) -> None:
    """Checkpoints whose names stand for their files; `size` is of float16 features and the image, of one view."""
    rows = published(match)
    if not rows:
        return
    console.result("\npublished: give the name as --teacher; it is fetched once, from where its authors put it")
    console.table(
        ("name", "kind", "px", "levels and channels", "per image", "licence", "here"),
        [
            (
                each.name,
                each.kind,
                f"{each.px[0]}x{each.px[1]}",
                each.levels,
                each.size,
                each.licence,
                "yes" if each.cached else "",
            )
            for each in rows
        ],
    )
    console.result("from:")
    for each in rows:
        console.result(f"  {each.name}: {each.url}")
