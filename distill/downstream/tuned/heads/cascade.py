"""Cascade R-CNN: three box heads one after another, each on the boxes of the one before and stricter than it.

Source: Cai and Vasconcelos, Cascade R-CNN, arXiv 1712.00726, section 4; class-agnostic boxes. As in mmdetection's
`cascade_mask_rcnn`, every stage draws its samples anew and losses are weighted 1, 0.5 and 0.25.
Differs: one mask head, which learns from the first stage's samples and reads the last one's boxes, as in detectron2;
refined copies of the true boxes stay among the proposals of later stages, as there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss, maskrcnn_inference, maskrcnn_loss
from torchvision.ops import clip_boxes_to_image, remove_small_boxes

IOUS = (0.5, 0.6, 0.7)
REGRESSION_WEIGHTS = ((10.0, 10.0, 5.0, 5.0), (20.0, 20.0, 10.0, 10.0), (30.0, 30.0, 15.0, 15.0))
LOSS_WEIGHTS = (1.0, 0.5, 0.25)
_TINY_PX = 1e-2

_Features = Mapping[str, Tensor]
_Sizes = Sequence[tuple[int, int]]


class CascadeHeads(nn.Module):
    """Called as torchvision's `RoIHeads` is. A stage is one of those, without a mask head."""

    def __init__(
        self,
        stages: Sequence[RoIHeads],
        mask_roi_pool: nn.Module | None = None,
        mask_head: nn.Module | None = None,
        mask_predictor: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.mask_roi_pool, self.mask_head, self.mask_predictor = mask_roi_pool, mask_head, mask_predictor

    def forward(
        self,
        features: _Features,
        proposals: list[Tensor],
        image_shapes: _Sizes,
        targets: Sequence[Mapping[str, Tensor]] | None = None,
    ) -> tuple[list[dict[str, Tensor]], dict[str, Tensor]]:
        """Detections in eval mode, losses in training mode; the other is empty. Shapes: proposals (n, 4) px each."""
        if self.training and targets is not None:
            return [], self._losses(features, proposals, image_shapes, targets)
        return self._detect(features, proposals, image_shapes), {}

    def _losses(
        self, features: _Features, proposals: list[Tensor], sizes: _Sizes, targets: Sequence[Mapping[str, Tensor]]
    ) -> dict[str, Tensor]:
        losses: dict[str, Tensor] = {}
        for idx, (stage, weight) in enumerate(zip(self.stages, LOSS_WEIGHTS, strict=True)):
            proposals, matched, labels, regression = stage.select_training_samples(proposals, targets)  # type: ignore[operator]
            logits, deltas = _look(stage, features, proposals, sizes)
            classifier, box = fastrcnn_loss(logits, deltas, labels, regression)
            losses |= {f"loss_classifier_{idx}": weight * classifier, f"loss_box_reg_{idx}": weight * box}
            if idx == 0 and self.mask_head is not None:
                losses["loss_mask"] = self._mask_loss(features, proposals, matched, labels, sizes, targets)
            refined = _refine(stage, deltas.detach(), proposals, sizes)
            proposals = [boxes[remove_small_boxes(boxes, _TINY_PX)] for boxes in refined]
        return losses

    def _mask_loss(
        self,
        features: _Features,
        proposals: list[Tensor],
        matched: list[Tensor],
        labels: list[Tensor],
        sizes: _Sizes,
        targets: Sequence[Mapping[str, Tensor]],
    ) -> Tensor:
        positive = [torch.where(numbers > 0)[0] for numbers in labels]
        boxes = [proposal[rows] for proposal, rows in zip(proposals, positive, strict=True)]
        objects = [idxs[rows] for idxs, rows in zip(matched, positive, strict=True)]
        masks, classes = ([target[name] for target in targets] for name in ("masks", "labels"))
        loss: Tensor = maskrcnn_loss(self._mask_logits(features, boxes, sizes), boxes, masks, classes, objects)
        return loss

    def _mask_logits(self, features: _Features, boxes: list[Tensor], sizes: _Sizes) -> Tensor:
        assert self.mask_roi_pool is not None and self.mask_head is not None and self.mask_predictor is not None
        logits: Tensor = self.mask_predictor(self.mask_head(self.mask_roi_pool(features, boxes, sizes)))
        return logits

    def _detect(self, features: _Features, proposals: list[Tensor], sizes: _Sizes) -> list[dict[str, Tensor]]:
        """Boxes of the last stage; the scores of a box are the mean of all stages'."""
        scores, refined = [], proposals
        for stage in self.stages:
            proposals = refined
            logits, deltas = _look(stage, features, proposals, sizes)
            scores.append(logits.softmax(dim=-1))
            refined = _refine(stage, deltas, proposals, sizes)
        mean_logits = torch.stack(scores).mean(dim=0).log()  # whose softmax is the mean again
        found = stage.postprocess_detections(mean_logits, deltas, proposals, sizes)  # type: ignore[operator]
        names = ("boxes", "scores", "labels")
        results = [dict(zip(names, parts, strict=True)) for parts in zip(*found, strict=True)]
        if self.mask_head is not None:
            logits = self._mask_logits(features, [result["boxes"] for result in results], sizes)
            for result, masks in zip(results, maskrcnn_inference(logits, [r["labels"] for r in results]), strict=True):
                result["masks"] = masks
        return results


def _look(stage: nn.Module, features: _Features, boxes: list[Tensor], sizes: _Sizes) -> tuple[Tensor, Tensor]:
    """Logits and deltas of a stage. Shapes: -> (n, K), (n, 4 * K) for the boxes of all images together."""
    assert isinstance(stage, RoIHeads)
    logits, deltas = stage.box_predictor(stage.box_head(stage.box_roi_pool(features, boxes, sizes)))
    return logits, deltas


def _refine(stage: nn.Module, deltas: Tensor, boxes: list[Tensor], sizes: _Sizes) -> list[Tensor]:
    """The boxes that a stage makes of its proposals, inside the images."""
    assert isinstance(stage, RoIHeads)
    moved = stage.box_coder.decode(deltas[:, :4], boxes)[:, 0]  # (n, 4): one box for all classes
    parts = moved.split([len(part) for part in boxes])
    return [clip_boxes_to_image(part, size) for part, size in zip(parts, sizes, strict=True)]
