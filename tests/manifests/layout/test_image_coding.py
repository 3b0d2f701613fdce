"""Images in fewer bytes: the same pixels come back, to other readers too, and what is damaged is named."""

from __future__ import annotations

import io
import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tensorstore
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numcodecs.zstd import Zstd
from PIL import Image
from pydantic import ValidationError

from dtpipe.manifests.check.repair import repair
from dtpipe.manifests.check.verify import verify
from dtpipe.manifests.errors import DamagedDataError, ManifestError
from dtpipe.manifests.layout.arrays import ArraySpec
from dtpipe.manifests.layout.prediction import predicted, restore
from dtpipe.manifests.layout.tar import decode_tar_chunk
from dtpipe.manifests.read.chunks import NATIVE_FROM
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_images
from dtpipe.manifests.schema import CODECS_AND_ROLES, Recipe
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import load_entry
from dtpipe.manifests.write.plan import load_plan, plan_digest
from parts import golden
from parts.damage import flipped
from parts.paths import REPO
from parts.reseal import edit_document
from parts.zarr_readers import register_entry_points

COMPACT = {"zarr": "predicted", "webdataset": "webp"}


def by_the_book(image: np.ndarray) -> np.ndarray:
    """Residuals, pixel by pixel, as the format's page says them; with integers that cannot overflow."""
    height, width, _ = image.shape
    planes = image.astype(int)
    planes[..., 0] -= planes[..., 1]
    planes[..., 2] -= planes[..., 1]
    planes %= 256
    padded = np.zeros((height + 1, width + 1, 3), int)
    padded[1:, 1:] = planes
    left, above, corner = padded[1:, :-1], padded[:-1, 1:], padded[:-1, :-1]
    return (planes - np.median([left, above, left + above - corner], axis=0)) % 256


@settings(max_examples=60)
@given(st.tuples(st.integers(1, 9), st.integers(1, 9)).flatmap(lambda px: arrays(np.uint8, (2, *px, 3))))
def test_residuals_are_those_of_the_book_and_pixels_come_back(images: np.ndarray) -> None:
    residuals = predicted(images)
    np.testing.assert_array_equal(residuals, [by_the_book(image) for image in images])
    restore(residuals)
    np.testing.assert_array_equal(residuals, images)


