"""Is a dataset what was written?

One rule: verification only reads. Whatever it meets is a named problem, so that one look lists all that is wrong.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import pyarrow.compute as pc

from dtpipe.manifests.check.measured import MEASURED_FILE
from dtpipe.manifests.check.metadata import Metadata, check_metadata
from dtpipe.manifests.check.objects import check_chunks, check_digests, check_sizes
from dtpipe.manifests.check.problems import Problem
from dtpipe.manifests.check.recompute import Recompute, check_recompute, needs_images
from dtpipe.manifests.codecs.fitted import fitted_names
from dtpipe.manifests.errors import ConfigError, InputError, StoreError
from dtpipe.manifests.layout.tables import INDEX_FILE, LISTING_FILE, SHARDS_FILE
from dtpipe.manifests.store.store import LOCK_FOLDER, Store
from dtpipe.manifests.write.commit import COMMIT_FOLDER, MANIFEST_FILE, commit_name
from dtpipe.manifests.write.plan import PLAN_FILE

VerifyLevel = Literal["listing", "digest", "decode", "recompute"]
LEVELS: tuple[VerifyLevel, ...] = ("listing", "digest", "decode", "recompute")

_RECOMPUTE_ROWS = 16
_TOLERANCE = 1e-3


@dataclass(frozen=True)
class VerifyReport:
    """What verification looked at and what it found wrong."""

    url: str
    level: VerifyLevel
    complete: bool
    """True when the manifest says that every shard is there."""
    problems: tuple[Problem, ...]
    num_shards: int
    """Shards whose entries are sound."""
    num_shards_missing: int
    num_objects: int
    size_bytes: int
    num_chunks: int = 0
    num_recomputed: int = 0
    max_relative_error: Mapping[str, float] = field(default_factory=dict)
    """By level, of all samples: how far stored features are from recomputed ones, beyond what the codec states; root
    mean square, over that of the stored ones."""
    strays: tuple[str, ...] = ()
    """Objects that belong to nothing: of killed writers, put aside by a repair, or put there by somebody else. No
    problem."""

    @property
    def ok(self) -> bool:
        """True when nothing is wrong; an unfinished dataset can be ok as far as it goes."""
        return not self.problems


def verify(
    url: str | os.PathLike[str],
    level: VerifyLevel = "digest",
    recompute: Recompute | None = None,
    rows: int = _RECOMPUTE_ROWS,
    tolerance: float = _TOLERANCE,
) -> VerifyReport:
    """Check a dataset; each level includes those before it.

    listing: seals and digests of all metadata, and what these files say of each other; names and sizes of all objects.
    digest: blake3 of all objects. decode: every chunk decodes and is finite. recompute: the teacher gives the features
    of `rows` samples again, within `tolerance` beside what their codec states.
    Raises: InputError when there is no dataset; ConfigError for `recompute` without a function or without images.
    """
    store = Store(url)
    if level not in LEVELS:
        raise ConfigError(f"verify level {level!r} is unknown; choose one of {', '.join(LEVELS)}")
    if level == "recompute" and recompute is None:
        raise ConfigError("verify level recompute needs the teacher; name it with --teacher")
    problems: list[Problem] = []
    metadata = check_stored(store, level, problems)
    depth = LEVELS.index(level)
    num_chunks = num_recomputed = 0
    errors: dict[str, float] = {}
    if depth >= 2 and metadata.plan is not None:
        num_chunks = check_chunks(store, metadata.plan, metadata.shards, metadata.index, problems)
    if recompute and depth >= 3:
        sizes = metadata.batch_sizes
        num_recomputed, errors = check_recompute(store, recompute, sizes, rows, tolerance, problems)
    return _report(store, level, metadata, problems, num_chunks, num_recomputed, errors)


def check_stored(store: Store, level: VerifyLevel, problems: list[Problem]) -> Metadata:
    """The levels listing and digest, as far as `level` goes.

    Raises: InputError when there is no dataset; ConfigError for `recompute` without stored images.
    """
    if not (_is_there(store, MANIFEST_FILE) or _is_there(store, PLAN_FILE)):
        raise InputError(f"{store.url} holds no feature dataset (no {MANIFEST_FILE}, no {PLAN_FILE}); check the path")
    metadata = check_metadata(store, problems)
    if level == "recompute" and metadata.plan and needs_images(metadata.plan.recipe):
        raise ConfigError(
            f"{store.url} stores no images, so its features cannot be recomputed from it; verify with --level decode"
        )
    check_sizes(store, metadata.shards, problems)
    if level != "listing":
        check_digests(store, metadata.shards, problems)
    return metadata


def _is_there(store: Store, name: str) -> bool:
    try:
        return store.exists(name)
    except StoreError:
        return True  # reading it says what is the matter


def _report(
    store: Store,
    level: VerifyLevel,
    metadata: Metadata,
    problems: list[Problem],
    num_chunks: int,
    num_recomputed: int,
    errors: dict[str, float],
) -> VerifyReport:
    sound = metadata.sound_shards
    fitted = fitted_names(*metadata.plan.recipe.levels) if metadata.plan else ()
    known = {
        *fitted,
        *metadata.shards["name"].to_pylist(),
        *map(commit_name, sound),
        *(problem.name for problem in problems),
    }
    return VerifyReport(
        url=store.url,
        level=level,
        complete=metadata.manifest is not None and metadata.manifest.complete,
        problems=tuple(dict.fromkeys(problems)),
        num_shards=len(sound),
        num_shards_missing=(metadata.plan.num_shards if metadata.plan else 0) - len(sound),
        num_objects=metadata.shards.num_rows,
        size_bytes=pc.sum(metadata.shards["size_bytes"]).as_py() or 0,
        num_chunks=num_chunks,
        num_recomputed=num_recomputed,
        max_relative_error=errors,
        strays=tuple(name for name in store.list() if name not in known and not _is_ours(name)),
    )


def _is_ours(name: str) -> bool:
    """True for metadata with a known name; entries that count are known by their shards."""
    if name.startswith(COMMIT_FOLDER):
        return False
    return (
        name
        in (
            MANIFEST_FILE,
            PLAN_FILE,
            LISTING_FILE,
            SHARDS_FILE,
            INDEX_FILE,
            MEASURED_FILE,
        )
        or name.startswith(LOCK_FOLDER)
        or name.endswith("zarr.json")
    )
