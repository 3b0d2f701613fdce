"""Predictions drawn on their image, for people: tinted segments, boxes with names, or a caption."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from colorsys import hsv_to_rgb
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from dtpipe.distill.downstream.tuned.predictions import (
    ClassPrediction,
    Detections,
    MaskPrediction,
    PanopticPrediction,
)
from dtpipe.distill.downstream.tuned.segmentation.files import class_colours
from dtpipe.manifests.labels import ClassTable, Pixels

_SMALLEST_PX, _FONT_PX, _PAD = 320, 14, 4
_TINT = 0.5
_GOLDEN = (5**0.5 - 1) / 2
_TONES = ((1.0, 1.0), (0.5, 1.0), (1.0, 0.65))  # saturation and value
_MOST_NAMES = 12  # in a legend
Entry = tuple[str, tuple[int, int, int]]


def draw_overlay(image: Pixels, prediction: Any, classes: ClassTable, min_score: float) -> bytes:
    """A PNG of the image with what was predicted, and what its colours mean below it; see `painted`."""
    content = io.BytesIO()
    _with_legend(*painted(image, prediction, classes, min_score)).save(content, "PNG")
    return content.getvalue()


def painted(
    image: Pixels, prediction: Any, classes: ClassTable, min_score: float, with_scores: bool = True
) -> tuple[Image.Image, list[Entry]]:
    """The image with what was predicted, and what its colours mean; small images are enlarged by a whole factor, so
    that names can be read.

    Objects below `min_score` are left out; names of the others stand alone, or before their scores.
    Shapes: image (H, W, 3).
    """
    scale = max(1, -(-_SMALLEST_PX // max(image.shape[:2])))
    whole = image.repeat(scale, axis=0).repeat(scale, axis=1)
    if isinstance(prediction, MaskPrediction):
        return _mask(whole, prediction, classes, scale)
    if isinstance(prediction, Detections):
        return _objects(whole, prediction, classes, scale, min_score, with_scores)
    if isinstance(prediction, PanopticPrediction):
        return _segments(whole, prediction, classes, scale)
    return Image.fromarray(whole), list(_likeliest(prediction, classes))


def _colour(number: int) -> tuple[int, int, int]:
    """Of a class: hues a golden section apart, in three tones, so that near hues differ in tone."""
    saturation, value = _TONES[number % len(_TONES)]
    red, green, blue = (round(255 * part) for part in hsv_to_rgb(number * _GOLDEN % 1, saturation, value))
    return red, green, blue


def _tinted(image: Pixels, where: NDArray[np.bool_], colour: Sequence[int]) -> None:
    image[where] = ((1 - _TINT) * image[where] + _TINT * np.asarray(colour)).astype(np.uint8)


def _borders(regions: NDArray[Any]) -> NDArray[np.bool_]:
    """Where a pixel's right or lower neighbour is of another region. Shapes: (H, W) -> (H, W)."""
    border = np.zeros(regions.shape, dtype=bool)
    border[:, :-1] |= regions[:, :-1] != regions[:, 1:]
    border[:-1] |= regions[:-1] != regions[1:]
    return border


def _enlarged(regions: NDArray[Any], scale: int) -> NDArray[Any]:
    return regions.repeat(scale, axis=0).repeat(scale, axis=1)


def _mask(
    image: Pixels, prediction: MaskPrediction, classes: ClassTable, scale: int
) -> tuple[Image.Image, list[Entry]]:
    numbers = _enlarged(prediction.numbers, scale)
    occurring, counts = np.unique(numbers, return_counts=True)
    legend = []
    for number in occurring[np.argsort(-counts)].tolist():
        if classes.names[number] == "background":
            continue
        red, green, blue = class_colours(number + 1)[number].tolist()  # as in the mask's own file
        colour = red, green, blue
        _tinted(image, numbers == number, colour)
        legend.append((classes.names[number], colour))
    image[_borders(numbers)] = 255
    return Image.fromarray(image), legend