def test_the_code_of_the_formats_page_gives_the_pixels_back() -> None:
    page = (REPO / "manifests" / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(def pixels.*?)```", page, re.DOTALL)
    scope: dict[str, Any] = {"np": np}
    exec(code, scope)
    image = np.random.default_rng(0).integers(0, 256, (6, 5, 3)).astype(np.uint8)
    np.testing.assert_array_equal(scope["pixels"](predicted(image[None])[0]), image)


def test_a_case_by_hand() -> None:
    """Grey 10, 12 over 11, 20: the last is guessed as the median of 11, 12 and 11 + 12 - 10 = 13, so 12."""
    grey = np.repeat(np.array([[[10], [12]], [[11], [20]]], np.uint8), 3, axis=2)[None]
    np.testing.assert_array_equal(predicted(grey)[0, ..., 1], [[10, 2], [1, 8]])
    assert not predicted(grey)[..., [0, 2]].any()


def test_photographs_take_a_third_less_than_under_zstd_alone() -> None:
    photos = sorted((REPO.parent / "shared" / "data" / "flowers5_128").rglob("*.jpg"))[::400]
    if not photos:
        pytest.skip("no photographs at ../shared/data/flowers5_128")
    images = [np.asarray(Image.open(path).convert("RGB")) for path in photos]
    coded = sum(len(Zstd(level=1).encode(predicted(image[None]))) for image in images)
    assert coded < 0.67 * sum(len(Zstd(level=3).encode(np.ascontiguousarray(image))) for image in images)


@pytest.fixture(params=COMPACT)
def dataset(request: pytest.FixtureRequest, tmp_path: Path) -> FeatureDataset:
    """A dataset of either format with its compact coding, one bad sample, and a short last shard."""
    golden.write_shards(tmp_path / "features", golden.Settings(request.param, image_coding=COMPACT[request.param]))
    return FeatureDataset.open(tmp_path / "features")


def test_the_images_that_were_written_are_read(dataset: FeatureDataset) -> None:
    rows = dataset.columns.ok_rows
    truth = [golden.true_image(dataset.columns.keys[row]) for row in rows]
    np.testing.assert_array_equal(read_images(dataset, rows), truth)
    many = np.tile(rows, NATIVE_FROM // len(rows) + 1)  # read by compiled code, and each asked for more than once
    np.testing.assert_array_equal(read_images(dataset, many), np.tile(truth, (len(many) // len(rows), 1, 1, 1)))
    assert dataset.recipe.format == CODECS_AND_ROLES
    assert verify(dataset.url, level="decode").problems == ()


def test_every_flipped_byte_of_an_image_is_an_error_that_names_it(dataset: FeatureDataset) -> None:
    store, plan = Store(dataset.url), load_plan(Store(dataset.url))
    entry = load_entry(store, plan, plan_digest(store), 0)
    (stored,) = (stored for stored in entry.objects if "image" in stored.arrays)
    idx = next(idx for idx, row in enumerate(entry.rows) if row.status == "ok")
    members, path = stored.arrays["image"], Path(dataset.url) / stored.name
    whole, row = path.read_bytes(), entry.rows[idx].row
    for place in range(members.offset[idx], members.offset[idx] + members.size[idx]):
        path.write_bytes(flipped(whole, place, 0x10))
        with pytest.raises(DamagedDataError, match=f"{stored.name}: image of sample '{entry.rows[idx].key}'"):
            read_image(dataset, row)
    assert [problem.name for problem in verify(dataset.url, level="decode").problems] == [stored.name]
    assert repair(dataset.url, verify(dataset.url, level="decode")).shards == (0,)


def test_zarr_python_reads_predicted_images_by_the_entry_point(tmp_path: Path) -> None:
    register_entry_points()
    golden.write_shards(tmp_path, golden.Settings("zarr", image_coding="predicted"))
    dataset = FeatureDataset.open(tmp_path)
    images = zarr.open_array(f"{dataset.url}/data.zarr/image", mode="r")
    for row in dataset.columns.ok_rows:
        np.testing.assert_array_equal(images[int(row)], golden.true_image(dataset.columns.keys[row]))
    again = zarr.create_array(
        tmp_path / "own", shape=(2, 4, 6, 3), dtype="u1", filters=images.metadata.codecs[0].codecs[:1]
    )
    again[:] = read_images(dataset, dataset.columns.ok_rows[:2])
    np.testing.assert_array_equal(again[:], read_images(dataset, dataset.columns.ok_rows[:2]))


def test_levels_beside_predicted_images_need_no_codec_of_ours(tmp_path: Path) -> None:
    golden.write_shards(tmp_path, golden.Settings("zarr", image_coding="predicted"))
    kvstore = {"driver": "file", "path": f"{tmp_path}/data.zarr/l2/"}
    level = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}).result().read().result()
    dataset = FeatureDataset.open(tmp_path)
    for row in dataset.columns.ok_rows:
        np.testing.assert_array_equal(level[row], golden.true_level(golden.LEVELS[0], dataset.columns.keys[row]))


def test_plain_webdataset_reads_webp_images(tmp_path: Path) -> None:
    golden.write_shards(tmp_path, golden.Settings("webdataset", image_coding="webp"))
    dataset = FeatureDataset.open(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # webdataset's own, on import and on few shards
        import webdataset

        urls = [str(path) for path in sorted((tmp_path / "data").glob("*.tar"))]
        samples = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert len(samples) == len(dataset.columns)
    for row in dataset.columns.ok_rows:
        np.testing.assert_array_equal(samples[row]["image.webp"], read_image(dataset, row))


def test_files_that_hold_another_image_are_refused() -> None:
    spec = ArraySpec("image", np.dtype("u1"), None, (2, 2, 3), ("y", "x", "rgb"), image_coding="webp")
    out = np.empty((2, 2, 3), np.uint8)
    for kind, shape, why in (
        ("WEBP", (2, 3, 3), r"uint8\[2, 3, 3\]"),
        ("WEBP", (2, 2, 4), r"uint8\[2, 2, 4\]"),
        ("PNG", (2, 2, 3), "no WEBP"),
    ):
        sink = io.BytesIO()
        Image.fromarray(np.full(shape, 7, np.uint8)).save(sink, kind, **({"lossless": True} if kind == "WEBP" else {}))
        with pytest.raises(DamagedDataError, match=why):
            decode_tar_chunk(spec, sink.getvalue(), b"", out)
    for cut in (0, 12, 30):
        with pytest.raises(DamagedDataError, match="no WEBP"):
            decode_tar_chunk(spec, sink.getvalue()[:cut], b"", out)


def test_a_recipe_with_plain_images_says_nothing_of_it() -> None:
    plain = golden.make_recipe(golden.Settings("zarr"))
    assert "image_coding" not in plain.model_dump(mode="json")
    coded = golden.make_recipe(golden.Settings("zarr", image_coding="predicted"))
    assert coded.model_dump(mode="json") == {**plain.model_dump(mode="json"), "image_coding": "predicted"}
    assert Recipe.model_validate_json(coded.model_dump_json()) == coded


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"format": "webdataset", "image_coding": "predicted"}, "have plain and webp"),
        ({"format": "zarr", "image_coding": "webp"}, "have plain and predicted"),
        ({"format": "zarr", "image_coding": "predicted", "images": "joined"}, "no images are stored"),
        ({"format": "zarr", "image_coding": "jpeg"}, "image_coding"),
    ],
)
def test_codings_that_do_not_fit_are_refused(changes: dict[str, str], why: str) -> None:
    with pytest.raises(ValidationError, match=why):
        golden.make_recipe(golden.Settings(**changes))  # type: ignore[arg-type]


def test_webp_is_refused_for_sides_that_it_cannot_hold() -> None:
    fields = golden.make_recipe(golden.Settings("webdataset", image_coding="webp")).model_dump()
    fields["transform"]["width"] = 16384
    with pytest.raises(ValidationError, match="16383 px, not 4x16384; choose plain"):
        Recipe(**fields)


def test_v1_has_no_codings(tmp_path: Path) -> None:
    golden.write_shards(tmp_path, golden.Settings("zarr", image_coding="predicted"))
    with pytest.raises(ManifestError, match="its recipe need dtpipe-features/2"):
        edit_document(tmp_path / "plan.json", lambda plan: plan.update(format="dtpipe-features/1"))
        load_plan(Store(tmp_path))
