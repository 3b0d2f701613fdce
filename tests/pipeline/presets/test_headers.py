"""Presets open with commands that parse and sums that add up, of figures that `benchmarks/preset_costs.py` counts."""

from __future__ import annotations

import json
import re
import shlex
from itertools import pairwise

import click
import pytest
from click.testing import CliRunner

from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.cli.names import published
from dtpipe.pipeline.cli.settings import preset_names
from parts.paper_runs import PAPER, PRESETS, ROWS, RUNS, configs, header

COSTS = json.loads((PRESETS.parents[1] / "benchmarks" / "results" / "preset_costs.json").read_text())


@pytest.mark.parametrize("name", preset_names())
def test_the_first_line_is_what_list_shows(name: str) -> None:
    first, blank = header(name)[:2]
    assert first.endswith(".") and len(first) <= 140 and not blank
    shown = CliRunner().invoke(main, ["list", "presets", "--match", name]).stdout
    assert shown == f"presets:\n  {name} {first}\n"


@pytest.mark.parametrize("name", preset_names())
def test_commands_in_the_header_parse_and_name_the_preset(name: str) -> None:
    text = "\n".join(header(name)).replace("\\\n", " ")
    lines = [
        line.split()
        for line in text.splitlines()
        if line.startswith("  ") and " dtpipe " in f" {line}" and "`" not in line
    ]
    commands = [words[words.index("dtpipe") + 1 :] for words in lines]
    assert commands
    group = click.Context(main, info_name="dtpipe", **main.context_settings)
    for words in commands:
        command = main.get_command(group, words[0])
        assert command is not None
        command.make_context(words[0], shlex.split(" ".join(words))[1:], parent=group)
    named = [[value for flag, value in pairwise(words) if flag == "-c"] for words in commands]
    if name == "ablation":
        assert named == [["ablation"], ["ablation", "table8_pafpn"]]
    else:
        alone = ["ablation"] if "extracted once" in text else configs(name)
        assert named == ([alone, configs(name)] if len(named) == 2 else [configs(name)])


UNITS = {"GFLOP": 1e9, "TFLOP/s": 1e12, "GB/s": 1e9, "B": 1.0}
RESULTS = {"h": 3600.0, "TB": 1e12}
SUM = re.compile(r"([\d(][\d. ()x+/A-Za-z]*?) = ([\d.]+) (h|TB)\b")


def worth(text: str) -> float:
    """A product such as `2 views x 973 GFLOP / (8 x 80 TFLOP/s)` in seconds or bytes."""
    numbers = re.sub(r"([\d.]+) (GFLOP|TFLOP/s|GB/s|B)\b", lambda found: repr(float(found[1]) * UNITS[found[2]]), text)
    bare = re.sub(r"\b(views|epochs|images)\b", "", numbers).replace(" x ", " * ")
    assert re.fullmatch(r"[\d.e+*/() ]+", bare), text
    return float(eval(bare))


@pytest.mark.parametrize("name", RUNS)
def test_sums_in_the_header_are_right(name: str) -> None:
    sums = SUM.findall(" ".join(header(name)))
    assert [unit for *_, unit in sums].count("TB") == 1
    assert [unit for *_, unit in sums].count("h") == (4 if name == "table6_sd14" else 3)
    for text, result, unit in sums:
        assert worth(text) / RESULTS[unit] == pytest.approx(float(result), rel=0.05), text  # of two digits


@pytest.mark.parametrize("name", RUNS)
def test_sums_in_the_header_are_of_this_run(name: str) -> None:
    run, text = RUNS[name], "\n".join(header(name))
    views, teacher = 2 if run.flips else 1, COSTS["teachers"][run.costs]
    student = COSTS["students"][f"{run.student}/{run.costs.replace('icgan', 'biggan')}/{run.regressor}"]
    assert f"Disk: {teacher[f'bytes_{views}']} B x {run.num} images" in text
    assert f"{run.epochs} epochs x {run.num} x {teacher['bytes_1']} B / 10 GB/s" in text
    assert f"{run.epochs} epochs x {run.num} x {student['gflop']:g} GFLOP / " in text
    tapped = f"{teacher['gflop']['tapped']:g} GFLOP"
    assert tapped in text and f"{run.num}" in text.split("Extraction: ")[1].splitlines()[0]
    if run.encoding == "ddim_inversion":
        assert f"({run.timestep // 10} x {teacher['gflop']['whole']:g} GFLOP + {tapped})" in text  # type: ignore[operator]
    assert "Hardware: " in text and "A100 of 80 GB" in text and "Estimates, not measured" in text


@pytest.mark.parametrize("name", PAPER)
def test_rows_quote_the_papers_figure(name: str) -> None:
    assert f"Paper: {PAPER[name]} box mAP, BDD100K instance segmentation." in header(name)


def test_figures_of_the_ablations_are_complete() -> None:
    assert set(PAPER) == {name for name in ROWS if not name.startswith("table6")}


@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.teacher])
def test_counted_bytes_are_those_of_the_published_teacher(name: str) -> None:
    run = RUNS[name]
    [found] = [each for each in published() if each.name == run.teacher]
    image = 3 * run.px[0] * run.px[1]
    counted = COSTS["teachers"][run.costs]
    assert (counted["bytes_1"], counted["bytes_2"]) == (found.size_bytes, 2 * found.size_bytes - image)


def test_counted_bytes_of_own_teachers_are_those_by_hand() -> None:
    """uint8 image, float16 maps at strides 4 to 32: channels by the paper's multipliers and StyleGAN2's widths."""
    cells = 128 * 256 // 16
    adm = 2 * (256 * cells + 256 * cells // 4 + 384 * cells // 16 + 512 * cells // 64)
    assert COSTS["teachers"]["adm_bdd100k"]["bytes_2"] == 3 * 128 * 256 + 2 * adm
    cells = 512 * 1024 // 16
    gan = 2 * (256 * cells + 512 * cells // 4 + 512 * cells // 16 + 512 * cells // 64)
    assert COSTS["teachers"]["stylegan2_bdd100k"]["bytes_1"] == 3 * 512 * 1024 + gan
