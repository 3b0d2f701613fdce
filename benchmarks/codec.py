"""What each codec makes of real features: stored bytes against error on images that no fit saw, and speed on a CPU.

Features of digit scenes by the demo's teacher, and with the arguments below of photographs by a DDPM and by an
autoencoder, and of a GAN's own noise. A third of the images is held out: errors are of these, relative to the variance
of each sample and level. Bytes are those of real stores: the objects of a shard of these images (symbols, what a codec
keeps beside them, checksums, index, headers and padding of members), and a share of the fitted arrays and of the
metadata with their tables, which `--rows` rows of one view carry together. They are measured for zarr under zstd 3, 12
and 19 and under rans, and for tars of plain npy and of rans. Ratios are to float16. Speeds count float16 bytes of the
features, on one thread, and with --device those of the device's own code. `--adm` adds arrays of ADM-256's shapes (not
its features), for speed.

    python benchmarks/codec.py [--limit 600] [--rows 2000] [--adm] [--out-json FILE]
        [--flowers DIR] [--taef2 DIR] [--dcgan netG.pth]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from batch_invariance import features_of, load_images
from common import REPO, RESULTS, publish, refuse_to_lose, teacher_digest
from numcodecs import Zstd
from numpy.typing import NDArray
from teacher_forward import seconds_of

from dtpipe.distill.stream.decode import DECODERS
from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.shards.codecs import ENCODERS
from dtpipe.manifests.codecs.base import SYMBOLS, Arrays, LevelCodec, array_name
from dtpipe.manifests.codecs.fit import FitTarget
from dtpipe.manifests.codecs.fitted import FITTED, HeldFitted, encode_fitted
from dtpipe.manifests.codecs.rans import compress, decompress
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.codecs.transform import TransformLevel
from dtpipe.manifests.codecs.transform_fit import fit_transform
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.layout.zarr import zarr_metadata
from dtpipe.manifests.schema import (
    CodecRecipe,
    CodecSpec,
    ComputeRecipe,
    IndexRow,
    LevelSpec,
    Plan,
    Recipe,
    ShardFormat,
    ShardRecipe,
    SourceRecipe,
    TeacherRecipe,
    TransformRecipe,
    ViewSpec,
)
from dtpipe.manifests.write.shard import encode_shard
from dtpipe.pipeline.demo.scenes import write_scenes

Features = Mapping[str, NDArray[np.float32]]
TARGETS = (0.01, 0.03, 0.06, 0.10)
ADM_256 = {"l2": (512, 64), "l3": (512, 32), "l4": (1024, 16), "l5": (1024, 8)}


@dataclass(frozen=True)
class Stage:
    """What makes bytes of symbols."""

    name: str
    coder: str
    zstd_level: int = 3
    form: ShardFormat = "zarr"


STAGES = (
    *(Stage(f"zstd_{level}", "zstd", level) for level in (3, 12, 19)),
    Stage("rans", "rans"),
    Stage("tar_npy", "zstd", form="webdataset"),
    Stage("tar_rans", "rans", form="webdataset"),
)


@dataclass(frozen=True)
class Settings:
    """How it is measured."""

    rows: int
    repeats: int
    device: str


def level_spec(name: str, features: NDArray[np.float32], codec: CodecSpec) -> LevelSpec:
    """The level of features [N, C, H, W], float16."""
    channels, height, width = features.shape[1:]
    fields = {"channels": channels, "height": height, "width": width, "tap": "-", "codec": codec}
    return LevelSpec.model_validate({"name": name, "stride": 2 ** int(name[1]), **fields})


def fit(name: str, features: NDArray[np.float32], target: FitTarget) -> tuple[LevelCodec, dict[str, bytes]]:
    """`transform` for a target, and the file of its arrays by digest."""
    result = fit_transform(level_spec(name, features, CodecSpec()), features)(target)
    digest, data = encode_fitted(result.arrays)
    spec = CodecSpec(name="transform", parameters={**result.parameters, FITTED: digest})
    return open_codec(level_spec(name, features, spec), HeldFitted({digest: data})), {digest: data}


def ratios(
    codec: LevelCodec, files: Mapping[str, bytes], held: NDArray[np.float32], settings: Settings
) -> dict[str, Any]:
    """Stored bytes of a row by what makes bytes of symbols, and the error. Shapes: held [n, C, H, W]."""
    parts, float16_bytes = codec.encode(held), 2 * held[0].size
    fitted = isinstance(codec, TransformLevel)
    stages = [stage for stage in STAGES if fitted or stage.coder == "zstd"]
    sizes = {stage.name: stored_bytes(codec.level, files, parts, stage, settings.rows) for stage in stages}
    return {
        "float16_bytes": float16_bytes,
        "relative_mse": round(relative_mse(codec.decode(parts), held), 5),
        "bytes": {stage: round(size, 1) for stage, size in sizes.items()},
        "ratio": {stage: round(float16_bytes / size, 2) for stage, size in sizes.items()},
        "file_bytes": sum(map(len, files.values())),
    }


def stored_bytes(level: LevelSpec, files: Mapping[str, bytes], parts: Arrays, stage: Stage, rows: int) -> float:
    """Of one row of a real store: its share of the shard's objects, and of what `rows` rows have once."""
    coded = level.codec.parameters
    if "entropy" in coded:
        spec = level.codec.model_copy(update={"parameters": {**coded, "entropy": stage.coder}})
        level = level.model_copy(update={"codec": spec})
    num, held = len(next(iter(parts.values()))), HeldFitted(files)
    recipe = Recipe(
        source=SourceRecipe(kind="folder"),
        transform=TransformRecipe(height=64, width=64),
        student_px=(64, 64),
        teacher=TeacherRecipe(kind="ddpm", weights_blake3="0" * 64),
        views=(ViewSpec(draw=0),),
        levels=(level,),
        images="joined",
        codec=CodecRecipe(zstd_level=max(stage.zstd_level, 1), symbols_zstd_level=max(stage.zstd_level, 1)),
        shard=ShardRecipe(samples=num, format=stage.form),
        compute=ComputeRecipe(device="cpu", batch_size=1, threads=1),
    )
    plan = Plan(format=recipe.format, recipe=recipe, num_rows=num, num_shards=1, listing_blake3="0" * 64)
    arrays = {array_name(level.name, part): values[:, None] for part, values in parts.items()}
    index = [IndexRow(row=row, key=f"{row}.png", shard=0) for row in range(num)]
    objects = encode_shard(plan, 0, ShardArrays(arrays, index), held)
    of_rows = sum(encoded.size_bytes for encoded in objects) / num
    once = [*files.values(), *zarr_metadata(plan, held).values()]
    return of_rows + sum(map(len, once)) / rows


