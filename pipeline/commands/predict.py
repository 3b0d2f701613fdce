"""`dtpipe predict`: what a tuned network says of images."""

from __future__ import annotations

from dtpipe.pipeline.cli.options import Call, Flag, settings_command

FLAGS = (
    Flag("predictor", "predict.predictor", "PREDICTOR"),
    Flag("--images", "predict.images", "URL"),
    Flag("--out", "predict.out", "DIR"),
    Flag("--overlay", "predict.overlay"),
    Flag("--min-score", "predict.min_score", "SCORE"),
    Flag("--px", "predict.px", "PX"),
    Flag("--resize", "predict.resize", "center_crop|stretch|none"),
    Flag("--batch-size", "predict.batch_size", "N"),
    Flag("--device", "predict.device", "auto|cpu|cuda|mps"),
    Flag("--max-bad", "predict.max_bad", "N|SHARE"),
)
EXAMPLE = """
dtpipe predict predictor/ --images photos/ --out predicted/ --overlay
"""
_SHOWN_BAD = 20


@settings_command("predict", FLAGS, EXAMPLE, dry_run=False)
def command(call: Call) -> None:
    """Predict masks, objects, segments or classes of images with a tuned network.

    Images are those of any source or layout. Writes masks as PNG with a palette, objects as COCO results with
    images.json beside them, panoptic PNG and JSON, or classes.csv, by the predictor's task. Run again, it goes on with
    what is not done.
    """
    config = call.settings("predict")
    from dtpipe.pipeline.predict.run import predict

    result = predict(config, call.console.note)
    for key, reason in list(result.bad.items())[:_SHOWN_BAD]:
        call.console.note(f"left out {key}: {reason}")
    call.console.pairs(
        {
            "task": result.task,
            "images": f"{result.num_images - len(result.bad)} predicted, {len(result.bad)} bad, of {result.num_images}",
            "before": f"{result.num_before} by an earlier run",
            "wrote": ", ".join(map(str, result.tables)) or result.out,
        }
    )
    call.console.document(result)
