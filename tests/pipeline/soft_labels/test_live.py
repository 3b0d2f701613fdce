"""Soft labels in one pass with a teacher: of images, of a GAN's samples up to a predictor, and with features kept."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image

from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.join import JoinedDataset
from dtpipe.manifests.read.source import read_image, read_level
from dtpipe.manifests.schema import CodecRecipe
from dtpipe.manifests.soft_labels import live_features_of, soft_labels_of
from dtpipe.pipeline.cli.console import format_bytes
from dtpipe.pipeline.cli.main import main
from parts.command_line import RefusedError, dtpipe
from parts.images import png, write_files, write_images
from parts.interpreters import write_interpreter
from parts.paths import REPO

FACES = REPO.parent / "shared" / "weights" / "dcgan_faces64" / "netG.pth"
EXACT = ("-s", "extract.shard.dtype=float32", "--inline", "--device", "cpu", "--batch-size", "4")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("images"), 6)


@pytest.fixture(scope="module")
def of_images(ddpm: Path, images: Path) -> tuple[str, ...]:
    return ("--images", str(images), "--teacher", str(ddpm), "--timesteps", "50", "--flips", *EXACT)


@pytest.fixture(scope="module")
def features(of_images: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(dtpipe("extract", *of_images, "--out", tmp_path_factory.mktemp("features") / "all")["url"])


@pytest.fixture(scope="module")
def head(features: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    return write_interpreter(tmp_path_factory.mktemp("head"), FeatureDataset.open(features).levels)


def test_one_pass_gives_the_labels_of_the_stored_features_and_the_images(
    of_images: tuple[str, ...], features: str, head: str, tmp_path: Path
) -> None:
    dtpipe("extract", "--interpreter", head, *of_images, "--out", tmp_path / "live")
    dtpipe("extract", "--interpreter", head, "--from", features, *EXACT, "--out", tmp_path / "cached")
    live, cached = FeatureDataset.open(tmp_path / "live"), FeatureDataset.open(tmp_path / "cached")
    dataset = FeatureDataset.open(features)
    assert [level.name for level in live.levels] == ["l2.labels"] and live.views == dataset.views
    for row in range(6):
        np.testing.assert_array_equal(read_image(live, row), read_image(dataset, row))
        for view in (0, 1):  # features are kept in float32, so nothing was rounded between teacher and head
            np.testing.assert_array_equal(
                read_level(live, "l2.labels", row, view), read_level(cached, "l2.labels", row, view)
            )
    assert live.recipe.codec == cached.recipe.codec == CodecRecipe(zstd_level=3)  # unlike features'
    said = soft_labels_of(live.recipe)
    assert said is not None and said.features["teacher"] == dataset.recipe.teacher.model_dump(mode="json")
    made = live_features_of(live.recipe)
    assert made is not None and (made.levels, made.views) == (dataset.levels, dataset.views)
    again = dtpipe("verify", tmp_path / "live", "--level", "recompute", "--device", "cpu")
    assert again["ok"] and again["max_relative_error"]["l2.labels"] < 1e-5
    planned = dtpipe("plan", "--interpreter", head, *of_images, "--out", tmp_path / "none")["soft_labels"]
    assert planned["levels"] == {"image": 3 * 32 * 32, "l2.labels": 2 * 4 * 64 * 4}


def test_kept_features_are_those_of_an_extraction_and_join(
    of_images: tuple[str, ...], features: str, head: str, tmp_path: Path
) -> None:
    kept, out = tmp_path / "kept", tmp_path / "labels"
    call = ("extract", "--interpreter", head, *of_images, "--keep-features", kept, "--out", out)
    first = dtpipe(*call)
    dataset, labels = FeatureDataset.open(kept), FeatureDataset.open(out)
    assert dataset.manifest is not None
    expected = FeatureDataset.open(features).manifest
    assert expected is not None and dataset.manifest.digest == expected.digest
    assert [level.name for level in JoinedDataset([dataset, labels]).levels] == ["l2", "l3", "l2.labels"]
    assert dtpipe(*call)["digest"] == first["digest"]  # and goes on where it stopped
    plan = CliRunner().invoke(main, ["plan", *map(str, call[1:-1]), str(tmp_path / "other")])
    values = sum(level.channels * level.height * level.width for level in dataset.levels)
    size = format_bytes(6 * (3 * 32 * 32 + 2 * 4 * values))
    assert f"features that are kept in {kept} take about {size} before compression" in plan.output, plan.output
    with pytest.raises(
        RefusedError, match=r"extract\.codec\.max_error says how features are stored, and those of this"
    ):
        dtpipe("extract", "--interpreter", head, *of_images, "--max-error", "0.1", "--out", tmp_path / "none")
    with pytest.raises(RefusedError, match="--keep-features and --out are both"):
        dtpipe("extract", "--interpreter", head, *of_images, "--keep-features", out, "--out", out)


@pytest.fixture(scope="module")
def faces(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SimpleNamespace]:
    """Four faces of a GAN, as features and as PNG files, and a head that a person's masks of two of them taught."""
    root = tmp_path_factory.mktemp("faces")
    gan = ("--teacher", FACES, *teacher_settings())
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(write_generator(root / "code"))
        dtpipe("extract", "--num-samples", 4, *gan, *EXACT, "--out", root / "few", "--save-png", root / "png")
        head = interpreter_of_two_masks(root, root / "png")
        yield SimpleNamespace(gan=gan, url=str(root / "few"), saved=root / "png", head=head)


