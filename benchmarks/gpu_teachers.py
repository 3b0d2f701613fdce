"""Full-size teachers on a GPU: images/s, memory and share of the device's peak, by dtype, batch size and torch.compile.

ADM of 256 px and Stable Diffusion 1.4 with random weights (see `full_size.py`), up to their last level read. The peak
is the fastest of some large matrix products in the same dtype on the same device. Features in low precision stand
against float32 ones of the same images.

    python benchmarks/gpu_teachers.py [--dtypes float16,bfloat16] [--batch-sizes 8,32,128] [--work DIR]
    python benchmarks/gpu_teachers.py --small --device cpu      # two small teachers, to prove the script itself
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import REPO, RESULTS, publish, teacher_digest, write_random_teacher
from full_size import write_adm, write_sd
from teacher_forward import Case, flops_of, make_case, relative_errors, seconds_of
from torch import Tensor

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.device import pick_device

SMALL = {"dtypes": ("bfloat16",), "batch_sizes": (1, 4), "repeats": 2}
FULL = {"dtypes": ("float16", "bfloat16"), "batch_sizes": (8, 32, 128), "repeats": 5}


def write_teachers(work: Path, small: bool) -> Iterator[tuple[str, TeacherConfig]]:
    """The teachers, written as they are asked for."""
    if small:
        yield "demo", TeacherConfig(path=str(REPO / "pipeline" / "demo" / "teacher"))
        yield "random", TeacherConfig(path=str(write_random_teacher(work / "random")))
        return
    yield "adm_256", TeacherConfig(path=str(write_adm(work)[0]))
    yield "sd_1_4", TeacherConfig(path=str(write_sd(work)[0]), options={"text_embedding": "text.safetensors"})


def peak_tflops(dtype: str, device: str, side: int) -> float:
    """TFLOP/s of the fastest of five products of two square matrices."""
    one, other = torch.randn(2, side, side, device=device, dtype=getattr(torch, dtype)).unbind()
    torch.mm(one, other)
    return 2 * side**3 / min(seconds_of(lambda: torch.mm(one, other)) for _ in range(5)) / 1e12


@dataclass(frozen=True)
class Reference:
    """One image in float32, uncompiled: what the others are held against."""

    features: dict[str, Tensor]
    flops: int


def measure_batch(case: Case, flops: int, repeats: int, peak: float) -> dict[str, Any]:
    """Speed and memory of one batch size; the first pass, in which torch compiles, does not count."""
    on_gpu = torch.cuda.is_available()
    first_s = seconds_of(case.run)
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    seconds = statistics.median(seconds_of(case.run) for _ in range(repeats))
    return {
        "first_s": round(first_s, 2),
        "img_s": round(len(case.images) / seconds, 2),
        "tflop_s": round(flops / seconds / 1e12, 3),
        "share_of_peak": round(flops / seconds / 1e12 / peak, 4),
        "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else None,
    }


def measure(name: str, config: TeacherConfig, args: argparse.Namespace) -> dict[str, Any]:
    """All dtypes, with and without torch.compile, by batch size until memory ends."""
    case = make_case(config, 1, args.timestep, args.device)
    reference = Reference({level: values.cpu() for level, values in case.run().items()}, flops_of(case.run))
    del case
    results: dict[str, Any] = {}
    for dtype in args.dtypes:
        peak = peak_tflops(dtype, args.device, args.peak_side)
        for compiled in (False, True):
            options = {**config.options, **({"compile": True} if compiled else {})}
            settings = config.model_copy(update={"dtype": dtype, "options": options})
            row = results[f"{dtype}{', compiled' if compiled else ''}"] = {"matrix_product_tflop_s": round(peak, 2)}
            row |= by_batch_size(settings, args, reference, peak)
            print(name, dtype, compiled, row, file=sys.stderr, flush=True)
    return results


def by_batch_size(
    settings: TeacherConfig, args: argparse.Namespace, reference: Reference, peak: float
) -> dict[str, Any]:
    """Error of one image, and speed of each batch size; a compiled teacher takes one size only, so each size loads."""
    one = make_case(settings, 1, args.timestep, args.device).run()
    errors = relative_errors({level: values.cpu() for level, values in one.items()}, reference.features)
    rows: dict[str, Any] = {"relative_rms_error": errors}
    for batch_size in args.batch_sizes:
        case = make_case(settings, batch_size, args.timestep, args.device)
        try:
            rows[f"batch {batch_size}"] = measure_batch(case, batch_size * reference.flops, args.repeats, peak)
        except torch.OutOfMemoryError:
            rows[f"batch {batch_size}"] = "out of memory"
            break
    return rows


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="small teachers and batches")
    parser.add_argument("--dtypes", type=lambda text: tuple(text.split(",")))
    parser.add_argument("--batch-sizes", type=lambda text: tuple(map(int, text.split(","))))
    parser.add_argument("--repeats", type=int)
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmark-full-size", help="checkpoints")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "gpu_teachers.json")
    args = parser.parse_args()
    args.device = pick_device(args.device)
    args.peak_side = 512 if args.small else 8192
    for name, value in (SMALL if args.small else FULL).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    return args


def main() -> int:
    """Measure both teachers; results are written after each."""
    args = parse()
    args.work.mkdir(parents=True, exist_ok=True)
    results, digests = {}, {}
    for name, config in write_teachers(args.work, args.small):
        digests[name] = teacher_digest(config.path, config.options)
        results[name] = measure(name, config, args)
        settings = {key: value for key, value in vars(args).items() if key not in ("work", "out_json")}
        publish("gpu_teachers", {"settings": settings, "teachers": results}, args.out_json, digests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
