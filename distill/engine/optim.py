"""Optimiser and learning rate. The rate is a pure function of the step, so a resumed run needs only the step."""

from __future__ import annotations

import math
from typing import Any

from timm.optim._optim_factory import create_optimizer_v2
from torch import nn
from torch.optim import Optimizer

from dtpipe.distill.config import DistillConfig


def build_optimizer(model: nn.Module, config: DistillConfig) -> Optimizer:
    """timm's AdamW or LAMB over all parameters; weight decay is left off biases, norms and what `no_weight_decay` of the model names.

    On a GPU, AdamW is one fused kernel.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    fused: dict[str, Any] = {"fused": True} if on_gpu and config.opt == "adamw" else {}
    optimizer: Optimizer = create_optimizer_v2(
        model, opt=config.opt, lr=config.peak_lr, weight_decay=config.weight_decay, betas=config.betas, **fused
    )
    return optimizer


def learning_rate(step: int, num_steps: int, num_warmup: int, peak: float, minimum: float = 0.0) -> float:
    """Rate of one optimiser step: linear from peak/num_warmup to the peak, then half a cosine towards the minimum.

    `step` counts from 0; the minimum would be reached at `num_steps`, one step after the last.
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use one rate for all parameter groups, times the scale that timm may have given a group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
