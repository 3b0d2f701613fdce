"""Settings of `dtpipe train-teacher`, one pydantic model.

A checkpoint holds them as JSON: a new field needs a default under which older checkpoints train on as they did.
"""

from __future__ import annotations

import math
from typing import Literal

from pydantic import Field, field_validator, model_validator

from dtpipe.manifests.schema import Filter, Resize, Size, StrictModel, height_width

TEACHER_EXECUTION = frozenset(
    {
        *("images", "out", "steps", "decay_steps", "max_hours", "checkpoint_every", "log_every", "threads", "device"),
        *("dtype", "num_samples", "sample_steps", "max_bad", "decode_threads"),
    }
)
"""Fields that may change between runs of one teacher; the others must stay as they were."""


class TrainTeacherConfig(StrictModel):
    """Which DDPM, on which images, for how long."""

    images: str = Field(description="Folder or URL of the images.")
    out: str = Field(description="Folder of the teacher; also holds the checkpoint to resume from.")
    kind: str = Field(default="auto", description="Source kind (`dtpipe list sources`), or auto.")
    limit: int | None = Field(
        default=None, ge=1, description="Use only so many images, spread evenly over the sorted listing."
    )
    max_bad: int | float = Field(
        default=0.01, ge=0, description="Bad images allowed: an integer is a count, a fraction a share."
    )
    px: Size = Field(
        default=256,
        description="Side, or height and width, of the images in px; multiples of the network's total stride.",
    )
    resize: Resize = Field(default="center_crop", description="How an image comes to that size.")
    filter: Filter = Field(default="bicubic", description="Resampling filter.")
    flip: bool = Field(default=True, description="Flip images horizontally at random.")
    class_conditional: bool = Field(
        default=False, description="Tell the network each image's class, the name of its folder."
    )
    label_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="Share of images whose class is withheld: they train one more, null class."
    )
    network: Literal["ddpm", "adm"] = Field(
        default="ddpm", description="adm: residual up- and downsampling and scale-shift norms, as in guided-diffusion."
    )
    channels: tuple[int, ...] = Field(
        default=(128, 128, 256, 256, 512, 512),
        min_length=3,
        description="Width at each resolution, finest first; each halves the size.",
    )
    blocks: int = Field(default=2, ge=1, description="Residual blocks per resolution.")
    attention_strides: tuple[int, ...] = Field(default=(16,), description="Strides that get self-attention.")
    head_channels: int = Field(default=32, ge=1, description="Channels per attention head.")
    norm_groups: int = Field(default=32, ge=1, description="Groups of the group norms.")
    init_from: str | None = Field(
        default=None, description="Folder of a teacher of the same network whose weights training starts from."
    )
    timesteps: int = Field(default=1000, ge=1, description="Diffusion steps of the linear schedule, beta 1e-4..0.02.")
    loss_weighting: Literal["simple", "min_snr"] = Field(
        default="simple", description="Weight of a timestep in the loss: simple is 1, min_snr is min(SNR, 5) / SNR."
    )
    steps: int = Field(default=100_000, ge=1, description="Optimiser steps.")
    batch_size: int = Field(default=32, ge=1, description="Images per step, of all processes together.")
    lr: float = Field(default=1e-4, gt=0, description="Learning rate after warm-up.")
    warmup_steps: int = Field(default=500, ge=0, description="Steps of linear warm-up.")
    decay_steps: int = Field(
        default=0, ge=0, description="Last steps, over which the learning rate falls linearly to zero."
    )
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    grad_clip: float = Field(default=1.0, gt=0, description="Largest gradient norm.")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="Decay per step of the weights' moving average.")
    seed: int = Field(default=0, ge=0, description="Seed of weights, order, timesteps and noise.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Arithmetic of the network in training, by autocast, weights stay float32; float16 needs a GPU.",
    )
    max_hours: float | None = Field(
        default=None, gt=0, description="Stop after so long and write the teacher; the same command goes on."
    )
    checkpoint_every: int = Field(default=1000, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(default=50, ge=1, description="Steps between lines of metrics.jsonl.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: torch's own choice.")
    decode_threads: int = Field(default=4, ge=1, description="Threads that read and decode images at the start.")
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="Where training runs.")
    dtype: Literal["float32", "float16"] = Field(
        default="float32", description="Dtype of the weights written at the end."
    )
    num_samples: int = Field(default=16, ge=1, le=256, description="Images of the sample grid.")
    sample_steps: int = Field(default=100, ge=1, description="DDIM steps of the sample grid.")

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width of the images."""
        return height_width(self.px)

    def max_bad_images(self, num: int) -> int:
        """Bad images that a source of so many may have."""
        return self.max_bad if isinstance(self.max_bad, int) else math.floor(self.max_bad * num)

    @field_validator("px")
    @classmethod
    def _one_side_of_a_square(cls, px: Size) -> Size:
        """One spelling of a square, so that a resumed run finds the same settings."""
        return px[0] if isinstance(px, tuple) and px[0] == px[1] else px

    @model_validator(mode="after")
    def _shapes_fit(self) -> TrainTeacherConfig:
        total = 2 ** (len(self.channels) - 1)
        if any(side < 8 or side % total for side in self.image_px):
            raise ValueError(
                f"train_teacher.px is {self.px}; {len(self.channels)} resolutions need a multiple of {total}, 8 or more"
            )
        if uneven := [width for width in self.channels if width % self.norm_groups]:
            raise ValueError(
                f"train_teacher.channels holds {uneven}; each must be a multiple of norm_groups, {self.norm_groups}"
            )
        if odd := [
            stride
            for stride in self.attention_strides
            if stride not in [2**level for level in range(len(self.channels))]
        ]:
            raise ValueError(f"train_teacher.attention_strides holds {odd}; strides are 1, 2, 4 .. {total}")
        return self

    @model_validator(mode="after")
    def _settings_go_together(self) -> TrainTeacherConfig:
        if self.label_dropout and not self.class_conditional:
            raise ValueError(
                "train_teacher.label_dropout withholds classes; set class_conditional too, or leave it out"
            )
        if isinstance(self.max_bad, float) and self.max_bad > 1:
            raise ValueError(
                f"train_teacher.max_bad is {self.max_bad}; write a count as an integer and a share as a fraction up to 1"
            )
        if "://" in self.out:
            raise ValueError(
                f"train_teacher.out is {self.out}; train into a local or mounted folder and copy the teacher from there"
            )
        return self
