"""`dtpipe extract`: images and a teacher in, a feature dataset out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtpipe.extract.sources.names import ignored_text
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Console, ProgressLine, format_bytes, format_seconds
from dtpipe.pipeline.cli.options import Call, Flag, command_line, settings_command

if TYPE_CHECKING:
    from dtpipe.extract.shards.progress import Progress
    from dtpipe.extract.tally import ExtractResult

FLAGS = (
    Flag("--images", "extract.images", "URL"),
    Flag("--num-samples", "extract.num_samples", "N"),
    Flag("--save-png", "extract.run.save_png", "DIR"),
    Flag("--teacher", "extract.teacher.path", "PATH|NAME"),
    Flag("--out", "extract.run.out", "URL"),
    Flag("--revision", "extract.teacher.revision", "COMMIT"),
    Flag("--untrained", "extract.teacher.untrained", "SEED"),
    Flag("--px", "extract.transform.px", "PX"),
    Flag("--resize", "extract.transform.resize", "center_crop|stretch|none"),
    Flag("--student-px", "extract.student_px", "PX"),
    Flag("--timesteps", "extract.noise.timesteps", "T,T"),
    Flag("--draws", "extract.noise.draws", "K"),
    Flag("--flips", "extract.noise.flips"),
    Flag("--format", "extract.shard.format", "zarr|webdataset"),
    Flag("--batch-size", "extract.batch_size", "N"),
    Flag("--limit", "extract.limit", "N"),
    Flag("--keys", "extract.keys", "FILE"),
    Flag("--max-bad", "extract.run.max_bad", "N|SHARE"),
    Flag("--device", "extract.run.device", "auto|cpu|cuda"),
    Flag("--inline", "extract.run.inline"),
    Flag("--workers", "extract.run.workers", "N"),
    Flag("--ray-address", "extract.run.ray_address", "ADDRESS"),
)
EXAMPLE = """
dtpipe extract --images photos/ --teacher teacher/ --out features/
dtpipe extract --num-samples 50000 --teacher network-snapshot.pkl --out features/ --save-png images/
dtpipe extract -c imagenet_r50 --images s3://bucket/imagenet/train --out s3://bucket/features
"""
_SHOWN_BAD = 10


@settings_command(
    "extract",
    FLAGS,
    EXAMPLE,
    switches={"--fresh": "Refuse to start when the output holds anything; default: go on where it stopped."},
)
def command(call: Call, fresh: bool) -> None:
    """Run a teacher over images and write a feature dataset.

    Runs on the GPUs there are, or on a Ray cluster. Run it again after a crash: committed shards are kept.
    """
    config = call.settings("extract")
    if config.teacher.untrained is not None:
        call.console.note(
            f"{config.teacher.path} is used UNTRAINED, with new weights from seed {config.teacher.untrained}"
        )
    if config.run.save_png is not None:
        from dtpipe.pipeline.save_images import refuse_other_place

        refuse_other_place(config.run.save_png, config.images, config.run.out)
    if call.dry_run:
        from dtpipe.pipeline.plan.extraction import plan_extraction, print_extraction

        plan = plan_extraction(config)
        print_extraction(call.console, plan)
        call.console.document(plan)
        return
    from dtpipe.extract.run import run_extraction

    with ProgressLine("extract") as line:
        result = run_extraction(config, ProgressText(call.console, line), fresh, command_line())
    if config.run.save_png is not None:
        from dtpipe.pipeline.save_images import save_images

        num = save_images(result.url, config.run.save_png)
        call.console.note(f"wrote {count_of(num, 'image')} to {config.run.save_png}")
    _print_result(call.console, result, config.shard.images == "joined")


class ProgressText:
    """Turns an extraction's progress into one line; events get a line of their own."""

    def __init__(self, console: Console, line: ProgressLine) -> None:
        self._console = console
        self._line = line

    def __call__(self, progress: Progress) -> None:
        if progress.message:
            self._line.event(progress.message)
        eta = format_seconds(progress.eta_s) if progress.eta_s is not None else "?"
        text = (
            f"{progress.throughput_img_s:.1f} img/s  {progress.throughput_mb_s:.1f} MB/s  ETA {eta}  "
            f"{progress.num_bad} bad  {count_of(progress.workers, 'worker')}"
        )
        self._line.update(progress.samples_done, progress.samples_total, text)


def _print_result(console: Console, result: ExtractResult, joined: bool) -> None:
    console.pairs(
        {
            "wrote": result.url,
            "samples": f"{result.num_ok} ok, {result.num_bad} bad, of {result.num_rows}",
            "size": format_bytes(result.size_bytes),
            "digest": result.digest,
            "took": f"{format_seconds(result.seconds)}, {result.throughput_img_s:.1f} img/s",
        }
    )
    if result.ignored:
        console.result(f"ignored: {ignored_text(result.ignored)}")
    if result.float32_error:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in result.float32_error.items())
        console.result(f"against float32, the largest relative error is: {errors}")
    for bad in result.bad[:_SHOWN_BAD]:
        console.result(f"  bad: {bad.key}: {bad.reason}")
    if result.num_bad > _SHOWN_BAD:
        console.result(f"  and {result.num_bad - _SHOWN_BAD} more; `dtpipe inspect {result.url}` lists them")
    others = "DATASET_WITH_IMAGES --join " if joined else ""
    console.result(f"next: dtpipe distill {result.url} {others}--student resnet50 --out runs/first")
    console.document(result)
