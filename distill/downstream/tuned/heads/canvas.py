"""Images of several sizes in one batch: resized for a look, padded at the right and at the bottom, and back again.

Nothing is normalised here, since a student does so itself; the padding is mid-grey.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection.image_list import ImageList

from dtpipe.distill.downstream.tuned.config import InferenceConfig
from dtpipe.distill.downstream.tuned.segmentation.inference import scaled_size
from dtpipe.distill.student.student import Student, model_options
from dtpipe.manifests.errors import ShapeError


@dataclass(frozen=True)
class Canvas:
    """What batches are laid on."""

    divisor: int
    """Its sides are multiples of this, px."""
    fixed_px: tuple[int, int] | None = None
    """Its height and width, for students that take images of one size alone."""
    short_px: int | None = None
    long_px: int | None = None

    @classmethod
    def of(cls, student: Student, inference: InferenceConfig) -> Canvas:
        """The one that a student needs: multiples of its coarsest stride, or its own size where it has but one."""
        fixed = student.spec.image_px if model_options(student.spec) else None
        return cls(max(32, *student.strides), fixed, inference.short_px, inference.long_px)

    def lay(self, images: Sequence[Tensor]) -> ImageList:
        """One batch of images as they are. Shapes: (3, H, W) each -> (B, 3, canvas).

        Raises: ShapeError for an image that is larger than a fixed canvas.
        """
        sizes = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
        height, width = self.fixed_px or _rounded_up(sizes, self.divisor)
        canvas = images[0].new_zeros(len(images), 3, height, width)
        for place, image, size in zip(canvas, images, sizes, strict=True):
            if size[0] > height or size[1] > width:
                raise ShapeError(
                    f"an image of {size[0]}x{size[1]} px does not fit the student, which takes {height}x{width} px "
                    f"alone; give -s eval.tune.augment.short_px=[{min(height, width)}] "
                    f"-s eval.tune.augment.long_px={min(height, width)}, or choose a convolutional student"
                )
            place[:, : size[0], : size[1]] = image
        return ImageList(canvas, sizes)

    def fit(self, image: Tensor) -> Tensor:
        """An image at the size it is looked at: short side brought to `short_px`, long side at most `long_px`.

        Without `short_px`, images are shrunk where they must be, never enlarged. Shapes: (3, H, W) -> (3, H', W').
        """
        own = (image.shape[-2], image.shape[-1])
        size = scaled_size(own, self.short_px, self.long_px, 1.0)
        if self.fixed_px:
            fitting = [fixed / px for fixed, px in zip(self.fixed_px, size, strict=True)]
            size = scaled_size(size, None, None, min(1.0, *fitting))
        if size == own:
            return image
        return F.interpolate(image[None], size, mode="bilinear", antialias=True)[0]


def _rounded_up(sizes: Sequence[tuple[int, int]], divisor: int) -> tuple[int, int]:
    height, width = torch.tensor(sizes).amax(dim=0).tolist()
    return -(-height // divisor) * divisor, -(-width // divisor) * divisor
