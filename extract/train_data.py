"""What a teacher is trained on: all images, decoded once into memory, and the batch of each step.

A batch is a function of (seed, step): which images, flips, timesteps, noise and withheld classes. Each process draws its
own part of it and gets what one process alone would have drawn there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import psutil
from blake3 import blake3
from numpy.typing import NDArray

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.registry import open_source
from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_network import null_class
from dtpipe.manifests.errors import BadImage, ConfigError, ErrorBudgetError, InputError
from dtpipe.manifests.schema import TransformRecipe

if TYPE_CHECKING:
    from torch import Tensor

MAX_PIXELS = 128_000_000  # of one image, as in extract
_CGROUP_LIMIT = Path("/sys/fs/cgroup/memory.max")
_CHUNK = 4096  # images handed to the decode threads at once
GIB = 2**30


@dataclass(frozen=True)
class TrainImages:
    """All usable images of the source, in the listing's order."""

    pixels: NDArray[np.uint8]  # [N, H, W, 3]
    labels: NDArray[np.int64] | None = None  # [N], positions in `classes`
    classes: tuple[str, ...] = ()
    bad: tuple[str, ...] = ()  # "key: reason"


@dataclass(frozen=True)
class Batch:
    """One process's part of one step."""

    clean: Tensor  # (b, 3, H, W) in [-1, 1]
    timesteps: Tensor  # (b,)
    noise: Tensor  # (b, 3, H, W)
    labels: Tensor | None  # (b,)


def load_images(config: TrainTeacherConfig, copies: int = 1) -> TrainImages:
    """All images of the source, decoded and resized; `copies` is how many processes of this machine hold them.

    Raises: InputError when no image is readable, or one has no class and needs it; ErrorBudgetError for more bad images than
    `max_bad`; ConfigError when they would not fit into memory.
    """
    source = open_source(config.images, config.kind)
    items = sorted(source.list(), key=lambda item: item.key)
    classes = _classes(config, items)
    if config.limit and config.limit < len(items):
        items = [
            items[idx] for idx in np.linspace(0, len(items) - 1, config.limit).astype(int)
        ]  # some of every class folder
    height, width = config.image_px
    _refuse_too_large(config, len(items), copies)
    recipe = TransformRecipe(resize=config.resize, height=height, width=width, filter=config.filter)
    pixels = np.empty((len(items), height, width, 3), np.uint8)

    def decode(row: int) -> str | None:
        try:
            pixels[row] = resize_image(decode_image(source.read(items[row].uri), MAX_PIXELS), recipe)
        except BadImage as err:
            return f"{items[row].key}: {err}"
        return None

    reasons = list(_in_threads(decode, len(items), config.decode_threads))
    bad = tuple(reason for reason in reasons if reason is not None)
    _refuse_too_many_bad(config, bad, len(items))
    good = [row for row, reason in enumerate(reasons) if reason is None]
    for to, row in enumerate(good if bad else ()):
        pixels[to] = pixels[row]  # in place: a second copy might not fit
    labels = np.array([classes.index(str(items[row].label)) for row in good]) if classes else None
    return TrainImages(pixels[: len(good)], labels, classes, bad)


def draw_batch(config: TrainTeacherConfig, images: TrainImages, step: int, part: range | None = None) -> Batch:
    """The images at the places `part` of one step's batch, by default all; a function of (seed, step, place)."""
    import torch

    part = part if part is not None else range(config.batch_size)
    rng, num = _generator(config.seed, "step", step), config.batch_size
    timesteps, turned, withheld = (
        rng.integers(config.timesteps, size=num),
        rng.random(num) < 0.5,
        rng.random(num) < config.label_dropout,
    )
    at = slice(part.start, part.stop)
    rows = _rows(config, len(images.pixels), range(step * num + part.start, step * num + part.stop))
    chosen = images.pixels[rows]  # (b, H, W, 3)
    if config.flip:
        chosen = np.where(turned[at, None, None, None], chosen[:, :, ::-1], chosen)
    clean = torch.from_numpy(np.ascontiguousarray(chosen.transpose(0, 3, 1, 2))).float() / 127.5 - 1
    noise = np.empty((len(part), 3, *config.image_px), np.float32)
    for place, values in zip(part, noise, strict=True):
        _generator(config.seed, f"noise/{step}", place).standard_normal(dtype=np.float32, out=values)
    labels = None
    if images.labels is not None:
        null = null_class(config, len(images.classes))
        labels = torch.from_numpy(
            np.where(withheld[at], null, images.labels[rows]) if null is not None else images.labels[rows]
        )
    return Batch(clean, torch.from_numpy(timesteps[at]), torch.from_numpy(noise), labels)


def _rows(config: TrainTeacherConfig, num: int, positions: range) -> list[int]:
    """Images at positions of the endless sequence of shuffled epochs."""
    return [int(_permutation(config.seed, at // num, num)[at % num]) for at in positions]


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, num: int) -> NDArray[np.int64]:
    return _generator(seed, "epoch", epoch).permutation(num)


def _generator(seed: int, stream: str, index: int) -> np.random.Generator:
    digest = blake3(f"{seed}/train-teacher/{stream}/{index}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "big")))


def _classes(config: TrainTeacherConfig, items: Sequence[SourceItem]) -> tuple[str, ...]:
    if not config.class_conditional:
        return ()
    if nameless := [item.key for item in items if item.label is None]:
        raise InputError(
            f"{config.images}: {len(nameless)} of {len(items)} images have no class, the first is {nameless[0]}; "
            "put every image into a folder of its class, or leave out train_teacher.class_conditional"
        )
    return tuple(sorted({str(item.label) for item in items}))


def _in_threads(decode: Callable[[int], str | None], num: int, threads: int) -> Iterator[str | None]:
    with ThreadPoolExecutor(threads, thread_name_prefix="decode") as pool:
        for start in range(0, num, _CHUNK):
            yield from pool.map(decode, range(start, min(start + _CHUNK, num)))


def _refuse_too_many_bad(config: TrainTeacherConfig, bad: Sequence[str], num: int) -> None:
    if len(bad) == num:
        raise InputError(
            f"{config.images}: none of {num} images can be read; the first: {bad[0] if bad else 'none listed'}"
        )
    if len(bad) > config.max_bad_images(num):
        more = f"; and {len(bad) - 5} more" if len(bad) > 5 else ""
        raise ErrorBudgetError(
            f"{config.images} has {len(bad)} bad images, train_teacher.max_bad allows {config.max_bad_images(num)} "
            f"({'; '.join(bad[:5])}{more}); mend the images, or run again with a larger train_teacher.max_bad"
        )


def _refuse_too_large(config: TrainTeacherConfig, num: int, copies: int) -> None:
    height, width = config.image_px
    needed, free = num * height * width * 3 * copies, _free_memory_bytes()
    if needed > free:
        held = f" in each of {copies} processes" if copies > 1 else ""
        raise ConfigError(
            f"{config.images}: {num} images of {height}x{width} px{held} need {needed / GIB:.1f} GiB of memory, {free / GIB:.1f} GiB are "
            "free; use fewer (train_teacher.limit) or smaller ones (train_teacher.px)"
        )


def _free_memory_bytes() -> int:
    """Memory that this process may still take; a container's limit counts as a whole."""
    free = int(psutil.virtual_memory().available)
    limit = _CGROUP_LIMIT.read_text().strip() if _CGROUP_LIMIT.is_file() else "max"
    return min(free, int(limit)) if limit.isdecimal() else free
