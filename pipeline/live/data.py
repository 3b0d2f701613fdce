"""What `dtpipe distill` trains on, from its settings: feature datasets, or the `extract` section's images and teacher.

The two stages meet here: `distill` is handed functions that open the data and the live teacher, and knows neither.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dtpipe.distill.config import DistillConfig
from dtpipe.extract.config import ErrorBudget, LiveConfig
from dtpipe.manifests.errors import ConfigError
from dtpipe.pipeline.cli.console import ProgressLine
from dtpipe.pipeline.cli.options import Call
from dtpipe.pipeline.cli.settings import validate

if TYPE_CHECKING:
    from dtpipe.distill.stream.data import OpenSource
    from dtpipe.distill.stream.live import OpenLive
    from dtpipe.extract.shards.progress import BadSample

NUM_BAD_SHOWN = 10


@dataclass(frozen=True)
class TrainingInputs:
    """A run's settings, and functions that open what it trains on."""

    config: DistillConfig
    open_source: OpenSource
    open_live: OpenLive | None
    unchecked: OpenSource
    """As `open_source`, without looking at the images and writing what was found."""
    extract: LiveConfig | None = None
    """Set where there is no dataset."""
    unread: tuple[str, ...] = ()
    """Settings that name images while a dataset is given, which has its own."""

    @property
    def open_again(self) -> OpenSource:
        """As `open_source`, without messages, for processes elsewhere."""
        from dtpipe.pipeline.live.source import open_live_data

        return self.open_source if self.extract is None else partial(open_live_data, self.extract, None, True)

    def warnings(self) -> Iterator[str]:
        """What a user should know before the run begins, a line each."""
        if self.extract is not None and self.extract.noise.draws > 1:
            yield f"extract.noise.draws is {self.extract.noise.draws}, and live training stores none: each epoch has a draw of its own"
        if self.unread:
            yield f"{' and '.join(self.unread)} {'is' if len(self.unread) == 1 else 'are'} not read: the dataset that is given has images"
        yield from _kept_shards(self.config)
        if self.config.equivariant:
            from dtpipe.pipeline.live.flip_error import equivariant_warnings

            yield from equivariant_warnings(self.config.datasets)


def _kept_shards(config: DistillConfig) -> Iterator[str]:
    """That a run goes on with the shards it began with, whatever has been committed since."""
    from dtpipe.distill.engine.record import read_record
    from dtpipe.distill.stream.data import recorded_shards

    record = read_record(Path(config.out))
    for idx, url in enumerate(config.datasets):
        if shards := recorded_shards(record, idx):
            yield f"{config.out} began when {url} was unfinished, and keeps to its {len(shards)} shard{'s'[: len(shards) > 1]} of then"


def training_inputs(call: Call) -> TrainingInputs:
    """Raises: ConfigError when neither datasets nor images and a teacher are given, or the settings contradict each other."""
    from dtpipe.distill.stream.data import open_data

    document = call.document
    if (document.get("distill") or {}).get("datasets"):
        config: DistillConfig = call.settings("distill")
        section = document.get("extract") or {}
        unread = tuple(f"extract.{name}" for name in ("images", "num_samples") if section.get(name))
        return TrainingInputs(
            config,
            open_data,
            _live(section.get("teacher") or {}) if config.reencode else None,
            open_data,
            unread=unread,
        )
    return _without_dataset(call)


def _without_dataset(call: Call) -> TrainingInputs:
    """Live training: `distill.reencode` is 1 by definition, and `extract` says the rest."""
    from dtpipe.pipeline.live.source import open_live_data

    extract_section = call.document.get("extract") or {}
    if not (extract_section.get("images") or extract_section.get("num_samples")):
        given = call.settings("distill")  # says first what else is missing
        assert isinstance(given, DistillConfig)
        raise ConfigError(
            "URL... (distill.datasets) must be given, or, to train without a dataset, --images (or --num-samples for a GAN) and --teacher"
        )
    section = dict(call.document.get("distill") or {})
    if section.get("reencode", 1) != 1:
        raise ConfigError(
            f"distill.reencode is {section['reencode']}, and without a dataset every sample is encoded live, which is 1; leave it out, or "
            "give a dataset"
        )
    config: DistillConfig = validate({"distill": {**section, "reencode": 1.0}}, "distill", call.names)
    budget = {
        name: value for name, value in (extract_section.get("run") or {}).items() if name in ErrorBudget.model_fields
    }
    extract: LiveConfig = validate({"extract": {**extract_section, "run": budget}}, "extract", call.names, LiveConfig)
    _refuse_dataset_settings(config)
    opened = partial(open_live_data, extract, CheckedImages(), True)
    return TrainingInputs(config, opened, _live({}), partial(open_live_data, extract, None, False), extract)


def _refuse_dataset_settings(config: DistillConfig) -> None:
    for name, given in (("join", config.join), ("allow_incomplete", config.allow_incomplete)):
        if given:
            raise ConfigError(f"distill.{name} is about feature datasets, and none is given; leave it out")


def _live(given: Mapping[str, Any]) -> OpenLive:
    from dtpipe.pipeline.live.teacher import open_live

    return partial(open_live, given)


class CheckedImages:
    """Shows how far the look at the images is, and at its end the bad ones with their reasons."""

    def __init__(self) -> None:
        self._line = ProgressLine("images")

    def __call__(self, done: int, total: int, bad: Sequence[BadSample]) -> None:
        self._line.update(done, total, f"looked at, {len(bad)} bad")
        if done < total:
            return
        for each in bad[:NUM_BAD_SHOWN]:
            self._line.event(f"bad: {each.key}: {each.reason}")
        if len(bad) > NUM_BAD_SHOWN:
            self._line.event(f"and {len(bad) - NUM_BAD_SHOWN} more bad ones")
        self._line.__exit__(None, None, None)


def recorded_inputs(run_config: DistillConfig, extract_section: Mapping[str, Any]) -> TrainingInputs:
    """The inputs of a run that was trained without a dataset, from its config.yaml; for report and evaluation.

    Raises: ConfigError when the section does not say them.
    """
    from dtpipe.pipeline.live.source import open_live_data

    extract: LiveConfig = validate({"extract": LiveConfig.in_halves(extract_section)}, "extract", model=LiveConfig)
    unchecked = partial(open_live_data, extract, None, False)
    return TrainingInputs(run_config, unchecked, _live({}), unchecked, extract)
