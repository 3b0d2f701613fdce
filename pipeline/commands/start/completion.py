"""`dtpipe completion`: what makes a shell complete commands, flags and names."""

from __future__ import annotations

import click

SHELLS = ("bash", "zsh", "fish")
HELP = """Print what makes a shell complete commands, flags and names.

Presets, students, published teachers, levels of a dataset and config keys complete too, and files where a place is
asked for.

\b
Example:
  dtpipe completion bash  # into ~/.local/share/bash-completion/completions/dtpipe
  dtpipe completion zsh   # into _dtpipe in a folder of $fpath
  dtpipe completion fish  # into ~/.config/fish/completions/dtpipe.fish
"""


@click.command("completion", help=HELP)
@click.argument("shell", type=click.Choice(SHELLS))
def command(shell: str) -> None:
    """Print click's script of a shell; it asks `dtpipe` itself at each Tab."""
    from click.shell_completion import get_completion_class

    from dtpipe.pipeline.cli.main import main

    kind = get_completion_class(shell)
    assert kind is not None
    click.echo(kind(main, {}, "dtpipe", "_DTPIPE_COMPLETE").source())
