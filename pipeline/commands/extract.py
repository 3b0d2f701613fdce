"""`dtpipe extract`: images and a teacher in, a feature dataset out."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtpipe.extract.shards.advice import share_text
from dtpipe.extract.shards.timeline import Stalls
from dtpipe.extract.sources.names import ignored_text
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import Console, ProgressLine, format_bytes, format_seconds
from dtpipe.pipeline.cli.options import Call, Flag, command_line, settings_command
from dtpipe.pipeline.init.write import PAPER_BATCH, batch_size_for, lr_for

if TYPE_CHECKING:
    from dtpipe.extract.config import ExtractConfig
    from dtpipe.extract.shards.progress import Progress
    from dtpipe.extract.tally import ExtractResult
    from dtpipe.pipeline.plan.extraction import ExtractionPlan
    from dtpipe.pipeline.soft_labels.request import LabelRequest

FLAGS = (
    Flag("--images", "extract.images", "URL"),
    Flag("--num-samples", "extract.num_samples", "N"),
    Flag("--save-png", "extract.run.save_png", "DIR"),
    Flag("--teacher", "extract.teacher.path", "PATH|NAME"),
    Flag("--interpreter", "soft_labels.interpreter", "DIR"),
    Flag("--from", "soft_labels.features", "URL"),
    Flag("--stride", "soft_labels.stride", "PX"),
    Flag("--top-k", "soft_labels.top_k", "K"),
    Flag("--keep-features", "soft_labels.keep_features", "URL"),
    Flag("--out", "extract.run.out", "URL"),
    Flag("--revision", "extract.teacher.revision", "COMMIT"),
    Flag("--untrained", "extract.teacher.untrained", "SEED"),
    Flag("--px", "extract.transform.px", "PX"),
    Flag("--resize", "extract.transform.resize", "center_crop|stretch|none"),
    Flag("--student-px", "extract.student_px", "PX"),
    Flag("--timesteps", "extract.noise.timesteps", "T,T"),
    Flag("--draws", "extract.noise.draws", "K"),
    Flag("--flips", "extract.noise.flips"),
    Flag("--max-error", "extract.codec.max_error", "SHARE"),
    Flag("--budget", "extract.codec.budget", "SIZE"),
    Flag("--format", "extract.shard.format", "zarr|webdataset"),
    Flag("--batch-size", "extract.batch_size", "N"),
    Flag("--lower-batch-to", "extract.run.lower_batch_to", "N"),
    Flag("--limit", "extract.limit", "N"),
    Flag("--keys", "extract.keys", "FILE"),
    Flag("--max-bad", "extract.run.max_bad", "N|SHARE"),
    Flag("--device", "extract.run.device", "auto|cpu|cuda|mps"),
    Flag("--inline", "extract.run.inline"),
    Flag("--workers", "extract.run.workers", "N"),
    Flag("--ray-address", "extract.run.ray_address", "ADDRESS"),
)
EXAMPLE = """
dtpipe extract --images photos/ --teacher teacher/ --out features/
dtpipe extract --num-samples 50000 --teacher network-snapshot.pkl --out features/ --save-png images/
dtpipe extract -c imagenet_r50 --images s3://bucket/imagenet/train --out s3://bucket/features
dtpipe extract --interpreter head/ --from features/ --out labels/
"""
_SHOWN_BAD, _SHOWN_SHARES = 10, 2


@settings_command(
    "extract",
    FLAGS,
    EXAMPLE,
    switches={"--fresh": "Refuse to start when the output holds anything; default: go on where it stopped."},
)
def command(call: Call, fresh: bool) -> None:
    """Run a teacher over images and write a feature dataset.

    Runs on the GPUs there are, or on a Ray cluster. Run it again after a crash: committed shards are kept. With
    --interpreter, its soft labels are written: of the features of --from, or of a teacher that runs now.
    """
    if call.dry_run:
        from dtpipe.pipeline.plan.extraction import print_extraction
        from dtpipe.pipeline.plan.prices import print_prices

        plan = _plan(call)
        print_extraction(call.console, plan)
        if not call.has("soft_labels"):
            print_prices(call.console, plan.comparison, call.settings("plan"))
        call.console.document(plan)
        return
    result = extracted(call, fresh)
    _print_result(call.console, result, _next(call, result))


def extracted(call: Call, fresh: bool) -> ExtractResult:
    """What the command does, without what it prints of the result. Raises: as `run_extraction`."""
    if call.has("soft_labels"):
        return _extract_labels(call, fresh)
    config = call.settings("extract")
    _say_before(call, config)
    return _extract(call, config, fresh)


def _plan(call: Call) -> ExtractionPlan:
    if call.has("soft_labels"):
        return _request(call).plan(call.console.note)
    from dtpipe.pipeline.plan.extraction import plan_extraction

    config = call.settings("extract")
    _say_before(call, config)
    return plan_extraction(config, call.settings("plan"))


def _next(call: Call, result: ExtractResult) -> str:
    """The command to run on what was written."""
    if call.has("soft_labels"):
        features = _request(call).features
        data = f"{features} {result.url} --join" if features else result.url
    else:
        joined = call.settings("extract").shard.images == "joined"
        data = f"{result.url} DATASET_WITH_IMAGES --join" if joined else result.url
    batch_size = batch_size_for(result.num_ok)
    few = "" if batch_size == PAPER_BATCH else f" --batch-size {batch_size} --lr {lr_for(batch_size):g}"
    return f"dtpipe distill {data} --student resnet50 --out runs/first{few}"


def _say_before(call: Call, config: ExtractConfig) -> None:
    """What is to be known of the settings, or refused, before anything is read."""
    if config.teacher.untrained is not None:
        call.console.note(
            f"{config.teacher.path} is used UNTRAINED, with new weights from seed {config.teacher.untrained}"
        )
    if config.run.save_png is not None:
        from dtpipe.pipeline.save_images import refuse_other_place

        refuse_other_place(config.run.save_png, config.images, config.run.out)


def _extract(call: Call, config: ExtractConfig, fresh: bool) -> ExtractResult:
    """Features, and their images as files."""
    from dtpipe.extract.run import run_extraction

    with ProgressLine("extract") as line:
        result = run_extraction(config, ProgressText(line), fresh, command_line())
    _save_png(call, config.run.save_png, result.url)
    return result


def _save_png(call: Call, folder: str | None, url: str) -> None:
    if folder is not None:
        from dtpipe.pipeline.save_images import save_images

        call.console.note(f"wrote {count_of(save_images(url, folder), 'image')} to {folder}")


def _request(call: Call) -> LabelRequest:
    """What to make soft labels of, said and checked."""
    from dtpipe.pipeline.soft_labels.request import request_of

    request = request_of(call.document, call.names)
    if request.live is not None:
        _say_before(call, request.live)
    return request


def _extract_labels(call: Call, fresh: bool) -> ExtractResult:
    """Soft labels of features that are stored, are made first and kept, or are made and not kept."""
    from dtpipe.extract.run import run_work

    request = _request(call)
    if request.features_first is not None:
        features = _extract(call, request.features_first, fresh)
        call.console.note(f"features are in {features.url}")
    with ProgressLine("labels") as line:
        progress = ProgressText(line)
        result = run_work(request.run, request.resolve, request.record, progress, fresh, command_line())
    _save_png(call, request.run.save_png, result.url)
    return result


class ProgressText:
    """Turns an extraction's progress into one line; events get a line of their own."""

    def __init__(self, line: ProgressLine) -> None:
        self._line = line

    def __call__(self, progress: Progress) -> None:
        if progress.message:
            self._line.event(progress.message)
        eta = format_seconds(progress.eta_s) if progress.eta_s is not None else "?"
        shares = sum(progress.stalls.values(), Stalls()).shares()
        text = (
            f"{progress.throughput_img_s:.1f} img/s  ETA {eta}  {progress.throughput_mb_s:.1f} MB/s  "
            f"{progress.num_bad} bad  {count_of(progress.workers, 'worker')}  "
            f"{progress.shards_done}/{count_of(progress.shards_total, 'shard')}  {share_text(shares, _SHOWN_SHARES)}"
        )
        self._line.update(_shown_done(progress), progress.samples_total, text.rstrip())


