"""One contender of `read.py` in a process of its own: it opens its data, then measures what it is told to.

    python benchmarks/read_contenders.py NAME FOLDER       then lines of JSON on stdin: {"mode": .., "seconds": ..}

One rule: every contender hands out batches of 64 samples with all arrays in memory, and reads as its documentation says
is fastest from one process; those that read in one thread do so with two worker processes as well, which is as many
cores as dtpipe's threads have. Checksums are off wherever they can be; dtpipe compares each chunk with its manifest.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from importlib.metadata import version
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

BATCH = 64
WORKERS = 2
AHEAD = 6  # batches that are taken before time is measured, so that as much is read ahead at the start as at the end
MODES = ("sequential", "shuffled", "random")
Batches = Iterator[int]
"""Bytes of each batch, once it is in memory."""


def nbytes(batch: Any) -> int:
    """Bytes of a batch of named arrays or tensors, or of a list of them."""
    values = batch.values() if isinstance(batch, dict) else batch
    return sum(value.nbytes for value in values if hasattr(value, "nbytes"))


def row_batches(num_rows: int, shuffled: bool, seed: int = 0) -> Iterator[np.ndarray]:
    """Rows of one batch after the other, epoch after epoch; batches are whole."""
    for epoch in count():
        rows = np.random.default_rng([seed, epoch]).permutation(num_rows) if shuffled else np.arange(num_rows)
        yield from rows[: num_rows // BATCH * BATCH].reshape(-1, BATCH)


class Dtpipe:
    """`FeatureDataset.read`, and the training stream on the CPU. Each chunk is checked."""

    package: ClassVar = "dtpipe"
    modes: ClassVar = ("stream", *MODES)

    def __init__(self, folder: Path) -> None:
        from dtpipe.manifests.read.dataset import FeatureDataset

        self.dataset = FeatureDataset.open(folder)
        self.names = [level.name for level in self.dataset.levels]
        self.num_rows = len(self.dataset.columns)

    def batches(self, shuffled: bool) -> Batches:
        for rows in row_batches(self.num_rows, shuffled):
            images, coded = self.dataset.read(rows, self.names, np.zeros(BATCH, np.int64))
            yield nbytes([images, *coded.decode().values()])

    def stream(self) -> Batches:
        import torch

        from dtpipe.distill.stream.order import StreamPosition
        from dtpipe.distill.stream.stream import FeatureStream, StreamSettings

        settings = StreamSettings(tuple(self.names), seed=0, epochs=1 << 20, batch_size=BATCH)
        for batch in FeatureStream(self.dataset, settings, torch.device("cpu")).batches(StreamPosition()):
            yield nbytes([batch.images, *batch.levels.values()])

    def one(self, row: int) -> int:
        images, coded = self.dataset.read([row], self.names, [0])
        return nbytes([images, *coded.decode().values()])


class Tensorstore:
    """The zarr store by tensorstore: index arrays, all arrays at once, a cache for the indices of shards."""

    package: ClassVar = "tensorstore"
    modes: ClassVar = MODES

    def __init__(self, folder: Path) -> None:
        import tensorstore

        limits = {"data_copy_concurrency": {"limit": 2}, "file_io_concurrency": {"limit": 8}}
        context = tensorstore.Context({"cache_pool": {"total_bytes_limit": 16 << 20}, **limits})
        root = folder / "data.zarr"
        paths = sorted(path.parent for path in root.glob("*/zarr.json"))
        spec = {"driver": "zarr3", "recheck_cached_data": "open"}
        self.arrays = [
            tensorstore.open(
                {**spec, "kvstore": {"driver": "file", "path": f"{path}/"}}, context=context, open=True
            ).result()
            for path in paths
        ]
        self.num_rows = self.arrays[0].shape[0]

    def _read(self, rows: Any) -> int:
        asked = [array[rows] if path_is_image(array) else array[rows, 0] for array in self.arrays]
        return nbytes([future.result() for future in [view.read() for view in asked]])

    def batches(self, shuffled: bool) -> Batches:
        for rows in row_batches(self.num_rows, shuffled):
            yield self._read(rows if shuffled else slice(int(rows[0]), int(rows[-1]) + 1))

    def one(self, row: int) -> int:
        return self._read(slice(row, row + 1))


def path_is_image(array: Any) -> bool:
    """Images have no axis of views."""
    return bool(array.ndim == 4)


class Zarr:
    """The zarr store by zarr-python, which checks crc32c; it cannot be told not to."""

    package: ClassVar = "zarr"
    modes: ClassVar = MODES

    def __init__(self, folder: Path) -> None:
        import zarr

        group = zarr.open_group(str(folder / "data.zarr"), mode="r")
        self.arrays = [array for _, array in sorted(group.arrays())]
        self.num_rows = self.arrays[0].shape[0]

    def batches(self, shuffled: bool) -> Batches:
        for rows in row_batches(self.num_rows, shuffled):
            chosen = rows if shuffled else slice(int(rows[0]), int(rows[-1]) + 1)
            yield nbytes([array.oindex[chosen] for array in self.arrays])

    def one(self, row: int) -> int:
        return nbytes([array[row : row + 1] for array in self.arrays])


class Litdata:
    """Uncompressed chunks of 64 MB, read by its own loader in this process."""

    package: ClassVar = "litdata"
    modes: ClassVar[tuple[str, ...]] = MODES
    workers: ClassVar = 0

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder / "litdata")
        from litdata import StreamingDataset

        self.dataset = StreamingDataset(self.folder)
        self.num_rows = len(self.dataset)

    @staticmethod
    def write(folder: Path, samples: Iterator[dict[str, np.ndarray]]) -> None:
        from litdata.streaming.cache import Cache

        (folder / "litdata").mkdir()
        cache = Cache(str(folder / "litdata"), chunk_bytes="64MB")
        for idx, sample in enumerate(samples):
            cache._add_item(idx, sample)
        cache.done()
        cache.merge(1)

    def batches(self, shuffled: bool) -> Batches:
        from litdata import StreamingDataLoader, StreamingDataset

        dataset = StreamingDataset(self.folder, shuffle=shuffled, drop_last=True)
        kept = self.workers > 0
        loader = StreamingDataLoader(
            dataset, batch_size=BATCH, num_workers=self.workers, shuffle=shuffled, persistent_workers=kept
        )
        while True:
            for batch in loader:
                yield nbytes(batch)

    def one(self, row: int) -> int:
        return nbytes(self.dataset[row])


class LitdataWorkers(Litdata):
    """The same with worker processes that stay from epoch to epoch; an epoch's start counts."""

    modes = ("sequential", "shuffled")
    workers = WORKERS


