"""ImageNet (ILSVRC 2012): class folders named by WordNet id, and validation images also in one folder.

    ROOT/train/n01440764/n01440764_10026.JPEG
         val/n01440764/ILSVRC2012_val_00000293.JPEG     or val/ILSVRC2012_val_00000293.JPEG and one of
         LOC_val_solution.csv                           Kaggle: ILSVRC2012_val_00000293,n01440764 111 108 427 331
         ILSVRC2012_validation_ground_truth.txt         devkit: a number a line, by image; which class it is
         meta.mat                                       says this file of the devkit, or map_clsloc.txt

ROOT may be the folder of Kaggle's archive: images lie in ILSVRC/Data/CLS-LOC/SPLIT there. Numbers of classes are
places among the sorted WordNet ids, as torchvision's; the devkit's own numbers are in another order.
"""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.files import Tree
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.published.pairs import check_split, left_over
from dtpipe.extract.sources.layouts.published.tables import imagenet_names
from dtpipe.extract.sources.names import in_class_folders
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import Class, ClassTable
from dtpipe.manifests.words import count_of

_NAME, _SPLITS = "imagenet", ("train", "val")
_KAGGLE = "ILSVRC/Data/CLS-LOC"
_SOLUTION, _TRUTH = "LOC_val_solution.csv", "ILSVRC2012_validation_ground_truth.txt"
_ORDERS = ("meta.mat", "map_clsloc.txt")
_MOST_DIGITS = 9
_WNID = re.compile(r"n\d{8}")
_FOLDERS = ("", "devkit/data/", "ILSVRC2012_devkit_t12/data/", "data/")


def _open(root: str, split: str | None) -> LabelledSource:
    split = check_split(_NAME, root, split, _SPLITS)
    tree = Tree(root)
    folder = f"{_KAGGLE}/{split}" if tree.has(f"{_KAGGLE}/{split}") else split
    items = [item for _, item in sorted(tree.images(folder).items())]
    if not items:
        raise InputError(f"{tree.root}: {folder} holds no image; check the root")
    if in_class_folders([item.key for item in items]):
        wnids: Mapping[str, str] = {item.key: item.key.partition("/")[0] for item in items}
        notes: tuple[str, ...] = ()
    elif split == "val":
        wnids, notes = _listed(tree, folder, [item.key for item in items])
    else:
        outside = next(item.key for item in items if "/" not in item.key)
        raise InputError(f"{tree.root}: {outside} of {folder} lies in no class folder; move it into one, or away")
    table, numbers = _classes(tree, folder, wnids)
    rows = [replace(item, label=table.names[numbers[wnids[item.key]]]) for item in items if item.key in wnids]
    targets = _Labels([numbers[wnids[item.key]] for item in rows])
    return ListedSource(Class, table, rows, tree, targets, notes)


@dataclass(frozen=True, eq=False)
class _Labels:
    """Class numbers, by row."""

    numbers: Sequence[int]

    def __call__(self, row: int, image_px: tuple[int, int]) -> Class:  # noqa: ARG002  of any size
        return Class(self.numbers[row])


def _classes(tree: Tree, folder: str, wnids: Mapping[str, str]) -> tuple[ClassTable, Mapping[str, int]]:
    """The table and the number of each WordNet id, both parts' alike: of the training folders where they are there.

    Raises: InputError for folders that are not named by WordNet ids, or a class that no training folder has.
    """
    seen = set(wnids.values())
    known = set(tree.names(folder.removesuffix("val") + "train")) if folder.endswith("val") else set()
    known = {name for name in known if _WNID.fullmatch(name)} or seen
    if odd := sorted(name for name in seen if not _WNID.fullmatch(name)):
        raise InputError(
            f"{tree.root}: {folder} has {count_of(len(odd), 'class', 'classes')} of other names than WordNet ids "
            f"(n01440764), {odd[0]!r} for one; is it another data set with class folders?"
        )
    if unknown := sorted(seen - known):
        raise InputError(f"{tree.root}: class {unknown[0]} of {folder} is in no folder of train; fetch train again")
    numbers = {wnid: number for number, wnid in enumerate(sorted(known))}
    return ClassTable(tuple(imagenet_names().get(wnid, wnid) for wnid in numbers)), numbers


# --- validation images in one folder ---------------------------------------------------------------------------------


