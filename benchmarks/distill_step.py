"""What a training step costs from cached features: against a loop on tensors in memory, and against the live teacher.

All take the same steps (model, loss, optimiser, batch size) in turns in one run, so ratios hold on a noisy machine:

- bare:   forward and backward pass of the student alone, on images in memory: what no training can do without.
- network: the same of student and regressor.
- memory: batches that lie on the device already. No pipeline is faster; `cached` less this is the wait for data.
- cached: the feature dataset, as `dtpipe distill` reads it.
- int8, zstd, rans: the same from datasets whose features are coded: a byte a value, or at 3 % error under either coder.
- live:   every sample encoded anew by the teacher, as the paper does it in each step of each experiment.

The first teacher's steps from memory are also taken with other settings of `distill.run`, beside how far the loss of
one batch is then from its own:

- contiguous: channels_last=false.
- compiled:   compile=true; needs a C++ compiler on the CPU, and some minutes.

Also how many images a second the stream alone delivers, by form: how fast a student it could feed.

    python benchmarks/distill_step.py [--teacher NAME=PATH ..] [--student resnet10t] [--batch-size 32] [--out-json FILE]

On a GPU, with a teacher and a student of the size people use:

    python benchmarks/distill_step.py --teacher adm_256=256x256_diffusion_uncond.pt --px 256 --student resnet50 \\
        --batch-size 64
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import sys
import time
from collections.abc import Generator, Iterator, Mapping
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from common import REPO, RESULTS, publish, refuse_to_lose, teacher_digest
from torch import nn

from dtpipe.distill.config import DistillConfig, DistillRun, StudentConfig
from dtpipe.distill.engine.device import autocast
from dtpipe.distill.engine.loop import Loop
from dtpipe.distill.stream.batch import FeatureBatch, student_images
from dtpipe.distill.stream.data import OpenedData, open_data
from dtpipe.distill.stream.order import StreamPosition
from dtpipe.distill.trainer import Distillation
from dtpipe.extract.config import CodecConfig, ExtractConfig, ExtractRun, NoiseConfig, TeacherConfig, TransformConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.run import run_extraction
from dtpipe.extract.tally import ExtractResult
from dtpipe.pipeline.demo.scenes import write_scenes
from dtpipe.pipeline.live.teacher import open_live

OPTIONS = {"contiguous": {"channels_last": False}, "compiled": {"compile": True}}
FORMS = {
    "int8": CodecConfig(name="int8"),
    "zstd": CodecConfig(max_error=0.03),
    "rans": CodecConfig(max_error=0.03, coder="rans"),
}
PREFETCHED = 8  # steps at the start of a turn that reading ahead has prepared; not counted


def extracted(out: Path, path: str, args: argparse.Namespace, codec: CodecConfig) -> ExtractResult:
    """A feature dataset of digit scenes by one teacher."""
    if not (out.parent / "scenes").exists():
        write_scenes(out.parent / "scenes", args.num_images, seed=0, px=64, part="train")
    noise = NoiseConfig(timesteps=(args.timestep,), flips=True)
    config = ExtractConfig(
        images=str(out.parent / "scenes" / "images"),
        teacher=TeacherConfig(path=path),
        transform=TransformConfig(px=args.px),
        noise=noise,
        codec=codec,
        threads=args.threads,
        run=ExtractRun(out=str(out), inline=True, device=args.device),
    )
    return run_extraction(config)


def trainer_of(config: DistillConfig, data: OpenedData, device: torch.device, live: bool) -> Distillation:
    """A trainer as `dtpipe distill` makes one."""
    torch.manual_seed(0)
    teacher = open_live({}, data.source, device) if live else None
    return Distillation(config.model_copy(update={"reencode": float(live)}), data, device, teacher)


def from_memory(trainer: Distillation) -> Distillation:
    """The same trainer on batches that are read before it starts and lie on the device."""
    batches = list(islice(trainer.stream.batches(StreamPosition()), trainer.stream.batches_per_epoch))

    def again(_start: StreamPosition) -> Iterator[FeatureBatch]:
        return cycle(batches)

    trainer.stream.batches = again  # type: ignore[assignment, method-assign]
    return trainer


def passes(trainer: Distillation, part: nn.Module) -> Generator[FeatureBatch, None, None]:
    """Forward and backward passes of a part of the model, by the trainer's batches."""
    for batch in trainer.batches(0):
        images = student_images(batch.images, trainer.image_px)
        with autocast(trainer.course.precision, trainer.device):
            outputs = part(images) if part is trainer.model.student else part(images, batch.timesteps)
        levels = outputs.values() if isinstance(outputs, dict) else outputs
        torch.stack([level.float().mean() for level in levels]).sum().backward()  # type: ignore[no-untyped-call]
        part.zero_grad(set_to_none=True)
        yield batch


