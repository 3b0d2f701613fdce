"""What `dtpipe distill` trains on, from its settings: feature datasets, or the `extract` section's images and teacher.

The two stages meet here: `distill` is handed one object that opens the data and the live teacher, and knows neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from dtpipe.distill.config import DistillConfig, LabelsConfig
from dtpipe.distill.engine.record import read_record
from dtpipe.distill.engine.run_folder import read_config
from dtpipe.distill.stream.data import STORED, StoredData, TrainingData, recorded_shards
from dtpipe.extract.config import LiveConfig
from dtpipe.extract.shards.task import BadSample
from dtpipe.manifests.errors import ConfigError, MissingObjectError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.manifests.store.paths import path_on_disk
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import are, count_of
from dtpipe.manifests.write.commit import load_manifest
from dtpipe.pipeline.cli.console import ProgressLine, format_bytes
from dtpipe.pipeline.cli.options import Call
from dtpipe.pipeline.cli.settings import validate
from dtpipe.pipeline.live.flip_error import equivariant_warnings
from dtpipe.pipeline.live.source import SECTION, LiveData
from dtpipe.pipeline.live.teacher import open_live

NUM_BAD_SHOWN = 10


def training_data(call: Call) -> tuple[DistillConfig, TrainingData]:
    """The settings of a run, and its data.

    Raises: ConfigError when neither datasets nor images and a teacher are given, or the settings contradict each other.
    """
    if not _section(call, "distill").get("datasets"):
        return _without_dataset(call)
    config: DistillConfig = call.settings("distill")
    teacher = _section(call, SECTION).get("teacher") or {}
    return config, StoredData(partial(open_live, teacher, config=config)) if config.reencode else STORED


def recorded_data(run: Path, config: DistillConfig) -> TrainingData:
    """The data of a run; `config` is that of its folder. Raises: ConfigError when that does not say it."""
    if config.datasets:
        return STORED
    return LiveData(validate({SECTION: LiveConfig.in_halves(read_config(run, SECTION))}, SECTION, model=LiveConfig))


def warnings(call: Call, config: DistillConfig, data: TrainingData) -> Iterator[str]:
    """What a user should know before the run begins, a line each."""
    if isinstance(data, LiveData):
        if (draws := data.extract.noise.draws) > 1:
            yield f"extract.noise.draws is {draws}, and live training stores none: each epoch has a draw of its own"
    elif unread := [f"extract.{name}" for name in ("images", "num_samples") if _section(call, SECTION).get(name)]:
        verb = "is" if len(unread) == 1 else "are"
        yield f"{' and '.join(unread)} {verb} not read: the dataset that is given has images"
    if config.interpreter is not None and config.datasets and not config.reencode:
        yield "distill.interpreter is not read: with --reencode 0 no sample is encoded live"
    yield from _kept_shards(config)
    yield from _unused_labels(config)
    yield from _small_cache(config)
    if config.equivariant:
        yield from equivariant_warnings(config.datasets)


def _section(call: Call, name: str) -> Mapping[str, Any]:
    return call.document.get(name) or {}


def _without_dataset(call: Call) -> tuple[DistillConfig, LiveData]:
    """Live training: `distill.reencode` is 1 by definition, and `extract` says the rest."""
    section, extract_section = _section(call, "distill"), _section(call, SECTION)
    if not (extract_section.get("images") or extract_section.get("num_samples")):
        call.settings("distill")  # says first what else is missing
        raise ConfigError(
            "URL... (distill.datasets) must be given, or, to train without a dataset, --images (or --num-samples for a "
            "GAN) and --teacher"
        )
    if section.get("reencode", 1) != 1:
        raise ConfigError(
            f"distill.reencode is {section['reencode']}, and without a dataset every sample is encoded live, which is "
            "1; leave it out, or give a dataset"
        )
    config: DistillConfig = validate({"distill": {**section, "reencode": 1.0}}, "distill", call.names)
    extract: LiveConfig = validate(call.document, SECTION, call.names, LiveConfig)
    for name, value in (("join", config.join), ("run.allow_incomplete", config.run.allow_incomplete)):
        if value:
            raise ConfigError(f"distill.{name} is about feature datasets, and none is given; leave it out")
    return config, LiveData(extract, CheckedImages())


def _kept_shards(config: DistillConfig) -> Iterator[str]:
    """That a run goes on with the shards it began with, whatever has been committed since."""
    record = read_record(Path(config.run.out))
    for idx, url in enumerate(config.datasets):
        if shards := recorded_shards(record, idx):
            num = count_of(len(shards), "shard")
            yield f"{config.run.out} began when {url} was unfinished, and keeps to its {num} of then"


def _unused_labels(config: DistillConfig) -> Iterator[str]:
    """That soft labels are joined, and nothing is learned from them; or settings of some are given, and none are."""
    if config.interpreter is None and not any(_has_soft_labels(url) for url in config.datasets):
        given, default = config.labels.model_dump(exclude={"weight"}), LabelsConfig().model_dump()
        if unread := [f"distill.labels.{name}" for name, value in given.items() if value != default[name]]:
            yield f"{' and '.join(unread)} {are(len(unread))} not read: there are no soft labels"
    for url in config.datasets if config.labels.weight == 0 else ():
        if _has_soft_labels(url):
            yield f"{url} holds soft labels, and distill.labels.weight is 0: nothing is learned from them"


def _has_soft_labels(url: str) -> bool:
    return soft_labels_of(FeatureDataset.open(url, allow_incomplete=True).recipe) is not None


def _small_cache(config: DistillConfig) -> Iterator[str]:
    """That the remote datasets do not fit the cache, as far as they are finished."""
    remote = [url for url in config.datasets if path_on_disk(url) is None] if config.run.cache is not None else []
    size_bytes = 0
    for url in remote:
        with suppress(MissingObjectError):
            size_bytes += load_manifest(Store(url)).totals.size_bytes
    if size_bytes > config.run.cache_gb * 10**9:
        yield (
            f"distill.run.cache_gb is {config.run.cache_gb:g}, and the remote data have {format_bytes(size_bytes)}; "
            "what exceeds it is read from the store in every epoch; raise it where the disk has room"
        )


class CheckedImages:
    """Shows how far the look at the images is, and at its end the bad ones with their reasons."""

    def __init__(self) -> None:
        self._line = ProgressLine("images")

    def __reduce__(self) -> tuple[type[CheckedImages], tuple[()]]:
        """Another process has a line of its own: a terminal's bar cannot be sent."""
        return CheckedImages, ()

    def __call__(self, num_checked: int, num_images: int, bad: Sequence[BadSample]) -> None:
        self._line.update(num_checked, num_images, f"looked at, {len(bad)} bad")
        if num_checked < num_images:
            return
        for sample in bad[:NUM_BAD_SHOWN]:
            self._line.event(f"bad: {sample.key}: {sample.reason}")
        if len(bad) > NUM_BAD_SHOWN:
            self._line.event(f"and {len(bad) - NUM_BAD_SHOWN} more bad ones")
        self._line.__exit__(None, None, None)
