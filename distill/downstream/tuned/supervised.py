"""Supervised baseline: the same student, trained from scratch on the labelled images alone for as many steps.

Unlike the other tasks nothing is frozen: the network is scored by its own head, a linear classifier on the last level's
mean for classes, one per cell on all levels for masks. Images are drawn and mirrored by the seed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import AdamW

from dtpipe.distill.downstream.compare import make_draws, metric_of
from dtpipe.distill.downstream.config import ProbeConfig, SupervisedConfig
from dtpipe.distill.downstream.extractors import FeatureExtractor, random_student, row_batches, student_extractor
from dtpipe.distill.downstream.frozen.readout import at_grid, confusion_matrix, iou_score, masks_at_stride
from dtpipe.distill.downstream.labelled import IGNORE, LabelledSet, SampleRows, check_apart, count_classes
from dtpipe.distill.downstream.registry import find_frozen
from dtpipe.distill.downstream.result import HEAD, ProbeResult, Score
from dtpipe.distill.engine.device import seeded
from dtpipe.distill.engine.loop import run, run_in_memory
from dtpipe.distill.engine.optim import warmup_cosine
from dtpipe.distill.engine.run_folder import RunSettings
from dtpipe.distill.engine.timing import Stopwatch
from dtpipe.distill.engine.trainer import Course
from dtpipe.distill.stream.batch import flip_where, student_images
from dtpipe.distill.student.student import Student, StudentSpec, spec_to_dict
from dtpipe.manifests.labels import Mask

SUPERVISED = "supervised"


class SupervisedNet(nn.Module):
    """A student with a linear head: for classes when `stride` is None, else for cells of that stride."""

    def __init__(self, student: Student, num_classes: int, stride: int | None) -> None:
        super().__init__()
        self.student = student
        self.stride = stride
        used = student.channels[-1:] if stride is None else student.channels
        self.heads = nn.ModuleList(nn.Conv2d(channels, num_classes, 1) for channels in used)
        for head in self.heads:
            nn.init.zeros_(head.weight)  # type: ignore[arg-type]
            nn.init.zeros_(head.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor) -> Tensor:
        """Logits. Shapes: (B, H, W, 3) uint8 -> (B, K), or (B, K, H/stride, W/stride)."""
        levels = self.student(student_images(images, self.student.spec.image_px))
        if self.stride is None:
            pooled = levels[-1].mean(dim=(2, 3), keepdim=True)  # (B, C, 1, 1)
            return torch.flatten(self.heads[0](pooled), 1)
        grid = (images.shape[1] // self.stride, images.shape[2] // self.stride)
        parts = [at_grid(head(level), grid) for head, level in zip(self.heads, levels, strict=True)]
        return torch.stack(parts).sum(dim=0)


@dataclass(frozen=True)
class Supervised:
    """A trained baseline. `extractor` gives its levels, for probing it like any other student."""

    net: SupervisedNet
    final_loss: float

    @property
    def extractor(self) -> FeatureExtractor:
        """The backbone without its head."""
        return student_extractor(self.net.student, next(self.net.parameters()).device, SUPERVISED)

    def score(self, labelled: LabelledSet, num_classes: int, batch_size: int = 64) -> float:
        """Accuracy, or IoU of cells."""
        self.net.eval()
        device = next(self.net.parameters()).device
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        with torch.no_grad():
            for rows in row_batches(labelled, batch_size):
                predicted = self.net(labelled.read_images(rows).to(device)).argmax(dim=1).cpu()
                truth = read_targets(labelled, rows, num_classes, self.net.stride)
                confusion += confusion_matrix(truth, predicted, num_classes)
        if self.net.stride is not None:
            return iou_score(confusion)
        return int(confusion.diagonal().sum()) / int(confusion.sum())


def read_targets(labelled: LabelledSet, rows: SampleRows, num_classes: int, stride: int | None) -> Tensor:
    """What a head of `stride` learns from images. Shapes: -> classes (n,), or of masks those of cells (n, h, w)."""
    if stride is None:
        return torch.from_numpy(labelled.read_classes(rows))
    return masks_at_stride(labelled.read_masks(rows), stride, num_classes)


@dataclass(frozen=True)
class LabelledBatch:
    """The images of one step, on the device."""

    images: Tensor
    """(B, H, W, 3) uint8"""
    targets: Tensor
    """(B,) int64, or (B, h, w) where cells are classified."""
    keys: tuple[str, ...]
    weight: float = 1.0
    last: bool = True

    @property
    def num_global(self) -> int:
        """Images of the step."""
        return len(self.keys)


class SupervisedTraining:
    """Network and optimiser of one baseline, and the loss of a batch. One process trains it."""

    def __init__(
        self,
        network: SupervisedNet,
        labelled: LabelledSet,
        num_classes: int,
        config: SupervisedConfig,
        seed: int,
        device: torch.device,
    ) -> None:
        self.labelled, self.num_classes, self.config, self.device = labelled, num_classes, config, device
        self.network = network.to(device).train()
        self.optimizer = AdamW(network.parameters(), lr=config.lr, betas=(0.9, 0.95), weight_decay=config.weight_decay)
        self.watch = Stopwatch(device)
        size = batch_size(len(labelled), config)
        often = max(1, config.steps // 10)
        self.course = Course(config.steps, len(labelled) / size, len(labelled), seed, log_every=1, save_every=often)

    def batches(self, step: int) -> Iterator[LabelledBatch]:
        """One batch for each step, images and masks mirrored alike; earlier steps are drawn and not read."""
        drawn = draw_steps(len(self.labelled), self.config, self.course.seed)
        for rows, flips in islice(drawn, step, None):
            images = self.labelled.read_images(rows).to(self.device)
            targets = read_targets(self.labelled, rows, self.num_classes, self.network.stride).to(self.device)
            images, targets = flip_both(images, targets, torch.from_numpy(flips).to(self.device))
            yield LabelledBatch(images, targets, tuple(self.labelled.keys[row] for row in rows))

    def losses(self, batch: LabelledBatch) -> dict[str, Tensor]:
        """Cross-entropy."""
        return {"loss": F.cross_entropy(self.network(batch.images), batch.targets, ignore_index=IGNORE)}

    def learning_rate(self, step: int) -> float:
        """Warm-up, then half a cosine."""
        config = self.config
        return warmup_cosine(step, config.steps, round(config.warmup_share * config.steps), config.lr)

    def updated(self, step: int) -> None:
        """No average is kept."""

    def named(self) -> Mapping[str, Any]:
        """What a checkpoint holds."""
        return {"network": self.network}


def train_supervised(
    spec: StudentSpec,
    labelled: LabelledSet,
    num_classes: int,
    config: SupervisedConfig,
    seed: int,
    stride: int | None = None,
    device: torch.device | str = "cpu",
    folder: Path | None = None,
) -> Supervised:
    """Train a student and a head from random weights on labelled images, for `config.steps` steps of AdamW.

    In a folder the training can be stopped, and goes on there when called again. Raises: as the engine's `run`.
    """
    device = torch.device(device)
    with seeded(seed, device):
        network = SupervisedNet(random_student(spec, seed), num_classes, stride)
        trainer = SupervisedTraining(network, labelled, num_classes, config, seed, device)
        if folder is None:
            losses = run_in_memory(trainer)
        else:
            identity = {"student": spec_to_dict(spec), "stride": stride, "seed": seed, "images": list(labelled.keys)}
            losses = run(trainer, RunSettings(folder, SUPERVISED, config, identity=identity)).losses
    return Supervised(network.eval(), losses["loss"])


def batch_size(num_images: int, config: SupervisedConfig) -> int:
    """Images per step. A batch norm needs two."""
    return min(config.batch_size, max(num_images, 2))


def draw_steps(
    num_images: int, config: SupervisedConfig, seed: int
) -> Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]:
    """The rows of each step, and which are mirrored: shuffled passes one after another, cut into batches."""
    generator, size = np.random.Generator(np.random.Philox(seed)), batch_size(num_images, config)
    waiting = np.empty(0, dtype=np.int64)
    for _ in range(config.steps):
        while len(waiting) < size:
            waiting = np.concatenate([waiting, generator.permutation(num_images)])
        yield waiting[:size], generator.random(size) < 0.5 if config.flip else np.zeros(size, bool)
        waiting = waiting[size:]


def flip_both(images: Tensor, targets: Tensor, flip: Tensor) -> tuple[Tensor, Tensor]:
    """Images and their masks mirrored where `flip` says so; classes stay. Shapes: flip (B,) bool."""
    if targets.ndim == 3:
        targets = torch.where(flip[:, None, None], targets.flip(2), targets)
    return flip_where(images, flip), targets


def run_supervised(
    task: str,
    spec: StudentSpec,
    train: LabelledSet,
    test: LabelledSet,
    num_labelled: Sequence[int | None],
    seeds: Sequence[int],
    config: SupervisedConfig,
    probe: ProbeConfig | None = None,
    device: torch.device | str = "cpu",
    on_progress: Callable[[str], None] | None = None,
    folder: Path | None = None,
) -> ProbeResult:
    """The baseline's held-out scores on the draws that `run_probe` makes for `task`; merge both results for one table.

    Each seed and number of labels is a training of its own, in a folder of its own inside `folder` where that is given.
    Raises: ConfigError as `run_probe` does.
    """
    entry, probe = find_frozen(task), probe or ProbeConfig()
    check_apart(train, test)
    metric, num_classes = metric_of(entry, train, test), count_classes(train, test)
    stride = probe.stride if entry.target is Mask else None
    scores = []
    for draw in make_draws(train, num_labelled, seeds):
        if on_progress is not None:
            on_progress(f"{task}: {SUPERVISED}, {len(draw.rows)} labelled, seed {draw.seed}")
        own = folder / f"{task}-{len(draw.rows)}-{draw.seed}" if folder is not None else None
        labelled = train.subset(draw.rows)
        trained = train_supervised(spec, labelled, num_classes, config, draw.seed, stride, device, own)
        value = trained.score(test, num_classes, probe.batch_size)
        settings = {"steps": config.steps, "lr": config.lr, "final_loss": trained.final_loss}
        scores.append(Score(SUPERVISED, HEAD, len(draw.rows), draw.seed, value, best=True, settings=settings))
    return ProbeResult(task, metric, len(test), tuple(scores))
