"""Labelled images: masks stay on their images, the split depends on keys alone."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal

from dtpipe.manifests.errors import InputError
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline import labelled as labelled_module
from dtpipe.pipeline.labelled import LabelledReader, split_by_key
from parts.images import png, write_files
from parts.labelled import all_images, all_masks


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
    recipe = TransformRecipe(height=32, width=32)
    notes: list[str] = []
    reader = LabelledReader(str(image_folder), None, recipe)
    labelled = reader.select(range(len(reader.items)), notes.append)
    assert labelled.classes.names == ("cat", "dog")
    assert len(labelled) == 8
    names = [labelled.classes.names[number] for number in labelled.read_classes()]
    assert names == [key.split("/")[0] for key in labelled.keys]
    assert len(notes) == 1
    assert "cat/bad.png" in notes[0]
    masks = write_files(tmp_path / "masks", {"cat/001.png": png(np.ones((32, 32), np.uint8))})
    with pytest.raises(InputError, match=r"no mask for image cat/003.png.* here cat/003.png; cat/001.png is one that"):
        LabelledReader(str(image_folder), str(masks), recipe).select(range(9), notes.append)


@pytest.mark.parametrize("share", [0.05, 0.5, 0.95])
def test_each_class_stands_on_both_sides_but_for_one_of_a_single_image(share: float) -> None:
    labels = ["alone", *["pair"] * 2, *["many"] * 40]
    train, test = split_by_key([f"{idx}.png" for idx in range(43)], labels, share, seed=0)
    assert {labels[row] for row in train} == {"alone", "pair", "many"}
    assert {labels[row] for row in test} == {"pair", "many"}


def test_what_does_not_fit_between_images_and_masks_is_refused_by_name(image_folder: Path, tmp_path: Path) -> None:
    recipe = TransformRecipe(height=32, width=32)
    (image_folder / "cat" / "001.png").write_bytes(png(np.zeros((20, 40, 3), np.uint8)))

    def read(**masks: bytes) -> None:
        written = write_files(
            tmp_path / "-".join(masks), {name.replace("_", "."): data for name, data in masks.items()}
        )
        LabelledReader(str(image_folder / "cat"), str(written), recipe).select([0], print)

    read(**{"001_png": png(np.ones((10, 20), np.uint8))})  # of half the size
    with pytest.raises(InputError, match=r"mask 001.png has 20x40 px and its image.* 40x20"):
        read(**{"001_png": png(np.ones((40, 20), np.uint8)), "other_png": png(np.ones((4, 4), np.uint8))})
    with pytest.raises(InputError, match=r"image 001.png has the masks 001.bmp and 001.png"):
        read(**{"001_png": png(np.ones((10, 20), np.uint8)), "001_bmp": b""})


def test_what_is_beyond_the_memory_of_a_reader_is_read_again(
    image_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = TransformRecipe(height=32, width=32)
    whole = all_images(LabelledReader(str(image_folder), None, recipe).select(range(8), print))
    monkeypatch.setattr(labelled_module, "KEPT_BYTES", 3 * 32 * 32 * 3)
    reader = LabelledReader(str(image_folder), None, recipe)
    assert_array_equal(all_images(reader.select(range(8), print)), whole)
    assert len(reader._kept) == 3


def test_equal_pixels_have_equal_digests_whatever_their_keys(image_folder: Path) -> None:
    (image_folder / "dog" / "copy.png").write_bytes((image_folder / "cat" / "001.png").read_bytes())
    reader = LabelledReader(str(image_folder), None, TransformRecipe(height=32, width=32))
    labelled = reader.select(range(9), print)
    digests = dict(zip(labelled.keys, labelled.digests, strict=True))
    assert digests["dog/copy.png"] == digests["cat/001.png"]
    assert len(set(labelled.digests)) == 8


def test_masks_say_how_many_classes_there_are_and_which_value_is_ignored(image_folder: Path, tmp_path: Path) -> None:
    mask = png(np.repeat(np.array([[0, 3, 9, 255]], np.uint8), 4, axis=0))
    keys = [str(path.relative_to(image_folder)) for path in image_folder.rglob("*.png")]
    masks = write_files(tmp_path / "masks", dict.fromkeys(keys, mask))
    recipe = TransformRecipe(resize="stretch", height=4, width=4)
    for ignore, num_classes, row in ((255, 10, [0, 3, 9, -1]), (9, 256, [0, 3, -1, 255]), (None, 256, [0, 3, 9, 255])):
        labelled = LabelledReader(str(image_folder), str(masks), recipe, ignore).select(range(2), print)
        assert len(labelled.classes) == num_classes
        assert all_masks(labelled)[1].tolist() == [row] * 4
