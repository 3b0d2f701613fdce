"""Miniatures of published data sets as they unpack, with the traps that each is known for.

Every tree is a mapping of path to bytes; images are 12 x 8 px, but for squares of 8 px where a set has them.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from parts.images import draw_image, png

Files = dict[str, bytes]
HEIGHT, WIDTH = 8, 12


def picture(idx: int, height: int = HEIGHT, width: int = WIDTH) -> np.ndarray:
    """Shapes: -> (height, width, 3) uint8."""
    return draw_image(idx, 16)[:height, :width]


def jpeg(idx: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    file = io.BytesIO()
    Image.fromarray(picture(idx, height, width)).save(file, "JPEG")
    return file.getvalue()


def painted(*blocks: tuple[slice, slice, Any], value: Any = 0, channels: int = 0, dtype: Any = np.uint8) -> np.ndarray:
    """Rows, columns and value of each block on a ground. Shapes: -> (HEIGHT, WIDTH) or with channels."""
    array = np.zeros((HEIGHT, WIDTH, channels) if channels else (HEIGHT, WIDTH), dtype)
    array[:] = value
    for rows, columns, own in blocks:
        array[rows, columns] = own
    return array


def palette_png(numbers: np.ndarray) -> bytes:
    """A PNG of palette indices with VOC's colours, in which no index is its colour."""
    image, file = Image.fromarray(numbers, "P"), io.BytesIO()
    image.putpalette([(37 * idx + shift) % 256 for idx in range(256) for shift in (5, 90, 200)])
    image.save(file, "PNG")
    return file.getvalue()


