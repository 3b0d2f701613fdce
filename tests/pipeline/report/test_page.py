"""The page: escaped, self-contained, figures in the page's own colour."""

from __future__ import annotations

import base64
import io
import re
import shutil
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from markupsafe import escape
from numpy.testing import assert_array_equal
from PIL import Image

from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import SYNTHESIZED
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report import figures
from dtpipe.pipeline.report.history import read_commands, record_command
from dtpipe.pipeline.report.maps.sections import image_grid
from dtpipe.pipeline.report.page import whole_page, write_report
from dtpipe.pipeline.report.provenance import images_fact
from dtpipe.pipeline.report.section import Section, data_uri, render
from parts.paths import GOLDEN


def test_values_are_escaped() -> None:
    facts = Section("<h>", render("provenance.html", commands=["dtpipe distill '<em>'"], datasets=[], config=""))
    html = whole_page("<script>alert(1)</script>", "b", {"<i>": "<u>"}, [facts], ["a & b"])
    assert not re.search("<(script|h|em|i|u)>", html)
    assert "&lt;script&gt;" in html and "&#39;&lt;em&gt;&#39;" in html
    assert "a &amp; b" in html


def test_page_asks_for_no_other_file_and_has_every_part(small_run: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    config = ReportConfig(run=str(small_run), out=str(tmp_path / "page.html"), num_images=2, cluster_images=3)
    html = write_report(config, notes.append).read_text()
    assert re.findall("<h2>(.*?)</h2>", html) == [
        *("Training", "Feature maps", "Segmentation maps", "Nearest neighbours", "Activation maps", "How it was made"),
    ]
    assert notes == []
    outside = re.sub("<svg.*?</svg>", "", html, flags=re.DOTALL)
    assert not re.search("https?:|url\\(|<link|<script", outside)
    assert not re.search(r'(src|href)="(?!data:|#)', html)
    levels, timesteps, neighbours = 2, 4, 5
    assert html.count("data:image/png;base64,") == 2 * (
        (1 + 3 * levels) + (1 + 3 * levels) + (1 + 2 * neighbours) + (1 + (timesteps + 3) * levels)
    )


def test_damaged_records_are_left_out_with_a_note(small_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(small_run, run)
    (run / "last.pt").write_bytes(b"nothing")
    (run / "metrics.jsonl").write_text("{}\n{}\n")
    (run / "commands.jsonl").write_text("x\nx\n")
    notes: list[str] = []
    html = write_report(ReportConfig(run=str(run)), notes.append).read_text()
    assert sorted({note.partition(" left out: ")[0] for note in notes}) == [
        *("commands", "feature maps", "training curves"),
    ]
    assert all(re.search(re.escape(str(escape(note))), html) for note in notes)
    assert "How it was made" in html and "Training</h2>" not in html


def test_maps_of_a_gone_teacher_are_left_out_with_a_note(small_run: Path, ddpm: Path, tmp_path: Path) -> None:
    notes: list[str] = []
    aside = ddpm.rename(tmp_path / "aside")
    try:
        config = ReportConfig(run=str(small_run), out=str(tmp_path / "page.html"), num_images=1)
        html = write_report(config, notes.append).read_text()
        silent = config.model_copy(update={"timesteps": ()})
        asked_for_none = write_report(silent, lambda note: pytest.fail(note)).read_text()
    finally:
        aside.rename(ddpm)
    (note,) = notes
    assert note.startswith(f"activation maps of the teacher left out: {ddpm}")
    for page in (html, asked_for_none):
        table = page.partition("Activation maps</h2>")[2].partition("</table>")[0]
        rows = re.findall(r'<td class="soft">([\w ]+)</td>', table)
        assert rows == ["teacher", "regressor", "backbone"]


def test_data_uri_holds_the_image() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    head, _, body = data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))), image)


def test_figures_are_svg_in_the_pages_colour() -> None:
    curve = figures.curves({"loss": {"loss": ([1, 2, 3], [3.0, 2.0, 1.0])}, "rate": {"lr": ([1], [0.1])}}, log=["loss"])
    rows = {"raw pixels": [(0.1, 0.1, 0.1), None], "distilled": [(0.2, 0.1, 0.3), (0.4, 0.3, 0.5)]}
    score = figures.scores("x", [5, 20], rows, "IoU")
    bars = figures.bars("x", ["cat", "dog"], {"raw pixels": [0.1, None], "distilled": [0.2, 0.3]}, "IoU")
    for svg in (curve, score, bars):
        assert ET.fromstring(svg).tag.endswith("svg")
        assert "currentColor" in svg
        assert figures.INK not in svg
    assert "distilled" in score and "dog" in bars


def test_a_synthesized_datasets_images_are_the_teachers() -> None:
    recipe = FeatureDataset.open(str(GOLDEN / "v1_zarr")).recipe
    made = recipe.model_copy(update={"source": recipe.source.model_copy(update={"kind": SYNTHESIZED})})
    size = f"{recipe.transform.width}x{recipe.transform.height} px"
    assert (images_fact(recipe), images_fact(made)) == (
        f"{size}, {recipe.transform.resize}",
        f"{size}, made by the teacher",
    )


def test_curves_start_at_step_nought() -> None:
    """A short run has one line of metrics; without a common beginning its steps would be fractions."""
    svg = figures.curves({"rate": {"lr": ([14], [0.1])}})
    ticks = re.findall(r">([\d.]+)</text>", svg)
    assert {"0", "14"} <= set(ticks) and not {tick for tick in ticks if tick.startswith("13")}


def test_tile_places_images_by_row() -> None:
    images = np.stack([np.full((2, 3, 3), idx, np.uint8) for idx in range(5)])
    grid = image_grid(images, columns=2, gap=1)
    assert grid.shape == (3 * 2 + 2, 2 * 3 + 1, 3)
    assert [int(grid[0, 0, 0]), int(grid[0, 4, 0]), int(grid[3, 0, 0]), int(grid[6, 0, 0])] == [0, 1, 2, 4]
    assert grid[6, 4, 0] == 255


def test_commands_that_a_kill_cut_short_are_left_out(tmp_path: Path) -> None:
    record_command(tmp_path)
    with (tmp_path / "commands.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    assert len(read_commands(tmp_path)) == 1
