"""What a feature dataset holds: in numbers, and one sample as a picture.

Everything is read through `FeatureDataset`, so a damaged dataset fails here as it does in training.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from dtpipe.manifests.codecs.fitted import fitted_names
from dtpipe.manifests.errors import InputError, StoreError
from dtpipe.manifests.fidelity import CODEC_ERROR, FIT_EXPECTS
from dtpipe.manifests.layout.arrays import stored_arrays
from dtpipe.manifests.layout.batches import batch_ranges, lower_batches
from dtpipe.manifests.layout.tables import SHARDS_FILE, SHARDS_SCHEMA, decode_table, shards_table
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from dtpipe.manifests.schema import IMAGE, BatchRange, LevelSpec, Manifest, Recipe, ViewSpec
from dtpipe.manifests.store.outputs import refuse_other_file
from dtpipe.manifests.store.paths import local_place
from dtpipe.manifests.store.publish import write_whole
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.commit import load_entries
from dtpipe.manifests.write.plan import SOURCE_SEEN, plan_digest
from dtpipe.pipeline.report.maps.pca import pca_to_rgb

if TYPE_CHECKING:
    import pyarrow as pa
    from numpy.typing import NDArray

_BAD = "bad: "
_MARK = "dtpipe inspect"
_TILE_PX, _GAP_PX, _TEXT_PX = 192, 12, 14
_LINE_PX = _TEXT_PX + 6
_PAPER, _INK, _FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)


def describe_dataset(url: str) -> dict[str, Any]:
    """Everything worth knowing about a dataset, as one JSON-able document; an unfinished one is described as far as
    it is.

    Units: sizes in bytes. `ratio` is raw over stored bytes; `fitted_bytes` are of the
    arrays that codecs were fitted with; `overhead_bytes` are keys, headers and chunk tables. Of an
    unfinished dataset, statuses and sizes are of the shards that are committed.
    Raises: DamagedDataError when a file does not fit its digest; InputError when there is no dataset.
    """
    dataset = FeatureDataset.open(url, allow_incomplete=True)
    table = shard_table(Store(url), dataset)
    stored = stored_bytes(table)
    size_bytes = sum(table["size_bytes"].to_pylist())
    complete = dataset.manifest if dataset.manifest is not None and dataset.manifest.complete else None
    arrays = stored_arrays(dataset.recipe)
    return {
        "url": url,
        "complete": complete is not None,
        "digest": None if complete is None else complete.digest,
        "totals": _totals(dataset, table, size_bytes),
        "recipe": _recipe_summary(dataset.recipe),
        "batch_sizes": [same.model_dump() for same in _batch_sizes(Store(url), dataset, complete)],
        "views": [view.model_dump() for view in dataset.recipe.views],
        "images": _image_bytes(dataset.recipe, stored),
        "levels": describe_levels(dataset, stored, complete),
        "fitted_bytes": sum(len(Store(url).read(name)) for name in fitted_names(*dataset.recipe.levels)),
        "overhead_bytes": size_bytes - sum(stored[name][1] for name in arrays if name in stored),
        "labels": dict(sorted(Counter(label for label in dataset.columns.labels if label is not None).items())),
        "bad": bad_records(dataset),
        "ignored": dict(dataset.plan.provenance.get(SOURCE_SEEN, {}).get("ignored", {})),
        "provenance": dict((dataset.plan if complete is None else complete).provenance),
    }


def describe_levels(
    dataset: FeatureDataset, stored: Mapping[str, tuple[int, int]], complete: Manifest | None
) -> list[dict[str, Any]]:
    """Bytes and errors of each level, beside those that a fit expected; `stored` as `stored_bytes` gives it."""
    return [
        _level_bytes(level, dataset.recipe, stored) | _expectations(level, dataset, stored, complete)
        for level in dataset.recipe.levels
    ]


def bad_records(dataset: FeatureDataset) -> list[dict[str, Any]]:
    """Row, key and reason of each bad sample, in row order."""
    rows = zip(dataset.columns.keys, dataset.columns.status, strict=True)
    return [
        {"row": row, "key": key, "reason": status.removeprefix(_BAD)}
        for row, (key, status) in enumerate(rows)
        if status.startswith(_BAD)
    ]


def render_sample(url: str, key: str, png_path: str | Path) -> Path:
    """Draw one sample's image and levels, each view a line, into a labelled PNG. Returns its path.

    Levels are shown by `pca_to_rgb` with one basis per level over all views, so that views can be compared.
    Raises: InputError for an unknown key or a bad sample; DamagedDataError when a stored byte changed.
    """
    path = Path(local_place(os.fspath(png_path)))
    refuse_other_file(path, _MARK.encode(), "dtpipe inspect", "--png")
    dataset = FeatureDataset.open(url, allow_incomplete=True)
    row = dataset.columns.row_of(key)
    status = dataset.columns.status[row]
    if status != "ok":
        raise InputError(
            f"{url}: {key} has no features to draw, its status is `{status}`; `dtpipe inspect {url}` lists the bad "
            "samples"
        )
    image = read_image(dataset, row) if dataset.recipe.images == "stored" else None
    views = dataset.recipe.views
    levels = {
        level.name: [read_level(dataset, level.name, row, view) for view in range(len(views))]
        for level in dataset.recipe.levels
    }
    label = dataset.columns.labels[row]
    title = key if label is None else f"{key}   label {label}"
    buffer = io.BytesIO()
    draw_sample(title, image, views, dataset.recipe.levels, levels).save(buffer, "PNG", pnginfo=_made_by())
    return _write(path, buffer.getvalue())


def _made_by() -> PngInfo:
    """What tells a picture of ours from others, before its pixels."""
    info = PngInfo()
    info.add_text("Software", _MARK)
    return info


def draw_sample(
    title: str,
    image: NDArray[np.uint8] | None,
    views: Sequence[ViewSpec],
    specs: Sequence[LevelSpec],
    levels: Mapping[str, Sequence[NDArray[Any]]],
) -> Image.Image:
    """One line per view: the image as the teacher saw it (unnoised), then each level.

    Shapes: image (H, W, 3) uint8; levels[name][view] (C, h, w), any float.
    """
    columns = [] if image is None else [(f"image  {image.shape[1]}×{image.shape[0]}", _view_images(image, views))]
    for spec in specs:
        pictures = pca_to_rgb([np.asarray(level) for level in levels[spec.name]])
        columns.append((f"{spec.name}  stride {spec.stride}  {spec.channels}×{spec.height}×{spec.width}", pictures))
    return _grid(title, [view_name(view) for view in views], columns)


def view_name(view: ViewSpec) -> str:
    """A view in words: `draw 0, timestep 150, flipped`."""
    parts = [f"draw {view.draw}"]
    if view.timestep is not None:
        parts.append(f"timestep {view.timestep}")
    if view.flip:
        parts.append("flipped")
    return ", ".join(parts)


# --- numbers ---------------------------------------------------------------------------------------------------------


def shard_table(store: Store, dataset: FeatureDataset) -> pa.Table:
    """shards.parquet, or the same of the shards that are committed so far."""
    if dataset.manifest is not None and dataset.manifest.complete:
        return decode_table(store.read(SHARDS_FILE), SHARDS_SCHEMA, store.where(SHARDS_FILE))
    return shards_table(load_entries(store, dataset.plan, plan_digest(store), partial=True))


def stored_bytes(table: pa.Table) -> dict[str, tuple[int, int]]:
    """Array name to its number of chunks and their bytes, over all objects."""
    import pyarrow.compute as pc

    arrays = pc.list_flatten(table["arrays"].combine_chunks())  # structs of one array in one object
    names, sizes = arrays.field("name"), arrays.field("size")
    stored: dict[str, tuple[int, int]] = {}
    for name in sorted(set(names.to_pylist())):
        chunks = pc.list_flatten(sizes.filter(pc.equal(names, name)))
        stored[name] = (len(chunks), pc.sum(chunks).as_py() or 0)
    return stored


def _totals(dataset: FeatureDataset, table: pa.Table, size_bytes: int) -> dict[str, int]:
    statuses = Counter("bad" if status.startswith(_BAD) else status for status in dataset.columns.status)
    return {
        "num_rows": len(dataset.columns),
        "num_ok": statuses["ok"],
        "num_bad": statuses["bad"],
        "num_shards": dataset.plan.num_shards,
        "num_shards_committed": len(set(table["shard"].to_pylist())),
        "size_bytes": size_bytes,
    }


def _batch_sizes(store: Store, dataset: FeatureDataset, complete: Manifest | None) -> tuple[BatchRange, ...]:
    """Of shards that were made in smaller batches than the recipe says; of those that are committed."""
    if complete is not None:
        return complete.batch_sizes
    return batch_ranges(lower_batches(load_entries(store, dataset.plan, plan_digest(store), partial=True)))


def _recipe_summary(recipe: Recipe) -> dict[str, Any]:
    """The recipe without what stands elsewhere in the document."""
    return recipe.model_dump(mode="json", exclude={"levels", "views"})


def _level_bytes(level: LevelSpec, recipe: Recipe, stored: Mapping[str, tuple[int, int]]) -> dict[str, Any]:
    """Bytes of all arrays of a level, beside those of its features as they are read."""
    specs = stored_arrays(recipe)
    names = [spec.name for spec in specs.values() if spec.level == level.name]
    size_bytes = sum(stored[name][1] for name in names if name in stored)
    shape = [len(recipe.views), level.channels, level.height, level.width]
    num_views, _ = stored.get(level.name, (0, 0))
    raw = num_views * level.channels * level.height * level.width * np.dtype(level.dtype).itemsize
    summary = {"name": level.name, "stride": level.stride, "shape": shape, "dtype": level.dtype, "tap": level.tap}
    coder = "zstd" if specs[level.name].tables is None else "rans"
    return summary | {"codec": level.codec.name, "coder": coder, "role": level.role} | _ratio(raw, size_bytes)


def _expectations(
    level: LevelSpec, dataset: FeatureDataset, stored: Mapping[str, tuple[int, int]], complete: Manifest | None
) -> dict[str, Any]:
    """What a level's codec was expected to lose and to take, and what it lost; None where it was not fitted or not
    measured.
    """
    expected = dataset.plan.provenance.get(FIT_EXPECTS, {}).get("levels", {})
    measured = {} if complete is None else complete.provenance.get(CODEC_ERROR, {})
    of_level, (num_views, _) = expected.get(level.name), stored.get(level.name, (0, 0))
    return {
        "expected": of_level,
        "expected_bytes": of_level and round(num_views * of_level["size_bytes"]),
        "codec_error": measured.get(level.name),
    }


def _image_bytes(recipe: Recipe, stored: Mapping[str, tuple[int, int]]) -> dict[str, Any] | None:
    """None where the images lie in another dataset of the same keys."""
    if recipe.images != "stored":
        return None
    height, width = recipe.transform.height, recipe.transform.width
    num_chunks, size_bytes = stored.get(IMAGE, (0, 0))
    return {"shape": [height, width, 3], "dtype": "uint8"} | _ratio(num_chunks * height * width * 3, size_bytes)


def _ratio(raw_bytes: int, size_bytes: int) -> dict[str, Any]:
    return {
        "size_bytes": size_bytes,
        "raw_bytes": raw_bytes,
        "ratio": round(raw_bytes / size_bytes, 3) if size_bytes else None,
    }


# --- picture ---------------------------------------------------------------------------------------------------------


def _view_images(image: NDArray[np.uint8], views: Sequence[ViewSpec]) -> list[NDArray[np.uint8]]:
    return [image[:, ::-1] if view.flip else image for view in views]


def _grid(title: str, lines: Sequence[str], columns: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]]) -> Image.Image:
    """Tiles with a caption above each column and a name above each line."""
    font = _font()
    tiles = [[_tile(picture) for picture in pictures] for _, pictures in columns]
    tile_height = max(tile.height for column in tiles for tile in column)
    widths = [
        max(max(tile.width for tile in column), _text_width(font, text))
        for column, (text, _) in zip(tiles, columns, strict=True)
    ]
    line_height = _LINE_PX + tile_height + _GAP_PX
    width = max(sum(widths) + _GAP_PX * (len(widths) + 1), _text_width(font, title) + 2 * _GAP_PX)
    canvas = Image.new("RGB", (width, _GAP_PX + 2 * _LINE_PX + line_height * len(lines)), _PAPER)
    draw = ImageDraw.Draw(canvas)
    draw.text((_GAP_PX, _GAP_PX), title, _INK, font)
    left = _GAP_PX
    for column, (text, _), column_width in zip(tiles, columns, widths, strict=True):
        draw.text((left, _GAP_PX + _LINE_PX), text, _INK, font)
        for idx, tile in enumerate(column):
            canvas.paste(tile, (left, _GAP_PX + 3 * _LINE_PX + idx * line_height))
        left += column_width + _GAP_PX
    for idx, line in enumerate(lines):
        draw.text((_GAP_PX, _GAP_PX + 2 * _LINE_PX + idx * line_height), line, _FAINT, font)
    return canvas


def _tile(picture: NDArray[np.uint8]) -> Image.Image:
    """A picture with its longer side at the tile's, cells left as they are."""
    tile = Image.fromarray(np.ascontiguousarray(picture))
    scale = _TILE_PX / max(tile.size)
    size = (max(1, round(tile.width * scale)), max(1, round(tile.height * scale)))
    return tile.resize(size, Image.Resampling.NEAREST if scale >= 1 else Image.Resampling.BOX)


def _font() -> ImageFont.FreeTypeFont:
    """matplotlib's DejaVu Sans: Pillow's own font knows ASCII only."""
    from matplotlib import get_data_path

    return ImageFont.truetype(str(Path(get_data_path(), "fonts", "ttf", "DejaVuSans.ttf")), _TEXT_PX)


def _text_width(font: ImageFont.FreeTypeFont, text: str) -> int:
    return int(np.ceil(font.getlength(text)))


def _write(path: Path, data: bytes) -> Path:
    try:
        write_whole(path, data)
    except OSError as err:
        raise StoreError(f"{path}: cannot be written ({err.strerror}); choose another file") from err
    return path
