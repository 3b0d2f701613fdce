"""Panoptic segmentation: Panoptic FPN, scored by panoptic quality."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtpipe.distill.downstream.tuned.base import TunedTask
from dtpipe.distill.downstream.tuned.detection.panoptic_quality import PanopticScores
from dtpipe.distill.downstream.tuned.detection.views import PanopticViews
from dtpipe.distill.downstream.tuned.heads.panoptic import PanopticFPN, split_classes
from dtpipe.distill.downstream.tuned.predictions import PanopticPrediction
from dtpipe.distill.downstream.tuned.reads import PANOPTIC_READ
from dtpipe.manifests.labels import ClassTable, Panoptic


def segments_png(segments: NDArray[np.int32]) -> bytes:
    """Segment ids as colours, as COCO's panoptic files hold them: id = R + 256 G + 65536 B. Shapes: (H, W)."""
    colours = np.stack([segments >> shift & 255 for shift in (0, 8, 16)], axis=-1).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).save(file, "PNG")
    return file.getvalue()


def segments_info(prediction: PanopticPrediction, classes: ClassTable) -> list[dict[str, object]]:
    """Id, class under the data set's own number, whether it is a thing, and area in px, of each segment."""
    return [
        {
            "id": segment,
            "category_id": classes.numbers.get(number, number),
            "isthing": int(number in classes.things),
            "area": int((prediction.segments == segment).sum()),
        }
        for segment, number in sorted(prediction.classes.items())
    ]


def _save(prediction: PanopticPrediction, classes: ClassTable) -> Iterator[tuple[str, bytes]]:
    yield ".png", segments_png(prediction.segments)
    yield ".json", json.dumps(segments_info(prediction, classes)).encode()


TASK: TunedTask[PanopticPrediction] = TunedTask(
    name="panoptic",
    summary="from things and stuff: Panoptic FPN, trained with the backbone; panoptic quality",
    kind=Panoptic,
    metric_name="PQ",
    build=PanopticFPN,
    augment=lambda classes, config: PanopticViews(*split_classes(classes), config),
    metric=lambda classes, _config: PanopticScores(classes),
    save=_save,
    reads=PANOPTIC_READ,
    crops=False,
)
