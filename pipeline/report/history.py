"""Which commands wrote into a run folder: one JSON line each in commands.jsonl, for the report and for people."""

from __future__ import annotations

import json
import os
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dtpipe.manifests.documents import Refusal, read_utf8
from dtpipe.manifests.errors import InputError
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
    if not os.path.lexists(path):
        return []
    lines = read_utf8(path, Refusal(InputError, "move it away: it says which commands wrote here")).splitlines()
    return [record for line in lines if (record := _record(line))]


def _record(line: str) -> dict[str, Any] | None:
    """None for what a kill left of a line."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) and isinstance(record.get("command"), str) else None
