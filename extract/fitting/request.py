"""From settings to what is to be fitted, and to the bytes of what was: what `extract.codec` asks for, where it can be
had.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from dtpipe.extract.config import ExtractRecipeConfig
from dtpipe.extract.fitting.base import DEFAULT_MAX_ERROR, FitRequest
from dtpipe.manifests.codecs.registry import is_fitted_codec
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.schema import CodecRecipe, LevelSpec, Recipe
from dtpipe.manifests.words import parse_bytes

ZSTD_BESIDE_CPU: Final = 12  # a teacher there is slower: all but a fiftieth of what level 19 gains, at thrice its speed
ZSTD_BESIDE_GPU: Final = 3  # ten times as fast, and no GPU waits for it


def codec_recipe(config: ExtractRecipeConfig, levels: Sequence[LevelSpec], device: str) -> CodecRecipe:
    """How stored arrays become bytes. Raises: ConfigError for a level of zstd that nothing has."""
    codec, symbols_level = config.codec, None
    if config.shard.format == "zarr" and codec.coder == "zstd" and _fitted(config, levels):
        symbols_level = codec.zstd_level or (ZSTD_BESIDE_CPU if device == "cpu" else ZSTD_BESIDE_GPU)
    elif codec.zstd_level is not None:
        raise ConfigError(
            f"extract.codec.zstd_level is {codec.zstd_level}, of symbols that are fitted and lie in zarr under the "
            "coder zstd, and there are none; leave it out"
        )
    if config.shard.zstd_level is not None:
        return CodecRecipe(zstd_level=config.shard.zstd_level, symbols_zstd_level=symbols_level)
    dense = 0 if config.shard.format == "zarr" else None
    return CodecRecipe(symbols_zstd_level=symbols_level, dense_zstd_level=dense)


def fit_request(config: ExtractRecipeConfig, recipe: Recipe) -> FitRequest | None:
    """What is to be fitted before the plan; None where no level has a codec that is. Raises: ConfigError."""
    codec = config.codec
    fitted = _fitted(config, recipe.levels)
    if not fitted:
        if codec.coder != "zstd":
            raise ConfigError(
                f"extract.codec.coder is {codec.coder}, whose tables are fitted, and no level has a codec that is; set "
                "extract.codec.max_error or extract.codec.budget, or leave coder out"
            )
        if codec.max_error is not None or codec.budget is not None:
            raise ConfigError(
                f"extract.codec gives {'a budget' if codec.max_error is None else 'max_error'}, and no level has a "
                "codec that is fitted for one; leave extract.codec.name out, or set it to transform"
            )
        return None
    max_error = None if codec.budget else codec.max_error or DEFAULT_MAX_ERROR
    budget = parse_bytes(codec.budget) if codec.budget else None
    return FitRequest(fitted, max_error, budget, codec.fit_samples, config.source.seed, codec.coder)


def _fitted(config: ExtractRecipeConfig, levels: Sequence[LevelSpec]) -> Mapping[str, str]:
    """The codec of each level that has one to be fitted."""
    named = {level.name: config.codec.name_for(level.name) for level in levels if level.role == "features"}
    return {level: name for level, name in named.items() if is_fitted_codec(name)}
