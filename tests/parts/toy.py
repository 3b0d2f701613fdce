"""A whole writer of a toy dataset: lock, plan, shards of fixed bytes, commits, merge. Run as a script it can be killed.

    cd tests && python -m parts.toy URL [FAULT_SPEC [STALE_S]]

It prints one line per step to stdout.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from blake3 import blake3

from dtpipe.manifests.errors import DtpipeError
from dtpipe.manifests.schema import IndexRow, Manifest, Members, ObjectEntry, Plan, Recipe, ShardEntry
from dtpipe.manifests.store.faults import arm_spec, fault_point
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import commit_entry, merge, pending_shards
from dtpipe.manifests.write.listing import Listing, build_listing
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import plan_digest, start_plan
from parts.datasets import Item, make_recipe


def make_listing(num_rows: int = 14) -> Listing:
    """Permuted keys with a label for every second one."""
    return build_listing(Item(f"a/{idx:03d}.jpg", f"src/{idx}", "cat" if idx % 2 else None) for idx in range(num_rows))


def object_bytes(plan: Plan, shard_idx: int, part: int) -> bytes:
    """What a shard's object holds: a function of the plan alone."""
    return blake3(f"{plan.listing_blake3}/{shard_idx}/{part}".encode()).digest(length=5000 + shard_idx)


def write_shard(
    store: Store, plan: Plan, listing: Listing, shard_idx: int, epoch: int, salt: bytes = b""
) -> ShardEntry:
    """Write both objects of a shard and return its entry; `salt` makes other bytes of the same size."""
    objects = []
    for part in range(2):
        name = f"data/{shard_idx:05d}-{part}.bin"
        data = salt + object_bytes(plan, shard_idx, part)[len(salt) :]
        written = store.write(name, data)
        fault_point("shard.object")
        members = Members(offset=(0, 10), size=(10, 20), crc32c=(1, 2**32 - 1))
        objects.append(
            ObjectEntry(
                name=name,
                size_bytes=len(data),
                blake3=blake3(data).hexdigest(),
                identity=written.identity,
                arrays={"l2": members},
            )
        )
    fault_point("shard.objects")
    rows = [
        IndexRow(
            row=each.row,
            key=each.key,
            shard=shard_idx,
            label=each.label,
            status="bad: truncated" if each.row == 5 else "ok",
        )
        for each in listing.rows(plan.shard_rows(shard_idx))
    ]
    provenance = {"time": time.time()}
    return ShardEntry(
        shard=shard_idx,
        plan_blake3=plan_digest(store),
        epoch=epoch,
        objects=tuple(objects),
        rows=tuple(rows),
        provenance=provenance,
    )


def extract(url: str | Path, recipe: Recipe | None = None, stale_s: float = 5.0) -> tuple[Manifest, list[int]]:
    """Write what is missing and merge. Returns the manifest and the shards written now."""
    store = Store(url)
    with Lock.acquire(store, stale_s=stale_s) as lock:
        plan, listing = start_plan(
            store, recipe or make_recipe(), make_listing, {"time": time.time()}, selection={"limit": None}
        )
        todo = pending_shards(store, plan)
        for shard_idx in todo:
            lock.check()
            commit_entry(store, write_shard(store, plan, listing, shard_idx, lock.epoch), lock.epoch)
            print(f"committed {shard_idx}", flush=True)
        return merge(store, plan, lock, {"time": time.time()}), todo


def content_of(root: Path) -> dict[str, bytes]:
    """Bytes of all that holds no times: objects and merged tables."""
    files = [path for path in sorted(root.rglob("*")) if path.suffix in (".bin", ".parquet")]
    return {path.relative_to(root).as_posix(): path.read_bytes() for path in files}


def main() -> int:
    """Run as the command line would: arm, extract, turn our errors into exit codes."""
    os.fsync = lambda _: None  # slow, and no killed process can notice
    arm_spec(sys.argv[2] if len(sys.argv) > 2 else "")
    try:
        manifest, _ = extract(sys.argv[1], stale_s=float(sys.argv[3]) if len(sys.argv) > 3 else 5.0)
    except DtpipeError as err:
        print(f"{type(err).__name__}: {err}", file=sys.stderr)
        return err.exit_code
    print(manifest.digest)
    return 0


if __name__ == "__main__":
    sys.exit(main())
