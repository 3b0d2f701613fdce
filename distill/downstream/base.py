"""What every downstream task shares: labelled images, feature extractors, and the draw of few labels.

A task sees arrays and extractors only; URLs, checkpoints and teachers are turned into them by `pipeline`. An extractor
is frozen, takes uint8 images as they are stored, and brings its own normalisation, resizing and device.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from dtpipe.distill.stream.batch import scaled, student_images
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError, ShapeError

IGNORE = 255
"""Mask value of pixels that no score and no classifier looks at."""

RANDOM_INIT = "random initialisation"
RAW_PIXELS = "raw pixels"

Images = npt.NDArray[np.uint8]
IntArray = npt.NDArray[np.integer[Any]]


@dataclass(frozen=True)
class LabelledSet:
    """Images with class labels, masks, or both.

    Shapes: images (N, H, W, 3) uint8; labels (N,) integers from 0; masks (N, H, W) integers, 0 is background and 255 ignored.
    Raises: ShapeError when the parts do not fit each other; ConfigError when keys repeat.
    """

    images: Images
    keys: tuple[str, ...]
    labels: IntArray | None = None
    masks: IntArray | None = None
    class_names: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.shape[-1] != 3 or self.images.dtype != np.uint8:
            raise ShapeError(
                f"labelled images are {self.images.shape} {self.images.dtype}; they must be [N, H, W, 3] uint8"
            )
        if len(self.keys) != len(self.images):
            raise ShapeError(
                f"{len(self.keys)} keys stand beside {len(self.images)} labelled images; give one key per image"
            )
        if len(set(self.keys)) != len(self.keys):
            raise ConfigError("a key occurs twice among the labelled images; keys must be unique")
        if self.labels is not None and self.labels.shape != self.images.shape[:1]:
            raise ShapeError(f"labels are {self.labels.shape} for {len(self.images)} images; they must be [N]")
        if self.masks is not None and self.masks.shape != self.images.shape[:3]:
            raise ShapeError(
                f"masks are {self.masks.shape}, images {self.images.shape}; masks must have the images' height and width"
            )

    def __len__(self) -> int:
        return len(self.images)

    def subset(self, rows: npt.ArrayLike) -> LabelledSet:
        """The samples at `rows`, in that order."""
        rows = np.asarray(rows, dtype=np.int64)
        return replace(
            self,
            images=self.images[rows],
            keys=tuple(self.keys[row] for row in rows),
            labels=None if self.labels is None else self.labels[rows],
            masks=None if self.masks is None else self.masks[rows],
        )

    def foreground(self) -> LabelledSet:
        """The same samples with masks of two classes: 0 background, 1 anything else; ignored pixels stay ignored."""
        masks = need_masks(self)
        binary = np.where(masks == IGNORE, IGNORE, masks > 0).astype(np.uint8)
        return replace(self, masks=binary, class_names=("background", "foreground"))


def need_labels(labelled: LabelledSet) -> IntArray:
    """The class labels. Raises: ConfigError when there are none."""
    if labelled.labels is None:
        raise ConfigError(
            "this task needs class labels and the labelled images have none; give a source with class folders"
        )
    return labelled.labels


def need_masks(labelled: LabelledSet) -> IntArray:
    """The masks. Raises: ConfigError when there are none."""
    if labelled.masks is None:
        raise ConfigError(
            "this task needs masks and the labelled images have none; give a folder of masks beside the images"
        )
    return labelled.masks


def count_classes(*label_arrays: IntArray) -> int:
    """One more than the largest label of any of the arrays."""
    return max(int(labels.max()) for labels in label_arrays) + 1


@dataclass(frozen=True)
class Draw:
    """The labelled images of one seed: rows of the training set."""

    seed: int
    rows: npt.NDArray[np.int64]


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network, or raw pixels, as a function of images.

    `encode` takes (B, H, W, 3) uint8 on the CPU and returns {level: (B, C, h, w)} in floating point, on any device.
    `pool` says how a class task turns a level into a vector: the mean over positions, or all positions one after another.
    """

    name: str
    encode: Callable[[Tensor], dict[str, Tensor]]
    pool: Literal["mean", "flatten"] = "mean"

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Levels of a batch, without gradients. Raises: ShapeError when `encode` breaks its promise."""
        with torch.no_grad():
            levels = self.encode(images)
        for level, features in levels.items():
            if features.ndim != 4 or len(features) != len(images):
                raise ShapeError(
                    f"{self.name}: level {level} is {tuple(features.shape)} for {len(images)} images; need [B, C, h, w]"
                )
        return {level: features.float() for level, features in levels.items()}


@dataclass(frozen=True)
class PerSeed:
    """An extractor that is another one for each seed, such as a random initialisation."""

    name: str
    make: Callable[[int], FeatureExtractor]


def extractor_for(extractor: FeatureExtractor | PerSeed, seed: int) -> FeatureExtractor:
    """The extractor to use at `seed`, under its own name."""
    return replace(extractor.make(seed), name=extractor.name) if isinstance(extractor, PerSeed) else extractor


def draw_labelled(labelled: LabelledSet, num: int | None, seed: int, balanced: bool) -> npt.NDArray[np.int64]:
    """Rows of `num` images drawn by `seed`; all of them, in order of their keys, when `num` is None.

    The draw depends on the keys and the seed, not on the order of the set, and a smaller draw is the start of a larger
    one. `balanced` takes classes in turn, so that counts differ by at most one while every class lasts.

    Raises: ConfigError when there are fewer images, or (balanced) fewer draws than classes.
    """
    by_key = np.argsort(np.asarray(labelled.keys))
    if num is None:
        return by_key
    if not 1 <= num <= len(labelled):
        raise ConfigError(
            f"{num} labelled images are asked for and there are {len(labelled)}; ask for 1 to {len(labelled)}"
        )
    generator = np.random.Generator(np.random.Philox(seed))
    order = by_key[generator.permutation(len(by_key))]
    if not balanced:
        return order[:num]
    labels = need_labels(labelled)
    num_classes = len(np.unique(labels))
    if num < num_classes:
        raise ConfigError(f"{num} labelled images cannot cover {num_classes} classes; ask for {num_classes} or more")
    turn = _turn_within_class(labels[order])
    return order[np.argsort(turn, kind="stable")][:num]


def _turn_within_class(labels: IntArray) -> npt.NDArray[np.int64]:
    """For each label, how many equal ones stand before it."""
    turn = np.zeros(len(labels), dtype=np.int64)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        turn[rows] = np.arange(len(rows))
    return turn


def check_apart(train: LabelledSet, test: LabelledSet) -> None:
    """Refuse a test set that shares images with the labelled ones. Raises: ConfigError naming one of them."""
    shared = sorted(set(train.keys) & set(test.keys))
    if shared:
        raise ConfigError(
            f"{len(shared)} images are both labelled for training and held out, {shared[0]!r} for one; split by key"
        )


def batches(extractor: FeatureExtractor, images: Images, batch_size: int) -> Iterator[tuple[slice, dict[str, Tensor]]]:
    """Levels of all images in order, batch by batch, with the rows they belong to."""
    for start in range(0, len(images), batch_size):
        rows = slice(start, min(start + batch_size, len(images)))
        yield rows, extractor(torch.from_numpy(np.ascontiguousarray(images[rows])))


def raw_pixels(strides: Sequence[int] = (4, 8, 16, 32)) -> FeatureExtractor:
    """The images themselves, average-pooled to the student's strides: level l{n} is (B, 3, H/2^n, W/2^n) in [-1, 1].

    Class tasks take all positions of a level, since the mean colour alone says too little to be a fair opponent.
    """

    def encode(images: Tensor) -> dict[str, Tensor]:
        pixels = scaled(images)  # (B, 3, H, W)
        fitting = [stride for stride in strides if stride <= min(pixels.shape[-2:])]
        return {f"l{stride.bit_length() - 1}": nn.functional.avg_pool2d(pixels, stride) for stride in fitting}

    return FeatureExtractor(RAW_PIXELS, encode, pool="flatten")


def student_extractor(
    student: Student, device: torch.device | str = "cpu", name: str = "distilled"
) -> FeatureExtractor:
    """A student as an extractor, in eval mode on `device`; its levels are named by stride, l2 for stride 4.

    Images of another size than the student's are resized as in distillation.
    """
    student = student.to(device).eval()

    def encode(images: Tensor) -> dict[str, Tensor]:
        levels = student(student_images(images.to(device), student.spec.image_px))
        return {f"l{stride.bit_length() - 1}": level for stride, level in zip(student.strides, levels, strict=True)}

    return FeatureExtractor(name, encode)


def random_student(spec: StudentSpec, seed: int) -> Student:
    """A student with timm's initial weights, drawn from `seed` without touching the global generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return build_student(spec)


def calibrate_batch_norms(
    student: Student, images: Images, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Student:
    """Give the batch norms of an untrained student the statistics of `images` (uint8, unlabelled); returns it in eval mode.

    An untouched batch norm passes the first images on at a wild scale, which would make random features look worse than
    they are. Running statistics become plain averages over the batches; nothing else changes.
    """
    norms = [module for module in student.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]
    momenta = [norm.momentum for norm in norms]
    student.to(device).eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
        norm.train()
    with torch.no_grad():
        for start in range(0, len(images) if norms else 0, batch_size):
            batch = torch.from_numpy(np.ascontiguousarray(images[start : start + batch_size]))
            student(student_images(batch.to(device), student.spec.image_px))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return student.eval()


def random_initialisation(
    spec: StudentSpec, unlabelled: Images, batch_size: int = 64, device: torch.device | str = "cpu"
) -> PerSeed:
    """The student before any training, another one for each seed, batch norms calibrated on unlabelled training images."""

    def make(seed: int) -> FeatureExtractor:
        student = calibrate_batch_norms(random_student(spec, seed), unlabelled, batch_size, device)
        return student_extractor(student, device, RANDOM_INIT)

    return PerSeed(RANDOM_INIT, make)
