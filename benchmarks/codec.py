"""What each codec makes of real features: bytes, error, and speed of encoding and decoding, by level.

Features of digit scenes by the demo's teacher (or of --images by --teacher), whitened as the loss sees them for the
error. Bytes are those of the parts after zstd, chunk by chunk as a dataset stores them, against float16 without it.
Speeds count bytes of float16 features; the reference runs in numpy, the device's own code where a codec has one.

    python benchmarks/codec.py [--images DIR] [--teacher DIR] [--limit 256] [--device cuda] [--out-json FILE]
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from batch_invariance import features_of, load_images
from common import REPO, RESULTS, publish, teacher_digest
from numcodecs import Zstd
from numpy.typing import NDArray
from teacher_forward import seconds_of

from dtpipe.distill.losses.whitening import whiten
from dtpipe.distill.stream.decode import DECODERS
from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.shards.codecs import ENCODERS
from dtpipe.manifests.codecs.base import Array, LevelCodec
from dtpipe.manifests.codecs.fitted import NOT_FITTED
from dtpipe.manifests.codecs.registry import CODECS
from dtpipe.manifests.schema import CodecSpec, LevelSpec
from dtpipe.pipeline.demo.scenes import write_scenes


def measure_codec(codec: LevelCodec, features: NDArray[np.float32], repeats: int, device: str) -> dict[str, Any]:
    """Figures of one codec on one level. Shapes: features [N, V, C, H, W]."""
    parts = codec.encode(features)
    float16_bytes = 2 * features.size
    row: dict[str, Any] = {
        "ratio_to_float16": round(float16_bytes / stored_bytes(parts), 3),
        "relative_mse": relative_mse(codec.decode(parts), features),
        "encode_mb_s": mb_s(float16_bytes, repeats, lambda: codec.encode(features)),
        "decode_mb_s": mb_s(float16_bytes, repeats, lambda: codec.decode(parts)),
    }
    name = codec.level.codec.name
    if name in ENCODERS and name in DECODERS:
        on_device = torch.from_numpy(features).to(device)
        flat = {part: torch.from_numpy(values[:, 0].copy()).to(device) for part, values in parts.items()}
        row["device_encode_mb_s"] = mb_s(float16_bytes, repeats, lambda: ENCODERS[name](codec, on_device))
        row["device_decode_mb_s"] = mb_s(flat_bytes(features), repeats, lambda: DECODERS[name](codec, flat))
    return row


def flat_bytes(features: NDArray[np.float32]) -> int:
    """Bytes in float16 of the first view alone."""
    return int(2 * features[:, 0].size)


def stored_bytes(parts: Mapping[str, Array]) -> int:
    """Bytes of all parts, each row and view coded by itself, as a dataset's chunks are."""
    zstd = Zstd(level=3)
    return sum(
        len(zstd.encode(np.ascontiguousarray(values[row, view])))
        for values in parts.values()
        for row in range(values.shape[0])
        for view in range(values.shape[1])
    )


def relative_mse(found: Array, exact: NDArray[np.float32]) -> float:
    """Mean squared error of the whitened features; their variance is 1."""
    one, other = (whiten(torch.from_numpy(np.asarray(values)[:, 0]).float(), "layer") for values in (found, exact))
    return float((one - other).square().mean())


def mb_s(size_bytes: int, repeats: int, run: Any) -> float:
    """Median speed in MB/s, a first call left out."""
    run()
    return round(size_bytes / statistics.median(seconds_of(run) for _ in range(repeats)) / 1e6, 1)


def measure(config: ExtractConfig, repeats: int) -> dict[str, Any]:
    """Every codec on every level."""
    resolved = resolve_recipe(config)
    images, keys = load_images(resolved)
    features = features_of(resolved, resolved.recipe, images, keys)
    results: dict[str, Any] = {}
    for level in resolved.recipe.levels:
        for name in ("cast", "int8"):
            codec = CODECS[name]
            spec: LevelSpec = level.model_copy(update={"codec": CodecSpec(name=name)})
            row = measure_codec(
                codec.open(spec, NOT_FITTED), features[level.name], repeats, resolved.recipe.compute.device
            )
            results.setdefault(name, {})[level.name] = row
    return {"num_images": len(keys), "codecs": results}


def main() -> int:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="image source; default: digit scenes")
    parser.add_argument("--teacher", default=str(REPO / "pipeline" / "demo" / "teacher"))
    parser.add_argument("--limit", type=int, default=256)
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "codec.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fields = {
            "images": args.images or str(write_scenes(Path(folder) / "scenes", args.limit, seed=0)),
            "teacher": {"path": args.teacher},
            "noise": {"timesteps": [args.timestep]},
            "limit": args.limit,
            "run": {"out": f"{folder}/features", "device": pick_device(args.device), "inline": True},
        }
        results = measure(ExtractConfig.model_validate(fields), args.repeats)
        publish("codec", results, args.out_json, {"teacher": teacher_digest(args.teacher)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
