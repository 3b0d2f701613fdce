"""Small images and folders of them, equal on every machine."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

PX = 32


def draw_image(idx: int, px: int = PX) -> np.ndarray:
    """One smooth random image, uint8 [px, px, 3]: a pure function of `idx`."""
    rng = np.random.Generator(np.random.Philox(idx))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((px, px), Image.Resampling.BICUBIC))


def draw_oblong(height: int = 24, width: int = 40, idx: int = 0) -> np.ndarray:
    """A smooth random picture without any symmetry, uint8 [height, width, 3]."""
    rng = np.random.Generator(np.random.Philox(idx))
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    return np.array(coarse.resize((width, height), Image.Resampling.BICUBIC))


def png(array: np.ndarray, mode: str | None = None) -> bytes:
    """A PNG file of an array, in Pillow's own mode for it or another."""
    image, file = Image.fromarray(array), io.BytesIO()
    (image.convert(mode) if mode else image).save(file, "PNG")
    return file.getvalue()


def write_files(root: Path, files: Mapping[str, bytes]) -> Path:
    """Files by their path inside a folder; the folder."""
    for name, data in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(data)
    return root


def write_images(
    root: Path, num: int = 8, px: int = PX, classes: tuple[str, ...] = ("dog", "cat"), start: int = 0
) -> Path:
    """PNG files in class folders by turns: `dog/000.png`, `cat/001.png`, and so on; the folder."""
    images = {f"{classes[idx % len(classes)]}/{idx:03d}.png": png(draw_image(start + idx, px)) for idx in range(num)}
    return write_files(root, images)
