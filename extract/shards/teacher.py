"""A teacher over images as a producer, or over numbered samples that it makes itself."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.encode import Encoded, Sample, encode, stack_rows
from dtpipe.extract.latents import Latents, StoredLatents
from dtpipe.extract.noise import row_noise
from dtpipe.extract.precision import float32_error
from dtpipe.extract.shards.producer import PreparedRow
from dtpipe.extract.shards.reader import ImageReader
from dtpipe.extract.shards.timeline import ShardClock
from dtpipe.extract.sources.features import FeaturesSource
from dtpipe.extract.sources.registry import open_images
from dtpipe.extract.teachers.arithmetic import exact
from dtpipe.extract.teachers.base import Teacher
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.codecs.base import LevelCodec
from dtpipe.manifests.errors import BadImage, DamagedDataError, InputError, TeacherError
from dtpipe.manifests.layout.arrays import ShardArrays
from dtpipe.manifests.schema import FLOAT32_ERROR, IndexRow, Plan, Recipe
from dtpipe.manifests.write.listing import Listing


@dataclass(frozen=True)
class TeacherJob:
    """Which teacher runs on which images; a `Job`."""

    teacher: TeacherConfig
    images: str | None
    source_kind: str
    num_samples: int | None = None  # in place of images
    max_pixels: int = 128_000_000
    loaded: Teacher | None = None
    """The teacher, where this process has it already."""

    def open(self, plan: Plan, listing: Listing, device: str) -> TeacherProducer:
        """The loaded teacher and the open source.

        Raises: TeacherError for other weights than the plan's, and what the source and the teacher raise.
        """
        recipe = plan.recipe
        with exact(torch.device(device), recipe.compute.threads):
            teacher = load_teacher(self.teacher, device) if self.loaded is None else self.loaded
        check_weights(teacher, recipe, self.teacher.path)
        source = open_images(self.images, self.num_samples, self.source_kind)
        reader = ImageReader(source, listing, recipe.transform, self.max_pixels)
        latents = None
        if isinstance(source, FeaturesSource):
            latents = StoredLatents.find(source.dataset, teacher.spec, recipe)
        return TeacherProducer(self.teacher, teacher, recipe, reader, device, latents)


def check_weights(teacher: Teacher, recipe: Recipe, path: str) -> None:
    """Raises: TeacherError when these are not the weights of the recipe."""
    digest, expected = teacher.spec.weights_blake3, recipe.teacher.weights_blake3
    if digest != expected:
        raise TeacherError(
            f"{path} on {os.uname().nodename}: weights digest is {digest[:16]}.., the plan says {expected[:16]}..; "
            f"give every node the same checkpoint"
        )


@dataclass(frozen=True)
class TeacherProducer:
    """A `Producer`: images, or nothing, and noise through a teacher. The content of a row is a `Sample`."""

    config: TeacherConfig
    teacher: Teacher
    recipe: Recipe
    reader: ImageReader
    device: str
    latents: StoredLatents | None = None
    """Where the source has them: the teacher starts from these."""

    def prepare(self, index: IndexRow) -> PreparedRow:
        """Pixels, noise and latents of one row; an image that cannot be decoded comes back as bad, with its reason.

        Raises: InputError when reading fails for a reason that may pass.
        """
        recipe, clock = self.recipe, ShardClock()
        image: NDArray[np.uint8] | None = None
        try:
            if not recipe.synthesized:
                data = self.reader.read(index.row)
                clock.lap("read")
                decoded = self.reader.decode_bytes(data)
                size = {"original_height": decoded.shape[0], "original_width": decoded.shape[1]}
                index = index.model_copy(update=size)
                image = self.reader.resize(decoded)
                clock.lap("decode")
        except BadImage as err:
            return PreparedRow(index.model_copy(update={"status": f"bad: {err}"}), None, clock.spans)
        image_px = (recipe.transform.height, recipe.transform.width)
        noise = row_noise(recipe.noise_seed, index.key, recipe.views, self.teacher.spec.noise_shapes, image_px)
        clock.lap("noise")
        latents = self._latents(index.row)
        clock.lap("read")
        return PreparedRow(index, Sample(noise, image, latents), clock.spans)

    def _latents(self, row: int) -> Latents:
        """Raises: InputError when the dataset that has them is damaged there."""
        if self.latents is None:
            return {}
        try:
            stored = [int(self.reader.listing.uris[row])]
            return {flip: self.latents.read(stored, flip)[0] for flip in {view.flip for view in self.recipe.views}}
        except DamagedDataError as err:
            raise InputError(str(err)) from err

    def produce(self, rows: Sequence[PreparedRow], batch_size: int) -> Encoded:
        """As `Producer.produce`; bad rows are zeros."""
        samples: list[Sample | None] = [row.content for row in rows]
        stacked = stack_rows(samples, self.recipe.views, self.recipe.levels)
        return encode(self.teacher, stacked, self.device, self.recipe.compute.in_batches(batch_size))

    def measure(self, arrays: ShardArrays, codecs: Mapping[str, LevelCodec], batch_size: int) -> dict[str, Any]:
        """What low precision costs."""
        if self.recipe.compute.dtype == "float32":
            return {}
        compute = self.recipe.compute.in_batches(batch_size)
        recipe = self.recipe.model_copy(update={"compute": compute})
        return {FLOAT32_ERROR: float32_error(self.config, recipe, arrays, codecs, self.device)}
