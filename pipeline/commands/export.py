"""`dtpipe export`: a student in the names of the library that trains it on."""

from __future__ import annotations

from pathlib import Path

from dtpipe.manifests.errors import StoreError
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.cli.options import Call, Flag, settings_command
from dtpipe.pipeline.cli.settings import dump
from dtpipe.pipeline.config import ExportConfig

FLAGS = (
    Flag("checkpoint", "export.checkpoint", "CKPT"),
    Flag("--out", "export.out", "DIR"),
    Flag("--layout", "export.layout", "NAME"),
    Flag("--head", "export.head"),
)
EXAMPLE = """
dtpipe export runs/r50 --out r50/
dtpipe export runs/r50 --out r50-det/ --layout torchvision-detection
dtpipe export runs/r50/eval/segment/distilled-80-0 --head --out predictor/
dtpipe export runs/mix --head --out predictor/
"""


@settings_command("export", FLAGS, EXAMPLE, dry_run=False)
def command(call: Call) -> None:
    """Write a student as timm, torchvision, detectron2, OpenMMLab, transformers or ONNX load it, without dtpipe.

    The file is loaded again and compared with the student before it takes its place. With --head it is a tuned training
    with its head, or a distillation with its decoder of soft labels, for `dtpipe predict`.
    """
    config = call.settings("export")
    if config.head:
        _export_head(call, config)
        return
    from dtpipe.distill.export.write import export_student

    try:
        result = export_student(config.checkpoint, config.out, config.layout)
        write_whole(result.path.parent / "export.yaml", dump(config, "export"))
    except OSError as err:
        raise StoreError(f"{config.out} cannot be written: {err}; choose another --out") from err
    call.console.pairs(
        {
            "wrote": result.path,
            "layout": result.layout,
            "parameters": f"{result.num_parameters:,}",
            "checked": f"loaded again; largest difference {result.max_difference:.1e}",
        }
    )
    if result.untrained:
        call.console.result(f"at initial values: {', '.join(result.untrained)}")
    purpose = "fine-tune it on five classes" if result.snippet == result.finetune else "load it"
    call.console.result(f"to {purpose}:\n\n{result.snippet}")
    if result.finetune not in ("", result.snippet):
        call.console.result(f"to fine-tune it on five classes:\n\n{result.finetune}")
    call.console.document(result)


def _export_head(call: Call, config: ExportConfig) -> None:
    from dtpipe.distill.downstream.tuned.heads.distilled import decoder_of
    from dtpipe.distill.downstream.tuned.run import SCORE_FILE
    from dtpipe.distill.export.predictor import export_predictor

    predictor = export_predictor(config.checkpoint, config.out)
    cell = Path(config.checkpoint)
    scored = ((cell if cell.is_dir() else cell.parent) / SCORE_FILE).is_file()
    if not scored and decoder_of(cell) is None:
        call.console.note(f"{cell}: this training is not finished and scored; its last checkpoint was exported")
    call.console.pairs(
        {
            "wrote": config.out,
            "task": predictor.task.name,
            "classes": len(predictor.classes),
            "parameters": f"{sum(part.numel() for part in predictor.network.parameters()):,}",
            "checked": "loaded again; weights and predictions are the same",
        }
    )
    call.console.result(f"to use it:\n\n  dtpipe predict {config.out} --images URL --out predicted/ --overlay\n")
    call.console.result(
        "from dtpipe.distill.export.predictor import load_predictor\n"
        f'predictor = load_predictor("{config.out}")\n'
        "(prediction,) = predictor.predict([image])  # (H, W, 3) uint8"
    )
    call.console.document({"path": config.out, "task": predictor.task.name, "weights": predictor.digest})