def _shown_done(progress: Progress) -> int:
    """Samples that are encoded; the last one counts when all are written."""
    written = progress.shards_done == progress.shards_total
    return progress.samples_done if written else min(progress.samples_encoded, progress.samples_total - 1)


def _time_rows(result: ExtractResult) -> dict[str, str]:
    """Where the time of the workers went, and what to change."""
    stalls = sum(result.stalls.values(), Stalls())
    if not stalls.spans:
        return {}
    return {"time": share_text(stalls.shares())} | ({} if result.speed is None else {"speed": result.speed})


def _print_result(console: Console, result: ExtractResult, following: str) -> None:
    console.pairs(
        {
            "wrote": result.url,
            "samples": f"{result.num_ok} ok, {result.num_bad} bad, of {result.num_rows}",
            "size": format_bytes(result.size_bytes),
            "digest": result.digest,
            "took": f"{format_seconds(result.seconds)}, {result.throughput_img_s:.1f} img/s",
            **_time_rows(result),
        }
    )
    if len(result.stalls) > 1:
        for name, stalls in result.stalls.items():
            console.result(f"  {name}: {share_text(stalls.shares())}")
    if result.over_budget:
        console.result(result.over_budget)
    if result.ignored:
        console.result(f"ignored: {ignored_text(result.ignored)}")
    if result.float32_error:
        errors = ", ".join(f"{name} {error:.1e}" for name, error in result.float32_error.items())
        console.result(f"against float32, the largest relative error is: {errors}")
    for bad in result.bad[:_SHOWN_BAD]:
        console.result(f"  bad: {bad.key}: {bad.reason}")
    if result.num_bad > _SHOWN_BAD:
        console.result(f"  and {result.num_bad - _SHOWN_BAD} more; `dtpipe inspect {result.url}` lists them")
    console.result(f"next: {following}")
    console.document(result)
