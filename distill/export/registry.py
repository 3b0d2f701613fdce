"""All formats of export, by name. A new one is a file that declares `FORMAT`, and its name here."""

from __future__ import annotations

from dtpipe.distill.export import (
    convnext,
    detectron2,
    onnx,
    openmmlab,
    timm,
    torchvision,
    torchvision_detection,
    torchvision_segmentation,
    transformers,
)
from dtpipe.distill.export.base import ExportFormat

_DECLARED = (timm, torchvision, torchvision_detection, torchvision_segmentation, detectron2, openmmlab, convnext)
EXPORTS: dict[str, ExportFormat] = {entry.FORMAT.name: entry.FORMAT for entry in (*_DECLARED, transformers, onnx)}
