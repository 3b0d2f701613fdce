"""What a dataset that is gone on with differs in is named as a person sets it."""

from __future__ import annotations

from typing import Any

import pytest

from dtpipe.manifests.schema import CodecRecipe, CodecSpec, Recipe
from dtpipe.manifests.write.settings import settings_that_differ
from parts.datasets import make_recipe
from parts.memory import level_spec

FIT = {"levels": {"l2": "transform", "l3": "transform"}, "max_error": 0.03, "samples": 512}
ASKED: dict[str, Any] = {"limit": None, "fit": FIT}


def recipe(l2: str, l3: str | None = None, **changes: Any) -> Recipe:
    """Levels under codecs; what was fitted has its parameters."""
    levels = [
        level_spec(name, stride, 4, codec=CodecSpec(name=codec, parameters={"k": 2} if codec == "transform" else {}))
        for name, stride, codec in (("l2", 4, l2), ("l3", 8, l3 or l2))
    ]
    return make_recipe(levels=tuple(levels), **changes)


@pytest.mark.parametrize(
    ("stored", "wanted", "asked", "now", "said"),
    [
        (recipe("cast"), recipe("cast"), {}, {}, []),
        (recipe("transform"), recipe("transform"), ASKED, {**ASKED, "fit": {**FIT, "max_error": 0.1}},
         ["extract.codec.max_error: 0.03 -> 0.1"]),
        (recipe("transform"), recipe("transform"), ASKED,
         {**ASKED, "fit": {"levels": FIT["levels"], "budget_bytes": 7, "samples": 9}},
         ["extract.codec.budget: not set -> 7", "extract.codec.fit_samples: 512 -> 9",
          "extract.codec.max_error: 0.03 -> not set"]),
        (recipe("transform"), recipe("cast"), ASKED, {"limit": None},
         ['extract.codec.name: "transform" -> "cast"', "extract.codec.fit_samples: 512 -> not set",
          "extract.codec.max_error: 0.03 -> not set"]),
        (recipe("cast"), recipe("cast", "int8"), {}, {"limit": 8},
         ['extract.codec.levels.l3: "cast" -> "int8"', "limit: not set -> 8"]),
        (recipe("cast"), recipe("cast", codec=CodecRecipe(zstd_level=9)), {}, None,
         ["extract.shard.zstd_level: 3 -> 9"]),
        (recipe("cast"), recipe("cast", codec=CodecRecipe(symbols_zstd_level=12)), {}, None,
         ["extract.codec.zstd_level: not set -> 12"]),
        (recipe("cast"), recipe("cast", codec=CodecRecipe(dense_zstd_level=0)), {}, None,
         ["extract.shard.zstd_level: 3 -> not set"]),
        (recipe("cast", codec=CodecRecipe(dense_zstd_level=0)), recipe("cast", codec=CodecRecipe(zstd_level=0)), {}, {},
         ["extract.shard.zstd_level: not set -> 0"]),
        (recipe("cast"), recipe("int8", noise_seed=3), {}, {},
         ["noise_seed: 0 -> 3", 'extract.codec.name: "cast" -> "int8"']),
    ],
)  # fmt: skip
def test_codecs_are_named_by_their_settings(
    stored: Recipe, wanted: Recipe, asked: dict[str, Any], now: dict[str, Any] | None, said: list[str]
) -> None:
    assert [str(change) for change in settings_that_differ(stored, wanted, asked, now)] == said


def test_a_codec_of_the_same_name_with_other_parameters_is_seen() -> None:
    """As of soft labels, whose codec is not fitted."""
    one, other = recipe("cast"), recipe("cast")
    levels = [level.model_copy(update={"codec": CodecSpec(name="topk", parameters={"k": k})}) for k, level in
              ((2, one.levels[0]), (3, one.levels[0]))]  # fmt: skip
    pair = [
        made.model_copy(update={"levels": (level, made.levels[1])})
        for made, level in zip((one, other), levels, strict=True)
    ]
    assert [str(change) for change in settings_that_differ(*pair, {}, {})] == ["levels[0].codec.parameters.k: 2 -> 3"]
