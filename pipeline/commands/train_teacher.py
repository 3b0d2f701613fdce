"""`dtpipe train-teacher`: a DDPM of the user's own domain."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import ProgressLine, format_seconds, speed
from dtpipe.pipeline.cli.options import Call, Flag, settings_command

if TYPE_CHECKING:
    from dtpipe.distill.engine.progress import TrainProgress

FLAGS = (
    Flag("--images", "train_teacher.images", "URL"),
    Flag("--out", "train_teacher.run.out", "DIR"),
    Flag("--px", "train_teacher.px", "PX"),
    Flag("--resize", "train_teacher.resize", "center_crop|stretch|none"),
    Flag("--channels", "train_teacher.channels", "C,C"),
    Flag("--attention-strides", "train_teacher.attention_strides", "S,S"),
    Flag("--class-conditional", "train_teacher.class_conditional"),
    Flag("--init-from", "train_teacher.init_from", "DIR"),
    Flag("--precision", "train_teacher.precision", "float32|bfloat16|float16"),
    Flag("--steps", "train_teacher.run.steps", "N"),
    Flag("--batch-size", "train_teacher.batch_size", "N"),
    Flag("--lr", "train_teacher.lr", "LR"),
    Flag("--max-hours", "train_teacher.run.max_hours", "H"),
    Flag("--dtype", "train_teacher.run.dtype", "float32|float16"),
    Flag("--limit", "train_teacher.limit", "N"),
    Flag("--max-bad", "train_teacher.run.max_bad", "N|SHARE"),
    Flag("--seed", "train_teacher.seed", "N"),
    Flag("--device", "train_teacher.run.device", "auto|cpu|cuda|mps"),
)
EXAMPLE = """
dtpipe train-teacher --images photos/ --out teacher/
dtpipe train-teacher --images photos/ --out teacher/ --px 64 --channels 64,128,128,256 --steps 20000
torchrun --nproc-per-node 8 --no-python dtpipe train-teacher -c adm_teacher --images photos/ --out teacher/
"""


@settings_command(
    "train-teacher",
    FLAGS,
    EXAMPLE,
    dry_run=False,
    whole="the checkpoint of --out is whole; run the same command to go on",
)
def command(call: Call) -> None:
    """Train a small DDPM on your own images.

    Writes a diffusers folder that `dtpipe extract --teacher` takes, and a grid of samples to look at. Run it again to
    go on. Under torchrun, several GPUs share each batch.
    """
    config = call.settings("train_teacher")
    with ProgressLine("train-teacher") as line:
        from dtpipe.pipeline.train_teacher import train_teacher

        result = train_teacher(config, lambda progress: _show(line, progress))
    if result.rank:
        return  # of several processes the first speaks for all
    for reason in result.bad:
        call.console.note(f"left out: {reason}")
    call.console.pairs(
        {
            "wrote": result.out,
            "trained": f"{result.step} of {count_of(result.steps, 'step')} on {count_of(result.num_images, 'image')}",
            "loss": "not reported yet" if result.loss is None else f"{result.loss:.4f}",
            "samples": result.samples,
            "took": format_seconds(result.seconds),
        }
    )
    if result.finished:
        call.console.result(
            f"next: look at {result.samples}, then dtpipe extract --images {config.images} "
            f"--teacher {result.out} --out features/"
        )
    else:
        call.console.result("next: run the same command to go on")
    call.console.document(result)


def _show(line: ProgressLine, progress: TrainProgress) -> None:
    losses = f"loss {progress.losses['loss']:.4f}  lr {progress.lr:.2e}"
    line.update(progress.step, progress.num_steps, f"{speed(progress)}  {losses}")
