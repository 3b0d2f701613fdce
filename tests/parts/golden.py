"""Make small feature datasets from arithmetic alone: the golden ones of a format version, and those of tests.

    cd tests && python -m parts.golden OUT_FOLDER      writes OUT_FOLDER/v1_zarr and OUT_FOLDER/v1_webdataset

The golden datasets in tests/golden were made so, once, and are never made again: readers must read them for ever.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dtpipe.manifests.codecs.fitted import HeldFitted
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.schema import (
    CodecRecipe,
    IndexRow,
    LevelSpec,
    Manifest,
    Plan,
    Recipe,
    ShardRecipe,
    SourceRecipe,
    TeacherRecipe,
    TransformRecipe,
    ViewSpec,
)
from dtpipe.manifests.soft_labels import interpreter_recipe
from dtpipe.manifests.write.listing import Listing, build_listing
from parts.coded import code_features
from parts.datasets import Item, write_features
from parts.datasets import make_recipe as recipe_of

LEVELS = (
    LevelSpec(name="l2", stride=4, channels=3, height=2, width=2, dtype="float16", tap="up.3"),
    LevelSpec(name="l3", stride=8, channels=3, height=2, width=2, dtype="float16", tap="up.2"),
    LevelSpec(name="l4.b", stride=16, channels=5, height=1, width=2, dtype="float32", tap="up.1"),
)
VIEWS = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=0, timestep=50, flip=True))


@dataclass(frozen=True)
class Settings:
    """What a small dataset is made of. Row `bad` of the listing is a bad sample."""

    format: str = "zarr"
    num_rows: int = 5
    samples: int = 2
    levels: tuple[LevelSpec, ...] = LEVELS
    views: tuple[ViewSpec, ...] = VIEWS
    images: str = "stored"
    image_coding: str = "plain"
    bad: tuple[str, ...] = ("dog/3.png",)
    prefix: str = ""
    zstd_level: int = 3
    salt: int = 0
    weights: str = "ab" * 32
    kind: str = "class_folder"
    noise_seed: int = 0
    labels_of: str | None = None
    """Of soft labels: the digest of the features that they were read from."""
    fitted: dict[str, bytes] = field(default_factory=dict)
    """Files that the codecs of the levels need, by digest."""
    provenance: dict[str, str] = field(default_factory=lambda: {"made": "by tests/golden/make.py"})


def golden_settings(shard_format: str) -> Settings:
    """What the golden datasets of format v1 were made of: two shards, the second one short; one bad sample."""
    return Settings(format=shard_format, num_rows=3, bad=("dog/1.png",))


def make_recipe(settings: Settings) -> Recipe:
    """The recipe of a small dataset: 4 by 6 px images of student size 8 by 8."""
    teacher = TeacherRecipe(kind="ddpm", weights_blake3=settings.weights)
    if settings.labels_of is not None:
        teacher = interpreter_recipe(settings.weights, ["sky", "sea", "sand"], {"dataset": settings.labels_of})
    return recipe_of(
        source=SourceRecipe(kind=settings.kind, seed=1),
        noise_seed=settings.noise_seed,
        transform=TransformRecipe(height=4, width=6, resize="stretch"),
        student_px=(8, 8),
        teacher=teacher,
        views=settings.views,
        levels=settings.levels,
        images=settings.images,
        image_coding=settings.image_coding,
        codec=CodecRecipe(zstd_level=settings.zstd_level),
        shard=ShardRecipe(format=settings.format, samples=settings.samples),  # type: ignore[arg-type]
    )


def make_listing(settings: Settings) -> Listing:
    """Rows in two classes, permuted."""
    names = [f"{settings.prefix}{'dog' if idx % 2 else 'cat'}/{idx}.png" for idx in range(settings.num_rows)]
    return build_listing([Item(name, f"images/{name}", name.split("/")[-2]) for name in names], seed=1)


def sample_values(name: str, key: str, shape: tuple[int, ...], dtype: str, salt: int = 0) -> np.ndarray:
    """The true content of one array of one sample: a function of names alone. Any shape."""
    start = sum((idx + 1) * ord(letter) for idx, letter in enumerate(f"{name}/{key}")) + 17 * salt
    steps = (start + 37 * np.arange(int(np.prod(shape)))) % 251
    if dtype == "uint8":
        return steps.astype(np.uint8).reshape(shape)
    return ((steps - 125) / 32).astype(dtype).reshape(shape)


def true_level(level: LevelSpec, key: str, salt: int = 0) -> np.ndarray:
    """The true content of a level of one sample. Shapes: -> [V, C, H, W], of the two views that are the default."""
    return sample_values(level.name, key, (2, level.channels, level.height, level.width), level.dtype, salt)


def true_image(key: str) -> np.ndarray:
    """The true image of one sample. Shapes: -> [4, 6, 3]."""
    return sample_values("image", key, (4, 6, 3), "uint8")


def shard_arrays(plan: Plan, listing: Listing, shard_idx: int, settings: Settings) -> ShardArrays:
    """All arrays of one shard, bad rows zero."""
    rows, recipe, num_views = [], plan.recipe, len(plan.recipe.views)
    images, levels = [], {level.name: [] for level in recipe.levels}
    for listed in listing.rows(plan.shard_rows(shard_idx)):
        bad = listed.key in settings.bad
        size = {} if bad else {"original_height": 40, "original_width": 60}
        status = "bad: truncated file" if bad else "ok"
        rows.append(
            IndexRow(row=listed.row, key=listed.key, shard=shard_idx, status=status, label=listed.label, **size)
        )
        images.append(sample_values("image", listed.key, (recipe.transform.height, recipe.transform.width, 3), "uint8"))
        for level in recipe.levels:
            shape = (num_views, level.channels, level.height, level.width)
            levels[level.name].append(sample_values(level.name, listed.key, shape, level.dtype, settings.salt))
    features = {name: np.stack(values) for name, values in levels.items()}
    held = HeldFitted(settings.fitted)
    return code_features(recipe, np.stack(images) if recipe.images == "stored" else None, features, rows, held)


def write_shards(
    url: str | Path, settings: Settings, limit: int | None = None, do_merge: bool = True
) -> Manifest | None:
    """Write what is pending, at most `limit` shards, and merge."""

    def arrays(plan: Plan, listing: Listing, shard_idx: int) -> ShardArrays:
        return shard_arrays(plan, listing, shard_idx, settings)

    recipe, listing = make_recipe(settings), make_listing(settings)
    return write_features(url, recipe, listing, arrays, limit, do_merge, settings.provenance, settings.fitted)


def main(out: str) -> None:
    """Write both golden datasets."""
    for shard_format in ("zarr", "webdataset"):
        folder = Path(out) / f"v1_{shard_format}"
        manifest = write_shards(str(folder), golden_settings(shard_format))
        assert manifest is not None
        shutil.rmtree(folder / "lock")  # names the machine, and is no part of what readers read
        sys.stdout.write(f"v1_{shard_format} {manifest.digest}\n")


if __name__ == "__main__":
    main(sys.argv[1])
