"""How far do features move when only the batch size, the thread count or a row's neighbours change?

Each setting encodes the same images with the same noise; its error against the first setting is, per level, the largest
difference over the largest value of the sample: in the teacher's own float32, and after rounding to the stored dtype,
which is what `dtpipe verify --level recompute` compares with its tolerance.

    python benchmarks/batch_invariance.py [--images DIR] [--teacher DIR] [--out-json FILE]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, publish, teacher_digest, write_random_teacher
from numpy.typing import NDArray

from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.encode import encode, recipe_rows
from dtpipe.extract.recipe import Resolved, resolve_recipe
from dtpipe.extract.shards.reader import ImageReader
from dtpipe.manifests.check.recompute import relative_error
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.errors import BadImage
from dtpipe.manifests.schema import Recipe
from dtpipe.pipeline.demo.scenes import write_scenes

NUM_SCENES = 256
Features = Mapping[str, NDArray[np.float32]]


def load_images(resolved: Resolved) -> tuple[NDArray[np.uint8], list[str]]:
    """The source's good images at the recipe's size, and their keys."""
    listing, recipe = resolved.listing, resolved.recipe
    reader = ImageReader(resolved.source, listing, recipe.transform, resolved.config.source.max_pixels)
    images: dict[str, NDArray[np.uint8]] = {}
    for row, key in enumerate(listing.keys):
        with suppress(BadImage):
            images[key] = reader.image(row)
    return np.stack(list(images.values())), list(images)


def features_of(resolved: Resolved, recipe: Recipe, images: NDArray[np.uint8], keys: list[str]) -> Features:
    """Features computed as the recipe's compute settings say."""
    rows = recipe_rows(recipe, resolved.teacher.spec, keys, images)
    encoded = encode(resolved.teacher, rows, recipe.compute.device, recipe.compute)
    return {name: level.float().cpu().numpy() for name, level in encoded.levels.items()}


def errors(recipe: Recipe, reference: Features, other: Features) -> dict[str, dict[str, float]]:
    """Largest relative error by level, before and after rounding."""
    found: dict[str, dict[str, float]] = {}
    for level in recipe.levels:
        codec = open_codec(level)
        pairs = list(zip(reference[level.name], other[level.name], strict=True))
        plain = max(float(np.abs(one - two).max() / np.abs(one).max()) for one, two in pairs)
        parts = [codec.encode(one) for one, _ in pairs]
        stored = max(
            relative_error(codec.decode(coded), codec.error(coded), two)
            for coded, (_, two) in zip(parts, pairs, strict=True)
        )
        found[level.name] = {"float32": plain, level.dtype: stored}
    return found


def measure(config: ExtractConfig, batch_sizes: list[int], threads: list[int]) -> dict[str, Any]:
    """Every batch size with every thread count, and the images in reverse order, against the first of each."""
    resolved = resolve_recipe(config)
    images, keys = load_images(resolved)
    cases: dict[str, Any] = {}
    reference: Features | None = None
    for batch_size in batch_sizes:
        for count in threads:
            compute = resolved.recipe.compute.model_copy(update={"batch_size": batch_size, "threads": count})
            recipe = resolved.recipe.model_copy(update={"compute": compute})
            found = features_of(resolved, recipe, images, keys)
            reference = found if reference is None else reference
            cases[f"batch {batch_size}, threads {count}"] = errors(recipe, reference, found)
            turned = features_of(resolved, recipe, images[::-1].copy(), keys[::-1])
            same = all(np.array_equal(found[name], turned[name][::-1]) for name in found)
            cases[f"batch {batch_size}, threads {count}"]["equal bits with other neighbours"] = same
    names = [level.name for level in resolved.recipe.levels]
    kinds = list(next(iter(cases.values()))[names[0]])
    worst = {name: {kind: max(case[name][kind] for case in cases.values()) for kind in kinds} for name in names}
    return {
        "num_images": len(keys),
        "max_relative_error": worst,
        "cases": cases,
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def main() -> int:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", help="image source; default: 256 digit scenes")
    parser.add_argument("--teacher", help="teacher folder; default: a small UNet with random weights")
    parser.add_argument("--limit", type=int, default=64)
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 3, 8, 32])
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "batch_invariance.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        images = args.images or str(write_scenes(Path(folder) / "scenes", NUM_SCENES, seed=0))
        teacher = args.teacher or str(write_random_teacher(Path(folder) / "teacher"))
        fields = {
            "images": images,
            "teacher": {"path": teacher},
            "noise": {"timesteps": [50]},
            "limit": args.limit,
            "run": {"out": f"{folder}/features", "device": args.device, "inline": True},
        }
        config = ExtractConfig.model_validate(fields)
        results = measure(config, args.batch_sizes, args.threads)
        publish("batch_invariance", results, args.out_json, {"teacher": teacher_digest(teacher)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
