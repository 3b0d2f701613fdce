"""Commands in this process, as a user types them."""

from __future__ import annotations

import json
from typing import Any

from click.testing import CliRunner

from dtpipe.pipeline.cli.main import main


class RefusedError(Exception):
    """A command ended with another exit code than 0; its one line of why, and the code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def dtpipe(*words: object) -> Any:
    """The JSON document that a command answers. Raises: RefusedError."""
    return json.loads(said(*words, "--json"))


def said(*words: object) -> str:
    """What a command prints on stdout. Raises: RefusedError."""
    result = CliRunner().invoke(main, list(map(str, words)))
    if result.exit_code:
        raise RefusedError(result.stderr or result.output, result.exit_code)
    return result.stdout
