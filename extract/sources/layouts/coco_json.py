"""Objects from a file in COCO's JSON format: polygons, run-length masks, crowds, categories with gaps in their ids.

The file is read once, entry by entry; of each image its objects are kept as packed text, and become arrays when its
target is asked for.
Masks are rasterised by faster-coco-eval, whose functions are pycocotools'. Format: cocodataset.org, "Data format".
"""

from __future__ import annotations

import json
import zlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.files import Tree, few
from dtpipe.extract.sources.layouts.json_stream import read_entries
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.named import match_names
from dtpipe.extract.sources.layouts.objects import other_size, read_objects
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import ClassTable, Instances
from dtpipe.manifests.words import count_of

_PARTS = ("images", "annotations", "categories")
_UNLISTED = "of images that the file does not list"
_LEVEL = 1  # of zlib: half the room, at little cost
_POINTS = 3  # that a polygon has at least
_MOST_PX = 2**53  # of a box or an area, so that sums and products of sides are numbers too


@dataclass(frozen=True)
class CocoImage:
    """One image that a file lists."""

    file_name: str
    size_px: tuple[int, int] | None
    """Height and width, where the file says them."""
    objects: bytes
    """`StatedObjects` as JSON, by zlib."""


@dataclass(frozen=True, eq=False)
class CocoFile:
    """What a file says, with classes numbered from 0 in the order of their ids."""

    where: str
    images: Mapping[str, CocoImage]
    """By file name."""
    classes: ClassTable
    has_masks: bool
    """False where objects have boxes alone."""
    notes: tuple[str, ...]


def parse_coco(data: bytes, where: str) -> CocoFile:
    """Read a file's bytes and check what can be checked without its images.

    Raises: InputError naming an entry that is repeated, unknown, or without what it needs.
    """
    read = _Entries(where)
    _read_entries(data, read)
    table, numbers = number_categories(read.categories, where)
    for category, name in read.category_uses.items():
        if category not in numbers:
            raise InputError(
                f"{name} is of category {category!r}, which the file does not list; list it, or mend the id"
            )
    has_masks = read.has_masks()
    by_name: dict[str, CocoImage] = {}
    for image_id, image in read.images.items():
        file_name = str(field_of(image, "file_name", f"{where}: image {image_id!r}"))
        if file_name in by_name:
            raise InputError(f"{where}: the image {file_name} is listed twice; join its entries and their annotations")
        own = read.objects.pop(image_id, [])
        stated = b",".join(b"[%d,%s" % (numbers[category], rest) for category, rest in own)
        size_px = _size(image, f"{where}: image {file_name}")
        by_name[file_name] = CocoImage(file_name, size_px, zlib.compress(b"[%s]" % stated, _LEVEL))
    for image_id, own in read.objects.items():
        read.leave_out(_UNLISTED, f"image_id {image_id!r}", len(own))
    return CocoFile(where, by_name, table, has_masks, _sentences(read.left_out, where))


def open_coco(tree: Tree, images: Mapping[str, SourceItem], file: CocoFile) -> ListedSource:
    """The images of a tree that a file lists, with their objects.

    `images` are those of the tree that may be meant, by name. A file names an image by its path there, or by the end
    of it where no other image ends so. Raises: InputError when none is there, or one name may mean several.
    """
    places = match_names(file.images, images, file.where)
    missing = sorted(file.images.keys() - places.keys())
    if not places:
        raise InputError(
            f"{tree.root}: none of the {count_of(len(file.images), 'image')} that {file.where} lists is there, "
            f"{few(missing[:1])} for one, but {few(sorted(images)) or 'no image at all'}; check the root"
        )
    notes = list(file.notes)
    if missing:
        num = count_of(len(missing), "image")
        notes.append(f"left out {num} that {file.where} lists and {tree.root} does not hold: {few(missing)}")
    if unlisted := sorted(images.keys() - set(places.values())):
        notes.append(f"left out {count_of(len(unlisted), 'image')} that {file.where} does not list: {few(unlisted)}")
    rows = sorted(((images[place], file.images[name]) for name, place in places.items()), key=lambda row: row[0].key)
    targets = CocoTargets(file.where, tuple(image for _, image in rows), file.has_masks)
    return ListedSource(Instances, file.classes, [item for item, _ in rows], tree, targets, tuple(notes))


