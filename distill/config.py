"""Settings of `dtpipe distill`, one pydantic model; defaults are the paper's for AdamW (table 17 and appendix D.1).

One half decides the result of training: a run that is gone on with under another value is refused. The half `run` only
says how it is carried out, and may change.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator

from dtpipe.distill.engine.trackers.config import Tracking
from dtpipe.manifests.schema import DeviceName, Settings, Size, StrictModel
from dtpipe.manifests.store.paths import local_place, whole_place
from dtpipe.manifests.words import count_of

PAPER_BATCH_SIZE = 256
PAPER_WARMUP_SHARE = 0.2  # 20 of 100 epochs


class StudentConfig(StrictModel):
    """The backbone that is trained."""

    name: str = Field(
        default="resnet50", description="A timm model; `dtpipe list students` says at which strides each gives levels."
    )
    pretrained: bool = Field(default=False, description="Start from timm's published weights instead of random ones.")


class RegressorConfig(StrictModel):
    """The module between student and teacher levels; thrown away after training."""

    width: int = Field(default=256, ge=1, description="Channels inside the regressor.")
    kind: str = Field(
        default="fpn_ppm", description="fpn, fpn_attention, pafpn or fpn_ppm: the rows of the paper's table 8."
    )
    ppm_scales: tuple[int, ...] = Field(
        default=(1, 2, 3, 6), min_length=1, description="Cells per side of each pooled map of fpn_ppm."
    )
    norm: Literal["batch", "group"] = Field(default="batch", description="Norm inside the regressor.")
    timestep: bool | None = Field(
        default=None,
        description="Whether each level's head knows the timestep; default: where targets are of several.",
    )


class LossConfig(StrictModel):
    """Equations (1)-(3): L_feat = mse_weight * L_MSE + at_weight * L_AT; `<name>_weight` is of loss `<name>`."""

    mse_weight: float = Field(default=1.0, ge=0, description="Weight of equation (1).")
    at_weight: float = Field(default=10.0, ge=0, description="lambda_AT, the weight of equation (2).")
    cosine_weight: float = Field(
        default=0.0, ge=0, description="Weight of the cosine distance, which is not in the paper."
    )
    whiten: Literal["layer", "channel", "dataset", "none"] = Field(
        default="layer",
        description="Teacher levels: LayerNorm over (C,H,W) or over C per position; each channel by its mean and "
        "variance in the dataset; or none. AT takes them raw.",
    )
    statistics: int | None = Field(
        default=None,
        ge=1,
        description="Encodings (samples times views) that say each channel's mean and variance, for `dataset` and R2. "
        "Default: 512 stored ones, or all where there are fewer; 64 of a teacher that only runs live.",
    )

    @property
    def weights(self) -> dict[str, float]:
        """Weight by loss, 0 where it is off."""
        return {
            name.removesuffix("_weight"): getattr(self, name)
            for name in type(self).model_fields
            if name.endswith("_weight")
        }


class LabelsConfig(StrictModel):
    """Equations (5) and (6): soft labels of an interpreter, joined to the features or in their place."""

    weight: float | None = Field(
        default=None,
        ge=0,
        description="lambda_ld, the weight of equation (5); default: 1 where the data has soft labels.",
    )
    temperature: float = Field(default=4.0, gt=0, description="tau, by which logits are divided.")
    confidence: float | None = Field(
        default=None,
        gt=0,
        lt=1,
        description="Positions whose likeliest class has a lower probability, at tau 1, teach nothing; default: all.",
    )
    width: int | None = Field(
        default=None, ge=8, description="Channels inside the decoder; default: the regressor's, whose layers it shares."
    )
    dropout: float = Field(default=0.1, ge=0, lt=1, description="Before the decoder's last layer.")


class DistillRun(Tracking):
    """How a run is carried out: where, and with what resources."""

    out: str = Field(description="Run folder to write.")
    allow_incomplete: bool = Field(
        default=False, description="Train on the shards that an unfinished dataset has; a resumed run keeps to those."
    )
    device: DeviceName = Field(default="auto", description="Where the student trains.")
    train_workers: int | None = Field(
        default=None, ge=1, description="Train on so many Ray workers, one GPU each where there are any."
    )
    ray_address: str | None = Field(default=None, description="Ray cluster; default: RAY_ADDRESS, else a local one.")
    max_restarts: int = Field(
        default=3, ge=0, description="How often Ray Train starts the workers again after one has died."
    )
    channels_last: bool = Field(
        default=True, description="Weights and images in channels-last memory layout, which GPUs prefer."
    )
    compile: bool = Field(
        default=False,
        description="Compile student, regressor and feature losses with torch.compile, which fuses the passes over "
        "each level, for GPUs: a start of minutes; on the CPU it needs a C++ compiler, and steps are no faster.",
    )
    read_threads: int = Field(default=2, ge=1, description="Threads that read batches ahead.")
    prefetch: int = Field(default=4, ge=1, description="Micro-batches read ahead, at most.")
    prefetch_mb: int = Field(
        default=2048, ge=1, description="Memory for what is read ahead, in MB; a single micro-batch may be larger."
    )
    cache: str | None = Field(
        default=None,
        description="Local folder that keeps the shards of remote datasets, shared by all runs that name it.",
    )
    cache_gb: float = Field(
        default=100.0, gt=0, description="Size of that folder; of larger datasets it keeps as many shards as fit."
    )
    log_every: int = Field(default=20, ge=1, description="Optimiser steps per line of metrics.jsonl.")
    save_every_s: float = Field(
        default=300.0, gt=0, description="Longest time between two writes of last.pt; each epoch ends with one."
    )
    keep_checkpoints: int = Field(default=2, ge=0, description="Epoch checkpoints kept in checkpoints/ beside last.pt.")

    _local = field_validator("out", "cache")(local_place)


class DistillRecipeConfig(Settings):
    """What is trained, on what, and how: all that determines the student."""

    PLACES: ClassVar[frozenset[str]] = frozenset({"datasets", "keys", "interpreter"})  # data.json says what they hold

    datasets: tuple[str, ...] = Field(
        default=(),
        description="URLs of feature datasets, concatenated or joined; none: the teacher runs live over images.",
    )
    join: bool = Field(
        default=False,
        description="Join the datasets by key (other levels of the same images) instead of concatenating.",
    )
    sample_weights: tuple[Annotated[float, Field(gt=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="Passes over each concatenated dataset per epoch; of 0.5, other halves in each. Default: 1.",
    )
    loss_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        default=None,
        min_length=1,
        description="Weight in the loss of each joined dataset's levels. Default: all levels weigh the same.",
    )
    keys: str | None = Field(default=None, description="File with one key per line: train on these samples only.")
    include: tuple[str, ...] = Field(
        default=(), description="Shell pattern of keys to train on, e.g. 'cat/*'; `*` also matches `/`."
    )
    exclude: tuple[str, ...] = Field(default=(), description="Shell pattern of keys to leave out.")
    limit: int | None = Field(
        default=None, ge=1, description="Train on so many samples, chosen by a hash of their keys."
    )
    levels: tuple[str, ...] | None = Field(
        default=None, min_length=1, description="Levels to regress; default: all features of the dataset."
    )
    student: StudentConfig = StudentConfig()
    student_px: Size | None = Field(default=None, description="Student's image size in px; default: the dataset's.")
    regressor: RegressorConfig = RegressorConfig()
    loss: LossConfig = LossConfig()
    labels: LabelsConfig = LabelsConfig()
    epochs: int = Field(default=100, ge=1, description="Passes over the data.")
    batch_size: int = Field(default=PAPER_BATCH_SIZE, ge=1, description="Samples per optimiser step, over all devices.")
    micro_batch: int | None = Field(
        default=None, ge=1, description="Samples per forward pass; gradients add up to the batch. Default: all."
    )
    opt: Literal["adamw", "lamb"] = Field(default="adamw", description="Optimiser, timm's.")
    lr: float = Field(default=4e-3, gt=0, description="Peak learning rate, as listed in the paper.")
    lr_scale: Literal["none", "linear"] = Field(default="none", description="linear: multiply lr by batch_size/256.")
    min_lr: float = Field(default=0.0, ge=0, description="Learning rate at the end of the cosine.")
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="Momentum terms of the optimiser.")
    weight_decay: float = Field(
        default=0.05, ge=0, description="Decoupled weight decay; none on biases, norms and position embeddings."
    )
    warmup_epochs: float | None = Field(
        default=None, ge=0, description="Linear warm-up; default: a fifth of the epochs, the paper's 20 of 100."
    )
    warmup_steps: int | None = Field(default=None, ge=0, description="Warm-up in optimiser steps instead of epochs.")
    clip_grad: float | None = Field(
        default=None,
        gt=0,
        description="Largest gradient norm; default: none for AdamW, and timm's 1 for LAMB, which clips by itself.",
    )
    flip: bool | None = Field(
        default=None,
        description="Horizontal flips, from stored flipped views or by a live teacher; default: where flipped views "
        "are stored, or reencode is 1 over images.",
    )
    equivariant: bool = Field(
        default=False,
        description="Mirror stored features for flips where no flipped views are stored; they are not the true ones.",
    )
    reencode: float = Field(
        default=0.0, ge=0, le=1, description="Share of samples whose features the live teacher makes anew."
    )
    interpreter: str | None = Field(
        default=None,
        description="Folder of the interpreter that makes soft labels of samples which are encoded live; default: "
        "where the joined soft labels say it was.",
    )
    mismatch: int | None = Field(
        default=None,
        ge=0,
        description="A control that must fail: seed by which images get the features of others. Default: their own.",
    )
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="Keep an exponential moving average of the student."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto", description="auto: bfloat16 autocast where the GPU has it."
    )
    seed: int = Field(default=0, ge=0, description="Seed of initial weights, order, flips and views.")
    sync_bn: bool = Field(
        default=False, description="Batch norm statistics over all GPUs; default: of each micro-batch on its own."
    )

    @model_validator(mode="after")
    def _some_loss(self) -> Self:
        if not any(self.loss.weights.values()) and not self.labels.weight:
            names = ", ".join(f"distill.loss.{name}_weight" for name in self.loss.weights)
            raise ValueError(
                f"{names} are all 0; nothing is left to train on. To train on soft labels alone, set "
                "distill.labels.weight too"
            )
        if self.interpreter is not None and self.labels.weight == 0:
            raise ValueError("distill.interpreter makes soft labels, and distill.labels.weight is 0; leave one out")
        return self

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.warmup_epochs is not None and self.warmup_steps is not None:
            raise ValueError("distill.warmup_epochs and distill.warmup_steps are both set; keep one")
        if self.warmup_epochs is not None and self.warmup_epochs >= self.epochs:
            raise ValueError(
                f"distill.warmup_epochs is {self.warmup_epochs:g} of {self.epochs} epochs; make it smaller"
            )
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(
                f"distill.micro_batch {self.micro_batch} is larger than distill.batch_size {self.batch_size}"
            )
        if self.min_lr > self.peak_lr:
            raise ValueError(f"distill.min_lr {self.min_lr} is above the peak learning rate {self.peak_lr}")
        return self

    _whole = field_validator("datasets", "keys", "interpreter")(whole_place)

    @model_validator(mode="after")
    def _weights_fit(self) -> Self:
        num = len(self.datasets)
        if self.sample_weights is not None and self.join:
            raise ValueError(
                "distill.sample_weights are for datasets one after the other; with --join give distill.loss_weights"
            )
        if self.loss_weights is not None and not self.join:
            raise ValueError(
                "distill.loss_weights are for datasets joined by key; without --join give distill.sample_weights"
            )
        if self.loss_weights is not None and not any(self.loss_weights):
            raise ValueError("distill.loss_weights are all 0; nothing is left to train on")
        for name in ("sample_weights", "loss_weights"):
            weights = getattr(self, name)
            if weights is not None and len(weights) != num:
                values, datasets = count_of(len(weights), "value"), count_of(num, "dataset")
                raise ValueError(f"distill.{name} has {values} for {datasets}; give one each")
        if self.mismatch is not None and (self.reencode or not self.datasets):
            raise ValueError(
                "distill.mismatch gives images the stored features of others, and a live teacher runs; leave one of "
                "them out"
            )
        if self.equivariant and self.flip is False:
            raise ValueError(
                "distill.equivariant mirrors features for flips, and distill.flip is off; leave one of them out"
            )
        return self

    @property
    def peak_lr(self) -> float:
        """Learning rate at the end of the warm-up, after `lr_scale`."""
        return self.lr * self.batch_size / PAPER_BATCH_SIZE if self.lr_scale == "linear" else self.lr

    def num_warmup_steps(self, steps_per_epoch: int) -> int:
        """Optimiser steps of the linear warm-up."""
        if self.warmup_steps is not None:
            return self.warmup_steps
        epochs = PAPER_WARMUP_SHARE * self.epochs if self.warmup_epochs is None else self.warmup_epochs
        return round(epochs * steps_per_epoch)


class DistillConfig(DistillRecipeConfig):
    """All settings of one distillation run."""

    run: DistillRun
