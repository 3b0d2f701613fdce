"""Classes of whole images by a linear classifier on the pooled features of a frozen backbone, in training views.

Unlike the probe, which fits stored features to the optimum, this is the recipe of the paper's table 12 (LARS, 90
epochs).
"""

from __future__ import annotations

from dataclasses import replace

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.predictions import ClassPrediction
from dtpipe.distill.downstream.tuned.reads import CLASSES_FROZEN_READ
from dtpipe.distill.downstream.tuned.tasks import finetune

TASK: TunedTask[ClassPrediction] = replace(
    finetune.TASK,
    name="linear",
    summary="from class labels: linear classifier on the frozen backbone, trained with augmentation; accuracy",
    reads=CLASSES_FROZEN_READ,
    frozen=True,
)
