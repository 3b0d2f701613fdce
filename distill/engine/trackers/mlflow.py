"""MLflow, at the server or database that its own MLFLOW_TRACKING_URI names.

Its ids are given by the server, so the run is found again by a tag that holds ours.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from dtpipe.distill.engine.trackers.base import Outcome, TrackedRun, TrackerKind, scalars
from dtpipe.manifests.errors import MissingPackageError, StoreError

if TYPE_CHECKING:
    from mlflow import MlflowClient

RUN_TAG = "dtpipe.run_id"
_EXPERIMENT = "Default"
_MAX_PARAM = 500  # characters, the least that any server takes
_MAX_PARAMS = 100  # per request
_STATUS: Mapping[Outcome, str] = {"finished": "FINISHED", "stopped": "KILLED", "failed": "FAILED"}


class MlflowRun:
    """One part of a run at an MLflow server."""

    def __init__(self, run: TrackedRun) -> None:
        """Raises: MissingPackageError without the package mlflow; StoreError when the server does not take the run."""
        try:
            from mlflow import MlflowClient
        except ImportError as err:
            raise MissingPackageError(
                "tracker mlflow needs a package; run `pip install 'dtpipe[mlflow]'`, or leave it out"
            ) from err
        try:
            self._client = MlflowClient()
            self._id = _find(self._client, run) or _create(self._client, run)
            self._client.update_run(self._id, status="RUNNING")
        except Exception as err:
            raise StoreError(
                f"tracker mlflow cannot begin: {err}; see what MLFLOW_TRACKING_URI names, or leave it out"
            ) from err

    def add(self, record: Mapping[str, Any]) -> None:
        """As `Tracker.add`."""
        self._log(scalars(record), record["step"])

    def conclude(self, scores: Mapping[str, float], step: int) -> None:
        """Scores are metrics of the last step."""
        self._log(scores, step)

    def close(self, outcome: Outcome) -> None:
        """Say how the part ended; the next one sets the run to RUNNING again."""
        self._client.set_terminated(self._id, _STATUS[outcome])

    def _log(self, values: Mapping[str, float], step: int) -> None:
        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        metrics = [Metric(name, float(value), now_ms, step) for name, value in values.items()]
        self._client.log_batch(self._id, metrics=metrics)


def _experiment(client: MlflowClient, project: str | None) -> str:
    """The id of the experiment of a name, which is created where there is none."""
    from mlflow.environment_variables import MLFLOW_EXPERIMENT_NAME

    name = project or MLFLOW_EXPERIMENT_NAME.get() or _EXPERIMENT  # type: ignore[no-untyped-call]
    there = client.get_experiment_by_name(name)
    return str(client.create_experiment(name) if there is None else there.experiment_id)


def _find(client: MlflowClient, run: TrackedRun) -> str | None:
    """MLflow's id of the run, where a part of it was tracked before."""
    where = [_experiment(client, run.project)]
    before = client.search_runs(where, f"tags.`{RUN_TAG}` = '{run.run_id}'", max_results=1)
    return str(before[0].info.run_id) if before else None


def _create(client: MlflowClient, run: TrackedRun) -> str:
    from mlflow.entities import Param

    tags = {RUN_TAG: run.run_id, "dtpipe.kind": run.kind}
    run_id = client.create_run(_experiment(client, run.project), run_name=run.name, tags=tags).info.run_id
    params = [Param(name, str(value)[:_MAX_PARAM]) for name, value in _flat(run.config)]
    for start in range(0, len(params), _MAX_PARAMS):
        client.log_batch(run_id, params=params[start : start + _MAX_PARAMS])
    return str(run_id)


def _flat(config: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Values by dotted key."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


TRACKER = TrackerKind("mlflow", "MLflow, at the server or database of MLFLOW_TRACKING_URI.", MlflowRun)
