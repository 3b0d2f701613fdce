"""How far does a dataset scale? Merging many commits, and opening a dataset of many rows, in time and memory.

Both are synthetic. The commits are entries of tar shards (image and four levels in two views, as in a small
extraction), each with a sparse object of the right size; they are written as extraction writes them, without fsync. The
rows are a merged dataset of zarr shards (image and one level) without its objects, which opening does not read. Every
figure is measured in a process of its own, whose peak memory is that figure's.

    python benchmarks/scale.py [--commits 100000] [--rows 10000000] [--folder DIR] [--out-json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from dtpipe.manifests.canonical import blake3_hex, dump_record, seal
from dtpipe.manifests.layout.digest import dataset_digest
from dtpipe.manifests.layout.tables import (
    INDEX_FILE,
    INDEX_SCHEMA,
    LISTING_FILE,
    LISTING_SCHEMA,
    SHARDS_FILE,
    SHARDS_SCHEMA,
    encode_table,
)
from dtpipe.manifests.layout.zarr import write_zarr_metadata, zarr_metadata
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import (
    ComputeRecipe,
    FileEntry,
    LevelSpec,
    Manifest,
    Plan,
    Recipe,
    ShardFormat,
    ShardRecipe,
    SourceRecipe,
    TeacherRecipe,
    Totals,
    TransformRecipe,
    ViewSpec,
)
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import MANIFEST_FILE, commit_name, load_entries, merge
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import PLAN_FILE, load_plan, plan_digest

COMMIT_ROWS, OPEN_ROWS = 16, 1024  # rows per shard
_CHUNK_BYTES, _OBJECT_BYTES = 600, 200_000


def make_plan(
    num_rows: int, samples: int, layout: ShardFormat, strides: tuple[int, ...], views: int, listing: str
) -> Plan:
    """A plan of 64 px images and levels of 64 channels."""
    recipe = Recipe(
        source=SourceRecipe(kind="folder", order="container"),
        transform=TransformRecipe(height=64, width=64),
        student_px=(64, 64),
        teacher=TeacherRecipe(kind="ddpm", weights_blake3="0" * 64),
        views=tuple(ViewSpec(draw=idx) for idx in range(views)),
        levels=tuple(
            LevelSpec(name=f"l{n}", stride=2**n, channels=64, height=64 >> n, width=64 >> n, tap=f"up.{n}")
            for n in strides
        ),
        shard=ShardRecipe(samples=samples, format=layout),
        compute=ComputeRecipe(device="cpu", batch_size=32, threads=1),
    )
    return Plan(recipe=recipe, num_rows=num_rows, num_shards=-(-num_rows // samples), listing_blake3=listing)


def write_listing_of(root: Path, num_rows: int) -> str:
    """listing.parquet with keys like those of a class folder; returns its digest."""
    rows = np.arange(num_rows)
    numbers = pa.array(rows).cast(pa.string())
    keys = pc.binary_join_element_wise("class/", numbers, ".jpg", "")
    labels = pa.array(rows % 1000).cast(pa.string())
    table = pa.Table.from_arrays([pa.array(rows), keys, keys, labels], schema=LISTING_SCHEMA)
    return write_table(root, LISTING_FILE, table)


def write_table(root: Path, name: str, table: pa.Table) -> str:
    """A table as Parquet; returns its digest."""
    data = encode_table(table)
    (root / name).write_bytes(data)
    return blake3_hex(data)


def write_commits(root: Path, num_commits: int) -> None:
    """Everything of an extraction but its merge."""
    root.mkdir(parents=True)
    for folder in ("commits", "data"):
        (root / folder).mkdir()
    digest = write_listing_of(root, num_commits * COMMIT_ROWS)
    plan = make_plan(num_commits * COMMIT_ROWS, COMMIT_ROWS, "webdataset", (2, 3, 4, 5), 2, digest)
    data = dump_record(plan)
    (root / PLAN_FILE).write_bytes(data)
    rng = np.random.Generator(np.random.Philox(0))
    for shard_idx in range(num_commits):
        value = entry_value(root, plan, shard_idx, blake3_hex(data), rng)
        (root / commit_name(shard_idx)).write_bytes(seal(value))


def entry_value(root: Path, plan: Plan, shard_idx: int, plan_blake3: str, rng: np.random.Generator) -> dict[str, Any]:
    """What an entry says, with a sparse object of that size behind it."""
    name = f"data/{shard_idx:05d}.tar"
    path = root / name
    with path.open("wb") as file:
        os.truncate(file.fileno(), _OBJECT_BYTES)
    status = path.stat()
    widths = {"key": 1, "image": 1, **{level.name: len(plan.recipe.views) for level in plan.recipe.levels}}
    places, checksums = rng.integers, rng.integers(0, 2**32, COMMIT_ROWS * sum(widths.values())).tolist()
    offsets = np.arange(COMMIT_ROWS * sum(widths.values())).reshape(COMMIT_ROWS, -1) * 1024 + 512
    arrays, first = {}, 0
    for array, width in widths.items():
        count = COMMIT_ROWS * width
        arrays[array] = {
            "offset": offsets[:, first : first + width].ravel().tolist(),
            "size": places(1, _CHUNK_BYTES, count).tolist(),
            "crc32c": [checksums.pop() for _ in range(count)],
        }
        first += width
    stored = {
        "name": name,
        "size_bytes": _OBJECT_BYTES,
        "blake3": f"{shard_idx:064x}",
        "identity": f"{status.st_mtime_ns}-{status.st_ino}",
        "arrays": arrays,
    }
    rows = [
        {
            "row": row,
            "key": f"class/{row}.jpg",
            "shard": shard_idx,
            "status": "ok",
            "label": str(row % 1000),
            "original_height": 480,
            "original_width": 640,
        }
        for row in plan.shard_rows(shard_idx)
    ]
    return {
        "format": plan.format,
        "shard": shard_idx,
        "plan_blake3": plan_blake3,
        "epoch": 1,
        "objects": [stored],
        "rows": rows,
        "provenance": {"host": "none", "seconds": 1.5},
    }


def write_rows(root: Path, num_rows: int) -> None:
    """A merged dataset: all metadata, no objects."""
    root.mkdir(parents=True)
    digest = write_listing_of(root, num_rows)
    plan = make_plan(num_rows, OPEN_ROWS, "zarr", (3,), 1, digest)
    data = dump_record(plan)
    (root / PLAN_FILE).write_bytes(data)
    write_zarr_metadata(Store(root), plan)
    keys, labels = read_keys(root)
    columns = {
        "row": pa.array(np.arange(num_rows)),
        "key": keys,
        "shard": pa.array((np.arange(num_rows) // OPEN_ROWS).astype(np.int32)),
        "status": pa.repeat("ok", num_rows),
        "label": labels,
        "original_height": pa.array(np.full(num_rows, 480, np.int32)),
        "original_width": pa.array(np.full(num_rows, 640, np.int32)),
    }
    write_table(root, INDEX_FILE, pa.table(columns, schema=INDEX_SCHEMA))
    objects = list(object_rows(plan))
    shards = pa.Table.from_batches(shard_batches(plan, objects), schema=SHARDS_SCHEMA)
    write_table(root, SHARDS_FILE, shards)
    files = {
        name: FileEntry(size_bytes=(root / name).stat().st_size, blake3=blake3_hex((root / name).read_bytes()))
        for name in (PLAN_FILE, LISTING_FILE, SHARDS_FILE, INDEX_FILE, *zarr_metadata(plan))
    }
    totals = Totals(
        num_rows=num_rows,
        num_ok=num_rows,
        num_bad=0,
        num_shards=plan.num_shards,
        size_bytes=sum(size for _, _, size, _ in objects),
    )
    manifest = Manifest(
        complete=True,
        digest=dataset_digest(plan.recipe, pa.chunked_array([keys]), shards),
        recipe=plan.recipe,
        totals=totals,
        files=dict(sorted(files.items())),
        provenance={"plan": plan.provenance},
    )
    (root / MANIFEST_FILE).write_bytes(dump_record(manifest))


def read_keys(root: Path) -> tuple[pa.Array, pa.Array]:
    """Keys and labels of the listing."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(root / LISTING_FILE).read(["key", "label"])
    return table["key"].combine_chunks(), table["label"].combine_chunks()


