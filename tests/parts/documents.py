"""The documents of the repository, and what is written in them."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import click

from dtpipe.pipeline.cli.main import main
from parts.paths import REPO

PAGES = [
    *(REPO / name for name in ("README.md", "CONTRIBUTING.md", "manifests/README.md")),
    *sorted((REPO / "docs").glob("*.md")),
]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.DOTALL | re.MULTILINE)


def blocks(text: str, *languages: str) -> list[str]:
    """Fenced blocks of some languages."""
    return [block for language, block in _FENCE.findall(text) if language in languages]


def commands_in(text: str) -> Iterator[list[str]]:
    """Command lines of dtpipe in a text, without comments; lines that end with a backslash go on."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line.removeprefix("$ "), comments=True) if "dtpipe " in line else []
        if "dtpipe" in words:
            yield words[words.index("dtpipe") + 1 :]
        elif words and words[0].endswith("/dtpipe"):
            yield words[1:]


def parse(words: list[str]) -> None:
    """Parse one command line without running it; click raises on an unknown command, flag or choice."""
    group = click.Context(main, info_name="dtpipe", **main.context_settings)
    command = main.get_command(group, words[0])
    assert command is not None, words[0]
    command.make_context(words[0], words[1:], parent=group)
