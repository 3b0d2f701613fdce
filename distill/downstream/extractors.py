"""Frozen networks, and raw pixels, as functions from images to levels.

An extractor takes uint8 images as they are stored, and brings its own normalisation, resizing and device; `pipeline`
makes extractors of checkpoints and teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.distill.stream.batch import scaled, student_images
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ShapeError

RANDOM_INIT = "random initialisation"
RAW_PIXELS = "raw pixels"


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network, or raw pixels, as a function of images.

    `encode` takes (B, H, W, 3) uint8 on the CPU and returns {level: (B, C, h, w)} in floating point, on any device.
    `pool` says how a class task turns a level into a vector: the mean over positions, or all positions in a row.
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


def row_batches(labelled: LabelledSet, batch_size: int) -> Iterator[range]:
    """The rows of a set in order, cut into batches."""
    for start in range(0, len(labelled), batch_size):
        yield range(start, min(start + batch_size, len(labelled)))


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
    student: Student, unlabelled: LabelledSet, batch_size: int = 64, device: torch.device | str = "cpu"
) -> Student:
    """Give the batch norms of an untrained student the statistics of images; returns it in eval mode.

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
        for rows in row_batches(unlabelled, batch_size) if norms else ():
            student(student_images(unlabelled.read_images(rows).to(device), student.spec.image_px))
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return student.eval()


def random_initialisation(
    spec: StudentSpec, unlabelled: LabelledSet, batch_size: int = 64, device: torch.device | str = "cpu"
) -> PerSeed:
    """The student before any training, another one for each seed, batch norms calibrated on training images."""

    def make(seed: int) -> FeatureExtractor:
        student = calibrate_batch_norms(random_student(spec, seed), unlabelled, batch_size, device)
        return student_extractor(student, device, RANDOM_INIT)

    return PerSeed(RANDOM_INIT, make)
