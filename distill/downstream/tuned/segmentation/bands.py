"""Class probabilities of one large image in bands of rows, so that memory does not grow with its height.

The network itself still sees the whole image, unless it looks through windows: those bound its memory too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from dtpipe.distill.downstream.tuned.segmentation.inference import Logits, Views, looks_at, seen_through, window_rows
from dtpipe.distill.student.blocks import resize

MOST_BYTES = 1 << 29
"""Of class probabilities and logits that are held at once."""
_FLOAT_BYTES = 4


def image_bytes(num_classes: int, size_px: tuple[int, int], views: Views) -> int:
    """What the probabilities and the logits of all looks at an image take, at most."""
    seen_px = sum(height * width for (height, width), _ in views.looks(size_px))
    return _FLOAT_BYTES * num_classes * (size_px[0] * size_px[1] + seen_px)


def band_rows(num_classes: int, width_px: int, views: Views) -> int:
    """Rows of an image whose probabilities take `MOST_BYTES`, but no fewer than a window has: each look at a band
    passes all windows that it touches."""
    fitting = MOST_BYTES // (_FLOAT_BYTES * num_classes * width_px)
    return max(1, fitting, views.window_px[0] if views.window_px else 1)


def probability_bands(logits: Logits, image: Tensor, views: Views, num_rows: int) -> Iterator[Tensor]:
    """What `class_probabilities` says of one image, so many rows at a time, from the top.

    Shapes: image (3, H, W) in [-1, 1] -> (K, num_rows, W) float32, the last perhaps lower.
    """
    height, width = image.shape[-2:]
    looks = [_Look(logits, view, flip, views) for view, flip in looks_at(image[None], views)]
    for top in range(0, height, num_rows):
        rows = range(top, min(top + num_rows, height))
        probabilities = looks[0].resized(rows, (height, width)).softmax(dim=0)
        for look in looks[1:]:
            probabilities += look.resized(rows, (height, width)).softmax(dim=0)
        yield probabilities.div_(len(looks))


class _Look:
    """Logits of one image at one size, mirrored or not, by rows."""

    def __init__(self, logits: Logits, view: Tensor, flip: bool, views: Views) -> None:
        """view: (1, 3, H, W), mirrored where `flip` says so."""
        self.flip = flip
        self.rows: Callable[[int, int], Tensor]
        if views.window_px is None:
            whole = seen_through(logits, view, views)[0]  # (K, h, w)
            self.rows, self.height = lambda first, end: whole[:, first:end], whole.shape[1]
        else:
            self.rows, self.height = lambda first, end: window_rows(logits, view, views, first, end)[0], view.shape[-2]

    def resized(self, rows: range, size: tuple[int, int]) -> Tensor:
        """Rows of the logits brought to a size, bilinear, unmirrored. Shapes: -> (K, len(rows), size[1])."""
        if self.height == size[0]:
            found = _widened(self.rows(rows.start, rows.stop), size[1])
        else:
            places = (torch.arange(rows.start, rows.stop, dtype=torch.float64) + 0.5) * (self.height / size[0]) - 0.5
            places = places.clamp(0, self.height - 1)
            above = places.floor().long()
            below = (above + 1).clamp(max=self.height - 1)
            first = int(above[0])
            found = _widened(self.rows(first, int(below[-1]) + 1), size[1])
            upper, lower = (found[:, (index - first).to(found.device)] for index in (above, below))
            found = upper.lerp(lower, (places - above).to(found)[:, None])
        return found.flip(-1) if self.flip else found


def _widened(rows: Tensor, width: int) -> Tensor:
    """Shapes: (K, h, w) -> (K, h, width)."""
    return resize(rows[None], (rows.shape[1], width))[0]
