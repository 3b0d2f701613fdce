"""A feature source held in memory, the settings of a tiny run, a checkpoint, and a dataset written from the source."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine.checkpoint import save_checkpoint
from dtpipe.distill.student.student import StudentSpec, build_student, spec_to_dict
from dtpipe.manifests.schema import IndexRow, LevelSpec, Plan, Recipe, ShardRecipe, TransformRecipe, ViewSpec
from dtpipe.manifests.write.listing import Listing, build_listing
from dtpipe.manifests.write.shard import ShardArrays
from parts.datasets import Item, make_recipe, write_features

PX = 32


def level_spec(name: str, stride: int, channels: int, px: tuple[int, int] = (PX, PX), **changes: object) -> LevelSpec:
    """A level of an image of `px` by its stride; `changes` replace fields."""
    sizes = {"height": px[0] // stride, "width": px[1] // stride}
    return LevelSpec(name=name, stride=stride, channels=channels, **sizes, **{"tap": f"up.{name}", **changes})


@dataclass
class MemorySource:
    """The common read interface over arrays; row i's features are a pure function of (i, view)."""

    num_rows: int = 21
    bad: tuple[int, ...] = (3, 11)
    views: tuple[ViewSpec, ...] = (ViewSpec(draw=0, timestep=50),)
    levels: tuple[LevelSpec, ...] = (level_spec("l2", 4, 6), level_spec("l3", 8, 8), level_spec("l4", 16, 10))
    px: tuple[int, int] = (PX, PX)
    read: list[tuple[list[int], list[str], list[int]]] = field(default_factory=list)

    @property
    def keys(self) -> list[str]:
        return [f"images/{row:03d}.png" for row in range(self.num_rows)]

    @property
    def labels(self) -> list[str | None]:
        return ["even" if row % 2 == 0 else None for row in range(self.num_rows)]

    @property
    def ok_rows(self) -> np.ndarray:
        return np.array([row for row in range(self.num_rows) if row not in self.bad])

    def read_image(self, row: int) -> np.ndarray:
        return np.random.default_rng([row, 0]).integers(0, 256, (*self.px, 3), dtype=np.uint8)

    def read_level(self, name: str, row: int, view: int = 0) -> np.ndarray:
        spec = next(level for level in self.levels if level.name == name)
        noise = np.random.default_rng([row, view, spec.stride]).standard_normal(
            (spec.channels, spec.height, spec.width)
        )
        return (noise * 3 + self.read_image(row).mean() / 100).astype(spec.dtype)

    def read_batch(
        self, rows: Sequence[int], levels: Sequence[str], view_of_row: Sequence[int], images: bool = True
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        assert not set(rows) & set(self.bad), "a bad row was read"
        self.read.append((list(map(int, rows)), list(levels), list(map(int, view_of_row))))
        pixels = (
            np.stack([self.read_image(row) for row in rows]) if images else np.zeros((len(rows), 0, 0, 3), np.uint8)
        )
        return pixels, {
            name: np.stack([self.read_level(name, row, view) for row, view in zip(rows, view_of_row, strict=True)])
            for name in levels
        }


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
    return DistillConfig(**{**base, **changes})


def write_student(path: Path, name: str, px: tuple[int, int] = (64, 64), ema: bool = False) -> Path:
    """A checkpoint as a run leaves it, of a student with random weights and moved batch norms."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        student = build_student(StudentSpec(name, 4, px)).train()
        student(torch.rand(2, 3, *px))
        state = student.state_dict()
        average = (
            {key: value * 0.5 if value.is_floating_point() else value for key, value in state.items()} if ema else None
        )
        save_checkpoint(path, {"student_spec": spec_to_dict(student.spec), "student": state, "ema": average})
    return path


def write_dataset(
    root: Path, source: MemorySource, prefix: str = "images", merged: bool = True, **changes: object
) -> Path:
    """The content of a memory source as a feature dataset of 8-row shards; `changes` replace fields of the recipe.

    Its rows are permuted; the sample with key `<prefix>/007.png` holds what row 7 of the source holds. Unmerged, it lacks
    its last shard.
    """
    fields: dict[str, object] = {
        "transform": TransformRecipe(height=source.px[0], width=source.px[1]),
        "student_px": source.px,
        "views": source.views,
        "levels": source.levels,
        "shard": ShardRecipe(samples=8),
    }
    names = [f"{prefix}/{row:03d}.png" for row in range(source.num_rows)]
    listing = build_listing(Item(name, label=label) for name, label in zip(names, source.labels, strict=True))
    recipe = make_recipe(**{**fields, **changes})
    num_shards = -(-source.num_rows // recipe.shard.samples)

    def arrays(plan: Plan, listing: Listing, shard_idx: int) -> ShardArrays:
        return shard_arrays(source, listing, plan.shard_rows(shard_idx), shard_idx, recipe)

    write_features(root, recipe, listing, arrays, num_shards if merged else num_shards - 1, merged, {"command": "test"})
    return root


def shard_arrays(source: MemorySource, listing: Listing, rows: range, shard_idx: int, recipe: Recipe) -> ShardArrays:
    listed = listing.rows(rows)
    numbers = [int(each.key[-7:-4]) for each in listed]
    image = np.stack([source.read_image(row) * (row not in source.bad) for row in numbers])
    levels = {}
    for level in recipe.levels:
        views = [
            [source.read_level(level.name, row, view) * (row not in source.bad) for view in range(len(source.views))]
            for row in numbers
        ]
        levels[level.name] = np.array(views)
    status = ["bad: broken" if row in source.bad else "ok" for row in numbers]
    index = [
        IndexRow(row=e.row, key=e.key, shard=shard_idx, status=s, label=e.label)
        for e, s in zip(listed, status, strict=True)
    ]
    return ShardArrays(image if recipe.images == "stored" else None, levels, index)
