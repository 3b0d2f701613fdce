"""Train a DDPM on the user's own images, to be the teacher of in-domain pre-training.

The result is a plain diffusers `DDPMPipeline` folder. Everything random is a function of (seed, step), so a run that
was stopped and started again goes the way of an unbroken one, and nothing depends on when it was stopped.

Source: Ho et al., arXiv 2006.11239 (eq. 14, simple loss; EMA of the weights).
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.extract.stopping import StopRequest
from dtpipe.extract.teachers.ddim import alphas_cumprod
from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_state import TrainState, resume_or_start, save_checkpoint, update_ema
from dtpipe.manifests.errors import ConfigError, DivergedError, InputError, StoreError
from dtpipe.manifests.schema import TransformRecipe

if TYPE_CHECKING:
    from torch import Tensor

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class TrainTeacherProgress:
    """Where training is, after one logged step."""

    step: int
    steps: int
    loss: float
    lr: float
    seconds: float
    throughput_img_s: float


@dataclass(frozen=True)
class TrainTeacherResult:
    """What one call did; `finished` is false when it was stopped before the last step."""

    out: Path
    step: int
    steps: int
    finished: bool
    num_images: int
    loss: float
    seconds: float
    samples: Path
    bad: tuple[str, ...] = ()


def train_teacher(
    config: TrainTeacherConfig,
    on_progress: Callable[[TrainTeacherProgress], None] | None = None,
) -> TrainTeacherResult:
    """Train, or go on training, and write the teacher with its sample grid into `config.out`.

    Raises: PlanChangedError when `config.out` holds a teacher of other settings; InputError without usable images;
    StoppedError after SIGTERM or SIGINT, once the state is saved.
    """
    import torch

    from dtpipe.extract.train_export import export_teacher

    if config.threads:
        torch.set_num_threads(config.threads)
    device = _device(config.device)
    images, bad = load_images(config)
    out = _prepare_folder(config)
    state = resume_or_start(config, device)
    started = time.monotonic()
    with StopRequest() as stop:
        _train(config, state, images, device, on_progress, stop)
        path = save_checkpoint(config, state)
    if state.step < config.steps:
        stop.raise_if_requested(f"step {state.step} of {config.steps}", f"{path} is saved")
    seconds = time.monotonic() - started
    samples = export_teacher(out, out, device=device)
    finished = state.step >= config.steps
    return TrainTeacherResult(out, state.step, config.steps, finished, len(images), _mean(state.losses), seconds, samples, bad)


def _train(
    config: TrainTeacherConfig,
    state: TrainState,
    images: NDArray[np.uint8],
    device: str,
    on_progress: Callable[[TrainTeacherProgress], None] | None,
    stop: StopRequest,
) -> None:
    import torch

    started, first = time.monotonic(), state.step
    schedule = torch.from_numpy(alphas_cumprod({"num_train_timesteps": config.timesteps})).to(device)
    while state.step < config.steps and not stop.requested:
        seconds = time.monotonic() - started
        if config.max_hours and seconds > config.max_hours * 3600:
            break
        state.losses = [*state.losses[-199:], train_step(config, state, images, schedule, device)]
        if state.step % config.log_every == 0 or state.step == config.steps:
            seconds = time.monotonic() - started
            speed = (state.step - first) * config.batch_size / seconds
            progress = TrainTeacherProgress(
                state.step, config.steps, _mean(state.losses[-config.log_every :]), learning_rate(config, state.step - 1), seconds, speed
            )
            _log(Path(config.out), progress)
            if on_progress:
                on_progress(progress)
        if state.step % config.checkpoint_every == 0:
            save_checkpoint(config, state)


def train_step(config: TrainTeacherConfig, state: TrainState, images: NDArray[np.uint8], schedule: Tensor, device: str) -> float:
    """One step of the simple loss, E |eps - eps_theta(x_t, t)|^2; returns the loss.

    Raises: DivergedError when the loss or its gradient is not finite.
    """
    import torch
    from torch.nn import functional

    clean, timesteps, noise = (tensor.to(device) for tensor in _draw_batch(config, images, state.step))
    kept = schedule[timesteps]  # alphas_cumprod, (B,) float64
    noisy = kept.sqrt().float().view(-1, 1, 1, 1) * clean + (1 - kept).sqrt().float().view(-1, 1, 1, 1) * noise
    for group in state.optimizer.param_groups:
        group["lr"] = learning_rate(config, state.step)
    with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=config.precision == "bfloat16"):
        predicted = state.unet(noisy, timesteps).sample
    loss = functional.mse_loss(predicted.float(), noise)
    state.optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    norm = torch.nn.utils.clip_grad_norm_(state.unet.parameters(), config.grad_clip)
    if not torch.isfinite(loss.detach() + norm):
        raise DivergedError(
            f"{config.out}: in step {state.step + 1} the loss is {loss.item():g} and the gradient's norm {norm.item():g}; "
            "train anew in another --out with a lower train_teacher.lr or a longer train_teacher.warmup_steps"
        )
    state.optimizer.step()
    state.step += 1
    update_ema(state, min(config.ema_decay, state.step / (state.step + 9)))
    return loss.item()


def learning_rate(config: TrainTeacherConfig, step: int) -> float:
    """Linear warm-up, constant, then linear decay over the last `decay_steps`; `step` counts from 0."""
    warm = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    cool = min(1.0, (config.steps - step) / config.decay_steps) if config.decay_steps else 1.0
    return config.lr * min(warm, cool)


def _draw_batch(config: TrainTeacherConfig, images: NDArray[np.uint8], step: int) -> tuple[Tensor, Tensor, Tensor]:
    """Images (B, 3, H, W) in [-1, 1], timesteps (B,) and noise of one step: a function of (seed, step)."""
    import torch

    rng = _generator(config.seed, "step", step)
    positions = np.arange(step * config.batch_size, (step + 1) * config.batch_size)
    rows = [_permutation(config.seed, int(at) // len(images), len(images))[at % len(images)] for at in positions]
    chosen = images[rows]
    timesteps = rng.integers(config.timesteps, size=config.batch_size)
    noise = rng.standard_normal((config.batch_size, 3, config.px, config.px), dtype=np.float32)
    if config.flip:
        turned = rng.random(config.batch_size) < 0.5
        chosen = np.where(turned[:, None, None, None], chosen[:, :, ::-1], chosen)
    clean = torch.from_numpy(np.ascontiguousarray(chosen.transpose(0, 3, 1, 2))).float() / 127.5 - 1
    return clean, torch.from_numpy(timesteps), torch.from_numpy(noise)


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num: int) -> NDArray[np.int64]:
    return _generator(seed, "epoch", epoch).permutation(num)


def _generator(seed: int, stream: str, index: int) -> np.random.Generator:
    digest = blake3(f"{seed}/train-teacher/{stream}/{index}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "big")))


def load_images(config: TrainTeacherConfig) -> tuple[NDArray[np.uint8], tuple[str, ...]]:
    """All images of the source, uint8 [N, px, px, 3], in the listing's order, and the keys of bad ones.

    Raises: InputError when no image is readable.
    """
    from dtpipe.extract.sources import open_source
    from dtpipe.extract.transforms import BadImage, decode_image, resize_image

    source = open_source(config.images, config.kind)
    recipe = TransformRecipe(resize=config.resize, height=config.px, width=config.px, filter=config.filter)
    items = sorted(source.list(), key=lambda item: item.key)
    if config.limit and config.limit < len(items):
        items = [items[idx] for idx in np.linspace(0, len(items) - 1, config.limit).astype(int)]  # some of every class folder
    kept: list[NDArray[np.uint8]] = []
    bad: list[str] = []
    for item in items:
        try:
            kept.append(resize_image(decode_image(source.read(item.uri), 128_000_000), recipe))
        except BadImage as err:
            bad.append(f"{item.key}: {err}")
    if not kept:
        raise InputError(f"{config.images}: none of {len(items)} images can be read; the first: {bad[0] if bad else 'none listed'}")
    return np.stack(kept), tuple(bad)


def _prepare_folder(config: TrainTeacherConfig) -> Path:
    out = Path(config.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"{out}: cannot make the folder ({err}); name another --out") from err
    return out


def _log(out: Path, progress: TrainTeacherProgress) -> None:
    try:
        with (out / METRICS).open("a") as file:
            file.write(json.dumps(asdict(progress)) + "\n")
    except OSError as err:
        raise StoreError(f"{out / METRICS}: cannot write ({err}); make room and run the same command again") from err


def _mean(losses: list[float]) -> float:
    return sum(losses) / len(losses) if losses else float("nan")


def _device(name: str) -> str:
    import torch

    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train_teacher.device is cuda, but torch sees no GPU; use auto or cpu")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
