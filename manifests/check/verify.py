"""Is a dataset what was written, and sending back to work what is not.

One rule: nothing is deleted. Entries of damaged shards are renamed to `.rejected`; the next `extract` writes just those
shards again and merges.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from dtpipe.manifests.canonical import dump_record
from dtpipe.manifests.check.checks import (
    Metadata,
    Problem,
    check_chunks,
    check_digests,
    check_metadata,
    check_sizes,
    reason,
)
from dtpipe.manifests.check.measured import MEASURED_FILE
from dtpipe.manifests.codecs.base import LevelCodec, decode_level, encode_level
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.errors import ConfigError, DtpipeError, InputError
from dtpipe.manifests.layout.tables import INDEX_FILE, LISTING_FILE, SHARDS_FILE
from dtpipe.manifests.layout.zarr import write_zarr_metadata
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_images, read_level
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.store import LOCK_FOLDER, Store
from dtpipe.manifests.write.commit import COMMIT_FOLDER, MANIFEST_FILE, REJECTED, commit_name, reject_entry
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import PLAN_FILE

VerifyLevel = Literal["listing", "digest", "decode", "recompute"]
LEVELS: tuple[VerifyLevel, ...] = ("listing", "digest", "decode", "recompute")

Recompute = Callable[[NDArray[np.uint8], Sequence[str]], Mapping[str, NDArray[np.generic]]]
"""The teacher run again: stored images [B, H, W, 3] and their keys -> {level: [B, V, C, h, w] float}."""

_RECOMPUTE_ROWS = 16
_TOLERANCE = 1e-3
_TINY = 1e-30  # keeps an all-zero level from dividing by zero


@dataclass(frozen=True)
class VerifyReport:
    """What verification looked at and what it found wrong."""

    url: str
    level: VerifyLevel
    complete: bool
    """True when the manifest says that every shard is there."""
    problems: tuple[Problem, ...]
    num_shards: int
    """Shards whose entries could be read."""
    num_shards_missing: int
    num_objects: int
    size_bytes: int
    num_chunks: int = 0
    num_recomputed: int = 0
    max_relative_error: Mapping[str, float] = field(default_factory=dict)
    """By level: largest difference of stored and recomputed features, over the largest stored value of the sample's
    level."""
    strays: tuple[str, ...] = ()
    """Objects that belong to nothing: of killed writers, rejected entries, or put there by somebody else. No
    problem."""

    @property
    def ok(self) -> bool:
        """True when nothing is wrong; an unfinished dataset can be ok as far as it goes."""
        return not self.problems


@dataclass(frozen=True)
class RepairResult:
    """What repair did; then run `dtpipe extract` again."""

    url: str
    shards: tuple[int, ...]
    """Sent back to work."""
    rewritten: tuple[str, ...]
    """Files written again, from the plan or the manifest."""
    left: tuple[Problem, ...]
    """Mended by the next extract (merge, source) or by nobody."""


def verify(
    url: str | os.PathLike[str],
    level: VerifyLevel = "digest",
    recompute: Recompute | None = None,
    rows: int = _RECOMPUTE_ROWS,
    tolerance: float = _TOLERANCE,
) -> VerifyReport:
    """Check a dataset; each level includes those before it.

    listing: seals and digests of all metadata, names and sizes of all objects. digest: blake3 of all objects. decode:
    every chunk decodes and is finite. recompute: the teacher gives the features of `rows` samples again, within
    `tolerance`.
    Raises: InputError when there is no dataset; ConfigError for `recompute` without a function or without images.
    """
    store = Store(url)
    if level not in LEVELS:
        raise ConfigError(f"verify level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    if not (store.exists(MANIFEST_FILE) or store.exists(PLAN_FILE)):
        raise InputError(f"{store.url} holds no feature dataset (no {MANIFEST_FILE}, no {PLAN_FILE}); check the path")
    if level == "recompute" and recompute is None:
        raise ConfigError("verify level recompute needs the teacher; name it with --teacher")
    problems: list[Problem] = []
    metadata = check_metadata(store, problems)
    if level == "recompute" and metadata.plan and metadata.plan.recipe.images != "stored":
        raise ConfigError(
            f"{store.url} stores no images, so its features cannot be recomputed from it; verify with --level decode"
        )
    check_sizes(store, metadata.entries, problems)
    depth = LEVELS.index(level)
    if depth >= 1:
        check_digests(store, metadata.entries, problems)
    num_chunks = check_chunks(store, metadata.plan, metadata.entries, problems) if depth >= 2 and metadata.plan else 0
    num_recomputed, errors = 0, dict[str, float]()
    if recompute and depth >= 3:
        num_recomputed, errors = _check_recompute(store, recompute, rows, tolerance, problems)
    return _report(store, level, metadata, problems, num_chunks, num_recomputed, errors)


def repair(url: str | os.PathLike[str], level: VerifyLevel = "digest", stale_s: float = 120.0) -> RepairResult:
    """Send damaged shards back to work and mark the manifest incomplete; rewrite metadata that can be derived.

    Raises: LockHeldError while somebody writes; InputError when there is no dataset; ConfigError for level `recompute`.
    """
    if level == "recompute":
        raise ConfigError("repair works on stored bytes: choose listing, digest or decode")
    store = Store(url)
    # before the lock: a wrong URL is left as it is, and taking a lock removes damaged ones
    problems = verify(url, "listing").problems
    with Lock.acquire(store, stale_s) as lock:
        problems = (
            *(problem for problem in problems if problem.name.startswith(LOCK_FOLDER)),
            *verify(url, level).problems,
        )
        metadata = check_metadata(store, [])
        shards = sorted(
            {problem.shard for problem in problems if problem.mend == "extract" and problem.shard is not None}
        )
        for shard_idx in shards:
            lock.check()
            if store.exists(commit_name(shard_idx)):
                reject_entry(store, shard_idx)
            fault_point("repair.rejected")
        rewritten = _rewrite(store, lock, metadata, problems)
        if problems:
            _mark_incomplete(store, lock, metadata, problems)
            fault_point("repair.manifest")
        fault_point("repair.after")
    left = tuple(problem for problem in problems if problem.mend in ("merge", "source", "nobody"))
    return RepairResult(store.url, tuple(shards), tuple(rewritten), left)


def _rewrite(store: Store, lock: Lock, metadata: Metadata, problems: Sequence[Problem]) -> list[str]:
    """Write again what follows from the manifest or the plan; a damaged lock went when this one was taken."""
    names = sorted({problem.name for problem in problems if problem.mend == "rewrite"})
    if not names:
        return []
    lock.check()
    if PLAN_FILE in names and metadata.plan_bytes is not None:
        store.write(PLAN_FILE, metadata.plan_bytes)
    if metadata.plan is not None and metadata.plan.recipe.shard.format == "zarr":
        write_zarr_metadata(store, metadata.plan)
    return names


def _mark_incomplete(store: Store, lock: Lock, metadata: Metadata, problems: Sequence[Problem]) -> None:
    """Only the next merge makes the dataset complete again; a damaged manifest is put aside for it."""
    lock.check()
    if metadata.manifest is not None:
        if any(problem.mend != "rewrite" for problem in problems):
            store.write(MANIFEST_FILE, dump_record(metadata.manifest.model_copy(update={"complete": False})))
    elif store.exists(MANIFEST_FILE):
        names = (f"{MANIFEST_FILE}{REJECTED}.{number}" for number in itertools.count())
        store.rename(MANIFEST_FILE, next(name for name in names if not store.exists(name)))


def _check_recompute(
    store: Store, recompute: Recompute, rows: int, tolerance: float, problems: list[Problem]
) -> tuple[int, dict[str, float]]:
    """Rows compared, and the largest relative error by level."""
    try:
        dataset = FeatureDataset.open(store.url, allow_incomplete=True)
    except DtpipeError as err:
        problems.append(Problem(MANIFEST_FILE, f"nothing was recomputed: {reason(err)}", "nobody"))
        return 0, {}
    damaged = {problem.shard for problem in problems}
    samples = dataset.recipe.shard.samples
    good = [int(row) for row in dataset.columns.ok_rows if int(row) // samples not in damaged]
    chosen = (
        [good[idx] for idx in np.unique(np.linspace(0, len(good) - 1, min(rows, len(good))).astype(int))]
        if good
        else []
    )
    if not chosen:
        return 0, {}
    again = recompute(read_images(dataset, chosen), [dataset.columns.keys[row] for row in chosen])
    errors = {
        name: _compare(dataset, codec, chosen, again[name], tolerance, problems)
        for name, codec in level_codecs(dataset.recipe).items()
    }
    return len(chosen), errors


def _compare(
    dataset: FeatureDataset,
    codec: LevelCodec,
    rows: Sequence[int],
    again: NDArray[np.generic],
    tolerance: float,
    problems: list[Problem],
) -> float:
    name, worst = codec.level.name, 0.0
    for idx, row in enumerate(rows):
        key = dataset.columns.keys[row]
        stored = np.stack([read_level(dataset, name, row, view) for view in range(len(dataset.views))])
        error = relative_error(codec, stored, again[idx], key)
        worst = max(worst, error)
        if not error <= tolerance:
            what = f"sample {key!r} (row {row}) differs by {error:.3g} from the teacher's features"
            what += f", allowed is {tolerance:g}"
            problems.append(Problem(f"level {name}", what, "nobody", row // dataset.recipe.shard.samples))
    return worst


def relative_error(
    codec: LevelCodec, stored: NDArray[np.generic], again: NDArray[np.generic], sample: str = ""
) -> float:
    """Largest difference over the largest stored value; 0 when the teacher gives the same symbols.

    Shapes: both [V, C, H, W]; `stored` as decoded, `again` as the teacher gave it.
    """
    one = stored.astype(np.float64)
    other = decode_level(codec, encode_level(codec, again, sample)).astype(np.float64)
    return float(np.abs(one - other).max()) / max(float(np.abs(one).max()), _TINY)


def _report(
    store: Store,
    level: VerifyLevel,
    metadata: Metadata,
    problems: list[Problem],
    num_chunks: int,
    num_recomputed: int,
    errors: dict[str, float],
) -> VerifyReport:
    objects = [stored for entry in metadata.entries.values() for stored in entry.objects]
    known = {stored.name for stored in objects} | {problem.name for problem in problems}
    return VerifyReport(
        url=store.url,
        level=level,
        complete=metadata.manifest is not None and metadata.manifest.complete,
        problems=tuple(problems),
        num_shards=len(metadata.entries),
        num_shards_missing=(metadata.plan.num_shards if metadata.plan else 0) - len(metadata.entries),
        num_objects=len(objects),
        size_bytes=sum(stored.size_bytes for stored in objects),
        num_chunks=num_chunks,
        num_recomputed=num_recomputed,
        max_relative_error=errors,
        strays=tuple(name for name in store.list() if name not in known and not _is_ours(name, metadata)),
    )


def _is_ours(name: str, metadata: Metadata) -> bool:
    """True for metadata with a known name, and for objects of shards whose entry could not be read."""
    if name in (MANIFEST_FILE, PLAN_FILE, LISTING_FILE, SHARDS_FILE, INDEX_FILE, MEASURED_FILE) or name.startswith(
        LOCK_FOLDER
    ):
        return True
    if name.endswith("zarr.json"):
        return True
    return (
        name in {commit_name(shard_idx) for shard_idx in metadata.entries} if name.startswith(COMMIT_FOLDER) else False
    )
