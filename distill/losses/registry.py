"""All losses of one level, by name. A new one is a file with `LOSS`, a line here, and its weight in `LossConfig`."""

from __future__ import annotations

from dtpipe.distill.losses import attention, cosine, mse

LOSSES = {kind.name: kind for kind in (mse.LOSS, attention.LOSS, cosine.LOSS)}
