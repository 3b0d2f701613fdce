"""Labelled images: masks stay on their images, the split depends on keys alone."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from dtpipe.extract.sources.images import resize_image
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline import labelled as labelled_module
from dtpipe.pipeline.labelled import LabelledReader, decode_mask, resize_mask, split_by_key
from parts.images import png, write_files
from parts.labelled import all_images, all_masks


@pytest.mark.parametrize("resize", ["center_crop", "stretch"])
@pytest.mark.parametrize("size", [(96, 160), (160, 96), (64, 64), (40, 50)])
def test_a_mask_lies_where_its_image_lies(resize: str, size: tuple[int, int]) -> None:
    """A white disc as image and as mask: resized, they may differ on the disc's rim only."""
    rows, columns = np.mgrid[: size[0], : size[1]]
    disc = (rows - size[0] * 0.4) ** 2 + (columns - size[1] * 0.6) ** 2 < (min(size) * 0.3) ** 2
    recipe = TransformRecipe(resize=resize, height=32, width=32)
    image = resize_image(np.repeat(disc[..., None], 3, axis=2).astype(np.uint8) * 255, recipe)[..., 0]
    mask = resize_mask(disc.astype(np.uint8), recipe)
    assert mask.shape == (32, 32)
    assert 0.1 < mask.mean() < 0.5
    assert ((image > 127) != (mask == 1)).mean() < 0.03


def test_mask_values_are_class_numbers_also_of_palettes_and_equal_channels() -> None:
    values = np.array([[0, 1], [2, 255]], np.uint8)
    palette = Image.fromarray(values, mode="P")
    palette.putpalette(bytes(range(256)) * 3)
    buffer = io.BytesIO()
    palette.save(buffer, "PNG")
    assert_array_equal(decode_mask(buffer.getvalue(), "a"), values)
    assert_array_equal(decode_mask(png(values), "a"), values)
    assert_array_equal(decode_mask(png(np.repeat(values[..., None], 3, axis=2)), "a"), values)


@pytest.mark.parametrize(
    "data", [b"", b"not an image", png(np.zeros((2, 2, 3), np.uint8) + np.arange(3, dtype=np.uint8))]
)
def test_what_is_no_mask_is_refused_by_name(data: bytes) -> None:
    with pytest.raises(InputError, match=r"mask cat/1\.png"):
        decode_mask(data, "cat/1.png")


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
    with pytest.raises(InputError, match="no mask for image"):
        LabelledReader(str(image_folder), str(masks), recipe).select(range(9), notes.append)


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
