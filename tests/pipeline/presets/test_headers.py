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
from parts.paper_runs import ABLATIONS, BASES, COLUMNS, PRESETS, TABLE_17, Run, header
from parts.paths import REPO

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
    assert {name} <= {value for values in named for value in values}
    if name in COLUMNS:
        presets = [*COLUMNS[name].presets]
        assert named == [presets, presets, [*presets, "cached"]]  # the paper's form, and the cached one
    if name in ABLATIONS:
        assert {values[0] for values in named} == set(BASES)


UNITS = {"GFLOP": 1e9, "TFLOP/s": 1e12, "GB/s": 1e9, "B": 1.0}
RESULTS = {"h": 3600.0, "TB": 1e12}
SUM = re.compile(r"([\d(][\d. ()x+/A-Za-z]*?) = ([\d.]+) (h|TB)\b")


def worth(text: str) -> float:
    """A product such as `2 views x 973 GFLOP / (8 x 80 TFLOP/s)` in seconds or bytes."""
    numbers = re.sub(r"([\d.]+) (GFLOP|TFLOP/s|GB/s|B)\b", lambda found: repr(float(found[1]) * UNITS[found[2]]), text)
    bare = re.sub(r"\b(views|epochs|images)\b", "", numbers).replace(" x ", " * ")
    assert re.fullmatch(r"[\d.e+*/() ]+", bare), text
    return float(eval(bare))


@pytest.mark.parametrize("name", [*COLUMNS, "table10"])
def test_sums_in_the_header_are_right(name: str) -> None:
    sums = SUM.findall(" ".join(header(name)))
    num_teacher = 4 if name == "table6_sd14" else 2  # of its two networks, live and once
    num = {"TB": 0, "h": 1} if name == "table10" else {"TB": 1, "h": num_teacher + 2}
    assert {unit: [each for *_, each in sums].count(unit) for unit in num} == num
    for text, result, unit in sums:
        assert worth(text) / RESULTS[unit] == pytest.approx(float(result), rel=0.05), text  # of two digits


@pytest.mark.parametrize("name", COLUMNS)
def test_sums_in_the_header_are_of_this_run(name: str) -> None:
    run, text = COLUMNS[name].run, "\n".join(header(name))
    views, teacher = 2 if run.flips else 1, COSTS["teachers"][run.costs]
    student = COSTS["students"][f"{run.student}/{run.costs.replace('icgan', 'biggan')}/{run.regressor}"]
    tapped = f"{teacher['gflop']['tapped']:g} GFLOP"
    assert f"Reference: {run.epochs} epochs x {run.num} x {tapped} / " in text
    assert f"{run.epochs} epochs x {run.num} x {student['gflop']:g} GFLOP / " in text
    assert f"Cached: {teacher[f'bytes_{views}']} B x {run.num} images" in text
    assert (f"{views} views x {tapped} x {run.num} / " if run.flips else f"  {run.num} x {tapped} / ") in text
    assert f"{run.epochs} epochs x {run.num} x {teacher['bytes_1']} B / 10 GB/s" in text
    assert "Hardware: " in text and "A100 of 80 GB" in text and "Estimates, not measured" in text


@pytest.mark.parametrize("name", COLUMNS)
def test_headers_say_what_the_cached_form_saves_and_departs_from(name: str) -> None:
    run, text = COLUMNS[name].run, " ".join(header(name))
    found = re.search(r"saves (\d+) h", text)
    assert found is not None
    teacher = [float(result) for each, result, unit in SUM.findall(text) if unit == "h" and _of_teacher(each, run)]
    half = len(teacher) // 2
    assert float(found[1]) == pytest.approx(sum(teacher[:half]) - sum(teacher[half:]), abs=1)
    if run.flips:
        assert f"repeated {run.epochs} times" in text and NOISE_SHARES[run.timestep or 0] in text
    else:
        assert (
            f"{run.num} images are repeated {run.epochs} times, in place of {run.num * run.epochs / 1e6:.0f} million"
            in text
        )


@pytest.mark.parametrize("name", TABLE_17)
def test_the_page_of_recipes_repeats_the_sums(name: str) -> None:
    [row] = [
        line for line in (REPO / "docs" / "recipes.md").read_text().splitlines() if line.startswith(f"| `{name}`,")
    ]
    sums = [f"{result} {unit}" for _, result, unit in SUM.findall(" ".join(header(name)))]
    assert re.findall(r"[\d.]+ (?:h|TB)", row) == sums


def _of_teacher(sum_text: str, run: Run) -> bool:
    gflop = COSTS["teachers"][run.costs]["gflop"]
    return any(f" {gflop[part]:g} GFLOP" in f" {sum_text}" for part in ("tapped", "vae") if part in gflop)


NOISE_SHARES = {50: "4, 5, 3 and 2 %", 150: "12, 15, 8 and 5 %", 250: "18, 22, 12 and 9 %"}
"""Of the variance of l2 to l5 of the whitened targets, the part that one frozen draw makes; measured on flowers64."""


def test_the_cached_preset_says_what_is_noise_at_each_timestep() -> None:
    text = " ".join(" ".join(header("cached")).split())
    assert NOISE_SHARES[50] + " (l2 to l5) at T = 50" in text
    assert all(f"{NOISE_SHARES[timestep]} at T = {timestep}" in text for timestep in (150, 250))


@pytest.mark.parametrize("table", ABLATIONS)
def test_tables_quote_the_papers_figures(table: str) -> None:
    [line] = [line for line in header(table) if line.startswith("Paper: ")]
    assert re.findall(r"\d\d\.\d", line) == [f"{paper:.1f}" for *_, paper in ABLATIONS[table]]
    assert "box mAP, BDD100K instance segmentation." in line


@pytest.mark.parametrize("name", [name for name, row in COLUMNS.items() if row.run.teacher])
def test_counted_bytes_are_those_of_the_published_teacher(name: str) -> None:
    run = COLUMNS[name].run
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
