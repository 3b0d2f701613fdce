"""How fast are samples read? dtpipe, with every chunk checked, beside the libraries that store arrays for training.

Synthetic features (normal noise in float16, which zstd makes 1.08 times smaller, as it does features) of four sizes are
written by each library's own writer: dtpipe's by the write path of an extraction, in zarr and in tars. Each contender
then reads in a process of its own, batches of 64, warm, in rounds that are interleaved; medians are kept.

    python benchmarks/read.py [--sizes 48KB 0.2MB 0.6MB 5.6MB] [--rounds 3] [--seconds 1]
                              [--peers PYTHON] [--folder DIR] [--out-json FILE]

`--peers` is an interpreter that has litdata and mosaicml-streaming beside this project's packages; what it lacks is
left out, and the reason is printed. 6 GB of disk are used for a while; on two idle cores it takes twenty minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from common import RESULTS, publish, refuse_to_lose
from read_contenders import BATCH, CONTENDERS

from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.layout.zarr import write_zarr_metadata
from dtpipe.manifests.schema import (
    CodecRecipe,
    ComputeRecipe,
    IndexRow,
    LevelSpec,
    Recipe,
    ShardRecipe,
    SourceRecipe,
    TeacherRecipe,
    TransformRecipe,
    ViewSpec,
)
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import commit_entry, merge
from dtpipe.manifests.write.listing import build_listing
from dtpipe.manifests.write.lock import Lock
from dtpipe.manifests.write.plan import plan_digest, start_plan
from dtpipe.manifests.write.shard import encode_rows, write_rows

HERE = Path(__file__).resolve().parent
Found = dict[str, dict[str, list[dict[str, float]]]]
"""By contender and mode."""
ALONE = ("zarr",)  # slow, so one round is enough, and takes up to 14 GB for a shuffled batch, so nobody else reads
NUM_DRAWN = 16  # different samples; no coder looks further back than one of them


@dataclass(frozen=True)
class Sample:
    """Shapes of one size of sample."""

    px: int
    levels: tuple[tuple[int, int], ...]  # channels and side, from stride 4 on
    num: int

    @property
    def size_bytes(self) -> int:
        """Of images and levels, as arrays."""
        return 3 * self.px**2 + sum(2 * channels * side**2 for channels, side in self.levels)


SIZES = {
    "48KB": Sample(64, ((40, 16), (96, 8), (128, 4)), 4096),
    "0.2MB": Sample(128, ((48, 32), (64, 16), (128, 8)), 1536),
    "0.6MB": Sample(128, ((192, 32), (256, 16), (512, 8)), 640),
    "5.6MB": Sample(256, ((512, 64), (512, 32), (1024, 16), (1024, 8)), 128),
}


@dataclass(frozen=True)
class Item:
    """A listed sample."""

    key: str
    uri: str = ""
    label: str | None = None


def draw(sample: Sample) -> list[dict[str, np.ndarray]]:
    """Some samples of one size."""
    rng = np.random.default_rng(0)
    made = []
    for _ in range(NUM_DRAWN):
        steps = rng.integers(-2, 3, (sample.px, sample.px, 3)).cumsum(axis=1)  # so smooth that zstd gains what it does
        arrays: dict[str, np.ndarray] = {"image": (steps + 128).clip(0, 255).astype(np.uint8)}
        for idx, (channels, side) in enumerate(sample.levels):
            arrays[f"l{idx + 2}"] = rng.standard_normal((channels, side, side), np.float32).astype(np.float16)
        made.append(arrays)
    return made


def write_dataset(
    root: Path, sample: Sample, drawn: list[dict[str, np.ndarray]], form: str, dense_zstd_level: Literal[0] | None
) -> None:
    """A feature dataset, by the steps of an extraction. Row i holds drawn sample i."""
    levels = tuple(
        LevelSpec(name=f"l{idx + 2}", stride=4 << idx, channels=channels, height=side, width=side, tap=f"up.{idx}")
        for idx, (channels, side) in enumerate(sample.levels)
    )
    recipe = Recipe(
        source=SourceRecipe(kind="folder"),
        transform=TransformRecipe(height=sample.px, width=sample.px),
        student_px=(sample.px, sample.px),
        teacher=TeacherRecipe(kind="none", weights_blake3="0" * 64),
        views=(ViewSpec(draw=0),),
        levels=levels,
        codec=CodecRecipe(dense_zstd_level=dense_zstd_level),
        shard=ShardRecipe(samples=min(256, sample.num // 4), format=form),
        compute=ComputeRecipe(device="cpu", batch_size=64, threads=1),
    )
    listing = build_listing(Item(f"{row:06d}") for row in range(sample.num))
    store = Store(root)
    with Lock.acquire(store, stale_s=1) as lock:
        plan, listing = start_plan(store, recipe, listing, {})
        if form == "zarr":
            write_zarr_metadata(store, plan)
        for shard_idx in range(plan.num_shards):
            rows = plan.shard_rows(shard_idx)
            arrays = {
                name: np.stack([drawn[row % NUM_DRAWN][name] for row in rows])[:, *([None] * (name != "image"))]
                for name in drawn[0]
            }
            index = [IndexRow(row=row, key=listing.rows(range(row, row + 1))[0].key, shard=shard_idx) for row in rows]
            shard = ShardArrays(arrays, index)
            coded = [encode_rows(recipe, shard)]
            entry = write_rows(store, plan, plan_digest(store), shard_idx, coded, lock.epoch, {})
            commit_entry(store, entry, lock.epoch)
        merge(store, plan, lock, {})


class Contender:
    """A process that measures one contender."""

    def __init__(self, name: str, kind: str, folder: Path, python: str) -> None:
        self.name, self.modes = name, CONTENDERS[kind].modes
        environment = {**os.environ, "OMP_NUM_THREADS": "2", "TMPDIR": str(folder / "tmp"), "PYTHONWARNINGS": "ignore"}
        (folder / "tmp").mkdir(exist_ok=True)
        command = [python, str(HERE / "read_contenders.py"), kind, str(folder)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
        )
        self.version = f"{CONTENDERS[kind].package} {self._answer()['version']}"

    def measure(self, mode: str, seconds: float, least: int) -> dict[str, float]:
        """As `read_contenders.measure`."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"mode": mode, "seconds": seconds, "least": least}) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            said = self._process.communicate()[1].strip().splitlines()
            raise RuntimeError(f"{self.name}: {said[-1] if said else 'ended without a word'}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def write_peer(kind: str, folder: Path, sample: Sample, python: str) -> None:
    """Have a peer write its own form, in a process with its packages."""
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from pathlib import Path\nimport numpy as np\nfrom read_contenders import CONTENDERS\n"
        "folder = Path(sys.argv[2])\n"
        "drawn = np.load(folder / 'drawn.npz')\n"
        "drawn = [{n: drawn[f'{i}.{n}'] for n in sys.argv[5].split(',')} for i in range(int(sys.argv[4]))]\n"
        "samples = (drawn[row % len(drawn)] for row in range(int(sys.argv[3])))\n"
        "CONTENDERS[sys.argv[6]].write(folder, samples)\n"
    )
    names = ",".join(["image", *(f"l{idx + 2}" for idx in range(len(sample.levels)))])
    (folder / "tmp").mkdir(exist_ok=True)
    arguments = [str(HERE), str(folder), str(sample.num), str(NUM_DRAWN), names, kind]
    done = subprocess.run(
        [python, "-c", code, *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "TMPDIR": str(folder / "tmp")},
    )
    if done.returncode:
        raise RuntimeError(f"{kind}: {done.stderr.strip().splitlines()[-1]}")


