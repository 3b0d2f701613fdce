"""Which commands wrote into a run folder: one JSON line each in commands.jsonl, for the report and for people."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dtpipe.pipeline.cli.options import command_line

_FILE = "commands.jsonl"


def record_command(run: Path) -> None:
    """Append the running command line to the run's history."""
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "dtpipe": version("dtpipe"),
    }
    with (run / _FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_commands(run: Path) -> list[dict[str, Any]]:
    """The recorded commands, oldest first; none for a run made without the command line."""
    path = run / _FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