@dataclass(frozen=True, eq=False)
class CocoTargets:
    """Reads the objects of an image that a file lists, by row."""

    where: str
    images: Sequence[CocoImage]
    has_masks: bool

    def __call__(self, row: int, image_px: tuple[int, int]) -> Instances:
        """Raises: InputError naming the image whose objects are for another size or cannot be read."""
        image = self.images[row]
        where = f"{self.where}: image {image.file_name}"
        if image.size_px not in (None, image_px):
            raise other_size(where, image.size_px, image_px)
        return read_objects(json.loads(zlib.decompress(image.objects)), image_px, self.has_masks, where)


# --- the file --------------------------------------------------------------------------------------------------------


_IMAGE_FIELDS = ("id", "file_name", "height", "width")


class _Entries:
    """What is kept of the file's entries, which may stand in any order."""

    def __init__(self, where: str) -> None:
        self.where = where
        self.categories: list[Mapping[str, Any]] = []
        self.images: dict[Any, Mapping[str, Any]] = {}
        self.objects: dict[Any, list[tuple[int, bytes]]] = {}
        """Category, and all of a stated object behind its class number as JSON, by image."""
        self.category_uses: dict[int, str] = {}
        """The first annotation of each category."""
        self.left_out: dict[str, tuple[int, str]] = {}
        """How many, and the first, by why."""
        self._ids: set[Any] = set()
        self._masked: Any = None
        self._unmasked: list[Any] = []

    def take(self, part: str, entry: Mapping[str, Any]) -> None:
        """Raises: InputError naming an entry that is repeated or without what it needs."""
        if part == "categories":
            self.categories.append(entry)
        elif part == "images":
            _add(self.images, {name: entry[name] for name in _IMAGE_FIELDS if name in entry}, part, self.where)
        else:
            self._annotation(entry)

    def _annotation(self, entry: Mapping[str, Any]) -> None:
        name = _name(entry, self._ids, self.where)
        image_id = field_of(entry, "image_id", name)
        if not isinstance(image_id, int | str):
            raise InputError(f"{name} has image_id {image_id!r}, which is neither number nor text; mend it")
        if self.images and image_id not in self.images:
            self.leave_out(_UNLISTED, f"image_id {image_id!r}")
        elif (read := _read_object(entry, name)) is None:
            self.leave_out("whose box has no area", name.removeprefix(f"{self.where}: "))
        else:
            category, *rest = read
            self.category_uses.setdefault(category, name)
            stated = json.dumps(rest, separators=(",", ":"))[1:].encode()
            self.objects.setdefault(image_id, []).append((category, stated))
            if rest[-1] is not None:
                self._masked = True
            elif not self._unmasked:
                self._unmasked.append(image_id)

    def leave_out(self, why: str, which: str, num: int = 1) -> None:
        before, first = self.left_out.get(why, (0, which))
        self.left_out[why] = before + num, first

    def has_masks(self) -> bool:
        """Raises: InputError where some objects have masks and others none."""
        if self._masked and self._unmasked:
            raise InputError(
                f"{self.where}: image_id {self._unmasked[0]!r} has an object with a box and no segmentation, and "
                "others have one; segment it, or leave all segmentations out to learn boxes alone"
            )
        return bool(self._masked)


def _read_entries(data: bytes, read: _Entries) -> None:
    """Raises: InputError for what is no file of annotations; as `_Entries.take`."""
    odd: set[str] = set()

    def take(part: str, entry: Any) -> None:
        if isinstance(entry, dict):
            read.take(part, entry)
        else:
            odd.add(part)

    where = read.where
    try:
        names = read_entries(data, _PARTS, take)
    except TypeError as err:
        raise InputError(f"{where}: holds a list, as files of results do; give the file of annotations") from err
    except (ValueError, RecursionError) as err:
        raise InputError(f"{where}: is no JSON ({err}); give the file of annotations in COCO's format") from err
    for part in _PARTS:
        if not names.get(part) or part in odd:
            raise InputError(
                f"{where}: has no list of {part}, but {few(sorted(names)) or 'nothing'}; "
                "give the file of annotations of objects in COCO's format"
            )
    if not read.images:
        raise InputError(f"{where}: lists no image; give the file of annotations of another split")


