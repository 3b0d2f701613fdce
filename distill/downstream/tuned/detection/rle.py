"""Masks as COCO's run-length codes, which keep many small, and result entries in COCO's words."""

from __future__ import annotations

from typing import Any

import numpy as np
from faster_coco_eval.core import mask as coco_mask
from numpy.typing import NDArray


def encode_masks(masks: NDArray[np.bool_]) -> list[dict[str, Any]]:
    """Compressed codes, `size` and `counts` as JSON takes them. Shapes: (n, H, W) -> n codes."""
    if len(masks) == 0:
        return []
    codes = coco_mask.encode(np.asfortranarray(masks.transpose(1, 2, 0).astype(np.uint8)))
    return [{"size": [int(side) for side in code["size"]], "counts": _text(code["counts"])} for code in codes]


def _text(counts: bytes | str) -> str:
    return counts.decode("ascii") if isinstance(counts, bytes) else counts


def coco_boxes(boxes: NDArray[np.floating[Any]]) -> list[list[float]]:
    """Left, top, width, height. Shapes: (n, 4) left, top, right, bottom -> n lists."""
    edges = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)
    corners: list[list[float]] = np.concatenate([edges[:, :2], edges[:, 2:] - edges[:, :2]], axis=1).tolist()
    return corners
