"""Train a DDPM on the user's own images, to be the teacher of in-domain pre-training.

The result is a plain diffusers `DDPMPipeline` folder. What needs the other stage is an argument: decoding the images,
the weights of another teacher to start from, and drawing samples from the teacher as written.

Source: Ho et al., arXiv 2006.11239 (eq. 14, simple loss); Hang et al., arXiv 2303.09556 (min-SNR weighting).
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from dtpipe.distill.engine.device import autocast, pick_precision, seeded, training_device
from dtpipe.distill.engine.loop import run
from dtpipe.distill.engine.optim import warmup_hold_decay
from dtpipe.distill.engine.progress import OnTrainProgress
from dtpipe.distill.engine.ranks import ALONE, Ranks, join_ranks, ranks_of_this_machine
from dtpipe.distill.engine.recovery import newest_checkpoint
from dtpipe.distill.engine.run_folder import RunSettings
from dtpipe.distill.engine.timing import Stopwatch
from dtpipe.distill.engine.trainer import Course
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.data import NoiseBatch, OpenImages, TrainImages, batches_ahead
from dtpipe.distill.teacher.export import SAMPLES, TRAIN_TEACHER, DrawImages, export_teacher
from dtpipe.distill.teacher.network import build_unet, noise_schedule
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.records.image_digests import TRAIN_IMAGES, as_digests, image_digest, pack_digests
from dtpipe.manifests.store.publish import write_whole

_SNR_LIMIT = 5.0  # gamma of Hang et al.
_REMEDY = "train anew in another --out with a lower train_teacher.lr or a longer train_teacher.warmup_steps"

StartFrom = Callable[[TrainTeacherConfig, nn.Module], str]
"""Puts the weights of `init_from` into a network; their digest."""


@dataclass(frozen=True)
class TrainTeacherResult:
    """What one call did; `finished` is false when it was stopped before the last step."""

    out: Path
    step: int
    steps: int
    finished: bool
    num_images: int
    loss: float | None
    """Mean since the line of metrics.jsonl before the last; None before the first line."""
    seconds: float
    samples: Path
    bad: tuple[str, ...] = ()
    rank: int = 0
    """Of several processes, which one this is; the first has written all there is."""


def train_ddpm(
    config: TrainTeacherConfig,
    open_images: OpenImages,
    start_from: StartFrom,
    draw_images: DrawImages,
    on_progress: OnTrainProgress | None = None,
) -> TrainTeacherResult:
    """Train, or go on training, and write the teacher with its sample grid into `config.run.out`.

    One of the processes that torchrun started does its part; `on_progress` is called in the first alone.
    Raises: ConfigError for settings that cannot work together; what the arguments raise; else as the engine's `run`.
    """
    if config.run.threads:
        torch.set_num_threads(config.run.threads)
    with join_ranks(config.run.device) as ranks:
        if config.batch_size < ranks.size:
            raise ConfigError(
                f"train_teacher.batch_size is {config.batch_size}, too few for {ranks.size} processes; start fewer"
            )
        device = training_device(config.run.device)
        ranks.first(lambda: teacher_run(config).refuse_other())  # before images are decoded
        images = open_images(config, ranks_of_this_machine())
        _refuse_different(ranks, images)
        with seeded(config.seed, device):
            trainer = TeacherTraining(config, images, device, ranks, partial(_begin, config, ranks, start_from))
            result = run(trainer, teacher_run(config, images), ranks, on_progress)
        out = Path(config.run.out)
        ranks.first(lambda: write_whole(out / TRAIN_IMAGES, pack_digests(as_digests(map(image_digest, images.pixels)))))
        ranks.first(lambda: export_teacher(out, out, draw_images, device=device))
    return TrainTeacherResult(
        out=out,
        step=result.step,
        steps=config.run.steps,
        finished=result.step >= config.run.steps,
        num_images=len(images.keys),
        loss=result.losses.get("loss"),
        seconds=result.seconds,
        samples=out / SAMPLES,
        bad=images.bad,
        rank=ranks.rank,
    )


def teacher_run(config: TrainTeacherConfig, images: TrainImages | None = None) -> RunSettings:
    """The run as its folder knows it."""
    identity = {"classes": list(images.classes)} if images is not None else {}
    return RunSettings(Path(config.run.out), TRAIN_TEACHER, config, identity)


def _begin(config: TrainTeacherConfig, ranks: Ranks, start_from: StartFrom, unet: nn.Module) -> str | None:
    """The digest of the weights that training began with, where these were another teacher's; read only to begin."""
    begun, digest = ranks.first(lambda: _begun(config)) if config.init_from else (True, None)
    return digest if begun else start_from(config, unet)


