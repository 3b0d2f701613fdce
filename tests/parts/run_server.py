"""Forks a run per request: torch is imported once here, never used here, and each child starts in milliseconds.

Requests are JSON lines on stdin, answers JSON lines on stdout: {action: extract | repair, config, fault, folder, sync}
gives the child's process id, {action: wait, pid} its exit code. A child writes folder/PID.json and, as its stderr,
folder/PID.log. Without `sync` nothing is synced to disk, which no killed process can notice.
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import os
import sys
import traceback
from pathlib import Path
from typing import Any

PRELOADED = (
    *(
        "torch",
        "diffusers",
        "pyarrow.parquet",
        "pyarrow.dataset",
        "ray",
        "dtpipe.extract.run",
        "dtpipe.extract.shards.teacher",
        "dtpipe.extract.shards.worker",
    ),
    *(
        "dtpipe.extract.cluster.inline",
        "dtpipe.extract.cluster.ray",
        "dtpipe.extract.cluster.actor",
        "dtpipe.extract.teachers.diffusion.unet",
        "dtpipe.pipeline.soft_labels.request",
    ),
    "dtpipe.manifests.check.repair",
)


def main() -> None:
    """Serve until stdin ends."""
    os.environ["OMP_NUM_THREADS"] = "1"
    for name in PRELOADED:
        importlib.import_module(name)
    from diffusers import DDPMScheduler, UNet2DModel  # noqa: F401  diffusers imports its parts when they are asked for

    print(json.dumps("ready"), flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        answer = _wait(request["pid"]) if request["action"] == "wait" else _fork(request)
        print(json.dumps(answer), flush=True)


def _wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _fork(request: dict[str, Any]) -> int:
    pid = os.fork()
    if pid:
        return pid
    try:
        _run(request)
        os._exit(0)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(99)


def _run(request: dict[str, Any]) -> None:
    """In the child: do what was asked and write down how it ended."""
    from dtpipe.extract.config import ExtractConfig
    from dtpipe.extract.run import run_extraction, run_work
    from dtpipe.manifests.check.repair import repair
    from dtpipe.manifests.errors import DtpipeError
    from dtpipe.manifests.store.faults import arm_spec
    from dtpipe.pipeline.soft_labels.request import request_of

    os.setpgid(0, 0)
    if not request["sync"]:
        os.fsync = lambda _: None
    stem = Path(request["folder"]) / str(os.getpid())
    log = os.open(f"{stem}.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    arm_spec(request["fault"])
    settings = request["config"]
    try:
        if request["action"] == "repair":
            repair(settings.get("extract", settings)["run"]["out"])
            answer: dict[str, Any] = {"repaired": True}
        elif "soft_labels" in settings:
            labels = request_of(settings, {})
            answer = dataclasses.asdict(run_work(labels.run, labels.resolve, labels.record))
        else:
            answer = dataclasses.asdict(run_extraction(ExtractConfig.model_validate(settings)))
    except DtpipeError as err:
        answer = {"error": type(err).__name__, "message": str(err), "exit_code": err.exit_code}
    Path(f"{stem}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main()
