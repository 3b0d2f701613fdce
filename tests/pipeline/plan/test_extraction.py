"""Times of a plan are of work that is warm, and what they leave out is said."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from dtpipe.manifests.errors import DeviceMemoryError
from dtpipe.manifests.schema import Recipe
from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.plan import extraction, probe
from dtpipe.pipeline.plan.extraction import plan_extraction, print_extraction
from dtpipe.pipeline.plan.probe import Coding, Probe, time_trial_fit
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
    for name in ("encode_rows", "decode_on_device", "_start"):
        monkeypatch.setattr(probe, name, slow_at_first(getattr(probe, name)))
    plan = plan_extraction(make_config(batch_size=2))
    assert max(plan.code_s, plan.codec_s, plan.restore_s) < LOADING_S / 2 and plan.decode_s < LOADING_S


@pytest.mark.parametrize("asked", [{"max_error": 0.1}, {"budget": "2MB", "coder": "rans"}])
def test_times_of_codecs_that_are_to_be_fitted_are_of_a_fit_to_the_probe(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, asked: dict[str, Any]
) -> None:
    coded: list[dict[str, str]] = []
    encode_rows = probe.encode_rows

    def seen(recipe: Recipe, *args: Any) -> Any:
        coded.append({level.name: level.codec.name for level in recipe.levels})
        return encode_rows(recipe, *args)

    monkeypatch.setattr(probe, "encode_rows", seen)
    plan = plan_extraction(make_config(codec=asked))
    assert coded[0] == {"l2": "cast", "l3": "cast"}, "bytes are assumed of the plan's own"
    assert coded[-1] == {"l2": "transform", "l3": "transform"}
    assert min(plan.codec_s, plan.code_s, plan.decode_s, plan.restore_s) > 0
    assert plan.limits.img_s["one core per worker"] == pytest.approx(plan.workers / (plan.teacher_s + plan.codec_s))


def test_a_probe_without_a_finite_row_has_the_times_of_the_plans_own_codecs(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Coding] = []

    def spoiled(probed: Probe, *args: Any) -> Coding:
        levels = {name: level * float("nan") for name, level in probed.produced.levels.items()}
        coding = time_trial_fit(replace(probed, produced=replace(probed.produced, levels=levels)), *args)
        seen.extend([probed.coding, coding])
        return coding

    monkeypatch.setattr(extraction, "time_trial_fit", spoiled)
    plan_extraction(make_config(codec={"max_error": 0.1}))
    assert seen[0] == seen[1]


def test_a_plan_says_which_of_its_numbers_are_of_codecs_that_are_not_fitted_yet(
    make_config: MakeConfig, capsys: pytest.CaptureFixture[str]
) -> None:
    print_extraction(Console(), plan_extraction(make_config(codec={"max_error": 0.1})))
    shown = capsys.readouterr().out
    assert "the bytes below are assumed of them; the times above are of a fit to a few samples, and the fit" in shown
    assert "unfitted" not in shown


@pytest.mark.parametrize(("codec", "full_at"), [({}, "cast"), ({"max_error": 0.1}, "transform")])
def test_a_device_without_room_for_coding_is_said_in_a_sentence(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch, codec: dict[str, Any], full_at: str
) -> None:
    start = probe.CodedBatch.start

    def full(batch: probe.CodedBatch, features: Any, codecs: Any) -> None:
        if any(of_level.level.codec.name == full_at for of_level in codecs.values()):
            raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")
        start(batch, features, codecs)

    monkeypatch.setattr(probe.CodedBatch, "start", full)
    with pytest.raises(DeviceMemoryError, match="a first batch"):
        plan_extraction(make_config(codec=codec))


def test_the_memory_of_a_fit_counts_where_it_is_more_than_shards_take(
    make_config: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(extraction, "fit_memory_bytes", lambda *_: 10**12)
    assert plan_extraction(make_config(codec={"max_error": 0.1})).memory_bytes > 10**12
    assert plan_extraction(make_config()).memory_bytes < 10**12
