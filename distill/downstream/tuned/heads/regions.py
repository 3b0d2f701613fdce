"""Proposals and regions of a two-stage detector, of torchvision's parts; one stage, or three one after another.

Sizes follow `head.width`: at 256 all of them are those of torchvision's `maskrcnn_resnet50_fpn`. Anchors are
`head.anchor_scale` times their level's stride, and objects are assigned to levels by the same measure, so that small
images have small anchors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.roi_heads import RoIHeads
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead
from torchvision.ops import MultiScaleRoIAlign

from dtpipe.distill.downstream.tuned.config import HeadConfig
from dtpipe.distill.downstream.tuned.heads.cascade import IOUS, REGRESSION_WEIGHTS, CascadeHeads
from dtpipe.distill.downstream.tuned.heads.fpn import DetectionPyramid, norm_layer

_BOX_CELLS, _MASK_CELLS = 7, 14
_CANONICAL = 28  # side of the objects that belong to stride 16, over the anchors' scale: 224 px for the published 8


class InFloat32(nn.Module):
    """A head whose outputs are float32 under mixed precision: boxes decoded in bfloat16 are off by several pixels."""

    def __init__(self, head: nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, *args: Any) -> tuple[Any, ...]:
        """As the head's, with tensors in float32."""
        return tuple(_float32(output) for output in self.head(*args))


def _float32(output: Any) -> Any:
    return output.float() if isinstance(output, Tensor) else [part.float() for part in output]


class RoIPool(nn.Module):
    """torchvision's RoIAlign over levels, told the canvas' size: from small images on it, it infers wrong strides."""

    def __init__(self, pyramid: DetectionPyramid, cells: int, anchor_scale: float) -> None:
        super().__init__()
        self.stride = pyramid.strides[0]
        canonical = max(1, round(_CANONICAL * anchor_scale))
        self.align = MultiScaleRoIAlign(list(pyramid.names), cells, sampling_ratio=2, canonical_scale=canonical)

    def forward(
        self,
        features: Mapping[str, Tensor],
        boxes: list[Tensor],
        _image_shapes: Sequence[tuple[int, int]],
    ) -> Tensor:
        """Shapes: (n, 4) px boxes of each image -> (sum of n, C, cells, cells)."""
        height, width = next(iter(features.values())).shape[-2:]
        pooled: Tensor = self.align(features, boxes, [(height * self.stride, width * self.stride)])
        return pooled


class AgnosticPredictor(nn.Module):
    """Class logits and one box for all classes, given once per class as torchvision's losses read it."""

    def __init__(self, channels: int, num_logits: int) -> None:
        super().__init__()
        self.cls_score = nn.Linear(channels, num_logits)
        self.bbox_pred = nn.Linear(channels, 4)

    def forward(self, regions: Tensor) -> tuple[Tensor, Tensor]:
        """Shapes: (n, channels) -> (n, K), (n, 4 * K)."""
        logits: Tensor = self.cls_score(regions)
        return logits, self.bbox_pred(regions).repeat(1, logits.shape[1])


def build_rpn(pyramid: DetectionPyramid, head: HeadConfig) -> RegionProposalNetwork:
    """The region proposal network with torchvision's settings; three shapes of anchor in each cell."""
    strides = (*pyramid.strides, 2 * pyramid.strides[-1])
    sizes = tuple((max(1, round(head.anchor_scale * stride)),) for stride in strides)
    anchors = AnchorGenerator(sizes, ((0.5, 1.0, 2.0),) * len(sizes))
    rpn: RegionProposalNetwork = RegionProposalNetwork(
        anchors,
        InFloat32(RPNHead(head.width, 3)),
        fg_iou_thresh=0.7,
        bg_iou_thresh=0.3,
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_top_n={"training": 2000, "testing": 1000},
        post_nms_top_n={"training": 2000, "testing": 1000},
        nms_thresh=0.7,
    )
    return rpn


def build_regions(pyramid: DetectionPyramid, num_classes: int, head: HeadConfig) -> nn.Module:
    """Box and mask heads for `num_classes` classes of objects: torchvision's `RoIHeads`, or a cascade of them."""
    masks = _mask_parts(pyramid, num_classes, head) if head.masks else (None, None, None)
    if head.cascade:
        stages = [
            _stage(pyramid, head, AgnosticPredictor(4 * head.width, num_classes + 1), iou, weights)
            for iou, weights in zip(IOUS, REGRESSION_WEIGHTS, strict=True)
        ]
        return CascadeHeads(stages, *masks)
    predictor: nn.Module = FastRCNNPredictor(4 * head.width, num_classes + 1)
    regions: nn.Module = _stage(pyramid, head, predictor, IOUS[0], REGRESSION_WEIGHTS[0], masks)
    return regions


def _stage(
    pyramid: DetectionPyramid,
    head: HeadConfig,
    predictor: nn.Module,
    iou: float,
    weights: tuple[float, float, float, float],
    masks: Sequence[nn.Module | None] = (None, None, None),
) -> RoIHeads:
    return RoIHeads(
        RoIPool(pyramid, _BOX_CELLS, head.anchor_scale),
        _box_head(head),
        InFloat32(predictor),
        fg_iou_thresh=iou,
        bg_iou_thresh=iou,
        batch_size_per_image=head.samples,
        positive_fraction=0.25,
        bbox_reg_weights=weights,
        score_thresh=0.05,
        nms_thresh=0.5,
        detections_per_img=head.max_detections,
        mask_roi_pool=masks[0],
        mask_head=masks[1],
        mask_predictor=masks[2],
    )


def _box_head(head: HeadConfig) -> nn.Module:
    width = head.width
    if head.convs == 0:
        layers: nn.Module = TwoMLPHead(width * _BOX_CELLS**2, 4 * width)
    else:
        shape = (width, _BOX_CELLS, _BOX_CELLS)
        layers = FastRCNNConvFCHead(shape, [width] * head.convs, [4 * width], norm_layer(head.norm))
    return layers


def _mask_parts(pyramid: DetectionPyramid, num_classes: int, head: HeadConfig) -> tuple[nn.Module, ...]:
    pool = RoIPool(pyramid, _MASK_CELLS, head.anchor_scale)
    convs = MaskRCNNHeads(head.width, [head.width] * 4, 1, norm_layer(head.norm))
    return pool, convs, MaskRCNNPredictor(head.width, head.width, num_classes + 1)


def total(losses: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Losses under short names, and their sum as `loss`."""
    parts = {name.removeprefix("loss_"): loss for name, loss in losses.items()}
    return {"loss": torch.stack(list(parts.values())).sum(), **parts}
