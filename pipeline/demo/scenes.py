"""Digit scenes: labelled 64 px images made from what scikit-learn ships, for the demo, tests and benchmarks.

Each scene is one main handwritten digit of random place, size and colour on a random crop of a photograph; some
scenes hold one or two small digits more. A scene is a pure function of (seed, index, part, px), so any process can
make any scene. Parts share no digit image and no photograph area: `held_out` digits are unseen by `train`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from blake3 import blake3
from numpy.typing import NDArray
from PIL import Image

from dtpipe.manifests.errors import ConfigError, StoreError
from dtpipe.manifests.phases import counted

ScenePart = Literal["train", "held_out"]
_Pixels = NDArray[np.uint8]

TRAIN_SHARE = 0.75  # of the digit images and of each photograph's width
MAIN_SIZE = (24 / 64, 44 / 64)  # of the scene's side: 24..44 px at 64 px
EXTRA_SIZE = (12 / 64, 18 / 64)
CROP_SIZE = (64, 256)  # side of the photograph's crop, px
EXTRA_SHARE = 0.3  # of the scenes hold one or two small digits more
MIN_CONTRAST = 0.35  # least distance of a digit's colour from its surroundings, RGB in [0, 1], Euclidean


@dataclass(frozen=True)
class Scene:
    """One labelled image; masks are uint8 [px, px]."""

    digit: int
    image: _Pixels  # uint8 [px, px, 3]
    semantic: _Pixels  # 0 background, 1 + digit
    instance: _Pixels  # 0 background, 1 the main digit, 2.. the others


@dataclass(frozen=True)
class _Pasted:
    digit: int
    alpha: NDArray[np.float32]  # [px, px] in [0, 1]
    box: tuple[int, int, int, int]  # top, left, bottom, right


def make_scene(seed: int, index: int, px: int = 64, part: ScenePart = "train") -> Scene:
    """One scene, the same on every machine.

    Raises: ConfigError when px is under 16.
    """
    if px < 16:
        raise ConfigError(f"scene side is {px} px; digits need at least 16")
    rng = _generator(seed, index, part)
    photos, digits, labels = _material(part)
    canvas = _background(rng, photos, px)
    main = _paste_digit(rng, digits, labels, MAIN_SIZE, px)
    extras = _extra_digits(rng, digits, labels, px, main)
    semantic = np.zeros((px, px), np.uint8)
    instance = np.zeros((px, px), np.uint8)
    for number, pasted in enumerate([main, *extras], start=1):
        canvas = _blend(rng, canvas, pasted)
        inside = pasted.alpha >= 0.5
        semantic[inside] = 1 + pasted.digit
        instance[inside] = number
    return Scene(main.digit, np.rint(canvas * 255).astype(np.uint8), semantic, instance)


def iterate_scenes(num: int, seed: int, px: int = 64, part: ScenePart = "train") -> Iterator[Scene]:
    """Scenes 0..num-1 of one seed."""
    return (make_scene(seed, index, px, part) for index in range(num))


def write_scenes(out: str | Path, num: int, seed: int, px: int = 64, part: ScenePart = "train") -> Path:
    """Write `num` scenes as class folders, with masks beside: {images,semantic,instance}/<digit>/00000.png.

    The file's number is the scene's index; its folder, the main digit. instances.json has the objects in COCO's format,
    with paths from `out`. Returns the folder of the images.
    Raises: StoreError when the folder cannot be written.
    """
    root, coco = Path(out), _CocoDocument(px)
    try:
        for index, scene in enumerate(counted(iterate_scenes(num, seed, px, part), num, "digit scenes")):
            coco.add(index, f"images/{scene.digit}/{index:05d}.png", scene)
            for name, array in (("images", scene.image), ("semantic", scene.semantic), ("instance", scene.instance)):
                path = root / name / str(scene.digit) / f"{index:05d}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(path)
        (root / "instances.json").write_text(json.dumps(coco.document), encoding="utf-8")
    except OSError as err:
        raise StoreError(f"{root}: cannot write scenes ({err}); name another folder or make room") from err
    return root / "images"


class _CocoDocument:
    """The objects of scenes in COCO's format, masks as uncompressed run lengths; category ids are digits."""

    def __init__(self, px: int) -> None:
        self.px = px
        categories = [{"id": digit, "name": str(digit)} for digit in range(10)]
        self.document: dict[str, Any] = {"images": [], "annotations": [], "categories": categories}

    def add(self, index: int, file_name: str, scene: Scene) -> None:
        """List a scene and its digits."""
        size = {"height": self.px, "width": self.px}
        self.document["images"].append({"id": index, "file_name": file_name, **size})
        for number in range(1, int(scene.instance.max()) + 1):
            mask = scene.instance == number
            if mask.any():  # a small digit may be too faint
                self.document["annotations"].append(self._annotation(index, mask, int(scene.semantic[mask][0]) - 1))

    def _annotation(self, index: int, mask: NDArray[np.bool_], digit: int) -> dict[str, Any]:
        rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
        left, top = int(columns[0]), int(rows[0])
        return {
            "id": len(self.document["annotations"]) + 1,
            "image_id": index,
            "category_id": digit,
            "bbox": [left, top, int(columns[-1]) + 1 - left, int(rows[-1]) + 1 - top],
            "area": int(mask.sum()),
            "iscrowd": 0,
            "segmentation": {"size": [self.px, self.px], "counts": _run_lengths(mask)},
        }


