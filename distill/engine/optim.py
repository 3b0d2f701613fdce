"""Optimiser and learning rate. The rate is a pure function of the step, so a resumed run needs only the step.

timm makes the optimisers, but not the rates: its warm-up begins at a rate of its own and its cosine is multiplied in
another order, which changes the last bits and so every loss after the first; it has no schedule that holds and then
falls. Its `CosineLRScheduler` agrees with `warmup_cosine` to nine digits, by a test.
"""

from __future__ import annotations

import math
from typing import Any

from timm.optim import create_optimizer_v2  # type: ignore[attr-defined]  # its documented name
from torch import nn
from torch.optim import Optimizer

_LAMBS_OWN = "max_grad_norm"  # timm's name of the norm that its LAMB clips to


def build_optimizer(
    model: nn.Module, opt: str, lr: float, weight_decay: float, betas: tuple[float, float]
) -> Optimizer:
    """timm's AdamW or LAMB over all parameters; weight decay is left off biases, norms and what `no_weight_decay` of
    the model names. LAMB clips gradients to norm 1, as timm's does, where `clip_limit` is told no other.

    On a GPU, AdamW is one fused kernel.
    """
    on_gpu = next(model.parameters()).device.type == "cuda"
    fused: dict[str, Any] = {"fused": True} if on_gpu and opt == "adamw" else {}
    optimizer: Optimizer = create_optimizer_v2(model, opt=opt, lr=lr, weight_decay=weight_decay, betas=betas, **fused)
    return optimizer


def clip_limit(optimizer: Optimizer, largest: float | None) -> float:
    """The gradient norm that the loop is to clip to before a step: `largest`, or infinity where there is none.

    LAMB clips by itself: it is told the norm here, without one keeps its own, and the loop leaves the gradient to it.
    """
    if _LAMBS_OWN not in optimizer.defaults:
        return math.inf if largest is None else largest
    if largest is not None:
        for options in (optimizer.defaults, *optimizer.param_groups):
            options[_LAMBS_OWN] = largest
    return math.inf


def warmup_cosine(step: int, num_steps: int, num_warmup: int, peak: float, minimum: float = 0.0) -> float:
    """Rate of one optimiser step: linear from peak/num_warmup to the peak, then half a cosine towards the minimum.

    `step` counts from 0; the minimum would be reached at `num_steps`, one step after the last.
    """
    if step < num_warmup:
        return peak * (step + 1) / num_warmup
    progress = (step - num_warmup) / max(1, num_steps - num_warmup)
    return minimum + (peak - minimum) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def warmup_hold_decay(step: int, num_steps: int, num_warmup: int, num_decay: int, peak: float) -> float:
    """Rate of one optimiser step: linear warm-up, constant, then linear decay to 0 over the last
    `num_decay` steps. `step` counts from 0."""
    warm = min(1.0, (step + 1) / num_warmup) if num_warmup else 1.0
    cool = min(1.0, (num_steps - step) / num_decay) if num_decay else 1.0
    return peak * min(warm, cool)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Use one rate for all parameter groups, times the scale that timm may have given a group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
