"""Fixtures that several folders share; a folder's own stand in its conftest.py."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: small tensors are fastest on one thread
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")

import numpy as np
import pytest
from PIL import Image

os.fsync = lambda _: (
    None
)  # takes 10 ms a file on a disk, and no test can see it: a killed process loses nothing of the page cache

if (
    signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):  # a shell's background job; what the tests start would ignore Ctrl-C too
    signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(autouse=True, scope="module")
def signal_handlers() -> Iterator[None]:
    """As they were: ray.init leaves a handler that turns SIGTERM into SystemExit, also in processes forked later."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def draw_image(idx: int, px: int = 32) -> np.ndarray:
    """One smooth random image, uint8 [px, px, 3]: a pure function of `idx`, so that folders are equal everywhere."""
    rng = np.random.Generator(np.random.Philox(idx))
    coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
    return np.asarray(coarse.resize((px, px), Image.Resampling.BICUBIC))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Eight 32 px PNG files in two class folders, `cat` and `dog`."""
    root = tmp_path / "images"
    for idx in range(8):
        path = root / ("cat" if idx % 2 else "dog") / f"{idx:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw_image(idx)).save(path)
    return root
