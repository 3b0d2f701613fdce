"""What `eval` draws labels from and scores on, from layouts, archives and object storage."""

from __future__ import annotations

import pickle
import re
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from numpy.testing import assert_array_equal
from pydantic import ValidationError

from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Class, Instances, Mask
from dtpipe.manifests.schema import TransformRecipe
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.evaluate import check_task
from dtpipe.pipeline.interpret.config import InterpretConfig
from dtpipe.pipeline.sets import label_kind, open_held_out, open_sets
from parts.coco import coco_document, image_entry, write_coco
from parts.images import draw_image, png, write_files
from parts.labelled import all_images, all_masks
from parts.packing import folder_files, write_zip

RECIPE = TransformRecipe(height=16, width=16)


def settings(images: str, **changes: Any) -> EvalConfig:
    return EvalConfig(checkpoint="", task="probe", images=images, **changes)


def masks_tree(root: Path) -> Path:
    """`images/` and `masks/` of two splits, six images in all."""
    for idx in range(6):
        name = f"{'train' if idx < 4 else 'val'}/{idx}.png"
        mask = np.full((20, 30), idx % 3, np.uint8)
        mask[:5] = 255
        write_files(root, {f"images/{name}": png(draw_image(idx, 30)[:20]), f"masks/{name}": png(mask)})
    return root


def test_a_layout_gives_the_same_sets_from_a_folder_a_zip_and_s3(tmp_path: Path, s3_url: str) -> None:
    root = masks_tree(tmp_path / "data")
    fs = fsspec.filesystem("s3")
    for name, data in folder_files(root).items():
        fs.pipe(f"{s3_url}/{name}", data)
    archive = write_zip(tmp_path / "data.zip", folder_files(root))
    for whole in (RECIPE, None):
        sets = []
        for place in (root, archive, s3_url):
            config = settings(f"masks:{place}@train", test_images=f"masks:{place}@val")
            sets.append(open_sets(config, whole, print))
            assert open_held_out(config, whole, print).digests == sets[-1][1].digests
        for train, test in sets:
            assert train.keys == ("0.png", "1.png", "2.png", "3.png")
            assert test.keys == ("held out/4.png", "held out/5.png")
            assert_array_equal(all_images(train), all_images(sets[0][0]))
            assert_array_equal(all_masks(test), all_masks(sets[0][1]))
            assert (train.digests, len(train.classes)) == (sets[0][0].digests, 3)
    assert_array_equal(np.unique(all_masks(sets[0][1])), [-1, 1, 2])


def test_class_folders_in_s3_are_read_by_a_copy(tmp_path: Path, image_folder: Path, s3_url: str) -> None:
    fs = fsspec.filesystem("s3")
    for name, data in folder_files(image_folder).items():
        fs.pipe(f"{s3_url}/{name}", data)
    train, _ = open_sets(settings(s3_url), None, print)
    local, _ = open_sets(settings(str(image_folder)), None, print)
    copy = pickle.loads(pickle.dumps(train))
    assert copy.keys == local.keys
    assert_array_equal(all_images(copy), all_images(local))
    assert copy.read_classes().tolist() == local.read_classes().tolist()


def test_held_out_classes_have_the_numbers_of_the_labelled_ones(tmp_path: Path) -> None:
    """The held-out file lists its categories by other ids, and one fewer: names count."""
    document = coco_document()
    train = write_coco(tmp_path / "train", document)
    ids = {3: 2, 90: 1}
    other = coco_document(
        categories=[{"id": 1, "name": "dog"}, {"id": 2, "name": "cat"}],
        annotations=[{**entry, "category_id": ids[entry["category_id"]]} for entry in document["annotations"]],
    )
    config = settings(f"coco-json:{train}@labels.json")
    config = config.model_copy(update={"test_images": f"coco-json:{write_coco(tmp_path / 'val', other)}@labels.json"})
    for recipe in (None, RECIPE):
        sets = open_sets(config, recipe, print, as_masks=recipe is not None)
        assert sets[0].classes.names == sets[1].classes.names
        assert sets[0].find_classes() == sets[1].find_classes()
    _, whole = open_sets(config, None, print)
    assert whole.kind is Instances and whole.target(1).classes.tolist() == [2, 0, 0]
    assert sets[0].kind is Mask
    other["categories"][0]["name"] = "cow"
    write_coco(tmp_path / "val", other)
    with pytest.raises(InputError, match=r"b.png: class 'cow' is not among the classes to learn from, cat, bird, dog"):
        open_sets(config, None, print)


