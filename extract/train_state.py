"""What changes while a teacher is trained: network, moving average, optimiser, step; and its checkpoint.

A checkpoint is one torch file that loads with `weights_only=True`; it is replaced in one move, so a killed run leaves
the one before.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from dtpipe.extract.train_config import EXECUTION, TrainTeacherConfig
from dtpipe.manifests.errors import DamagedDataError, PlanChangedError, StoreError

if TYPE_CHECKING:
    from torch import Tensor, nn

CHECKPOINT = "last.pt"


@dataclass
class TrainState:
    """All that changes during training."""

    unet: nn.Module
    ema: dict[str, Tensor]
    optimizer: Any
    step: int = 0
    losses: list[float] = field(default_factory=list)


def build_unet(config: TrainTeacherConfig) -> nn.Module:
    """A fresh diffusers UNet2DModel, its weights a function of the seed."""
    import torch
    from diffusers import UNet2DModel

    attention = [2**level in config.attention_strides for level in range(len(config.channels))]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        unet = UNet2DModel(
            sample_size=config.px,
            layers_per_block=config.blocks,
            block_out_channels=config.channels,
            down_block_types=tuple("AttnDownBlock2D" if has else "DownBlock2D" for has in attention),
            up_block_types=tuple("AttnUpBlock2D" if has else "UpBlock2D" for has in reversed(attention)),
            attention_head_dim=config.head_channels,
            norm_num_groups=config.norm_groups,
            norm_eps=1e-5,
        )
    model: nn.Module = unet
    return model


def resume_or_start(config: TrainTeacherConfig, device: str) -> TrainState:
    """The state of the last checkpoint in `config.out`, or a fresh one.

    Raises: PlanChangedError when the checkpoint was made with other settings.
    """
    import torch

    unet = build_unet(config).to(device).train()
    ema = {name: value.detach().clone() for name, value in unet.state_dict().items()}
    optimizer = torch.optim.AdamW(unet.parameters(), lr=config.lr, weight_decay=config.weight_decay)
    state = TrainState(unet, ema, optimizer)
    path = Path(config.out) / CHECKPOINT
    if path.exists():
        saved = load_checkpoint(path)
        _refuse_other_settings(config, TrainTeacherConfig.model_validate_json(saved["config"]), path)
        unet.load_state_dict(saved["unet"])
        optimizer.load_state_dict(saved["optimizer"])
        state.ema = {name: value.to(device) for name, value in saved["ema"].items()}
        state.step, state.losses = saved["step"], saved["losses"]
    return state


def update_ema(state: TrainState, decay: float) -> None:
    import torch

    with torch.no_grad():
        for name, value in state.unet.state_dict().items():
            state.ema[name].lerp_(value, 1 - decay)


def save_checkpoint(config: TrainTeacherConfig, state: TrainState) -> Path:
    """Write `last.pt` into `config.out`, in one move.

    Raises: StoreError when the folder is full or unwritable.
    """
    import torch

    path = Path(config.out) / CHECKPOINT
    partial = path.with_name(f".{CHECKPOINT}.partial")
    content = {
        "config": config.model_dump_json(),
        "unet": state.unet.state_dict(),
        "ema": state.ema,
        "optimizer": state.optimizer.state_dict(),
        "step": state.step,
        "losses": state.losses,
    }
    try:
        torch.save(content, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as err:
        raise StoreError(f"{path}: cannot write the checkpoint ({err}); make room and run the same command again") from err
    return path


def load_checkpoint(path: Path) -> dict[str, Any]:
    """The content of a checkpoint, on the CPU.

    Raises: DamagedDataError when the file is not a whole checkpoint of ours.
    """
    import torch

    try:
        content: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as err:  # torch raises many types for a damaged file
        raise DamagedDataError(f"{path}: not a readable checkpoint ({type(err).__name__}); delete it to start again") from err
    if not isinstance(content, dict):
        raise DamagedDataError(f"{path}: holds a {type(content).__name__}, no checkpoint of a teacher; name another --out")
    missing = {"config", "unet", "ema", "optimizer", "step", "losses"} - set(content)
    if missing:
        raise DamagedDataError(f"{path}: checkpoint lacks {sorted(missing)}; delete it to start again")
    try:
        TrainTeacherConfig.model_validate_json(content["config"])
    except ValidationError as err:
        where = ".".join(map(str, err.errors()[0]["loc"]))
        raise DamagedDataError(
            f"{path}: its settings are not this version's ({where}: {err.errors()[0]['msg']}); delete it to start again"
        ) from err
    return dict(content)


def _refuse_other_settings(config: TrainTeacherConfig, saved: TrainTeacherConfig, path: Path) -> None:
    old, new = saved.model_dump(), config.model_dump()
    changed = [f"{name} was {old[name]}, is {new[name]}" for name in new if name not in EXECUTION and old[name] != new[name]]
    if changed:
        raise PlanChangedError(f"{path} was made with other settings: {'; '.join(changed)}; keep them or name another --out")
