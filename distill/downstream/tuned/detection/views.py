"""Training views of images with objects or segments, as torchvision's detectors take them.

Crowds are dropped from objects, as in torchvision's references: what lies there counts as background where no object
is. Images without objects are kept. In segments, crowds are ignored by the semantic branch.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.ops import masks_to_boxes
from torchvision.transforms import v2

from dtpipe.distill.downstream.tuned.base import Example
from dtpipe.distill.downstream.tuned.config import TuneConfig
from dtpipe.distill.downstream.tuned.detection.geometry import to_student, vary_whole
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import IGNORE_VALUE, Instances, Panoptic, Pixels, Target

MIN_BOX_PX = 1.0


@dataclass(frozen=True)
class InstanceViews:
    """Objects in training: boxes (n, 4) px, labels (n,) from 1 and, with a mask head, masks (n, H, W) uint8."""

    config: TuneConfig

    def __call__(self, pixels: Pixels, target: Target) -> Example:
        """Boxes are those of the data set, moved along; after a crop, those of the masks where there are masks.

        Raises: ConfigError when masks are to be learned from and there are boxes alone.
        """
        assert isinstance(target, Instances)
        rows = np.flatnonzero(target.counts)
        boxes = torch.from_numpy(target.boxes[rows]).float().reshape(-1, 4)
        tied: dict[str, Tensor] = {
            "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=pixels.shape[:2]),
            "labels": torch.from_numpy(1 + target.classes[rows]),
        }
        if self.config.head.masks:
            if target.masks is None:
                raise ConfigError(
                    "these labels are boxes without masks, and a mask head learns from masks; "
                    "give -s eval.tune.head.masks=false"
                )
            tied["masks"] = tv_tensors.Mask(torch.from_numpy(target.masks[rows]).to(torch.uint8))
        image, tied = vary_whole(pixels, tied, self.config.augment)
        if "masks" in tied:
            tied = _without_lost(tied)
            if self.config.augment.crop_px is not None:
                tied["boxes"] = tv_tensors.wrap(outer_boxes(tied["masks"]), like=tied["boxes"])
        image, tied = v2.SanitizeBoundingBoxes(min_size=MIN_BOX_PX)(image, tied)
        return Example(to_student(image), {name: value.as_subclass(Tensor) for name, value in tied.items()})


def _without_lost(tied: dict[str, Tensor]) -> dict[str, Tensor]:
    """The objects of which a pixel is left."""
    kept = (tied["masks"].as_subclass(Tensor) > 0).flatten(1).any(dim=1)
    return {name: tv_tensors.wrap(value[kept], like=value) for name, value in tied.items()}


def outer_boxes(masks: Tensor) -> Tensor:
    """Boxes of masks that have pixels, right and bottom edges outside. Shapes: (n, H, W) -> (n, 4) float32."""
    edges: Tensor = masks_to_boxes(masks.as_subclass(Tensor))
    return edges + edges.new_tensor([0, 0, 1, 1])


@dataclass(frozen=True)
class PanopticViews:
    """Segments in training: the objects of `InstanceViews` among things, and `semantic` (H, W) int64.

    `semantic` holds 0 for any thing, 1 + place in `stuff`, and 255 where nothing is known and at crowds.
    """

    things: tuple[int, ...]
    stuff: tuple[int, ...]
    config: TuneConfig

    def __call__(self, pixels: Pixels, target: Target) -> Example:
        """Boxes are those of the masks."""
        assert isinstance(target, Panoptic)
        ids, places = np.unique(target.segments, return_inverse=True)
        segments = torch.from_numpy(places.reshape(target.segments.shape).astype(np.int32))
        tied: dict[str, Tensor] = {"segments": tv_tensors.Mask(segments[None])}
        image, tied = vary_whole(pixels, tied, self.config.augment)
        varied = tied["segments"].as_subclass(Tensor)[0].long()  # (H, W)
        labels, semantic = (torch.tensor(table) for table in self._meanings(target, ids.tolist()))
        present = torch.from_numpy(np.unique(varied.numpy()))
        things = present[labels[present] > 0]
        masks = varied == things[:, None, None]  # (n, H, W)
        learned = {"labels": labels[things], "masks": masks.to(torch.uint8), "semantic": semantic[varied]}
        return Example(to_student(image), {"boxes": outer_boxes(masks), **learned})

    def _meanings(self, target: Panoptic, ids: list[int]) -> tuple[list[int], list[int]]:
        """For each segment id, the label of its thing, 0 for none, and its semantic class."""
        labels, semantic = [], []
        for segment in ids:
            number = None if segment in target.crowd else target.classes.get(segment)
            labels.append(1 + self.things.index(number) if number in self.things else 0)
            known = number in self.things or number in self.stuff
            semantic.append((0 if labels[-1] else 1 + self.stuff.index(number or 0)) if known else IGNORE_VALUE)
        return labels, semantic
