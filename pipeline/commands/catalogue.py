"""`dtpipe list`: names that other commands take."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import click

from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.cli.names import LISTED, Published, catalogue, published, teacher_options

HELP = """Name the teachers, sources, layouts, codecs, tasks, presets, regressors, losses, exports, trackers, students.

\b
Example:
  dtpipe list
  dtpipe list students --match 'convnext*'
  dtpipe list teachers --match adm-imagenet
"""


@click.command("list", help=HELP)
@click.argument("kind", type=click.Choice(LISTED), required=False)
@click.option("--match", metavar="GLOB", help="Only names that match.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(kind: str | None, match: str | None, as_json: bool) -> None:
    """Print the names of one kind, or of all kinds but the hundreds of students."""
    console = Console(as_json)
    document: dict[str, Any] = {**catalogue(kind, match)}
    for name, rows in document.items():
        if rows:
            console.result(f"{name}:")
        width = max(map(len, rows), default=0)
        for entry, text in rows.items():
            console.result(f"  {entry:<{width}} {text}".rstrip())
    if kind == "teachers":
        checkpoints = published(match)
        _print_published(console, checkpoints)
        if match:
            _print_details(console, {*document["teachers"], *(entry.kind for entry in checkpoints)}, checkpoints)
        else:
            console.result("\noptions of a family, and where a checkpoint is from: `dtpipe list teachers --match NAME`")
        document["published"] = [checkpoint.to_json() for checkpoint in checkpoints]
    if match and not any(document.values()):
        console.note(f"no name matches {match!r}; `dtpipe list` shows what there is")
    if kind is None:
        console.result(
            "students: timm's models; `dtpipe list students` names them and says at which strides each gives levels"
        )
    console.document(document)


def _print_details(console: Console, kinds: Collection[str], checkpoints: Sequence[Published]) -> None:
    """The settings of families, wrapped, and the addresses of checkpoints."""
    options = {kind: text for kind, text in teacher_options().items() if kind in kinds}
    if options:
        console.result("\noptions, as -s extract.teacher.options.NAME=VALUE:")
    for kind, text in options.items():
        console.result(click.wrap_text(text, 110, f"  {kind:<16} ", " " * 19))
    if checkpoints:
        console.result("\nfrom:")
    for entry in checkpoints:
        console.result(f"  {entry.name}: {entry.url}")


def _print_published(console: Console, checkpoints: Sequence[Published]) -> None:
    """Checkpoints that go by name; `size` is of float16 features and the image, of one view."""
    if not checkpoints:
        return
    console.result("\npublished: give the name as --teacher; it is fetched once, from where its authors put it")
    console.table(
        ("name", "kind", "px", "levels and channels", "per image", "licence", "here"),
        [
            (entry.name, entry.kind, "x".join(map(str, entry.px)), entry.levels, entry.size, entry.licence, entry.here)
            for entry in checkpoints
        ],
    )
