"""A feature source held in memory, the settings of a tiny run, a checkpoint, and a dataset written from the source."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import save_checkpoint
from dtpipe.distill.student.student import StudentSpec, build_student, spec_to_dict
from dtpipe.manifests.codecs.base import encode_level
from dtpipe.manifests.codecs.coded import CodedLevels, CodedPiece
from dtpipe.manifests.codecs.registry import open_codec
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.read.source import Columns
from dtpipe.manifests.schema import IndexRow, LevelSpec, Plan, Recipe, ShardRecipe, TransformRecipe, ViewSpec
from dtpipe.manifests.write.listing import Listing, build_listing
from parts.coded import code_features
from parts.datasets import Item, make_recipe, write_features
from parts.settings import build

PX = 32


def level_spec(name: str, stride: int, channels: int, px: tuple[int, int] = (PX, PX), **changes: object) -> LevelSpec:
    """A level of an image of `px` by its stride; `changes` replace fields."""
    sizes = {"height": px[0] // stride, "width": px[1] // stride}
    return LevelSpec(name=name, stride=stride, channels=channels, **sizes, **{"tap": f"up.{name}", **changes})


@dataclass
class MemorySource:
    """A `FeatureSource` over arrays; row i's features are a pure function of (i, view)."""

    num_rows: int = 21
    bad: tuple[int, ...] = (3, 11)
    views: tuple[ViewSpec, ...] = (ViewSpec(draw=0, timestep=50),)
    levels: tuple[LevelSpec, ...] = (level_spec("l2", 4, 6), level_spec("l3", 8, 8), level_spec("l4", 16, 10))
    image_px: tuple[int, int] = (PX, PX)
    reads: list[tuple[list[int], list[str], list[int]]] = field(default_factory=list)

    @property
    def columns(self) -> Columns:
        rows = range(self.num_rows)
        labels = ["even" if row % 2 == 0 else None for row in rows]
        status = ["bad: broken" if row in self.bad else "ok" for row in rows]
        return Columns("memory", [f"images/{row:03d}.png" for row in rows], labels, status)

    def image(self, row: int) -> np.ndarray:
        return np.random.default_rng([row, 0]).integers(0, 256, (*self.image_px, 3), dtype=np.uint8)

    def features(self, level: LevelSpec, row: int, view: int = 0) -> np.ndarray:
        shape = (level.channels, level.height, level.width)
        noise = np.random.default_rng([row, view, level.stride]).standard_normal(shape)
        return (noise * 3 + self.image(row).mean() / 100).astype(level.dtype)

    def read(
        self, rows: Sequence[int], names: Sequence[str], views: Sequence[int], images: bool = True
    ) -> tuple[np.ndarray, CodedLevels]:
        assert not set(rows) & set(self.bad), "a bad row was read"
        self.reads.append((list(map(int, rows)), list(names), list(map(int, views))))
        pixels = [self.image(row) for row in rows] if images else np.zeros((0, *self.image_px, 3))
        pieces = {}
        for level in (level for name in names for level in self.levels if level.name == name):
            features = np.stack([self.features(level, row, view) for row, view in zip(rows, views, strict=True)])
            codec = open_codec(level)
            pieces[level.name] = [CodedPiece(codec, encode_level(codec, features))]
        return np.array(pixels, np.uint8), CodedLevels(len(rows), pieces)


FLIPPED_VIEWS = tuple(ViewSpec(draw=draw, timestep=50, flip=flip) for flip in (False, True) for draw in range(2))


def tiny_config(out: Path, **changes: object) -> DistillConfig:
    """A run of a second: timm's smallest ResNet at 32 px, batches of 8 in micro-batches of 4, a narrow regressor."""
    base = {
        "datasets": ("memory",),
        "out": str(out),
        "student": {"name": "test_resnet"},
        "regressor": {"width": 8},
        "epochs": 2,
        "batch_size": 8,
        "micro_batch": 4,
        "lr": 1e-3,
        "device": "cpu",
        "log_every": 2,
    }
    return build(DistillConfig, base, **changes)


def write_student(
    path: Path, name: str, px: tuple[int, int] = (64, 64), ema: bool = False, stirred: bool = False
) -> Path:
    """A checkpoint as a run leaves it, of a student with random weights and moved batch norms.

    `stirred`: every weight matters, as after training; none is left at zero, one or 1e-6 as initialisation leaves it.
    """
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = build_student(StudentSpec(name, 4, px)).train()
        student(torch.rand(2, 3, *px))
        state = student.state_dict()
        if stirred:
            for tensor in state.values():
                if tensor.is_floating_point() and tensor.ndim == 1:  # kernels are random already
                    tensor.add_(torch.rand(tensor.shape) + 0.25)
        average = (
            {key: value * 0.5 if value.is_floating_point() else value for key, value in state.items()} if ema else None
        )
        save_checkpoint(path, "distill", {"student_spec": spec_to_dict(student.spec), "student": state, "ema": average})
    return path


def write_dataset(
    root: Path,
    source: MemorySource,
    /,
    prefix: str = "images",
    merged: bool = True,
    provenance: Mapping[str, Any] | None = None,
    **changes: object,
) -> Path:
    """The content of a memory source as a feature dataset of 8-row shards; `changes` replace fields of the recipe.

    Its rows are permuted, unless the recipe says otherwise; the sample with key `<prefix>/007.png` holds what row 7 of
    the source holds. Unmerged, it lacks its last shard.
    """
    fields: dict[str, object] = {
        "transform": TransformRecipe(height=source.image_px[0], width=source.image_px[1]),
        "student_px": source.image_px,
        "views": source.views,
        "levels": source.levels,
        "shard": ShardRecipe(samples=8),
    }
    names = [f"{prefix}/{row:03d}.png" for row in range(source.num_rows)]
    recipe = make_recipe(**{**fields, **changes})
    items = (Item(name, label=label) for name, label in zip(names, source.columns.labels, strict=True))
    listing = build_listing(items, recipe.source.order)
    num_shards = -(-source.num_rows // recipe.shard.samples)

    def arrays(plan: Plan, listing: Listing, shard_idx: int) -> ShardArrays:
        return shard_arrays(source, listing, plan.shard_rows(shard_idx), shard_idx, recipe)

    write_features(
        root,
        recipe,
        listing,
        arrays,
        num_shards if merged else num_shards - 1,
        merged,
        provenance or {"command": "test"},
    )
    return root


def shard_arrays(source: MemorySource, listing: Listing, rows: range, shard_idx: int, recipe: Recipe) -> ShardArrays:
    listed = listing.rows(rows)
    numbers = [int(item.key[-7:-4]) for item in listed]
    status, views = source.columns.status, range(len(source.views))
    image = np.stack([source.image(row) for row in numbers]) if recipe.images == "stored" else None
    features = {
        level.name: np.array([[source.features(level, row, view) for view in views] for row in numbers])
        for level in recipe.levels
    }
    index = [
        IndexRow(row=item.row, key=item.key, shard=shard_idx, status=status[row], label=item.label)
        for item, row in zip(listed, numbers, strict=True)
    ]
    return code_features(recipe, image, features, index)
