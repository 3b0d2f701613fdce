"""The codecs there are, and setting them up for the levels of a recipe."""

from __future__ import annotations

from dtpipe.manifests.codecs import cast, int8, topk, transform
from dtpipe.manifests.codecs.base import Codec, FittedArrays, LevelCodec
from dtpipe.manifests.codecs.fitted import NOT_FITTED
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import LevelSpec, Recipe

CODECS: dict[str, Codec] = {codec.name: codec for codec in (cast.CODEC, int8.CODEC, topk.CODEC, transform.CODEC)}


def open_codec(level: LevelSpec, fitted: FittedArrays = NOT_FITTED) -> LevelCodec:
    """The codec of a level; without `fitted`, to ask what it stores.

    Raises: ConfigError listing the choices, or as the codec does for its parameters.
    """
    if level.codec.name not in CODECS:
        raise ConfigError(
            f"codec {level.codec.name!r} of level {level.name} is unknown; choose one of {', '.join(sorted(CODECS))}"
        )
    return CODECS[level.codec.name].open(level, fitted)


def level_codecs(recipe: Recipe, fitted: FittedArrays = NOT_FITTED) -> dict[str, LevelCodec]:
    """The codec of each level, by name. Raises: as `open_codec`."""
    return {level.name: open_codec(level, fitted) for level in recipe.levels}


def is_fitted_codec(name: str) -> bool:
    """True for a codec that is fitted before a plan; what there is none of, too, is not."""
    return name in CODECS and CODECS[name].fit is not None
