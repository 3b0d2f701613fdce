"""ImageNet in class folders, and its validation images by the lists that are published with them."""

from __future__ import annotations

import gzip
from pathlib import Path

import pytest

from dtpipe.extract.sources.layouts.base import LabelledSource
from dtpipe.extract.sources.layouts.published.tables import imagenet_names
from dtpipe.extract.sources.layouts.registry import open_layout
from dtpipe.manifests.errors import InputError
from dtpipe.manifests.labels import Class
from parts.images import write_files
from parts.packing import write_tar
from parts.published_trees import DEVKIT_TRUTH, WNIDS, devkit_meta, imagenet, imagenet_flat, jpeg, kaggle_solution

FLAT_CLASSES = [2, 0, 0]
TRUTH = "ILSVRC2012_validation_ground_truth.txt"
CLSLOC = f"{WNIDS[1]} 1 crane\n{WNIDS[2]} 2 crane\n{WNIDS[0]} 3 tench\n".encode()


def opened(root: Path, split: str) -> LabelledSource:
    labelled = open_layout(f"imagenet:{root}@{split}")
    assert labelled is not None and labelled.kind is Class
    return labelled


def numbers(labelled: LabelledSource) -> list[int]:
    targets = [labelled.target(row, (8, 12)) for row in range(len(labelled.items))]
    return [target.number for target in targets if isinstance(target, Class)]


def test_folders_are_numbered_as_torchvision_numbers_them(tmp_path: Path) -> None:
    from torchvision.datasets import ImageFolder

    labelled, theirs = opened(write_files(tmp_path, imagenet()), "train"), ImageFolder(str(tmp_path / "train"))
    assert numbers(labelled) == theirs.targets == [0, 1, 2]
    assert [item.key for item in labelled.items] == [Path(path).relative_to(tmp_path / "train").as_posix()
                                                     for path, _ in theirs.samples]  # fmt: skip
    assert labelled.classes.names == ("tench", "crane (n02012849)", "crane (n03126707)")
    assert [item.label for item in labelled.items] == list(labelled.classes.names)


def test_val_has_the_numbers_of_train_where_a_class_is_missing(tmp_path: Path) -> None:
    labelled = opened(write_files(tmp_path, imagenet()), "val")
    assert len(labelled.classes) == 3
    assert {item.key.split("/")[0]: number for item, number in zip(labelled.items, numbers(labelled), strict=True)} == {
        WNIDS[2]: 2,
        WNIDS[0]: 0,
    }


@pytest.mark.parametrize(
    "lists",
    [
        {"LOC_val_solution.csv": kaggle_solution()},
        {"ILSVRC2012_validation_ground_truth.txt": DEVKIT_TRUTH, "meta.mat": devkit_meta()},
        {
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": DEVKIT_TRUTH,
            "ILSVRC2012_devkit_t12/data/meta.mat": devkit_meta(),
        },
        {"devkit/data/ILSVRC2012_validation_ground_truth.txt": DEVKIT_TRUTH, "devkit/data/map_clsloc.txt": CLSLOC},
    ],
)
@pytest.mark.parametrize("with_train", [True, False])
def test_images_in_one_folder_get_their_classes_from_a_list(
    tmp_path: Path, lists: dict[str, bytes], with_train: bool
) -> None:
    train = {name: data for name, data in imagenet().items() if name.startswith("train/n")} if with_train else {}
    labelled = opened(write_files(tmp_path, {**imagenet_flat(), **lists, **train}), "val")
    expected = FLAT_CLASSES if with_train else [1, 0, 0]  # class 1 of train is not in val
    assert numbers(labelled) == expected
    assert labelled.classes.names[-1] == "crane (n03126707)" and labelled.notes() == ()


