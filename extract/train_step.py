"""One step of training: noise a batch, predict that noise, descend.

Source: Ho et al., arXiv 2006.11239 (eq. 14, simple loss); Hang et al., arXiv 2303.09556 (min-SNR weighting).
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_data import Batch
from dtpipe.extract.train_parallel import Ranks
from dtpipe.extract.train_state import TrainState, update_ema
from dtpipe.manifests.errors import DivergedError

if TYPE_CHECKING:
    from torch import Tensor

SNR_LIMIT = 5.0  # gamma of Hang et al.
ALONE = Ranks()


def train_step(
    config: TrainTeacherConfig, state: TrainState, batch: Batch, schedule: Tensor, ranks: Ranks = ALONE
) -> float:
    """One step of the weighted loss, E w(t) |eps - eps_theta(x_t, t)|^2, over the parts of all ranks; returns the loss.

    schedule: alphas_cumprod, float64, on the device. In float16 a step whose gradient overflows leaves the weights as they are.
    Raises: DivergedError when the loss or its gradient is not finite.
    """
    import torch

    loss = _part_of_loss(config, state, batch, schedule)
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    state.optimizer.zero_grad(set_to_none=True)
    scaled = loss * ranks.size  # the ranks' gradients are averaged
    torch.autograd.backward(scaled if state.scaler is None else state.scaler.scale(scaled))
    if state.scaler is not None:
        state.scaler.unscale_(state.optimizer)
    norm = torch.nn.utils.clip_grad_norm_(state.unet.parameters(), config.grad_clip)
    value, length = torch.stack([ranks.sum(loss.detach()), norm]).tolist()
    _refuse_to_diverge(config, state, value, length)
    if state.scaler is None:
        state.optimizer.step()
    else:
        state.scaler.step(state.optimizer)
        state.scaler.update()
    state.step += 1
    update_ema(state, min(config.ema_decay, state.step / (state.step + 9)))
    return float(value)


def _part_of_loss(config: TrainTeacherConfig, state: TrainState, batch: Batch, schedule: Tensor) -> Tensor:
    """This rank's share of the global batch's loss, a scalar; the shares add up to it."""
    import torch

    device = schedule.device
    clean, timesteps, noise = (tensor.to(device) for tensor in (batch.clean, batch.timesteps, batch.noise))
    labels = batch.labels.to(device) if batch.labels is not None else None
    kept = schedule[timesteps]  # (b,)
    noisy = kept.sqrt().float().view(-1, 1, 1, 1) * clean + (1 - kept).sqrt().float().view(-1, 1, 1, 1) * noise
    with torch.autocast(device.type, getattr(torch, config.precision), enabled=config.precision != "float32"):
        predicted = state.forward(noisy, timesteps, labels, return_dict=False)[0]
    errors = (predicted.float() - noise).square().mean(dim=(1, 2, 3))  # (b,)
    loss: Tensor = (errors * loss_weight(config, kept)).sum() / config.batch_size
    return loss


def loss_weight(config: TrainTeacherConfig, kept: Tensor) -> Tensor:
    """Weight of each image's error at alphas_cumprod `kept`: 1, or min(SNR, 5) / SNR with SNR = a / (1 - a).

    Shapes: (b,) -> (b,), float32.
    """
    if config.loss_weighting == "simple":
        return kept.new_ones(kept.shape).float()
    snr = kept / (1 - kept)
    return (snr.clamp(max=SNR_LIMIT) / snr).float()


def learning_rate(config: TrainTeacherConfig, step: int) -> float:
    """Linear warm-up, constant, then linear decay over the last `decay_steps`; `step` counts from 0."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cool = min(1.0, (config.steps - step) / config.decay_steps) if config.decay_steps else 1.0
    return config.lr * min(warm, cool)


def _refuse_to_diverge(config: TrainTeacherConfig, state: TrainState, loss: float, norm: float) -> None:
    if math.isfinite(loss) and (math.isfinite(norm) or (state.scaler is not None and state.scaler.get_scale() > 1)):
        return  # an overflow in float16 is met by a smaller scale, down to 1
    raise DivergedError(
        f"{config.out}: in step {state.step + 1} the loss is {loss:g} and the gradient's norm {norm:g}; "
        "train anew in another --out with a lower train_teacher.lr or a longer train_teacher.warmup_steps"
    )
