"""Weights & Biases, as its own environment says: WANDB_MODE=offline writes to `wandb/` of the run folder only.

Parts of a run are one run there. Steps that a part takes again after a crash are drawn twice, over the same step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dtpipe.distill.engine.trackers.base import Outcome, TrackedRun, TrackerKind, scalars
from dtpipe.manifests.errors import ConfigError, MissingPackageError, StoreError

_STEP = "step"


class WandbRun:
    """One part of a run, as one process of W&B's client."""

    def __init__(self, run: TrackedRun) -> None:
        """Raises: MissingPackageError without the package wandb; ConfigError when it is not set up; StoreError."""
        try:
            import wandb
            from wandb.errors import UsageError
        except ImportError as err:
            raise MissingPackageError(
                "tracker wandb needs a package; run `pip install 'dtpipe[wandb]'`, or leave it out"
            ) from err
        try:
            self._run = wandb.init(
                dir=run.folder,
                id=run.run_id,
                resume="allow",
                name=run.name,
                job_type=run.kind,
                project=run.project,
                reinit="create_new",
                settings=wandb.Settings(console="off", disable_git=True, disable_code=True),
            )
            self._run.config.update(dict(run.config), allow_val_change=True)  # type: ignore[no-untyped-call]
            self._run.define_metric("*", step_metric=_STEP)
        except UsageError as err:
            raise ConfigError(
                f"tracker wandb is not set up: {str(err).rstrip('.')}; log in, set WANDB_MODE=offline, or leave it out"
            ) from err
        except Exception as err:
            raise StoreError(
                f"tracker wandb cannot begin: {err}; set WANDB_MODE=offline to send the run later, or leave it out"
            ) from err

    def add(self, record: Mapping[str, Any]) -> None:
        """As `Tracker.add`; the step is a value of its own, since W&B drops what is of a step before its last."""
        self._run.log({_STEP: record["step"], **scalars(record)})

    def conclude(self, scores: Mapping[str, float], _step: int) -> None:
        """Scores stand in the run's summary."""
        self._run.summary.update(dict(scores))

    def close(self, outcome: Outcome) -> None:
        """A run that was stopped or failed is marked so; it goes on under the same id."""
        self._run.finish(exit_code=0 if outcome == "finished" else 1)


TRACKER = TrackerKind("wandb", "Weights & Biases; WANDB_MODE, WANDB_PROJECT and others are read by itself.", WandbRun)
