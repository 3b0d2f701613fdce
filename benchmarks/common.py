"""What the benchmarks share: where results lie, and a teacher with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"


def publish(document: Mapping[str, Any], path: Path) -> None:
    """Print a result, and keep it as JSON at `path`."""
    text = json.dumps(document, indent=1, allow_nan=False)
    print(text)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8")


def write_random_teacher(path: Path, px: int = 64, width: int = 32) -> Path:
    """Write a DDPM pipeline folder (random weights, for speed and rounding) with levels at strides 4 to 32."""
    import torch
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=px,
        block_out_channels=(width, width, 2 * width, 2 * width, 3 * width, 4 * width),
        down_block_types=("DownBlock2D",) * 6,
        up_block_types=("UpBlock2D",) * 6,
        layers_per_block=1,
        norm_num_groups=8,
        add_attention=False,
    )
    DDPMPipeline(unet=unet, scheduler=DDPMScheduler(num_train_timesteps=1000)).save_pretrained(path)
    return path
