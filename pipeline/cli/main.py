"""The command group `dtpipe`: finds commands without importing them, and turns errors into one line and an exit code.

A command's module is imported when the command is used; `dtpipe --help` imports click and nothing else of weight.
"""

from __future__ import annotations

import difflib
import importlib
import os
import sys
import traceback
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NoReturn

import click

from dtpipe.extract.allocator import keep_freed_memory
from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.manifests.store.faults import FAULT_VARIABLE, arm_spec
from dtpipe.manifests.store.paths import refuse_unwritable
from dtpipe.pipeline.cli.streams import keep_streams

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem

COMMANDS = {  # name: (module in dtpipe.pipeline.commands, one line for `dtpipe --help`), in the order of use
    "init": ("start.init", "Write settings, a Slurm script and a Ray job for your own data."),
    "list": ("catalogue", "Name the teachers, sources, codecs, tasks, presets and students there are."),
    "doctor": ("doctor", "Check this machine, a store, a teacher."),
    "train-teacher": ("train_teacher", "Train a small DDPM on your own images."),
    "plan": ("plan", "Bytes, hours and memory of an extraction, before anything is spent."),
    "extract": ("extract", "Run a teacher over images and write a feature dataset."),
    "inspect": ("inspect", "Show what a feature dataset holds."),
    "verify": ("verify", "Check a feature dataset against its manifest."),
    "interpret": ("interpret", "Train a head that reads labels off a teacher's features."),
    "distill": ("distill", "Pre-train a student on feature datasets."),
    "eval": ("evaluate", "Score a student on labels: its features frozen, or the whole trained."),
    "export": ("export", "Write a student for timm, torchvision, detectron2 and others."),
    "predict": ("predict", "Predict with a tuned network on new images."),
    "report": ("report", "Write one HTML page about a run, several, or a dataset."),
    "demo": ("start.demo", "Run everything on digit scenes, or on your own folder."),
    "completion": ("start.completion", "Print what makes a shell complete commands, flags and names."),
}
INTERRUPTED = 130


class DtpipeGroup(click.Group):
    """A group whose commands are imported on use, and whose errors follow the table of exit codes."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002  click's signature
        """Names in the order in which one meets them."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002  click's signature
        """The command, imported now; None when there is none of this name."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"dtpipe.pipeline.commands.{COMMANDS[cmd_name][0]}")
        command: click.Command = module.command
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click's, but an unknown name is answered with the names there are."""
        if args and not args[0].startswith("-") and args[0] not in COMMANDS:
            near = difflib.get_close_matches(args[0], COMMANDS, n=1)
            ctx.fail(f"no command {args[0]!r}{f', did you mean {near[0]!r}?' if near else ''}")
        return super().resolve_command(ctx, args)

    def shell_complete(self, ctx: click.Context, incomplete: str) -> list[CompletionItem]:
        """Names of commands, without importing them; after a dash the group's own options."""
        from click.shell_completion import CompletionItem

        if incomplete.startswith("-"):
            return super().shell_complete(ctx, incomplete)
        return [CompletionItem(name, help=text) for name, (_, text) in COMMANDS.items() if name.startswith(incomplete)]

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:  # noqa: ARG002  click's signature
        """The list of commands, without importing them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        """Run a command line; in standalone mode, exit with the code its outcome calls for."""
        if not standalone_mode:
            return super().main(args, prog_name or "dtpipe", complete_var, False, **extra)
        keep_streams()
        keep_freed_memory()
        try:
            _refuse_odd(sys.argv[1:] if args is None else args)
            arm_spec(
                os.environ.get(FAULT_VARIABLE, "")
            )  # of tests of crashes; the environment is read here and nowhere else
            result = super().main(args, prog_name or "dtpipe", complete_var, False, **extra)
        except BaseException as err:
            _leave(err)
        sys.exit(result if isinstance(result, int) else 0)


def _refuse_odd(args: Sequence[str]) -> None:
    """Arguments that no record of the command can hold. Raises: ConfigError."""
    for arg in args:
        try:
            refuse_unwritable(arg)
        except ValueError as err:
            raise ConfigError(f"an argument{err}") from err


def _leave(err: BaseException) -> NoReturn:
    """Print what `err` asks for and exit with its code."""
    if isinstance(err, click.exceptions.Exit):
        sys.exit(err.exit_code)
    if isinstance(err, click.exceptions.NoArgsIsHelpError):
        err.show(sys.stderr)
        sys.exit(err.exit_code)
    if isinstance(err, click.ClickException):
        context = getattr(err, "ctx", None)
        path = context.command_path if context else "dtpipe"
        click.echo(f"error: {err.format_message().rstrip('.')}; `{path} --help` lists what there is", err=True)
        sys.exit(err.exit_code)
    if isinstance(err, click.Abort | KeyboardInterrupt):
        click.echo("stopped", err=True)
        sys.exit(INTERRUPTED)
    if isinstance(err, SystemExit):
        raise err
    if isinstance(err, DtpipeError):
        click.echo(f"error: {' '.join(str(err).split())}", err=True)
        sys.exit(err.exit_code)
    traceback.print_exception(err)
    sys.exit(1)


@click.group(
    "dtpipe", cls=DtpipeGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="dtpipe", prog_name="dtpipe")
def main() -> None:
    """Pre-train image backbones with the features of a generative teacher, offline.

    \b
    Try it:     dtpipe demo
    Your own:   dtpipe train-teacher --images photos/ --out teacher/
                dtpipe extract --images photos/ --teacher teacher/ --out features/
                dtpipe distill features/ --student resnet50 --out runs/r50
    """


if __name__ == "__main__":
    main()
