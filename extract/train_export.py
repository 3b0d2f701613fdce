"""Write a trained teacher: a diffusers `DDPMPipeline` folder of the moving average, its record and a sample grid."""

from __future__ import annotations

import json
import platform
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.diffusion import load_diffusion_teacher
from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_state import CHECKPOINT, build_unet, load_checkpoint
from dtpipe.manifests.errors import StoreError

RECORD = "train.json"
SAMPLES = "samples.png"


def export_teacher(run: Path, out: Path, dtype: Literal["float32", "float16"] | None = None, device: str = "cpu") -> Path:
    """Write the moving average of the checkpoint in `run` as a teacher into `out`; returns the sample grid's path.

    Holds unet/ (safetensors), scheduler/, model_index.json, train.json (settings, step, loss, versions) and
    samples.png. Samples are drawn with the weights as written, so they show what a reader of the folder gets.
    Raises: DamagedDataError for a broken checkpoint; StoreError when `out` cannot be written.
    """
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler

    saved = load_checkpoint(run / CHECKPOINT)
    config = TrainTeacherConfig.model_validate_json(saved["config"])
    unet: Any = build_unet(config)
    unet.load_state_dict(saved["ema"])
    torch.nn.Module.to(unet, dtype=getattr(torch, dtype or config.dtype))
    scheduler = DDPMScheduler(num_train_timesteps=config.timesteps, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
    try:
        out.mkdir(parents=True, exist_ok=True)
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(out, safe_serialization=True)
        for path in (out / "unet").iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
        (out / RECORD).write_text(json.dumps(_record(config, saved), indent=2) + "\n")
        teacher = load_diffusion_teacher(TeacherConfig(path=str(out)), device)
        Image.fromarray(tile(teacher.sample(config.num_samples, config.seed, config.sample_steps))).save(out / SAMPLES)
    except OSError as err:
        raise StoreError(f"{out}: cannot write the teacher ({err}); make room or name another folder") from err
    return out / SAMPLES


def _record(config: TrainTeacherConfig, saved: dict[str, Any]) -> dict[str, Any]:
    settings = config.model_dump(mode="json", exclude={"images", "out", "device", "threads", "max_hours"})
    recent = saved["losses"]
    return {
        "command": "dtpipe train-teacher",
        "train_teacher": settings,
        "step": saved["step"],
        "loss_of_last_steps": round(sum(recent) / len(recent), 6) if recent else None,
        "weights": f"moving average, {config.ema_decay} per step",
        "versions": {name: version(name) for name in ("torch", "diffusers", "numpy")} | {"python": platform.python_version()},
    }


def tile(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, 3] as one picture, about square, black where none is left."""
    num, height, width, _ = images.shape
    columns = int(np.ceil(num**0.5))
    rows = -(-num // columns)
    padded = np.concatenate([images, np.zeros((rows * columns - num, height, width, 3), np.uint8)])
    return padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
