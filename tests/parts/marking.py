"""A torch module whose features say how large their batch was, on a device that has room for so many images."""

from __future__ import annotations

from pathlib import Path
from typing import Any, ClassVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

LEVEL = "l2"


class Marks(nn.Module):
    """Every value is the number of images in the batch; a batch beyond `room` asks for memory that nobody has."""

    room: ClassVar[list[int]] = []
    """How many images fit, batch by batch of more than one; the last goes on."""

    def __init__(self) -> None:
        super().__init__()
        self.mean = nn.AvgPool2d(4)
        self.scale = nn.Parameter(torch.zeros(1))

    def forward(self, images: Tensor) -> Tensor:
        room = self.room.pop(0) if len(images) > 1 and len(self.room) > 1 else self.room[0]
        if len(images) > room:
            torch.empty(1 << 55)
        marked: Tensor = self.mean(images * self.scale + len(images))
        return marked


def write_marks(folder: Path) -> dict[str, Any]:
    """Settings of that module as a teacher of 32 px, with its weights in a folder."""
    save_file(Marks().state_dict(), folder / "marks.safetensors")
    return {
        "path": str(folder / "marks.safetensors"),
        "kind": "module",
        "taps": {LEVEL: "mean"},
        "options": {"module": f"{__name__}:Marks", "mode": "encode", "image_px": [32, 32]},
    }
