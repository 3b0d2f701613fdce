"""A size keeps the form in which it was given, and has one reading."""

from __future__ import annotations

import json

import pytest
from pydantic import ValidationError

from dtpipe.manifests.schema import Size, StrictModel, height_width


class Settings(StrictModel):
    px: Size


@pytest.mark.parametrize(("given", "sides"), [(64, (64, 64)), ([32, 48], (32, 48))])
def test_a_size_is_the_side_of_a_square_or_height_and_width(given, sides):
    config = Settings(px=given)
    assert height_width(config.px) == sides
    assert json.loads(config.model_dump_json())["px"] == given


@pytest.mark.parametrize("given", [0, -8, [32], [32, 0], [32, 32, 3], "wide"])
def test_other_sizes_are_refused(given):
    with pytest.raises(ValidationError, match="px"):
        Settings(px=given)
