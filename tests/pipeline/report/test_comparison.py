"""Several runs on one page: what differs, curves and scores together, maps of the same images."""

from __future__ import annotations

import json
import re
import shutil
from html import unescape
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from scipy.stats import ttest_rel

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.downstream.result import ProbeResult, Score
from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.records.document import write_document
from dtpipe.pipeline.cli.main import main
from dtpipe.pipeline.config import ReportConfig
from dtpipe.pipeline.report.comparison import differing, run_names
from dtpipe.pipeline.report.section import Notes
from dtpipe.pipeline.report.tasks.merged import merged, merged_sections
from dtpipe.pipeline.report.tasks.results import read_result
from parts.memory import tiny_config


def report(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["report", *map(str, arguments)])


def table(values: dict[str, tuple[float, ...]], num_test: int = 9) -> ProbeResult:
    scores = [Score(arm, "head", 5, seed, value) for arm, each in values.items() for seed, value in enumerate(each)]
    return ProbeResult("segment", "mIoU", num_test, tuple(scores), ("a note",), "", "distilled", "random")


RANDOM = (0.2, 0.3, 0.25)
ONE = table({"random": RANDOM, "distilled": (0.5, 0.4, 0.6)})
OTHER = table({"random": RANDOM, "teacher": (0.7,), "distilled": (0.4, 0.2, 0.5)})


def write(run: Path, result: ProbeResult, images: str = "scenes") -> Path:
    path = run / "eval" / "segment.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_document(path, json.loads(json.dumps(result.to_json() | {"config": {"images": images}})), "")
    return path


def test_runs_are_named_by_what_tells_their_paths_apart() -> None:
    assert run_names(["runs/a", "runs/b"]) == ["a", "b"]
    assert run_names(["x/a/run", "x/b/run", "y/b/run"]) == ["x/a/run", "x/b/run", "y/b/run"]
    assert run_names(["/a/run", "/b/run"]) == ["a/run", "b/run"]
    with pytest.raises(ConfigError, match=r"runs/\.\./runs/a is given twice|runs/a is given twice"):
        run_names(["runs/a", "runs/b", "runs/a"])


def test_settings_that_differ_are_listed_and_those_of_the_machine_are_not() -> None:
    one = {"lr": 1e-3, "student": {"name": "a", "pretrained": False}, "levels": None, "run": {"out": "x"}}
    other = {"lr": 2e-3, "student": {"name": "a", "pretrained": True}, "levels": ["l2", "l3"], "run": {"out": "y"}}
    assert differing([one, other]) == {
        "lr": ["0.001", "0.002"],
        "student.pretrained": ["False", "True"],
        "levels": ["default", "l2, l3"],
    }
    assert differing([one, one]) == {}


def test_tables_of_one_task_are_merged_and_equal_rivals_stand_once(tmp_path: Path) -> None:
    found = merged({"a": read_result(write(tmp_path / "a", ONE)), "b": read_result(write(tmp_path / "b", OTHER))})
    assert {arm: cells[5].values for arm, cells in found.arms.items()} == {
        "random": RANDOM,
        "teacher": (0.7,),
        "distilled, a": (0.5, 0.4, 0.6),
        "distilled, b": (0.4, 0.2, 0.5),
    }
    assert list(found.arms)[-2:] == list(found.subjects) == ["distilled, a", "distilled, b"]
    expected = ttest_rel((0.5, 0.4, 0.6), (0.4, 0.2, 0.5)).confidence_interval(0.95)
    (difference,) = found.differences
    assert (difference.arm, difference.other) == found.subjects
    assert (difference.low, difference.high) == pytest.approx((expected.low, expected.high))
    assert found.verdicts[0].startswith("distilled, a against distilled, b: ")


def test_rivals_that_scored_otherwise_stand_for_each_run(tmp_path: Path) -> None:
    changed = table({"random": (0.2, 0.3, 0.26), "distilled": (0.4, 0.2, 0.5)})
    found = merged({"a": read_result(write(tmp_path / "a", ONE)), "b": read_result(write(tmp_path / "b", changed))})
    assert list(found.arms) == ["random, a", "distilled, a", "random, b", "distilled, b"]


@pytest.mark.parametrize(("other", "images"), [(OTHER, "photographs"), (table({"distilled": (0.5,)}, 10), "scenes")])
def test_scores_on_other_images_are_not_merged(other: ProbeResult, images: str, tmp_path: Path) -> None:
    write(tmp_path / "a", ONE)
    write(tmp_path / "b", other, images)
    runs = {name: tmp_path / name for name in "ab"}
    sections = list(merged_sections(runs, ReportConfig(run=("x",)), Notes(pytest.fail)))
    assert [section.title for section in sections] == ["segment: mIoU (only a)", "segment: mIoU (only b)"]


