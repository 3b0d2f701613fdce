"""How fast and how lean is `dtpipe extract`? Five questions, in one run on one machine.

`ratio`: images/s of a whole extraction over a bare forward loop of the same teacher, interleaved; medians.
`cores`: what an image of ADM-256's levels (5.6 MiB in float16, of teacher `measure-only`) costs on one core in codec,
zstd with checksums, digest and write, by codec; and how many cores a GPU of 400 and of 800 images/s needs for all but
the codec, which runs on it. Reading and decoding of images come on top: they depend on the images.
`written`: bytes that the kernel counts as written by an extraction over the bytes of its dataset.
`memory`: resident memory while 10,000 images go through, at each fifth of them, in a process that did nothing before.
`workers`: images/s of two workers over one, on a local Ray.

    python benchmarks/extract.py [--only ratio,cores] [--teacher DIR] [--images DIR] [--device cuda] [--small]
"""

# ruff: noqa: E402
from __future__ import annotations

from dtpipe.extract.allocator import keep_freed_memory

keep_freed_memory()  # as the commands do: before other imports begin threads, which would have heaps of their own

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import RESULTS, publish, refuse_to_lose, teacher_digest, write_random_teacher

from dtpipe.extract.config import ExtractConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.encode import encode, recipe_rows
from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.run import run_extraction
from dtpipe.extract.shards.buffer import CodedBatch
from dtpipe.extract.shards.progress import Progress
from dtpipe.extract.shards.timeline import Stalls
from dtpipe.extract.teachers.arithmetic import exact
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.codecs.registry import level_codecs
from dtpipe.manifests.pieces import blake3_of
from dtpipe.manifests.schema import IndexRow, Plan
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.shard import encode_rows, join_rows
from dtpipe.pipeline.demo.scenes import write_scenes

GPU_IMG_S = (400, 800)
NO_FIT = ("cast", "int8")  # codecs that need no fit on a sample before


class Bench:
    """What the questions share: a folder, settings, images and a teacher."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self._count = args, folder, 0
        self.teacher = args.teacher or str(write_random_teacher(folder / "teacher", args.px or 64))
        self.images = args.images or str(write_scenes(folder / "scenes", 128 if args.small else 2048, seed=0))

    def config(self, **changes: Any) -> ExtractConfig:
        """Settings of an extraction into a new folder; keyword arguments replace sections."""
        self._count += 1
        args = self.args
        fields = {
            "images": self.images,
            "teacher": {"path": self.teacher, "dtype": args.dtype},
            "transform": {"px": args.px},
            "noise": {"timesteps": [50]},
            "shard": {"format": args.format},
            "batch_size": args.batch_size,
            "threads": args.threads,
            **changes,
        }
        run = {"out": str(self.folder / f"features{self._count}"), "device": args.device, "inline": True}
        fields["run"] = run | {"decode_threads": args.decode_threads} | changes.get("run", {})
        return ExtractConfig.model_validate(fields)

    def null(
        self, px: int, channels: dict[str, int] | None = None, codec: str = "cast", **changes: Any
    ) -> ExtractConfig:
        """Settings of an extraction by the teacher that costs nothing."""
        options: dict[str, Any] = {"px": px} | ({} if channels is None else {"channels": channels})
        shard = {"format": self.args.format, **changes.pop("shard", {})}
        teacher = {"path": "measure-only", "options": options}
        return self.config(
            teacher=teacher, transform={"px": px}, noise={}, codec={"name": codec}, shard=shard, **changes
        )

    def copies(self, number: int) -> str:
        """A folder of so many names of a few images."""
        folder = self.folder / f"copies{number}"
        if not folder.exists():
            originals = sorted(write_scenes(self.folder / "few", 16, seed=1).rglob("*.png"))
            folder.mkdir()
            for idx in range(number):
                os.link(originals[idx % len(originals)], folder / f"{idx:06d}.png")
        return str(folder)


def bare_loop(config: ExtractConfig, seconds: float) -> Callable[[], float]:
    """Measures images per second of nothing but the teacher's forward passes, images and noise ready in memory."""
    resolved = resolve_recipe(config)
    recipe, device = resolved.recipe, resolved.recipe.compute.device
    teacher = load_teacher(config.teacher, device)
    size, px = recipe.compute.batch_size, (recipe.transform.height, recipe.transform.width)
    images = np.random.default_rng(0).integers(0, 256, (size, *px, 3), dtype=np.uint8)
    rows = recipe_rows(recipe, teacher.spec, [str(idx) for idx in range(size)], images)

    def batches(num: int) -> float:
        with exact(torch.device(device), recipe.compute.threads):  # once, or each batch would change it and back
            begun_s = time.perf_counter()
            for _ in range(num):
                encode(teacher, rows, device, recipe.compute)
            if device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begun_s

    batches(2)  # warm up
    num = max(1, round(seconds / batches(1)))
    return lambda: num * size / batches(num)


