"""Class tables are those of the libraries that read the same sets."""

from __future__ import annotations

import pytest

from dtpipe.extract.sources.layouts.published.tables import imagenet_names, published_classes


@pytest.mark.parametrize(
    ("name", "num", "last"),
    [
        ("ade20k", 150, (149, "flag", 150)),
        ("bdd100k-ins", 8, (7, "bicycle", 8)),
        ("bdd100k-sem", 19, (18, "bicycle", 18)),
        ("bdd100k-pan", 40, (39, "truck", 40)),
        ("voc", 21, (20, "tvmonitor", 20)),
        ("voc-ins", 20, (19, "tvmonitor", 20)),
        ("bedroom_28", 29, (28, "table staff", 28)),
        ("ffhq_34", 34, (33, "head/wrinkles", 33)),
        ("cat_15", 15, (14, "neck", 14)),
        ("horse_21", 21, (20, "leg protection", 20)),
        ("celeba_19", 19, (18, "u_lip", 18)),
        ("ade_bedroom_30", 30, (29, "television", 29)),
    ],
)
def test_tables_have_the_published_numbers(name: str, num: int, last: tuple[int, str, int]) -> None:
    table = published_classes(name)
    number = len(table) - 1
    assert (len(table), (number, table.names[-1], table.numbers.get(number, number))) == (num, last)


def test_cityscapes_classes_are_those_of_torchvision() -> None:
    from torchvision.datasets import Cityscapes

    scored = sorted((label for label in Cityscapes.classes if 0 <= label.train_id < 255), key=lambda own: own.train_id)
    table = published_classes("cityscapes")
    assert table.names == tuple(label.name for label in scored) == published_classes("bdd100k-sem").names
    assert list(table.numbers.values()) == [label.id for label in scored]
    assert table.things == {label.train_id for label in scored if label.has_instances}


def test_voc_classes_are_those_of_torchvision() -> None:
    from torchvision.models._meta import _VOC_CATEGORIES

    assert published_classes("voc").names[1:] == tuple(_VOC_CATEGORIES[1:]) == published_classes("voc-ins").names


def test_bdd100k_things_are_its_last_ten_classes() -> None:
    assert published_classes("bdd100k-pan").things == set(range(30, 40))


def test_imagenet_names_are_those_of_torchvision_but_for_two_pairs_of_one_name() -> None:
    from torchvision.models._meta import _IMAGENET_CATEGORIES

    names = imagenet_names()
    assert list(names) == sorted(names) and len(set(names.values())) == 1000
    different = {own: other for own, other in zip(names.values(), _IMAGENET_CATEGORIES, strict=True) if own != other}
    assert different == {
        "crane (n02012849)": "crane bird",
        "crane (n03126707)": "crane",
        "maillot (n03710637)": "maillot",
        "maillot (n03710721)": "maillot tank suit",
    }