def _listed(tree: Tree, folder: str, keys: Sequence[str]) -> tuple[Mapping[str, str], tuple[str, ...]]:
    """WordNet id of each image that a list names, by key; and what is left over. Raises: InputError without a list."""
    solution = _find(tree, (_SOLUTION,))
    truth = _find(tree, (_TRUTH,))
    if solution is not None:
        by_name = _read_solution(tree, solution)
        used = solution
    elif truth is not None:
        by_name = _read_truth(tree, truth)
        used = truth
    else:
        raise InputError(
            f"{tree.root}: {folder} holds images in no class folder, and neither {_SOLUTION} (Kaggle) nor {_TRUTH} "
            f"with {' or '.join(_ORDERS)} (devkit) says their classes; they were looked for in the root and in "
            f"{', '.join(place.rstrip('/') for place in _FOLDERS if place)}"
        )
    wnids = {key: by_name[name] for key in keys if (name := _name(key)) in by_name}
    if not wnids:
        raise InputError(f"{tree.root}: {used} names none of the images of {folder}, {keys[0]} for one")
    return wnids, left_over([key for key in keys if key not in wnids], folder, [], used)


def _name(key: str) -> str:
    return key.rpartition("/")[2].rpartition(".")[0]


def _find(tree: Tree, names: Sequence[str]) -> str | None:
    return next((f"{place}{name}" for place in _FOLDERS for name in names if tree.has(f"{place}{name}")), None)


def _lines(tree: Tree, name: str) -> Sequence[str]:
    return [line.strip() for line in tree.read_named(name).decode("utf-8", "replace").splitlines() if line.strip()]


def _read_solution(tree: Tree, name: str) -> Mapping[str, str]:
    """Image to WordNet id, which stands first in the answer. Raises: InputError for a line of another form."""
    by_name: dict[str, str] = {}
    for line in _lines(tree, name)[1:]:
        image, _, answer = line.partition(",")
        wnid = answer.partition(" ")[0]
        if not _WNID.fullmatch(wnid) or image in by_name:
            raise InputError(
                f"{tree.root}: {name} has the line {line[:60]!r}, and each is to name one image and its id"
            )
        by_name[image] = wnid
    return by_name


def _read_truth(tree: Tree, name: str) -> Mapping[str, str]:
    """Image to WordNet id by the devkit's numbers. Raises: InputError without their order, or for other numbers."""
    order_name = _find(tree, _ORDERS)
    if order_name is None:
        raise InputError(
            f"{tree.root}: {name} numbers the classes in the devkit's own order, which is not that of the sorted ids; "
            f"put {' or '.join(_ORDERS)} of the devkit beside it"
        )
    order = _read_order(tree, order_name)
    by_name = {}
    for idx, line in enumerate(_lines(tree, name), start=1):
        own = _number(line)
        if own is None or own not in order:
            raise InputError(f"{tree.root}: {name} has {line[:20]!r} in line {idx}, which {order_name} does not number")
        by_name[f"ILSVRC2012_val_{idx:08d}"] = order[own]
    return by_name


def _read_order(tree: Tree, name: str) -> Mapping[int, str]:
    """The devkit's number of a class to its WordNet id. Raises: InputError."""
    if name.endswith(".txt"):
        rows = [line.split() for line in _lines(tree, name)]
        pairs: Sequence[tuple[object, str]] = [(row[1], row[0]) for row in rows if len(row) > 1]
    else:
        pairs = _read_mat(tree.read_named(name), f"{tree.root}: {name}")
    numbered = ((_number(str(own)), wnid) for own, wnid in pairs if _WNID.fullmatch(wnid))
    order = {own: wnid for own, wnid in numbered if own is not None}
    if not pairs or len(order) < len(pairs):
        raise InputError(f"{tree.root}: {name} is not the devkit's list of numbers and WordNet ids; fetch it again")
    return order


def _number(text: str) -> int | None:
    """None where it is no number of a class, whose digits are few."""
    return int(text) if text.isdecimal() and len(text) <= _MOST_DIGITS else None


def _read_mat(data: bytes, where: str) -> Sequence[tuple[object, str]]:
    from scipy.io import loadmat

    try:
        synsets = loadmat(io.BytesIO(data), squeeze_me=True)["synsets"]
        return [(int(row["ILSVRC2012_ID"]), str(row["WNID"])) for row in synsets]
    except Exception as err:  # readers raise what they like
        raise InputError(f"{where} is not the devkit's meta.mat ({type(err).__name__}); fetch it again") from err


LAYOUT = Layout(
    name=_NAME,
    reads="ImageNet: SPLIT/WNID/*.JPEG; val also in one folder with its list (Kaggle's, or the devkit's two files).",
    kind=Class,
    open=_open,
    splits=_SPLITS,
)
