"""The command-line reference in README.md, made from the commands' own help.

`python -m dtpipe.pipeline.cli.reference README.md` writes it between the `<!-- cli -->` marks; a test holds that it is fresh.
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from dtpipe.pipeline.cli.main import COMMANDS, main

BEGIN, END = "<!-- cli -->", "<!-- /cli -->"
WIDTH = 110


def help_text(name: str) -> str:
    """The help page of one command, as a wide terminal shows it."""
    settings = {
        **main.context_settings,
        "max_content_width": WIDTH,
        "terminal_width": WIDTH,
    }  # as `main` itself gives its commands
    group = click.Context(main, info_name="dtpipe", **settings)
    command = main.get_command(group, name)
    assert command is not None
    context = click.Context(command, info_name=name, parent=group, max_content_width=WIDTH, terminal_width=WIDTH)
    return command.get_help(context)


def cli_reference() -> str:
    """Markdown with the help of every command, folded."""
    parts = [
        "`dtpipe COMMAND --help` says the same. Flags are short for config keys; `-s KEY=VALUE` reaches all keys.",
        "",
    ]
    for name, (_, summary) in COMMANDS.items():
        parts += [
            f"<details><summary><code>dtpipe {name}</code> {summary}</summary>",
            "",
            "```text",
            help_text(name),
            "```",
            "",
            "</details>",
        ]
    return "\n".join(parts)


def with_reference(readme: str) -> str:
    """README's text with the reference of today between its marks."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{cli_reference()}\n{END}{after}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(with_reference(path.read_text(encoding="utf-8")), encoding="utf-8")
