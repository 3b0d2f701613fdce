"""Learning rate of a tuned task as a share of its peak: a pure function of the step, so a resumed run needs nothing."""

from __future__ import annotations

import math

from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.engine.optim import warmup_cosine


def rate_share(step: int, num_steps: int, config: TuneConfig) -> float:
    """Share of `config.lr` in one optimiser step; `step` counts from 0.

    Linear from `warmup_start` to 1 over the warm-up; then half a cosine, a power of what is left, or falls at
    milestones, whose shares count from the first step on.
    """
    num_warmup = round(config.warmup * num_steps)
    if step < num_warmup:
        return config.warmup_start + (1 - config.warmup_start) * (step + 1) / num_warmup
    left = 1 - (step - num_warmup) / max(1, num_steps - num_warmup)
    if config.schedule == "cosine":
        return warmup_cosine(step, num_steps, num_warmup, 1.0, config.min_lr)
    if config.schedule == "poly":
        return config.min_lr + (1 - config.min_lr) * math.pow(max(0.0, left), config.power)
    if config.schedule == "steps":
        return math.pow(config.gamma, sum(step >= round(share * num_steps) for share in config.milestones))
    return 1.0
