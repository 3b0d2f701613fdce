"""Benchmarks that are made of dtpipe's commands: run, printed, and kept with the seconds they took.

Each command goes on where it was stopped, so a benchmark made of them does too.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from common import REPO

from dtpipe.pipeline.demo.scenes import ScenePart, write_scenes

SECONDS, FINISHED, OBJECTS = "seconds.json", "finished.json", "digits.json"
Command = list[str]
_kept = threading.Lock()


def command_of(*words: object) -> Command:
    """A command of dtpipe, without its name."""
    return [str(word) for word in words]


def add_jobs(parser: argparse.ArgumentParser) -> None:
    """The flag that `run_groups` goes by."""
    parser.add_argument("--jobs", type=int, default=1, help="commands at a time; processor cores are divided by them")


def run(command: Sequence[str], work: Path, threads: int | None = None) -> None:
    """Run one command, with its output on the terminal, and add to the seconds that it took so far."""
    line = written(command, work)
    print(f"\n$ {line}", flush=True)
    started = time.monotonic()
    limits = {} if threads is None else {"OMP_NUM_THREADS": str(threads)}
    try:
        words = [sys.executable, "-m", "dtpipe.pipeline.cli.main", *command]
        subprocess.run(words, check=True, env={**os.environ, **limits})
    finally:
        with _kept:
            spent = seconds(work)
            spent[line] = round(spent.get(line, 0.0) + time.monotonic() - started, 1)
            (work / SECONDS).write_text(json.dumps(spent, indent=1), encoding="utf-8")


def run_once(command: Sequence[str], work: Path, threads: int | None = None) -> None:
    """Run a command that has not finished, or whose --out is gone: one that has would only see that there is nothing
    left to do.
    """
    line = written(command, work)
    with _kept:
        finished = line in _finished(work)
    if finished and Path(command[command.index("--out") + 1]).exists():
        return
    run(command, work, threads)
    with _kept:
        lines = sorted({*_finished(work), line})
        (work / FINISHED).write_text(json.dumps(lines, indent=1), encoding="utf-8")


def run_groups(groups: Iterable[Iterable[Command]], work: Path, jobs: int) -> None:
    """Run each group's commands in their order, and so many groups at a time."""
    threads = max(1, (os.cpu_count() or 1) // jobs) if jobs > 1 else None

    def run_group(commands: Iterable[Command]) -> None:
        for command in commands:
            run_once(command, work, threads)

    with ThreadPoolExecutor(jobs) as pool:
        running = [pool.submit(run_group, group) for group in groups]
        try:
            for group in running:
                group.result()
        finally:
            pool.shutdown(cancel_futures=True)


def _finished(work: Path) -> list[str]:
    path = work / FINISHED
    lines: list[str] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return lines


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
    parts: tuple[tuple[ScenePart, int], ...] = (("train", num_images), ("held_out", num_held_out))
    for part, num in parts:
        folder = root / part
        if not (folder / OBJECTS).is_file():  # written last
            write_scenes(folder, num, seed=0, px=px, part=part)
            document = json.loads((folder / "instances.json").read_text(encoding="utf-8"))
            for annotation in document["annotations"]:
                annotation["category_id"] = 0
            document["categories"] = [{"id": 0, "name": "digit"}]
            (folder / OBJECTS).write_text(json.dumps(document), encoding="utf-8")