def contenders(folder: Path, sample: Sample, python: str) -> Iterator[Contender]:
    """All that can be had here; what is missing is said."""
    drawn = draw(sample)
    named: dict[str, Any] = {f"{i}.{n}": value for i, made in enumerate(drawn) for n, value in made.items()}
    np.savez(folder / "drawn.npz", **named)
    forms: tuple[tuple[str, str, Literal[0] | None], ...] = (
        ("dtpipe zarr", "zarr", 0),  # as `extract` writes it
        ("dtpipe zarr, zstd 3", "zarr", None),
        ("dtpipe tar", "webdataset", None),
    )
    for name, form, dense_zstd_level in forms:
        root = folder / name.replace(",", "").replace(" ", "_")
        write_dataset(root, sample, drawn, form, dense_zstd_level)
        yield Contender(name, "dtpipe", root, sys.executable)
    in_zarr = [("tensorstore", "dtpipe_zarr"), ("tensorstore, zstd 3", "dtpipe_zarr_zstd_3"), ("zarr", "dtpipe_zarr")]
    in_own_form = [(kind, ".") for kind, contender in CONTENDERS.items() if hasattr(contender, "write")]
    written = set()
    for name, place in in_zarr + in_own_form:
        kind = name.removesuffix(", zstd 3")
        package = CONTENDERS[kind].package
        try:
            if place == "." and package not in written:
                write_peer(kind, folder, sample, python)
                written.add(package)
            yield Contender(name, kind, folder / place, python)
        except RuntimeError as err:
            print(f"left out: {err}", file=sys.stderr)


