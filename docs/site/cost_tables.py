"""The tables of docs/costs.md, from counted operations and bytes: `python docs/site/cost_tables.py` writes them again.

Bytes and operations are those of `benchmarks/results/preset_costs.json`, prices and ratios those of `dtpipe plan`.
Hours are operations over assumed rates; nothing here is timed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dtpipe.extract.shards.worker import MEASURED_OF_MANY
from dtpipe.pipeline.plan.arrays import ASSUMED_RATIOS
from dtpipe.pipeline.plan.prices import PlanConfig, cached_or_live

REPO = Path(__file__).parents[2]
PAGE = REPO / "docs" / "costs.md"


def result(name: str) -> dict[str, Any]:
    """What a benchmark found."""
    found: dict[str, Any] = json.loads((REPO / f"benchmarks/results/{name}.json").read_text(encoding="utf-8"))
    return found


COSTS = result("preset_costs")
MEASURED: dict[str, Any] = result("codec")["teachers"]
CODECS: dict[str, Any] = MEASURED["demo"]["codecs"]
ADM_LEVELS: dict[str, Any] = MEASURED["adm_256_shapes"]
IMAGE_SHARE: float = result("images")["images"]["coco98 at 256 px"]["codings"]["predicted"]["of_raw"]
"""Of an image's bytes, that zarr stores."""

NAMES = {
    "adm_256": "ADM, 256 px",
    "adm_bdd100k": "ADM of BDD100K, 128 x 256 px",
    "sd_1_4": "Stable Diffusion 1.4, 512 px",
    "biggan_256": "BigGAN, 256 px",
    "stylegan2_bdd100k": "StyleGAN2 of BDD100K, 512 x 1024 px",
}
IMAGENET = 1_281_167
PEAK_TFLOPS = {"T4": 65, "L4": 121, "A100": 312, "H100, H200": 989}
"""Of float16 with tensor cores, dense, as NVIDIA's data sheets have it."""
A100_TFLOPS = 80
"""That a teacher reaches on an A100, as the presets assume; other GPUs the same share of their peak."""
STAGES = {
    "zstd_3": "zarr, zstd at level 3: the default beside a GPU",
    "zstd_12": "zarr, zstd at level 12: the default on a CPU",
    "rans": "zarr, `-s extract.codec.coder=rans`",
    "tar_rans": "tars, `-s extract.codec.coder=rans`",
    "tar_npy": "tars, without it",
}
"""How the symbols of a fitted codec become bytes, as `benchmarks/codec.py` calls it."""
TIGHT = 0.03
"""The error that the tables compare with."""
EXTRACTED, READ = (400, 800), 2000
"""Images per second of a GPU that extracts, and of one that trains."""


def image_bytes(teacher: Mapping[str, Any]) -> int:
    """Of one image, 8 bits and three colours."""
    return 3 * int(teacher["image_px"][0]) * int(teacher["image_px"][1])


def stored_bytes(teacher: Mapping[str, Any], views: int, error: float | None = None) -> float:
    """Of one sample: the image as zarr has it, and its features in float16, or under codec transform at an error."""
    features = float(teacher[f"bytes_{views}"]) - image_bytes(teacher)
    return IMAGE_SHARE * image_bytes(teacher) + features / (1 if error is None else ASSUMED_RATIOS[error])


def gflop(teacher: Mapping[str, Any]) -> float:
    """Of one view: to the last level that is read, and the VAE before it."""
    return float(teacher["gflop"]["tapped"] + teacher["gflop"].get("vae", 0))


def hours(teacher: Mapping[str, Any], num: int, tflops: float) -> float:
    """Of one GPU, for one view of so many images."""
    return num * gflop(teacher) / (1000 * tflops) / 3600


def bytes_table() -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [
        ["teacher", "channels at l2, l3, l4, l5", "a sample", "100,000", "ImageNet", f"ImageNet at error {TIGHT}"]
    ]
    for name, label in NAMES.items():
        teacher = COSTS["teachers"][name]
        one = stored_bytes(teacher, 1)
        channels = ", ".join(str(level[0]) for level in teacher["levels"].values())
        tight = stored_bytes(teacher, 1, TIGHT)
        rows.append(
            [label, channels, f"{one / 1e6:.2f} MB", size(1e5 * one), size(IMAGENET * one), size(IMAGENET * tight)]
        )
    return rows


