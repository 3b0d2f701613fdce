"""Benchmarks that are made of dtpipe's commands: run, printed, and kept with the seconds they took.

Each command goes on where it was stopped, so a benchmark made of them does too.
"""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from common import REPO

from dtpipe.pipeline.demo.scenes import write_scenes

SECONDS, FINISHED, OBJECTS = "seconds.json", "finished.json", "digits.json"
Command = list[str]


def command_of(*words: object) -> Command:
    """A command of dtpipe, without its name."""
    return [str(word) for word in words]


def run(command: Sequence[str], work: Path) -> None:
    """Run one command, with its output on the terminal, and add to the seconds that it took so far."""
    line = written(command, work)
    print(f"\n$ {line}", flush=True)
    started = time.monotonic()
    try:
        subprocess.run([sys.executable, "-m", "dtpipe.pipeline.cli.main", *command], check=True)
    finally:
        spent = seconds(work)
        spent[line] = round(spent.get(line, 0.0) + time.monotonic() - started, 1)
        (work / SECONDS).write_text(json.dumps(spent, indent=1), encoding="utf-8")


def run_once(command: Sequence[str], work: Path) -> None:
    """Run a command that has not finished, or whose --out is gone: one that has would only see that there is nothing
    left to do.
    """
    path, line = work / FINISHED, written(command, work)
    finished: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    if line in finished and Path(command[command.index("--out") + 1]).exists():
        return
    run(command, work)
    path.write_text(json.dumps(sorted({*finished, line}), indent=1), encoding="utf-8")


def seconds(work: Path) -> dict[str, float]:
    """What each command took over all calls."""
    path = work / SECONDS
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def written(command: Sequence[str], work: Path) -> str:
    """A command without the folders of this machine."""
    line = shlex.join(["dtpipe", *command])
    return line.replace(f"{work}/", "WORK/").replace(f"{REPO}/", "").replace(f"{REPO.parent}/", "../")


def with_seconds(commands: Iterable[Sequence[str]], work: Path) -> list[dict[str, Any]]:
    """Commands as they were written, for a result."""
    spent = seconds(work)
    return [{"command": line, "seconds": spent.get(line)} for line in (written(command, work) for command in commands)]


def digit_scenes(root: Path, num_images: int, num_held_out: int, px: int = 64) -> None:
    """Scenes to pre-train on, which labels are drawn from too, in `train/`, and others in `held_out/`.

    Beside their own labels, objects are of one class in `OBJECTS`: few scenes do not teach ten digits to any arm.
    """
    for part, num in (("train", num_images), ("held_out", num_held_out)):
        folder = root / part
        if not (folder / OBJECTS).is_file():  # written last
            write_scenes(folder, num, seed=0, px=px, part=part)
            document = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
            for annotation in document["annotations"]:
                annotation["category_id"] = 0
            document["categories"] = [{"id": 0, "name": "digit"}]
            (folder / OBJECTS).write_text(json.dumps(document), encoding="utf-8")