def loss_of(trainer: Distillation) -> float:
    """Of the first batch, which changes nothing."""
    state = {name: values.clone() for name, values in trainer.model.state_dict().items()}
    loss = float(trainer.losses(next(iter(trainer.batches(0))))["loss"].detach())
    trainer.model.load_state_dict(state)
    return loss


def seconds_per_step(steps: Generator[FeatureBatch, None, None], device: torch.device, num: int, skipped: int) -> float:
    """Wall clock of one step over `num` of them, after some that are not counted."""
    for _ in islice(steps, skipped):
        pass
    wait(device)
    started = time.perf_counter()
    for _ in islice(steps, num):
        pass
    wait(device)
    return (time.perf_counter() - started) / num


def wait(device: torch.device) -> None:
    """Until the device has done what is queued."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def stream_rate(trainer: Distillation, seconds: float) -> float:
    """Images per second that the stream alone delivers on the device."""
    batches = trainer.stream.batches(StreamPosition())
    next(batches)
    num, started = 0, time.perf_counter()
    while time.perf_counter() - started < seconds:
        num += len(next(batches).keys)
    wait(trainer.device)
    rate = num / (time.perf_counter() - started)
    batches.close()  # type: ignore[attr-defined]
    return rate


def measure(
    name: str, path: str, args: argparse.Namespace, options: Mapping[str, Mapping[str, bool]]
) -> dict[str, Any]:
    """All figures of one teacher; `options`: settings of `distill.run` to take steps with."""
    device = torch.device("cuda", torch.cuda.current_device()) if args.device == "cuda" else torch.device("cpu")
    out = args.work / name
    shutil.rmtree(out, ignore_errors=True)
    codecs = {"cached": CodecConfig(), **{form: FORMS[form] for form in args.forms}}
    stored = {form: extracted(out / form, path, args, codec) for form, codec in codecs.items()}
    config = DistillConfig(
        datasets=(stored["cached"].url,),
        student=StudentConfig(name=args.student),
        epochs=100_000,
        batch_size=args.batch_size,
        run=DistillRun(out=str(out / "run"), read_threads=args.read_threads, device=args.device),
    )
    data = open_data(config)
    make = partial(trainer_of, config, data, device)

    def of_form(form: str) -> Distillation:
        changed = config.model_copy(update={"datasets": (stored[form].url,)})
        return trainer_of(changed, open_data(changed), device, live=False)

    rates = {form: stream_rate(of_form(form), seconds=5) for form in stored}
    trainers = {"memory": from_memory(make(False)), "live": make(True), **{form: of_form(form) for form in stored}}
    plain_loss = loss_of(trainers["memory"])
    away = {}
    for option, changes in options.items():
        changed = config.model_copy(update={"run": config.run.model_copy(update=changes)})
        trainers[option] = from_memory(trainer_of(changed, data, device, live=False))
        away[option] = abs(loss_of(trainers[option]) / plain_loss - 1)
    bare = from_memory(make(False))
    turns = {"bare": passes(bare, bare.model.student), "network": passes(bare, bare.network)}
    turns |= {way: Loop(trainer).steps() for way, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {way: [] for way in turns}
    for _ in range(args.repeats):
        for way, steps in turns.items():
            skipped = PREFETCHED if way in ("live", *stored) else 1
            num = args.steps if way != "live" else args.live_steps
            seconds[way].append(seconds_per_step(steps, device, num, skipped))
    for steps in turns.values():
        steps.close()

    def over(way: str, other: str) -> float:
        return round(statistics.median(w / o for w, o in zip(seconds[way], seconds[other], strict=True)), 4)

    median = {way: statistics.median(values) for way, values in seconds.items()}
    found = {
        "levels": {level.name: [level.channels, level.height, level.width] for level in data.source.levels},
        "image_px": list(data.student_px),
        "cached_over_memory": over("cached", "memory"),
        "live_over_cached": over("live", "cached"),
        "network_over_bare": over("network", "bare"),
        "memory_over_network": over("memory", "network"),
        "cached_over_bare": over("cached", "bare"),
        "options_over_memory": {option: over(option, "memory") for option in options},
        "options_loss_away": {option: float(f"{value:.2e}") for option, value in away.items()},
        "seconds_per_step": {way: round(value, 4) for way, value in median.items()},
        "img_s": {way: round(args.batch_size / value, 1) for way, value in median.items()},
        "shares_cached": {what: round(value, 4) for what, value in shares_of(trainers["cached"]).items()},
        "stream_alone_img_s": round(rates["cached"], 1),
        "stream_alone_mb_s": round(rates["cached"] * bytes_per_sample(data) / 1e6, 1),
        "forms": {
            form: {
                "stored_bytes_per_row": round(at.size_bytes / at.num_rows),
                "over_memory": over(form, "memory"),
                "stream_alone_img_s": round(rates[form], 1),
            }
            for form, at in stored.items()
        },
    }
    print(f"{name}: {found}", file=sys.stderr, flush=True)
    return found


def shares_of(trainer: Distillation) -> dict[str, float]:
    """Seconds of a trainer by activity as shares, without the wait for its turn."""
    seconds = {what: value for what, value in trainer.watch.seconds().items() if what != "data"}
    total = sum(seconds.values())
    return {what: value / total for what, value in seconds.items()}


def bytes_per_sample(data: OpenedData) -> int:
    """Bytes of an image and its levels, one view, as they lie in memory."""
    height, width = data.source.image_px
    return 3 * height * width + sum(2 * level.channels * level.height * level.width for level in data.source.levels)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", action="append", metavar="NAME=PATH", help="default: the demo's and the flowers'")
    parser.add_argument("--student", default="resnet10t")
    parser.add_argument("--px", type=int, default=64, help="images of teacher and student")
    parser.add_argument("--num-images", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--timestep", type=int, default=50)
    parser.add_argument("--steps", type=int, default=10, help="steps per turn")
    parser.add_argument("--live-steps", type=int, default=5, help="steps per turn with the live teacher")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each")
    parser.add_argument(
        "--options", action=argparse.BooleanOptionalAction, default=True, help="measure settings of run"
    )
    parser.add_argument("--forms", nargs="*", choices=FORMS, default=list(FORMS), help="coded features to read as well")
    parser.add_argument("--read-threads", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2, help="CPU threads")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto")
    parser.add_argument("--work", type=Path, default=REPO / "runs" / "benchmark-distill-step")
    parser.add_argument("--out-json", type=Path, default=RESULTS / "distill_step.json")
    return parser.parse_args()


def main() -> int:
    """Measure every teacher and write one JSON document."""
    args = parse()
    args.device = pick_device(args.device)
    torch.set_num_threads(args.threads)
    default = [
        f"demo={REPO / 'pipeline' / 'demo' / 'teacher'}",
        f"flowers64={REPO / 'benchmarks' / 'weights' / 'flowers64'}",
    ]
    named = [each.partition("=")[::2] for each in args.teacher or default]
    refuse_to_lose("distill_step", args.out_json, "teachers", [name for name, _ in named])
    options = OPTIONS if args.options else {}
    teachers = {name: measure(name, path, args, {} if idx else options) for idx, (name, path) in enumerate(named)}
    settings = {key: value for key, value in vars(args).items() if key not in ("teacher", "work", "out_json")}
    digests = {name: teacher_digest(path) for name, path in named}
    publish("distill_step", {"settings": settings, "teachers": teachers}, args.out_json, digests)
    return 0


if __name__ == "__main__":
    sys.exit(main())