class Mosaic:
    """mosaicml-streaming: uncompressed MDS shards of 64 MB without hashes, read by torch's loader in this process."""

    package: ClassVar = "mosaicml-streaming"
    modes: ClassVar[tuple[str, ...]] = MODES

    def __init__(self, folder: Path) -> None:
        from streaming import StreamingDataset
        from streaming.base.util import clean_stale_shared_memory

        clean_stale_shared_memory()
        self.folder = str(folder / "mds")
        self.datasets = {
            shuffled: StreamingDataset(local=self.folder, shuffle=shuffled, batch_size=BATCH, num_canonical_nodes=1)
            for shuffled in (False, True)
        }
        self.num_rows = len(self.datasets[False])

    @staticmethod
    def write(folder: Path, samples: Iterator[dict[str, np.ndarray]]) -> None:
        from streaming import MDSWriter

        first = next(samples)
        columns = {
            name: f"ndarray:{value.dtype.name}:{','.join(map(str, value.shape))}" for name, value in first.items()
        }
        with MDSWriter(
            out=str(folder / "mds"), columns=columns, compression=None, hashes=[], size_limit=1 << 26
        ) as writer:
            writer.write(first)
            for sample in samples:
                writer.write(sample)

    def batches(self, shuffled: bool) -> Batches:
        from torch.utils.data import DataLoader

        while True:
            for batch in DataLoader(self.datasets[shuffled], batch_size=BATCH, num_workers=0, drop_last=True):
                yield nbytes(batch)

    def one(self, row: int) -> int:
        return nbytes(self.datasets[False][row])


class MosaicByIndex(Mosaic):
    """The same samples asked for by number, one after the other, in torch's loader: no epoch ends."""

    modes = ("sequential", "shuffled")
    workers: ClassVar = 0

    def batches(self, shuffled: bool) -> Batches:
        from torch.utils.data import DataLoader

        rows: Any = (rows.tolist() for rows in row_batches(self.num_rows, shuffled))
        samples: Any = ByIndex(self.datasets[False])
        for batch in DataLoader(samples, batch_sampler=rows, num_workers=self.workers):
            yield nbytes(batch)


class MosaicByIndexWorkers(MosaicByIndex):
    """The same in worker processes."""

    workers = WORKERS


class ByIndex:
    """What torch's loader takes for a dataset with random access."""

    def __init__(self, samples: Any) -> None:
        self._samples = samples

    def __getitem__(self, row: int) -> Any:
        return self._samples[row]