def measure_rounds(
    running: Sequence[Contender], rounds: int, least: int, options: argparse.Namespace, found: Found
) -> None:
    """Measure in turns, after a round that fills the page cache and loads what is loaded late."""
    for round_idx in range(rounds + 1):
        for contender in running:
            for mode in contender.modes:
                seconds = options.seconds if round_idx else options.seconds / 2
                result = contender.measure(mode, seconds, least if round_idx else 1)
                if round_idx:
                    found.setdefault(contender.name, {}).setdefault(mode, []).append(result)


def measure_size(sample: Sample, options: argparse.Namespace) -> dict[str, Any]:
    """All contenders on one size: medians, and dtpipe's forms over the best of the others."""
    folder = Path(tempfile.mkdtemp(prefix="read-", dir=options.folder))
    found: Found = {}
    packages: set[str] = set()
    try:
        running = []
        for contender in contenders(folder, sample, options.peers):
            packages.add(contender.version)
            if contender.name in ALONE:
                measure_rounds([contender], 1, 1, options, found)
                contender.close()
            else:
                running.append(contender)
        print(f"{sample.size_bytes} bytes a sample: {len(running)} contenders are ready", file=sys.stderr)
        measure_rounds(running, options.rounds, options.least, options, found)
        for contender in running:
            contender.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    medians = {
        name: {
            mode: {unit: round(statistics.median(run[unit] for run in runs), 3) for unit in runs[0]}
            for mode, runs in modes.items()
        }
        for name, modes in found.items()
    }
    about = {"sample_bytes": sample.size_bytes, "samples": sample.num, "packages": sorted(packages)}
    return {**about, **medians, "ratios": ratios(medians)}


def ratios(medians: dict[str, Any]) -> dict[str, dict[str, float]]:
    """Each of dtpipe's forms over the best peer: the stream and shuffled reads, sequential, and one sample's time."""
    peers = {name: modes for name, modes in medians.items() if not name.startswith("dtpipe")}

    def best(mode: str) -> float:
        return max((modes[mode]["mb_s"] for modes in peers.values() if mode in modes), default=float("nan"))

    def fastest() -> float:
        return min((modes["random"]["ms"] for modes in peers.values() if "random" in modes), default=float("nan"))

    return {
        name: {
            "stream over best shuffled": round(modes["stream"]["mb_s"] / best("shuffled"), 2),
            "shuffled over best shuffled": round(modes["shuffled"]["mb_s"] / best("shuffled"), 2),
            "sequential over best sequential": round(modes["sequential"]["mb_s"] / best("sequential"), 2),
            "random ms over best random ms": round(modes["random"]["ms"] / fastest(), 2),
        }
        for name, modes in medians.items()
        if name.startswith("dtpipe")
    }


def main() -> None:
    """Measure and publish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=1.0, help="of each measurement, at least")
    parser.add_argument("--least", type=int, default=12, help=f"batches of {BATCH} in each measurement, at least")
    parser.add_argument("--peers", default=sys.executable, help="interpreter with litdata and mosaicml-streaming")
    parser.add_argument("--folder", type=Path, default=None, help="where data lies meanwhile; default: the temp folder")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "read.json")
    options = parser.parse_args()
    refuse_to_lose("read", options.out_json, "sizes", options.sizes)
    results = {}
    for size in options.sizes:
        results[size] = measure_size(SIZES[size], options)
        print(json.dumps({size: results[size]["ratios"]}), file=sys.stderr)
    units = {
        "mb_s": "10^6 bytes of arrays, as they are in memory, per second",
        "mb_cpu_s": "the same per second of processor time of the whole process, where all work is done in it",
        "ms": "milliseconds of one random sample, all arrays, median",
    }
    publish("read", {"batch": BATCH, "units": units, "sizes": results}, options.out_json, {})


if __name__ == "__main__":
    main()
