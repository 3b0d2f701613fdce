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

from dtpipe.distill.downstream.labelled import LabelledSet, SampleRows
from dtpipe.distill.stream.batch import scaled, student_images
from dtpipe.distill.student.norms import batch_norms, fresh_statistics
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ShapeError, saying_what_to_lower
from dtpipe.manifests.phases import phase

RANDOM_INIT = "random initialisation"
RAW_PIXELS = "raw pixels"
POSITION = "position alone"
PATCHES = "pixel patches and position"
_CELL_PX, _WAVES = 4, 8
NUM_COSINES = _WAVES**2 - 1


@dataclass(frozen=True)
class FeatureExtractor:
    """A frozen network, or raw pixels, as a function of images.

    `encode` takes (B, H, W, 3) uint8 on the CPU and returns {level: (B, C, h, w)} in floating point, on any device.
    `pool` says how a class task turns a level into a vector: the mean over positions, or all positions in a row.
    """

    name: str
    encode: Callable[[Tensor], dict[str, Tensor]]
    pool: Literal["mean", "flatten"] = "mean"
    read: Callable[[Sequence[str]], Tensor] | None = None
    """Reads images by their keys at the extractor's own size, (B, H, W, 3) uint8; None: it takes those of the task."""

    def levels(self, labelled: LabelledSet, rows: SampleRows) -> dict[str, Tensor]:
        """Levels of some images of a set. Raises: as `__call__`."""
        if self.read is None:
            return self(labelled.read_images(rows))
        return self(self.read([labelled.keys[int(row)] for row in rows]))

    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        """Levels of a batch, without gradients.

        Raises: ShapeError when `encode` breaks its promise; DeviceMemoryError.
        """
        smaller = "run the same command again with a smaller eval.probe.batch_size, or --device cpu"
        with saying_what_to_lower(self.name, "the device", len(images), smaller), torch.no_grad():
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
    with phase("images", len(labelled)) as seen:
        for start in range(0, len(labelled), batch_size):
            yield range(start, min(start + batch_size, len(labelled)))
            seen.done = min(start + batch_size, len(labelled))


def raw_pixels(strides: Sequence[int] = (4, 8, 16, 32)) -> FeatureExtractor:
    """The images themselves, average-pooled to the student's strides: level l{n} is (B, 3, H/2^n, W/2^n) in [-1, 1].

    Class tasks take all positions of a level, since the mean colour alone says too little to be a fair opponent.
    """

    def encode(images: Tensor) -> dict[str, Tensor]:
        pixels = scaled(images)  # (B, 3, H, W)
        fitting = [stride for stride in strides if stride <= min(pixels.shape[-2:])]
        return {f"l{stride.bit_length() - 1}": nn.functional.avg_pool2d(pixels, stride) for stride in fitting}

    return FeatureExtractor(RAW_PIXELS, encode, pool="flatten")


def position_prior() -> FeatureExtractor:
    """Where a cell is and nothing else: the same levels for every image, at stride 4.

    l2 is (B, `NUM_COSINES`, H/4, W/4): the lowest cosines of the place in height and width.
    """

    def encode(images: Tensor) -> dict[str, Tensor]:
        return {"l2": _cosines(images).expand(len(images), -1, -1, -1)}

    return FeatureExtractor(POSITION, encode)


def patches_and_position() -> FeatureExtractor:
    """The pixels around a cell beside its place: l2 is (B, 192 + `NUM_COSINES`, H/4, W/4), patches of 8 x 8 px."""

    def encode(images: Tensor) -> dict[str, Tensor]:
        pixels = nn.functional.pad(scaled(images), (2, 2, 2, 2), mode="replicate")
        height, width = images.shape[1] // _CELL_PX, images.shape[2] // _CELL_PX
        patches = nn.functional.unfold(pixels, 2 * _CELL_PX, stride=_CELL_PX)  # (B, 192, h * w)
        places = _cosines(images).expand(len(images), -1, -1, -1)
        return {"l2": torch.cat([patches.view(len(images), -1, height, width), places], dim=1)}

    return FeatureExtractor(PATCHES, encode)


def _cosines(images: Tensor) -> Tensor:
    """Products of the cosines of half waves over height and width, but for the constant.

    Shapes: (B, H, W, 3) -> (1, NUM_COSINES, H/4, W/4).
    """
    height, width = images.shape[1] // _CELL_PX, images.shape[2] // _CELL_PX
    waves = torch.arange(_WAVES)[:, None] * torch.pi
    down = torch.cos(waves * (torch.arange(height) + 0.5) / height)  # (waves, h)
    across = torch.cos(waves * (torch.arange(width) + 0.5) / width)
    return torch.einsum("ih,jw->ijhw", down, across).reshape(1, -1, height, width)[:, 1:]


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
    """Give the batch norms of an untrained student the statistics of images; returns it in eval mode."""
    norms = batch_norms(student.to(device).eval())
    with torch.no_grad(), fresh_statistics(norms):
        for rows in row_batches(unlabelled, batch_size) if norms else ():
            student(student_images(unlabelled.read_images(rows).to(device), student.spec.image_px))
    return student.eval()


def random_initialisation(
    spec: StudentSpec, unlabelled: LabelledSet, batch_size: int = 64, device: torch.device | str = "cpu"
) -> PerSeed:
    """The student before any training, another one for each seed, batch norms calibrated on training images."""

    def make(seed: int) -> FeatureExtractor:
        student = calibrate_batch_norms(random_student(spec, seed), unlabelled, batch_size, device)
        return student_extractor(student, device, RANDOM_INIT)

    return PerSeed(RANDOM_INIT, make)