@pytest.mark.parametrize(
    ("changed", "num_sections"),
    [({"seed": 1}, 2), ({"tune": {"steps": 9}}, 2), ({"tune": {"steps": 8, "run": {"workers": 2}}}, 1)],
)
def test_other_draws_or_recipes_are_not_merged(changed: dict[str, object], num_sections: int, tmp_path: Path) -> None:
    settings = {"images": "scenes", "seed": 0, "tune": {"steps": 8, "run": {"workers": 0}}}
    for name, own in (("a", settings), ("b", settings | changed)):
        path = write(tmp_path / name, ONE)
        write_document(path, json.loads(json.dumps(ONE.to_json() | {"config": own})), "")
    runs = {name: tmp_path / name for name in "ab"}
    assert len(list(merged_sections(runs, ReportConfig(run=("x",)), Notes(pytest.fail)))) == num_sections


# --- whole pages -----------------------------------------------------------------------------------------------------


def test_a_page_of_two_runs_has_every_part(small_run: Path, other_run: Path, tmp_path: Path) -> None:
    runs = [tmp_path / "a", tmp_path / "b"]
    for run, copy, result in zip((small_run, other_run), runs, (ONE, OTHER), strict=True):
        shutil.copytree(run, copy)
        write(copy, result)
    done = report(*runs, "--num-images", 2, "-s", "report.cluster_images=4")
    assert (done.exit_code, done.stdout.strip()) == (0, f"wrote {runs[0]}/comparison.html")
    assert "left out" not in done.stderr
    html = (runs[0] / "comparison.html").read_text()
    assert re.findall("<h2>(.*?)</h2>", html) == [
        *("Settings", "segment: mIoU", "Training", "Feature maps", "Segmentation maps"),
        *("How a was made", "How b was made"),
    ]
    assert re.findall('<tr><td class="soft">lr</td><td>(.*?)</td><td>(.*?)</td></tr>', html) == [("0.001", "0.002")]
    last = [f"{read_metrics(run)[-1]['loss']:.3f}" for run in runs]
    assert f'<td class="soft">loss</td><td>{last[0]}</td><td>{last[1]}</td>' in html
    assert "R² of l2" in html and "R² of the regressor's output" in unescape(html)
    assert re.findall("<tr><th>image</th><th></th>(.*?)</tr>", html) == ["<th>teacher</th><th>a</th><th>b</th>"] * 2
    levels = 2
    assert html.count("data:image/png;base64,") == 2 * 2 * (1 + 3 * levels)
    assert not re.search(r'(src|href)="(?!data:|#)', html)


def test_runs_without_common_images_are_compared_without_maps(small_run: Path, ddpm: Path, tmp_path: Path) -> None:
    from dtpipe.distill.trainer import train
    from parts.memory import MemorySource, write_dataset

    url = write_dataset(tmp_path / "features", MemorySource())
    train(DistillConfig.model_validate(tiny_config(tmp_path / "b", datasets=(str(url),), epochs=1).model_dump()))
    done = report(small_run, tmp_path / "b", "--out", tmp_path / "page.html")
    assert done.exit_code == 0
    assert "maps left out: no image is in all of run, b; a page for each shows its own" in done.stderr
    html = (tmp_path / "page.html").read_text()
    assert "Feature maps</h2>" not in html and "Training</h2>" in html


def test_a_run_that_lost_its_data_is_left_out_of_the_maps(small_run: Path, other_run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "damaged"
    shutil.copytree(other_run, copy)
    (copy / "last.pt").write_bytes(b"x")
    done = report(small_run, copy, "--out", tmp_path / "page.html", "--num-images", 1)
    assert done.exit_code == 0
    assert "maps of damaged left out: " in done.stderr
    assert "<th>teacher</th><th>run</th></tr>" in (tmp_path / "page.html").read_text()


def test_what_is_no_run_or_stands_twice_is_refused_in_a_sentence(small_run: Path, tmp_path: Path) -> None:
    for arguments, code, said in (
        ([small_run, tmp_path], 3, f"{tmp_path}: no run of `dtpipe distill` is here"),
        ([small_run, small_run], 2, f"{small_run} is given twice; name each run once"),
        ([], 2, "RUN|FEATURES..."),
    ):
        done = report(*arguments)
        assert done.exit_code == code
        (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert said in error
    assert not (small_run / "comparison.html").exists()


def test_a_settings_file_may_name_one_run(small_run: Path, tmp_path: Path) -> None:
    (tmp_path / "settings.yaml").write_text(f"report: {{run: {small_run}, num_images: 1, timesteps: []}}")
    assert report("-c", tmp_path / "settings.yaml", "--out", tmp_path / "page.html").exit_code == 0
