"""The teacher run again on some samples: are its features what is stored?

One rule: a codec says itself how far stored features may be from those it was given; only what goes beyond that is an
error, and is held against the tolerance.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.check.problems import Problem, reason
from dtpipe.manifests.codecs.base import Array
from dtpipe.manifests.errors import DamagedDataError, DtpipeError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_images
from dtpipe.manifests.schema import Recipe
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import MANIFEST_FILE

Recompute = Callable[[NDArray[np.uint8], Sequence[str], int], Mapping[str, NDArray[np.generic]]]
"""The teacher run again: stored images [B, H, W, 3], their keys, and how many go through it together -> {level:
[B, V, C, h, w] float}; images are [0, H, W, 3] for soft labels of a feature dataset, which need none.
"""

_TINY = 1e-30  # keeps an all-zero level from dividing by zero


def needs_images(recipe: Recipe) -> bool:
    """True where images would have to be stored to compute the levels again, and are not."""
    labels = soft_labels_of(recipe)
    return recipe.images != "stored" and (labels is None or "dataset" not in labels.features)


def check_recompute(
    store: Store,
    recompute: Recompute,
    batch_sizes: Mapping[int, int],
    rows: int,
    tolerance: float,
    problems: list[Problem],
) -> tuple[int, dict[str, float]]:
    """Rows compared, and the largest relative error by level. Each row goes through the teacher in batches of the size
    that made its shard: `batch_sizes`, where it is not the recipe's.
    """
    try:
        dataset = FeatureDataset.open(store.url, allow_incomplete=True)
    except DtpipeError as err:
        problems.append(Problem(MANIFEST_FILE, f"nothing was recomputed: {reason(err)}", "nobody"))
        return 0, {}
    damaged = [problem.shard for problem in problems if problem.shard is not None]
    ok_rows = dataset.columns.ok_rows
    good = ok_rows[~np.isin(ok_rows // dataset.recipe.shard.samples, damaged)]
    if not len(good):
        return 0, {}
    chosen = good[np.unique(np.linspace(0, len(good) - 1, min(rows, len(good))).astype(int))].tolist()
    errors: dict[str, float] = {}
    for batch_size, together in _by_batch_size(dataset, chosen, batch_sizes).items():
        try:
            again = _again(dataset, recompute, together, batch_size)
        except DamagedDataError as err:  # what the levels were made of
            problems.append(Problem(MANIFEST_FILE, f"nothing was recomputed: {reason(err)}", "nobody"))
            return 0, {}
        for name in (level.name for level in dataset.levels):
            worst = _compare(dataset, name, together, again[name], tolerance, problems)
            errors[name] = max(errors.get(name, 0.0), worst)
    return len(chosen), errors


def _by_batch_size(
    dataset: FeatureDataset, rows: Sequence[int], batch_sizes: Mapping[int, int]
) -> dict[int, list[int]]:
    """Rows by the size of the batches that made them."""
    recipe, groups = dataset.recipe, dict[int, list[int]]()
    for row in rows:
        batch_size = batch_sizes.get(row // recipe.shard.samples, recipe.compute.batch_size)
        groups.setdefault(batch_size, []).append(row)
    return groups


def _again(
    dataset: FeatureDataset, recompute: Recompute, rows: Sequence[int], batch_size: int
) -> Mapping[str, NDArray[np.generic]]:
    stored = dataset.recipe.images == "stored"
    images = read_images(dataset, rows) if stored else np.empty((0, *dataset.image_px, 3), np.uint8)
    return recompute(images, [dataset.columns.keys[row] for row in rows], batch_size)


def _compare(
    dataset: FeatureDataset,
    name: str,
    rows: Sequence[int],
    again: NDArray[np.generic],
    tolerance: float,
    problems: list[Problem],
) -> float:
    worst, num_views = 0.0, len(dataset.views)
    for idx, row in enumerate(rows):
        _, coded = dataset.read([row] * num_views, (name,), range(num_views), images=False)
        error = relative_error(coded.decode()[name], coded.error()[name], again[idx])
        worst = max(worst, error)
        if not error <= tolerance:
            what = (
                f"sample {dataset.columns.keys[row]!r} (row {row}) differs by {error:.3g} from the teacher's features"
            )
            what += f", allowed is {tolerance:g}"
            problems.append(Problem(f"level {name}", what, "nobody", row // dataset.recipe.shard.samples))
    return worst


def relative_error(stored: Array, stated: NDArray[np.float64], again: Array) -> float:
    """How far a sample's stored features are from the teacher's, beyond the error that their codec states.

    Root mean squares over C, H and W, over that of the stored features; the largest of all views. 0 when the teacher
    gives what was stored, however coarse the codec.
    Shapes: `stored` as decoded and `again` as the teacher gave it [V, C, H, W], `stated` by the codec [V].
    """
    features = stored.astype(np.float64)
    beyond = _rms(features - again.astype(np.float64)) - stated
    return float(np.maximum(beyond, 0).max() / max(float(_rms(features).max()), _TINY))


def _rms(features: NDArray[np.float64]) -> NDArray[np.float64]:
    """Shapes: [V, C, H, W] -> [V]."""
    return np.asarray(np.sqrt(np.square(features).mean(axis=(-3, -2, -1))))
