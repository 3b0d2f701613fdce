"""`dtpipe interpret`: a head that reads labels off a teacher's features."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dtpipe.manifests.words import count_of
from dtpipe.pipeline.cli.console import ProgressLine, format_bytes, format_seconds, speed
from dtpipe.pipeline.cli.options import Call, Flag, settings_command

if TYPE_CHECKING:
    from dtpipe.distill.engine.progress import TrainProgress
    from dtpipe.pipeline.interpret.plan import InterpretPlan
    from dtpipe.pipeline.interpret.run import InterpretResult

FLAGS = (
    Flag("features", "interpret.features", "FEATURES"),
    Flag("--images", "interpret.images", "URL|NAME:ROOT@SPLIT", aliases=("--labels",)),
    Flag("--masks", "interpret.masks", "URL"),
    Flag("--foreground", "interpret.foreground"),
    Flag("--ignore-value", "interpret.ignore_value", "0..255|null"),
    Flag("--class-names", "interpret.class_names", "FILE"),
    Flag("--keys", "interpret.keys", "FILE"),
    Flag("--test-images", "interpret.test_images", "URL|NAME:ROOT@SPLIT", aliases=("--test-labels",)),
    Flag("--test-masks", "interpret.test_masks", "URL"),
    Flag("--test-share", "interpret.test_share", "SHARE"),
    Flag("--labelled", "interpret.labelled", "N"),
    Flag("--out", "interpret.run.out", "DIR"),
    Flag("--levels", "interpret.levels", "L,L"),
    Flag("--together", "interpret.together"),
    Flag("--flip", "interpret.flip", "auto|always|never"),
    Flag("--teacher", "interpret.teacher", "PATH|NAME"),
    Flag("--epochs", "interpret.epochs", "N"),
    Flag("--batch-size", "interpret.batch_size", "N"),
    Flag("--lr", "interpret.lr", "LR"),
    Flag("--width", "interpret.width", "N"),
    Flag("--pixel-models", "interpret.rivals.pixel_models", "N"),
    Flag("--limit", "interpret.limit", "N"),
    Flag("--seed", "interpret.seed", "N"),
    Flag("--device", "interpret.run.device", "auto|cpu|cuda|mps"),
)
EXAMPLE = """
dtpipe interpret features/ --labels scenes/images --masks scenes/semantic --out head/
dtpipe interpret features/ --labels ddpm-seg:cat_15@train --test-labels ddpm-seg:cat_15@test --out head/
dtpipe interpret features/ --labels photos/ --labelled 40 --out head/ -n
"""


@settings_command("interpret", FLAGS, EXAMPLE, whole="the checkpoint of --out is whole; run the same command to go on")
def command(call: Call) -> None:
    """Train an interpreter: from a teacher's features to labels, with few labelled images.

    Features of labelled images come from the dataset where it holds them, under any key, else from its teacher. Scored
    on held-out images beside a linear read-out of the same features and an ensemble of pixel classifiers. Run it again
    after a crash: it goes on.
    """
    config = call.settings("interpret")
    if call.dry_run:
        from dtpipe.pipeline.interpret.plan import plan_interpreter

        plan = plan_interpreter(config, call.console.note)
        _print_plan(call, plan)
        call.console.document(plan)
        return
    with ProgressLine("interpret") as line:
        from dtpipe.pipeline.interpret.run import interpret

        result = interpret(config, call.console.note, lambda progress: _show(line, progress))
    _print_result(call, result)
    call.console.document(result.to_json())


def _print_plan(call: Call, plan: InterpretPlan) -> None:
    found = f"{plan.num_by_key} in the dataset by key, {plan.num_by_content} by content"
    call.console.pairs(
        {
            "images": f"{plan.num_labelled} to learn from, {plan.num_held_out} held out",
            "features": f"{found}, {plan.num_live} from the teacher; {format_bytes(plan.feature_bytes)} to learn from",
            "reads": f"{', '.join(plan.levels)}, {count_of(plan.num_views, 'view')} at once",
            "mirrored": "yes" if plan.flips else "no",
            "parameters": f"{plan.num_parameters:,}",
            "training": f"about {format_seconds(plan.train_s)} for {count_of(plan.num_steps, 'step')} ({plan.device})",
            "reading": f"about {format_seconds(plan.read_s)} for all features, stored or encoded",
            **_rivals_line(plan),
        }
    )


def _rivals_line(plan: InterpretPlan) -> dict[str, str]:
    if plan.rivals_s is None:
        return {}
    least, most = map(format_seconds, plan.rivals_s)
    return {"rivals": f"pixel classifiers {least} to {most}, by when they stop"}


def _print_result(call: Call, result: InterpretResult) -> None:
    """The scores, and those of each class."""
    arms, console = result.arms, call.console
    rows = [(result.measure, *(f"{arm.value:.4f}" for arm in arms))]
    others = dict.fromkeys(name for arm in arms for name in arm.others)
    rows += [(name, *(_shown(arm.others.get(name)) for arm in arms)) for name in others]
    rows += [(name, *(_shown(arm.by_class[name]) for arm in arms)) for name in result.classes]
    console.result(
        f"held out: {count_of(result.num_held_out, 'image')}; learned from: {count_of(result.num_labelled, 'image')}"
    )
    console.table(["", *(arm.name for arm in arms)], rows)
    if result.pictures:
        console.result(f"pictures: {result.pictures[0].parent}")
    console.result(f"wrote {result.out}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _show(line: ProgressLine, progress: TrainProgress) -> None:
    losses = f"loss {progress.losses['loss']:.4f}  lr {progress.lr:.2e}"
    line.update(progress.step, progress.num_steps, f"{speed(progress)}  {losses}")
