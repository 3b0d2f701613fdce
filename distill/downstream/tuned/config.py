"""Settings of tuned tasks: how backbone and head are trained on labels, and how they are scored."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dtpipe.distill.downstream.config import Positive
from dtpipe.distill.engine.trackers.config import Tracking
from dtpipe.manifests.schema import Settings, StrictModel

Share = Annotated[float, Field(ge=0, lt=1)]
_Px = Annotated[int, Field(ge=1)]


class AugmentConfig(StrictModel):
    """How training images are varied. Each task uses those that its kind of target has a meaning for."""

    crop_px: tuple[_Px, _Px] | None = Field(
        default=None,
        description="Height and width of the random crop; default: the student's size, none for detection.",
    )
    scale: tuple[Positive, Positive] = Field(
        default=(1.0, 1.0), description="Range of the random scale; of the area for classes, else of the sides."
    )
    short_px: tuple[_Px, ...] = Field(
        default=(), description="Short sides that images are resized to, one drawn each time; default: as they are."
    )
    long_px: int | None = Field(default=None, ge=1, description="Longest long side after that; default: no limit.")
    flip: float = Field(default=0.5, ge=0, le=1, description="Chance of a mirrored image; 0 for digits and letters.")
    photometric: bool = Field(default=False, description="Vary brightness, contrast, saturation and hue (SSD's rule).")
    max_class_share: float = Field(
        default=1.0, gt=0, le=1, description="Draw a crop again where one class has more of it (mmseg: 0.75)."
    )
    policy: str | None = Field(
        default=None, description="Of classes: timm's rand-.. or augmix.., or trivial for TrivialAugmentWide."
    )
    erasing: float = Field(default=0.0, ge=0, le=1, description="Of classes: chance of random erasing.")
    mixup: float = Field(default=0.0, ge=0, description="Of classes: mixup's alpha; 0 is off.")
    cutmix: float = Field(default=0.0, ge=0, description="Of classes: CutMix' alpha; 0 is off.")
    smoothing: Share = Field(default=0.0, description="Of classes: label smoothing.")
    repeats: int = Field(default=1, ge=1, description="Of classes: repeated augmentation, times per image and batch.")

    @model_validator(mode="after")
    def _scale_from_small_to_large(self) -> AugmentConfig:
        if self.scale[0] > self.scale[1]:
            raise ValueError(
                f"eval.tune.augment.scale goes from {self.scale[0]:g} down to {self.scale[1]:g}; swap them"
            )
        return self


class HeadConfig(StrictModel):
    """What stands on the backbone; each task reads its own."""

    width: int = Field(default=256, ge=8, description="Channels inside the head (UPerNet of mmseg: 512).")
    norm: Literal["batch", "group", "none"] = Field(default="batch", description="Norms inside the head.")
    dropout: Share = Field(default=0.1, description="Before the last layer of classes and segmentation.")
    pooled_norm: Literal["auto", "none", "layer", "batch"] = Field(
        default="auto",
        description="Of classes: norm of the pooled features, batch without weights; auto is that of timm's classifier "
        "of the model: layer for ConvNeXts, none for ResNets; none where a distilled linear layer is the start.",
    )
    aux_weight: float = Field(default=0.4, ge=0, description="Of the auxiliary FCN head's loss; 0 leaves it out.")
    ppm_scales: tuple[int, ...] = Field(
        default=(1, 2, 3, 6), min_length=1, description="Of UPerNet: cells per side of each pooled map."
    )
    level_norms: bool = Field(
        default=True,
        description="Of segmentation: layer norms of a ConvNeXt's levels; a distilled decoder has learned without.",
    )
    stride: int | None = Field(
        default=None, ge=1, description="Of fcn: stride of the one level it reads; default: all, joined at the finest."
    )
    loss: Literal["cross_entropy", "binary"] = Field(
        default="cross_entropy", description="Of classes: binary is cross-entropy per class, as with LAMB recipes."
    )
    cascade: bool = Field(default=False, description="Of detection: three box heads one after another.")
    convs: int = Field(default=0, ge=0, description="Of detection: convolutions in the box head (4 is 4conv1fc).")
    masks: bool = Field(default=True, description="Of detection: a mask head; false where labels are boxes alone.")
    anchor_scale: float = Field(
        default=8.0, gt=0, description="Of detection: side of an anchor over its level's stride; 2 to 4 at 64 px."
    )
    samples: int = Field(
        default=512, ge=1, description="Of detection: regions per image that the box head learns from; 32 at 64 px."
    )
    max_detections: int = Field(default=100, ge=1, description="Of detection: per image.")
    semantic_weight: float = Field(default=0.5, gt=0, description="Of panoptic: weight of the semantic branch's loss.")
    min_stuff_px: int = Field(
        default=4096, ge=0, description="Of panoptic: stuff of a smaller area is left out of a prediction, px."
    )


class InferenceConfig(StrictModel):
    """How whole images are looked at."""

    short_px: int | None = Field(
        default=None, ge=1, description="Short side they are brought to; default: as they are."
    )
    long_px: int | None = Field(default=None, ge=1, description="Longest long side after that.")
    window_px: tuple[_Px, _Px] | None = Field(
        default=None, description="Of segmentation: sliding window of this height and width; default: whole images."
    )
    stride_px: tuple[_Px, _Px] | None = Field(default=None, description="Its step; default: two thirds of the window.")
    flips: bool = Field(default=False, description="Average with the mirrored image.")
    scales: tuple[Positive, ...] = Field(default=(1.0,), min_length=1, description="Average over these sizes.")


class TuneRun(Tracking):
    """How a training is carried out; none of it changes what is learned."""

    workers: int | None = Field(
        default=None,
        ge=0,
        description="Processes that read and augment images ahead; default: one for each CPU but one, 8 at most, "
        "none where there are fewer than 4.",
    )
    prefetch: int = Field(default=4, ge=1, description="Passes that each of them is ahead.")
    score_batch: int = Field(
        default=16, ge=1, description="Held-out images per pass; fewer where they have over 4 million pixels together."
    )
    keep_predictions: bool = Field(default=True, description="Keep what is predicted of each held-out image.")
    log_every: int = Field(default=20, ge=1, description="Steps per line of metrics.jsonl.")
    save_every: int = Field(default=1000, ge=1, description="Steps between two writes of last.pt.")
    save_every_s: float = Field(default=300.0, gt=0, description="Longest time between two.")
    channels_last: bool = Field(default=True, description="Channels-last memory layout, which GPUs prefer.")
    train_workers: int | None = Field(
        default=None, ge=1, description="Train on so many Ray workers, one GPU each where there are any."
    )
    ray_address: str | None = Field(default=None, description="Ray cluster; default: RAY_ADDRESS, else a local one.")
    max_restarts: int = Field(default=3, ge=0, description="How often Ray Train starts workers again after one died.")


class TuneConfig(Settings):
    """How a backbone and a head are trained on labels."""

    steps: int | None = Field(default=None, ge=1, description="Optimiser steps; give these or epochs.")
    epochs: int | None = Field(default=None, ge=1, description="Passes over the labelled images.")
    batch_size: int = Field(default=16, ge=1, description="Images per step over all devices; fewer where fewer are.")
    micro_batch: int | None = Field(default=None, ge=1, description="Images per pass and device; default: all.")
    opt: Literal["adamw", "lamb", "sgd", "lars"] = Field(
        default="adamw", description="Optimiser: timm's; sgd has no Nesterov momentum, lamb SparK's options."
    )
    lr: float = Field(default=1e-3, gt=0, description="Peak learning rate, not multiplied by the batch size.")
    lr_grid: tuple[Positive, ...] = Field(
        default=(), description="Rates to choose from, for each arm on folds of its labelled images; default: lr alone."
    )
    folds: int = Field(default=3, ge=2, description="Folds that choose a rate.")
    lr_choice: Literal["each_seed", "first_seed"] = Field(
        default="each_seed",
        description="first_seed: the rate that the first seed's labelled images choose serves the other seeds too.",
    )
    backbone_lr: float = Field(
        default=1.0, ge=0, description="Times lr for the backbone of pre-trained and random arms alike; 0 freezes it."
    )
    layer_decay: float = Field(default=1.0, gt=0, le=1, description="Rate of each layer over that of the next.")
    layer_groups: tuple[Annotated[int, Field(ge=1)], ...] = Field(
        default=(), description="Blocks that make one layer of the decay, for each stage; default: each block is one."
    )
    weight_decay: float = Field(default=0.05, ge=0, description="Decoupled for AdamW and LAMB.")
    betas: tuple[Share, Share] = Field(default=(0.9, 0.999), description="Of AdamW and LAMB.")
    momentum: Share = Field(default=0.9, description="Of SGD and LARS.")
    schedule: Literal["cosine", "poly", "steps", "constant"] = Field(default="cosine", description="After the warm-up.")
    power: float = Field(default=0.9, gt=0, description="Of poly.")
    min_lr: float = Field(default=0.0, ge=0, description="Where cosine and poly end, as a share of lr.")
    milestones: tuple[Share, ...] = Field(
        default=(), description="Of steps: shares of the run at which the rate falls."
    )
    gamma: float = Field(default=0.1, gt=0, le=1, description="Of steps: what it is multiplied by there.")
    warmup: Share = Field(default=0.1, description="Share of the steps with a rising rate.")
    warmup_start: Share = Field(default=0.0, description="Where it rises from, as a share of lr.")
    clip_grad: float | None = Field(
        default=None, gt=0, description="Largest norm of the gradient; default: none, as SparK's LAMB here has none."
    )
    drop_path: Share = Field(default=0.0, description="Stochastic depth of the backbone.")
    sync_bn: bool = Field(default=False, description="Batch norm over all devices.")
    frozen_norms: bool = Field(default=False, description="The backbone's batch norms keep their statistics.")
    ema_decay: float | None = Field(default=None, gt=0, lt=1, description="Average of the weights, which is scored.")
    precision: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Of the forward pass; auto is bfloat16 on a GPU that has it."
    )
    from_decoder: bool = Field(
        default=True,
        description="Of segment, few-labels and finetune: an arm whose run distilled soft labels starts from its "
        "decoder too (appendix G.4).",
    )
    augment: AugmentConfig = AugmentConfig()
    head: HeadConfig = HeadConfig()
    inference: InferenceConfig = InferenceConfig()
    run: TuneRun = TuneRun()

    @model_validator(mode="after")
    def _one_length(self) -> TuneConfig:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give eval.tune.steps or eval.tune.epochs, one of them (null takes one away)")
        if self.micro_batch is not None and self.micro_batch > self.batch_size:
            raise ValueError(
                f"eval.tune.micro_batch {self.micro_batch} is larger than eval.tune.batch_size {self.batch_size}"
            )
        return self


LOOKED_AT_AFTERWARDS = ("max_detections", "min_stuff_px")
"""Fields of `head` that no training reads."""


class TunedRecipe(Settings):
    """One training as its folder knows it; `-c FOLDER/config.yaml` reads it back."""

    tune: TuneConfig = Field(default_factory=lambda: TuneConfig.model_construct())

    @classmethod
    def identity_of(cls, record: Mapping[str, Any]) -> dict[str, Any]:
        """All that decides what is learned: how images are looked at afterwards may change, and is scored anew."""
        tune = TuneConfig.identity_of(record.get("tune") or {})
        head = {name: value for name, value in (tune.get("head") or {}).items() if name not in LOOKED_AT_AFTERWARDS}
        return {"tune": {name: value for name, value in tune.items() if name != "inference"} | {"head": head}}
