"""Tables of names and labels: columns by their titles, images by their names; what does not fit is named."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Class
from parts.images import draw_image, png, write_files
from parts.packing import folder_files, write_zip

IMAGES = {name: png(draw_image(idx)) for idx, name in enumerate(("x/a.png", "x/b.jpg", "y/c.png"))}


def labels_by(tmp_path: Path, table: str | bytes, name: str = "labels.csv") -> dict[str, str]:
    """Class name of each key, as the layout reads a table beside the images."""
    data = table if isinstance(table, bytes) else table.encode()
    root = write_files(tmp_path / "data", {**IMAGES, name: data})
    source = open_layout(f"csv:{root}@{name}")
    targets = [source.target(row, (1, 1)) for row in range(len(source.items))]
    assert all(isinstance(target, Class) for target in targets)
    return {item.key: source.classes.names[target.number] for item, target in zip(source.items, targets, strict=True)}


@pytest.mark.parametrize(
    "table",
    [
        pytest.param("name,label\nx/a.png,cat\nx/b.jpg,dog\ny/c.png,cat\n", id="titles"),
        pytest.param("x/a.png,cat\nx/b.jpg,dog\ny/c.png,cat", id="no titles"),
        pytest.param("photo;kind\nx/a.png;cat\nx/b.jpg;dog\ny/c.png;cat\n", id="other titles, semicolons"),
        pytest.param("size\tClass\tFile\n1\tcat\ta.png\n2\tdog\tb.jpg\n3\tcat\tc.png\n", id="tabs, names alone"),
        pytest.param("id,breed\na,cat\nb,dog\nc,cat\n", id="without endings"),
        pytest.param("id,breed\nx/a,cat\nx/b,dog\ny/c,cat\n", id="paths without endings"),
        pytest.param('\ufeffname,label\r\n"x/a.png","cat"\r\n\r\n.\\x\\b.jpg,dog\r\n"c.png", cat \r\n', id="Windows"),
    ],
)
def test_names_and_labels_are_found_however_the_table_is_written(table: str, tmp_path: Path) -> None:
    assert labels_by(tmp_path, table) == {"x/a.png": "cat", "x/b.jpg": "dog", "y/c.png": "cat"}


def test_classes_that_are_numbers_stand_in_their_order(tmp_path: Path) -> None:
    root = write_files(tmp_path, {**IMAGES, "t.csv": b"name,label\na.png,10\nb.jpg,9\nc.png,10\n"})
    source = open_layout(f"csv:{root}@t.csv")
    assert source.classes.names == ("9", "10")
    assert [source.target(row, (1, 1)).number for row in range(3)] == [1, 0, 1]


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    root = write_files(tmp_path, {**IMAGES, "t.csv": b"name,label\na.png,cat\ngone.png,dog\na.png,cat\nb.jpg,dog\n"})
    source = open_layout(f"csv:{root}@t.csv")
    assert list(source.notes()) == [
        f"{root}/t.csv: left out 1 line that repeat others, line 4 for one",
        f"left out 1 image that {root}/t.csv names and {root} does not hold: gone.png",
        f"left out 1 image that {root}/t.csv does not name: y/c.png",
    ]


def test_a_table_elsewhere_labels_images_in_a_zip(tmp_path: Path) -> None:
    images = write_zip(tmp_path / "photos.zip", folder_files(write_files(tmp_path / "images", IMAGES)))
    table = write_files(tmp_path / "tables", {"t.csv": b"name,label\na.png,cat\nb.jpg,dog\n"}) / "t.csv"
    source = pickle.loads(pickle.dumps(open_layout(f"csv:{images}@{table}")))
    assert [source.items[row].key for row in range(2)] == ["x/a.png", "x/b.jpg"]
    assert source.read(1) == IMAGES["x/b.jpg"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ("", "is empty"),
        ("name,label\n", "has a first line with the names of columns and no other"),
        ("a,b,c\n1,2,3\n", "which of the columns a, b, c are name and label is not said; call one name and one label"),
        ("0001,cat\n0002,dog\n", "which of the columns 0001, cat are name and label"),
        ("name,label\na.png,cat\nb.jpg,\n", "line 3 has no label"),
        ("name,label\na.png,cat\n,dog\n", "line 3 has no name"),
        ("name,label\na.png,cat\nb.jpg\n", "line 3 has no label"),
        ("name,label\na.png,cat\na.png,dog\n", "a.png is cat in line 2 and dog in line 3"),
        ("name,label\na.png,cat\nx/a.png,dog\n", "lists x/a.png twice, as a.png and x/a.png"),
        ("name,label\na.png,0.25\nb.jpg,1\n", "labels such as 0.25 measure something and are no classes"),
        ("name,label\nu.png,cat\nv.png,dog\n", "none of the 2 images that .*t.csv names is there, u.png for one"),
        (b"name,label\na.png,K\xe4fer\n", "is no UTF-8 text"),
    ],
)
def test_what_is_wrong_with_a_table_is_named(table: str | bytes, said: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=said):
        labels_by(tmp_path, table, "t.csv")


def test_names_that_several_images_have_are_refused(tmp_path: Path) -> None:
    root = write_files(tmp_path, {**IMAGES, "z/a.png": IMAGES["x/a.png"], "t.csv": b"name,label\na.png,cat\nb,dog\n"})
    with pytest.raises(InputError, match=r"image a.png may be x/a.png, z/a.png; name a root that holds one of them"):
        open_layout(f"csv:{root}@t.csv")
    with pytest.raises(ConfigError, match=r"name the table with the labels, as in csv:"):
        open_layout(f"csv:{root}")
