"""Times of a plan are of work that is warm, and what they leave out is said."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest

from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.plan import extraction
from dtpipe.pipeline.plan.extraction import plan_extraction, print_extraction
from parts.extractions import MakeConfig

LOADING_S = 0.5


def slow_at_first(function: Callable[..., Any]) -> Callable[..., Any]:
    """As one whose first call compiles or loads something."""
    calls: list[None] = []

    def call(*args: Any) -> Any:
        if not calls:
            time.sleep(LOADING_S)
        calls.append(None)
        return function(*args)

    return call


def test_what_is_loaded_once_is_not_counted_for_each_image(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("encode_rows", "decode_level"):
        monkeypatch.setattr(extraction, name, slow_at_first(getattr(extraction, name)))
    plan = plan_extraction(make_config(batch_size=2))
    assert plan.code_s < LOADING_S / 2 and plan.decode_s < LOADING_S


def test_a_plan_says_which_of_its_numbers_are_of_codecs_that_are_not_fitted_yet(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    print_extraction(Console(), plan_extraction(make_config(codec={"max_error": 0.1})))
    shown = capsys.readouterr().out
    assert "the bytes below are assumed of them; fitting, and coding by them, are not in the time above" in shown
    assert "unfitted" not in shown
