"""Which commands made a run: one JSON line each in its commands.jsonl, and the command that a dataset's settings amount to."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dtpipe.pipeline.options import Flag, command_line
from dtpipe.pipeline.resolve import find_field, section_model

FILE = "commands.jsonl"


def record_command(run: Path) -> None:
    """Append the running command line to the run's history."""
    record = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "command": command_line(), "dtpipe": version("dtpipe")}
    with (run / FILE).open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


def read_commands(run: Path) -> list[dict[str, Any]]:
    """The recorded commands, oldest first; none for a run made without the command line."""
    path = run / FILE
    if not path.is_file():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]


def rebuild_command(command: str, section: str, settings: Mapping[str, Any], flags: Sequence[Flag]) -> str:
    """The command line that gives these resolved settings: whatever differs from its default, as a flag where there is one."""
    names = {flag.key: flag.name for flag in flags}
    model = section_model(section)
    words = ["dtpipe", command]
    for key, value in _flat(settings):
        field = find_field(model, key)
        if field is not None and value == _plain(field.get_default(call_default_factory=True)):
            continue
        flag = names.get(f"{section}.{key}")
        if flag is None:
            words += ["-s", f"{section}.{key}={value if isinstance(value, str) else json.dumps(value)}"]
        elif isinstance(value, bool):
            words.append(flag if value else f"--no-{flag[2:]}")
        else:
            words += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
    return shlex.join(words)


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    pairs: list[tuple[str, Any]] = []
    for name, value in settings.items():
        pairs += _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + name, value)]
    return pairs


def _plain(default: Any) -> Any:
    return list(default) if isinstance(default, tuple) else default
