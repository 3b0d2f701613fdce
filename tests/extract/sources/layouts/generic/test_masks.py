"""Masks beside images: paired by path, of named classes, of any ignored value; what does not fit is named."""

from __future__ import annotations

import io
import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from dtpipe.extract.sources.layouts.class_names import parse_class_names
from dtpipe.extract.sources.layouts.generic.masks import open_masks_beside
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import ConfigError, InputError
from parts.images import png, write_files
from parts.packing import folder_files, write_zip

PICTURE, NUMBERS = png(np.zeros((2, 3, 3), np.uint8)), np.array([[0, 1, 2], [7, 1, 0]], np.uint8)


def palette(numbers: np.ndarray) -> bytes:
    """A PNG file of indices into colours, as Pascal VOC's are."""
    image, file = Image.fromarray(numbers), io.BytesIO()
    image.putpalette([200, 10, 10, 10, 200, 10, 10, 10, 200] + [7] * 759)
    image.save(file, "PNG")
    return file.getvalue()


def tree(root: Path, **files: bytes) -> Path:
    return write_files(root, {"images/val/a.jpg": PICTURE, "masks/val/a.png": palette(NUMBERS), **files})


@pytest.mark.parametrize("ignore", [7, 255, 0, None])
def test_any_value_may_mean_no_label(ignore: int | None, tmp_path: Path) -> None:
    """Of images and masks in two sources of different kinds."""
    root = tree(tmp_path)
    masks = write_zip(tmp_path / "masks.zip", folder_files(root / "masks" / "val"))
    source = pickle.loads(pickle.dumps(open_masks_beside(str(root / "images" / "val"), str(masks), ignore)))
    mask = source.target(0, (2, 3))
    assert_array_equal(mask.numbers, NUMBERS)
    assert mask.occurring == {0, 1, 2, 7} - {ignore}
    assert len(source.classes) == 0  # nobody has named them


def test_a_root_holds_images_masks_and_names(tmp_path: Path) -> None:
    spare = png(NUMBERS)
    root = tree(tmp_path, **{"masks/val/deep/b.png": spare, "classes.json": json.dumps([*"abcdefgh"]).encode()})
    source = open_layout(f"masks:{root}@val")
    assert source.classes.names == tuple("abcdefgh")
    assert_array_equal(source.target(0, (4, 6)).numbers, NUMBERS)  # of the image's aspect
    assert list(source.notes()) == ["left out 1 mask without an image: deep/b.png"]
    write_files(root, {"images/train/a.jpg": PICTURE})
    with pytest.raises(ConfigError, match=r"images/ is divided into train and val; write masks:.*@train"):
        open_layout(f"masks:{root}")


def test_masks_that_do_not_fit_are_named(tmp_path: Path) -> None:
    root = tree(tmp_path, **{"classes.txt": b"a\nb\nc\n"})
    source = open_layout(f"masks:{root}@val")
    with pytest.raises(InputError, match=r"mask a.png has 1 pixel of class 7, and the classes are 0 to 2 \(a, b, c\)"):
        source.target(0, (2, 3))
    with pytest.raises(InputError, match=r"mask a.png has 3x2 px and its image, turned .*, 2x3"):
        source.target(0, (3, 2))
    (root / "masks/val/a.png").unlink()
    with pytest.raises(InputError, match=r"masks/val: mask a.png cannot be read: unreadable: No such file"):
        source.target(0, (2, 3))
    write_files(root, {"masks/val/b.png": png(NUMBERS)})
    with pytest.raises(
        InputError, match=r"masks/val: no mask for image a.jpg; .* here a.png; b.png is one that is there"
    ):
        open_layout(f"masks:{root}@val")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("n.txt", "floor\nwall\n\n"),
        ("n.txt", "\ufefffloor\r\n wall "),
        ("n.json", '["floor", "wall"]'),
        ("n.json", '{"1": "wall", "0": "floor"}'),
        ("n.json", '{"wall": 1, "floor": 0}'),
    ],
)
def test_names_of_classes_are_read_in_every_form(name: str, text: str) -> None:
    assert parse_class_names(text.encode(), name).names == ("floor", "wall")


@pytest.mark.parametrize(
    ("name", "text", "said"),
    [
        ("n.txt", "", "it is empty"),
        ("n.txt", "floor\n\nwall", "class 1 has none"),
        ("n.txt", "floor\nfloor", "a class name occurs twice"),
        ("n.json", '{"0": "floor", "2": "wall"}', "their numbers are not 0, 1, 2"),
        ("n.json", '"floor"', "they are neither a list nor an object"),
        ("n.json", "[", "class names cannot be read"),
        ("n.json", '["floor", 1e400]', "one of them is read as inf"),
        ("n.json", f'{{"0": "floor", "{"1" * 5000}": "wall"}}', "class names cannot be read"),
    ],
)
def test_names_that_leave_a_class_out_are_refused(name: str, text: str, said: str) -> None:
    with pytest.raises(InputError, match=f"{name}: .*{said}"):
        parse_class_names(text.encode(), name)