def relative_mse(decoded: NDArray[np.generic], true: NDArray[np.float32]) -> float:
    """Mean over samples of the squared error over the sample's variance."""
    axes = (1, 2, 3)
    apart = np.square(decoded.astype(np.float64) - true).mean(axis=axes)
    return float((apart / true.astype(np.float64).var(axis=axes)).mean())


def speeds(codec: LevelCodec, held: NDArray[np.float32], settings: Settings) -> dict[str, float]:
    """MB/s of float16 features through each stage; entropy stages interleaved."""
    parts, zstd, num_bytes = codec.encode(held), Zstd(level=3), 2 * held.size
    harder = {level: Zstd(level=level) for level in (12, 19)}
    frames = [zstd.encode(row) for row in np.ascontiguousarray(parts[SYMBOLS])]
    runs: dict[str, Callable[[], object]] = {
        "encode": lambda: codec.encode(held),
        "decode": lambda: codec.decode(parts),
        "zstd_3_encode": partial(_encode_all, zstd, parts[SYMBOLS]),
        "zstd_3_decode": lambda: [zstd.decode(frame) for frame in frames],
        **{f"zstd_{level}_encode": partial(_encode_all, coder, parts[SYMBOLS]) for level, coder in harder.items()},
    }
    if isinstance(codec, TransformLevel):
        symbols, tables = parts[SYMBOLS].astype(np.int8), codec.load_tables()
        chunks = [compress(row, tables) for row in symbols]
        runs["rans_encode"] = lambda: [compress(row, tables) for row in symbols]
        runs["rans_decode"] = lambda: decompress(chunks, tables)
    name, device = codec.level.codec.name, settings.device
    if name in ENCODERS and name in DECODERS:
        views = torch.from_numpy(held[:, None]).to(device)
        flat = {part: torch.from_numpy(np.array(values)).to(device) for part, values in parts.items()}
        runs["device_encode"] = lambda: ENCODERS[name](codec, views)
        runs["device_decode"] = lambda: DECODERS[name](codec, {part: values.clone() for part, values in flat.items()})
    return interleaved(runs, num_bytes, settings.repeats)


