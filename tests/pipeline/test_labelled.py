"""Labelled images at one size or whole: targets stay on their images, the split depends on keys alone."""

from __future__ import annotations

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from blake3 import blake3
from numpy.testing import assert_array_equal
from PIL import Image
from torch.utils.data import DataLoader, Dataset

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Class, Instances, Mask
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline import labelled as labelled_module
from dtpipe.pipeline.labelled import LabelledReader, open_labelled, split_by_key
from parts.coco import SIDE, coco_document, write_coco
from parts.images import png, write_files
from parts.labelled import all_images, all_masks

RECIPE = TransformRecipe(height=32, width=32)


def read(images: Path, masks: Path | None = None, recipe: TransformRecipe | None = RECIPE) -> LabelledReader:
    """All samples of class folders, or of a folder with masks beside it."""
    return LabelledReader(open_labelled(str(images), str(masks) if masks else None), recipe, str(images))


def test_split_depends_on_keys_not_on_their_order_and_keeps_shares() -> None:
    keys = [f"{idx}.png" for idx in range(40)]
    labels = ["a" if idx < 30 else "b" for idx in range(40)]
    train, test = split_by_key(keys, labels, 0.3, seed=1)
    assert sorted(train + test) == list(range(40))
    assert [sum(labels[row] == name for row in test) for name in "ab"] == [9, 3]
    back = list(reversed(range(40)))
    _, again = split_by_key([keys[row] for row in back], [labels[row] for row in back], 0.3, seed=1)
    assert {keys[back[row]] for row in again} == {keys[row] for row in test}
    assert split_by_key(keys, labels, 0.3, seed=2)[1] != test


def test_reader_names_bad_images_and_missing_masks(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "cat" / "bad.png").write_bytes(b"no")
    notes: list[str] = []
    reader = read(image_folder)
    labelled = reader.select(range(len(reader.items)), notes.append)
    assert labelled.classes.names == ("cat", "dog")
    assert len(labelled) == 8
    names = [labelled.classes.names[number] for number in labelled.read_classes()]
    assert names == [key.split("/")[0] for key in labelled.keys]
    assert len(notes) == 1
    assert "cat/bad.png" in notes[0]
    masks = write_files(tmp_path / "masks", {"cat/001.png": png(np.ones((32, 32), np.uint8))})
    with pytest.raises(InputError, match=r"no mask for image cat/003.png.* here cat/003.png; cat/001.png is one that"):
        read(image_folder, masks)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_each_class_stands_on_both_sides_but_for_one_of_a_single_image(share: float) -> None:
    labels = ["alone", *["pair"] * 2, *["many"] * 40]
    train, test = split_by_key([f"{idx}.png" for idx in range(43)], labels, share, seed=0)
    assert {labels[row] for row in train} == {"alone", "pair", "many"}
    assert {labels[row] for row in test} == {"pair", "many"}


def test_what_does_not_fit_between_images_and_masks_is_refused_by_name(image_folder: Path, tmp_path: Path) -> None:
    (image_folder / "cat").rename(image_folder.with_name("cats"))
    (image_folder.with_name("cats") / "001.png").write_bytes(png(np.zeros((20, 40, 3), np.uint8)))

    def check(**masks: bytes) -> None:
        written = write_files(
            tmp_path / "-".join(masks), {name.replace("_", "."): data for name, data in masks.items()}
        )
        others = {f"00{idx}.png": png(np.ones((32, 32), np.uint8)) for idx in (3, 5, 7)}
        read(image_folder.with_name("cats"), write_files(written, others)).select([0], print)

    check(**{"001_png": png(np.ones((10, 20), np.uint8))})  # of half the size
    with pytest.raises(InputError, match=r"mask 001.png has 20x40 px and its image.* 40x20"):
        check(**{"001_png": png(np.ones((40, 20), np.uint8)), "other_png": png(np.ones((4, 4), np.uint8))})
    with pytest.raises(InputError, match=r"image 001.png has the masks 001.bmp and 001.png"):
        check(**{"001_png": png(np.ones((10, 20), np.uint8)), "001_bmp": b""})


