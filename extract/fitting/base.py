"""Fitting codecs to a sample of what is to be extracted: what is asked for and what comes out.

One rule: a fit is a pure function of recipe, listing and request. It comes before the plan, which names it by digest;
a dataset that has a plan keeps its fit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from dtpipe.manifests.codecs.fitted import FITTED
from dtpipe.manifests.codecs.rans_tables import Coder
from dtpipe.manifests.schema import CodecSpec, LevelSpec, Recipe

DEFAULT_MAX_ERROR: Final = 0.03

OnFitted = Callable[[int, int, str | None], None]
"""Samples read, samples in all, and an event worth a line; called often, and what it raises ends the fit."""

PLAIN_TARS: Final = (
    "tars have symbols as plain npy under the coder zstd, which loses what was allowed for few bytes less; "
    "-s extract.codec.coder=rans packs them"
)


@dataclass(frozen=True)
class FitRequest:
    """What codecs are fitted for."""

    codecs: Mapping[str, str]
    """By level: the codec that it is to have."""
    max_error: float | None
    """Of each level: squared error over variance, mean over samples."""
    budget_bytes: int | None
    """Of the whole dataset, in place of that."""
    num_samples: int
    seed: int
    """Of the choice of samples."""
    coder: Coder = "zstd"
    """Of the symbols."""

    def record(self) -> dict[str, Any]:
        """What a dataset that is gone on with must have been asked for, too."""
        target = {"max_error": self.max_error} if self.budget_bytes is None else {"budget_bytes": self.budget_bytes}
        coder = {} if self.coder == "zstd" else {"coder": self.coder}
        return {"levels": dict(self.codecs), **target, "samples": self.num_samples, **coder}


def makes_plain_tars(recipe: Recipe, request: FitRequest) -> bool:
    """True where `PLAIN_TARS` is to be said."""
    return recipe.shard.format == "webdataset" and request.coder == "zstd"


@dataclass(frozen=True)
class FitResult:
    """What was fitted."""

    codecs: Mapping[str, CodecSpec]
    files: Mapping[str, bytes]
    """By digest."""
    expected: Mapping[str, Mapping[str, float]]
    """By level: `relative_mse` and `size_bytes` of a view, of samples that were kept from the fit."""
    num_samples: int
    remarks: tuple[str, ...] = field(default=())
    least_mse: Mapping[str, float] = field(default_factory=dict)
    """By level: the error below which none may be asked for."""

    def record(self) -> dict[str, Any]:
        """For the provenance of the plan."""
        return {"samples": self.num_samples, "levels": {name: dict(level) for name, level in self.expected.items()}}

    def recipe(self, draft: Recipe) -> Recipe:
        """The recipe with the codecs that were fitted."""
        return with_codecs(draft, self.codecs)


def with_codecs(recipe: Recipe, codecs: Mapping[str, CodecSpec]) -> Recipe:
    """A recipe whose levels have other codecs, by name."""
    return recipe.model_copy(update={"levels": tuple(_with_codec(level, codecs) for level in recipe.levels)})


def adopted(draft: Recipe, stored: Recipe, request: FitRequest) -> Recipe:
    """A recipe with the fits of a stored one, where both have the same codec."""
    before = {level.name: level.codec for level in stored.levels}
    kept = {
        name: before[name]
        for name, codec in request.codecs.items()
        if name in before and before[name].name == codec and FITTED in before[name].parameters
    }
    others = {name: CodecSpec(name=codec) for name, codec in request.codecs.items() if name not in kept}
    return with_codecs(draft, {**kept, **others})


def _with_codec(level: LevelSpec, codecs: Mapping[str, CodecSpec]) -> LevelSpec:
    return level.model_copy(update={"codec": codecs[level.name]}) if level.name in codecs else level
