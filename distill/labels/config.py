"""Settings of the interpreter's training, and of what stands beside it on the same split; defaults are the paper's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import Field, field_validator, model_validator

from dtpipe.distill.config import PAPER_WARMUP_SHARE
from dtpipe.distill.engine.trackers.config import Tracking
from dtpipe.manifests.schema import DeviceName, Settings, StrictModel
from dtpipe.manifests.store.paths import local_place

_Share = Annotated[float, Field(ge=0, lt=1)]
_Strength = Annotated[float, Field(gt=0)]


class RivalsConfig(StrictModel):
    """What else is trained on the same features and labels, and scored on the same images."""

    linear: bool = Field(default=True, description="A linear read-out of all levels, a logistic regression.")
    l2_grid: tuple[_Strength, ...] = Field(
        default=(1e-1, 1e-2, 1e-3),
        min_length=1,
        description="Of the linear read-out: l2/2 ||W||^2 beside the mean cross-entropy; two folds of the labelled "
        "images choose, of one image the middle is taken.",
    )
    max_cells: int = Field(
        default=32768, ge=1, description="Of the linear read-out: cells of labelled images that it is fitted on."
    )
    pixel_models: int = Field(
        default=10, ge=0, description="Pixel classifiers that vote, as in ddpm-segmentation, on masks; 0 leaves it out."
    )
    pixel_epochs: int = Field(
        default=100, ge=1, description="Most passes of a pixel classifier over all labelled pixels."
    )
    max_pixels: int | None = Field(
        default=None, ge=1, description="Labelled pixels that they learn from; default: all, as published."
    )


class InterpretRun(Tracking):
    """Where and how an interpreter is trained; none of it changes what is learned."""

    out: str = Field(description="Folder of the interpreter; also holds the checkpoint to go on from.")
    device: DeviceName = Field(default="auto", description="Where it is trained and scored.")
    threads: int | None = Field(default=None, ge=1, description="CPU threads; default: torch's own choice.")
    log_every: int = Field(default=20, ge=1, description="Steps per line of metrics.jsonl.")
    save_every: int = Field(default=200, ge=1, description="Steps between two writes of last.pt.")
    kept_bytes: int = Field(
        default=1 << 31, ge=0, description="Of features of labelled images in memory; what is beyond is read again."
    )
    num_pictures: int = Field(default=8, ge=0, description="Held-out images that are drawn with their masks.")

    _local = field_validator("out")(local_place)


class InterpreterConfig(Settings):
    """How an interpreter is trained: all that determines each of its steps, beside the data."""

    levels: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Levels of the features that are read; default: all."
    )
    together: bool = Field(
        default=False,
        description="Read all timesteps of a noise draw together, one after the other in the channels; default: one "
        "view at a time.",
    )
    width: int = Field(default=256, ge=8, description="Channels inside the interpreter.")
    dropout: _Share = Field(default=0.1, description="Before its last layer.")
    epochs: int = Field(default=100, ge=1, description="Passes over the labelled images.")
    warmup_epochs: float | None = Field(
        default=None,
        ge=0,
        description="Linear warm-up, before half a cosine; default: a fifth of the epochs, the paper's 20 of 100.",
    )
    batch_size: int = Field(default=4, ge=1, description="Labelled images per step.")
    lr: float = Field(default=4e-3, gt=0, description="AdamW's peak rate.")
    weight_decay: float = Field(default=0.05, ge=0, description="AdamW's weight decay.")
    betas: tuple[_Share, _Share] = Field(default=(0.9, 0.95), description="AdamW's betas.")
    clip_grad: float | None = Field(default=None, gt=0, description="Largest gradient norm; default: none.")
    dice_weight: float = Field(default=3.0, ge=0, description="Of the soft Dice beside the cross-entropy of masks.")
    flip: Literal["auto", "always", "never"] = Field(
        default="auto",
        description="Mirror images at random: auto does where flipped views are stored or the teacher runs, and says "
        "where not; always refuses without.",
    )
    seed: int = Field(default=0, ge=0, description="Seed of the split, the weights, the order and the flips.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="float32", description="Arithmetic of the network in training, by autocast; float16 needs a GPU."
    )
    rivals: RivalsConfig = RivalsConfig()
    run: InterpretRun

    @model_validator(mode="after")
    def _reaches_its_peak(self) -> Self:
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"interpret.warmup_epochs is {self.warmup_epochs:g} of {self.epochs} epochs; make it smaller"
            )
        return self

    @classmethod
    def identity_of(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides the interpreter; rivals come after it, and may be others in the same folder."""
        return {name: value for name, value in super().identity_of(record).items() if name != "rivals"}

    @property
    def num_warmup_epochs(self) -> float:
        """Of the linear warm-up."""
        return PAPER_WARMUP_SHARE * self.epochs if self.warmup_epochs is None else self.warmup_epochs
