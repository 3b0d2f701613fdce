"""What stopping at the last tap saves, and what low precision costs: a tapped forward pass against the whole one.

Both passes read the same taps with the same hooks; the whole one just goes on to the end, as a plain hook script does.
They alternate in one run, and the figures are ratios: operations (counted by torch) and median seconds. A teacher that
makes its own images needs the whole pass, so its ratio is 1. float16 and bfloat16 are compared with float32 features of
the same images. On a GPU the share of the chip's peak is given too, when --peak-tflops says what that is.

    python benchmarks/teacher_forward.py --teacher demo=pipeline/demo/teacher [--teacher NAME=PATH ..] [--out-json FILE]

The full-size ones have random weights, as benchmarks/full_size.py leaves them under runs/benchmark-full-size/:

    python benchmarks/teacher_forward.py --batch-size 1 --repeats 2 --teacher demo=pipeline/demo/teacher \\
        --teacher adm_256=runs/benchmark-full-size/256x256_diffusion_uncond.pt \\
        --teacher sd_1_4=runs/benchmark-full-size/sd14 --options 'sd_1_4={"text_embedding": "text.safetensors"}'
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from common import REPO, RESULTS, publish, refuse_to_lose, teacher_digest
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from dtpipe.extract.config import ExtractRecipeConfig, NoiseConfig, TeacherConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.noise import row_noise
from dtpipe.extract.recipe import make_views
from dtpipe.extract.teachers.base import Generator, Teacher
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.extract.teachers.taps import TapReader

LOW_PRECISION = ("float16", "bfloat16")


@dataclass(frozen=True)
class Case:
    """One loaded teacher with one batch that never changes."""

    teacher: Teacher
    images: Tensor  # (B, 3, H, W) in [-1, 1]
    noise: Mapping[str, Tensor]  # (B, V, *shape)
    views: tuple[Any, ...]

    def run(self) -> dict[str, Tensor]:
        """Features of the batch: {level: (B, ...)}."""
        with torch.inference_mode():
            if isinstance(self.teacher, Generator):
                return self.teacher.synthesize({name: each[:, 0] for name, each in self.noise.items()})[1]
            return self.teacher.encode(self.images, self.noise, self.views)

    def run_whole(self) -> dict[str, Tensor]:
        """The same, with the forward pass run to its end."""
        read = TapReader.read

        def to_the_end(self: TapReader, forward: Callable[[], object], **_: object) -> dict[str, Tensor]:
            return read(self, forward, stop_early=False)

        with patch.object(TapReader, "read", to_the_end):
            return self.run()


def make_case(config: TeacherConfig, batch_size: int, timestep: int, device: str) -> Case:
    """Load a teacher and draw its inputs."""
    teacher = load_teacher(config, device)
    settings = ExtractRecipeConfig(images="-", teacher=config, noise=NoiseConfig(timesteps=(timestep,)))
    views = make_views(settings, teacher.spec)
    height, width = teacher.spec.image_px
    rng = np.random.Generator(np.random.Philox(0))
    smooth = torch.from_numpy(rng.standard_normal((batch_size, 3, height // 8, width // 8), np.float32))
    images = torch.nn.functional.interpolate(smooth, size=(height, width), mode="bicubic").clamp(-1, 1)
    rows = [row_noise(0, f"{idx}", views, teacher.spec.noise_shapes, (height, width)) for idx in range(batch_size)]
    noise = {
        name: torch.from_numpy(np.stack([row[name] for row in rows])).to(device) for name in teacher.spec.noise_shapes
    }
    return Case(teacher, images.to(device), noise, views)


def seconds_of(run: Callable[[], object]) -> float:
    """Wall clock of one call, the device waited for."""
    started = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def flops_of(run: Callable[[], object]) -> int:
    """Operations of one call, two per multiply-add, as torch counts convolutions, products and attention."""
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def relative_errors(found: Mapping[str, Tensor], exact: Mapping[str, Tensor]) -> dict[str, float]:
    """By level: root of the mean squared difference, over that of the float32 features."""
    errors = {}
    for name, wanted in exact.items():
        reference = wanted.double()
        errors[name] = float(
            (found[name].double() - reference).square().mean().sqrt() / reference.square().mean().sqrt()
        )
    return errors


def measure(name: str, path: str, args: argparse.Namespace) -> dict[str, Any]:
    """All figures of one teacher."""
    config = TeacherConfig(path=path, options=args.options.get(name, {}))
    case = make_case(config, args.batch_size, args.timestep, args.device)
    exact = {level: each.cpu() for level, each in case.run().items()}  # warm-up too
    case.run_whole()
    pairs = [(seconds_of(case.run), seconds_of(case.run_whole)) for _ in range(args.repeats)]
    tapped_s, whole_s = (statistics.median(each) for each in zip(*pairs, strict=True))
    tapped_flops, whole_flops = flops_of(case.run), flops_of(case.run_whole)
    found: dict[str, Any] = {
        "kind": case.teacher.spec.kind,
        "image_px": case.teacher.spec.image_px,
        "levels": {level.name: level.channels for level in case.teacher.spec.levels},
        "flops_ratio": round(tapped_flops / whole_flops, 4),
        "seconds_ratio": round(statistics.median(one / other for one, other in pairs), 4),
        "gflop_per_image": round(tapped_flops / args.batch_size / 1e9, 3),
        "gflop_per_s": round(tapped_flops / tapped_s / 1e9, 1),
        "whole_s": round(whole_s, 4),
        "tapped_s": round(tapped_s, 4),
    }
    if args.peak_tflops:
        found["share_of_peak"] = round(tapped_flops / tapped_s / 1e12 / args.peak_tflops, 4)
    del case
    for dtype in LOW_PRECISION if tapped_s < args.low_precision_s else ():
        low = make_case(config.model_copy(update={"dtype": dtype}), args.batch_size, args.timestep, args.device)
        errors = relative_errors({level: each.cpu() for level, each in low.run().items()}, exact)
        found[dtype] = {
            "relative_rms_error": errors,
            "seconds_ratio_to_float32": round(seconds_of(low.run) / tapped_s, 4),
        }
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", action="append", metavar="NAME=PATH", help="a teacher to measure; default: the demo's"
    )
    parser.add_argument(
        "--options", action="append", default=[], metavar="NAME=JSON", help="options of that teacher's family"
    )
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--low-precision-s",
        type=float,
        default=2.0,
        help="leave low precision out where a float32 pass takes longer: CPUs are slow at it",
    )
    parser.add_argument("--peak-tflops", type=float, help="the device's peak at the teacher's precision")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "teacher_forward.json")
    return parser.parse_args()


def main() -> int:
    """Measure every teacher and write one JSON document."""
    args = parse()
    args.device = pick_device(args.device)
    args.options = {name: json.loads(text) for name, _, text in (each.partition("=") for each in args.options)}
    torch.set_num_threads(args.threads)
    named = [each.partition("=")[::2] for each in args.teacher or [f"demo={REPO / 'pipeline' / 'demo' / 'teacher'}"]]
    refuse_to_lose("teacher_forward", args.out_json, "teachers", [name for name, _ in named])
    teachers = {name: measure(name, path, args) for name, path in named}
    settings = {key: value for key, value in vars(args).items() if key not in ("teacher", "out_json")}
    digests = {name: teacher_digest(path, args.options.get(name)) for name, path in named}
    publish("teacher_forward", {"settings": settings, "teachers": teachers}, args.out_json, digests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
