"""YOLO's labels: a text file beside each image, with a class and a box or a polygon in every line, as shares of sides.

Read as by Ultralytics (docs, "Datasets": detection and segmentation): an image without a file has no objects, repeated
lines count once, the box of a polygon is that of its points.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.base import Layout
from dtpipe.extract.sources.layouts.class_names import names_of, parse_class_names
from dtpipe.extract.sources.layouts.files import Tree, few
from dtpipe.extract.sources.layouts.generic.folders import both_parts
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.objects import read_objects
from dtpipe.extract.sources.names import without_ending
from dtpipe.manifests.documents import Refusal, parse_yaml
from dtpipe.manifests.errors import BadImage, ConfigError, InputError
from dtpipe.manifests.labels import ClassTable, Instances
from dtpipe.manifests.words import count_of

_SETTINGS = ("data.yaml", "data.yml", "dataset.yaml", "dataset.yml")
_NAMES = "classes.txt"
_BOX = 4  # numbers: centre x and y, width, height
_POLYGON = 6  # numbers at least
_OVER = 0.01  # by which a share may leave [0, 1]; what lies outside is cut off
_AT_ONCE = 16  # files of labels that are read at a time
_YAML = Refusal(InputError, "write a YAML file with the names of the classes by number")


def open_yolo(root: str, split: str | None = None) -> ListedSource:
    """`images/SPLIT` and `labels/SPLIT`, or `SPLIT/images` and `SPLIT/labels`, with the class names of `data.yaml`.

    All labels are read at once. Raises: InputError naming the file and line that is wrong.
    """
    tree = Tree(root)
    table = _class_names(tree)
    images, labels = _folders(tree, split)
    items = sorted(tree.images(images).items())
    if not items:
        raise InputError(f"{tree.root}: no image in {images}; check root and split")
    files = {name[len(labels) + 1 :]: uri for name, uri in tree.files(labels).items() if name.endswith(".txt")}
    texts = [f"{without_ending(item.key)}.txt" for _, item in items]
    _refuse_twins([item for _, item in items], texts, f"{tree.root}/{labels}")
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        read = pool.map(lambda text: _read(tree, files.get(text), f"{tree.root}/{labels}/{text}", table), texts)
        rows = list(read)
    has_masks = _has_masks(rows, [f"{labels}/{text}" for text in texts], tree.root)
    notes = _notes(rows, texts, files, labels)
    targets = YoloTargets(tuple(row.lines for row in rows), tuple(texts), f"{tree.root}/{labels}", has_masks)
    return ListedSource(Instances, table, [item for _, item in items], tree, targets, notes)


@dataclass(frozen=True)
class _Labels:
    """What one file says."""

    lines: tuple[tuple[int, tuple[float, ...]], ...] = ()
    """Class number, and a box or a polygon in shares of the sides."""
    there: bool = True
    repeated: int = 0
    flat: int = 0
    """Boxes without an area."""


@dataclass(frozen=True, eq=False)
class YoloTargets:
    """The objects of each row."""

    lines: Sequence[Sequence[tuple[int, tuple[float, ...]]]]
    files: Sequence[str]
    where: str
    has_masks: bool

    def __call__(self, row: int, image_px: tuple[int, int]) -> Instances:
        """Raises: InputError for a polygon that cannot be rasterised."""
        stated = [_stated(number, shares, image_px) for number, shares in self.lines[row]]
        return read_objects(stated, image_px, self.has_masks, f"{self.where}/{self.files[row]}")


def _stated(
    number: int, shares: Sequence[float], image_px: tuple[int, int]
) -> tuple[int, list[float] | None, float | None, bool, Any]:
    """An object in px, as `StatedObjects` holds it."""
    height, width = image_px
    if len(shares) == _BOX:
        x, y, w, h = shares[0] * width, shares[1] * height, shares[2] * width, shares[3] * height
        return number, [x - w / 2, y - h / 2, w, h], None, False, None
    xs, ys = [share * width for share in shares[::2]], [share * height for share in shares[1::2]]
    box = [min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)]
    return number, box, None, False, [[side for point in zip(xs, ys, strict=True) for side in point]]


# --- folders ---------------------------------------------------------------------------------------------------------


def _folders(tree: Tree, split: str | None) -> tuple[str, str]:
    """Where images and labels lie. Raises: InputError, ConfigError."""
    if split is None:
        if parts := both_parts(tree.names("images")) or both_parts(tree.names()):
            raise ConfigError(
                f"yolo:{tree.root}: is divided into {' and '.join(parts)}; write yolo:{tree.root}@{parts[0]}"
            )
        return "images", "labels"
    if not tree.has(f"images/{split}") and tree.has(f"{split}/images"):
        return f"{split}/images", f"{split}/labels"
    return f"images/{split}", f"labels/{split}"


def _class_names(tree: Tree) -> ClassTable:
    settings = next((name for name in _SETTINGS if tree.has(name)), None)
    if settings is None:
        if tree.has(_NAMES):
            return parse_class_names(tree.read_named(_NAMES), f"{tree.root}/{_NAMES}")
        tree.refuse_missing(_SETTINGS[0])
    where = f"{tree.root}/{settings}"
    document = parse_yaml(tree.read_named(settings).decode("utf-8", "replace"), where, _YAML)
    if not isinstance(document, dict) or not document.get("names"):
        raise InputError(f"{where}: has no `names`; write the names of the classes by number")
    if document.get("kpt_shape"):
        raise InputError(f"{where}: has kpt_shape: these are labels of keypoints; give those of boxes or polygons")
    table = names_of(document["names"], where)
    if document.get("nc", len(table)) != len(table):
        raise InputError(f"{where}: says nc: {document['nc']} and names {len(table)} classes; mend one of them")
    return table


def _refuse_twins(items: Sequence[SourceItem], texts: Sequence[str], where: str) -> None:
    seen: dict[str, str] = {}
    for item, text in zip(items, texts, strict=True):
        if text in seen:
            raise InputError(f"{where}: {seen[text]} and {item.key} have one file of labels, {text}; leave one of them")
        seen[text] = item.key


# --- files of labels -------------------------------------------------------------------------------------------------


def _read(tree: Tree, uri: str | None, where: str, table: ClassTable) -> _Labels:
    if uri is None:
        return _Labels(there=False)
    try:
        text = tree.read(uri).decode("utf-8-sig")
    except (BadImage, UnicodeDecodeError) as err:
        raise InputError(f"{where}: cannot be read ({err}); write it again") from err
    lines: dict[tuple[int, tuple[float, ...]], None] = {}
    num = flat = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip():
            continue
        num += 1
        read = _parse(line, f"{where}: line {number}", table)
        flat += _is_flat(read[1])
        lines[read] = None
    kept = tuple(line for line in lines if not _is_flat(line[1]))
    return _Labels(kept, repeated=num - len(lines), flat=flat)


def _parse(line: str, where: str, table: ClassTable) -> tuple[int, tuple[float, ...]]:
    """Raises: InputError."""
    first, *rest = line.split()
    try:
        number, shares = float(first), tuple(map(float, rest))
    except ValueError as err:
        raise InputError(f"{where} is no class and shares of the sides ({err}); write numbers") from err
    if not number.is_integer() or not 0 <= number < len(table):
        raise InputError(
            f"{where} is of class {first}, and the classes are 0 to {len(table) - 1} ({few(table.names)}); name it, or "
            "mend the line"
        )
    if len(shares) != _BOX and (len(shares) < _POLYGON or len(shares) % 2):
        raise InputError(
            f"{where} has {len(shares)} numbers behind the class; a box has 4, a polygon 6 or more, in pairs"
        )
    if not all(math.isfinite(share) and -_OVER <= share <= 1 + _OVER for share in shares):
        odd = next(share for share in shares if not -_OVER <= share <= 1 + _OVER)
        raise InputError(f"{where} holds {odd:g}; positions are shares of the image's sides, from 0 to 1")
    return int(number), shares


def _is_flat(shares: Sequence[float]) -> bool:
    return len(shares) == _BOX and min(shares[2:]) <= 0


def _has_masks(rows: Sequence[_Labels], files: Sequence[str], root: str) -> bool:
    kinds: dict[bool, str] = {}
    for row, file in zip(rows, files, strict=True):
        for _, shares in row.lines:
            kinds.setdefault(len(shares) > _BOX, file)
    if len(kinds) > 1:
        raise InputError(
            f"{root}: {kinds[True]} has polygons and {kinds[False]} boxes; give one of them for all objects"
        )
    return kinds.get(True) is not None


def _notes(rows: Sequence[_Labels], texts: Sequence[str], files: Mapping[str, str], labels: str) -> list[str]:
    notes = []
    if spare := sorted(files.keys() - set(texts) - {_NAMES}):
        notes.append(f"left out {count_of(len(spare), 'file')} of {labels} without an image: {few(spare)}")
    if empty := [text for row, text in zip(rows, texts, strict=True) if not row.there]:
        num = count_of(len(empty), "image")
        notes.append(
            f"{num} without a file in {labels} {'has' if len(empty) == 1 else 'have'} no objects: {few(empty)}"
        )
    for count, what in (("repeated", "that repeat others"), ("flat", "whose box has no area")):
        if odd := [text for row, text in zip(rows, texts, strict=True) if getattr(row, count)]:
            total = sum(getattr(row, count) for row in rows)
            notes.append(f"left out {count_of(total, 'line')} of {labels} {what}, in {few(odd)}")
    return notes


LAYOUT = Layout(
    "yolo",
    "yolo:ROOT@SPLIT: ROOT/images/SPLIT, boxes or polygons in ROOT/labels/SPLIT, names in ROOT/data.yaml.",
    Instances,
    open_yolo,
)
