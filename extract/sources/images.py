"""From the bytes of an image file to the teacher's input, which is also the stored image.

Whatever is wrong with a file, the answer is `BadImage` with a one-line reason that does not depend on machine or run;
no warning, no crash. Both functions may be called from many threads at once.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import math
import re
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from importlib import import_module

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFile, UnidentifiedImageError, _imaging

from dtpipe.extract.sources.colour import to_rgb
from dtpipe.extract.sources.names import HEIF_PACKAGE, reads_heif
from dtpipe.manifests.errors import BadImage
from dtpipe.manifests.schema import Filter, TransformRecipe
from dtpipe.manifests.store.open_files import ProcessLock

_Pixels = NDArray[np.uint8]

# Formats that only decode pixels: not EPS (runs Ghostscript), no stubs. Those without a magic number come last.
_FORMATS = (
    *("JPEG", "PNG", "GIF", "BMP", "DIB", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF", "QOI", "ICO", "ICNS", "MPO"),
    *("SGI", "DDS", "PCX", "TGA"),
    "HEIF",  # of the extra `heic`; AVIF is Pillow's own
)
_ORIENTATION_TAG, _TILE_WIDTH_TAG, _TILE_HEIGHT_TAG = 0x0112, 322, 323
_ICONS = (b"\0\0\1\0", b"icns")
_PNG_SIZE = re.compile(rb"\x89PNG\r\n\x1a\n.{4}IHDR(.{4})(.{4})", re.DOTALL)
_TURNS: dict[int, Callable[[_Pixels], _Pixels]] = {  # to undo each orientation, as views
    2: lambda pixels: pixels[:, ::-1],
    3: lambda pixels: pixels[::-1, ::-1],
    4: lambda pixels: pixels[::-1],
    5: lambda pixels: pixels.swapaxes(0, 1),
    6: lambda pixels: pixels[::-1].swapaxes(0, 1),
    7: lambda pixels: pixels[::-1, ::-1].swapaxes(0, 1),
    8: lambda pixels: pixels[:, ::-1].swapaxes(0, 1),
}
_RESAMPLING = {
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
MAX_PIXELS = 128_000_000  # of an image or a mask, unless settings say otherwise
PEAK_BYTES_PER_PIXEL = 24  # of memory to decode and resize an image, whatever its format; beside the file's own bytes
_SUPPORT = {"box": 0.5, "bilinear": 1.0, "bicubic": 2.0, "lanczos": 3.0}  # filter radius in px
_MAX_OVERHANG = 16  # center_crop: resized area over the target's above which only the crop is computed
_PILLOW_MODULES = r"PIL\."
_HEIF_BRANDS = (b"ftypheic", b"ftypheix", b"ftypheim", b"ftypheis", b"ftypmif1")
_LOCK = ProcessLock()


def decode_image(data: bytes, max_pixels: int) -> _Pixels:
    """Decode an image file as it is meant to be looked at: turned by its orientation tag, first frame, RGB.

    Alpha is dropped, not blended, and ICC profiles are ignored, as in torchvision, timm and guided-diffusion
    (`convert("RGB")`). 16-bit grey is scaled by the range of its type. 32-bit integers and floats have no display
    range: the smallest of 1 (floats), 255 and 65535 that holds all values is white and 0 black; values outside
    (negative, larger) stretch from the image's own minimum to its maximum.

    Takes at most `PEAK_BYTES_PER_PIXEL` of memory: 11 for most formats, 17 for WebP, 20 for JPEG 2000.

    Shapes: -> (H, W, 3) uint8.
    Raises: BadImage for any failure, among them more than `max_pixels` pixels; they are counted before decoding.
    """
    with open_image(data, max_pixels) as image:
        pixels = to_rgb(image)
        orientation = _orientation(image)
    del image  # large
    return _turn(pixels, orientation)


@contextlib.contextmanager
def open_image(data: bytes, max_pixels: int) -> Iterator[ImageFile.ImageFile]:
    """A file in one of our formats as Pillow loads it, neither turned nor converted.

    Raises: BadImage for any failure, also of what is done with it: see `decode_image`.
    """
    _ignore_pillow_warnings()
    _let_pillow_open(max_pixels)
    try:
        _check_icon(data, max_pixels)
        with Image.open(io.BytesIO(data), formats=_formats()) as image:
            _check_pixels(image.size, max_pixels)
            _check_tiles(image, max_pixels)
            image.load()
            _check_pixels(image.size, max_pixels)  # an icon's directory may announce another size than it holds
            yield image
    except BadImage:
        raise
    except Image.DecompressionBombError as err:
        raise BadImage(_too_many_pixels(str(err), max_pixels)) from err
    except UnidentifiedImageError as err:
        raise BadImage(_unrecognised(data)) from err
    except Exception as err:  # decoders raise what they like: struct.error, MemoryError, RecursionError, ...
        raise BadImage(f"{type(err).__name__}: {err}") from err


def resize_image(image: _Pixels, recipe: TransformRecipe) -> _Pixels:
    """Bring a decoded image to the recipe's size.

    `center_crop`: halve with a box filter while it is at least twice as large, resize so that it covers the target,
    crop the middle. `stretch`: both sides to the target, whatever the aspect. `none`: it must have the size already.
    Without antialias there is no halving and the filter keeps its width when shrinking.

    Shapes: (H, W, 3) uint8 -> (recipe.height, recipe.width, 3) uint8.
    Raises: BadImage when `none` meets another size.
    Source: `center_crop_arr` in openai/guided-diffusion, guided_diffusion/image_datasets.py.
    """
    height, width = recipe.height, recipe.width
    if recipe.resize == "none":
        if image.shape[:2] != (height, width):
            raise BadImage(f"{image.shape[1]}x{image.shape[0]} px, and resize=none takes only {width}x{height}")
        return image
    if recipe.resize == "stretch":
        return _resample(image, (height, width), recipe.filter, recipe.antialias)
    return _center_crop(image, (height, width), recipe.filter, recipe.antialias)


# --- opening ---------------------------------------------------------------------------------------------------------


def _ignore_pillow_warnings() -> None:
    """Silence Pillow's own warnings for good: what matters of them is a BadImage.

    `catch_warnings` swaps a global list and so mixes up the threads that decode; a filter for Pillow's modules alone,
    added once, cannot. It is looked for on each call, as a caller's `catch_warnings` may have taken it away.
    """
    if _pillow_is_ignored():
        return
    with _LOCK:
        if not _pillow_is_ignored():
            warnings.filterwarnings("ignore", module=_PILLOW_MODULES)


def _pillow_is_ignored() -> bool:
    return any(
        action == "ignore" and getattr(module, "pattern", module) == _PILLOW_MODULES
        for action, _, _, module, _ in warnings.filters
    )


def _let_pillow_open(max_pixels: int) -> None:
    """Raise Pillow's own limit where it lies below ours; it is never lowered, so threads cannot disagree."""
    limit = Image.MAX_IMAGE_PIXELS
    if limit is None or max_pixels <= 2 * limit:  # Pillow refuses above twice its limit
        return
    with _LOCK:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS or 0, math.ceil(max_pixels / 2))


