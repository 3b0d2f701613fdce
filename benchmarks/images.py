"""What lossless codings of the stored images cost: bytes, and encoding and decoding on one core, side by side.

All take the same images in turns in one process: photographs as a teacher would see them (flowers at 128 px, COCO's at
256 px, both where they are found) and the demo's scenes at 64 px. A coding whose package is not installed is left out,
and named. `zstd`, `predicted` and `webp` are what dtpipe stores with `extract.shard.image_coding`, and `png` what plain
tars have.

    pip install imagecodecs    # not needed by dtpipe; for JPEG XL, JPEG LS and QOI
    python benchmarks/images.py [--photos DIR=PX ..] [--num 60] [--out-json FILE]
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from common import REPO, RESULTS, publish, refuse_to_lose
from numcodecs.zstd import Zstd
from numpy.typing import NDArray
from PIL import Image

from dtpipe.manifests.layout.prediction import predicted, restore
from dtpipe.pipeline.demo.scenes import write_scenes

Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class Coding:
    """One lossless way from pixels [H, W, 3] to bytes and back."""

    encode: Callable[[Pixels], bytes]
    decode: Callable[[bytes, tuple[int, ...]], Pixels]


def zstd(level: int) -> Coding:
    """The pixels as they are, under zstd."""
    return Coding(
        lambda image: bytes(Zstd(level=level).encode(image)),
        lambda data, shape: np.frombuffer(Zstd().decode(data), np.uint8).reshape(shape),
    )


def residuals(level: int) -> Coding:
    """Residuals under zstd: at level 1, what dtpipe calls predicted."""

    def decode(data: bytes, shape: tuple[int, ...]) -> Pixels:
        image = np.frombuffer(Zstd().decode(data), np.uint8).reshape(1, *shape).copy()
        restore(image)
        first: Pixels = image[0]
        return first

    return Coding(lambda image: bytes(Zstd(level=level).encode(predicted(image[None]))), decode)


def file(kind: str, **options: Any) -> Coding:
    """A file as Pillow writes and reads it."""

    def encode(image: Pixels) -> bytes:
        sink = io.BytesIO()
        Image.fromarray(image).save(sink, kind, **options)
        return sink.getvalue()

    return Coding(encode, lambda data, _: np.asarray(Image.open(io.BytesIO(data))))


def webp(method: int) -> Coding:
    """Lossless WebP; method 0 is what dtpipe stores in tars."""
    return file("WEBP", lossless=True, exact=True, quality=25, method=method)


CODINGS = {
    "zstd": zstd(3),
    "zstd 19": zstd(19),
    "predicted": residuals(1),
    "predicted, zstd 3": residuals(3),
    "predicted, zstd 19": residuals(19),
    "png": file("PNG", compress_level=1),
    "png 6": file("PNG", compress_level=6),
    "webp": webp(0),
    "webp, method 1": webp(1),
    "webp, method 4": webp(4),
}


def of_imagecodecs() -> dict[str, Coding]:
    """Codings of the package imagecodecs, where it is installed."""
    try:
        import imagecodecs
    except ImportError:
        return {}

    def named(name: str, **options: Any) -> Coding:
        encode, decode = getattr(imagecodecs, f"{name}_encode"), getattr(imagecodecs, f"{name}_decode")
        return Coding(lambda image: bytes(encode(image, **options)), lambda data, _: decode(data))

    efforts = {
        f"jpeg xl, effort {effort}": partial(named, "jpegxl", lossless=True, effort=effort) for effort in (1, 3, 7)
    }
    return {
        **{name: make() for name, make in efforts.items()},
        "jpeg ls": named("jpegls"),
        "qoi": named("qoi"),
        "webp by imagecodecs": named("webp", lossless=True),
        "png by imagecodecs": named("png", level=1),
    }


def photographs(folder: Path, px: int, num: int) -> list[Pixels]:
    """The middle square of photographs, evenly spread over a folder, at a size in px."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in (".jpg", ".jpeg", ".png"))
    return [square(path, px) for path in paths[:: max(1, len(paths) // num)][:num]]


def square(path: Path, px: int) -> Pixels:
    """One of them."""
    with Image.open(path) as opened:
        image = opened.convert("RGB")
    side = min(image.size)
    left, top = ((whole - side) // 2 for whole in image.size)
    return np.asarray(image.crop((left, top, left + side, top + side)).resize((px, px), Image.Resampling.BICUBIC))


def scenes(num: int) -> list[Pixels]:
    """The demo's images."""
    with tempfile.TemporaryDirectory() as folder:
        write_scenes(Path(folder), num, seed=0, px=64, part="train")
        return photographs(Path(folder) / "images", 64, num)


def measure(images: list[Pixels], codings: dict[str, Coding], repeats: int) -> dict[str, Any]:
    """Bytes and milliseconds per image of each coding; CPU time of this thread, median of the repeats.

    Raises: ValueError when a coding does not give the pixels back.
    """
    encode_ms: dict[str, list[float]] = {name: [] for name in codings}
    decode_ms: dict[str, list[float]] = {name: [] for name in codings}
    sizes = {}
    for _ in range(repeats):
        for name, coding in codings.items():
            started = time.thread_time()
            coded = [coding.encode(image) for image in images]
            encoded = time.thread_time()
            pixels = [coding.decode(data, image.shape) for data, image in zip(coded, images, strict=True)]
            encode_ms[name].append(1000 * (encoded - started) / len(images))
            decode_ms[name].append(1000 * (time.thread_time() - encoded) / len(images))
            if not all(np.array_equal(one, other) for one, other in zip(pixels, images, strict=True)):
                raise ValueError(f"{name} does not give the pixels back")
            sizes[name] = sum(map(len, coded)) / len(images)
    raw = sum(image.nbytes for image in images) / len(images)
    return {
        "num_images": len(images),
        "raw_bytes": round(raw),
        "codings": {
            name: {
                "bytes": round(sizes[name]),
                "of_raw": round(sizes[name] / raw, 4),
                "of_zstd": round(sizes[name] / sizes["zstd"], 4),
                "encode_ms": round(statistics.median(encode_ms[name]), 3),
                "decode_ms": round(statistics.median(decode_ms[name]), 3),
                "decode_mb_s": round(raw / 1000 / statistics.median(decode_ms[name]), 1),
            }
            for name in codings
        },
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--photos", action="append", metavar="DIR=PX", help="default: flowers and COCO in ../shared/data"
    )
    parser.add_argument("--num", type=int, default=60, help="images of each kind")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out-json", type=Path, default=RESULTS / "images.json")
    return parser.parse_args()


def main() -> int:
    """Measure every kind of images and write one JSON document."""
    args = parse()
    shared = REPO.parent / "shared" / "data"
    named = args.photos or [f"{shared / 'flowers5_128'}=128", f"{shared / 'coco98'}=256"]
    kinds = {"scenes at 64 px": scenes(args.num)}
    for folder, _, px in (each.rpartition("=") for each in named):
        if Path(folder).is_dir():
            kinds[f"{Path(folder).name} at {px} px"] = photographs(Path(folder), int(px), args.num)
    refuse_to_lose("images", args.out_json, "images", kinds)
    extra = of_imagecodecs()
    measured = {kind: measure(images, CODINGS | extra, args.repeats) for kind, images in kinds.items()}
    settings = {"num": args.num, "repeats": args.repeats, "imagecodecs": bool(extra)}
    publish("images", {"settings": settings, "images": measured}, args.out_json, {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
