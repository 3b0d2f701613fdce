"""Write a trained teacher: a diffusers `DDPMPipeline` folder of the moving average, its record and a sample grid."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from safetensors import SafetensorError

from dtpipe.distill.engine.checkpoint import load_checkpoint
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.network import BETA_RANGE, build_unet, null_class
from dtpipe.manifests.errors import DamagedDataError, StoreError
from dtpipe.manifests.phases import phase
from dtpipe.manifests.records.document import write_document
from dtpipe.manifests.records.files import FILES, TEACHER_RECORD, file_digests
from dtpipe.manifests.store.publish import whole_files

TRAIN_TEACHER = "train_teacher"
SAMPLES = "samples.png"
_CLASSES, _TEMPORARY = "classes.json", ".teacher.tmp"
_REMEDY = "make room or name another folder"
_OF_THIS_MACHINE: Mapping[str, bool | set[str]] = {
    "images": True,
    "init_from": True,
    "run": {"out", "device", "threads", "decode_threads", "max_hours"},
}
_RECENT_STEPS = 200

DrawImages = Callable[[TrainTeacherConfig, Path, int, torch.device], NDArray[np.uint8]]
"""Images [N, H, W, 3] of the teacher in a folder, by settings and number of classes, on a device."""


def export_teacher(
    run: Path,
    out: Path,
    draw_images: DrawImages,
    dtype: Literal["float32", "float16"] | None = None,
    device: torch.device | str = "cpu",
) -> Path:
    """Write the moving average of the checkpoint in `run` as a teacher into `out`; returns the sample grid's path.

    Holds unet/ (safetensors), scheduler/, model_index.json, train.json (settings, step, loss, versions, digests of the
    others), samples.png and, where the network was told classes, classes.json. Samples are drawn with the weights as
    written, so they show what a reader of the folder gets.
    Raises: InputError or DamagedDataError without a whole checkpoint; StoreError when `out` cannot be written.
    """
    saved = load_checkpoint(run / "last.pt", TRAIN_TEACHER)
    config = _settings(saved, run)
    classes = saved["classes"]
    unet = build_unet(config, len(classes))
    unet.load_state_dict(saved["ema"])
    torch.nn.Module.to(unet, dtype=getattr(torch, dtype or config.run.dtype))
    try:
        with whole_files(out, _TEMPORARY) as written:
            _write_pipeline(unet, config, written)
            if classes:
                named = {"classes": classes, "null_class": null_class(config, len(classes))}
                (written / _CLASSES).write_text(json.dumps(named, indent=2) + "\n", encoding="utf-8")
            digests = file_digests(written)  # without the picture, which nobody reads
            with phase(f"drawing {config.run.num_samples} samples"):
                grid = tile(draw_images(config, written, len(classes), torch.device(device)))
            Image.fromarray(grid).save(written / SAMPLES)
            (out / TEACHER_RECORD).unlink(missing_ok=True)
        write_document(out / TEACHER_RECORD, _record(config, saved, run) | {FILES: digests}, _REMEDY)
    except (OSError, SafetensorError) as err:  # safetensors raises the latter on a full disk
        raise StoreError(f"{out}: cannot write the teacher ({err}); {_REMEDY}") from err
    return out / SAMPLES


def _settings(saved: Mapping[str, Any], run: Path) -> TrainTeacherConfig:
    try:
        return TrainTeacherConfig.model_validate(TrainTeacherConfig.in_halves(saved["config"]))
    except ValidationError as err:
        where = ".".join(map(str, err.errors()[0]["loc"]))
        raise DamagedDataError(
            f"{run}/last.pt: its settings are not this version's ({where}: {err.errors()[0]['msg']}); train anew"
        ) from err


def _write_pipeline(unet: Any, config: TrainTeacherConfig, out: Path) -> None:
    from diffusers import DDPMPipeline, DDPMScheduler

    start, end = BETA_RANGE
    scheduler = DDPMScheduler(
        num_train_timesteps=config.timesteps, beta_start=start, beta_end=end, beta_schedule="linear"
    )
    DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(out, safe_serialization=True)
    for path in (out / "unet").iterdir():
        path.chmod(0o644)  # safetensors writes for the owner alone


def _record(config: TrainTeacherConfig, saved: Mapping[str, Any], run: Path) -> dict[str, Any]:
    recent = [line["loss"] for line in read_metrics(run) if line["step"] > saved["step"] - _RECENT_STEPS]
    return {
        "command": "dtpipe train-teacher",
        "train_teacher": config.model_dump(mode="json", exclude=_OF_THIS_MACHINE),
        "step": saved["step"],
        "loss_of_last_steps": round(sum(recent) / len(recent), 6) if recent else None,
        "weights": f"moving average, {config.ema_decay} per step",
        "started_from_weights_blake3": saved["started_from"],
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy")}
        | {"python": platform.python_version()},
    }


def tile(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, 3] as one picture, about square, black where none is left."""
    num, height, width, _ = images.shape
    columns = int(np.ceil(num**0.5))
    rows = -(-num // columns)
    padded = np.concatenate([images, np.zeros((rows * columns - num, height, width, 3), np.uint8)])
    return padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
