"""A table of image names and class labels, with the images anywhere below a root.

Columns go by their names in the first line, or there are two without such a line: name, then label. Commas, semicolons
and tabs part them.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from dtpipe.extract.sources.base import SourceItem
from dtpipe.extract.sources.layouts.base import Layout
from dtpipe.extract.sources.layouts.files import Tree, few, is_elsewhere
from dtpipe.extract.sources.layouts.generic.folders import classes_of
from dtpipe.extract.sources.layouts.listed import ListedSource
from dtpipe.extract.sources.layouts.named import match_names
from dtpipe.extract.sources.names import is_image
from dtpipe.manifests.errors import ConfigError, InputError
from dtpipe.manifests.labels import Class, ClassTable
from dtpipe.manifests.words import count_of

_NAMES = ("name", "file", "filename", "file_name", "image", "image_name", "image_id", "path", "image_path", "id", "key")
_LABELS = ("label", "class", "class_name", "category", "target", "breed", "species")
_PARTED_BY = ",;\t"
LabelLine = tuple[int, str, str]
"""Number of a line, from 1, and the name and label in it."""


def open_csv(root: str, split: str | None) -> ListedSource:
    """The images of a table. Raises: ConfigError without a table; InputError naming the line that is wrong."""
    if not split:
        raise ConfigError(f"{root}: name the table with the labels, as in csv:{root}@labels.csv")
    tree = Tree(root)
    where = split if is_elsewhere(split) else f"{tree.root}/{split}"
    lines, repeated = _once(parse_table(tree.read_named(split), where), where)
    images = tree.images()
    places = match_names((name for _, name, _ in lines), images, where, without_endings=True)
    if not places:
        raise InputError(
            f"{tree.root}: none of the {count_of(len(lines), 'image')} that {where} names is there, {lines[0][1]} for "
            f"one, but {few(sorted(images)) or 'no image at all'}; check the root"
        )
    items = [replace(images[places[name]], label=label) for _, name, label in lines if name in places]
    items.sort(key=lambda item: item.key)
    table = _classes([label for _, _, label in lines], where)
    notes = [*repeated, *_left_over(lines, images, places, where, tree.root)]
    return ListedSource(Class, table, items, tree, classes_of(items, table), notes)


def parse_table(data: bytes, where: str) -> list[LabelLine]:
    """The lines of a table. Raises: InputError for columns that do not say what they are, and for empty cells."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise InputError(f"{where}: is no UTF-8 text (byte {err.start}); save the table as UTF-8") from err
    rows = list(_rows(text, where))
    if not rows:
        raise InputError(f"{where}: is empty; write a line for each image: its name and its label")
    columns, has_titles = _columns([cells for _, cells in rows[:2]], where)
    lines = []
    for number, cells in rows[1:] if has_titles else rows:
        name, label = (cells[column].strip() if column < len(cells) else "" for column in columns)
        if not name or not label:
            raise InputError(f"{where}: line {number} has no {'label' if name else 'name'}; write it, or drop the line")
        lines.append((number, name, label))
    if not lines:
        raise InputError(
            f"{where}: has a first line with the names of columns and no other; write a line for each image"
        )
    return lines


def _rows(text: str, where: str) -> Iterator[tuple[int, list[str]]]:
    """Number of the last line of each row, and its cells; empty lines are passed over."""
    first = text.partition("\n")[0]
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=max(_PARTED_BY, key=first.count))
    try:
        for cells in reader:
            if any(cell.strip() for cell in cells):
                yield reader.line_num, cells
    except csv.Error as err:
        raise InputError(f"{where}: line {reader.line_num} cannot be read ({err}); mend it") from err


def _columns(first: Sequence[Sequence[str]], where: str) -> tuple[tuple[int, int], bool]:
    """Columns of name and label, and whether the first of the first two rows names them."""
    titles = [cell.strip().lower() for cell in first[0]]
    names, labels = ([title for title in own if title in titles] for own in (_NAMES, _LABELS))
    if names and labels:
        return (titles.index(names[0]), titles.index(labels[0])), True
    images = [is_image(row[0].strip()) for row in first]
    if len(titles) == 2 and any(images):
        return (0, 1), not images[0]
    raise InputError(
        f"{where}: which of the columns {few(first[0])} are name and label is not said; call one {_NAMES[0]} and one "
        f"{_LABELS[0]} in the first line"
    )


def _once(lines: Sequence[LabelLine], where: str) -> tuple[list[LabelLine], list[str]]:
    """Each name's first line, and what to say of others. Raises: InputError for a name with two labels."""
    first: dict[str, LabelLine] = {}
    repeated = []
    for line in lines:
        number, name, label = line
        other = first.setdefault(name, line)
        if other[2] != label:
            raise InputError(
                f"{where}: {name} is {other[2]} in line {other[0]} and {label} in line {number}; leave one"
            )
        if other is not line:
            repeated.append(number)
    if not repeated:
        return list(first.values()), []
    num = count_of(len(repeated), "line")
    return list(first.values()), [f"{where}: left out {num} that repeat others, line {repeated[0]} for one"]


def _classes(labels: Sequence[str], where: str) -> ClassTable:
    """In the order of numbers where all labels are whole ones, else of names. Raises: InputError for fractions."""
    distinct = set(labels)
    try:
        values = {label: float(label) for label in distinct}
    except ValueError:
        return ClassTable(tuple(sorted(distinct)))
    if odd := sorted(label for label, value in values.items() if not value.is_integer()):
        raise InputError(f"{where}: labels such as {odd[0]} measure something and are no classes; give classes")
    return ClassTable(tuple(sorted(distinct, key=lambda label: (values[label], label))))


def _left_over(
    lines: Sequence[LabelLine], images: Mapping[str, SourceItem], places: Mapping[str, str], where: str, root: str
) -> Iterator[str]:
    if missing := [name for _, name, _ in lines if name not in places]:
        yield f"left out {count_of(len(missing), 'image')} that {where} names and {root} does not hold: {few(missing)}"
    if unnamed := sorted(images.keys() - set(places.values())):
        yield f"left out {count_of(len(unnamed), 'image')} that {where} does not name: {few(unnamed)}"


LAYOUT = Layout(
    "csv",
    "csv:ROOT@TABLE.csv: columns of names and labels (called so), or two without titles; images anywhere below ROOT.",
    Class,
    open_csv,
    split_is_file=True,
)
