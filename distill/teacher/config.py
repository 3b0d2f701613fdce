"""Settings of `dtpipe train-teacher`, one pydantic model of two halves.

A checkpoint holds them as JSON: a new field needs a default under which older checkpoints train on as they did.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dtpipe.distill.engine.trackers.config import Tracking
from dtpipe.manifests.schema import DeviceName, ErrorBudget, Filter, Resize, Settings, Size, height_width
from dtpipe.manifests.store.paths import local_place, whole_place


class TrainTeacherRun(ErrorBudget, Tracking):
    """How long a teacher trains, where, with what resources, and what is written at the end."""

    out: str = Field(description="Folder of the teacher; also holds the checkpoint to resume from.")
    steps: int = Field(default=100_000, ge=1, description="Optimiser steps.")
    decay_steps: int = Field(
        default=0, ge=0, description="Last steps, over which the learning rate falls linearly to zero."
    )
    max_hours: float | None = Field(
        default=None, gt=0, description="Stop after so long and write the teacher; the same command goes on."
    )
    checkpoint_every: int = Field(default=1000, ge=1, description="Steps between checkpoints.")
    log_every: int = Field(default=50, ge=1, description="Steps between lines of metrics.jsonl.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: torch's own choice.")
    decode_threads: int = Field(default=4, ge=1, description="Threads that read and decode images at the start.")
    device: DeviceName = Field(default="auto", description="Where training runs.")
    dtype: Literal["float32", "float16"] = Field(
        default="float32", description="Dtype of the weights written at the end."
    )
    num_samples: int = Field(default=16, ge=1, le=256, description="Images of the sample grid.")
    sample_steps: int = Field(default=100, ge=1, description="DDIM steps of the sample grid.")

    _local = field_validator("out")(local_place)


class TeacherRecipeConfig(Settings):
    """Which DDPM, on which images: all that determines each of its steps."""

    PLACES: ClassVar[frozenset[str]] = frozenset({"images"})  # images may move

    images: str = Field(description="Folder or URL of the images.")
    kind: str = Field(default="auto", description="Source kind (`dtpipe list sources`), or auto.")
    limit: int | None = Field(
        default=None, ge=1, description="Use only so many images, spread evenly over the sorted listing."
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
    batch_size: int = Field(default=32, ge=1, description="Images per step, of all processes together.")
    lr: float = Field(default=1e-4, gt=0, description="Learning rate after warm-up.")
    warmup_steps: int = Field(default=500, ge=0, description="Steps of linear warm-up.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay.")
    grad_clip: float = Field(default=1.0, gt=0, description="Largest gradient norm.")
    ema_decay: float = Field(default=0.9999, ge=0, lt=1, description="Decay per step of the weights' moving average.")
    seed: int = Field(default=0, ge=0, description="Seed of weights, order, timesteps and noise.")
    precision: Literal["float32", "bfloat16", "float16"] = Field(
        default="float32",
        description="Arithmetic of the network in training, by autocast, weights stay float32; float16 needs a GPU.",
    )

    _whole = field_validator("images", "init_from")(whole_place)

    @classmethod
    def identity_of(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """As of all settings; older runs recorded `init_from` as it was given."""
        identity = super().identity_of(record)
        return {**identity, "init_from": whole_place(identity.get("init_from"))}

    @property
    def image_px(self) -> tuple[int, int]:
        """Height and width of the images."""
        return height_width(self.px)

    @field_validator("px")
    @classmethod
    def _one_side_of_a_square(cls, px: Size) -> Size:
        """One spelling of a square, so that a resumed run finds the same settings."""
        return px[0] if isinstance(px, tuple) and px[0] == px[1] else px

    @model_validator(mode="after")
    def _shapes_fit(self) -> Self:
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
    def _settings_go_together(self) -> Self:
        if self.label_dropout and not self.class_conditional:
            raise ValueError(
                "train_teacher.label_dropout withholds classes; set class_conditional too, or leave it out"
            )
        return self


class TrainTeacherConfig(TeacherRecipeConfig):
    """All settings of the training of one teacher."""

    run: TrainTeacherRun
