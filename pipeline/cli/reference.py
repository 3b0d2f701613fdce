"""The command reference `docs/cli.md`, made from the commands' own help.

`python -m dtpipe.pipeline.cli.reference docs/cli.md` writes it; a test holds that it is fresh.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from dtpipe.pipeline.cli.main import COMMANDS, main

WIDTH = 110
_HEAD = """# Commands

`dtpipe COMMAND --help` says the same. Flags are short for config keys; `-s KEY=VALUE` reaches all keys.
This page is made by `python -m dtpipe.pipeline.cli.reference docs/cli.md`.
"""


def help_text(name: str) -> str:
    """The help page of one command, as a wide terminal shows it."""
    width: dict[str, Any] = {"max_content_width": WIDTH, "terminal_width": WIDTH}
    settings = {**main.context_settings, **width}  # as `main` itself gives its commands
    group = click.Context(main, info_name="dtpipe", **settings)
    command = main.get_command(group, name)
    assert command is not None
    return command.get_help(click.Context(command, info_name=name, parent=group, **width))


def reference() -> str:
    """The whole page, Markdown."""
    sections = (f"## dtpipe {name}\n\n```text\n{help_text(name)}\n```\n" for name in COMMANDS)
    return "\n".join((_HEAD, *sections))


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), encoding="utf-8")
