"""The layouts of labelled data there are, and the one that `NAME:ROOT@SPLIT` names."""

from __future__ import annotations

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout
from dtpipe.extract.sources.layouts.generic import coco, csv_table, folders, masks, yolo
from dtpipe.extract.sources.layouts.published import ade20k, bdd100k, cityscapes, datasetgan, ddpm_seg, imagenet, voc
from dtpipe.extract.sources.layouts.published import coco as published_coco
from dtpipe.manifests.labels import IGNORE_VALUE

_DECLARED: tuple[Layout, ...] = (
    folders.LAYOUT,
    csv_table.LAYOUT,
    masks.LAYOUT,
    coco.LAYOUT,
    yolo.LAYOUT,
    imagenet.LAYOUT,
    ade20k.LAYOUT,
    *published_coco.LAYOUTS,
    *bdd100k.LAYOUTS,
    *cityscapes.LAYOUTS,
    *voc.LAYOUTS,
    ddpm_seg.LAYOUT,
    datasetgan.LAYOUT,
)
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _DECLARED}


def parse_layout(place: str) -> tuple[Layout, str, str | None] | None:
    """Layout, root and split of `NAME:ROOT@SPLIT`; None for a path or URL without the name of a layout.

    The split is what follows the last `@`; where a slash comes after it, that is part of a root, unless the layout's
    split is a file.
    """
    name, colon, rest = place.partition(":")
    layout = LAYOUTS.get(name)
    if not colon or layout is None:
        return None
    root, at, split = rest.rpartition("@")
    return (layout, root, split) if at and (layout.split_is_file or "/" not in split) else (layout, rest, None)


def open_layout(place: str, ignore_value: int | None = IGNORE_VALUE) -> LabelledSource | None:
    """The labelled images that a place names by its layout; None where it names none. Raises: as `Layout.open`.

    `ignore_value` is for layouts whose data do not say which value of a mask means 'no label'.
    """
    parsed = parse_layout(place)
    if parsed is None:
        return None
    layout, root, split = parsed
    if layout.open_ignoring is not None:
        return layout.open_ignoring(root, split, ignore_value)
    return layout.open(root, split)
