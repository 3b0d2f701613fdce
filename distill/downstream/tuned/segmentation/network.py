"""A student with a head that classifies pixels: its losses in training, and masks of whole images.

Logits are brought to the target's size before the loss, and to the image's own before anything is said of it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby, islice
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.downstream.labelled import IGNORE
from dtpipe.distill.downstream.tuned.base import LearnTarget
from dtpipe.distill.downstream.tuned.config import HeadConfig, TuneConfig
from dtpipe.distill.downstream.tuned.heads.fcn import FullyConvolutional
from dtpipe.distill.downstream.tuned.heads.levels import HeadLevels, enough_for_norms
from dtpipe.distill.downstream.tuned.heads.upernet import UPerNet
from dtpipe.distill.downstream.tuned.predictions import MaskPrediction
from dtpipe.distill.downstream.tuned.segmentation.bands import MOST_BYTES, band_rows, image_bytes, probability_bands
from dtpipe.distill.downstream.tuned.segmentation.inference import Views, class_probabilities
from dtpipe.distill.student.blocks import resize
from dtpipe.distill.student.student import Student, model_options
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import ClassTable

MASK_TARGET = "mask"
"""Name of what is learned: (H, W) int64 class numbers, `IGNORE` where none is known."""
AUX_STRIDE = 16
"""Of the level that the auxiliary head reads, mmsegmentation's third."""


class Segmenter(nn.Module):
    """A student, its levels as heads take them, a head, and perhaps an auxiliary head that only trains."""

    def __init__(
        self,
        student: Student,
        levels: HeadLevels,
        head: nn.Module,
        aux: nn.Module | None,
        num_classes: int,
        config: TuneConfig,
        used: Sequence[int] | None = None,
    ) -> None:
        """head, aux: levels, finest first, to logits; `used` are places of the levels that the head reads."""
        super().__init__()
        self.student, self.levels, self.head, self.aux = student, levels, head, aux
        self.aux_weight = 0.0 if aux is None else config.head.aux_weight
        self.used, self.num_classes = used, num_classes
        self.views = Views.of(config.inference, own_px=_only_px(student))
        _check_crop(student, config)

    def forward(self, images: Sequence[Tensor], targets: Sequence[LearnTarget]) -> Mapping[str, Tensor]:
        """Cross-entropy of all pixels; ignored ones add nothing, but count among them, as in mmsegmentation.

        Images of several sizes are filled up at the right and the bottom, which nothing is learned from.

        Shapes: images (3, H, W) in [-1, 1], targets {mask: (H, W) int64}.
        Raises: ConfigError when batch norms would see one value per channel.
        """
        masks = _stack([target[MASK_TARGET] for target in targets], IGNORE)
        with enough_for_norms():
            levels = self.levels(self.student(_stack(images, 0.0)))
            main = pixel_loss(self.head(self._read(levels)), masks)
            if self.aux is None:
                return {"loss": main}
            aux = pixel_loss(self.aux([levels[self.levels.strides.index(AUX_STRIDE)]]), masks)
        return {"loss": main + self.aux_weight * aux, "main": main, "aux": aux}

    def logits(self, images: Tensor) -> Tensor:
        """Shapes: (B, 3, H, W) in [-1, 1] -> (B, K, h, w) float32, of the finest level's size."""
        logits: Tensor = self.head(self._read(self.levels(self.student(images))))
        return logits.float()

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> list[MaskPrediction]:
        """Masks of whole images; neighbours of one size go through together, as far as there is room for them.

        Shapes: (3, H, W) float32 in [-1, 1] each.
        """
        predictions: list[MaskPrediction] = []
        for (_, height, width), group in groupby(images, key=lambda image: image.shape):
            num_fit = MOST_BYTES // image_bytes(self.num_classes, (height, width), self.views)
            while part := list(islice(group, max(1, num_fit))):
                batch = torch.stack(part).to(self.student.mean.device)
                predictions.extend(map(to_prediction, self._in_bands(batch) if not num_fit else self._whole(batch)))
        return predictions

    def _whole(self, images: Tensor) -> Iterator[list[Tensor]]:
        return ([whole] for whole in class_probabilities(self.logits, images, self.views))

    def _in_bands(self, images: Tensor) -> Iterator[Iterator[Tensor]]:
        num_rows = band_rows(self.num_classes, images.shape[-1], self.views)
        return (probability_bands(self.logits, image, self.views, num_rows) for image in images)

    def _read(self, levels: Sequence[Tensor]) -> Sequence[Tensor]:
        return levels if self.used is None else [levels[idx] for idx in self.used]


