"""A sample as one picture: its image and its levels side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dtpipe.pipeline.report.maps.palette import enlarged
from dtpipe.pipeline.report.maps.pca import pca_to_rgb

if TYPE_CHECKING:
    from PIL.Image import Image

_SIDE_PX = 192  # of the longer side of each panel
_GAP_PX = 6
_CAPTION_PX = 16


def sheet(image: NDArray[np.uint8], levels: Mapping[str, NDArray[np.generic]]) -> Image:
    """The image, and the levels by `pca_to_rgb`, each with its name above, on white.

    Shapes: image (H, W, 3), levels (C, h, w) of the same aspect.
    """
    from PIL import Image as Images
    from PIL import ImageDraw

    panels = {"image": image, **{name: pca_to_rgb(level) for name, level in levels.items()}}
    scale = _SIDE_PX / max(image.shape[:2])
    height, width = (max(1, round(side * scale)) for side in image.shape[:2])
    page = Images.new(
        "RGB", (len(panels) * (width + _GAP_PX) + _GAP_PX, height + _CAPTION_PX + 2 * _GAP_PX), (255, 255, 255)
    )
    draw = ImageDraw.Draw(page)
    for idx, (name, panel) in enumerate(panels.items()):
        left = _GAP_PX + idx * (width + _GAP_PX)
        draw.text((left, _GAP_PX), name, fill=(40, 40, 40))
        page.paste(Images.fromarray(_to_size(panel, height, width)), (left, _GAP_PX + _CAPTION_PX))
    return page


def _to_size(panel: NDArray[np.uint8], height: int, width: int) -> NDArray[np.uint8]:
    """Each pixel as the cell it lies in. Shapes: (h, w, 3) -> (height, width, 3)."""
    cells = np.arange(panel.shape[0] * panel.shape[1]).reshape(panel.shape[:2])
    pixels: NDArray[np.uint8] = panel.reshape(-1, 3)[enlarged(cells, height, width)]
    return pixels