def _segments(
    image: Pixels, prediction: PanopticPrediction, classes: ClassTable, scale: int
) -> tuple[Image.Image, list[Entry]]:
    segments = _enlarged(prediction.segments, scale)
    for segment, number in prediction.classes.items():
        _tinted(image, segments == segment, _colour(number))
    image[_borders(segments)] = 255
    return Image.fromarray(image), [(classes.names[n], _colour(n)) for n in sorted(set(prediction.classes.values()))]


def _objects(
    image: Pixels, prediction: Detections, classes: ClassTable, scale: int, min_score: float, with_scores: bool
) -> tuple[Image.Image, list[Entry]]:
    shown = np.flatnonzero(prediction.scores >= min_score)
    numbers = prediction.classes
    if prediction.masks is not None:
        for idx in shown[::-1]:  # the surest on top
            mask = _enlarged(prediction.masks[idx], scale)
            _tinted(image, mask, _colour(int(numbers[idx])))
            image[_borders(mask)] = _colour(int(numbers[idx]))
    picture = Image.fromarray(image)
    draw = ImageDraw.Draw(picture)
    for idx in shown[::-1]:
        colour = _colour(int(numbers[idx]))
        left, top, right, bottom = (prediction.boxes[idx] * scale).tolist()
        draw.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=2)
        score = f" {prediction.scores[idx]:.2f}" if with_scores else ""
        _label(draw, (left, top), f"{classes.names[numbers[idx]]}{score}", colour)
    counted = f"{len(shown)} of {len(numbers)} objects, score from {min_score:g}"
    return picture, [(counted, (255, 255, 255)), *((classes.names[n], _colour(n)) for n in np.unique(numbers[shown]))]


def _label(draw: ImageDraw.ImageDraw, corner: tuple[float, float], text: str, colour: tuple[int, int, int]) -> None:
    """A name on its colour, inside the picture."""
    font = _font()
    left, top, right, bottom = draw.textbbox((0, 0), text, font=font)
    width, height = right - left + _PAD, bottom - top + _PAD
    picture_width, _ = draw.im.size
    x, y = max(0.0, min(corner[0], picture_width - width)), max(0.0, corner[1] - height)
    draw.rectangle((x, y, x + width, y + height), fill=colour)
    draw.text((x + _PAD / 2 - left, y + _PAD / 2 - top), text, fill=_ink(colour), font=font)


def _ink(colour: tuple[int, int, int]) -> str:
    """Black or white, whichever is read on a colour."""
    red, green, blue = colour
    return "black" if 0.3 * red + 0.6 * green + 0.1 * blue > 110 else "white"


def _likeliest(prediction: ClassPrediction, classes: ClassTable) -> Iterator[Entry]:
    """Three classes with their probabilities."""
    for number in prediction.probabilities.argsort()[::-1][:3].tolist():
        yield f"{classes.names[number]} {prediction.probabilities[number]:.2f}", _colour(number)


def _with_legend(picture: Image.Image, legend: Sequence[Entry]) -> Image.Image:
    """The picture with names on their colours below it, in as many rows as they need."""
    entries = list(legend[:_MOST_NAMES])
    if len(legend) > _MOST_NAMES:
        entries.append((f"and {len(legend) - _MOST_NAMES} more", (255, 255, 255)))
    row_px, x, y, places = _FONT_PX + 2 * _PAD, _PAD, _PAD, []
    for name, _ in entries:
        width = int(_font().getlength(name)) + 2 * _PAD
        if x > _PAD and x + width > picture.width:
            x, y = _PAD, y + row_px + _PAD
        places.append((x, y, width))
        x += width + _PAD
    below = y + row_px + _PAD if entries else 0
    whole = Image.new("RGB", (picture.width, picture.height + below), "white")
    whole.paste(picture)
    draw = ImageDraw.Draw(whole)
    for (name, colour), (left, top, width) in zip(entries, places, strict=True):
        top += picture.height
        draw.rectangle((left, top, left + width, top + row_px), fill=colour)
        draw.text((left + _PAD, top + _PAD / 2), name, fill=_ink(colour), font=_font())
    return whole


@lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans: Pillow's own font knows ASCII only."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _FONT_PX)
