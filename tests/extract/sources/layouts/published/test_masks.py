"""Published masks of classes against what was painted, and against other libraries that read the same trees."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Mask
from parts import published_trees as trees
from parts.images import png, write_files
from parts.published_trees import DOWN, HEIGHT, LEFT, RIGHT, UP, WIDTH, painted

PX = (HEIGHT, WIDTH)


def opened(layout: str, root: Path, split: str) -> LabelledSource:
    labelled = open_layout(f"{layout}:{root}@{split}")
    assert labelled is not None and labelled.kind is Mask
    return labelled


def mask(labelled: LabelledSource, row: int = 0, px: tuple[int, int] = PX) -> Mask:
    target = labelled.target(row, px)
    assert isinstance(target, Mask)
    return target


def test_ade20k_leaves_out_other_and_counts_from_zero(tmp_path: Path) -> None:
    labelled = opened("ade20k", write_files(tmp_path, trees.ade20k()), "training")
    read = mask(labelled)
    np.testing.assert_array_equal(read.numbers, painted((UP, LEFT, 0), (DOWN, RIGHT, 149), value=255))
    assert read.ignore == 255 and read.occurring == {0, 149}
    assert labelled.classes.names[0] == "wall" and labelled.classes.numbers[149] == 150


def test_bdd100k_masks_are_train_ids(tmp_path: Path) -> None:
    labelled = opened("bdd100k-sem", write_files(tmp_path, trees.bdd100k_sem()), "train")
    np.testing.assert_array_equal(mask(labelled).numbers, trees.TRAIN_ID_MASK)
    assert mask(labelled).occurring == {0, 18}


def test_cityscapes_masks_are_those_of_torchvision_in_train_ids(tmp_path: Path) -> None:
    from torchvision.datasets import Cityscapes

    root = write_files(tmp_path, trees.cityscapes())
    lonely = root / "leftImg8bit" / "val" / "lonely_leftImg8bit.png"
    labelled = opened("cityscapes", root, "val")
    expected = painted((UP, LEFT, 13), (DOWN, RIGHT, 11), (DOWN, LEFT, 255), (slice(3, 5), LEFT, 18), value=0)
    np.testing.assert_array_equal(mask(labelled).numbers, expected)
    lonely.unlink()  # torchvision takes it for a city
    theirs = np.asarray(Cityscapes(str(root), split="val", target_type="semantic")[0][1])
    train_ids = {label.id: label.train_id for label in Cityscapes.classes}
    np.testing.assert_array_equal(mask(labelled).numbers, np.vectorize(train_ids.get)(theirs))


@pytest.mark.parametrize("split", ["train", "val", "trainval"])
def test_voc_masks_are_those_of_torchvision(tmp_path: Path, split: str) -> None:
    from torchvision.datasets import VOCSegmentation

    write_files(tmp_path, trees.voc("VOCdevkit/VOC2012/"))
    lists = tmp_path / "VOCdevkit" / "VOC2012" / "ImageSets" / "Segmentation"
    labelled = opened("voc", tmp_path / "VOCdevkit" / "VOC2012", split)
    (lists / "train.txt").write_text("2007_000032\n")  # without the image that is not there
    theirs = VOCSegmentation(str(tmp_path), image_set=split)
    assert [item.key for item in labelled.items] == [Path(path).name for path in sorted(theirs.images)]
    for row in range(len(theirs)):
        np.testing.assert_array_equal(mask(labelled, row).numbers, np.asarray(theirs[row][1]))
    assert mask(labelled).occurring == {0, 1, 20}  # the border, 255, is ignored


@pytest.mark.parametrize("base", ["", "VOCdevkit/VOC2012/", "VOC2007/"])
def test_voc_is_found_below_what_its_archive_unpacks_to(tmp_path: Path, base: str) -> None:
    labelled = opened("voc", write_files(tmp_path, trees.voc(base)), "train")
    assert [item.key for item in labelled.items] == ["2007_000032.jpg"]
    assert labelled.notes() == ("left out 1 image of the list without image or label: 2007_999999",)


def test_several_years_of_voc_are_refused(tmp_path: Path) -> None:
    root = write_files(tmp_path, {**trees.voc("VOCdevkit/VOC2007/"), **trees.voc("VOCdevkit/VOC2012/")})
    with pytest.raises(
        InputError, match=f"holds VOCdevkit/VOC2007/, .*; name one of them, such as {root}/VOCdevkit/VOC2012"
    ):
        opened("voc", root, "train")


# --- the label-efficient benchmark -----------------------------------------------------------------------------------


def test_bedrooms_ignore_their_background_and_other_sets_do_not(tmp_path: Path) -> None:
    """A mask of 4 x 4 for an image of 8 x 8."""
    labelled = opened("ddpm-seg", write_files(tmp_path / "bedroom_28", trees.ddpm_seg()), "train")
    read = mask(labelled, px=(8, 8))
    np.testing.assert_array_equal(read.numbers, trees.DDPM_MASK)
    assert read.ignore == 0 and read.occurring == {9, 18, 27}
    assert len(labelled.classes) == 29 and labelled.classes.names[9] == "cushion"
    files = {**trees.ddpm_seg(), "real/train/0.npy": trees.npy(np.array([[0, 14], [255, 0]], np.uint8))}
    cats = opened("ddpm-seg", write_files(tmp_path / "cat_15", files), "train")
    assert mask(cats, px=(8, 8)).ignore == 255 and mask(cats, px=(8, 8)).occurring == {0, 14}


def test_annotated_samples_of_the_ddpm_are_a_split_of_their_own(tmp_path: Path) -> None:
    files = {**trees.ddpm_seg(), "ddpm/0.png": png(trees.picture(4, 8, 8))}
    labelled = opened("ddpm-seg", write_files(tmp_path / "bedroom_28", files), "ddpm")
    assert [item.key for item in labelled.items] == ["0.png"]
    np.testing.assert_array_equal(mask(labelled, px=(8, 8)).numbers, trees.DDPM_MASK)


def test_small_classes_are_cleaned_from_training_masks_at_the_benchmarks_size(tmp_path: Path) -> None:
    array = np.zeros((256, 256), np.int64)
    array[0, :19], array[1, :20] = 5, 6
    image = png(trees.picture(1, 16, 16).repeat(16, axis=0).repeat(16, axis=1))
    root = write_files(tmp_path / "horse_21", {"real/train/a.png": image, "real/train/a.npy": trees.npy(array)})
    read = mask(opened("ddpm-seg", root, "train"), px=(256, 256))
    assert read.occurring == {0, 5, 6} and read.without_specks().occurring == {0, 6}


def pickled() -> bytes:
    file = trees.io.BytesIO()
    np.save(file, np.array([[{}]], dtype=object), allow_pickle=True)
    return file.getvalue()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (pickled(), "0.npy is no array of numbers that can be read .*allow_pickle=False"),
        (b"PK", "is no array of numbers"),
        (trees.npy(np.zeros((4, 4), np.int64))[:-8], "is no array of numbers"),
        (trees.npy(np.full((4, 4), 29)), "holds the value 29, which is the number of no class; known are 0-28; is it"),
        (trees.npy(np.full((4, 4), -1)), "holds the value -1"),
        (trees.npy(np.full((4, 4), 0.5)), "holds 0.5, which is no class number"),
        (trees.npy(np.full((4, 4), np.nan)), "holds nan"),
        (trees.npy(np.zeros((4, 5), np.uint8)), r"has shape \(4, 5\); a mask is a square"),
        (trees.npy(np.zeros((4, 4, 3), np.uint8)), r"has shape \(4, 4, 3\); a mask has a class number per pixel"),
    ],
)
def test_an_array_that_is_no_mask_is_refused_and_nothing_is_unpickled(
    tmp_path: Path, data: bytes, message: str
) -> None:
    root = write_files(tmp_path / "bedroom_28", {**trees.ddpm_seg(), "real/train/0.npy": data})
    with pytest.raises(InputError, match=message):
        mask(opened("ddpm-seg", root, "train"), px=(8, 8))


def test_a_header_that_claims_terabytes_allocates_nothing(tmp_path: Path) -> None:
    whole = trees.npy(np.zeros((4, 4), np.uint8))
    forged = whole.replace(b"(4, 4), }" + b" " * 10, b"(999999, 999999), }")
    root = write_files(tmp_path / "bedroom_28", {**trees.ddpm_seg(), "real/train/0.npy": forged})
    with pytest.raises(InputError, match=r"has shape \(999999, 999999\)"):
        mask(opened("ddpm-seg", root, "train"), px=(8, 8))


def test_images_of_the_benchmark_are_square(tmp_path: Path) -> None:
    labelled = opened("ddpm-seg", write_files(tmp_path / "bedroom_28", trees.ddpm_seg()), "test")
    with pytest.raises(InputError, match="its image has 12x8 px; this benchmark's are square"):
        mask(labelled)


def test_a_set_of_another_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"'bedrooms' is no set of this benchmark.*bedroom_28, ffhq_34, cat_15"):
        opened("ddpm-seg", write_files(tmp_path / "bedrooms", trees.ddpm_seg()), "train")


# --- DatasetGAN ------------------------------------------------------------------------------------------------------


def test_datasetgan_pairs_training_images_by_number_and_photographs_by_order(tmp_path: Path) -> None:
    root = write_files(tmp_path / "dataset_release", trees.datasetgan())
    cars = opened("datasetgan", root, "car-train")
    assert [item.key for item in cars.items] == ["image_0.jpg"]
    np.testing.assert_array_equal(mask(cars).numbers, trees.PARTS_MASK[0])
    assert cars.classes.names[18] == "window" and len(cars.classes) == 20
    photographs = opened("datasetgan", root, "car-test")
    assert [item.key for item in photographs.items] == ["b.jpg", "c.jpg"]
    np.testing.assert_array_equal(mask(photographs).numbers, trees.PARTS_MASK[0])
    np.testing.assert_array_equal(mask(photographs, 1).numbers, trees.PARTS_MASK[0, ::-1])
    (root / "annotation" / "testing_data" / "car_20_class" / "z.npy").unlink()
    with pytest.raises(InputError, match="car_20_class has 2 images and 1 array, and they are paired in the order"):
        opened("datasetgan", root, "car-test")


def test_datasetgan_refuses_masks_of_other_classes_or_another_aspect(tmp_path: Path) -> None:
    name = "annotation/training_data/car_processed/image_mask0.npy"
    for array, message in (
        (np.full((4, 6), 20), "value 20, which is the number of no class; known are 0-19"),
        (np.zeros((4, 4), np.uint8), "has 4x4 px and its image, .* 12x8"),
    ):
        root = write_files(tmp_path / "dataset_release", {**trees.datasetgan(), name: trees.npy(array)})
        with pytest.raises(InputError, match=message):
            mask(opened("datasetgan", root, "car-train"))
    for path in root.glob("annotation/training_data/car_processed/*.npy"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"no image_0.jpg in .* has its image_mask0.npy; there is image_0.jpg, image_1"
    ):
        opened("datasetgan", root, "car-train")


# --- what no mask holds ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layout", "label", "number", "message"),
    [
        (
            "ade20k",
            "annotations/training/ADE_train_00000001.png",
            151,
            "value 151, .* known are 0-150; is it of another",
        ),
        ("bdd100k-sem", "labels/sem_seg/masks/train/a.png", 19, "value 19, .*known are 0-18, 255;"),
        ("cityscapes", f"gtFine/val/{trees.CITY}_gtFine_labelIds.png", 34, "value 34, .*known are 0-33;"),
        ("voc", "SegmentationClass/2007_000032.png", 21, "value 21, .*known are 0-20, 255;"),
    ],
)
def test_a_number_of_no_class_is_refused(tmp_path: Path, layout: str, label: str, number: int, message: str) -> None:
    make, name, split = trees.TREES[layout]
    files = make()
    assert label in files
    root = write_files(tmp_path / name, {**files, label: png(painted((UP, LEFT, number)))})
    with pytest.raises(InputError, match=message):
        mask(opened(layout, root, split))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (png(np.zeros((HEIGHT, WIDTH - 1), np.uint8)), "has 11x8 px and its image, turned .*, 12x8; labels and images"),
        (png(np.zeros((WIDTH, HEIGHT), np.uint8)), "has 8x12 px and its image"),
        (png(trees.picture(1)), "has 3 channels, and the published file has 1; fetch it again, unconverted"),
        (trees.jpeg(1), "is no PNG file that can be read"),
        (png(trees.picture(1))[:90], "is no PNG file that can be read"),
        (b"", "is no PNG file that can be read"),
    ],
)
def test_a_label_that_is_not_as_published_is_refused(tmp_path: Path, data: bytes, message: str) -> None:
    name = "annotations/training/ADE_train_00000001.png"
    labelled = opened("ade20k", write_files(tmp_path, {**trees.ade20k(), name: data}), "training")
    with pytest.raises(InputError, match=f"{name} {message}"):
        mask(labelled)


def test_a_label_that_is_gone_since_the_listing_is_named(tmp_path: Path) -> None:
    labelled = opened("ade20k", write_files(tmp_path, trees.ade20k()), "training")
    (tmp_path / "annotations" / "training" / "ADE_train_00000001.png").unlink()
    with pytest.raises(InputError, match=r"ADE_train_00000001.png cannot be read: .*; put it there again"):
        mask(labelled)