def test_what_is_beyond_the_memory_of_a_reader_is_read_again(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = all_images(read(image_folder).select(range(8), print))
    monkeypatch.setattr(labelled_module, "KEPT_BYTES", 3 * 32 * 32 * 3)
    reader = read(image_folder)
    assert_array_equal(all_images(reader.select(range(8), print)), whole)
    assert len(reader._kept._kept) == 3


def test_equal_pixels_have_equal_digests_whatever_their_keys(image_folder: Path) -> None:
    (image_folder / "dog" / "copy.png").write_bytes((image_folder / "cat" / "001.png").read_bytes())
    labelled = read(image_folder).select(range(9), print)
    digests = dict(zip(labelled.keys, labelled.digests, strict=True))
    assert digests["dog/copy.png"] == digests["cat/001.png"]
    assert len(set(labelled.digests)) == 8


def test_masks_say_how_many_classes_there_are_and_which_value_is_ignored(image_folder: Path, tmp_path: Path) -> None:
    mask = png(np.repeat(np.array([[0, 3, 9, 255]], np.uint8), 4, axis=0))
    keys = [str(path.relative_to(image_folder)) for path in image_folder.rglob("*.png")]
    masks = write_files(tmp_path / "masks", dict.fromkeys(keys, mask))
    recipe = TransformRecipe(resize="stretch", height=4, width=4)
    for ignore, num_classes, row in ((255, 10, [0, 3, 9, -1]), (9, 256, [0, 3, -1, 255]), (None, 256, [0, 3, 9, 255])):
        source = open_labelled(str(image_folder), str(masks), ignore)
        labelled = LabelledReader(source, recipe).select(range(2), print)
        assert len(labelled.classes) == num_classes
        assert all_masks(labelled)[1].tolist() == [row] * 4


def turned_jpeg(array: np.ndarray) -> bytes:
    """A file whose orientation tag says that it is to be turned by a quarter to be looked at."""
    exif = Image.Exif()
    exif[0x0112] = 6
    file = io.BytesIO()
    Image.fromarray(array).save(file, "PNG", exif=exif)
    return file.getvalue()


def test_whole_images_and_masks_are_turned_and_keep_their_size(tmp_path: Path) -> None:
    """Stored lying, 6 x 4 px, to be looked at standing: its mask is as the image is looked at."""
    stored = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    standing = np.rot90(stored, -1)
    mask = np.arange(24, dtype=np.uint8).reshape(6, 4)
    images = write_files(tmp_path / "i", {"a.png": turned_jpeg(stored), "b.png": png(standing)})
    masks = write_files(tmp_path / "m", {"a.png": png(mask), "b.png": png(mask[::2, ::2])})
    labelled = read(images, masks, recipe=None).select(range(2), print)
    for row in range(2):
        assert_array_equal(labelled.image(row), standing)
    assert_array_equal(labelled.target(0).numbers, mask)
    assert_array_equal(labelled.target(1).numbers, np.repeat(np.repeat(mask[::2, ::2], 2, axis=0), 2, axis=1))
    assert labelled.digests[0] == labelled.digests[1] == blake3(standing.tobytes()).hexdigest()
    write_files(masks, {"a.png": png(mask.T)})
    with pytest.raises(
        InputError, match=r"mask a.png has 6x4 px and its image, turned as its orientation tag says, 4x6"
    ):
        read(images, masks, recipe=None).select(range(2), print)


def test_objects_are_whole_for_tuned_tasks_and_masks_at_its_size_for_frozen_ones(tmp_path: Path) -> None:
    root = write_coco(tmp_path, coco_document())
    source = open_labelled(f"coco-json:{root}@labels.json")
    whole = LabelledReader(source, None).select(range(2), print)
    assert whole.kind is Instances and whole.classes.names == ("cat", "bird", "dog")
    objects = whole.target(1)
    assert objects.masks.shape == (3, SIDE, SIDE) and whole.occurring == {0, 2}
    small = TransformRecipe(resize="stretch", height=12, width=12)
    frozen = LabelledReader(source, small, as_masks=True).select(range(2), print)
    assert frozen.kind is Mask and frozen.classes.names == ("background", "cat", "bird", "dog")
    assert_array_equal(frozen.target(1).numbers, objects.as_mask().numbers[1::2, 1::2])
    assert frozen.find_classes() == {0, 1, 3}
    resized = LabelledReader(source, small).select(range(2), print)
    assert resized.kind is Instances and resized.target(1).size_px == resized.image(1).shape[:2] == (12, 12)
    assert_array_equal(resized.target(1).boxes, objects.boxes / 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded:DeprecationWarning")
def test_a_set_reads_the_same_in_other_processes(image_folder: Path, tmp_path: Path) -> None:
    """Copies keep nothing in memory, and forks add nothing to what they inherit."""
    labelled = read(image_folder, recipe=None).select(range(8), print).subset([6, 1])
    copy = pickle.loads(pickle.dumps(labelled))
    assert copy.keys == labelled.keys == ("dog/004.png", "cat/003.png")
    assert_array_equal(copy.image(0), labelled.image(0))
    assert copy.target(1) == labelled.target(1) == Class(0)
    assert copy.image(0) is not copy.image(0)
    loader = DataLoader(SetOf(labelled), batch_size=2, num_workers=2, multiprocessing_context="fork")
    (images, classes) = next(iter(loader))
    assert_array_equal(images.numpy(), all_images(labelled))
    assert classes.tolist() == [1, 0]


def test_many_threads_read_the_same(image_folder: Path) -> None:
    labelled = read(image_folder).select(range(8), print)
    expected = [labelled.image(row % 8) for row in range(64)]
    fresh = read(image_folder).select(range(8), print)
    with ThreadPoolExecutor(8) as pool:
        for one, other in zip(pool.map(lambda row: fresh.image(row % 8), range(64)), expected, strict=True):
            assert_array_equal(one, other)


def test_an_image_that_is_gone_or_broken_later_is_named_with_what_to_do(image_folder: Path) -> None:
    labelled = pickle.loads(pickle.dumps(read(image_folder).select(range(8), print)))
    (image_folder / "cat" / "001.png").unlink()
    (image_folder / "cat" / "003.png").write_bytes(b"no")
    for row, said in ((0, r"cat/001.png: unreadable: No such file"), (1, r"cat/003.png: not a readable image")):
        with pytest.raises(InputError, match=rf"{said}.*; put it there again, or take it away and run again"):
            labelled.image(row)


def test_of_very_many_images_a_few_are_looked_at(image_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(labelled_module, "LOOKED_AT", 7)
    monkeypatch.setattr(labelled_module, "_FEW", 2)
    (image_folder / "cat" / "001.png").write_bytes(b"no")
    notes: list[str] = []
    labelled = read(image_folder).select(range(8), notes.append)
    assert len(labelled) == 7 and labelled.digests == () and labelled.occurring is None
    assert notes[0].startswith(f"{image_folder}: of 8 images 2 are looked at first")
    assert notes[0].endswith("a run on them that goes on later compares their keys alone")
    assert notes[1].startswith("left out cat/001.png")
    masks = write_files(
        image_folder.with_name("masks"), {f"{key}": png(np.ones((32, 32), np.uint8)) for key in labelled.keys}
    )
    write_files(masks, {"cat/001.png": png(np.ones((32, 32), np.uint8))})
    with pytest.raises(ConfigError, match=r"the classes of over 7 masks must be named; give --class-names"):
        read(image_folder, masks).select(range(8), print)


@dataclass(frozen=True)
class SetOf(Dataset[tuple[np.ndarray, int]]):
    """What a task's own data set does, in a worker."""

    labelled: LabelledSet

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, row: int) -> tuple[np.ndarray, int]:
        return self.labelled.image(row), self.labelled.target(row).number


def test_a_label_that_was_changed_changes_what_is_trained_on(tmp_path: Path) -> None:
    """The image stays; one pixel of its mask is painted anew."""
    images = {"a.png": png(np.zeros((8, 8, 3), np.uint8)), "b.png": png(np.ones((8, 8, 3), np.uint8))}
    mask = np.zeros((8, 8), np.uint8)
    mask[0] = 1
    write_files(tmp_path / "images", images)
    seen = []
    for pixel in (0, 0, 1):
        mask[7, 7] = pixel
        write_files(tmp_path / "masks", {name: png(mask) for name in images})
        source = open_labelled(str(tmp_path / "images"), str(tmp_path / "masks"))
        seen.append(LabelledReader(source, None).select([0, 1], print))
    first, same, changed = seen
    assert first.content_digest() == same.content_digest() != changed.content_digest()
    assert first.digests == changed.digests
    assert first.subset([0]).content_digest() != changed.subset([0]).content_digest()