def test_what_a_layout_leaves_out_is_said_once(tmp_path: Path) -> None:
    document = coco_document(images=[image_entry(10, "b.png"), image_entry(9, "a.png"), image_entry(8, "gone.png")])
    notes: list[str] = []
    root = write_coco(tmp_path, document)
    open_sets(settings(f"coco-json:{root}@labels.json"), None, notes.append)
    assert notes == [f"left out 1 image that {root}/labels.json lists and {root} does not hold: gone.png"]


def test_masks_have_the_names_of_a_file_and_foreground_merges_them(tmp_path: Path) -> None:
    root = masks_tree(tmp_path / "data")
    config = settings(str(root / "images/train"), masks=str(root / "masks/train"))
    train, test = open_sets(config, RECIPE, print)
    assert train.classes == test.classes and train.classes.names == ("0", "1", "2")
    names = write_files(tmp_path, {"names.txt": b"floor\nwall\ndoor\n"}) / "names.txt"
    named = config.model_copy(update={"class_names": str(names)})
    assert open_sets(named, RECIPE, print)[0].classes.names == ("floor", "wall", "door")
    merged = open_sets(named.model_copy(update={"foreground": True}), RECIPE, print)[0]
    assert merged.classes.names == ("background", "foreground") and merged.find_classes() <= {0, 1}
    names.write_text("floor\nwall\n")
    with pytest.raises(
        InputError, match=r"mask 2.png has 450 pixels of class 2, and the classes are 0 to 1 \(floor, w"
    ):
        open_sets(named, RECIPE, print)


def test_objects_can_be_told_from_background_alone(tmp_path: Path) -> None:
    root = write_coco(tmp_path, coco_document())
    for recipe in (None, RECIPE):
        train, test = open_sets(settings(f"coco-json:{root}@labels.json", foreground=True), recipe, print)
        assert {train.kind, test.kind} == {Mask} and train.classes.names == ("background", "foreground")


def test_settings_name_layouts_by_whole_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert settings("coco-json:data@ann/a.json").images == f"coco-json:{tmp_path}/data@ann/a.json"
    assert settings("folders:s3://bucket/data@train").images == "folders:s3://bucket/data@train"
    assert settings("folders:~/data").images == f"folders:{Path.home()}/data"
    assert settings("data@2:x").images == f"{tmp_path}/data@2:x"
    kinds = {
        name: label_kind(settings(name)) for name in ("data", "folders:data", "masks:data@a", "coco-json:d@a.json")
    }
    assert list(kinds.values()) == [Class, Class, Mask, Instances]


