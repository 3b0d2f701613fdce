"""What of its data a run learns from: features to regress, soft labels, or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from dtpipe.distill.config import DistillRecipeConfig, LabelsConfig
from dtpipe.distill.stream.data import OpenedData
from dtpipe.distill.student.distiller import choose_levels
from dtpipe.manifests.codecs.topk import TEMPERATURE, TOPK
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelSpec

LAMBDA_LD = 1.0
"""The paper's weight of equation (5)."""


@dataclass(frozen=True)
class Targets:
    """The levels that a run reads."""

    features: tuple[LevelSpec, ...]
    labels: LevelSpec | None = None
    classes: tuple[str, ...] = ()
    """Of the soft labels, as their channels."""
    label_weight: float = 0.0
    """lambda_ld of equation (6)."""

    @property
    def names(self) -> tuple[str, ...]:
        """Of all levels."""
        return tuple(level.name for level in (*self.features, *([self.labels] if self.labels else [])))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """Of those that are regressed."""
        return tuple(level.name for level in self.features)


def choose_targets(config: DistillRecipeConfig, data: OpenedData) -> Targets:
    """By weights and levels: features where one of their losses has a weight, soft labels where the data holds some.

    Raises: ConfigError when what has a weight is not in the data, there are soft labels of two interpreters, or nothing
    is left to learn from.
    """
    return targets_of(config, data.source.levels, data.classes)


def targets_of(
    config: DistillRecipeConfig, stored: Sequence[LevelSpec], classes: Mapping[str, Sequence[str]]
) -> Targets:
    """The same of levels and of the classes of those that hold soft labels."""
    levels = choose_levels(stored, config.levels)
    features = levels if any(config.loss.weights.values()) else ()
    labels = soft_label_level(config, stored)
    if not features and labels is None:
        names = ", ".join(level.name for level in stored)
        raise ConfigError(
            f"of the data's levels, {names}, none is left to learn from; see distill.levels, distill.loss and "
            "distill.labels.weight"
        )
    if labels is None:
        return Targets(features)
    _refuse_other_use(labels, config.labels)
    weight = LAMBDA_LD if config.labels.weight is None else config.labels.weight
    return Targets(features, labels, tuple(classes[labels.name]), weight)


def _refuse_other_use(level: LevelSpec, config: LabelsConfig) -> None:
    """The likeliest classes alone stand for one temperature, at which the others together have their share.

    Raises: ConfigError.
    """
    if level.codec.name != TOPK:
        return
    own = level.codec.parameters.get("temperature", TEMPERATURE)
    if config.temperature != own:
        raise ConfigError(
            f"distill.labels.temperature is {config.temperature:g}, and {level.name} holds the likeliest classes as "
            f"they are at {own:g}; leave it out, or extract soft labels without --top-k"
        )
    if config.confidence is not None:
        raise ConfigError(
            f"distill.labels.confidence is about probabilities at temperature 1, and {level.name} holds the likeliest "
            "classes alone, which do not say them; leave it out, or extract soft labels without --top-k"
        )


def soft_label_level(config: DistillRecipeConfig, stored: Sequence[LevelSpec]) -> LevelSpec | None:
    """The soft labels to learn from; None where there are none, or their weight is 0. Raises: as `choose_targets`."""
    weight = config.labels.weight
    soft = [level for level in stored if level.role == "soft_labels"]
    if weight == 0 or (weight is None and not soft):
        return None
    if not soft:
        raise ConfigError(
            f"distill.labels.weight is {weight:g}, and the data has no soft labels; join a dataset that has "
            "(`dtpipe extract --interpreter HEAD --from FEATURES --out LABELS`, then --join), or leave it out"
        )
    named = [level for level in soft if level.name in (config.levels or ())]
    chosen = named or soft
    if len(chosen) > 1:
        names = ", ".join(level.name for level in chosen)
        raise ConfigError(
            f"levels {names} are soft labels of several interpreters, and a run has one decoder; join one dataset of "
            "them, or name one in distill.levels beside the features"
        )
    return chosen[0]