class Webdataset:
    """Tars of npy members of 64 MB, in order: what it calls shuffling mixes neighbours in a buffer."""

    package: ClassVar = "webdataset"
    modes: ClassVar = ("sequential",)

    def __init__(self, folder: Path) -> None:
        self.urls = sorted(map(str, (folder / "wds").glob("*.tar")))

    @staticmethod
    def write(folder: Path, samples: Iterator[dict[str, np.ndarray]]) -> None:
        import webdataset

        (folder / "wds").mkdir()
        with webdataset.ShardWriter(str(folder / "wds" / "%05d.tar"), maxsize=1 << 26, verbose=0) as writer:
            for idx, sample in enumerate(samples):
                writer.write({"__key__": f"{idx:08d}", **{f"{name}.npy": value for name, value in sample.items()}})

    def batches(self, shuffled: bool) -> Batches:
        import webdataset

        assert not shuffled, "it has no random access"
        while True:
            dataset = webdataset.WebDataset(self.urls, shardshuffle=False, empty_check=False).decode()
            for batch in dataset.batched(BATCH, partial=False):
                yield nbytes([value for name, value in batch.items() if name.endswith(".npy")])


class WebdatasetWorkers(Webdataset):
    """The same tars again and again in worker processes, which hand over tensors."""

    workers: ClassVar = WORKERS

    def batches(self, shuffled: bool) -> Batches:
        import webdataset

        assert not shuffled, "it has no random access"
        dataset = webdataset.WebDataset(self.urls, shardshuffle=False, empty_check=False).decode()
        batched = dataset.batched(BATCH, partial=False).map(tensors).repeat()
        for batch in webdataset.WebLoader(batched, batch_size=None, num_workers=WORKERS):
            yield nbytes(batch)


def tensors(batch: dict[str, Any]) -> list[Any]:
    """Arrays of a batch as tensors, which go from process to process through shared memory."""
    import torch

    return [torch.as_tensor(value) for name, value in batch.items() if name.endswith(".npy")]


CONTENDERS: dict[str, Any] = {
    "dtpipe": Dtpipe,
    "tensorstore": Tensorstore,
    "zarr": Zarr,
    "litdata": Litdata,
    "litdata, 2 workers": LitdataWorkers,
    "mosaicml-streaming": Mosaic,
    "mosaicml-streaming by index": MosaicByIndex,
    "mosaicml-streaming by index, 2 workers": MosaicByIndexWorkers,
    "webdataset": Webdataset,
    "webdataset, 2 workers": WebdatasetWorkers,
}


def measure(contender: Any, mode: str, seconds: float, least: int) -> dict[str, float]:
    """MB/s and, without workers, MB per second of processor time; of `random`, milliseconds of one sample (median)."""
    if mode == "random":
        rows = np.random.default_rng(7).permutation(contender.num_rows)[:200]
        return {"ms": _median_ms(contender.one, rows.tolist(), seconds)}
    make: dict[str, Callable[[], Batches]] = {
        "sequential": lambda: contender.batches(False),
        "shuffled": lambda: contender.batches(True),
        "stream": lambda: contender.stream(),
    }
    batches = make[mode]()
    workers = getattr(contender, "workers", 0)
    for _ in range(AHEAD if mode == "stream" or workers else 1):
        next(batches)
    begun_s, cpu_s, total, num = time.perf_counter(), time.process_time(), 0, 0
    for size in batches:
        total, num = total + size, num + 1
        if num >= least and time.perf_counter() - begun_s >= seconds:
            break
    taken_s, cpu_s = time.perf_counter() - begun_s, time.process_time() - cpu_s
    close = getattr(batches, "close", None)
    if close is not None:
        close()
    rate = {"mb_s": total / taken_s / 1e6}
    return rate if workers else rate | {"mb_cpu_s": total / cpu_s / 1e6}


def _median_ms(read: Callable[[int], int], rows: list[int], seconds: float) -> float:
    taken, end_s = [], time.perf_counter() + seconds
    for row in rows:
        begun_s = time.perf_counter()
        read(row)
        taken.append(time.perf_counter() - begun_s)
        if time.perf_counter() > end_s:
            break
    return float(np.median(taken)) * 1e3


def main() -> None:
    """Answer each line with one line."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    name, folder = sys.argv[1], Path(sys.argv[2])
    contender = CONTENDERS[name](folder)
    print(json.dumps({"version": version(contender.package)}), file=answers, flush=True)
    for line in sys.stdin:
        print(json.dumps(measure(contender, **json.loads(line))), file=answers, flush=True)


if __name__ == "__main__":
    main()