def hours_table() -> list[Sequence[str]]:
    rates = {gpu: A100_TFLOPS * peak / PEAK_TFLOPS["A100"] for gpu, peak in PEAK_TFLOPS.items()}
    rows: list[Sequence[str]] = [
        ["teacher", "GFLOP", *rates],
        ["assumed TFLOP/s", "", *(f"{rate:.0f}" for rate in rates.values())],
    ]
    for name, label in NAMES.items():
        teacher = COSTS["teachers"][name]
        times = [f"{hours(teacher, 1_000_000, rate):.2g} h" for rate in rates.values()]
        rows.append([label, f"{gflop(teacher):.0f}", *times])
    return rows


def codec_table() -> list[Sequence[str]]:
    rows: list[Sequence[str]] = [["share that may be lost", *(f"{error:g}" for error in ASSUMED_RATIOS)]]
    for stage, label in STAGES.items():
        measured = [CODECS[f"transform {error:g}"]["total_ratio"][stage] for error in ASSUMED_RATIOS]
        rows.append([label, *(f"{ratio:.3g}" for ratio in measured)])
    return rows


def seconds_of(stage: str) -> float:
    """Of a core, for one image of ADM-256's levels, by what `benchmarks/codec.py` times."""
    return float(sum(2 * math.prod(level["shape"]) / level["mb_s"][stage] / 1e6 for level in ADM_LEVELS.values()))


def coder_table() -> list[Sequence[str]]:
    extracted = [f"extracting {rate} img/s" for rate in EXTRACTED]
    rows: list[Sequence[str]] = [["coder", *extracted, f"training with {READ} img/s"]]
    for coder, label in {"zstd_3": "zstd at level 3", "rans": "rans"}.items():
        times = [rate * seconds_of(f"{coder}_encode") for rate in EXTRACTED]
        rows.append([label, *(f"{time:.1f}" for time in times), f"{READ * seconds_of(f'{coder}_decode'):.1f}"])
    measured = [rate / MEASURED_OF_MANY * seconds_of("decode") for rate in EXTRACTED]
    rows.append(["measuring what codecs lose", *(f"{time:.1f}" for time in measured), ""])
    return rows


def live_table() -> list[Sequence[str]]:
    prices = PlanConfig()
    rows: list[Sequence[str]] = [["teacher", "as float16", f"at error {TIGHT}"]]
    for name, label in NAMES.items():
        teacher = COSTS["teachers"][name]
        once = hours(teacher, IMAGENET, A100_TFLOPS)
        epochs = [
            cached_or_live(
                prices, once, IMAGENET * stored_bytes(teacher, 1, error) / 1e12, once, None
            ).live_until_epochs
            for error in (None, TIGHT)
        ]
        rows.append([label, *(f"{number:.1f} epochs" for number in epochs if number is not None)])
    return rows


def size(num_bytes: float) -> str:
    """Three digits, in GB or TB."""
    return f"{num_bytes / 1e12:.3g} TB" if num_bytes >= 1e12 else f"{num_bytes / 1e9:.3g} GB"


TABLES: dict[str, Callable[[], list[Sequence[str]]]] = {
    "bytes": bytes_table,
    "codec": codec_table,
    "coder": coder_table,
    "hours": hours_table,
    "live": live_table,
}
PLACE = re.compile(r"(<!-- (\w+) -->\n)(.*?)(<!-- end -->)", re.DOTALL)


def filled(text: str) -> str:
    """The page with its tables as they should be."""

    def table(match: re.Match[str]) -> str:
        head, *rows = TABLES[match[2]]()
        lines = [head, ["---"] * len(head), *rows]
        return match[1] + "".join(f"| {' | '.join(line)} |\n" for line in lines) + match[4]

    return PLACE.sub(table, text)


if __name__ == "__main__":
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