def pixel_loss(logits: Tensor, masks: Tensor) -> Tensor:
    """Cross-entropy at the masks' size: a sum over the known pixels, divided by the number of all.

    So it is the mean of what the images have alone, however they are put into batches.
    Source: mmsegmentation's CrossEntropyLoss with avg_non_ignore false.

    Shapes: logits (B, K, h, w), masks (B, H, W) int64 -> scalar.
    """
    resized = resize(logits.float(), masks.shape[-2:])
    return F.cross_entropy(resized, masks, ignore_index=IGNORE, reduction="sum") / masks.numel()


def to_prediction(bands: Iterable[Tensor]) -> MaskPrediction:
    """Most likely class of each pixel, and of two classes the second's probability.

    Shapes: bands of one image from the top, (K, h, W) each.
    """
    numbers, foreground = [], []
    for probabilities in bands:
        num_classes = len(probabilities)
        likeliest = probabilities.argmax(dim=0).to(torch.uint8 if num_classes <= 256 else torch.int32)
        numbers.append(likeliest.cpu().numpy())
        if num_classes == 2:
            foreground.append(probabilities[1].cpu().numpy())
    return MaskPrediction(np.concatenate(numbers), np.concatenate(foreground) if foreground else None)


def build_upernet(student: Student, classes: ClassTable, config: TuneConfig) -> Segmenter:
    """UPerNet with its auxiliary head of half the width. Raises: ConfigError where that has no level to read."""
    head_config = config.head
    levels = HeadLevels(student, _norm_of(head_config), head_config.level_norms)
    decoder = RegressorConfig(width=head_config.width, norm=_norm_of(head_config), ppm_scales=head_config.ppm_scales)
    head = UPerNet(levels.channels, len(classes), decoder, head_config.dropout)
    return Segmenter(student, levels, head, _aux_head(student, levels, len(classes), head_config), len(classes), config)


def build_fcn(student: Student, classes: ClassTable, config: TuneConfig) -> Segmenter:
    """Two convolutions on all levels, or on the one of `head.stride`. Raises: ConfigError where there is none."""
    head_config = config.head
    levels = HeadLevels(student, _norm_of(head_config), head_config.level_norms)
    used = tuple(range(len(levels.strides)))
    if head_config.stride is not None:
        remedy = "choose one of them, or leave it out for all"
        used = (_level_of(student, levels, head_config.stride, "eval.tune.head.stride asks for", remedy),)
    levels.keep_only(used)
    head = FullyConvolutional(
        [levels.channels[idx] for idx in used],
        len(classes),
        head_config.width,
        head_config.norm,
        num_convs=2,
        skip=True,
        dropout=head_config.dropout,
    )
    return Segmenter(student, levels, head, None, len(classes), config, used)


def _norm_of(config: HeadConfig) -> Literal["batch", "group"]:
    if config.norm == "none":
        raise ConfigError(
            "eval.tune.head.norm is none, and convolutions of segmentation have norms; give batch or group"
        )
    return config.norm


def _aux_head(student: Student, levels: HeadLevels, num_classes: int, config: HeadConfig) -> nn.Module | None:
    if not config.aux_weight:
        return None
    remedy = "give -s eval.tune.head.aux_weight=0, or another student"
    channels = levels.channels[_level_of(student, levels, AUX_STRIDE, "the auxiliary head reads", remedy)]
    return FullyConvolutional([channels], num_classes, config.width // 2, config.norm, dropout=config.dropout)


def _level_of(student: Student, levels: HeadLevels, stride: int, wanted: str, remedy: str) -> int:
    if stride not in levels.strides:
        strides = ", ".join(map(str, levels.strides))
        raise ConfigError(
            f"{wanted} a level of stride {stride}, and student {student.spec.name} has those of {strides}; {remedy}"
        )
    return levels.strides.index(stride)


def _only_px(student: Student) -> tuple[int, int] | None:
    """The one image size that a student takes; None where it takes any."""
    return student.spec.image_px if model_options(student.spec) else None


def _check_crop(student: Student, config: TuneConfig) -> None:
    only, crop = _only_px(student), config.augment.crop_px
    if only is not None and crop is not None and tuple(crop) != only:
        raise ConfigError(
            f"student {student.spec.name} takes images of {only[0]}x{only[1]} px alone, and crops are "
            f"{crop[0]}x{crop[1]} px; give -s eval.tune.augment.crop_px=[{only[0]},{only[1]}]"
        )


def _stack(tensors: Sequence[Tensor], fill: float) -> Tensor:
    """Of one size, filled up at the right and the bottom. Shapes: [(..., H_i, W_i)] -> (B, ..., H, W)."""
    height, width = (max(tensor.shape[dim] for tensor in tensors) for dim in (-2, -1))
    return torch.stack(
        [F.pad(tensor, (0, width - tensor.shape[-1], 0, height - tensor.shape[-2]), value=fill) for tensor in tensors]
    )
