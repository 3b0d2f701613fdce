"""Sending back to work what is damaged, and writing again what follows from the rest.

One rule: nothing is deleted or replaced. An entry of a damaged shard, and a file that another takes the place of, get
the name `.rejected` beside the old one; the next `extract` writes just those shards again and merges.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field

from dtpipe.manifests.canonical import dump_record
from dtpipe.manifests.check.metadata import Metadata
from dtpipe.manifests.check.objects import check_chunks
from dtpipe.manifests.check.problems import Mend, Problem
from dtpipe.manifests.check.verify import VerifyLevel, check_stored
from dtpipe.manifests.codecs.fitted import StoredFitted
from dtpipe.manifests.errors import ConfigError, DamagedDataError, ManifestError
from dtpipe.manifests.layout.tables import LISTING_FILE
from dtpipe.manifests.layout.zarr import zarr_document, zarr_metadata_names
from dtpipe.manifests.schema import Plan
from dtpipe.manifests.store.faults import fault_point
from dtpipe.manifests.store.store import LOCK_FOLDER, Store
from dtpipe.manifests.write.commit import MANIFEST_FILE, commit_name, put_aside
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import PLAN_FILE


@dataclass(frozen=True)
class RepairResult:
    """What repair did; then run `dtpipe extract` again."""

    url: str
    shards: tuple[int, ...]
    """Sent back to work."""
    rewritten: tuple[str, ...]
    """Files written again, from the plan or the manifest."""
    left: tuple[Problem, ...]
    """Mended by the next extract (merge, source, fit) or by nobody."""
    kept: dict[str, str] = field(default_factory=dict)
    """What was put aside, by its old name: the new one."""


def repair(url: str | os.PathLike[str], level: VerifyLevel = "digest", stale_s: float = 120.0) -> RepairResult:
    """Send damaged shards back to work and mark the manifest incomplete; rewrite metadata that can be derived.

    Raises: LockHeldError while somebody writes; InputError when there is no dataset; ConfigError for level `recompute`;
    ManifestError, with nothing changed, when the files do not agree of which plan the dataset is.
    """
    if level == "recompute":
        raise ConfigError("repair works on stored bytes: choose listing, digest or decode")
    store = Store(url)
    problems: list[Problem] = []
    # before the lock: a wrong URL is left as it is, and taking a lock removes damaged ones
    _refuse_disagreement(store, check_stored(store, "listing", problems))
    with Lock.acquire(store, stale_s) as lock:
        problems = [problem for problem in problems if problem.name.startswith(LOCK_FOLDER)]
        metadata = check_stored(store, level, problems)
        _refuse_disagreement(store, metadata)
        if level == "decode" and metadata.plan is not None:
            check_chunks(store, metadata.plan, metadata.shards, metadata.index, problems)
        return _Repair(store, lock, metadata, problems).run()


def _refuse_disagreement(store: Store, metadata: Metadata) -> None:
    if metadata.disagreement:
        raise ManifestError(
            f"{store.url}: {metadata.disagreement}; nothing was changed: put the right {PLAN_FILE} or {MANIFEST_FILE} "
            "back from a copy, or move the files of the other dataset out of the folder"
        )


class _Repair:
    """One repair, under its lock."""

    def __init__(self, store: Store, lock: Lock, metadata: Metadata, problems: Sequence[Problem]) -> None:
        self.store, self.lock, self.metadata, self.problems = store, lock, metadata, problems
        self.kept: dict[str, str] = {}

    def run(self) -> RepairResult:
        """The plan first, since all else follows from it."""
        rewritten = self._rewrite()
        shards = self._send_back()
        self._put_aside(LISTING_FILE, "source")
        for name in {problem.name for problem in self.problems if problem.mend == "fit"}:
            self._put_aside(name, "fit")
        if self.problems:
            self._mark_incomplete()
            fault_point("repair.manifest")
        fault_point("repair.after")
        left = tuple(problem for problem in self.problems if problem.mend in ("merge", "source", "fit", "nobody"))
        return RepairResult(self.store.url, shards, rewritten, left, self.kept)

    def _send_back(self) -> tuple[int, ...]:
        shards = sorted(
            {problem.shard for problem in self.problems if problem.mend == "extract" and problem.shard is not None}
        )
        for shard_idx in shards:
            self.lock.check()
            self._keep(commit_name(shard_idx))
            fault_point("repair.rejected")
        return tuple(shards)

    def _rewrite(self) -> tuple[str, ...]:
        """Write again what follows from the manifest or the plan; a damaged lock went when this one was taken."""
        names = sorted({problem.name for problem in self.problems if problem.mend == "rewrite"})
        plan, data = self.metadata.plan, self.metadata.plan_bytes
        of_zarr = set() if plan is None else set(zarr_metadata_names(plan))
        for name in names:
            document = data if name == PLAN_FILE else None
            if plan is not None and name in of_zarr:
                document = self._zarr_document(plan, name)
            if document is not None:
                self.lock.check()
                self._keep(name)
                self.store.write(name, document)
        return tuple(names)

    def _zarr_document(self, plan: Plan, name: str) -> bytes | None:
        """None where it holds tables that are lost: the next extract fits again, and writes it."""
        try:
            return zarr_document(plan, name, StoredFitted(self.store))
        except DamagedDataError:
            return None

    def _mark_incomplete(self) -> None:
        """Only the next merge makes the dataset complete again; a manifest that is not of this plan is put aside."""
        manifest = self.metadata.manifest
        if manifest is None:
            self._put_aside(MANIFEST_FILE, "merge")
        elif any(problem.mend in ("extract", "merge", "source", "fit") for problem in self.problems):
            self.lock.check()
            self.store.write(MANIFEST_FILE, dump_record(manifest.model_copy(update={"complete": False})))

    def _put_aside(self, name: str, mend: Mend) -> None:
        if any((problem.name, problem.mend) == (name, mend) for problem in self.problems):
            self.lock.check()
            self._keep(name)

    def _keep(self, name: str) -> None:
        if self.store.exists(name):
            self.kept[name] = put_aside(self.store, name)