@lru_cache(maxsize=1)
def _formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow reads."""
    Image.init()
    if reads_heif():
        import_module(HEIF_PACKAGE).register_heif_opener()
    _silence_libtiff()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _silence_libtiff() -> None:
    """libtiff writes to stderr for each odd tag of each file, from C; what matters also fails in Pillow."""
    with contextlib.suppress(OSError, AttributeError):  # a Pillow whose libtiff cannot be reached: noisy, and right
        pillow = ctypes.CDLL(_imaging.__file__)  # a lookup goes on into the libraries it was linked with
        pillow.TIFFSetErrorHandler(None)
        pillow.TIFFSetWarningHandler(None)


def _check_pixels(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise BadImage(f"no pixels: {width}x{height}")
    if width * height > max_pixels:
        raise BadImage(f"{width * height} pixels ({width}x{height}) are more than the limit of {max_pixels}")


def _check_icon(data: bytes, max_pixels: int) -> None:
    """Icons are unpacked when they are opened, whatever size their directory says. Raises: BadImage."""
    if data.startswith(_ICONS):
        for match in _PNG_SIZE.finditer(data):
            _check_pixels((int.from_bytes(match[1]), int.from_bytes(match[2])), max_pixels)


def _check_tiles(image: ImageFile.ImageFile, max_pixels: int) -> None:
    """Tiles of a TIFF are unpacked whole, and may be larger than the image. Raises: BadImage."""
    tags = getattr(image, "tag_v2", {})
    width, height = tags.get(_TILE_WIDTH_TAG, 0), tags.get(_TILE_HEIGHT_TAG, 0)
    if isinstance(width, int) and isinstance(height, int) and width * height > max_pixels:
        raise BadImage(f"tiles of {width * height} pixels are more than the limit of {max_pixels}")


def _too_many_pixels(pillow_says: str, max_pixels: int) -> str:
    """Pillow's bomb checks run before ours and name its own limit, which is of no use here."""
    count = re.search(r"\((\d+) pixels\)", pillow_says)
    return f"{count[1]} pixels are more than the limit of {max_pixels}" if count else pillow_says


def _unrecognised(data: bytes) -> str:
    if not data:
        return "empty file"
    if data[4:12] in _HEIF_BRANDS and not reads_heif():
        return "an image in HEIF; `pip install 'dtpipe[heic]'` reads it"
    return f"not a readable image: no decoder takes this file, which starts with {data[:8].hex(' ')}"


# --- orientation -----------------------------------------------------------------------------------------------------


def _orientation(image: ImageFile.ImageFile) -> int:
    """Orientation 1-8 by EXIF or XMP; 1 where the tag is broken. Pillow turns TIFFs itself and takes the tag away."""
    try:
        value = image.getexif().get(_ORIENTATION_TAG, 1)
    except Exception:  # a broken EXIF block does not spoil the pixels
        return 1
    return value if isinstance(value, int) and value in _TURNS else 1