@pytest.mark.skipif(not FACES.is_file(), reason="no ../shared/weights/dcgan_faces64")
def test_faces_that_a_gan_makes_are_saved_labelled_by_hand_and_labelled_by_the_head(
    faces: SimpleNamespace, tmp_path: Path
) -> None:
    """Images made, two of them labelled, a head, and soft labels of more images: one command each."""
    few = FeatureDataset.open(faces.url)
    for key in ("z/000000001", "z/000000003"):
        picture = np.asarray(Image.open(faces.saved / f"{key}.png"))
        np.testing.assert_array_equal(picture, read_image(few, few.columns.row_of(key)))
    more = ("extract", "--num-samples", 6, *faces.gan, *EXACT, "--interpreter", faces.head)
    answer = dtpipe(*more, "--save-png", tmp_path / "more", "--out", tmp_path / "labels")
    assert (answer["num_ok"], answer["num_bad"]) == (6, 0)
    labels = FeatureDataset.open(tmp_path / "labels")
    assert list(labels.columns.keys) == [f"z/{idx:09d}" for idx in range(6)]
    assert [level.name for level in labels.levels] == ["l2.labels"]
    for row in range(4):  # the same samples, whatever their number
        np.testing.assert_array_equal(read_image(labels, row), read_image(few, row))
    assert len(list((tmp_path / "more" / "z").glob("*.png"))) == 6
    dtpipe("extract", "--interpreter", faces.head, "--from", faces.url, *EXACT, "--out", tmp_path / "cached")
    cached = FeatureDataset.open(tmp_path / "cached")
    for row in range(4):
        np.testing.assert_array_equal(read_level(labels, "l2.labels", row), read_level(cached, "l2.labels", row))
    assert dtpipe("verify", tmp_path / "labels", "--level", "recompute", "--device", "cpu")["ok"]
    assert verify(tmp_path / "cached", "decode").ok


