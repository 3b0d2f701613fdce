"""Settings of trackers, which every run has in its half `run`."""

from __future__ import annotations

from pydantic import Field, field_validator

from dtpipe.distill.engine.trackers.registry import TRACKERS
from dtpipe.manifests.schema import StrictModel


class Tracking(StrictModel):
    """Where the lines of metrics.jsonl go too."""

    trackers: tuple[str, ...] = Field(
        default=(), description="Where the lines of metrics.jsonl go too: tensorboard, wandb, mlflow."
    )
    project: str | None = Field(
        default=None,
        description="Project of W&B or experiment of MLflow; default: as WANDB_PROJECT or MLFLOW_EXPERIMENT_NAME say.",
    )
    tensorboard: bool = Field(default=False, description="The same as tensorboard among the trackers.")

    @field_validator("trackers")
    @classmethod
    def _known(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if unknown := [name for name in names if name not in TRACKERS]:
            raise ValueError(f": there is no tracker {unknown[0]!r}; choose from {', '.join(TRACKERS)}")
        return names

    @property
    def tracker_names(self) -> tuple[str, ...]:
        """All that are asked for, each once."""
        return tuple(dict.fromkeys((*self.trackers, *(["tensorboard"] if self.tensorboard else []))))
