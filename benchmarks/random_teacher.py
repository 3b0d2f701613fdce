"""A UNet2DModel with random weights, for measuring speed and rounding where weights do not matter."""

from __future__ import annotations

from pathlib import Path


def write_random_teacher(path: Path, px: int = 64, width: int = 32) -> Path:
    """Write a DDPM pipeline folder with levels at strides 4 to 32 and return it."""
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
