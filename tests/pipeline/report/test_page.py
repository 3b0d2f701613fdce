"""The page: escaped, self-contained, figures in the page's own colour."""

from __future__ import annotations

import base64
import io
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_array_equal
from PIL import Image

from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import SYNTHESIZED
from dtpipe.pipeline.report.history import read_commands, record_command
from dtpipe.pipeline.report.maps import image_grid
from dtpipe.pipeline.report.page import data_uri, figures, images_fact, render, scores_of
from parts.paths import GOLDEN


def page(**changes: object) -> str:
    context: dict[str, object] = {
        "title": "a",
        "subtitle": "b",
        "facts": {},
        "scores": [],
        "curves": None,
        "curves_caption": "",
        "maps": None,
    }
    context |= {"samples": None, "commands": [], "datasets": [], "config": "", "notes": [], "version": "0"}
    return render(context | changes)


def test_values_are_escaped() -> None:
    html = page(title="<script>alert(1)</script>", commands=["dtpipe distill '<b>'"], notes=["a & b"])
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "a &amp; b" in html


def test_page_asks_for_no_other_file() -> None:
    html = page(samples={"image": data_uri(np.zeros((4, 4, 3), np.uint8)), "caption": "c", "width": 8})
    assert "http:" not in html
    assert "https:" not in html
    assert "url(" not in html
    assert "<link" not in html


def test_data_uri_holds_the_image() -> None:
    image = np.arange(48, dtype=np.uint8).reshape(4, 4, 3)
    head, _, body = data_uri(image).partition(",")
    assert head == "data:image/png;base64"
    assert_array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(body)))), image)


def test_figures_are_svg_in_the_pages_colour() -> None:
    curve = figures.curves({"loss": {"loss": ([1, 2, 3], [3.0, 2.0, 1.0])}, "rate": {"lr": ([1], [0.1])}}, log=["loss"])
    score = figures.scores(
        "x", [5, 20], {"raw pixels": [(0.1, 0.0), None], "distilled": [(0.2, 0.1), (0.4, 0.1)]}, "IoU"
    )
    for svg in (curve, score):
        assert ET.fromstring(svg).tag.endswith("svg")
        assert "currentColor" in svg
        assert figures.INK not in svg
    assert "distilled" in score


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


@pytest.mark.parametrize("content", ["", "[]", "{}", "[" * 100_000, '{"summaries": [{"level": "best"}]}'])
def test_scores_that_cannot_be_read_are_left_out_with_a_note(content: str, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "probe.json").write_text(content)
    (tmp_path / "eval" / "knn.json").mkdir()
    notes: list[str] = []
    assert scores_of(tmp_path, lambda what, err: notes.append(f"{what} left out: {err}")) == []
    assert [note.partition(": ")[0] for note in notes] == ["scores left out"] * 2
    assert f"{tmp_path}/eval/knn.json: is a folder, not a file; run `dtpipe eval` again" in notes[0]


def test_commands_that_a_kill_cut_short_are_left_out(tmp_path: Path) -> None:
    record_command(tmp_path)
    with (tmp_path / "commands.jsonl").open("a") as file:
        file.write('{"time": "2026-')
    assert len(read_commands(tmp_path)) == 1