def ratio(bench: Bench) -> dict[str, Any]:
    """Bare loop and extraction in turn, a bare loop at each end."""
    bare = bare_loop(bench.config(), bench.args.seconds)
    loops, runs, ratios, stalls = [bare()], [], [], Stalls()
    for _ in range(bench.args.repeats):
        result = run_extraction(bench.config())
        runs.append(result.throughput_img_s)
        loops.append(bare())
        ratios.append(runs[-1] / statistics.fmean(loops[-2:]))
        stalls = sum(result.stalls.values(), stalls)
    return {
        "bare_img_s": [round(value, 2) for value in loops],
        "extract_img_s": [round(value, 2) for value in runs],
        "ratios": [round(value, 3) for value in ratios],
        "ratio": round(statistics.median(ratios), 3),
        "num_rows": result.num_rows,
        "stalls": stalls.record(),
    }


def cores(bench: Bench) -> dict[str, Any]:
    """CPU seconds of one thread per image, by codec and stage."""
    rows = {codec: _cores_of(bench, codec) for codec in NO_FIT if _known(codec)}
    return {"image_mib_float16": 5.625, "batch": _SIZE, "codecs": rows}


_SIZE = 8


def _known(codec: str) -> bool:
    from dtpipe.manifests.codecs.registry import CODECS

    return codec in CODECS


def _cores_of(bench: Bench, codec: str) -> dict[str, Any]:
    """Medians over batches; what runs on the teacher's device is not counted where that is a GPU."""
    config = bench.null(256, codec=codec, images=bench.copies(_SIZE), batch_size=_SIZE, shard={"samples": _SIZE})
    resolved = resolve_recipe(config)
    recipe = resolved.recipe
    plan = Plan(format=recipe.format, recipe=recipe, num_rows=_SIZE, num_shards=1, listing_blake3="0" * 64)
    index = [IndexRow(row=row, key=str(row), shard=0) for row in range(_SIZE)]
    images = np.random.default_rng(0).integers(0, 256, (_SIZE, 256, 256, 3), dtype=np.uint8)
    passed = encode(
        resolved.teacher, recipe_rows(recipe, resolved.teacher.spec, [row.key for row in index], images), "cpu"
    )
    store, codecs = Store(bench.folder / f"cores-{codec}"), level_codecs(recipe)
    seconds: dict[str, list[float]] = {}
    wall: list[float] = []
    size_bytes = 0

    def timed(stage: str, work: Callable[[], Any]) -> Any:
        begun_s = time.thread_time()
        answer = work()
        seconds.setdefault(stage, []).append((time.thread_time() - begun_s) / _SIZE)
        return answer

    for _ in range(2 if bench.args.small else 5):
        batch = CodedBatch(index, torch.from_numpy(images))
        timed("codec", partial(batch.start, passed.levels, codecs))
        arrays = timed("codec_on_host", partial(batch.arrays, recipe))
        coded = timed("zstd_and_crc32c", partial(encode_rows, recipe, arrays))
        encoded = list(join_rows(plan, 0, [coded]))
        size_bytes = sum(one.size_bytes for one in encoded)
        objects = {one.name: one.content for one in encoded}
        timed("digest", partial(list, map(blake3_of, objects.values())))
        begun_s = time.perf_counter()
        timed("write", partial(list, map(store.write, objects.keys(), objects.values())))
        wall.append((time.perf_counter() - begun_s) / _SIZE)
    each = {stage: statistics.median(values) for stage, values in seconds.items()}
    total = sum(value for stage, value in each.items() if stage != "codec")  # that one is the GPU's affair
    return {
        "stored_mb": round(size_bytes / _SIZE / 1e6, 3),
        "img_s_per_core": {stage: round(1 / value, 1) for stage, value in each.items() if value > 1e-7},
        "img_s_per_core_beside_a_gpu": round(1 / total, 1),
        "img_s_per_core_all": round(1 / sum(each.values()), 1),
        "write_wall_mb_s": round(size_bytes / _SIZE / statistics.median(wall) / 1e6, 1),
        "cores_for_gpu_img_s": {str(rate): round(rate * total, 1) for rate in GPU_IMG_S},
        "store_mb_s_for_gpu_img_s": {str(rate): round(rate * size_bytes / _SIZE / 1e6) for rate in GPU_IMG_S},
    }


