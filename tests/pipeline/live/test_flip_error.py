"""The error of mirrored features, against one image at a time in float64, and for a network that has none."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.base import TapSpec, TeacherSpec
from dtpipe.manifests.check.measured import Measured, read_measured, write_measured
from dtpipe.manifests.errors import ManifestError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_images
from dtpipe.manifests.schema import LevelSpec, ViewSpec
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.plan import load_plan
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.live.flip_error import equivariant_warnings, flip_errors
from dtpipe.pipeline.live.recorded import open_teacher
from parts.extractions import Extract
from parts.paths import GOLDEN


def opened_with(kernel: list[float], recipe: object) -> SimpleNamespace:
    """A teacher of one level: image plus noise, each row of cells convolved with three weights."""
    weight = torch.tensor(kernel).view(1, 1, 1, 3)

    def encode(images, noise, views):  # type: ignore[no-untyped-def]
        seen = images[:, None] + noise["forward"]  # (B, V, 3, H, W)
        out = torch.nn.functional.conv2d(seen.flatten(0, 2).unsqueeze(1), weight, padding=(0, 1))
        return {"l0": out.view(seen.shape)}

    spec = TeacherSpec("rows", "0" * 64, (4, 6), (TapSpec("l0", 1, 3, "tap"),), 1000, {"forward": (3, -1, -1)})
    return SimpleNamespace(teacher=SimpleNamespace(spec=spec, encode=encode), recipe=recipe, device="cpu")


@pytest.fixture
def recipe():  # type: ignore[no-untyped-def]
    plan = load_plan(Store(GOLDEN / "v1_zarr"))
    level = LevelSpec(name="l0", stride=1, channels=3, height=4, width=6, tap="tap", dtype="float32")
    views = (ViewSpec(draw=0, timestep=50), ViewSpec(draw=1, timestep=50), ViewSpec(draw=0, timestep=50, flip=True))
    return plan.recipe.model_copy(update={"levels": (level,), "views": views})


IMAGES = np.random.Generator(np.random.Philox(0)).integers(0, 256, (5, 4, 6, 3), dtype=np.uint8)
KEYS = [f"{idx}.png" for idx in range(5)]


def test_a_symmetric_network_has_no_error(recipe) -> None:  # type: ignore[no-untyped-def]
    assert flip_errors(opened_with([0.5, 1.0, 0.5], recipe), IMAGES, KEYS)["l0"] < 1e-6


def test_the_error_is_that_of_the_definition(recipe) -> None:  # type: ignore[no-untyped-def]
    """In numpy, float64, one image and unflipped view at a time; the batch size of 2 pads the last batch."""
    kernel = [0.0, 1.0, -0.7]

    def features(image: np.ndarray, noise: np.ndarray) -> np.ndarray:
        seen = np.pad(image + noise, ((0, 0), (0, 0), (1, 1)))
        return sum(weight * seen[:, :, at : at + 6] for at, weight in enumerate(kernel))

    errors = []
    for key, image in zip(KEYS, IMAGES, strict=True):
        pixels = image.transpose(2, 0, 1).astype(np.float64) / 127.5 - 1
        for draw in (0, 1):
            noise = draw_noise(recipe.noise_seed, key, draw, "forward", (3, 4, 6)).astype(np.float64)
            mirrored, true = features(pixels, noise)[..., ::-1], features(pixels[..., ::-1], noise[..., ::-1])
            errors.append(np.linalg.norm(mirrored - true) / np.linalg.norm(true))
    assert flip_errors(opened_with(kernel, recipe), IMAGES, KEYS)["l0"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_verify_measures_it_and_distill_warns_with_it(extract: Extract) -> None:
    url = extract("features")
    assert [line for line in equivariant_warnings([url]) if "is not measured yet; `dtpipe verify" in line]
    result = CliRunner().invoke(main, ["verify", url, "--level", "recompute", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    assert "mirrored features instead of encoded flips would have relative error: l2 " in result.stdout
    dataset = FeatureDataset.open(url)
    images, keys = read_images(dataset, range(8)), dataset.columns.keys
    expected = flip_errors(open_teacher(dataset.plan, {}, "cpu"), images, keys)
    measured = read_measured(dataset.store)
    assert measured is not None and measured.num_samples == 8
    assert measured.flip_error == pytest.approx(expected)
    (line,) = equivariant_warnings([url])
    assert f"relative error l2 {expected['l2']:.2f}, l3 {expected['l3']:.2f}, measured on 8 samples" in line
    again = CliRunner().invoke(main, ["verify", url, "--json"])  # the measurement is no stray object
    assert again.exit_code == 0 and '"strays": []' in again.stdout


def test_nothing_is_measured_or_warned_of_where_flips_are_stored(extract: Extract) -> None:
    url = extract("features", noise={"timesteps": [50], "flips": True})
    result = CliRunner().invoke(main, ["verify", url, "--level", "recompute", "--device", "cpu", "--json"])
    assert '"flip_error": {}' in result.stdout
    assert list(equivariant_warnings([url])) == []


def test_a_synthesized_dataset_cannot_be_measured(extract: Extract, gan: dict[str, str]) -> None:
    url = extract("features", images=None, num_samples=6, teacher=gan)
    (line,) = equivariant_warnings([url])
    assert "cannot be measured, since its teacher encodes no images" in line


def test_a_changed_measurement_is_refused(tmp_path: Path) -> None:
    store = Store(tmp_path)
    write_measured(store, Measured(flip_error={"l2": 0.5}, num_samples=3))
    assert read_measured(store) == Measured(flip_error={"l2": 0.5}, num_samples=3)
    file = tmp_path / "measured.json"
    file.write_text(file.read_text().replace("0.5", "0.1"))
    with pytest.raises(ManifestError, match=r"measured\.json does not match its own checksum"):
        read_measured(store)