def _turn(pixels: _Pixels, orientation: int) -> _Pixels:
    return np.ascontiguousarray(_TURNS[orientation](pixels)) if orientation in _TURNS else pixels


# --- resizing --------------------------------------------------------------------------------------------------------


def _center_crop(image: _Pixels, target: tuple[int, int], kernel: Filter, antialias: bool) -> _Pixels:
    """Shapes: (H, W, 3) -> (*target, 3)."""
    if antialias:
        image = _halve(image, target)
    height, width = image.shape[:2]
    scale = max(target[0] / height, target[1] / width)
    full = (max(round(height * scale), target[0]), max(round(width * scale), target[1]))
    top, left = (full[0] - target[0]) // 2, (full[1] - target[1]) // 2
    if full[0] * full[1] > _MAX_OVERHANG * target[0] * target[1]:  # a 1 px wide strip would grow without bound
        image, full, (top, left) = _precrop(image, full, target, (top, left))
    resized = _resample(image, full, kernel, antialias)
    return np.ascontiguousarray(resized[top : top + target[0], left : left + target[1]])


def _halve(image: _Pixels, target: tuple[int, int]) -> _Pixels:
    picture = Image.fromarray(image)
    while picture.height >= 2 * target[0] and picture.width >= 2 * target[1]:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    return np.asarray(picture)


def _precrop(
    image: _Pixels, full: tuple[int, int], target: tuple[int, int], offset: tuple[int, int]
) -> tuple[_Pixels, tuple[int, int], tuple[int, int]]:
    """Cut a long strip to what the middle needs, with a margin for the filter; the grid moves by under a pixel."""
    axis = 0 if full[0] / target[0] > full[1] / target[1] else 1
    ratio = full[axis] / image.shape[axis]  # output px per input px
    margin = math.ceil(_SUPPORT["lanczos"] * max(1.0, 1.0 / ratio)) + 1
    start = max(0, math.floor(offset[axis] / ratio) - margin)
    stop = min(image.shape[axis], math.ceil((offset[axis] + target[axis]) / ratio) + margin)
    cut = image[start:stop] if axis == 0 else image[:, start:stop]
    size = round((stop - start) * ratio)
    begin = min(max(0, round(offset[axis] - start * ratio)), size - target[axis])
    if axis == 0:
        return cut, (size, full[1]), (begin, offset[1])
    return cut, (full[0], size), (offset[0], begin)


def _resample(image: _Pixels, size: tuple[int, int], kernel: Filter, antialias: bool) -> _Pixels:
    """Shapes: (H, W, 3), size (h, w) -> (h, w, 3)."""
    if antialias:
        picture = Image.fromarray(np.ascontiguousarray(image))
        return np.array(picture.resize((size[1], size[0]), _RESAMPLING[kernel]))
    rows = _interpolate(image.astype(np.float32), size[0], kernel)  # (h, W, 3)
    both = _interpolate(rows.transpose(1, 0, 2), size[1], kernel).transpose(1, 0, 2)  # (h, w, 3)
    return np.clip(np.rint(both), 0, 255).astype(np.uint8)


def _interpolate(values: NDArray[np.float32], size: int, kernel: Filter) -> NDArray[np.float32]:
    """Resample axis 0 with a filter of fixed width; the border repeats. Shapes: (N, M, 3) -> (size, M, 3)."""
    centre = (np.arange(size) + 0.5) * (values.shape[0] / size) - 0.5
    radius = _SUPPORT[kernel]
    if kernel == "box":
        nearest: NDArray[np.float32] = values[np.clip(np.floor(centre + 0.5).astype(int), 0, values.shape[0] - 1)]
        return nearest
    first = np.floor(centre).astype(int) - int(radius) + 1
    taps = first[:, None] + np.arange(int(2 * radius))  # (size, taps)
    weights = _kernel(centre[:, None] - taps, kernel)
    weights /= weights.sum(axis=1, keepdims=True)
    out = np.zeros((size, *values.shape[1:]), dtype=np.float32)
    for tap in range(taps.shape[1]):
        neighbours = values[np.clip(taps[:, tap], 0, values.shape[0] - 1)]
        out += weights[:, tap, None, None].astype(np.float32) * neighbours
    return out


def _kernel(offset: NDArray[np.float64], kernel: Filter) -> NDArray[np.float64]:
    """Weight at a distance in px, as Pillow defines its filters (bicubic: a = -0.5)."""
    x = np.abs(offset)
    if kernel == "bilinear":
        return np.maximum(0.0, 1.0 - x)
    if kernel == "bicubic":
        near = 1.5 * x**3 - 2.5 * x**2 + 1.0
        far = -0.5 * x**3 + 2.5 * x**2 - 4.0 * x + 2.0
        return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))
    return np.where(x < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)
