"""Which of GPU, cores, disk and network binds: images per second that each would let through, and the least of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Limits:
    """Images per second by what would bind, without the others."""

    img_s: Mapping[str, float]

    @property
    def binding(self) -> str:
        """What lets through least."""
        return min(self.img_s, key=lambda name: self.img_s[name])

    @property
    def rate(self) -> float:
        """What comes through."""
        return self.img_s[self.binding]

    def text(self) -> str:
        """In words: what binds, then the others."""
        others = sorted((value, name) for name, value in self.img_s.items() if name != self.binding)
        rest = ", ".join(f"{name} {_rate(value)}" for value, name in others)
        return f"bound by {self.binding}, at {_rate(self.rate)} img/s" + (
            f"; the others would allow, in img/s: {rest}" if rest else ""
        )

    def record(self) -> dict[str, Any]:
        """As plain values."""
        return {"binding": self.binding, "img_s": dict(self.img_s)}


def extraction_limits(
    *,
    on_gpu: bool,
    workers: int,
    cpus: int,
    decode_threads: int,
    code_threads: int,
    teacher_s: float,
    prepare_s: float,
    code_s: float,
    stored_bytes: float,
    store: tuple[str, float],
) -> Limits:
    """Seconds are of one image and thread; `store`: what the dataset is written to, and its MB/s."""
    on_cores = prepare_s + code_s + (0.0 if on_gpu else teacher_s)
    name, mb_s = store
    rates = {
        "GPU" if on_gpu else "one core per worker": workers / teacher_s,
        "cores": cpus / on_cores,
        "decode threads": workers * decode_threads / prepare_s,
        "code threads": workers * code_threads / code_s,
        name: mb_s * 1e6 / stored_bytes,
    }
    return Limits(rates)


def training_limits(
    *,
    on_gpu: bool,
    cpus: int,
    step_img_s: float,
    decode_s: float,
    restore_s: float,
    read_bytes: float,
    store: tuple[str, float],
) -> Limits:
    """Bytes and seconds of one sample as training reads it, its image and one view of each level: `decode_s` of a
    thread, `restore_s` of the device that trains.
    """
    name, mb_s = store
    device_s = 1 / step_img_s + restore_s
    if on_gpu:
        rates = {"GPU": 1 / device_s} | ({"cores": cpus / decode_s} if decode_s else {})
    else:
        rates = {"cores": 1 / (device_s + decode_s / cpus)}
    return Limits(rates | ({name: mb_s * 1e6 / read_bytes} if read_bytes else {}))


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"
