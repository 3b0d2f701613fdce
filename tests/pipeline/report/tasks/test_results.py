"""Result files of every version are read as what they say; others are left out with a note."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.stats import bootstrap, ttest_1samp

from dtpipe.distill.downstream.result import ProbeResult, Score
from dtpipe.manifests.records.document import write_document
from dtpipe.pipeline.report.tasks.results import Cell, read_result, task_results
from dtpipe.pipeline.report.tasks.section import task_section


def score(arm: str, value: float, num: int = 5, seed: int = 0, **others: Any) -> Score:
    return Score(arm, "l3", num, seed, value, best=True, **others)


def write(run: Path, result: ProbeResult, name: str = "readout", **others: Any) -> Path:
    """As `dtpipe eval` does."""
    path = run / "eval" / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_document(path, json.loads(json.dumps(result.to_json() | others)), "")
    return path


def test_an_old_result_is_read_as_its_table_says(tmp_path: Path) -> None:
    values = {"raw pixels": (0.1, 0.2, 0.4), "distilled": (0.5, 0.4, 0.6)}
    scores = [score(arm, value, seed=seed) for arm, each in values.items() for seed, value in enumerate(each)]
    other = Score("distilled", "l2", 5, 0, 0.9)  # not the chosen level
    result = ProbeResult(
        "readout", "foreground IoU", 49, (*scores, other, score("distilled", 0.7, num=20)), ("a note",)
    )
    found = read_result(write(tmp_path, result))
    assert (found.task, found.metric, found.num_test, found.numbers) == ("readout", "foreground IoU", 49, [5, 20])
    assert {arm: cells[5].values for arm, cells in found.arms.items()} == values
    for summary in result.summaries():
        if summary.level == "best":
            cell = found.arms[summary.extractor][summary.num_labelled]
            assert (cell.mean, cell.std) == (summary.mean, summary.std)
    assert found.notes == ("a note",) and found.verdicts == () and found.frozen


def test_the_headline_differences_and_verdict_are_those_that_eval_prints(tmp_path: Path) -> None:
    scores = [
        replace(score(arm, value + seed / 50 + shift, seed=seed, others={"AP": value / 2}), level=level, best=best)
        for arm, value in (("rival", 0.3), ("mine", 0.4))
        for seed in range(3)
        for level, best, shift in (("fixed", False, 0.0), ("l3", True, 0.2))
    ]
    result = ProbeResult("probe", "accuracy", 9, (*scores,), (), "all levels, one l2", "mine", "rival")
    found = read_result(write(tmp_path, result))
    assert found.arms["mine"][5].values == pytest.approx((0.4, 0.42, 0.44))
    assert found.chosen["mine"][5].values == pytest.approx((0.6, 0.62, 0.64))
    assert found.others["AP"]["rival"][5].values == (0.15, 0.15, 0.15)
    assert found.differences == tuple(result.differences())
    assert found.verdicts == (result.verdict(),)
    html = task_section(found, "").html
    printed = result.to_table()
    for line in re.findall(r"^(?:rival|mine) +([-+0-9]\S*.*)$", printed, re.MULTILINE):
        assert f'<td class="num">{line}' in html  # with a spread of the other scores, too
    assert f'<p class="verdict">{result.verdict()}</p>' in html
    assert "all levels, one l2" in html and '<tr class="ours"><td>mine</td>' in html
    assert "paired by seed, with 95% intervals" in html
    alone = replace(result, scores=tuple(one for one in scores if not one.seed))
    html = task_section(read_result(write(tmp_path, alone)), "").html
    assert "one seed, no interval" in html and "95% intervals" not in html


def cell_of(values: Sequence[float]) -> Cell:
    return Cell(dict(enumerate(values)))


def test_intervals_are_those_of_students_t() -> None:
    values = (0.41, 0.48, 0.44, 0.52, 0.47)
    expected = ttest_1samp(values, 0).confidence_interval(0.95)
    assert cell_of(values).interval() == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert cell_of([0.4]).interval() is None
    rough = bootstrap((np.array(values),), np.mean, rng=0).confidence_interval
    low, high = cell_of(values).interval() or (0, 0)
    assert low < rough.low < rough.high < high  # five values: the bootstrap is too narrow


def test_classes_are_read_from_lists_and_from_tables(tmp_path: Path) -> None:
    lists = [score("raw pixels", 0.1, seed=seed, settings={"iou_by_class": [0.9, 0.1 * seed]}) for seed in (0, 2)]
    path = write(tmp_path, ProbeResult("readout", "foreground IoU", 9, tuple(lists)))
    assert read_result(path).by_class == {"IoU": {"raw pixels": {5: {"class 0": 0.9, "class 1": pytest.approx(0.1)}}}}
    named = write(tmp_path, ProbeResult("readout", "mIoU", 9, tuple(lists)), classes=["sky", "sea"])
    assert list(read_result(named).by_class["IoU"]["raw pixels"][5]) == ["sky", "sea"]
    document = json.loads(path.read_text())
    for seed, entry in enumerate(document["scores"]):
        entry["by_class"] = {"AP": {"cat": None, "dog": 0.5 + seed}}
    path.unlink()
    write_document(path, {name: value for name, value in document.items() if name != "checksum"}, "")
    assert read_result(path).by_class["AP"] == {"raw pixels": {5: {"cat": None, "dog": 1.0}}}


@pytest.mark.parametrize(
    "content",
    [
        *("", "[]", "{}", "[" * 100_000, '{"scores": [{"best": true}]}', '{"scores": []}', '{"scores": [3]}'),
        '{"task": "a", "metric": "b", "num_test": 3, "scores": []}',
        '{"task": "a", "metric": "b", "num_test": 3, "scores": [{"best": true, "extractor": "x", "num_labelled": 5, '
        '"seed": 0, "value": NaN}]}',
    ],
)
def test_files_that_are_no_results_are_left_out_with_a_note(content: str, tmp_path: Path) -> None:
    (tmp_path / "eval").mkdir()
    (tmp_path / "eval" / "probe.json").write_text(content)
    (tmp_path / "eval" / "knn.json").mkdir()
    notes: list[str] = []
    assert task_results(tmp_path, lambda what, err: notes.append(f"{what} left out: {err}")) == []
    assert [note.partition(": ")[0] for note in notes] == ["scores left out"] * 2
    assert f"{tmp_path}/eval/knn.json: is a folder, not a file; run `dtpipe eval` again" in notes[0]


def test_a_run_without_results_has_none(tmp_path: Path) -> None:
    assert task_results(tmp_path, lambda what, err: pytest.fail(f"{what} {err}")) == []


# --- on the page -----------------------------------------------------------------------------------------------------


def test_the_verdict_stands_before_the_table_which_marks_ours(tmp_path: Path) -> None:
    scores = [score(arm, 0.25 + seed / 8, seed=seed) for arm in ("raw <pixels>", "distilled") for seed in (0, 1)]
    path = write(tmp_path, ProbeResult("segment", "mIoU", 1, (*scores,)), verdict="It <helps>.")
    section = task_section(read_result(path), "")
    html = section.html
    assert section.title == "segment: mIoU"
    assert html.index("It &lt;helps&gt;.") < html.index("<table>") < html.index("<svg")
    assert "<td>raw &lt;pixels&gt;</td>" in html and "<pixels>" not in html
    assert '<tr class="ours"><td>distilled</td><td class="num">0.312 ± 0.088</td>' in html
    assert "1 held-out image; mean ± standard deviation of 2 seeds" in html


def test_many_classes_and_arms_are_cut_to_those_that_differ_and_that_is_said(tmp_path: Path) -> None:
    def table(shift: float) -> dict[str, float]:
        return {f"c{idx}": 0.5 + (shift if idx in (7, 60) else 0) for idx in range(80)}

    arms = [f"rival {idx}" for idx in range(7)]
    scores = [score(arm, 0.1 * idx) for idx, arm in enumerate([*arms, "distilled"])]
    result = ProbeResult("segment", "mIoU", 9, tuple(scores)).to_json()
    for idx, entry in enumerate(result["scores"]):
        entry["by_class"] = {"IoU": table(0.01 * idx)}
    path = tmp_path / "x.json"
    write_document(path, result, "")
    html = task_section(read_result(path), "").html
    bars = html[html.index("IoU by class") :]
    assert "24 of 80 classes, those in which the arms differ most" in bars
    assert ">c7<" in bars and ">c60<" in bars
    assert [arm for arm in [*arms, "distilled"] if f">{arm}<" in bars] == [*arms[3:], "distilled"]