def number_categories(categories: Sequence[Mapping[str, Any]], where: str) -> tuple[ClassTable, Mapping[int, int]]:
    """The table, and the class number of each id.

    Raises: InputError naming a category that is repeated or without what it needs.
    """
    by_id: dict[Any, Mapping[str, Any]] = {}
    for category in categories:
        _add(by_id, category, "categories", where)
    if odd := [own for own in by_id if not isinstance(own, int)]:
        raise InputError(f"{where}: category id {odd[0]!r} is no whole number; number the categories")
    ids = sorted(by_id)
    names = [str(field_of(by_id[own], "name", f"{where}: category {own}")) for own in ids]
    if twice := [name for name, num in Counter(names).items() if num > 1]:
        raise InputError(f"{where}: {few(twice)} is the name of two categories; give each its own")
    return ClassTable(tuple(names), numbers=dict(enumerate(ids))), {own: number for number, own in enumerate(ids)}


def _add(by_id: dict[Any, Mapping[str, Any]], entry: Mapping[str, Any], part: str, where: str) -> None:
    own = field_of(entry, "id", f"{where}: an entry of {part}")
    if not isinstance(own, int | str):
        raise InputError(f"{where}: an entry of {part} has the id {own!r}, which is neither number nor text; mend it")
    if own in by_id:
        raise InputError(f"{where}: id {own!r} occurs twice among {part}; number them anew, each once")
    by_id[own] = entry


def field_of(entry: Mapping[str, Any], name: str, where: str) -> Any:
    """Raises: InputError where it is not there."""
    if entry.get(name) is None:
        raise InputError(f"{where} has no {name}; write it, or leave the entry out")
    return entry[name]


def _size(image: Mapping[str, Any], where: str) -> tuple[int, int] | None:
    size = image.get("height"), image.get("width")
    if size == (None, None):
        return None
    if not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f"{where} has height and width {size}; write whole numbers of px, or neither")
    return size  # type: ignore[return-value]


def _sentences(left_out: Mapping[str, tuple[int, str]], where: str) -> tuple[str, ...]:
    return tuple(
        f"{where}: left out {count_of(num, 'annotation')} {why}, {first} for one"
        for why, (num, first) in left_out.items()
    )


# --- its annotations -------------------------------------------------------------------------------------------------


def _name(annotation: Mapping[str, Any], ids: set[Any], where: str) -> str:
    """What to call an annotation; its id must be its own."""
    own = annotation.get("id")
    name = f"{where}: annotation {own!r}" if own is not None else f"{where}: an annotation without an id"
    if isinstance(own, int | str) and own in ids:
        raise InputError(f"{name} occurs twice; number the annotations anew, each once")
    if isinstance(own, int | str):
        ids.add(own)
    return name


def _read_object(
    annotation: Mapping[str, Any], name: str
) -> tuple[int, list[float] | None, float | None, bool, Any] | None:
    """One of `StatedObjects`, with its category in place of the class number; None where its box has no area.

    Raises: InputError naming what is wrong.
    """
    if "segments_info" in annotation:
        raise InputError(f"{name} has segments_info: these are panoptic labels; give the file of instances")
    category = field_of(annotation, "category_id", name)
    if not isinstance(category, int):
        raise InputError(f"{name} is of category {category!r}, which the file does not list; list it, or mend the id")
    box, area, segmentation = annotation.get("bbox") or None, annotation.get("area"), _segmentation(annotation, name)
    if box is None and segmentation is None:
        raise InputError(f"{name} has neither bbox nor segmentation; write one, or leave it out")
    is_box = isinstance(box, list) and len(box) == 4 and all(map(_is_number, box))
    if not (box is None or is_box) or not (area is None or _is_number(area)):
        raise InputError(f"{name} has bbox {box} and area {area}; write x, y, width, height and an area in px")
    if box is not None and min(box[2:]) <= 0:
        return None
    return category, box, area, bool(annotation.get("iscrowd")), segmentation


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and abs(value) <= _MOST_PX  # NaN is not


def _segmentation(annotation: Mapping[str, Any], name: str) -> Any:
    """Polygons or run lengths; None where there is none.

    pycocotools takes polygons of two points for boxes and passes over half a point, so both are refused.
    """
    segmentation = annotation.get("segmentation") or None
    if isinstance(segmentation, dict) and {"size", "counts"} <= segmentation.keys():
        return segmentation
    if segmentation is not None and not isinstance(segmentation, list):
        raise InputError(f"{name} has a segmentation that is neither polygons nor run lengths; write one of them")
    for polygon in segmentation or ():
        if not isinstance(polygon, list) or len(polygon) < 2 * _POINTS or len(polygon) % 2:
            num = len(polygon) if isinstance(polygon, list) else "no list of"
            raise InputError(
                f"{name} has a polygon of {num} numbers; write x and y of {_POINTS} points or more, or leave it out"
            )
    return segmentation