@pytest.mark.skipif(not FACES.is_file(), reason="no ../shared/weights/dcgan_faces64")
def test_a_student_learns_the_same_of_a_gans_stored_and_new_samples_and_predicts_their_classes(
    faces: SimpleNamespace, tmp_path: Path
) -> None:
    """The first epoch of live training makes the samples that are stored, so its losses are those of the join."""
    labelled = ("extract", "--num-samples", 4, *faces.gan, *EXACT, "--interpreter", faces.head)
    labels = dtpipe(*labelled, "--out", tmp_path / "labels")["url"]
    train = ("--student", "test_resnet", "--epochs", 1, "--batch-size", 2, "--device", "cpu")
    small = ("-s", "distill.regressor.width=8", "-s", "distill.run.log_every=1")
    dtpipe("distill", faces.url, labels, "--join", *train, *small, "--out", tmp_path / "mix")
    made = ("--num-samples", 4, *faces.gan, "--interpreter", faces.head)
    dtpipe("distill", *made, *train, *small, "--out", tmp_path / "live")
    lines = [read_metrics(tmp_path / run) for run in ("mix", "live")]
    assert [[line["step"] for line in run] for run in lines] == [[1, 2]] * 2
    for mix, live in zip(*lines, strict=True):
        assert 0 < mix["labels"] < 1  # of two classes softened at temperature 4, at first: about log 2
        assert mix["loss"] == pytest.approx(mix["mse"] + 10 * mix["at"] + mix["labels"], rel=1e-5)
        for name in ("loss", "mse", "at", "labels"):
            assert live[name] == pytest.approx(mix[name], rel=1e-4)  # float32, other batches of the teacher
    dtpipe("export", tmp_path / "mix", "--head", "--out", tmp_path / "predictor")
    dtpipe("predict", tmp_path / "predictor", "--images", faces.saved, "--out", tmp_path / "predicted")
    record = json.loads((tmp_path / "predicted" / "predictions.json").read_text())
    assert (record["task"], record["classes"]["names"]) == ("segment", ["0", "1"])
    masks = [np.asarray(Image.open(path)) for path in (tmp_path / "predicted" / "masks" / "z").glob("*.png")]
    assert [mask.shape for mask in masks] == [(64, 64)] * 4
    assert set(np.unique(masks)) <= {0, 1}


def interpreter_of_two_masks(folder: Path, saved: Path) -> str:
    """A person's two masks of saved faces, and `dtpipe interpret` on them: one to learn from, one to score."""
    rows, columns = np.ogrid[:64, :64]
    for key, centre in (("z/000000001", (34, 32)), ("z/000000003", (32, 30))):
        face = ((rows - centre[0]) / 26) ** 2 + ((columns - centre[1]) / 20) ** 2 < 1
        write_files(folder / "masks", {f"{key}.png": png(face.astype(np.uint8))})
        write_files(folder / "drawn", {f"{key}.png": (saved / f"{key}.png").read_bytes()})
    drawn = ("--labels", folder / "drawn", "--masks", folder / "masks")
    small = ("--width", 8, "--epochs", 30, "--pixel-models", 0, "--device", "cpu")
    learned = dtpipe("interpret", folder / "few", *drawn, *small, "--out", folder / "head")
    assert (learned["num_labelled"], learned["num_held_out"], learned["measure"]) == (1, 1, "mIoU")
    assert learned["scores"]["interpreter"]["value"] > 0.4  # of one class alone: at most 0.3
    return str(folder / "head")


def write_generator(folder: Path) -> str:
    """The generator's class, as its authors' code has it; returns the folder to import from."""
    folder.mkdir()
    layers = []
    for number, (inside, outside) in enumerate([(100, 512), (512, 256), (256, 128), (128, 64)]):
        stride = "4, 1, 0" if number == 0 else "4, 2, 1"
        layers += [f"nn.ConvTranspose2d({inside}, {outside}, {stride}, bias=False)", f"nn.BatchNorm2d({outside})"]
        layers += ["nn.ReLU()"]
    layers += ["nn.ConvTranspose2d(64, 3, 4, 2, 1, bias=False)", "nn.Tanh()"]
    lines = ["from torch import nn", "class Faces(nn.Module):", "    def __init__(self):", "        super().__init__()"]
    lines += [f"        self.main = nn.Sequential({', '.join(layers)})"]
    lines += ["    def forward(self, z):", "        return self.main(z)"]
    (folder / "faces_generator.py").write_text("\n".join(lines) + "\n")
    return str(folder)


def teacher_settings() -> tuple[str, ...]:
    options = "{module: 'faces_generator:Faces', arguments: {}, z_shape: [100, 1, 1], image_px: [64, 64]}"
    taps = "{l2: main.8, l3: main.5}"
    settings = {"kind": "module", "options": options, "taps": taps}
    return tuple(word for name, value in settings.items() for word in ("-s", f"extract.teacher.{name}={value}"))