def npy(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


# --- classes ---------------------------------------------------------------------------------------------------------

WNIDS = ("n01440764", "n02012849", "n03126707")  # tench, and two that are called crane


def imagenet() -> Files:
    """Train in class folders, and val in class folders without the second class."""
    train = {f"train/{wnid}/{wnid}_{idx}.JPEG": jpeg(idx) for idx, wnid in enumerate(WNIDS)}
    val = {f"val/{wnid}/ILSVRC2012_val_{idx:08d}.JPEG": jpeg(9 + idx) for idx, wnid in ((1, WNIDS[2]), (2, WNIDS[0]))}
    return {**train, **val, "train/readme.txt": b""}


def imagenet_flat() -> Files:
    """Validation images in one folder; their classes by number are WNIDS 2, 0, 0."""
    return {f"val/ILSVRC2012_val_{idx:08d}.JPEG": jpeg(idx) for idx in (1, 2, 3)}


def kaggle_solution() -> bytes:
    lines = [
        "ImageId,PredictionString",
        f"ILSVRC2012_val_00000003,{WNIDS[0]} 1 2 3 4 {WNIDS[0]} 5 5 7 7 ",
        f"ILSVRC2012_val_00000001,{WNIDS[2]} 111 108 427 331 ",
        f"ILSVRC2012_val_00000002,{WNIDS[0]} 1 1 9 9 ",
    ]
    return "\r\n".join(lines).encode()


DEVKIT_ORDER = (WNIDS[1], WNIDS[2], WNIDS[0])  # numbers 1, 2, 3: not the order of the ids
DEVKIT_TRUTH = b"2\n3\n3\n"


def devkit_meta() -> bytes:
    """`meta.mat` as MATLAB holds it: classes with numbers from 1, then synsets above them."""
    from scipy.io import savemat

    fields = [("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("gloss", "O"), ("num_children", "O")]
    rows = [(np.uint16(idx), wnid, "a, b", "what", np.uint8(0)) for idx, wnid in enumerate(DEVKIT_ORDER, start=1)]
    rows.append((np.uint16(1001), "n00001740", "entity", "all", np.uint8(3)))
    file = io.BytesIO()
    savemat(file, {"synsets": np.array(rows, dtype=fields).reshape(-1, 1)})
    return file.getvalue()


# --- pixels ----------------------------------------------------------------------------------------------------------

UP, DOWN, LEFT, RIGHT = slice(0, 3), slice(5, 8), slice(0, 4), slice(8, 12)
ADE_MASK = painted((UP, LEFT, 1), (DOWN, RIGHT, 150))
TRAIN_ID_MASK = painted((UP, LEFT, 18), (DOWN, RIGHT, 255))
VOC_MASK = painted((UP, LEFT, 255), (slice(1, 2), slice(1, 3), 20), (DOWN, RIGHT, 1), (DOWN, LEFT, 1))
VOC_OBJECTS = painted((UP, LEFT, 255), (slice(1, 2), slice(1, 3), 1), (DOWN, RIGHT, 2), (DOWN, LEFT, 3))
CITY_LABELS = painted((UP, LEFT, 26), (DOWN, RIGHT, 24), (DOWN, LEFT, 29), (slice(3, 5), LEFT, 33), value=7)
CITY_OBJECTS = painted(
    (UP, slice(0, 2), 26000), (UP, slice(2, 4), 26001), (DOWN, RIGHT, 24), (DOWN, LEFT, 29003),
    (slice(3, 5), LEFT, 33012), value=7, dtype=np.uint16,
)  # fmt: skip
CITY = "aachen/aachen_000000_000019"


def pairs(images: str, labels: str, label: bytes, stem: str = "a", image_ending: str = ".jpg") -> Files:
    """An image with its label, one without, and a label without an image."""
    return {
        f"{images}/{stem}{image_ending}": jpeg(1) if image_ending == ".jpg" else png(picture(1)),
        f"{images}/lonely{image_ending}": jpeg(2) if image_ending == ".jpg" else png(picture(2)),
        labels.replace("*", stem): label,
        labels.replace("*", "unused"): label,
    }


def ade20k() -> Files:
    stem = "ADE_train_00000001"
    return {
        **pairs("images/training", "annotations/training/*.png", png(ADE_MASK), stem),
        "objectInfo150.txt": b"Idx\tRatio\tTrain\tVal\tName\n",
    }


def bdd100k_sem() -> Files:
    return pairs("images/10k/train", "labels/sem_seg/masks/train/*.png", png(TRAIN_ID_MASK))


def cityscapes() -> Files:
    """Another city has neither label; the files of colours and polygons lie between the labels."""
    files = pairs("leftImg8bit/val", "gtFine/val/*_gtFine_labelIds.png", png(CITY_LABELS), CITY, "_leftImg8bit.png")
    objects = {f"gtFine/val/{stem}_gtFine_instanceIds.png": png(CITY_OBJECTS) for stem in (CITY, "unused")}
    others = {f"gtFine/val/{CITY}_gtFine_color.png": png(picture(3)), f"gtFine/val/{CITY}_gtFine_polygons.json": b"{}"}
    return {**files, **objects, **others}


def voc(base: str = "") -> Files:
    """An image that no list names and that has no mask, as most of VOC's; train names one that is not there."""
    files: Files = {
        "JPEGImages/2007_000032.jpg": jpeg(1),
        "JPEGImages/2007_000001.jpg": jpeg(2),
        "JPEGImages/2012_004331.jpg": jpeg(3),
        "SegmentationClass/2007_000032.png": palette_png(VOC_MASK),
        "SegmentationClass/2007_000001.png": palette_png(VOC_MASK),
        "SegmentationObject/2007_000032.png": palette_png(VOC_OBJECTS),
        "SegmentationObject/2007_000001.png": palette_png(VOC_OBJECTS),
        "ImageSets/Segmentation/train.txt": b"2007_000032\n2007_999999\n",
        "ImageSets/Segmentation/val.txt": b"2007_000001\n",
        "ImageSets/Segmentation/trainval.txt": b"2007_000001\n2007_000032\n",
        "ImageSets/Main/train.txt": b"2007_000032 -1\n",
    }
    return {base + name: data for name, data in files.items()}


DDPM_MASK = np.repeat(np.arange(4, dtype=np.int64) * 9, 4).reshape(4, 4)  # rows of 0, 9, 18, 27; half the image's side


def ddpm_seg() -> Files:
    """A bedroom: `0.png` with its mask, one without, and samples of a DDPM beside the real images."""
    return {
        "real/train/0.png": png(picture(1, 8, 8)),
        "real/train/0.npy": npy(DDPM_MASK),
        "real/train/1.png": png(picture(2, 8, 8)),
        "real/train/2.npy": npy(DDPM_MASK),
        "real/test/0.png": png(picture(3, 8, 8)),
        "real/test/0.npy": npy(DDPM_MASK),
        "ddpm/0.npy": npy(DDPM_MASK),
    }


PARTS_MASK = np.repeat(np.arange(4, dtype=np.uint8) * 6, 6).reshape(1, 4, 6)  # rows of 0, 6, 12, 18; half the image's


def datasetgan() -> Files:
    """Two cars, one without its mask; a mask without an image; photographs paired by order alone."""
    training, testing = "annotation/training_data/car_processed", "annotation/testing_data/car_20_class"
    return {
        f"{training}/image_0.jpg": jpeg(1),
        f"{training}/image_mask0.npy": npy(PARTS_MASK),
        f"{training}/image_1.jpg": jpeg(2),
        f"{training}/image_mask12.npy": npy(PARTS_MASK),
        f"{testing}/b.jpg": jpeg(3),
        f"{testing}/c.jpg": jpeg(4),
        f"{testing}/a.npy": npy(PARTS_MASK[0]),
        f"{testing}/z.npy": npy(PARTS_MASK[0, ::-1]),
        "training_latent/car_20/latent_stylegan1.npy": npy(np.zeros((16, 512), np.float32)),
    }


# --- objects and segments --------------------------------------------------------------------------------------------


def rgba(
    own: int, thing: int, truncated: int = 0, occluded: int = 0, crowd: int = 0, ignored: int = 0
) -> Sequence[int]:
    """A colour of BDD100K's bitmasks."""
    return own, (truncated << 3) + (occluded << 2) + (crowd << 1) + ignored, thing >> 8, thing & 255


BDD_BLANK = rgba(0, 1, crowd=1, ignored=1)  # what the set's own tools fill an empty bitmask with
BDD_OBJECTS = painted(
    (UP, LEFT, rgba(3, 258)),  # whoever takes (B << 2) + A for the object makes one of these two
    (UP, RIGHT, rgba(3, 6)),
    (DOWN, LEFT, rgba(8, 3, truncated=1, crowd=1)),
    (DOWN, RIGHT, rgba(1, 0, occluded=1, ignored=1)),
    (slice(3, 5), LEFT, rgba(2, 4, truncated=1, occluded=1)),
    value=BDD_BLANK,
    channels=4,
)
BDD_SEGMENTS = painted(
    (UP, LEFT, rgba(35, 31)),
    (UP, RIGHT, rgba(35, 287)),
    (DOWN, LEFT, rgba(31, 33, crowd=1)),
    (DOWN, RIGHT, rgba(7, 7, occluded=1)),
    (slice(3, 5), LEFT, rgba(7, 7)),
    value=rgba(0, 0),
    channels=4,
)


def bdd100k_ins() -> Files:
    return pairs("images/10k/train", "labels/ins_seg/bitmasks/train/*.png", png(BDD_OBJECTS))


def bdd100k_pan() -> Files:
    return pairs("images/10k/val", "labels/pan_seg/bitmasks/val/*.png", png(BDD_SEGMENTS))


def scalabel_label(category: str, shape: Any, key: str = "poly2d", **attributes: bool) -> dict[str, Any]:
    return {"id": category, "category": category, "attributes": attributes, key: shape, "box2d": None}


def square(left: float, top: float, right: float, bottom: float) -> list[dict[str, Any]]:
    vertices = [[left, top], [right, top], [right, bottom], [left, bottom]]
    return [{"vertices": vertices, "types": "LLLL", "closed": True}]


def bdd100k_json(labels: Sequence[Mapping[str, Any]] | None, folder: str = "polygons", wrapped: bool = False) -> Files:
    """The JSON of one kind, with a frame without objects and one without an image, in either of the two forms."""
    frames = [
        {"name": "a.jpg", "labels": labels},
        {"name": "b.jpg", "labels": None},
        {"name": "gone.jpg", "labels": []},
    ]
    document = json.dumps({"frames": frames, "config": {}} if wrapped else frames).encode()
    images = {f"images/10k/train/{name}.jpg": jpeg(idx) for idx, name in enumerate(("a", "b", "lonely"))}
    return {**images, f"labels/ins_seg/{folder}/ins_seg_train.json": document}


COCO_CATEGORIES = ({"id": 90, "name": "toothbrush"}, {"id": 1, "name": "person"}, {"id": 13, "name": "stop sign"})
PANOPTIC_CATEGORIES = (
    {"id": 200, "name": "rug-merged", "isthing": 0},
    {"id": 1, "name": "person", "isthing": 1},
    {"id": 90, "name": "toothbrush", "isthing": 1},
)


def coco() -> Files:
    """Two polygons of one object, a crowd in run lengths, an image without objects, and one that is not listed."""
    crowd = {"counts": [8, 3, 5, 3, 77], "size": [HEIGHT, WIDTH]}
    rest = {"image_id": 139, "iscrowd": 0}
    annotations = [
        {**rest, "id": 7, "category_id": 90, "bbox": [1.0, 1.5, 9.0, 5.5], "area": 20.25,
         "segmentation": [[1, 1.5, 5, 1.5, 5, 4, 1, 4], [7, 4, 10, 4, 10, 7]]},
        {**rest, "id": 8, "category_id": 1, "iscrowd": 1, "bbox": [1, 0, 2, 3], "area": 6, "segmentation": crowd},
    ]  # fmt: skip
    images = [{"id": number, "file_name": f"{number:012d}.jpg", "height": 8, "width": 12} for number in (139, 285)]
    document = {"info": {}, "licenses": [], "images": images, "annotations": annotations, "categories": COCO_CATEGORIES}
    pictures = {f"val2017/{number:012d}.jpg": jpeg(number) for number in (139, 285, 632)}
    return {**pictures, "annotations/instances_val2017.json": json.dumps(document).encode()}


PANOPTIC_IDS = painted((UP, LEFT, 70000), (DOWN, RIGHT, 257), (DOWN, LEFT, 2), value=0, dtype=np.int64)


def coco_panoptic() -> Files:
    """A stuff segment of 257, a person of 70000, a crowd 2, nothing elsewhere, and a segment that no pixel shows."""
    segments = [
        {"id": 70000, "category_id": 1, "area": 12, "bbox": [0, 0, 4, 3], "iscrowd": 0},
        {"id": 257, "category_id": 200, "area": 12, "bbox": [8, 5, 4, 3], "iscrowd": 0},
        {"id": 2, "category_id": 1, "area": 12, "bbox": [0, 5, 4, 3], "iscrowd": 1},
        {"id": 5, "category_id": 90, "area": 0, "bbox": [0, 0, 0, 0], "iscrowd": 0},
    ]
    rgb = np.stack([PANOPTIC_IDS % 256, PANOPTIC_IDS // 256 % 256, PANOPTIC_IDS // 65536], axis=-1).astype(np.uint8)
    annotations = [
        {"image_id": 139, "file_name": "000000000139.png", "segments_info": segments},
        {"image_id": 285, "file_name": "000000000285.png", "segments_info": []},
    ]
    images = [{"id": number, "file_name": f"{number:012d}.jpg", "height": 8, "width": 12} for number in (139, 285)]
    document = {"images": images, "annotations": annotations, "categories": PANOPTIC_CATEGORIES}
    return {
        "annotations/panoptic_val2017.json": json.dumps(document).encode(),
        "annotations/panoptic_val2017/000000000139.png": png(rgb),
        "val2017/000000000139.jpg": jpeg(1),
        "val2017/000000000285.jpg": jpeg(2),
        "val2017/000000000632.jpg": jpeg(3),
    }


TREES: dict[str, tuple[Callable[[], Files], str, str]] = {
    "imagenet": (imagenet, "imagenet", "train"),
    "ade20k": (ade20k, "ADEChallengeData2016", "training"),
    "coco": (coco, "coco", "val2017"),
    "coco-panoptic": (coco_panoptic, "coco", "val2017"),
    "bdd100k-ins": (bdd100k_ins, "bdd100k", "train"),
    "bdd100k-sem": (bdd100k_sem, "bdd100k", "train"),
    "bdd100k-pan": (bdd100k_pan, "bdd100k", "val"),
    "cityscapes": (cityscapes, "cityscapes", "val"),
    "cityscapes-ins": (cityscapes, "cityscapes", "val"),
    "cityscapes-pan": (cityscapes, "cityscapes", "val"),
    "voc": (voc, "VOC2012", "train"),
    "voc-ins": (voc, "VOC2012", "train"),
    "ddpm-seg": (ddpm_seg, "bedroom_28", "train"),
    "datasetgan": (datasetgan, "dataset_release", "car-train"),
}
"""Layout to the maker of a tree, the name of its root, and a split that it has."""
