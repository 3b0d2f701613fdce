"""What every node must show before it gets work: equal versions, a sound store, room to write, and the plan's weights.

A node that fails is named with its reason and left out; a run fails when no node is left.
"""

from __future__ import annotations

import os
import platform
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, version

from dtpipe.extract.shards.queue import SHARDS_IN_HAND
from dtpipe.manifests.errors import ConfigError, StoreError
from dtpipe.manifests.schema import Plan, Recipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.plan import bytes_per_sample

PACKAGES = (
    "dtpipe",
    "torch",
    "numpy",
    "pillow",
    "diffusers",
    "numcodecs",
)  # the ones that the bytes of a dataset may depend on


@dataclass(frozen=True)
class NodeReport:
    """What one worker found on its node."""

    host: str
    pid: int
    device: str
    free_bytes: int | None  # None where the store is not a local disk


@lru_cache(maxsize=1)
def _package_versions() -> tuple[tuple[str, str], ...]:
    versions = [("python", platform.python_version())]
    for name in PACKAGES:
        try:
            versions.append((name, version(name)))
        except PackageNotFoundError:
            versions.append((name, "not installed"))
    return tuple(versions)


def package_versions() -> dict[str, str]:
    """Versions of Python and of the packages that content may depend on."""
    return dict(_package_versions())


def check_versions(driver: Mapping[str, str]) -> None:
    """Raises: ConfigError when this node's versions are not the driver's: their shards might differ."""
    here = package_versions()
    different = [
        f"{name} {here.get(name)} (driver: {expected})"
        for name, expected in driver.items()
        if here.get(name) != expected
    ]
    if different:
        raise ConfigError(f"node {platform.node()} has {', '.join(different)}; install the same versions on every node")


def free_bytes(store: Store) -> int | None:
    """Free space where the dataset lies, or None for an object store."""
    if store.local is None:
        return None
    folder = store.local
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def recipe_bytes_per_sample(recipe: Recipe) -> int:
    """Bytes of one sample before compression: levels of all views, and the image if it is stored."""
    image_px = (recipe.transform.height, recipe.transform.width) if recipe.images == "stored" else None
    return bytes_per_sample(recipe.levels, len(recipe.views), image_px)


def check_space(store: Store, plan: Plan) -> int | None:
    """Free bytes of a local store.

    Raises: StoreError when not even the shards in hand would fit.
    """
    free = free_bytes(store)
    if free is None:
        return None
    recipe, samples = plan.recipe, min(plan.recipe.shard.samples, plan.num_rows)
    needed = SHARDS_IN_HAND * samples * recipe_bytes_per_sample(recipe)
    if free < needed:
        raise StoreError(
            f"{store.url} on {platform.node()}: {free / 1e9:.2f} GB free, {SHARDS_IN_HAND} shards need "
            f"{needed / 1e9:.2f} GB; free some space or choose another place, and run again"
        )
    return free


def space_warning(store: Store, plan: Plan, num_shards: int) -> str | None:
    """What to say where the shards to come may not fit a local disk."""
    free, needed = free_bytes(store), num_shards * plan.recipe.shard.samples * recipe_bytes_per_sample(plan.recipe)
    if free is None or free >= needed:
        return None
    to_come = f"the shards to come need up to {needed / 1e9:.1f} GB before compression"
    return f"{store.url} has {free / 1e9:.1f} GB free; {to_come}"


def check_node(store: Store, plan: Plan, driver_versions: Mapping[str, str], device: str) -> NodeReport:
    """All checks that need no teacher; the worker compares the weights' digest when it loads them.

    Raises: ConfigError, StoreError.
    """
    check_versions(driver_versions)
    free = check_space(store, plan)
    store.probe()
    return NodeReport(host=platform.node(), pid=os.getpid(), device=_device_name(device), free_bytes=free)


def _device_name(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return str(torch.cuda.get_device_name(device))