def written(bench: Bench) -> dict[str, Any]:
    """By /proc/self/io, where there is one; the dataset's own folder is all that is written."""
    number = 16 if bench.args.small else 128
    config = bench.null(256, images=bench.copies(number), batch_size=8, shard={"samples": 16})
    before = _kernel_bytes()
    result = run_extraction(config)
    after = _kernel_bytes()
    stored = sum(path.stat().st_size for path in Path(result.url).rglob("*") if path.is_file())
    if before is None or after is None or after == before:
        return {"dataset_bytes": stored, "written_bytes": None, "amplification": None}
    return {
        "dataset_bytes": stored,
        "written_bytes": after - before,
        "amplification": round((after - before) / stored, 4),
        "img_s": round(result.throughput_img_s, 1),
        "stalls": sum(result.stalls.values(), Stalls()).record(),
    }


def _kernel_bytes() -> int | None:
    """What this process sent to storage so far."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next(int(line.split()[1]) for line in lines if line.startswith("write_bytes"))


def memory(bench: Bench) -> dict[str, Any]:
    """`resident` in a process of its own: memory that others have freed would hide what it takes."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(resident, bench).result()


def resident(bench: Bench) -> dict[str, Any]:
    """Resident bytes, the most seen in each fifth of the images."""
    number = 500 if bench.args.small else 10_000
    channels = {"l2": 32, "l3": 32, "l4": 64, "l5": 64}
    config = bench.null(64, channels, images=bench.copies(number), batch_size=32, shard={"samples": 256})
    most, before = [0] * 5, _resident_bytes()

    def look(progress: Progress) -> None:
        fifth = min(4, 5 * progress.samples_encoded // progress.samples_total)
        most[fifth] = max(most[fifth], _resident_bytes())

    result = run_extraction(config, look)
    return {
        "num_images": number,
        "img_s": round(result.throughput_img_s, 1),
        "resident_mb_before": round(before / 1e6, 1),
        "resident_mb_by_fifth": [round(size / 1e6, 1) for size in most],
        "last_over_second": round(most[4] / most[1], 3) if most[1] else None,
        "dataset_mb": round(result.size_bytes / 1e6, 1),
    }


def _resident_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * int(Path("/proc/self/statm").read_text().split()[1])


def workers(bench: Bench) -> dict[str, Any]:
    """The same extraction by one and by two workers, twice, in turn."""
    shard = {"format": bench.args.format, "samples": 16 if bench.args.small else 128}
    rates: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(1 if bench.args.small else 2):
        for number, seen in rates.items():
            run = {"inline": False, "workers": number}
            seen.append(run_extraction(bench.config(shard=shard, run=run)).throughput_img_s)
    one, two = (statistics.median(seen) for seen in rates.values())
    return {
        "cores": os.cpu_count(),
        "img_s": {str(number): [round(value, 2) for value in seen] for number, seen in rates.items()},
        "two_over_one": round(two / one, 3),
    }


QUESTIONS = {"ratio": ratio, "cores": cores, "written": written, "memory": memory, "workers": workers}


def main() -> int:
    """Parse, measure, print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(QUESTIONS), help="questions, with commas")
    parser.add_argument("--images", help="image source of ratio and workers; default: 2,048 digit scenes")
    parser.add_argument("--teacher", help="their teacher; default: a small UNet with random weights")
    parser.add_argument("--px", type=int, help="image side in px; default: the teacher's")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--threads", type=int, default=1, help="CPU threads of the forward pass")
    parser.add_argument("--decode-threads", type=int, default=2)
    parser.add_argument("--format", default="zarr", choices=["zarr", "webdataset"])
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--seconds", type=float, default=8, help="length of each bare loop")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--small", action="store_true", help="a few images, to try the script; measures nothing")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "extract.json")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    refuse_to_lose("extract", args.out_json, None, args.only.split(","))
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(args, Path(folder))
        results = {name: QUESTIONS[name](bench) for name in args.only.split(",")}
        results["settings"] = {name: value for name, value in vars(args).items() if name != "out_json"}
        results["settings"] |= {"images": bool(args.images), "teacher": bool(args.teacher)}
        publish("extract", results, args.out_json, {"teacher": teacher_digest(bench.teacher)})
    return 0


if __name__ == "__main__":
    sys.exit(main())
