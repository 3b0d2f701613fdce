"""Which settings a plan and what is asked for now differ in, under the names that a person knows.

One rule: codecs stand in a recipe as they came out of a fit, and in `selection` as it was asked for; both are named by
the settings in the section `extract.codec` that they follow from.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Final

from dtpipe.manifests.differences import Difference, differences
from dtpipe.manifests.schema import Recipe

FIT: Final = "fit"
"""In a selection: what codecs were fitted for."""
_CODECS: Final = "extract.codec."
_OF_RECIPES: Final = {
    "codec.zstd_level": "extract.shard.zstd_level",
    "codec.symbols_zstd_level": "extract.codec.zstd_level",
    "image_coding": "extract.shard.image_coding",
}
_OF_FITS: Final = {"budget_bytes": "budget", "samples": "fit_samples"}  # of a fit's record; others have their own


def settings_that_differ(
    stored: Recipe, wanted: Recipe, stored_selection: Mapping[str, Any], wanted_selection: Mapping[str, Any] | None
) -> list[Difference]:
    """Where two recipes, and what chose their rows, differ; without a selection, recipes alone."""
    named = _codec_names(stored), _codec_names(wanted)
    of_recipes = differences(_without(stored, named), _without(wanted, named))
    changes = [replace(change, name=_OF_RECIPES.get(change.name, change.name)) for change in of_recipes]
    before, now = _together(*named)
    changes += differences(before, now, _CODECS)
    if wanted_selection is None:
        return changes
    selections = stored_selection, wanted_selection
    fits = [_asked_for(selection) for selection in selections]
    changes += differences(fits[0], fits[1], _CODECS)
    rows = [{name: value for name, value in selection.items() if name != FIT} for selection in selections]
    return changes + differences(rows[0], rows[1])


def _codec_names(recipe: Recipe) -> dict[str, str]:
    return {level.name: level.codec.name for level in recipe.levels}


def _without(recipe: Recipe, named: tuple[Mapping[str, str], Mapping[str, str]]) -> dict[str, Any]:
    """The document of a recipe, in which levels whose codecs have other names have none."""
    document: dict[str, Any] = recipe.model_dump(mode="json")
    if document["codec"].pop("dense_zstd_level", None) is not None:  # which is so where nobody asked for a level
        del document["codec"]["zstd_level"]
    for level in document["levels"]:
        if len({names.get(level["name"]) for names in named}) > 1:
            level.pop("codec", None)
    return document


def _together(stored: Mapping[str, str], wanted: Mapping[str, str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Codecs by the level of both, as settings: one name where all levels have it."""
    both = [name for name in stored if name in wanted]
    one, other = ({level: names[level] for level in both} for names in (stored, wanted))
    if len(set(one.values())) <= 1 and len(set(other.values())) <= 1:
        return {"name": next(iter(one.values()), None)}, {"name": next(iter(other.values()), None)}
    return {"levels": one}, {"levels": other}


def _asked_for(selection: Mapping[str, Any]) -> dict[str, Any]:
    """What codecs were fitted for, as settings; which levels, their codecs say."""
    fit: Mapping[str, Any] = selection.get(FIT) or {}
    return {_OF_FITS.get(name, name): value for name, value in fit.items() if name != "levels"}
