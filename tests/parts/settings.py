"""Settings with some fields replaced, whichever half they stand in."""

from __future__ import annotations

from typing import TypeVar

from dtpipe.manifests.schema import Settings

S = TypeVar("S", bound=Settings)


def changed(config: S, **changes: object) -> S:
    """The settings with other values; checked, as `model_copy` does not."""
    return build(type(config), config.model_dump(), **changes)


def build(model: type[S], fields: dict[str, object], **changes: object) -> S:
    """Settings of fields by name, those of `run` beside the others; later ones win."""
    return model.model_validate(model.in_halves({**model.in_halves(fields), **changes}))
