"""A fit on a Ray worker, where the teacher has its device; small arrays come back."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Mapping
from typing import Any

from dtpipe.extract.cluster.connection import ray_module
from dtpipe.extract.cluster.preflight import check_versions
from dtpipe.extract.config import ExtractRun
from dtpipe.extract.fitting.base import FitResult, OnFitted
from dtpipe.extract.fitting.fit import FitTask
from dtpipe.manifests.errors import IncompleteError

_TICK_S = 0.5
_CALLS = 2  # the fit, and a look at how far it is


class FitActor:
    """Lives in a Ray worker process."""

    def __init__(self) -> None:
        self._turn = threading.Lock()
        self._seen = (0, 0)
        self._events: deque[str] = deque()

    def fit(self, task: FitTask, device: str, versions: Mapping[str, str]) -> FitResult:
        """Check the node, then fit. Raises: as `FitTask.run`."""
        check_versions(versions)
        return task.run(device, self._note)

    def news(self) -> tuple[int, int, list[str]]:
        """Samples read, samples in all, and events since the last call."""
        with self._turn:
            events = list(self._events)
            self._events.clear()
            return (*self._seen, events)

    def _note(self, done: int, total: int, event: str | None) -> None:
        with self._turn:
            self._seen = done, total
            if event is not None:
                self._events.append(event)


def fit_on_cluster(
    task: FitTask, config: ExtractRun, device: str, versions: Mapping[str, str], on_fitted: OnFitted
) -> FitResult:
    """The fit on whichever node has room; tried again where a node or a worker is lost.

    Raises: as `FitTask.run`; IncompleteError when no worker comes up in time, or each is lost.
    """
    ray = ray_module()
    for tries_left in reversed(range(config.retries + 1)):
        actor = _actor(config, device)
        try:
            return _followed(actor, actor.fit.remote(task, device, dict(versions)), config.worker_wait_s, on_fitted)
        except ray.exceptions.RayTaskError as err:
            raise (err.cause if isinstance(err.cause, BaseException) else err) from None
        except ray.exceptions.RayError as err:
            if not tries_left:
                raise IncompleteError(
                    f"workers that fitted codecs were lost {config.retries + 1} times ({err}); run the same command "
                    "again"
                ) from err
            on_fitted(0, len(task.listing), "the worker that fitted codecs was lost; the fit begins again")
        finally:
            ray.kill(actor)
    raise AssertionError("unreachable")


def _actor(config: ExtractRun, device: str) -> Any:
    gpus = float(device.startswith("cuda")) if config.gpus_per_worker is None else config.gpus_per_worker
    options = {"num_cpus": config.cpus_per_worker, "num_gpus": gpus, "max_concurrency": _CALLS}
    return ray_module().remote(FitActor).options(max_restarts=0, **options).remote()


def _followed(actor: Any, fitting: Any, wait_s: float, on_fitted: OnFitted) -> FitResult:
    """Wait for a fit and pass on what it says."""
    ray = ray_module()
    came_up, _ = ray.wait([actor.news.remote()], timeout=wait_s)
    if not came_up:
        raise IncompleteError(
            f"no worker was ready to fit codecs for {wait_s:g} s; check `ray status` and run the same command again"
        )
    done: list[Any] = []
    while not done:
        done, _ = ray.wait([fitting], timeout=_TICK_S)
        num_read, total, events = ray.get(actor.news.remote())
        for event in events or [None]:
            on_fitted(num_read, total, event)
    result: FitResult = ray.get(fitting)
    return result
