"""`dtpipe plan`: what an extraction, the training after it, and training on labels would cost."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from dtpipe.distill.config import DistillRecipeConfig
from dtpipe.manifests.schema import IMAGE
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.pipeline.cli.options import Call, Flag, command_line, settings_command
from dtpipe.pipeline.cli.settings import validate
from dtpipe.pipeline.commands import extract

FLAGS = (
    *extract.FLAGS,
    Flag("--student", "distill.student.name", "TIMM_NAME"),
    Flag("--epochs", "distill.epochs", "N"),
)
EXAMPLE = """
dtpipe plan --images photos/ --teacher teacher/ --out features/
dtpipe plan -c imagenet_r50 --images imagenet/train --out features/
dtpipe plan -c finetune_small -s eval.checkpoint=runs/r50 -s eval.images=labelled/
"""


@settings_command("plan", FLAGS, EXAMPLE, dry_run=False)
def command(call: Call) -> None:
    """Bytes, hours and memory of an extraction, before anything is spent.

    Runs the actual teacher over a few of your images and writes nothing; with --student, also times training steps;
    with --interpreter, makes soft labels of a few of them.
    With settings of `eval` for a task that trains, times that, as `dtpipe eval .. -n` does.
    """
    answer: dict[str, Any] = {}
    if call.has("eval"):
        from dtpipe.pipeline.plan.tuning import plan_tuning, print_tuning

        tuning = plan_tuning(call.settings("eval"), call.console.note)
        print_tuning(call.console, tuning)
        answer["eval"] = tuning
    if call.has("soft_labels"):
        from dtpipe.pipeline.plan.extraction import print_extraction
        from dtpipe.pipeline.soft_labels.request import request_of

        labels = request_of(call.document, call.names).plan(call.console.note)
        print_extraction(call.console, labels)
        if call.has("distill"):
            call.console.note(
                "training is not in this plan; once there are soft labels, `dtpipe distill .. -n` plans it"
            )
        answer["soft_labels"] = labels
    elif call.has("extract") or not answer:
        answer |= plan_stages(call)
        _say_next(call)
    call.console.document(answer)


def _say_next(call: Call) -> None:
    """The same line for `extract`, where that takes all of its flags."""
    before, said = "dtpipe plan ", command_line()
    if said.startswith(before) and not call.has("distill"):
        call.console.result(f"next: dtpipe extract {said.removeprefix(before)}")


def plan_stages(call: Call, batch_size: Callable[[int], int] | None = None) -> dict[str, Any]:
    """The plan of an extraction, and of the distillation after it where there are settings of one.

    batch_size: of the distillation, by the number of samples, in place of the settings'.
    """
    from dtpipe.distill.engine.device import training_device
    from dtpipe.distill.labels.targets import targets_of
    from dtpipe.distill.student.student import check_student_name
    from dtpipe.pipeline.plan.extraction import plan_recipe, print_extraction, store_speed
    from dtpipe.pipeline.plan.prices import print_prices
    from dtpipe.pipeline.plan.training import Reads, compared, print_training, time_training, with_teacher

    config, prices = call.settings("extract"), call.settings("plan")
    if student_name := (call.document.get("distill") or {}).get("student", {}).get("name"):
        check_student_name(str(student_name))  # before the teacher runs
    extraction, recipe = plan_recipe(config, prices)
    print_extraction(call.console, extraction)
    if not call.has("distill"):
        print_prices(call.console, extraction.comparison, prices)
        return {"extract": extraction}
    section = {"datasets": [config.run.out], **call.document["distill"]}
    if batch_size is not None:
        section["batch_size"] = batch_size(extraction.num_samples)
    student = validate({"distill": section}, "distill", call.names, DistillRecipeConfig)
    device = training_device((section.get("run") or {}).get("device", "auto"))
    soft = soft_labels_of(recipe)
    targets = targets_of(student, recipe.levels, {} if soft is None else {soft.level.name: soft.classes})
    reads = Reads(
        sum(array.read_bytes for array in extraction.arrays if array.name in (IMAGE, *targets.names)),
        extraction.decode_s,
        extraction.restore_s,
        store_speed(config.run.out, prices),
    )
    timed = time_training(student, device, targets, recipe.student_px, extraction.num_samples, reads)
    training = with_teacher(timed, student, extraction.teacher_s / extraction.views)
    print_training(call.console, training)
    extraction = replace(extraction, comparison=compared(extraction, timed, student.epochs, prices))
    print_prices(call.console, extraction.comparison, prices)
    if student.reencode == 1:
        call.console.result("distill.reencode is 1: training on the images themselves, nothing needs to be extracted")
    return {"extract": extraction, "distill": training}