def _encode_all(zstd: Zstd, symbols: NDArray[np.generic]) -> list[bytes]:
    return [zstd.encode(np.ascontiguousarray(row)) for row in symbols]


def interleaved(runs: Mapping[str, Callable[[], object]], num_bytes: int, repeats: int) -> dict[str, float]:
    """Median speed of each in MB/s; a first round is left out."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats + 1):
        for name, run in runs.items():
            seconds[name].append(seconds_of(run))
    return {name: round(num_bytes / statistics.median(times[1:]) / 1e6, 1) for name, times in seconds.items()}


def measure(features: Features, settings: Settings) -> dict[str, Any]:
    """Every codec and target on every level, and the sums of a dataset's levels."""
    rows: dict[str, dict[str, Any]] = {}
    for name, values in features.items():
        seen, held = np.arange(len(values)) % 3 < 2, np.arange(len(values)) % 3 == 2
        fit_on, other = values[seen], values[held]
        for plain in ("cast", "int8"):
            codec = open_codec(level_spec(name, values, CodecSpec(name=plain)))
            rows.setdefault(plain, {})[name] = ratios(codec, {}, other, settings)
        for target in TARGETS:
            codec, files = fit(name, fit_on, FitTarget(relative_mse=target, entropy="rans"))
            row = ratios(codec, files, other, settings)
            if target == 0.03:
                row["mb_s"] = speeds(codec, other[:64], settings)
            rows.setdefault(f"transform {target:g}", {})[name] = row
    return {
        "num_images": len(next(iter(features.values()))),
        "codecs": {name: summed(row) for name, row in rows.items()},
    }


def summed(levels: Mapping[str, Any]) -> dict[str, Any]:
    """With the ratio of all levels together."""
    float16 = sum(row["float16_bytes"] for row in levels.values())
    entropies = next(iter(levels.values()))["bytes"]
    total = {name: round(float16 / sum(row["bytes"][name] for row in levels.values()), 2) for name in entropies}
    return {"total_ratio": total, "levels": dict(levels)}


def encoded(images: str, teacher: str, limit: int, folder: str, **fields: Any) -> Features:
    """Levels of a source's images, first view: [N, C, H, W]."""
    run = {"out": f"{folder}/features", "device": "cpu", "inline": True}
    config = {"images": images, "teacher": {"path": teacher}, "limit": limit, "run": run, **fields}
    resolved = resolve_recipe(ExtractConfig.model_validate(config))
    pixels, keys = load_images(resolved)
    levels = features_of(resolved, resolved.recipe, pixels, keys)
    return {level.name: levels[level.name][:, 0] for level in resolved.recipe.levels if level.role == "features"}


def dcgan_features(path: Path, limit: int) -> Features:
    """After the ReLU of a DCGAN of 64 px, from noise: l2 of 16 cells a side, l3, l4."""
    tensors = torch.load(path, weights_only=True)
    maps = torch.from_numpy(np.random.Generator(np.random.Philox(0)).standard_normal((limit, 100, 1, 1), np.float32))
    levels = {}
    with torch.inference_mode():
        for name, conv in (("l4", 0), ("l3", 3), ("l2", 6)):
            stride, padding = (1, 0) if conv == 0 else (2, 1)
            maps = F.conv_transpose2d(maps, tensors[f"main.{conv}.weight"], stride=stride, padding=padding)
            norm = (tensors[f"main.{conv + 1}.{part}"] for part in ("running_mean", "running_var", "weight", "bias"))
            maps = F.relu(F.batch_norm(maps, *norm))
            levels[name] = maps.numpy()
    return dict(sorted(levels.items()))