def test_a_word_that_is_no_layout_is_refused_and_a_folder_of_that_name_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValidationError, match=r"no layout is called coco-jsn; coco-json is one; `dtpipe list layouts`"):
        settings("coco-jsn:data@a.json")
    (tmp_path / "photos:2020").mkdir()
    assert settings("photos:2020").images == f"{tmp_path}/photos:2020"
    assert settings("./photos:2021").images == f"{tmp_path}/photos:2021"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"masks": "m"}, "says where its labels are; eval.masks is for a URL of images"),
        ({"class_names": "c.txt"}, "says where its labels are; eval.class_names is"),
    ],
)
def test_a_layout_says_itself_where_its_labels_are(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        settings("masks:data@train", **changes)
    with pytest.raises(ValidationError, match=r"class_names names the classes of eval.masks, and there"):
        settings("data", class_names="c.txt")


@pytest.mark.parametrize("ignore", [None, 0, 255])
def test_masks_of_a_layout_are_painted_with_any_ignored_value(ignore: int | None, tmp_path: Path) -> None:
    """Black and white masks: without an ignored value white is the foreground; by default nothing is left to learn."""
    white = np.full((20, 30), 255, np.uint8)
    white[:5] = 0
    for idx in range(4):
        files = {f"images/{idx}.png": png(draw_image(idx, 30)[:20]), f"masks/{idx}.png": png(white)}
        write_files(tmp_path, files)
    config = settings(f"masks:{tmp_path}", ignore_value=ignore, foreground=ignore is None)
    for labelled in open_sets(config, None, print):
        assert labelled.find_classes() == {None: {0, 1}, 0: {255}, 255: {0}}[ignore]
        assert len(labelled.classes) == {None: 2, 0: 256, 255: 1}[ignore]


@pytest.mark.parametrize("layout", ["ade20k", "coco-json", "folders", "ddpm-seg"])
def test_a_layout_with_a_rule_of_its_own_takes_no_ignored_value(layout: str) -> None:
    said = rf"^.*{layout}:.* says itself what has no label; eval.ignore_value is for --masks and masks:ROOT, leave"
    with pytest.raises(ValidationError, match=re.compile(said, re.MULTILINE)):
        settings(f"{layout}:data@train", ignore_value=0)
    with pytest.raises(ValidationError, match=re.compile(said, re.MULTILINE)):
        settings("masks:data@train", test_images=f"{layout}:data@val", ignore_value=None)


def test_settings_of_an_interpreter_take_an_ignored_value_alike() -> None:
    fields = {"features": "features", "run": {"out": "out"}, "ignore_value": 0}
    assert InterpretConfig.model_validate({**fields, "images": "masks:data@train"}).ignore_value == 0
    with pytest.raises(ValidationError, match=r"what has no label; interpret.ignore_value is for --masks"):
        InterpretConfig.model_validate({**fields, "images": "voc:data@train"})


def test_held_out_images_need_labels_of_the_same_kind(tmp_path: Path, image_folder: Path) -> None:
    root = write_coco(tmp_path, coco_document())
    config = settings(f"coco-json:{root}@labels.json", test_images=str(image_folder))
    with pytest.raises(ConfigError, match=r"labels.json has objects for labels and .*images classes; give held-out"):
        open_sets(config, None, print)


@pytest.mark.parametrize(
    ("images", "task", "said"),
    [
        ("coco-json:d@a.json", "probe", "task probe learns from classes; with coco-json use readout"),
        ("folders:d@train", "readout", "task readout learns from masks; give --masks, or with class folders use probe"),
        (
            "d",
            "detect",
            r"objects; name a layout that has them in --images \(coco-json, yolo, coco, .*; with class folders",
        ),
        ("coco:d@val", "panoptic", r"segments; name a layout .*coco-panoptic, .*; with coco use readout, .*detect"),
    ],
)
def test_a_task_that_does_not_learn_from_a_layout_is_refused(images: str, task: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        check_task(settings(images).model_copy(update={"task": task}))
    check_task(settings("coco-json:d@a.json").model_copy(update={"task": "readout"}))


def test_all_images_are_held_out_where_each_seed_splits_anew(tmp_path: Path) -> None:
    root = masks_tree(tmp_path / "data")
    config = settings(f"masks:{root}@train", test_images=f"masks:{root}@val", resplit=True)
    train, test = open_sets(config, None, print)
    whole = open_held_out(config, None, print)
    assert (whole.keys, whole.digests) == (train.keys + test.keys, train.digests + test.digests)


def test_a_file_of_keys_names_the_labelled_images(tmp_path: Path) -> None:
    """Beside images of their own to score on, or the rest of the same."""
    root, keys = masks_tree(tmp_path / "data"), tmp_path / "keys.txt"
    keys.write_text("2.png\n\n0.png\n")
    train, test = open_sets(
        settings(f"masks:{root}@train", test_images=f"masks:{root}@val", keys=str(keys)), None, print
    )
    assert train.keys == ("0.png", "2.png") and test.keys == ("held out/4.png", "held out/5.png")
    config = settings(f"masks:{root}@train", keys=str(keys))
    train, test = open_sets(config, None, print)
    assert train.keys == ("0.png", "2.png") and test.keys == ("1.png", "3.png")
    assert open_held_out(config, None, print).keys == test.keys


def test_keys_that_are_not_there_are_named(tmp_path: Path) -> None:
    root, keys = masks_tree(tmp_path / "data"), tmp_path / "keys.txt"
    config = settings(f"masks:{root}@train", keys=str(keys))
    for text, said in (
        (
            "0.png\n4.png\n",
            r"1 of 2 wanted keys \('4\.png'\) that masks:.* does not hold; '0\.png' is one",
        ),
        ("\n", "names no image; write one key per line"),
        ("0.png\n1.png\n2.png\n3.png\n", "too few images to hold some out"),
    ):
        keys.write_text(text)
        with pytest.raises((InputError, ConfigError), match=said):
            open_sets(config, None, print)
    keys.unlink()
    with pytest.raises(InputError, match=r"eval\.keys: .*keys\.txt"):
        open_sets(config, None, print)
    with pytest.raises(ValidationError, match=r"eval\.resplit draws them anew; leave out one"):
        settings(f"masks:{root}@train", keys=str(keys), resplit=True)
