"""The training loop under Ray Train: the same as torchrun's, on workers that Ray places and starts anew when one dies.

Restarts go on from last.pt, so the run folder must lie on a disk that all nodes share. Through it the processes also
speak: the driver asks for a stop with one file, and a worker leaves the run's end in another.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from dtpipe.distill.engine.progress import OnTrainProgress, RunResult, TrainProgress
from dtpipe.distill.engine.ranks import error_of_another
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.manifests.errors import DamagedDataError, DtpipeError, IncompleteError, MissingPackageError
from dtpipe.manifests.stopping import StopRequest
from dtpipe.manifests.store.publish import unique_temporary, write_whole

STOP, END, STORE = ".stop", ".end.json", ".ray"
POLL_S = 0.5
_log = logging.getLogger(__name__)
R = TypeVar("R", bound=RunResult)


def train_on_ray(
    train: Callable[[StopRequest], R],
    result: type[R],
    folder: Path,
    num_workers: int,
    gpus: bool,
    max_restarts: int,
    on_progress: OnTrainProgress | None = None,
) -> R:
    """What `train` returns on the first of `num_workers` workers of the Ray cluster that this process is connected to.

    `train` is sent to the workers, and trains the run in `folder`, which is made here.
    Raises: as `train`; MissingPackageError without Ray Train; IncompleteError when workers died too often, or cannot
    share the folder.
    """
    folder = folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for name in (STOP, END):
        (folder / name).unlink(missing_ok=True)
    trainer = _make_trainer(train, folder, num_workers, gpus, max_restarts)
    with StopRequest() as stop, ThreadPoolExecutor(1, thread_name_prefix="dtpipe-ray-train") as pool:
        fitted = pool.submit(trainer.fit)
        _watch(folder, stop, fitted.done, on_progress)
    error = fitted.exception()
    shutil.rmtree(folder / STORE, ignore_errors=True)
    answer = result.from_record(_read_end(folder, error))
    for note in answer.notes:  # the worker's log is elsewhere
        _log.warning(note)
    return answer


def _make_trainer(
    train: Callable[[StopRequest], RunResult], folder: Path, num_workers: int, gpus: bool, max_restarts: int
) -> Any:
    try:
        from ray.train import FailureConfig, RunConfig, ScalingConfig
        from ray.train.torch import TorchConfig, TorchTrainer
    except ImportError as err:
        raise MissingPackageError(
            f"Ray Train cannot be imported ({err}); pip install 'dtpipe[train]', or use torchrun"
        ) from err
    return TorchTrainer(
        _worker,
        train_loop_config={"train": train, "folder": folder, "working_folder": Path.cwd()},
        torch_config=TorchConfig(backend="cpu:gloo,cuda:nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(num_workers=num_workers, use_gpu=gpus),
        run_config=RunConfig(
            name="run",
            storage_path=str(folder / STORE),
            failure_config=FailureConfig(max_failures=max_restarts),
        ),
    )


def _worker(task: dict[str, Any]) -> None:
    """One worker. A run that has ended, well or not, is not begun again when Ray restarts its workers."""
    folder: Path = task["folder"]
    if (folder / END).exists():
        return
    with suppress(OSError):  # paths are relative to where the command was given, if this node has that folder
        os.chdir(task["working_folder"])
    _use_device()
    stop = StopRequest()
    threading.Thread(target=_await_stop, args=(folder, stop), daemon=True).start()
    try:
        result: RunResult = task["train"](stop)
    except IncompleteError:  # another worker is lost: Ray starts all anew
        raise
    except DtpipeError as err:
        _write_end(folder, {"error": type(err).__name__, "sentence": str(err), "exit_code": err.exit_code})
        raise
    if result.rank == 0:
        _write_end(folder, result.record())


def _use_device() -> None:
    import torch
    from ray.train.torch import get_device

    device = get_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)


def _await_stop(folder: Path, stop: StopRequest) -> None:
    while not stop.requested:
        time.sleep(POLL_S)
        if (folder / STOP).exists():
            stop.request(int((folder / STOP).read_text() or signal.SIGTERM))


def _watch(folder: Path, stop: StopRequest, done: Callable[[], bool], on_progress: OnTrainProgress | None) -> None:
    """Until the run ends, pass a stop on to the workers, and their lines of metrics.jsonl to who asked."""
    asked, shown = False, len(_lines(folder))
    while not done():
        time.sleep(POLL_S)
        if stop.signal is not None and not asked:
            asked = True
            (folder / STOP).write_text(str(stop.signal))
        lines = _lines(folder)
        if len(lines) > shown and on_progress:
            on_progress(TrainProgress.from_record(lines[-1]))
        shown = len(lines)


def _lines(folder: Path) -> list[dict[str, Any]]:
    """What can be shown; the worker that takes the folder up says what is wrong with it."""
    with suppress(DamagedDataError):
        return read_metrics(folder)
    return []


def _write_end(folder: Path, end: dict[str, Any]) -> None:
    write_whole(folder / END, json.dumps(end), unique_temporary(folder / END))


def _read_end(folder: Path, error: BaseException | None) -> dict[str, Any]:
    if not (folder / END).exists():
        reason = (
            str(error).strip().splitlines()[-1][:200] if error else f"{folder} is not on a disk that all nodes share"
        )
        raise IncompleteError(
            f"Ray Train gave up ({reason}); run the same command again to go on from the last checkpoint"
        ) from error
    end: dict[str, Any] = json.loads((folder / END).read_text())
    (folder / END).unlink()
    (folder / STOP).unlink(missing_ok=True)
    if "sentence" in end:
        raise error_of_another(end["error"], end["sentence"], end["exit_code"])
    return end
