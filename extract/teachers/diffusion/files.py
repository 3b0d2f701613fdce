"""Where a diffusers checkpoint keeps its network, weights and noise schedule, in a folder or on the hub."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.extract.teachers.diffusion.encoding import PREDICTIONS
from dtpipe.extract.teachers.files.hub import HUB_ID, download
from dtpipe.extract.teachers.files.variants import NETWORK_STEMS, find_weights, small_hub_patterns
from dtpipe.extract.teachers.files.weights import read_json
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.records.files import TEACHER_RECORD, check_files

if TYPE_CHECKING:
    from torch import Tensor

_REWRITE = "run the same `dtpipe train-teacher` again, or delete train.json if you changed the teacher yourself"
_RENAMED = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}  # attention before diffusers 0.14
VP_SCHEDULERS = frozenset(
    {"DDPMScheduler", "DDIMScheduler", "PNDMScheduler", "DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"}
    | {"UniPCMultistepScheduler", "DEISMultistepScheduler", "DDPMParallelScheduler", "DDIMParallelScheduler"}
)
"""Schedulers whose networks take x_t = sqrt(a) x_0 + sqrt(1 - a) eps unscaled, with a discrete timestep."""

_SCHEDULE_KEYS = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas", "prediction_type")
_SCHEDULE_DEFAULTS = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
}


@dataclass(frozen=True)
class UNetFiles:
    """One checkpoint on disk."""

    folder: Path
    weights: Path
    architecture: Mapping[str, Any]
    """Arguments of UNet2DModel."""
    scheduler: Mapping[str, Any]
    """Noise schedule and what the network predicts."""
    image_px: tuple[int, int]
    null_class: int | None = None
    """The class that stands for none, of a class-conditional network that was trained with one."""

    @property
    def num_classes(self) -> int | None:
        """Classes of a class-conditional network, the null class counted; None for others."""
        return self.architecture.get("num_class_embeds")

    @property
    def num_timesteps(self) -> int:
        return int(self.scheduler["num_train_timesteps"])


def is_unet_path(path: str) -> bool:
    """True for a folder that holds a UNet2DModel, itself or in a pipeline, and for what looks like a hub id."""
    folder = Path(path)
    if not folder.exists():
        return bool(HUB_ID.match(path))
    try:
        return read_json(_network_folder(folder) / "config.json").get("_class_name") == "UNet2DModel"
    except TeacherError:
        files = (folder / "model_index.json", folder / "config.json")
        return any(file.exists() for file in files)  # broken: let loading say how


def find_unet(path: str, revision: str | None = None, variant: str | None = None) -> UNetFiles:
    """The files of a checkpoint, its settings read and checked; `variant` chooses among several files of weights.

    Raises: TeacherError when a part is missing, or the network or its scheduler is of another kind; DamagedDataError
    when a file is not the one that `dtpipe train-teacher` wrote there.
    """
    wanted = small_hub_patterns(variant, ("", "unet/"))
    root = Path(path) if Path(path).exists() else download(path, revision, ["*.json", *wanted])
    if not root.is_dir():
        raise TeacherError(f"{path}: is a file; give the folder of a diffusers UNet2DModel or DDPMPipeline")
    check_files(root, TEACHER_RECORD, _REWRITE)
    folder = _network_folder(root)
    config = read_json(folder / "config.json")
    if config.get("_class_name") != "UNet2DModel":
        name = config.get("_class_name", "config without _class_name")
        raise TeacherError(f"{folder}/config.json: holds a {name}, not a UNet2DModel")
    _check_takes_images(config, folder)
    return UNetFiles(
        folder,
        find_weights(folder, NETWORK_STEMS, variant),
        _architecture(config),
        _scheduler(root, folder),
        image_px_of(config, folder),
        _null_class(root),
    )


def _network_folder(root: Path) -> Path:
    return root / "unet" if (root / "unet").is_dir() else root


def _check_takes_images(config: Mapping[str, Any], folder: Path) -> None:
    if config.get("in_channels", 3) != 3:
        raise TeacherError(
            f"{folder}/config.json: the network takes {config['in_channels']} channels; "
            f"kind ddpm needs one that takes RGB images"
        )
    if not isinstance(config.get("num_class_embeds"), int | None):
        raise TeacherError(
            f"{folder}/config.json: num_class_embeds is {config['num_class_embeds']!r}; write the number of classes"
        )
    if config.get("class_embed_type"):
        raise TeacherError(
            f"{folder}/config.json: the network takes classes as {config['class_embed_type']}; "
            f"kind ddpm knows class numbers only"
        )


def _null_class(root: Path) -> int | None:
    """What `dtpipe train-teacher` writes in classes.json; None where there is no such file or no such class."""
    null = read_json(root / "classes.json").get("null_class") if (root / "classes.json").is_file() else None
    if null is not None and not isinstance(null, int):
        raise TeacherError(
            f"{root}/classes.json: null_class is {null!r}, not the number of a class; train or export the teacher again"
        )
    return null


def _architecture(config: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of UNet2DModel; what it does not know must be bookkeeping (a leading underscore)."""
    from diffusers import UNet2DModel

    known = set(inspect.signature(UNet2DModel.__init__).parameters) - {"self"}
    return {name: tuple(value) if isinstance(value, list) else value for name, value in config.items() if name in known}


def image_px_of(config: Mapping[str, Any], folder: Path) -> tuple[int, int]:
    px = config.get("sample_size")
    if isinstance(px, int):
        return px, px
    if isinstance(px, list | tuple) and len(px) == 2 and all(isinstance(side, int) for side in px):
        return px[0], px[1]
    raise TeacherError(f"{folder}/config.json: sample_size is {px!r}; write the side the network was trained at")


def _scheduler(root: Path, folder: Path) -> dict[str, Any]:
    """The noise schedule, completed by diffusers' defaults.

    Raises: TeacherError when no scheduler lies beside the network, or it is of another process.
    """
    places = [root / "scheduler", folder, folder.parent / "scheduler"]
    files = (place / "scheduler_config.json" for place in places)
    if (path := next((file for file in files if file.is_file() or file.is_symlink()), None)) is None:
        raise TeacherError(
            f"{folder}: no scheduler_config.json in it or beside it, so the noise schedule is unknown; "
            f"copy the checkpoint's own"
        )
    config = read_json(path)
    if str(config.get("_class_name")) not in VP_SCHEDULERS:
        raise TeacherError(
            f"{path}: scheduler {config.get('_class_name')} is not variance-preserving with discrete timesteps"
        )
    if config.get("rescale_betas_zero_snr"):
        raise TeacherError(f"{path}: rescale_betas_zero_snr is set; that schedule is not supported")
    kept = _SCHEDULE_DEFAULTS | {name: config[name] for name in _SCHEDULE_KEYS if name in config}
    if kept["prediction_type"] not in PREDICTIONS:
        raise TeacherError(
            f"{path}: prediction_type is {kept['prediction_type']!r}; {', '.join(PREDICTIONS)} are known"
        )
    return kept


def modern_name(name: str) -> str:
    """A tensor's name in today's spelling; attention had another one before diffusers 0.14."""
    parts = name.split(".")
    if "attentions" in parts and len(parts) > 1:
        parts[-2] = _RENAMED.get(parts[-2], parts[-2])
    return ".".join(parts)


def modern_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under `modern_name`."""
    return {modern_name(name): tensor for name, tensor in tensors.items()}
