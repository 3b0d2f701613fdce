"""The stored images of a feature dataset as PNG files, under their keys: `dtpipe extract --save-png DIR`."""

from __future__ import annotations

import io
from pathlib import Path, PurePosixPath

from PIL import Image

from dtpipe.manifests.errors import ConfigError, InputError, StoreError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image
from dtpipe.manifests.store.outputs import content_of, refuse_no_folder
from dtpipe.manifests.store.paths import path_on_disk
from dtpipe.manifests.store.publish import write_whole


def save_images(url: str, folder: str | Path) -> int:
    """Write every good image as `<folder>/<key>.png`; files already there are written again. Returns how many.

    Raises: InputError for a key that is no path below the folder; StoreError when the folder cannot be written;
    DamagedDataError when a stored byte changed.
    """
    dataset = FeatureDataset.open(url)
    rows = dataset.columns.ok_rows
    for row in rows:
        path = _path_below(Path(folder), dataset.columns.keys[row])
        image = Image.fromarray(read_image(dataset, int(row)))
        png = io.BytesIO()
        image.save(png, "PNG")
        try:
            write_whole(path, png.getvalue())
        except OSError as err:
            raise StoreError(f"{path}: cannot be written ({err}); make room or name another --save-png") from err
    return len(rows)


def refuse_other_place(folder: str, images: str | None, out: str) -> None:
    """See that PNG files may be written into a folder: not among the images that they are made of, nor in a dataset.

    Raises: ConfigError.
    """
    path = Path(folder).absolute()
    refuse_no_folder(path)
    source, store = path_on_disk(images) if images else None, path_on_disk(out)
    if source is not None and path.is_relative_to(source):
        raise ConfigError(f"--save-png {folder} lies among the images of {source}; name another folder")
    if path == store or content_of(path):
        raise ConfigError(f"--save-png {folder} holds {content_of(path) or 'the dataset'}; name another folder")


def _path_below(folder: Path, key: str) -> Path:
    parts = PurePosixPath(key)
    if parts.is_absolute() or ".." in parts.parts:
        raise InputError(
            f"key {key!r} leads out of {folder}; its image is not written as a file, read it with dtpipe's reader"
        )
    return folder / f"{key}.png"