def object_rows(plan: Plan) -> Iterator[tuple[int, str, int, str]]:
    """Shard, name, size and digest of each object."""
    for shard_idx in range(plan.num_shards):
        size = len(plan.shard_rows(shard_idx)) * (_CHUNK_BYTES + 4) + 16 * OPEN_ROWS + 4
        for array, axes in (("image", 3), ("l3", 4)):
            name = "/".join(["data.zarr", array, "c", str(shard_idx), *["0"] * axes])
            yield shard_idx, name, size, blake3_hex(name.encode())


def shard_batches(plan: Plan, objects: list[tuple[int, str, int, str]]) -> Iterator[pa.RecordBatch]:
    """shards.parquet, an object at a time."""
    rng = np.random.Generator(np.random.Philox(1))
    fields = SHARDS_SCHEMA.field("arrays").type.value_type
    for shard_idx, name, size, digest in objects:
        count = len(plan.shard_rows(shard_idx))
        columns = [
            np.arange(count) * (_CHUNK_BYTES + 4),
            np.full(count, _CHUNK_BYTES),
            rng.integers(0, 2**32, count, dtype=np.uint32),
        ]
        lists = [
            pa.ListArray.from_arrays(pa.array([0, count], pa.int32()), pa.array(column), type=fields[idx + 1].type)
            for idx, column in enumerate(columns)
        ]
        listed = pa.StructArray.from_arrays([pa.array([name.split("/")[1]]), *lists], fields=list(fields))
        arrays = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), listed, type=SHARDS_SCHEMA.field("arrays").type)
        yield pa.RecordBatch.from_arrays(
            [pa.array([shard_idx], pa.int32()), pa.array([name]), pa.array([size]), pa.array([digest]), arrays],
            schema=SHARDS_SCHEMA,
        )


