"""Synthesized datasets: images and features from numbered keys, against a plain forward pass of the network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtpipe.extract.encode import encode, recipe_rows
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.run import run_extraction
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import ConfigError, PlanChangedError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from dtpipe.pipeline.save_images import save_images
from parts.extractions import MakeConfig
from parts.teachers import gan_network


@pytest.fixture
def make_synthetic(make_config: MakeConfig, gan: dict[str, str]) -> MakeConfig:
    """Settings of a small synthesized dataset."""
    fields = {"images": None, "num_samples": 10, "teacher": gan, "batch_size": 4, "max_bad": 1.0}
    return lambda **changes: make_config(**{**fields, **changes})


@pytest.mark.parametrize("form", ["zarr", "webdataset"])
def test_images_and_features_are_those_of_a_plain_forward_pass(form: str, make_synthetic: MakeConfig) -> None:
    result = run_extraction(make_synthetic(shard={"samples": 3, "format": form, "dtype": "float32"}))
    dataset = FeatureDataset.open(result.url)
    assert list(dataset.columns.keys) == [f"z/{idx:09d}" for idx in range(10)]
    assert [level.name for level in dataset.levels] == ["l2", "l3"]
    net = gan_network()
    for row in dataset.columns.ok_rows:
        latent = torch.from_numpy(draw_noise(0, f"z/{row:09d}", 0, "z", (6,)))
        with torch.inference_mode():
            deep = net[0](latent[None, :, None, None])
            middle = net[2](net[1](deep))
            image = 2 * net[3:](middle)[0]
        pixels = np.rint((np.clip(image.numpy(), -1, 1) + 1) * 127.5).astype(np.uint8).transpose(1, 2, 0)
        assert np.abs(read_image(dataset, row).astype(int) - pixels).max() <= 1
        np.testing.assert_allclose(read_level(dataset, "l3", row), deep[0], rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(read_level(dataset, "l2", row), middle[0], rtol=1e-4, atol=1e-5)


def test_an_image_that_is_not_finite_is_a_bad_sample_with_its_reason(make_synthetic: MakeConfig) -> None:
    dataset = FeatureDataset.open(run_extraction(make_synthetic(num_samples=80)).url)
    broken = [idx for idx in range(80) if draw_noise(0, f"z/{idx:09d}", 0, "z", (6,))[0] > 2]
    assert broken
    assert [row for row in range(80) if dataset.columns.status[row] != "ok"] == broken
    assert "not finite" in dataset.columns.status[broken[0]]


def test_the_digest_depends_on_nothing_but_the_plan_and_survives_a_second_run(
    make_synthetic: MakeConfig, tmp_path: Path
) -> None:
    config = make_synthetic()
    first = run_extraction(config)
    again = run_extraction(config)
    other = run_extraction(make_synthetic(out=str(tmp_path / "other"), decode_threads=4))
    assert first.digest == again.digest == other.digest
    assert again.shards_written == 0


def test_recompute_finds_the_stored_features(make_synthetic: MakeConfig) -> None:
    config = make_synthetic()
    url = run_extraction(config).url
    teacher = load_teacher(config.teacher)
    recipe = FeatureDataset.open(url).recipe

    def recompute(images: np.ndarray, keys: Sequence[str], batch_size: int) -> dict[str, np.ndarray]:
        assert batch_size == recipe.compute.batch_size
        encoded = encode(teacher, recipe_rows(recipe, teacher.spec, keys, images), "cpu", recipe.compute)
        assert encoded.images is not None
        np.testing.assert_array_equal(encoded.images, images)
        return {name: level.numpy() for name, level in encoded.levels.items()}

    report = verify(url, "recompute", recompute)
    assert report.ok and report.num_recomputed > 0
    assert max(report.max_relative_error.values()) < 1e-3


def test_png_files_hold_the_stored_images(make_synthetic: MakeConfig, tmp_path: Path) -> None:
    url = run_extraction(make_synthetic()).url
    dataset = FeatureDataset.open(url)
    assert (
        save_images(url, tmp_path / "png")
        == len(dataset.columns.ok_rows)
        == len(list((tmp_path / "png").rglob("*.png")))
    )
    row = int(dataset.columns.ok_rows[0])
    with Image.open(tmp_path / "png" / f"{dataset.columns.keys[row]}.png") as image:
        assert np.array_equal(np.asarray(image), read_image(dataset, row))


def test_another_number_of_samples_into_the_same_output_is_refused(make_synthetic: MakeConfig) -> None:
    run_extraction(make_synthetic())
    with pytest.raises(PlanChangedError, match="num_samples"):
        run_extraction(make_synthetic(num_samples=12))


def test_roles_that_do_not_fit_are_refused(
    make_synthetic: MakeConfig, make_config: MakeConfig, image_folder: Path
) -> None:
    with pytest.raises(TeacherError, match="--num-samples instead of --images"):
        run_extraction(make_synthetic(images=str(image_folder), num_samples=None))
    with pytest.raises(TeacherError, match="--images instead of --num-samples"):
        run_extraction(make_config(images=None, num_samples=4))
    with pytest.raises(ConfigError, match="one view"):
        run_extraction(make_synthetic(noise={"draws": 2}))
    with pytest.raises(ConfigError, match="makes 32x32"):
        run_extraction(make_synthetic(transform={"px": 64}))
    with pytest.raises(ValueError, match=r"extract.images, or extract.num_samples"):
        make_synthetic(images=str(image_folder))


def test_a_synthesized_image_has_no_second_draw(make_synthetic: MakeConfig) -> None:
    config = make_synthetic()
    dataset = FeatureDataset.open(run_extraction(config).url)
    views = [dataset.recipe.views[0].model_copy(update={"draw": 1})]
    with pytest.raises(ConfigError, match="no other noise draws"):
        recipe_rows(dataset.recipe, load_teacher(config.teacher).spec, ["z/000000000"], views=views)
