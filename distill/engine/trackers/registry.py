"""The trackers that there are."""

from dtpipe.distill.engine.trackers import mlflow, tensorboard, wandb

TRACKERS = {kind.name: kind for kind in (tensorboard.TRACKER, wandb.TRACKER, mlflow.TRACKER)}
