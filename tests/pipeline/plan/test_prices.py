"""Cached against live, by numbers that can be checked in the head."""

from __future__ import annotations

import pytest

from dtpipe.pipeline.cli.console import Console
from dtpipe.pipeline.plan.prices import CachedOrLive, PlanConfig, cached_or_live, print_prices

PRICES = PlanConfig(gpu_hour_price=2, tb_month_price=25, months=2)


def test_live_is_cheaper_below_the_epochs_that_pay_for_extraction_and_storage() -> None:
    """10 h at 2 and 1 TB at 25 for 2 months are 70; an epoch of 4 h more at 2 is 8: 8.75 epochs."""
    comparison = cached_or_live(PRICES, extraction_h=10, stored_tb=1, live_h_per_epoch=4, epochs=10)
    assert (comparison.extraction_price, comparison.storage_price) == (20, 50)
    assert comparison.live_price_per_epoch == 8
    assert comparison.live_until_epochs == 8.75
    assert comparison.equal_gpu_hour_price == pytest.approx(50 / 30)  # 10 p + 50 = 40 p
    assert comparison.equal_tb_month_price == pytest.approx(30)  # 20 + 2 p = 80


@pytest.mark.parametrize("name", ["gpu_hour_price", "tb_month_price"])
def test_at_the_price_that_is_said_both_cost_the_same(name: str) -> None:
    first = cached_or_live(PRICES, 3, 0.7, 1.3, 9)
    again = PRICES.model_copy(update={name: getattr(first, f"equal_{name}")})
    comparison = cached_or_live(again, 3, 0.7, 1.3, 9)
    assert comparison.live_until_epochs == pytest.approx(9)
    cached = comparison.extraction_price + comparison.storage_price
    assert cached == pytest.approx(9 * comparison.live_price_per_epoch)


def said(comparison: CachedOrLive, capsys: pytest.CaptureFixture[str]) -> str:
    print_prices(Console(), comparison, PRICES)
    return capsys.readouterr().out


def test_the_verdict_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    cached = said(cached_or_live(PRICES, 10, 1, 4, 10), capsys)
    assert "cached  20.00 for 10 h 00 min of workers, 50.00 for storage over 2 months, once" in cached
    assert "for 10 epochs cached is cheaper, while a worker hour costs over 1.67 and a TB-month under 30.00" in cached
    few = said(cached_or_live(PRICES, 10, 1, 4, 2), capsys)  # 2 epochs save less than the extraction takes
    assert "cheaper below 8.8 epochs of all runs together; for 2 epochs live is cheaper at any price" in few
    assert "for 3 epochs live is cheaper, while a worker hour costs under 25.00" in said(
        cached_or_live(PRICES, 10, 1, 4, 3), capsys
    )
    assert said(cached_or_live(PRICES, 10, 1, 4, None), capsys).count("epochs") == 1
    assert "stored features save no time" in said(cached_or_live(PRICES, 10, 1, 0, 10), capsys)