def test_the_devkit_is_read_as_torchvision_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torchvision.datasets import imagenet as theirs

    files = {"meta.mat": devkit_meta(), TRUTH: DEVKIT_TRUTH}
    inside = {f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in files.items()}
    archive = write_tar(tmp_path / "ILSVRC2012_devkit_t12.tar", inside)
    archive.with_suffix(".tar.gz").write_bytes(gzip.compress(archive.read_bytes()))
    monkeypatch.setattr(theirs, "_verify_archive", lambda *_: None)  # it is not the published one
    theirs.parse_devkit_archive(str(tmp_path))
    _, wnids = theirs.load_meta_file(str(tmp_path))
    root = write_files(tmp_path / "own", {**imagenet_flat(), **files})
    labelled = opened(root, "val")
    assert [labelled.classes.names[number] for number in numbers(labelled)] == [imagenet_names()[own] for own in wnids]


def test_kaggles_folders_are_found(tmp_path: Path) -> None:
    files = {**imagenet(), **imagenet_flat()}
    flat = {name: data for name, data in files.items() if not name.startswith("val/n")}
    deep = {f"ILSVRC/Data/CLS-LOC/{name}": data for name, data in flat.items()}
    root = write_files(tmp_path, {**deep, "LOC_val_solution.csv": kaggle_solution()})
    assert numbers(opened(root, "val")) == FLAT_CLASSES
    assert numbers(opened(root, "train")) == [0, 1, 2]


def test_images_that_the_list_does_not_name_are_counted(tmp_path: Path) -> None:
    more = {"val/ILSVRC2012_val_00000009.JPEG": jpeg(9), "LOC_val_solution.csv": kaggle_solution()}
    labelled = opened(write_files(tmp_path, {**imagenet_flat(), **more}), "val")
    assert len(labelled.items) == 3
    assert labelled.notes() == (
        "left out 1 image of val without a label in LOC_val_solution.csv: ILSVRC2012_val_00000009.JPEG",
    )


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (imagenet_flat(), "val", r"neither LOC_val_solution.csv \(Kaggle\) nor ILSVRC2012_validation_ground_truth.txt "
         r"with meta.mat or map_clsloc.txt \(devkit\).* looked for in the root and in devkit/data, "),
        ({**imagenet_flat(), TRUTH: DEVKIT_TRUTH}, "val", "in the devkit's own order, which is not that of the sorted"),
        ({**imagenet_flat(), TRUTH: b"2\n3\n4\n", "map_clsloc.txt": CLSLOC}, "val", "'4' in line 3, which map_clsloc"),
        ({**imagenet_flat(), TRUTH: b"2\n" + b"3" * 5000, "map_clsloc.txt": CLSLOC}, "val",
         f"'{'3' * 20}' in line 2, which map_clsloc"),
        ({**imagenet_flat(), TRUTH: DEVKIT_TRUTH, "map_clsloc.txt": WNIDS[0].encode() + b" " + b"1" * 5000}, "val",
         "map_clsloc.txt is not the devkit's list of numbers"),
        ({**imagenet_flat(), TRUTH: DEVKIT_TRUTH, "meta.mat": b"no"}, "val", "meta.mat is not the devkit's meta.mat"),
        ({**imagenet_flat(), "LOC_val_solution.csv": b"ImageId,PredictionString\nILSVRC2012_val_00000001,tench"}, "val",
         "has the line 'ILSVRC2012_val_00000001,tench'"),
        ({**imagenet_flat(), "LOC_val_solution.csv": b"ImageId,PredictionString\nx,n01440764 1"}, "val",
         "names none of the images of val"),
        ({f"train/{WNIDS[0]}/a.JPEG": jpeg(1), "train/b.JPEG": jpeg(2)}, "train", "b.JPEG of train lies in no class f"),
        ({"train/cat/a.JPEG": jpeg(1)}, "train", "1 class of other names than WordNet ids .*'cat' for one"),
        ({f"train/{WNIDS[0]}/a.JPEG": jpeg(1), f"val/{WNIDS[1]}/b.JPEG": jpeg(1)}, "val", "is in no folder of train"),
        ({"train/readme.txt": b""}, "train", "train holds no image"),
        ({"training/n01440764/a.JPEG": jpeg(1)}, "train", "there is no train; it holds training"),
    ],
)  # fmt: skip
def test_what_does_not_say_a_class_is_refused(
    tmp_path: Path, files: dict[str, bytes], split: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        opened(write_files(tmp_path, files), split)
