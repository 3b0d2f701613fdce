"""How busy is the teacher? Images/s of a whole extraction over a bare forward loop of the same teacher, in one run.

The bare loop runs before and after the extraction, on the same device, threads, batch size and views, with images and
noise ready in memory; its two speeds show how steady the machine was. The extraction's speed counts from when the
first worker is ready, so that loading the teacher is left out of both.

    python benchmarks/extract_overhead.py [--images DIR] [--teacher DIR] [--batch-size 32] [--ray] [--out-json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, publish, teacher_digest, write_random_teacher

from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.encode import encode, recipe_rows
from dtpipe.extract.recipe import Resolved, resolve_recipe
from dtpipe.extract.run import run_extraction
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.pipeline.demo.scenes import write_scenes

NUM_SCENES = 2048


def bare_img_s(resolved: Resolved, seconds: float) -> float:
    """Images per second of nothing but the teacher's forward passes."""
    recipe, device = resolved.recipe, resolved.recipe.compute.device
    teacher = load_teacher(resolved.config.teacher, device)
    size, px = recipe.compute.batch_size, (recipe.transform.height, recipe.transform.width)
    images = np.random.default_rng(0).integers(0, 256, (size, *px, 3), dtype=np.uint8)
    rows = recipe_rows(recipe, teacher.spec, [str(idx) for idx in range(size)], images)

    def batches(num: int) -> float:
        begun_s = time.perf_counter()
        for _ in range(num):
            encode(teacher, rows, device, recipe.compute)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - begun_s

    batches(2)  # warm up
    num = max(1, round(seconds / batches(1)))
    return num * size / batches(num)


def measure(config: ExtractConfig, seconds: float) -> dict[str, Any]:
    """Bare loop, extraction, bare loop."""
    resolved = resolve_recipe(config)
    before = bare_img_s(resolved, seconds)
    result = run_extraction(config)
    after = bare_img_s(resolved, seconds)
    bare = (before + after) / 2
    return {
        "bare_img_s": [round(before, 2), round(after, 2)],
        "extract_img_s": round(result.throughput_img_s, 2),
        "ratio": round(result.throughput_img_s / bare, 3),
        "num_rows": result.num_rows,
        "size_bytes": result.size_bytes,
        "stage_seconds": result.stage_seconds,
        "recipe": resolved.recipe.model_dump(mode="json"),
        "inline": config.run.inline,
    }


def main() -> int:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="image source; default: 2,048 digit scenes")
    parser.add_argument("--teacher", help="teacher folder; default: a small UNet with random weights")
    parser.add_argument("--px", type=int, help="image side in px; default: the teacher's")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the forward pass")
    parser.add_argument("--decode-threads", type=int, default=2)
    parser.add_argument("--samples", type=int, help="rows per shard")
    parser.add_argument("--format", default="zarr", choices=["zarr", "webdataset"])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--ray", action="store_true", help="one Ray actor instead of in this process")
    parser.add_argument("--seconds", type=float, default=10, help="length of each bare loop")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "extract_overhead.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = args.images or str(write_scenes(Path(folder) / "scenes", NUM_SCENES, seed=0))
        teacher = args.teacher or str(write_random_teacher(Path(folder) / "teacher", args.px or 64))
        config = ExtractConfig.model_validate(
            {
                "images": images,
                "teacher": {"path": teacher, "dtype": args.dtype},
                "transform": {"px": args.px},
                "noise": {"timesteps": [50]},
                "shard": {"format": args.format, "samples": args.samples},
                **{name: getattr(args, name) for name in ("batch_size", "threads", "limit")},
                "run": {
                    "out": f"{folder}/features",
                    **{name: getattr(args, name) for name in ("decode_threads", "device")},
                    "inline": not args.ray,
                    "workers": 1 if args.ray else None,
                },
            }
        )
        results = measure(config, args.seconds)
        publish("extract_overhead", results, args.out_json, {"teacher": teacher_digest(teacher)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
