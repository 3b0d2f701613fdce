"""Panoptic FPN: the detector of `detector.py` and a semantic branch on the same pyramid, merged into one map.

Source: Kirillov et al., Panoptic Feature Pyramid Networks, arXiv 1901.02446; losses are weighted 1 and 0.5 as in
detectron2's `panoptic_fpn` for COCO; segments are merged as in Kirillov et al., Panoptic Segmentation, arXiv
1801.00868, section 7, with the thresholds of detectron2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from dtpipe.distill.downstream.tuned.base import LearnTarget
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.heads.canvas import Canvas
from dtpipe.distill.downstream.tuned.heads.detector import InstanceBranch, check_one_look, read_detections
from dtpipe.distill.downstream.tuned.heads.levels import enough_for_norms
from dtpipe.distill.downstream.tuned.heads.regions import total
from dtpipe.distill.downstream.tuned.predictions import Detections, PanopticPrediction
from dtpipe.distill.student.blocks import conv_norm_relu, resize
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import IGNORE_VALUE, ClassTable

MIN_SCORE = 0.5
MIN_FREE = 0.5
"""Share of an object's mask that surer objects must leave free."""


class SemanticBranch(nn.Module):
    """Each level through 3x3 convolutions, group norm, ReLU and doublings to the finest stride; the sum of all.

    Source: arXiv 1901.02446, section 3 and figure 3; a level of the finest stride has one convolution.
    """

    def __init__(self, strides: Sequence[int], channels_in: int, num_logits: int) -> None:
        """Half the pyramid's channels, which are 128 of 256 in the paper."""
        super().__init__()
        width = channels_in // 2
        self.doublings = [(stride // strides[0]).bit_length() - 1 for stride in strides]
        self.levels = nn.ModuleList(
            nn.ModuleList(
                conv_norm_relu(channels_in if idx == 0 else width, width, 3, "group") for idx in range(max(1, count))
            )
            for count in self.doublings
        )
        self.logits = nn.Conv2d(width, num_logits, 1)

    def forward(self, levels: Sequence[Tensor]) -> Tensor:
        """Shapes: finest first (B, C, H / 2^i, W / 2^i) -> (B, K, H, W)."""
        finest = levels[0].shape[-2:]
        maps = [self._raise(*parts, finest) for parts in zip(self.levels, levels, self.doublings, strict=True)]
        logits: Tensor = self.logits(torch.stack(maps).sum(dim=0))
        return logits

    def _raise(self, convs: nn.Module, level: Tensor, doublings: int, finest: torch.Size) -> Tensor:
        assert isinstance(convs, nn.ModuleList)
        for conv in convs:
            level = conv(level)
            if doublings:
                level = F.interpolate(level, scale_factor=2, mode="bilinear", align_corners=False)
        return resize(level, finest)


class PanopticFPN(nn.Module):
    """A student with an instance branch for things and a semantic one for stuff."""

    def __init__(self, student: Student, classes: ClassTable, config: TuneConfig) -> None:
        """Raises: ConfigError when there are no things, no stuff or no mask head; as `Detector`."""
        super().__init__()
        check_one_look(config)
        self.things, self.stuff = split_classes(classes)
        if not config.head.masks:
            raise ConfigError("panoptic segmentation needs the mask head; leave out eval.tune.head.masks=false")
        self.config = config
        self.student = student
        self.branch = InstanceBranch(student, len(self.things), config.head)
        self.semantic = SemanticBranch(self.branch.pyramid.strides, config.head.width, len(self.stuff) + 1)
        self.canvas = Canvas.of(student, config.inference)

    def forward(self, images: Sequence[Tensor], targets: Sequence[LearnTarget]) -> dict[str, Tensor]:
        """`loss` and its parts. Shapes: as `Detector.forward`; targets also have `semantic` (H, W).

        It holds 0 for any thing, 1 + place in the list of stuff, 255 where nothing is known.
        """
        batch = self.canvas.lay(images)
        with enough_for_norms():
            features = self.branch.pyramid(self.student(batch.tensors), batch.tensors.shape[-2:])
        losses = self.branch(features, batch, targets)[1]
        semantic = self._semantic_loss(features, batch.tensors.shape[-2:], [target["semantic"] for target in targets])
        return total({**losses, "loss_semantic": self.config.head.semantic_weight * semantic})

    def _semantic_loss(
        self, features: Mapping[str, Tensor], canvas_px: Sequence[int], maps: Sequence[Tensor]
    ) -> Tensor:
        """Mean cross-entropy over the known pixels of the batch; 0 where none is."""
        truth = maps[0].new_full((len(maps), *canvas_px), IGNORE_VALUE)
        for place, numbers in zip(truth, maps, strict=True):
            place[: numbers.shape[0], : numbers.shape[1]] = numbers
        logits = self._semantic_logits(features, canvas_px).float()
        summed = F.cross_entropy(logits, truth, ignore_index=IGNORE_VALUE, reduction="sum")
        return summed / (truth != IGNORE_VALUE).sum().clamp(min=1)

    def _semantic_logits(self, features: Mapping[str, Tensor], canvas_px: Sequence[int]) -> Tensor:
        return resize(self.semantic([features[name] for name in self.branch.pyramid.names]), canvas_px)

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> list[PanopticPrediction]:
        """Segments of whole images, at their own sizes."""
        device = next(self.parameters()).device
        batch = self.canvas.lay([self.canvas.fit(image.to(device)) for image in images])
        features = self.branch.pyramid(self.student(batch.tensors), batch.tensors.shape[-2:])
        results, _ = self.branch(features, batch, None)
        logits = self._semantic_logits(features, batch.tensors.shape[-2:])
        predictions = []
        for image, result, looked, scores in zip(images, results, batch.image_sizes, logits, strict=True):
            size = (image.shape[-2], image.shape[-1])
            semantic = resize(scores[None, :, : looked[0], : looked[1]], size)[0].argmax(dim=0)
            detections = read_detections(result, looked, size)
            predictions.append(self._merge(detections, semantic.cpu().numpy()))
        return predictions

    def _merge(self, detections: Detections, semantic: NDArray[np.int64]) -> PanopticPrediction:
        return merge_segments(detections, semantic, self.things, self.stuff, self.config.head.min_stuff_px)


def split_classes(classes: ClassTable) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Class numbers of things and of stuff, each in order. Raises: ConfigError when there are none of either."""
    things = tuple(sorted(classes.things))
    stuff = tuple(number for number in range(len(classes)) if number not in classes.things)
    for kind, numbers, task in (("things to count", things, "segment"), ("stuff", stuff, "detect")):
        if not numbers:
            raise ConfigError(f"none of the {len(classes)} classes is {kind}; use task {task}")
    return things, stuff


def merge_segments(
    detections: Detections,
    semantic: NDArray[np.int64],
    things: Sequence[int],
    stuff: Sequence[int],
    min_stuff_px: int,
) -> PanopticPrediction:
    """Objects that are sure enough, the surest on top, then stuff on what they leave free.

    An object of which surer ones cover more than half is left out, and so is stuff of fewer than `min_stuff_px` px.
    Shapes: semantic (H, W), 0 for things and 1 + place in `stuff`.
    """
    assert detections.masks is not None
    segments = np.zeros(semantic.shape, np.int32)
    classes: dict[int, int] = {}
    for mask, number, score in zip(detections.masks, detections.classes, detections.scores, strict=True):
        free = mask & (segments == 0)
        if score >= MIN_SCORE and free.any() and free.sum() >= MIN_FREE * mask.sum():
            classes[len(classes) + 1] = things[number]
            segments[free] = len(classes)
    for place, number in enumerate(stuff, start=1):
        free = (semantic == place) & (segments == 0)
        if free.any() and free.sum() >= min_stuff_px:
            classes[len(classes) + 1] = number
            segments[free] = len(classes)
    return PanopticPrediction(segments, classes)
