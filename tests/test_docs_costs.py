"""The tables of docs/costs.md are those that the counted figures give, and some of their cells by hand."""

from __future__ import annotations

import importlib.util
import json
import re
from types import ModuleType

import pytest

from dtpipe.pipeline.plan.arrays import ASSUMED_BY_STAGE
from parts.paths import REPO

PAGE = (REPO / "docs" / "costs.md").read_text(encoding="utf-8")
SCRIPT = REPO / "docs" / "site" / "cost_tables.py"


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("cost_tables", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(start: str, nth: int = 0) -> list[str]:
    """Cells of the nth row of the page that begins so."""
    return [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in PAGE.splitlines() if line.startswith(f"| {start}")
    ][nth]


def test_the_page_is_fresh(tables: ModuleType) -> None:
    assert tables.filled(PAGE) == PAGE, "run `python docs/site/cost_tables.py`"
    assert re.findall(r"<!-- (\w+) -->\n\|", PAGE) == list(tables.TABLES)


def test_bytes_of_an_adm_by_hand() -> None:
    """Channels times cells at strides 4 to 32 of 256 px, two bytes each, and an image of three bytes a pixel."""
    features = 2 * (512 * 64**2 + 512 * 32**2 + 1024 * 16**2 + 1024 * 8**2)
    images = json.loads((REPO / "benchmarks" / "results" / "images.json").read_text())["images"]
    share = images["coco98 at 256 px"]["codings"]["predicted"]["of_raw"]
    assert f"which zarr stores at {share:.2f} of three bytes a pixel" in PAGE
    sample = features + share * 3 * 256**2
    tight = share * 3 * 256**2 + features / float(row("zarr, zstd at level 3")[2])
    _, _, one, many, imagenet, coded = row("ADM, 256 px")
    assert one == f"{sample / 1e6:.2f} MB" and many == f"{sample / 1e4:.0f} GB"
    assert imagenet == f"{sample * 1.281167e-6:.2f} TB" and coded == f"{tight * 1.281167e-6:.2f} TB"


def test_hours_of_an_adm_by_hand() -> None:
    """973 GFLOP and a million images at 80 TFLOP/s; an H100 has 989 / 312 of an A100's peak."""
    *_, a100, h100 = row("ADM, 256 px", 1)
    seconds = 973e9 * 1e6 / 80e12
    assert a100 == f"{seconds / 3600:.1f} h" and h100 == f"{seconds * 312 / 989 / 3600:.1f} h"


def test_cores_of_a_coder_by_hand() -> None:
    """400 images a second, each of four levels in float16, at the MB/s of each level that the benchmark has."""
    levels = json.loads((REPO / "benchmarks" / "results" / "codec.json").read_text())["teachers"]["adm_256_shapes"]
    sizes = {"l2": 2 * 512 * 64**2, "l3": 2 * 512 * 32**2, "l4": 2 * 1024 * 16**2, "l5": 2 * 1024 * 8**2}
    busy_s = sum(400 * size / (1e6 * levels[name]["mb_s"]["rans_encode"]) for name, size in sizes.items())
    assert row("rans")[1] == f"{busy_s:.1f}" and float(row("rans")[2]) == pytest.approx(2 * busy_s, abs=0.1)


def test_what_the_codecs_arithmetic_takes_by_hand() -> None:
    """A whole image through numpy, of which one in 256 is; and through torch."""
    levels = json.loads((REPO / "benchmarks" / "results" / "codec.json").read_text())["teachers"]["adm_256_shapes"]
    sizes = {"l2": 2 * 512 * 64**2, "l3": 2 * 512 * 32**2, "l4": 2 * 1024 * 16**2, "l5": 2 * 1024 * 8**2}
    image_s = {
        work: sum(size / (1e6 * levels[name]["mb_s"][work]) for name, size in sizes.items())
        for work in ("decode", "device_encode", "device_decode")
    }
    assert row("measuring what codecs lose")[1] == f"{400 * image_s['decode'] / 256:.1f}"
    rates = f"encodes {1 / image_s['device_encode']:.1f} and decodes {1 / image_s['device_decode']:.1f} images a second"
    assert rates in PAGE


def test_from_when_on_cached_is_cheaper_by_hand() -> None:
    """Hours at 2 and terabytes at 25 were spent before the first epoch; each live epoch costs the hours again."""
    spent = 2 * 973e9 * 1_281_167 / 80e12 / 3600
    stored = 25 * float(row("ADM, 256 px")[4].split()[0])
    assert float(row("ADM, 256 px", 2)[1].split()[0]) == pytest.approx((spent + stored) / spent, abs=0.1)


def test_what_students_lose_is_what_was_measured() -> None:
    measured = json.loads((REPO / "benchmarks" / "results" / "codec_effect.json").read_text(encoding="utf-8"))
    means = {line["setting"]: line["mean"] for line in measured["contrasts"]}
    means |= {name: line["mean"] for name, line in measured["controls"].items()}
    losses = {name: 0.0 - round(mean, 3) for name, mean in means.items()}
    text = " ".join(PAGE.split())
    for name, loss in losses.items():
        if error := name.partition("transform ")[2]:
            assert re.search(rf"(At {error} it is {loss:.3f}|{loss:.3f} at (error )?{error})\b", text), name
    assert f"gains {losses['random initialisation']:.3f} IoU" in text
    assert f"draw of the noise costs {losses['another draw']:.3f}" in text
    assert min(line["p_holm"] for line in measured["contrasts"]) > 0.05 and len(measured["contrasts"]) == 7
    assert (measured["seeds"], measured["default"]["max_error"]) == (8, 0.2)
    assert all(line["within"] for line in measured["contrasts"])
    assert all(line["holds"] for line in measured["controls"].values())


def test_what_a_plan_assumes_is_what_was_measured(tables: ModuleType) -> None:
    """Of zarr, whose few overheads are in it; tars are planned with their headers apart."""
    measured = {"zstd 3": "zstd_3", "zstd 12": "zstd_12", "rans": "rans"}
    for stage, name in measured.items():
        for error, ratio in ASSUMED_BY_STAGE[stage].items():
            assert ratio == tables.CODECS[f"transform {error:g}"]["total_ratio"][name]
