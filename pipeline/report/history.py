"""Which commands wrote into a run folder: one JSON line each in commands.jsonl, for the report and for people."""

from __future__ import annotations

import os
import sys
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dtpipe.manifests.records.lines import append_line, keep_lines, read_lines
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.options import command_line

_FILE = "commands.jsonl"


def record_command(run: Path) -> None:
    """Append the running command line to the run's history.

    Raises: DamagedDataError as `read_commands`; StoreError when it cannot be written.
    """
    path = run / _FILE
    if path.exists():
        keep_lines(path, read_lines(path))  # without what a power cut left of the last
    record = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": command_line(),
        "dtpipe": version("dtpipe"),
        "versions": {name: version(name) for name in ("torch", "timm")},
        "machine": machine(),
    }
    append_line(path, record)


def machine() -> str:
    """What this process may compute on: `2 CPU cores`, or the GPUs there are."""
    cores = count_of(os.cpu_count() or 1, "CPU core")
    torch = sys.modules.get("torch")  # a command that never loaded it had no GPU
    if torch is None or not torch.cuda.is_available():
        return cores
    names = [torch.cuda.get_device_name(idx) for idx in range(torch.cuda.device_count())]
    gpus = ", ".join(f"{names.count(name)} {name}" for name in dict.fromkeys(names))
    return f"{gpus}, {cores}"


def read_commands(run: Path) -> list[dict[str, Any]]:
    """The recorded commands, oldest first; none for a run made without the command line.

    Raises: DamagedDataError naming file and line for one that was changed.
    """
    return [line.record for line in read_lines(run / _FILE)]
