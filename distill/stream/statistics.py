"""Mean and variance of each channel of a run's targets, from a fixed part of its data; kept in targets.json of its
folder.

Stored levels are read at all their views; where a teacher only runs live, it encodes as many at their first fresh draw.
The samples are those whose keys have the smallest hashes, so they are the same in every order of the data.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.losses.whitening import ChannelStatistics, Whitener, Whitening, whiten
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.stream.live import LiveSamples, LiveTeacher
from dtpipe.distill.stream.order import key_hashes
from dtpipe.manifests.errors import DamagedDataError, InputError, StoreError
from dtpipe.manifests.phases import phase
from dtpipe.manifests.read.source import read_images
from dtpipe.manifests.records.document import read_document, write_document

TARGETS_FILE = "targets.json"
_STORED, _LIVE = 512, 64
_AT_ONCE = 16
_REMEDY = "delete it, and run again: it is computed anew"

Statistics = Mapping[str, ChannelStatistics]
"""By level."""
_Encodings = Iterator[tuple[Sequence[str], Mapping[str, Tensor]]]
"""Keys, and levels of shape (B, C, h, w)."""


def run_statistics(
    config: DistillConfig, data: OpenedData, levels: Sequence[str], device: torch.device, live: LiveTeacher | None
) -> Statistics:
    """Of `whiten(f_g, config.loss.whiten)` of each level: those that the run folder has, else computed and kept there.

    Nothing is read, encoded or kept where no level is regressed.
    Raises: what the readers raise; InputError naming a sample with values that are not finite; DamagedDataError when
    the record was changed; StoreError when it cannot be written.
    """
    if not levels:
        return {}
    num = config.loss.statistics or (_STORED if config.datasets else _LIVE)
    name = {"data": data.digest, "whiten": config.loss.whiten, "encodings": num, "levels": list(levels)}
    path = Path(config.run.out) / TARGETS_FILE
    kept = _read(path)
    if kept is not None and kept[0] == name:
        return kept[1]
    rows = _first_rows(data, -(-num // len(data.source.views)))
    encodings = _stored(data, levels, rows, device) if config.datasets else _encoded(data, levels, rows, device, live)
    statistics = _over(encodings, levels, config)
    _keep(path, {"of": name, "samples": len(rows), "levels": {key: _plain(of) for key, of in statistics.items()}})
    return statistics


def run_whitener(run: Path, whitening: Whitening) -> Whitener:
    """W of the run in a folder, on the CPU. Raises: InputError where it needs the record, and that is gone."""
    kept = _read(run / TARGETS_FILE)
    if kept is None and whitening == "dataset":
        raise InputError(
            f"{run / TARGETS_FILE}: there is no such file, and the run whitens by what it says; run `dtpipe distill` "
            "again, which computes it anew"
        )
    return Whitener(whitening, None if kept is None else kept[1])


def _keep(path: Path, document: Mapping[str, Any]) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise StoreError(f"{path.parent}: the run folder cannot be written: {err}; choose another --out") from err
    write_document(path, document, "free or change the disk and run again")


def _first_rows(data: OpenedData, num: int) -> np.ndarray:
    """Rows in use with the smallest hashes of their keys, ascending."""
    rows = np.asarray(data.sampling.rows if data.sampling is not None else data.source.columns.ok_rows)
    hashes = key_hashes([data.source.columns.keys[row] for row in rows])
    return np.sort(rows[np.argsort(hashes, kind="stable")[:num]])


def _parts(data: OpenedData, rows: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray, list[str]]]:
    """Some rows at one view at a time, with their keys."""
    with phase("statistics of the targets", len(rows)) as seen:
        for start in range(0, len(rows), _AT_ONCE):
            part = rows[start : start + _AT_ONCE]
            keys = [data.source.columns.keys[row] for row in part]
            for view in range(len(data.source.views)):
                yield part, np.full(len(part), view, np.int64), keys
            seen.done += len(part)


def _stored(data: OpenedData, levels: Sequence[str], rows: np.ndarray, device: torch.device) -> _Encodings:
    for part, views, keys in _parts(data, rows):
        _, coded = data.source.read(part, levels, views, images=False)
        yield keys, {name: torch.from_numpy(level).to(device) for name, level in coded.decode().items()}


def _encoded(
    data: OpenedData, levels: Sequence[str], rows: np.ndarray, device: torch.device, live: LiveTeacher | None
) -> _Encodings:
    assert live is not None  # without a dataset, data comes with a teacher
    for part, views, keys in _parts(data, rows):
        flip = np.array([data.source.views[view].flip for view in views])
        samples = LiveSamples(tuple(keys), views, flip, np.zeros(len(part), np.int64))
        images = torch.from_numpy(read_images(data.source, part)).to(device)
        _, encoded = live.encode(images, samples, live.prepare(samples))
        yield keys, {name: encoded[name] for name in levels}


def _over(encodings: _Encodings, levels: Sequence[str], config: DistillConfig) -> dict[str, ChannelStatistics]:
    merged: dict[str, ChannelStatistics] = {}
    with torch.inference_mode():
        for keys, by_level in encodings:
            for name in levels:
                _refuse_infinite(keys, name, by_level[name])
                part = ChannelStatistics.of(whiten(by_level[name], config.loss.whiten))
                merged[name] = merged[name].merge(part) if name in merged else part
    return merged


def _refuse_infinite(keys: Sequence[str], name: str, level: Tensor) -> None:
    finite = level.isfinite().flatten(1).all(dim=1).tolist()
    if bad := [key for key, is_finite in zip(keys, finite, strict=True) if not is_finite]:
        raise InputError(
            f"sample {bad[0]}: level {name} holds values that are not finite, so its channels have no mean; use "
            "float32 in the teacher, or leave the sample out with --exclude"
        )


def _plain(of_level: ChannelStatistics) -> dict[str, int | list[float]]:
    return {"num": of_level.num, "mean": of_level.mean.tolist(), "squares": of_level.squares.tolist()}


def _read(path: Path) -> tuple[dict[str, object], Statistics] | None:
    """What the statistics are of, and they themselves."""
    try:
        document = read_document(path, _REMEDY)
        levels = {
            name: ChannelStatistics(of["num"], _column(of["mean"]), _column(of["squares"]))
            for name, of in document["levels"].items()
        }
        return document["of"], levels
    except FileNotFoundError:
        return None
    except (KeyError, TypeError, ValueError, AttributeError) as err:
        raise DamagedDataError(f"{path}: holds no statistics of levels ({err}); {_REMEDY}") from err


def _column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
