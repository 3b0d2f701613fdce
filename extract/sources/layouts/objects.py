"""Objects of an image as arrays: polygons and run lengths of masks, as files in COCO's format state them.

Masks are rasterised by faster-coco-eval, whose functions are those of pycocotools, and which refuses run lengths that
leave the image.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import Instances

MAX_MASKS_BYTES = 1 << 31  # of the masks of one image, a byte a pixel; several images are read at a time
StatedObjects = list[tuple[int, list[float] | None, float | None, bool, Any]]
"""Of an image: class number, box as x, y, width, height, area, crowd, segmentation as it stands in the file."""


def other_size(where: str, stated_px: Sequence[int] | None, image_px: tuple[int, int]) -> InputError:
    """What to say of labels that are made for another height and width than their image has."""
    height, width = stated_px or (0, 0)
    return InputError(
        f"{where} is labelled at {width}x{height} px and has, turned as its orientation tag says, "
        f"{image_px[1]}x{image_px[0]}; give the images that were labelled, or label these"
    )


def read_objects(objects: StatedObjects, image_px: tuple[int, int], has_masks: bool, where: str) -> Instances:
    """Objects as arrays; with `has_masks` their masks too. Raises: InputError naming what cannot be rasterised."""
    height, width = image_px
    masks, areas, edges = None, np.zeros(len(objects)), np.zeros((len(objects), 4))
    try:
        if has_masks:
            _check_memory(len(objects), image_px, where)
            masks, areas, edges = _rasterise([entry[-1] for entry in objects], image_px)
    except (ValueError, TypeError, KeyError, RuntimeError, OverflowError) as err:
        raise InputError(f"{where} has a segmentation that cannot be read ({err}); write the file again") from err
    boxes = np.zeros((len(objects), 4))
    own_areas = np.zeros(len(objects))
    for idx, (_, box, area, _, _) in enumerate(objects):
        x, y, w, h = box if box is not None else edges[idx]
        boxes[idx] = x, y, x + w, y + h
        own_areas[idx] = area if area is not None else areas[idx] if has_masks else w * h
        if x >= width or y >= height or x + w <= 0 or y + h <= 0:
            raise InputError(
                f"{where} has an object at {[x, y, w, h]}, outside of its {width}x{height} px; mend its box"
            )
    return Instances(
        image_px,
        boxes,
        np.array([entry[0] for entry in objects], dtype=np.int64),
        masks,
        np.array([entry[3] for entry in objects], dtype=bool),
        own_areas,
    )


def _check_memory(num: int, image_px: tuple[int, int], where: str) -> None:
    size_bytes = num * image_px[0] * image_px[1]
    if size_bytes > MAX_MASKS_BYTES:
        raise InputError(
            f"{where} has {num} objects, whose masks take {size_bytes} bytes at {image_px[1]}x{image_px[0]} px, over "
            f"the limit of {MAX_MASKS_BYTES}; cut such images into tiles"
        )


def _rasterise(
    segmentations: Sequence[Any], image_px: tuple[int, int]
) -> tuple[NDArray[np.bool_], NDArray[np.float64], NDArray[np.float64]]:
    """Masks (n, H, W), their areas (n,), and the boxes around them (n, 4) as x, y, width, height.

    Raises: ValueError, TypeError, KeyError, RuntimeError for what is no segmentation.
    """
    from faster_coco_eval.core import mask as coco_mask

    if not segmentations:
        return np.zeros((0, *image_px), dtype=bool), np.zeros(0), np.zeros((0, 4))
    lengths = [run_lengths(segmentation, image_px) for segmentation in segmentations]
    masks = np.empty((len(lengths), *image_px), dtype=bool)
    for mask, runs in zip(masks, lengths, strict=True):
        mask[:] = coco_mask.decode(runs)
    return masks, coco_mask.area(lengths).astype(np.float64), coco_mask.toBbox(lengths).astype(np.float64)


def run_lengths(segmentation: Any, image_px: tuple[int, int]) -> dict[str, Any]:
    """A segmentation (polygons, or run lengths of either form) as compressed run lengths of the image's size.

    Source: `annToRLE` of pycocotools, coco.py. Raises: ValueError, TypeError, KeyError, RuntimeError for none.
    """
    from faster_coco_eval.core import mask as coco_mask

    height, width = image_px
    if isinstance(segmentation, list):
        polygons = [np.asarray(polygon, dtype=np.float64) for polygon in segmentation]
        for points in polygons:
            _check_points(points, image_px)
        merged: dict[str, Any] = coco_mask.merge(
            coco_mask.frPyObjects([list(points) for points in polygons], height, width)
        )
        return merged
    size, counts = list(segmentation["size"]), segmentation["counts"]
    if size != [height, width]:
        raise ValueError(f"run lengths of {size[::-1]} px in an image of {[width, height]}")
    if not isinstance(counts, list):
        return {"size": size, "counts": counts.encode() if isinstance(counts, str) else counts}
    if min(counts, default=0) < 0 or sum(counts) != height * width:
        raise ValueError(f"run lengths of {sum(counts)} pixels in an image of {height * width}")
    packed: dict[str, Any] = coco_mask.frPyObjects(segmentation, height, width)
    return packed


def _check_points(points: NDArray[np.float64], image_px: tuple[int, int]) -> None:
    """Refuse points far from the image: pycocotools takes memory for each pixel of a polygon's edge, wherever it is.

    Shapes: points (2n,) x and y in turn. Raises: ValueError.
    """
    margin = max(image_px)
    far = np.abs(points - margin / 2) > 1.5 * margin
    if not np.isfinite(points).all() or far.any():
        odd = points[far | ~np.isfinite(points)][0]
        raise ValueError(f"a point at {odd:g} px, in an image of {image_px[1]}x{image_px[0]}")
