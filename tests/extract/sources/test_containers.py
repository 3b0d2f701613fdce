"""The same images from a folder, a zip, a tar, Parquet and LMDB are the same dataset; and every command takes them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from dtpipe.extract.run import run_extraction
from dtpipe.extract.sources.registry import open_source
from dtpipe.manifests.errors import ErrorBudgetError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from parts.extractions import Extract, MakeConfig
from parts.images import write_files
from parts.labelled import all_images
from parts.packing import contents, folder_files, labels, write_lmdb, write_parquet, write_tar, write_zip

Pack = Callable[[Path, dict[str, bytes]], Path]

TAR = "train-0.tar"
"""All keys begin with this, as those of a tar do: so they are equal in every container, with them rows and noise."""


def _classes(files: dict[str, bytes]) -> list[int]:
    return [0 if "/cat/" in name else 1 for name in files]


PACKERS: dict[str, Pack] = {
    "zip": lambda root, files: write_zip(root / "a.zip", files),
    "webdataset": lambda root, files: write_tar(
        root / TAR, {name.removeprefix(TAR + "/"): data for name, data in files.items()}
    ),
    "parquet": lambda root, files: write_parquet(root / "a.parquet", files, _classes(files), ["cat", "dog"]),
    "lmdb": lambda root, files: write_lmdb(root / "a_lmdb", files),
}


@pytest.fixture
def files(image_folder: Path) -> dict[str, bytes]:
    """Eight images of 32 px, one of them broken, by keys that begin like a tar's."""
    found = {f"{TAR}/{name}": data for name, data in folder_files(image_folder).items()}
    found[f"{TAR}/dog/broken.png"] = found[f"{TAR}/dog/000.png"][:-200]
    return found


@pytest.fixture
def folder(files: dict[str, bytes], tmp_path: Path) -> Path:
    return write_files(tmp_path / "tree", files)


@pytest.fixture(params=PACKERS)
def packed(request: pytest.FixtureRequest, files: dict[str, bytes], tmp_path: Path) -> tuple[str, Path]:
    """A kind of container, and one with the images of `folder`."""
    if request.param == "lmdb":
        pytest.importorskip("lmdb", reason="needs the extra `lmdb`")
    return request.param, PACKERS[request.param](tmp_path, files)


def assert_same_dataset(one: FeatureDataset, other: FeatureDataset) -> None:
    """Equal keys by row, states, images and levels, to the last bit."""
    assert (one.columns.keys, one.columns.status) == (other.columns.keys, other.columns.status)
    for row in one.columns.ok_rows:
        np.testing.assert_array_equal(read_image(one, row), read_image(other, row))
        for level in one.levels:
            np.testing.assert_array_equal(read_level(one, level.name, row), read_level(other, level.name, row))


def test_every_container_gives_the_dataset_of_its_folder(
    packed: tuple[str, Path], folder: Path, make_config: MakeConfig, extract: Extract, tmp_path: Path
) -> None:
    kind, path = packed
    source = open_source(str(path))
    assert source.kind == kind
    assert contents(source) == contents(open_source(str(folder)))
    expected = FeatureDataset.open(extract(images=str(folder), max_bad=1))
    config = make_config(images=str(path), max_bad=1, out=str(tmp_path / "packed"), source={"order": "permuted"})
    first = run_extraction(config)
    dataset = FeatureDataset.open(first.url)
    assert (first.num_ok, first.num_bad, dataset.recipe.source.kind) == (8, 1, kind)
    assert_same_dataset(dataset, expected)
    again = run_extraction(config)
    assert (again.digest, again.shards_written) == (first.digest, 0)
    with pytest.raises(ErrorBudgetError, match=r"broken\.png: .*[Tt]runcated"):
        run_extraction(make_config(images=str(path), max_bad=0, out=str(tmp_path / "strict")))


@pytest.mark.parametrize(("kind", "own"), [("parquet", True), ("webdataset", True), ("zip", False)])
def test_tars_and_parquet_keep_their_order_and_others_are_permuted(
    kind: str, own: bool, files: dict[str, bytes], extract: Extract, tmp_path: Path
) -> None:
    shuffled = dict(reversed(files.items()))
    path = PACKERS[kind](tmp_path, shuffled)
    dataset = FeatureDataset.open(extract(images=str(path), max_bad=1))
    assert dataset.recipe.source.order == ("container" if own else "permuted")
    assert (list(dataset.columns.keys) == list(shuffled)) == own


def test_a_key_has_its_levels_in_any_container_and_order(
    packed: tuple[str, Path], folder: Path, files: dict[str, bytes], extract: Extract, tmp_path: Path
) -> None:
    """Tars and Parquet keep their own order here, so that a batch has other rows: within rounding, not to the bit."""
    root = tmp_path / "backwards"
    root.mkdir()
    path = PACKERS[packed[0]](root, dict(reversed(files.items())))
    expected = FeatureDataset.open(extract(images=str(folder), max_bad=1))
    dataset = FeatureDataset.open(extract("packed", images=str(path), max_bad=1))
    assert len(dataset.columns.ok_rows) == 8
    for row in dataset.columns.ok_rows:
        other = expected.columns.row_of(dataset.columns.keys[row])
        np.testing.assert_array_equal(read_image(dataset, row), read_image(expected, other))
        for level in dataset.levels:
            found, wanted = read_level(dataset, level.name, row), read_level(expected, level.name, other)
            np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-3)  # a step of float16
            another = next(each for each in expected.columns.ok_rows if each != other)
            assert np.abs(wanted - read_level(expected, level.name, another)).max() > 0.1


def test_labels_follow_images_into_containers(packed: tuple[str, Path], files: dict[str, bytes]) -> None:
    kind, path = packed
    folder_names = {key: {"zip": TAR, "parquet": key.split("/")[1]}.get(kind) for key in files}
    assert labels(open_source(str(path))) == folder_names


def test_eval_reads_labelled_images_from_a_zip(image_folder: Path, tmp_path: Path) -> None:
    from dtpipe.manifests.schema import TransformRecipe
    from dtpipe.pipeline.labelled import LabelledReader, open_labelled

    path = write_zip(tmp_path / "a.zip", folder_files(image_folder))
    recipe = TransformRecipe(resize="stretch", height=16, width=16)
    sets = []
    for images in (image_folder, path):
        reader = LabelledReader(open_labelled(str(images)), recipe)
        sets.append(reader.select(range(len(reader.items)), print))
        assert sets[-1].classes.names == ("cat", "dog")
    assert sets[0].keys == sets[1].keys
    np.testing.assert_array_equal(*map(all_images, sets))
    np.testing.assert_array_equal(sets[0].read_classes(), sets[1].read_classes())
