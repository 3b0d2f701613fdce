"""What a command asks for in soft labels: of stored features, of a teacher that runs now, or of both in turn."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from dtpipe.extract.cluster.preflight import free_bytes
from dtpipe.extract.config import CodecConfig, ExtractConfig, ExtractRun
from dtpipe.extract.recipe import resolve_recipe
from dtpipe.extract.work import Resolve, work_of
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.store.paths import whole_place
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.plan import bytes_per_sample
from dtpipe.pipeline.cli.console import Note, format_bytes
from dtpipe.pipeline.cli.settings import find_field, validate
from dtpipe.pipeline.soft_labels.config import CachedConfig, LabelShardConfig, SoftLabelConfig
from dtpipe.pipeline.soft_labels.work import cached_work, live_work

if TYPE_CHECKING:
    from dtpipe.pipeline.plan.extraction import ExtractionPlan


@dataclass(frozen=True)
class LabelRequest:
    """One use of `dtpipe extract --interpreter`."""

    run: ExtractRun
    resolve: Resolve
    record: Mapping[str, Any]
    """The settings, for plan and manifest."""
    features: str | None
    """The feature dataset that lies beside the soft labels."""
    live: ExtractConfig | None = None
    """Settings of the teacher, where one runs."""
    features_first: ExtractConfig | None = None
    """Features to be extracted before, and kept."""
    plan_resolve: Resolve | None = None
    """In place of `resolve` for a plan, where the features are not there yet."""

    def plan(self, note: Note) -> ExtractionPlan:
        """What it would take: time of teacher and interpreter, bytes of the soft labels; those of features that are
        kept are noted. Raises: as `resolve`.
        """
        from dtpipe.pipeline.plan.extraction import plan_work

        if self.features_first is not None:
            note(_kept_text(self.features_first))
        return plan_work((self.plan_resolve or self.resolve)(), self.run, {})


def request_of(document: Mapping[str, Any], names: Mapping[str, str]) -> LabelRequest:
    """The request in a settings document. Raises: ConfigError for settings that do not go together."""
    labels: SoftLabelConfig = validate(document, "soft_labels", names)
    if labels.features is not None:
        return _of_stored(labels, document, names)
    live: ExtractConfig = validate(document, "extract", names)
    of_live = partial(live_work, labels, live)
    if labels.keep_features is None:
        _refuse_codec(live)
        return LabelRequest(live.run, of_live, _record(live.model_dump(mode="json"), labels), None, live)
    if whole_place(labels.keep_features) == whole_place(live.run.out):
        raise ConfigError(f"--keep-features and --out are both {live.run.out}; give features a place of their own")
    kept = labels.model_copy(update={"features": whole_place(labels.keep_features)})
    first = live.model_copy(update={"run": live.run.model_copy(update={"out": labels.keep_features})})
    config = _cached_part(live)
    return LabelRequest(
        config.run,
        partial(cached_work, kept, config),
        _record(config.model_dump(mode="json"), kept),
        labels.keep_features,
        first,
        first,
        of_live,
    )


def _kept_text(features: ExtractConfig) -> str:
    """What features that are kept would take, in words. Raises: as `resolve_recipe`."""
    run = features.run.model_copy(update={"inline": True})
    work = work_of(resolve_recipe(features.model_copy(update={"run": run})))
    recipe = work.recipe
    image_px = (recipe.transform.height, recipe.transform.width) if recipe.images == "stored" else None
    size_bytes = bytes_per_sample(recipe.levels, len(recipe.views), image_px) * len(work.listing())
    free = free_bytes(Store(run.out))
    room = "" if free is None else f"; {format_bytes(free)} are free there"
    return f"features that are kept in {run.out} take about {format_bytes(size_bytes)} before compression{room}"


def _refuse_codec(live: ExtractConfig) -> None:
    """Raises: ConfigError for settings of how features are stored, where none are."""
    given, default = live.codec.model_dump(), CodecConfig().model_dump()
    if changed := [name for name, value in given.items() if value != default[name]]:
        raise ConfigError(
            f"extract.codec.{changed[0]} says how features are stored, and those of this teacher are not kept; give "
            "--keep-features, or leave it out"
        )


def _of_stored(labels: SoftLabelConfig, document: Mapping[str, Any], names: Mapping[str, str]) -> LabelRequest:
    """Of `--from`: what would choose samples or a teacher says nothing there, and is refused."""
    if labels.keep_features is not None:
        raise ConfigError("--keep-features keeps what a teacher makes, and --from has it already; leave one out")
    section = document.get("extract") or {}
    foreign = [key for key in _keys(section) if not _goes_with_features(key)]
    if foreign:
        spelled = names.get(f"extract.{foreign[0]}", f"extract.{foreign[0]}")
        raise ConfigError(
            f"{spelled} says what a teacher is to encode, and --from names features that are there; leave one out"
        )
    config: CachedConfig = validate(document, "extract", names, CachedConfig)
    if config.run.save_png is not None:
        raise ConfigError(
            f"--save-png writes stored images, and soft labels of --from store none; extract {labels.features} with it"
        )
    resolve = partial(cached_work, labels, config)
    return LabelRequest(config.run, resolve, _record(config.model_dump(mode="json"), labels), labels.features)


def _goes_with_features(key: str) -> bool:
    return find_field(CachedConfig, key) is not None


def _keys(section: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Dotted keys of what was given."""
    for name, value in section.items():
        if isinstance(value, Mapping):
            yield from _keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _cached_part(live: ExtractConfig) -> CachedConfig:
    """The settings of a teacher's extraction that go for its soft labels too; its images are saved once."""
    shard = live.shard.model_dump(include={"format", "samples", "dtype", "zstd_level"}, exclude_none=True)
    return CachedConfig(
        shard=LabelShardConfig(**shard),
        batch_size=live.batch_size,
        threads=live.threads,
        run=live.run.model_copy(update={"save_png": None}),
    )


def _record(settings: Mapping[str, Any], labels: SoftLabelConfig) -> dict[str, Any]:
    return {**settings, "soft_labels": labels.model_dump(mode="json")}
