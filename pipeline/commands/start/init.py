"""`dtpipe init`: the first files of a project of one's own."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline.cli.completion import completer
from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.cli.options import Call, interruptible
from dtpipe.pipeline.cli.settings import validate

HELP = """Write settings, a Slurm script and a Ray job for your own data.

Measures first, as `dtpipe plan` does, with the teacher itself on a few of your images, and writes the figures into the
files. In a terminal it asks for what is not given.

\b
Example:
  dtpipe init project/ --images photos/ --teacher teacher/ --student resnet50
  dtpipe init project/ --images s3://bucket/train --teacher adm-imagenet --student convnext_base --px 256 --gpus 8
"""
_ASKED = {
    "images": "Folder or URL of your images",
    "teacher": "Teacher: a path, or a name of `dtpipe list teachers`",
    "student": "Student, a timm model",
}


@click.command("init", help=HELP)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--images", metavar="URL", shell_complete=completer("extract.images", "URL"), help="Folder or URL of your images."
)
@click.option(
    "--teacher",
    metavar="PATH|NAME",
    shell_complete=completer("extract.teacher.path", "PATH|NAME"),
    help="Teacher: a path, or a name of `dtpipe list teachers`.",
)
@click.option(
    "--student",
    metavar="TIMM_NAME",
    shell_complete=completer("distill.student.name", "TIMM_NAME"),
    help="Backbone to pre-train; `dtpipe list students`.",
)
@click.option("--px", metavar="PX", type=click.IntRange(1), help="Side of the images; default: the teacher's own.")
@click.option("--timesteps", metavar="T,T", help="Of a diffusion teacher; default: its family's.")
@click.option("--flips", is_flag=True, help="Encode mirrored images too.")
@click.option("--epochs", metavar="N", default=100, show_default=True, type=click.IntRange(1), help="Of training.")
@click.option("--features", metavar="URL", help="Where features go; default: features in DIR.")
@click.option("--gpus", metavar="N", default=1, show_default=True, type=click.IntRange(1), help="Of a node.")
@click.option("--no-plan", is_flag=True, help="Measure nothing, such as where there is no GPU.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document on stdout.")
def command(folder: Path, no_plan: bool, as_json: bool, **given: Any) -> None:
    """Ask for what is missing, measure, write."""
    from dtpipe.pipeline.init.write import (
        Project,
        batch_size_for,
        refuse_existing,
        timesteps_of,
        write_project,
    )

    console = Console(as_json)
    refuse_existing(folder)
    for name, question in _ASKED.items():
        given[name] = given[name] or _ask(name, question)
    places = {name: _whole(name, given[name]) for name in ("images", "teacher", "features") if given[name]}
    timesteps = timesteps_of(given.pop("timesteps"))
    given |= places | {"features": places.get("features", "")}
    project = Project(folder.absolute(), timesteps=timesteps, **given)
    extraction = training = None
    validate(project.document(batch_size_for(None)), "extract", {})
    if not no_plan:
        from dtpipe.pipeline.commands.plan import plan_stages

        with interruptible("nothing was written"):
            plans = plan_stages(Call(project.document(batch_size_for(None)), False, console, {}), batch_size_for)
        extraction, training = plans["extract"], plans["distill"]
    num = None if extraction is None else extraction.num_samples
    paths = write_project(project, num, extraction, training)
    console.result(f"wrote {', '.join(map(str, paths))}")
    console.result(f"next: look at {paths[0]}, then dtpipe extract -c {paths[0]}")
    console.document({"files": paths, "extract": extraction, "distill": training})


def _ask(name: str, question: str) -> str:
    """From the person at the terminal. Raises: ConfigError where there is none."""
    if not sys.stdin.isatty():
        raise ConfigError(f"--{name} must be given")
    answer: str = click.prompt(question, err=True)
    return answer


def _whole(name: str, place: str) -> str:
    """A place from the root, since the files are used from anywhere; names stay names."""
    from dtpipe.manifests.store.paths import whole_if_there, whole_place

    whole = whole_if_there(place) if name == "teacher" else whole_place(place)
    assert whole is not None
    return whole
