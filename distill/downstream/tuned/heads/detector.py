"""Mask R-CNN on a student's levels: proposals, boxes and masks by torchvision's own parts.

Source: He et al., Mask R-CNN, arXiv 1703.06870; torchvision `models/detection`, whose settings hold where `HeadConfig`
has none. Samples of anchors and regions are drawn from torch's global generator, so two processes that share a batch
draw others than one.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import paste_masks_in_image

from dtpipe.distill.downstream.tuned.base import LearnTarget
from dtpipe.distill.downstream.tuned.config import HeadConfig, TuneConfig
from dtpipe.distill.downstream.tuned.heads.canvas import Canvas
from dtpipe.distill.downstream.tuned.heads.fpn import DetectionPyramid
from dtpipe.distill.downstream.tuned.heads.levels import enough_for_norms
from dtpipe.distill.downstream.tuned.heads.regions import build_regions, build_rpn, total
from dtpipe.distill.downstream.tuned.predictions import Detections
from dtpipe.distill.student.student import Student
from dtpipe.manifests.errors import ConfigError

MASK_THRESHOLD = 0.5
_PASTED_BYTES = 1 << 28  # of masks as probabilities at once


class InstanceBranch(nn.Module):
    """Pyramid, proposals and regions: all of a detector but the student."""

    def __init__(self, student: Student, num_classes: int, head: HeadConfig) -> None:
        super().__init__()
        self.pyramid = DetectionPyramid(student, head.width, head.norm)
        self.rpn = build_rpn(self.pyramid, head)
        self.roi_heads = build_regions(self.pyramid, num_classes, head)

    def forward(
        self, features: Mapping[str, Tensor], batch: ImageList, targets: Sequence[LearnTarget] | None
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in canvas pixels in eval mode, losses in training mode; the other is empty."""
        dicts = None if targets is None else [dict(target) for target in targets]
        proposals, losses = self.rpn(batch, dict(features), dicts)
        detections, region_losses = self.roi_heads(features, proposals, batch.image_sizes, dicts)
        return detections, {**losses, **region_losses}


class Detector(nn.Module):
    """A student with an instance branch; classes count from 0 outside, from 1 inside, where 0 is background."""

    def __init__(self, student: Student, num_classes: int, config: TuneConfig) -> None:
        """Raises: ConfigError for a look at images that detection does not have; as `DetectionPyramid`."""
        super().__init__()
        check_one_look(config)
        self.student = student
        self.branch = InstanceBranch(student, num_classes, config.head)
        self.canvas = Canvas.of(student, config.inference)

    def forward(self, images: Sequence[Tensor], targets: Sequence[LearnTarget]) -> dict[str, Tensor]:
        """`loss` and its parts, means over the sampled anchors and regions of the batch.

        Shapes: images (3, H, W); targets `boxes` (n, 4) px, `labels` (n,) from 1, `masks` (n, H, W) uint8.
        """
        batch = self.canvas.lay(images)
        with enough_for_norms():
            features = self.branch.pyramid(self.student(batch.tensors), batch.tensors.shape[-2:])
        return total(self.branch(features, batch, targets)[1])

    @torch.no_grad()
    def predict(self, images: Sequence[Tensor]) -> list[Detections]:
        """Objects in whole images, at their own sizes, the surest first."""
        device = next(self.parameters()).device
        batch = self.canvas.lay([self.canvas.fit(image.to(device)) for image in images])
        features = self.branch.pyramid(self.student(batch.tensors), batch.tensors.shape[-2:])
        results, _ = self.branch(features, batch, None)
        return [
            read_detections(result, looked, (image.shape[-2], image.shape[-1]))
            for result, looked, image in zip(results, batch.image_sizes, images, strict=True)
        ]


def check_one_look(config: TuneConfig) -> None:
    """Refuse several looks at an image, whose boxes nobody merges. Raises: ConfigError naming the setting."""
    inference = config.inference
    several = {
        "flips": inference.flips,
        "scales": inference.scales != (1.0,),
        "window_px": inference.window_px is not None,
    }
    for name, asked in several.items():
        if asked:
            raise ConfigError(
                f"detection looks once at each whole image, and eval.tune.inference.{name} asks for more; leave it out"
            )


def read_detections(result: Mapping[str, Tensor], looked_px: tuple[int, int], size_px: tuple[int, int]) -> Detections:
    """A detector's answer on a canvas as objects in an image of `size_px`, on the CPU."""
    height, width = (own / looked for own, looked in zip(size_px, looked_px, strict=True))
    boxes = result["boxes"].float() * result["boxes"].new_tensor([width, height, width, height])
    masks = None
    if "masks" in result:
        masks = _pasted(result["masks"].float(), boxes, size_px)
    return Detections(
        size_px=size_px,
        boxes=boxes.cpu().numpy(),
        classes=(result["labels"] - 1).cpu().numpy(),
        scores=result["scores"].float().cpu().numpy(),
        masks=masks,
    )


def _pasted(masks: Tensor, boxes: Tensor, size_px: tuple[int, int]) -> NDArray[np.bool_]:
    """Masks in the image, a few at a time: as probabilities they take four times the room.

    Shapes: masks (n, 1, m, m), boxes (n, 4) px of the image -> (n, H, W).
    """
    whole = np.empty((len(masks), *size_px), dtype=bool)
    num = max(1, _PASTED_BYTES // (4 * size_px[0] * size_px[1]))
    for start in range(0, len(masks), num):
        part = slice(start, start + num)
        pasted = paste_masks_in_image(masks[part], boxes[part], size_px)  # (num, 1, H, W)
        whole[part] = (pasted[:, 0] >= MASK_THRESHOLD).cpu().numpy()
    return whole
