"""Cached against live, in money: what an extraction and its storage cost, and what a live teacher costs instead.

Pure arithmetic on hours, terabytes and prices. Prices are settings; the defaults are round numbers, not offers.
"""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import Field

from dtpipe.manifests.schema import StrictModel
from dtpipe.pipeline.cli.console import Console, format_seconds


class PlanConfig(StrictModel):
    """What a plan assumes of prices and of the place of the dataset."""

    gpu_hour_price: float = Field(
        default=2.0, ge=0, description="Price of an hour of one worker: a GPU, or a machine without one."
    )
    tb_month_price: float = Field(default=25.0, ge=0, description="Price of a terabyte for a month.")
    months: float = Field(default=1.0, gt=0, description="How long the dataset is kept.")
    disk_mb_s: float = Field(default=1000.0, gt=0, description="Speed of a disk or mount, for reading and writing.")
    network_mb_s: float = Field(default=250.0, gt=0, description="Speed of an object store, the same.")


@dataclass(frozen=True)
class CachedOrLive:
    """What cached features cost beside a teacher that runs in every epoch; in the unit of the prices."""

    extraction_h: float
    """Hours of workers, all together."""
    extraction_price: float
    storage_price: float
    live_price_per_epoch: float
    """What an epoch with the live teacher costs more than one from stored features."""
    live_until_epochs: float | None
    """Live is cheaper below so many epochs, of all runs together; None: always."""
    epochs: int | None
    """Those that are planned; the next two are for them."""
    equal_gpu_hour_price: float | None = None
    """Live is cheaper below this price; None: whatever it is."""
    equal_tb_month_price: float | None = None
    """Live is cheaper above this price; None: whatever it is."""


def cached_or_live(
    prices: PlanConfig, extraction_h: float, stored_tb: float, live_h_per_epoch: float, epochs: int | None
) -> CachedOrLive:
    """`extraction_h`: of workers; `live_h_per_epoch`: hours that an epoch takes longer with the live teacher."""
    storage_per_tb = prices.months * stored_tb
    per_epoch = live_h_per_epoch * prices.gpu_hour_price
    cached = extraction_h * prices.gpu_hour_price + storage_per_tb * prices.tb_month_price
    saved_h = 0.0 if epochs is None else epochs * live_h_per_epoch - extraction_h
    return CachedOrLive(
        extraction_h=extraction_h,
        extraction_price=extraction_h * prices.gpu_hour_price,
        storage_price=storage_per_tb * prices.tb_month_price,
        live_price_per_epoch=per_epoch,
        live_until_epochs=cached / per_epoch if per_epoch > 0 else None,
        epochs=epochs,
        equal_gpu_hour_price=storage_per_tb * prices.tb_month_price / saved_h if saved_h > 0 else None,
        equal_tb_month_price=saved_h * prices.gpu_hour_price / storage_per_tb if saved_h > 0 < storage_per_tb else None,
    )


def print_prices(console: Console, comparison: CachedOrLive, prices: PlanConfig) -> None:
    """What cached and live cost, and from when on which is cheaper."""
    cached = (
        f"{_price(comparison.extraction_price)} for {format_seconds(3600 * comparison.extraction_h)} of workers, "
        f"{_price(comparison.storage_price)} for storage over {prices.months:g} month"
        f"{'' if prices.months == 1 else 's'}"
    )
    console.pairs(
        {
            "cached": f"{cached}, once",
            "live": f"{_price(comparison.live_price_per_epoch)} per epoch more; {_verdict(comparison)}",
            "prices": f"{prices.gpu_hour_price:g} per worker hour, {prices.tb_month_price:g} per TB-month, as in "
            "plan.gpu_hour_price and plan.tb_month_price, in any currency; examples, so set your own",
        }
    )


def _verdict(comparison: CachedOrLive) -> str:
    if comparison.live_until_epochs is None:
        return "live is cheaper, for stored features save no time"
    below = f"cheaper below {comparison.live_until_epochs:.1f} epochs of all runs together"
    if comparison.epochs is None:
        return below
    cheaper = "live" if comparison.epochs < comparison.live_until_epochs else "cached"
    gpu, tb = comparison.equal_gpu_hour_price, comparison.equal_tb_month_price
    if gpu is None or tb is None:
        return f"{below}; for {comparison.epochs} epochs {cheaper} is cheaper at any price"
    one, other, link = ("over", "under", "and") if cheaper == "cached" else ("under", "over", "or")
    return (
        f"{below}; for {comparison.epochs} epochs {cheaper} is cheaper, while a worker hour costs {one} {_price(gpu)} "
        f"{link} a TB-month {other} {_price(tb)}"
    )


def _price(value: float) -> str:
    return f"{value:,.2f}" if value >= 0.005 or value == 0 else f"{value:.2g}"
