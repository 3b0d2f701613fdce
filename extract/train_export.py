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
from dtpipe.extract.pixels import to_pixels
from dtpipe.extract.teachers.diffusion.ddpm import load_ddpm_teacher
from dtpipe.extract.teachers.diffusion.process import ddim_sample
from dtpipe.extract.teachers.files.weights import load_strictly, read_weights
from dtpipe.extract.train_config import TrainTeacherConfig
from dtpipe.extract.train_network import build_unet, noise_schedule, null_class
from dtpipe.extract.train_state import CHECKPOINT, load_checkpoint
from dtpipe.manifests.errors import StoreError

RECORD = "train.json"
CLASSES = "classes.json"
SAMPLES = "samples.png"
_OF_THIS_MACHINE = {"images", "out", "init_from", "device", "threads", "decode_threads", "max_hours"}


def export_teacher(
    run: Path, out: Path, dtype: Literal["float32", "float16"] | None = None, device: str = "cpu"
) -> Path:
    """Write the moving average of the checkpoint in `run` as a teacher into `out`; returns the sample grid's path.

    Holds unet/ (safetensors), scheduler/, model_index.json, train.json (settings, step, loss, versions), samples.png and,
    where the network was told classes, classes.json. Samples are drawn with the weights as written, so they show what a
    reader of the folder gets.
    Raises: DamagedDataError for a broken checkpoint; StoreError when `out` cannot be written.
    """
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler

    saved = load_checkpoint(run / CHECKPOINT)
    config = TrainTeacherConfig.model_validate_json(saved["config"])
    unet: Any = build_unet(config, len(saved["classes"]))
    unet.load_state_dict(saved["ema"])
    torch.nn.Module.to(unet, dtype=getattr(torch, dtype or config.dtype))
    scheduler = DDPMScheduler(
        num_train_timesteps=config.timesteps, beta_start=1e-4, beta_end=0.02, beta_schedule="linear"
    )
    try:
        out.mkdir(parents=True, exist_ok=True)
        DDPMPipeline(unet=unet, scheduler=scheduler).save_pretrained(out, safe_serialization=True)
        for path in (out / "unet").iterdir():
            path.chmod(0o644)  # safetensors writes for the owner alone
        (out / RECORD).write_text(json.dumps(_record(config, saved), indent=2) + "\n")
        if classes := saved["classes"]:
            content = {"classes": classes, "null_class": null_class(config, len(classes))}
            (out / CLASSES).write_text(json.dumps(content, indent=2) + "\n")
        Image.fromarray(tile(_samples(config, out, len(saved["classes"]), device))).save(out / SAMPLES)
    except OSError as err:
        raise StoreError(f"{out}: cannot write the teacher ({err}); make room or name another folder") from err
    return out / SAMPLES


def _record(config: TrainTeacherConfig, saved: dict[str, Any]) -> dict[str, Any]:
    recent = saved["losses"]
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


def _samples(config: TrainTeacherConfig, folder: Path, num_classes: int, device: str) -> NDArray[np.uint8]:
    """Images of the teacher in `folder`, uint8 [N, H, W, 3]; with classes, one of each in turn."""
    if not num_classes:
        return load_ddpm_teacher(TeacherConfig(path=str(folder)), device).sample(
            config.num_samples, config.seed, config.sample_steps
        )
    import torch

    unet: Any = build_unet(config, num_classes)
    weights = folder / "unet" / "diffusion_pytorch_model.safetensors"
    load_strictly(unet, read_weights(weights), weights)
    unet = unet.to(device).eval()
    labels = torch.arange(config.num_samples, device=device) % num_classes
    rngs = [np.random.Generator(np.random.Philox([config.seed, idx])) for idx in range(config.num_samples)]
    start = torch.from_numpy(np.stack([rng.standard_normal((3, *config.image_px), np.float32) for rng in rngs])).to(
        device
    )
    with torch.inference_mode():
        drawn = ddim_sample(
            lambda noisy, at: unet(noisy, at, labels).sample, noise_schedule(config), start, config.sample_steps
        )
    return to_pixels(drawn).cpu().numpy()


def tile(images: NDArray[np.uint8]) -> NDArray[np.uint8]:
    """Images uint8 [N, H, W, 3] as one picture, about square, black where none is left."""
    num, height, width, _ = images.shape
    columns = int(np.ceil(num**0.5))
    rows = -(-num // columns)
    padded = np.concatenate([images, np.zeros((rows * columns - num, height, width, 3), np.uint8)])
    return padded.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
