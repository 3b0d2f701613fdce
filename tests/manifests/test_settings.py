"""Two halves of settings: what must stay the same, and how settings recorded before there were halves are read."""

from __future__ import annotations

from typing import ClassVar

from dtpipe.manifests.schema import Settings, StrictModel


class Run(StrictModel):
    out: str
    workers: int = 1


class Baking(Settings):
    PLACES: ClassVar[frozenset[str]] = frozenset({"flour"})
    flour: str
    minutes: int = 40
    run: Run


def test_the_identity_is_what_determines_the_result() -> None:
    one = Baking(flour="shelf", minutes=30, run=Run(out="tin"))
    other = Baking(flour="cellar", minutes=30, run=Run(out="plate", workers=3))
    assert one.identity() == other.identity() == {"minutes": 30}


def test_settings_recorded_side_by_side_read_as_two_halves() -> None:
    flat = {"flour": "shelf", "minutes": 30, "out": "tin", "workers": 3}
    config = Baking.model_validate(Baking.in_halves(flat))
    assert config == Baking(flour="shelf", minutes=30, run=Run(out="tin", workers=3))
    assert Baking.in_halves(config.model_dump()) == config.model_dump()
    assert Baking.identity_of({"out": "tin"}) == {}


def test_a_field_that_never_was_is_not_taken_for_one_of_run() -> None:
    assert Baking.in_halves({"oven": 2}) == {"oven": 2, "run": {}}
