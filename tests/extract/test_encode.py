"""The one place where a teacher is run: what a row gives depends on nothing but the row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.encode import Rows, Sample, encode, stack_rows
from dtpipe.extract.noise import row_noise
from dtpipe.extract.pixels import from_pixels, to_pixels
from dtpipe.extract.teachers.base import TapSpec, TeacherSpec
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ShapeError
from dtpipe.manifests.schema import ComputeRecipe, LevelSpec, ViewSpec
from parts.teachers import TinyGan, gan_network

VIEWS = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=3, timestep=90, flip=True), ViewSpec(draw=0, timestep=90))
IMAGES = np.random.Generator(np.random.Philox(0)).integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
LEVELS = (
    LevelSpec(name="l1", stride=2, channels=16, height=8, width=8, tap="up_blocks.1.resnets.1"),
    LevelSpec(name="l2", stride=4, channels=16, height=4, width=4, tap="up_blocks.0.resnets.1"),
)


def compute(batch_size: int) -> ComputeRecipe:
    return ComputeRecipe(device="cpu", dtype="float32", batch_size=batch_size, threads=1)


def sample(spec: TeacherSpec, idx: int) -> Sample:
    return Sample(row_noise(0, f"{idx}", VIEWS, spec.noise_shapes, (32, 32)), IMAGES[idx])


def test_a_row_does_not_depend_on_its_batch_and_bad_rows_leave_no_trace(ddpm: Path) -> None:
    """Equal to the bit, and what the teacher gives for the views one by one; names are the rows'."""
    teacher = load_teacher(TeacherConfig(path=str(ddpm)))
    levels = [
        level.model_copy(update={"channels": tap.channels, "tap": tap.tap}) for level, tap in _pairs(teacher.spec)
    ]
    samples = [sample(teacher.spec, idx) for idx in range(5)]
    whole = encode(teacher, stack_rows(samples, VIEWS, levels), "cpu", compute(5)).levels
    assert [tuple(level.shape[:2]) for level in whole.values()] == [(5, 3), (5, 3)]
    gap = encode(teacher, stack_rows([*samples[:2], None, *samples[2:]], VIEWS, levels), "cpu", compute(5)).levels
    for idx in range(5):
        alone = encode(teacher, stack_rows([samples[idx]], VIEWS, levels), "cpu", compute(5)).levels
        for name, level in whole.items():
            assert torch.equal(alone[name][0], level[idx])
            assert torch.equal(gap[name][idx + (idx >= 2)], level[idx])
    image = torch.from_numpy(IMAGES[1:2].transpose(0, 3, 1, 2).copy()).double() / 127.5 - 1
    noise = torch.from_numpy(samples[1].noise["forward"])[None]  # draws 0 and 3
    with torch.inference_mode():
        expected = teacher.encode(image.float(), {"forward": noise[:, [0, 1, 0]]}, VIEWS)  # type: ignore[union-attr]
    for level, tap in zip(levels, teacher.spec.levels, strict=True):
        torch.testing.assert_close(whole[level.name][1], expected[tap.name][0], rtol=1e-4, atol=1e-5)


def _pairs(spec: TeacherSpec) -> list[tuple[LevelSpec, TapSpec]]:
    return list(zip(LEVELS, spec.levels, strict=True))


class Constant:
    """Level l0 is its input; it keeps what it was given."""

    spec = TeacherSpec("constant", "0" * 64, (4, 4), (TapSpec("l0", 1, 3, "tap"),))

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        self.seen, self.threads = images, torch.get_num_threads()
        return {"l0": images[:, None].expand(-1, len(views), -1, -1, -1)}


def test_batches_are_padded_to_the_recipes_size_on_its_threads_and_only_for_the_call() -> None:
    teacher, before = Constant(), torch.get_num_threads()
    rows = Rows(VIEWS[:1], {}, torch.from_numpy(IMAGES[:, :4, :4]))
    encoded = encode(
        teacher, rows, "cpu", ComputeRecipe(device="cpu", dtype="float32", batch_size=3, threads=before + 1)
    )
    assert (len(teacher.seen), teacher.threads, torch.get_num_threads()) == (3, before + 1, before)
    assert torch.equal(teacher.seen[2], torch.full((3, 4, 4), -1.0))  # black, as padding is
    assert encoded.levels["l0"].shape == (5, 1, 3, 4, 4)
    assert encoded.images is rows.images
    encode(teacher, rows, "cpu")
    assert len(teacher.seen) == 5


def test_other_shapes_than_the_rows_ask_for_are_refused() -> None:
    level = LevelSpec(name="l2", stride=1, channels=3, height=4, width=5, tap="tap")
    with pytest.raises(ShapeError, match=r"level l2 .* as \(5, 1, 3, 4, 4\), the recipe says \(5, 1, 3, 4, 5\)"):
        encode(Constant(), Rows(VIEWS[:1], {}, torch.from_numpy(IMAGES[:, :4, :4]), levels=(level,)), "cpu")


def test_a_generator_gives_images_and_features_and_marks_what_is_not_finite() -> None:
    teacher, latents = TinyGan(), torch.linspace(-1, 3, 24).reshape(4, 6)
    view = ViewSpec(draw=0)
    encoded = encode(teacher, Rows([view], {"z": latents[:, None]}), "cpu", compute(3))
    with torch.inference_mode():
        expected = 2 * gan_network()(latents[:, :, None, None]).double()
    assert encoded.images is not None and encoded.images.shape == (4, 32, 32, 3)
    pixels = (expected.clamp(-1, 1) + 1) * 127.5
    assert float((encoded.images[:3].permute(0, 3, 1, 2).double() - pixels[:3]).abs().max()) <= 0.51
    finite = encoded.levels["l2"].isfinite().flatten(1).all(dim=1)
    assert finite.tolist() == (latents[:, 0] <= 2).tolist()
    assert not finite.all()


def test_every_pixel_value_survives_the_way_there_and_back() -> None:
    images = torch.arange(256, dtype=torch.uint8).reshape(1, 16, 16, 1).expand(-1, -1, -1, 3)
    scaled = from_pixels(images)
    assert scaled.shape == (1, 3, 16, 16) and (float(scaled.min()), float(scaled.max())) == (-1, 1)
    assert torch.equal(to_pixels(scaled), images)
    odd = torch.tensor([-7.0, 7.0, float("nan"), float("inf")]).view(1, 1, 2, 2).expand(-1, 3, -1, -1)
    assert to_pixels(odd)[0, ..., 0].flatten().tolist() == [0, 255, 128, 255]


def test_latents_stand_in_for_images() -> None:
    class Latents(Constant):
        def encode_from_latents(self, moments, noise, views):  # type: ignore[no-untyped-def]
            return {"l0": moments[False][:, None]}

    rows = Rows(VIEWS[:1], {}, torch.from_numpy(IMAGES[:, :4, :4]), {False: torch.ones(5, 3, 4, 4)})
    assert torch.equal(encode(Latents(), rows, "cpu").levels["l0"], torch.ones(5, 1, 3, 4, 4))
    assert encode(Latents(), replace(rows, latents={}), "cpu").levels["l0"].min() < 0
