"""What an interpreter minimises: cross-entropy and soft Dice of masks, cross-entropy of classes.

Equation (4) of the paper. Pixels whose label is `IGNORE` count in neither term.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.manifests.errors import ShapeError


def soft_dice(logits: Tensor, truth: Tensor) -> Tensor:
    """1 - 2 sum(p t) / (sum(p) + sum(t)), mean over the classes that occur in the batch; sums are over its pixels.

    Which classes and pixels are summed over, the paper leaves open: a class that is not there has no overlap to gain.
    0 where no pixel counts.

    Shapes: logits (B, K, H, W), truth (B, H, W) int64 -> scalar. Raises: ShapeError when sizes differ.
    Source: section 3.2, equation (4); Milletari et al., arXiv 1606.04797, without squares in the denominator.
    """
    if logits.shape[-2:] != truth.shape[-2:] or len(logits) != len(truth):
        raise ShapeError(f"logits are {tuple(logits.shape)}, the truth is {tuple(truth.shape)}; bring them to its size")
    known = (truth != IGNORE)[:, None]  # (B, 1, H, W)
    shares = logits.softmax(dim=1) * known
    one_hot = F.one_hot(truth.clamp(min=0), logits.shape[1]).permute(0, 3, 1, 2).to(shares.dtype) * known
    overlap, predicted, occurring = ((part).sum(dim=(0, 2, 3)) for part in (shares * one_hot, shares, one_hot))
    there = (occurring > 0).to(shares.dtype)  # (K,)
    distance = 1 - 2 * overlap / (predicted + occurring).clamp(min=1e-12)
    mean: Tensor = (distance * there).sum() / there.sum().clamp(min=1)
    return mean


def mean_cross_entropy(logits: Tensor, truth: Tensor) -> Tensor:
    """Mean over what counts; 0 where nothing does. Shapes: (B, K, ...), (B, ...) -> scalar."""
    total = F.cross_entropy(logits, truth, ignore_index=IGNORE, reduction="sum")
    return total / (truth != IGNORE).sum().clamp(min=1)


def interpreter_losses(logits: Tensor, truth: Tensor, dice_weight: float) -> dict[str, Tensor]:
    """Cross-entropy + `dice_weight` x soft Dice of masks, of classes the first alone; with their sum as `loss`.

    Shapes: logits (B, K, H, W) and truth (B, H, W); or (B, K) and (B,).
    """
    entropy = mean_cross_entropy(logits, truth)
    if truth.ndim == 1:
        return {"loss": entropy}
    dice = soft_dice(logits, truth)
    return {"loss": entropy + dice_weight * dice, "cross_entropy": entropy, "dice": dice}
