"""`dtpipe export`: a student for timm, transformers or torchvision."""

from __future__ import annotations

from dtpipe.manifests.errors import StoreError
from dtpipe.manifests.store.publish import write_whole
from dtpipe.pipeline.cli.options import Call, Flag, settings_command
from dtpipe.pipeline.cli.settings import dump

FLAGS = (
    Flag("checkpoint", "export.checkpoint", "CKPT"),
    Flag("--out", "export.out", "DIR"),
    Flag("--layout", "export.layout", "NAME"),
)
EXAMPLE = """
dtpipe export runs/r50 --out r50/
dtpipe export runs/r50 --out r50-tv/ --layout torchvision
"""


@settings_command("export", FLAGS, EXAMPLE, dry_run=False)
def command(call: Call) -> None:
    """Write a student as safetensors that timm, transformers or torchvision loads without dtpipe.

    The file is loaded again and compared with the student before success is reported.
    """
    config = call.settings("export")
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
    call.console.result(f"to load it:\n\n{result.snippet}")
    call.console.result(f"to fine-tune it on five classes:\n\n{result.finetune}")
    call.console.document(result)