def _run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """Lengths of runs in columns, from the top left, beginning with one outside. Shapes: (H, W)."""
    flat = np.concatenate([[False], mask.ravel(order="F")])
    edges = np.flatnonzero(flat[1:] != flat[:-1])
    return np.diff([0, *edges, mask.size]).tolist()  # type: ignore[no-any-return]


def _generator(seed: int, index: int, part: ScenePart) -> np.random.Generator:
    digest = blake3(f"{part}/{seed}/{index}".encode()).digest()
    return np.random.Generator(np.random.Philox(int.from_bytes(digest[:8], "big")))


@lru_cache(maxsize=2)
def _material(part: ScenePart) -> tuple[list[_Pixels], _Pixels, NDArray[np.int64]]:
    """Photographs, digit images uint8 [n, 8, 8] and their labels of one part."""
    from sklearn.datasets import load_digits, load_sample_images

    bunch: Any = load_digits()
    digits = (bunch.images * 255 / 16).round().astype(np.uint8)
    cut = int(len(digits) * TRAIN_SHARE)
    chosen = slice(0, cut) if part == "train" else slice(cut, None)
    photos = []
    for photo in load_sample_images().images:
        column = int(photo.shape[1] * TRAIN_SHARE)
        photos.append(np.ascontiguousarray(photo[:, :column] if part == "train" else photo[:, column:]))
    return photos, digits[chosen], bunch.target[chosen]


def _background(rng: np.random.Generator, photos: list[_Pixels], px: int) -> NDArray[np.float32]:
    photo = photos[rng.integers(len(photos))]
    height, width = photo.shape[:2]
    side = int(rng.integers(CROP_SIZE[0], min(CROP_SIZE[1], height, width) + 1))
    top, left = int(rng.integers(height - side + 1)), int(rng.integers(width - side + 1))
    crop = Image.fromarray(photo[top : top + side, left : left + side]).resize((px, px), Image.Resampling.BICUBIC)
    pixels = np.asarray(crop, dtype=np.float32) / np.float32(255)
    return pixels[:, ::-1] if rng.random() < 0.5 else pixels


def _paste_digit(
    rng: np.random.Generator, digits: _Pixels, labels: NDArray[np.int64], size: tuple[float, float], px: int
) -> _Pasted:
    chosen = int(rng.integers(len(digits)))
    side = int(rng.integers(round(size[0] * px), round(size[1] * px) + 1))
    top, left = int(rng.integers(px - side + 1)), int(rng.integers(px - side + 1))
    glyph = Image.fromarray(digits[chosen]).resize((side, side), Image.Resampling.BICUBIC)
    alpha = np.zeros((px, px), np.float32)
    alpha[top : top + side, left : left + side] = _sharpen(np.asarray(glyph, dtype=np.float32) / np.float32(255))
    return _Pasted(int(labels[chosen]), alpha, (top, left, top + side, left + side))


def _sharpen(alpha: NDArray[np.float32]) -> NDArray[np.float32]:
    """Steepen the soft edge of an upscaled digit around one half."""
    steep: NDArray[np.float32] = np.clip((alpha - 0.5) * 2.5 + 0.5, 0, 1)
    return steep


def _extra_digits(
    rng: np.random.Generator, digits: _Pixels, labels: NDArray[np.int64], px: int, main: _Pasted
) -> list[_Pasted]:
    """None, one or two small digits in boxes that touch no other; what finds no place after some tries is left out."""
    num_extra = int(rng.integers(1, 3)) if rng.random() < EXTRA_SHARE else 0
    placed: list[_Pasted] = []
    for _ in range(8 * num_extra):
        if len(placed) == num_extra:
            break
        candidate = _paste_digit(rng, digits, labels, EXTRA_SIZE, px)
        if not any(_overlap(candidate.box, other.box) for other in [main, *placed]):
            placed.append(candidate)
    return placed


def _overlap(a: tuple[int, int, int, int], b: tuple[int, int, int, int]) -> bool:
    return a[0] < b[2] and b[0] < a[2] and a[1] < b[3] and b[1] < a[3]


def _blend(rng: np.random.Generator, canvas: NDArray[np.float32], pasted: _Pasted) -> NDArray[np.float32]:
    """Paint one digit in a colour that stands out from what it covers."""
    top, left, bottom, right = pasted.box
    surroundings = canvas[top:bottom, left:right].mean(axis=(0, 1))
    colour = rng.random(3, dtype=np.float32)
    while np.linalg.norm(colour - surroundings) < MIN_CONTRAST:
        colour = rng.random(3, dtype=np.float32)
    alpha = pasted.alpha[..., None]
    return canvas * (1 - alpha) + colour * alpha
