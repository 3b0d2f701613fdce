"""How stored images become bytes, always without loss, and which coding goes with what.

plain: pixels under zstd in zarr, PNG in tars, as v1 has it. predicted (zarr): residuals under zstd. webp (tars): WebP.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final, Literal

ImageCoding = Literal["plain", "predicted", "webp"]
PLAIN: Final = "plain"
COMPACT: Final[Mapping[str, ImageCoding]] = {"zarr": "predicted", "webdataset": "webp"}
"""By format of shards: the coding in fewer bytes than plain, the only other one there."""
WEBP_MOST_PX: Final = 16383  # a side


def misfit(coding: ImageCoding, shard_format: str, stored: bool, image_px: tuple[int, int] = (1, 1)) -> str | None:
    """What is wrong with a coding of images of a height and width in px, as the end of a sentence; else None."""
    if coding == PLAIN:
        return None
    if coding != COMPACT[shard_format]:
        return f"is {coding}, and {shard_format} shards have plain and {COMPACT[shard_format]}; choose one of these"
    if not stored:
        return f"is {coding}, and no images are stored; leave it out"
    if coding == "webp" and max(image_px) > WEBP_MOST_PX:
        return f"is webp, which has sides up to {WEBP_MOST_PX} px, not {image_px[0]}x{image_px[1]}; choose plain"
    return None
