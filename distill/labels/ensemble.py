"""A rival of the interpreter: ddpm-segmentation's ensemble of pixel classifiers, which table 5 compares with.

Small networks on the features of single pixels, all levels brought to the image's size; each pixel gets the class that
most of them say. As published, an epoch's last batch may be smaller; there a batch of one pixel, of which batch norm
has no variance, ends in an error, and here it is left out.

Source: yandex-research/ddpm-segmentation, src/pixel_classifier.py and train_interpreter.py; DatasetGAN.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.downstream.tuned.predictions import MaskPrediction
from dtpipe.distill.engine.device import seeded
from dtpipe.distill.engine.seeds import step_seed
from dtpipe.distill.labels.arms import Predict
from dtpipe.distill.labels.config import RivalsConfig
from dtpipe.distill.labels.data import LabelledFeatures
from dtpipe.distill.labels.pixels import features_at
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.phases import counted

PIXEL_CLASSIFIERS = "pixel classifiers"
BATCH_PX, RATE = 64, 1e-3
_INIT_STD = 0.02
_MANY_CLASSES = 30  # from here on the networks are wider
_PATIENCE_FROM_EPOCH, _PATIENCE = 3, 50  # after that epoch, so many steps without a lower loss end the training
_AT_ONCE_PX = 8192
_TIMED_STEPS = 32


@dataclass(frozen=True)
class LabelledPixels:
    """All labelled pixels of some images, whose features are made when they are asked for."""

    levels: Mapping[str, Tensor]
    """{level: (B, C, h, w)}"""
    size: tuple[int, int]
    images: Tensor
    """(n,)"""
    pixels: Tensor
    """(n,), numbered along the rows of an image."""
    targets: Tensor
    """(n,)"""

    def features(self, chosen: Tensor) -> Tensor:
        """Shapes: (m,) -> (m, D)."""
        return features_at(self.levels, self.images[chosen], self.pixels[chosen], self.size)


def pixel_classifier(num_features: int, num_classes: int) -> nn.Sequential:
    """One of the networks: weights N(0, 0.02), biases 0; a hidden layer ends in ReLU and then batch norm."""
    first, second = (128, 32) if num_classes < _MANY_CLASSES else (256, 128)
    layers = [nn.Linear(num_features, first), nn.ReLU(), nn.BatchNorm1d(first)]
    layers += [nn.Linear(first, second), nn.ReLU(), nn.BatchNorm1d(second), nn.Linear(second, num_classes)]
    for layer in layers:
        if isinstance(layer, nn.Linear):
            nn.init.normal_(layer.weight, 0.0, _INIT_STD)
            nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def fit_ensemble(config: RivalsConfig, train: LabelledFeatures, seed: int, device: torch.device) -> Predict:
    """Train the classifiers on the first reading of each image, unflipped; each has weights and order of its own.

    Raises: ConfigError for images of several sizes, or with too few labelled pixels.
    """
    data = _labelled_pixels(config, train, seed, device)
    num = len(train.labelled.classes)
    models = counted(range(config.pixel_models), config.pixel_models, "pixel classifiers")
    networks = [fit_pixels(data, num, config.pixel_epochs, step_seed(seed, idx, 0)) for idx in models]

    @torch.inference_mode()
    def predict(levels: Mapping[str, Tensor], size: tuple[int, int]) -> MaskPrediction:
        parts = torch.split(torch.arange(size[0] * size[1], device=device), _AT_ONCE_PX)
        votes, shares = zip(*(_vote(networks, levels, part, size) for part in parts), strict=True)
        foreground = torch.cat(shares)[:, 1].view(size).cpu().numpy() if num == 2 else None
        return MaskPrediction(torch.cat(votes).view(size).cpu().numpy(), foreground)

    return predict


def ensemble_seconds(
    config: RivalsConfig, train: LabelledFeatures, seed: int, device: torch.device
) -> tuple[float, float]:
    """The least and the most that `fit_ensemble` would take, from some steps on the pixels of two images: its networks
    stop between the first steps past the fourth epoch and the last epoch.

    Raises: as `fit_ensemble`.
    """
    few = replace(train, labelled=train.labelled.subset(range(min(2, len(train)))))
    data = _labelled_pixels(config.model_copy(update={"max_pixels": _TIMED_STEPS * BATCH_PX}), few, seed, device)
    started = time.perf_counter()
    fit_pixels(data, len(train.labelled.classes), 1, seed)
    step_s = (time.perf_counter() - started) / -(-len(data.targets) // BATCH_PX)
    num = sum(int((train.target(row) != IGNORE).sum()) for row in range(len(train)))
    per_epoch = -(-min(num, config.max_pixels or num) // BATCH_PX)
    most = config.pixel_epochs * per_epoch
    least = min(most, (_PATIENCE_FROM_EPOCH + 1) * per_epoch + 2 + _PATIENCE)
    return config.pixel_models * least * step_s, config.pixel_models * most * step_s


def fit_pixels(data: LabelledPixels, num_classes: int, num_epochs: int, seed: int) -> nn.Module:
    """Train one classifier: Adam, batches of 64 pixels, cross-entropy; in eval mode."""
    device = data.targets.device
    num_features = sum(level.shape[1] for level in data.levels.values())
    with seeded(seed, device):
        network = pixel_classifier(num_features, num_classes).to(device).train()
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    generator, best, waited = torch.Generator().manual_seed(seed), float("inf"), 0
    for epoch in range(num_epochs):
        for chosen in torch.split(torch.randperm(len(data.targets), generator=generator).to(device), BATCH_PX):
            if len(chosen) < 2:
                continue  # batch norm has no variance of one
            loss = F.cross_entropy(network(data.features(chosen)), data.targets[chosen])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            if epoch > _PATIENCE_FROM_EPOCH:
                value = loss.item()
                best, waited = (value, 0) if value < best else (best, waited + 1)
                if waited > _PATIENCE:
                    return network.eval()
    return network.eval()


def majority_vote(votes: Tensor) -> Tensor:
    """The class that most say; of equals the lower one. Shapes: (M, n) int64 -> (n,)."""
    return votes.mode(dim=0).values


def _vote(
    networks: Sequence[nn.Module], levels: Mapping[str, Tensor], pixels: Tensor, size: tuple[int, int]
) -> tuple[Tensor, Tensor]:
    """Of some pixels of one image: the class that most say, and the mean of the probabilities."""
    features = features_at(levels, torch.zeros_like(pixels), pixels, size)
    logits = torch.stack([network(features) for network in networks])  # (M, n, K)
    return majority_vote(logits.argmax(dim=2)), logits.softmax(dim=2).mean(dim=0)


def _labelled_pixels(config: RivalsConfig, train: LabelledFeatures, seed: int, device: torch.device) -> LabelledPixels:
    truths = [train.target(row) for row in range(len(train))]
    if len({truth.shape for truth in truths}) > 1:
        raise ConfigError("the labelled images have several sizes; give one size, or leave the pixel classifiers out")
    truth = torch.stack(truths).flatten(1)  # (B, H * W)
    images, pixels = torch.nonzero(truth != IGNORE, as_tuple=True)
    if config.max_pixels is not None and len(pixels) > config.max_pixels:
        kept = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(seed))[: config.max_pixels]
        images, pixels = images[kept], pixels[kept]
    if len(pixels) < 2:
        raise ConfigError("fewer than two pixels of the labelled masks count; give other masks")
    read = [train.read(row, 0, False) for row in range(len(train))]
    levels = {level.name: torch.stack([one[level.name] for one in read]).to(device) for level in train.levels}
    size = (int(truths[0].shape[0]), int(truths[0].shape[1]))
    return LabelledPixels(levels, size, images.to(device), pixels.to(device), truth[images, pixels].to(device))