def adm_shaped(num: int) -> Iterator[tuple[str, NDArray[np.float32]]]:
    """Arrays of the shapes of ADM-256's levels: falling spectra and mixed channels, about as redundant as real ones."""
    rng = np.random.Generator(np.random.Philox(0))
    for name, (channels, side) in ADM_256.items():
        wave = np.fft.fftfreq(side) * side
        decay = (1 + wave[:, None] ** 2 + wave[None, :] ** 2) ** -0.5
        maps = np.fft.ifft2(np.fft.fft2(rng.standard_normal((num, channels, side, side))) * decay).real
        mix = rng.standard_normal((channels, channels)) * (1 + np.arange(channels)) ** -0.5
        mixed = mix @ maps.reshape(num, channels, -1)
        yield name, mixed.reshape(maps.shape).astype(np.float32)


def measure_adm(settings: Settings, num: int = 9) -> dict[str, Any]:
    """Speeds at ADM-256's shapes, at 3 %."""
    levels = {}
    for name, values in adm_shaped(num):
        start = time.perf_counter()
        codec, files = fit(name, values, FitTarget(relative_mse=0.03, entropy="rans"))
        seconds = time.perf_counter() - start
        speed = speeds(codec, values[:2], settings)
        row = ratios(codec, files, values[:2], settings)
        levels[name] = {"shape": values.shape[1:], "fit_s": round(seconds, 1), "ratio": row["ratio"], "mb_s": speed}
    return levels


def main(arguments: Sequence[str] | None = None) -> int:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--limit", type=int, default=600, help="images of each teacher")
    parser.add_argument("--rows", type=int, default=2000, help="rows of the dataset that shares the fitted arrays")
    parser.add_argument("--flowers", help="photographs, for the DDPM of benchmarks/weights/flowers64 and for taef2")
    parser.add_argument("--taef2", help="folder of taef2, an autoencoder")
    parser.add_argument("--dcgan", type=Path, help="weights of a DCGAN of 64 px")
    parser.add_argument("--adm", action="store_true", help="also speeds at ADM-256's shapes")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "codec.json")
    args = parser.parse_args(arguments)
    asked = {"flowers64": args.flowers, "taef2": args.flowers and args.taef2, "dcgan": args.dcgan}
    named = ["demo", *(name for name, given in {**asked, "adm_256_shapes": args.adm}.items() if given)]
    refuse_to_lose("codec", args.out_json, "teachers", named)
    settings = Settings(args.rows, args.repeats, pick_device(args.device))
    results, teachers = {}, {"demo": str(REPO / "pipeline" / "demo" / "teacher")}
    noise = {"noise": {"timesteps": [50]}}
    with tempfile.TemporaryDirectory() as folder:
        scenes = str(write_scenes(Path(folder) / "scenes", args.limit, seed=0))
        results["demo"] = measure(encoded(scenes, teachers["demo"], args.limit, folder, **noise), settings)
        if args.flowers:
            teachers["flowers64"] = str(REPO / "benchmarks" / "weights" / "flowers64")
            levels = encoded(args.flowers, teachers["flowers64"], args.limit, folder, transform={"px": 64}, **noise)
            results["flowers64"] = measure(levels, settings)
        if args.flowers and args.taef2:
            teachers["taef2"] = args.taef2
            results["taef2"] = measure(
                encoded(args.flowers, args.taef2, args.limit, folder, transform={"px": 64}), settings
            )
        if args.dcgan:
            results["dcgan"] = measure(dcgan_features(args.dcgan, args.limit), settings)
    if args.adm:
        results["adm_256_shapes"] = measure_adm(settings)
    digests = {name: teacher_digest(path) for name, path in teachers.items()}
    publish("codec", {"rows": args.rows, "teachers": results}, args.out_json, digests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
