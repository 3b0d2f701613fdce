"""The layouts of labelled data there are, and the one that `NAME:ROOT@SPLIT` names."""

from __future__ import annotations

from dtpipe.extract.sources.layouts.base import LabelledSource, Layout

_DECLARED: tuple[Layout, ...] = ()
LAYOUTS: dict[str, Layout] = {layout.name: layout for layout in _DECLARED}


def parse_layout(place: str) -> tuple[Layout, str, str | None] | None:
    """Layout, root and split of `NAME:ROOT@SPLIT`; None for a path or URL without the name of a layout.

    The split is what follows the last `@`, where no slash comes after it.
    """
    name, colon, rest = place.partition(":")
    if not colon or name not in LAYOUTS:
        return None
    root, at, split = rest.rpartition("@")
    return (LAYOUTS[name], root, split) if at and "/" not in split else (LAYOUTS[name], rest, None)


def open_layout(place: str) -> LabelledSource | None:
    """The labelled images that a place names by its layout; None where it names none. Raises: as `Layout.open`."""
    parsed = parse_layout(place)
    if parsed is None:
        return None
    layout, root, split = parsed
    return layout.open(root, split)
