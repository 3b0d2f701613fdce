"""What changes while a teacher is trained: network, moving average, optimiser, step; and its checkpoint.

A checkpoint is one torch file that loads with `weights_only=True`; it is replaced in one move, so a killed run leaves
the one before. Nothing in it depends on how many processes trained.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dtpipe.extract.train_config import EXECUTION, TrainTeacherConfig
from dtpipe.extract.train_network import build_unet, start_from
from dtpipe.manifests.differences import differences, refuse_differences
from dtpipe.manifests.errors import DamagedDataError, PlanChangedError, StoreError
from dtpipe.manifests.store.publish import whole_file

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINT = "last.pt"
_KEYS = frozenset({"config", "unet", "ema", "optimizer", "step", "losses"})
_LATER_KEYS: dict[str, Any] = {"classes": [], "scaler": None, "started_from": None}  # what older checkpoints lack


@dataclass
class TrainState:
    """All that changes during training, and what it began with."""

    unet: nn.Module
    ema: dict[str, Tensor]
    optimizer: Any
    step: int = 0
    losses: list[float] = field(default_factory=list)
    scaler: Any = None
    """Of the loss in float16 (torch.amp.GradScaler)."""
    classes: tuple[str, ...] = ()
    started_from: str | None = None
    """Digest of the weights of `init_from`."""
    forward: Any = None
    """The network as training calls it: itself, or a wrapper of several processes around it."""


def resume_or_start(
    config: TrainTeacherConfig, device: str, saved: dict[str, Any] | None = None, classes: tuple[str, ...] = ()
) -> TrainState:
    """The state of a checkpoint's content, or a fresh one.

    Raises: PlanChangedError when the images have other classes than the checkpoint's; TeacherError as `start_from`.
    """
    import torch

    unet = build_unet(config, len(classes)).to(device).train()
    started_from = start_from(config, unet, config.init_from) if config.init_from and not saved else None
    ema = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.lr, weight_decay=config.weight_decay, fused=True)
    scaler = torch.amp.GradScaler(device) if config.precision == "float16" else None
    state = TrainState(unet, ema, optimizer, scaler=scaler, classes=classes, started_from=started_from, forward=unet)
    if saved:
        _restore(state, saved, device, config.out)
    return state


def _restore(state: TrainState, saved: dict[str, Any], device: str, where: str) -> None:
    if list(state.classes) != saved["classes"]:
        changed = sorted(set(state.classes) ^ set(saved["classes"]))
        raise PlanChangedError(
            f"{where}/{CHECKPOINT} was made with other classes, {changed} differ; give the same images or another --out"
        )
    state.unet.load_state_dict(saved["unet"])
    state.optimizer.load_state_dict(saved["optimizer"])
    state.ema = {name: value.to(device) for name, value in saved["ema"].items()}
    state.step, state.losses, state.started_from = saved["step"], saved["losses"], saved["started_from"]
    if state.scaler is not None and saved["scaler"]:
        state.scaler.load_state_dict(saved["scaler"])


def update_ema(state: TrainState, decay: float) -> None:
    import torch

    with torch.no_grad():
        for name, value in state.unet.state_dict().items():
            state.ema[name].lerp_(value, 1 - decay)


def save_checkpoint(config: TrainTeacherConfig, state: TrainState) -> Path:
    """Write `last.pt` into `config.out`, whole.

    Raises: StoreError when the folder is full or unwritable.
    """
    import torch

    path = Path(config.out) / CHECKPOINT
    content = {
        "config": config.model_dump_json(),
        "unet": state.unet.state_dict(),
        "ema": state.ema,
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "losses": state.losses,
        "classes": list(state.classes),
        "scaler": state.scaler.state_dict() if state.scaler is not None else None,
        "started_from": state.started_from,
    }
    try:
        with whole_file(path) as temporary, temporary.open("wb") as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as err:
        raise StoreError(
            f"{path}: cannot write the checkpoint ({err}); make room and run the same command again"
        ) from err
    return path


def find_checkpoint(config: TrainTeacherConfig) -> dict[str, Any] | None:
    """The content of the checkpoint in `config.out`, if there is one.

    Raises: PlanChangedError when it was made with other settings; DamagedDataError as `load_checkpoint`.
    """
    path = Path(config.out) / CHECKPOINT
    if not path.exists():
        return None
    content = load_checkpoint(path)
    _refuse_other_settings(config, TrainTeacherConfig.model_validate_json(content["config"]), path)
    return content


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises: DamagedDataError when the file is not a whole checkpoint of ours.
    """
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises many types for a damaged file
        raise DamagedDataError(
            f"{path}: not a readable checkpoint ({type(err).__name__}); delete it to start again"
        ) from err
    if not isinstance(content, dict):
        raise DamagedDataError(
            f"{path}: holds a {type(content).__name__}, no checkpoint of a teacher; name another --out"
        )
    if missing := _KEYS - set(content):
        raise DamagedDataError(f"{path}: checkpoint lacks {sorted(missing)}; delete it to start again")
    try:
        TrainTeacherConfig.model_validate_json(content["config"])
    except ValidationError as err:
        where = ".".join(map(str, err.errors()[0]["loc"]))
        raise DamagedDataError(
            f"{path}: its settings are not this version's ({where}: {err.errors()[0]['msg']}); delete it to start again"
        ) from err
    return _LATER_KEYS | content


def _refuse_other_settings(config: TrainTeacherConfig, saved: TrainTeacherConfig, path: Path) -> None:
    stored, wanted = (settings.model_dump(mode="json", exclude=set(EXECUTION)) for settings in (saved, config))
    refuse_differences(f"{path} was made with other settings", differences(stored, wanted, "train_teacher."))