def _begun(config: TrainTeacherConfig) -> tuple[bool, str | None]:
    """Whether there is a checkpoint to go on from, and the digest that it names."""
    newest = newest_checkpoint(teacher_run(config).last, TRAIN_TEACHER)
    return newest is not None, newest.state["started_from"] if newest is not None else None


def _refuse_different(ranks: Ranks, images: TrainImages) -> None:
    """All ranks read the same images, or the steps they take are not one run."""
    nums = ranks.gather(len(images.keys))
    if len(set(nums)) > 1:
        raise ConfigError(
            f"the processes found different images ({nums} of them); --images must be a folder that all machines share"
        )


class TeacherTraining:
    """Network, moving average and optimiser of one run, and the loss of a batch."""

    def __init__(
        self,
        config: TrainTeacherConfig,
        images: TrainImages,
        device: torch.device,
        ranks: Ranks = ALONE,
        begin: Callable[[nn.Module], str | None] = lambda _unet: None,
    ) -> None:
        """`begin` may change the initial weights; it returns the digest of where they are from."""
        self.config, self.images, self.device, self.ranks = config, images, device, ranks
        self.unet = build_unet(config, len(images.classes)).to(device).train()
        self.started_from = begin(self.unet)
        self.ema = copy.deepcopy(self.unet)
        self.network = ranks.wrap(self.unet, device)
        self.optimizer = AdamW(self.unet.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
        self.watch = Stopwatch(device)
        self.schedule = torch.from_numpy(noise_schedule(config)).to(device)
        self.course = _course(config, len(images.keys), device)

    def batches(self, step: int) -> Iterator[NoiseBatch]:
        """This process's part of each step, from one on."""
        for batch in batches_ahead(self.config, self.images, step, self.ranks.share(self.config.batch_size)):
            with self.watch.time("transfer"):
                batch = batch.to(self.device)
            yield batch

    def losses(self, batch: NoiseBatch) -> dict[str, Tensor]:
        """The weighted loss, E w(t) |eps - eps_theta(x_t, t)|^2."""
        kept = self.schedule[batch.timesteps]  # (b,)
        signal, noise = (share.sqrt().float().view(-1, 1, 1, 1) for share in (kept, 1 - kept))
        noisy = signal * batch.clean + noise * batch.noise
        with autocast(self.course.precision, self.device):
            predicted = self.network(noisy, batch.timesteps, batch.labels, return_dict=False)[0]
        errors = (predicted.float() - batch.noise).square().mean(dim=(1, 2, 3))  # (b,)
        return {"loss": (errors * loss_weight(self.config, kept)).mean()}

    def learning_rate(self, step: int) -> float:
        """Warm-up, constant, and linear decay at the end."""
        config = self.config
        return warmup_hold_decay(step, config.run.steps, config.warmup_steps, config.run.decay_steps, config.lr)

    def updated(self, step: int) -> None:
        """Move the average, which follows fast at first."""
        decay = min(self.config.ema_decay, step / (step + 9))
        with torch.no_grad():
            for mean, value in zip(self.ema.state_dict().values(), self.unet.state_dict().values(), strict=True):
                mean.lerp_(value, 1 - decay)

    def named(self) -> Mapping[str, Any]:
        """What a checkpoint holds."""
        return {"unet": self.unet, "ema": self.ema, "started_from": self.started_from}


def _course(config: TrainTeacherConfig, num_images: int, device: torch.device) -> Course:
    return Course(
        num_steps=config.run.steps,
        steps_per_epoch=num_images / config.batch_size,
        epoch_size=num_images,
        seed=config.seed,
        precision=pick_precision(config.precision, device),
        clip_grad=config.grad_clip,
        log_every=config.run.log_every,
        save_every=config.run.checkpoint_every,
        max_s=math.inf if config.run.max_hours is None else config.run.max_hours * 3600,
        tracking=config.run,
        remedy=_REMEDY,
        smaller="train anew in another --out with a smaller train_teacher.batch_size",
    )


def loss_weight(config: TrainTeacherConfig, kept: Tensor) -> Tensor:
    """Weight of each image's error at alphas_cumprod `kept`: 1, or min(SNR, 5) / SNR with SNR = a / (1 - a).

    Shapes: (b,) -> (b,), float32.
    """
    if config.loss_weighting == "simple":
        return kept.new_ones(kept.shape).float()
    snr = kept / (1 - kept)
    return (snr.clamp(max=_SNR_LIMIT) / snr).float()