def time_load(root: Path) -> dict[str, Any]:
    """Every entry read and checked."""
    store = Store(root)
    plan = load_plan(store)
    num_rows = sum(len(entry.rows) for entry in load_entries(store, plan, plan_digest(store)))
    return {"num_rows": num_rows}


def time_merge(root: Path) -> dict[str, Any]:
    """The merge as extraction calls it."""
    store = Store(root)
    with Lock.acquire(store, stale_s=1) as lock:
        return {"digest": merge(store, load_plan(store), lock, {}).digest}


def time_open(root: Path) -> dict[str, Any]:
    """A reader's first step, and one row's key."""
    dataset = FeatureDataset.open(root)
    return {"num_rows": len(dataset.columns), "last_key": dataset.columns.keys[len(dataset.columns) - 1]}


STEPS = {"load": time_load, "merge": time_merge, "open": time_open}


def measure(step: str, root: Path) -> dict[str, Any]:
    """One step in a process of its own: seconds without the start of Python, and its peak memory."""
    command = [sys.executable, str(Path(__file__).resolve()), "--step", step, "--folder", str(root)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    result: dict[str, Any] = json.loads(done.stdout)
    return result


def run_step(step: str, root: Path) -> None:
    """Print seconds, peak memory and outcome of a step as JSON."""
    before_s, before_cpu_s = time.perf_counter(), time.process_time()
    outcome = STEPS[step](root)
    figures = {
        "seconds": round(time.perf_counter() - before_s, 2),
        "cpu_seconds": round(time.process_time() - before_cpu_s, 2),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6, 3),
    }
    sys.stdout.write(json.dumps({**figures, **outcome}))


def main() -> int:
    """Parse, write what is measured, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--commits", type=int, default=100_000, help="entries to merge; 0 leaves this out")
    parser.add_argument("--rows", type=int, default=10_000_000, help="rows of the dataset to open; 0 leaves this out")
    parser.add_argument("--folder", type=Path, help="where the datasets are written, and removed again")
    parser.add_argument("--step", choices=sorted(STEPS), help="only this, on the dataset that lies in --folder")
    parser.add_argument("--out-json", type=Path, help="default: benchmarks/results/scale.json")
    args = parser.parse_args()
    if args.step:
        run_step(args.step, args.folder)
        return 0
    from common import RESULTS, publish  # torch's memory is none of a step's

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        if args.commits:
            root = Path(folder) / "commits"
            write_commits(root, args.commits)
            results["commits"] = {"num_commits": args.commits, "rows_per_commit": COMMIT_ROWS}
            results["commits"] |= {step: measure(step, root) for step in ("load", "merge")}
            shutil.rmtree(root)
        if args.rows:
            root = Path(folder) / "rows"
            write_rows(root, args.rows)
            results["rows"] = {"num_rows": args.rows, "rows_per_shard": OPEN_ROWS, "open": measure("open", root)}
    publish("scale", results, args.out_json or RESULTS / "scale.json", {})
    return 0


if __name__ == "__main__":
    sys.exit(main())
