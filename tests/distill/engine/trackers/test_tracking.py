"""A run is one run to its trackers, however often it is stopped; and no tracker can stop it."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from dtpipe.distill.engine.run_folder import RunFolder, read_metrics
from dtpipe.distill.engine.trackers.base import TrackedRun, TrackerKind
from dtpipe.distill.engine.trackers.config import Tracking
from dtpipe.distill.engine.trackers.registry import TRACKERS
from dtpipe.distill.engine.trackers.tracking import send_scores
from dtpipe.manifests.errors import MissingPackageError, StoppedError
from parts.line import LineConfig, fit, run_settings


class Recorder:
    """Keeps what it is told; `failing` methods raise, as a server does that is out of reach."""

    def __init__(self, run: TrackedRun, failing: str = "") -> None:
        self.run, self.failing = run, failing
        self.lines: list[dict[str, Any]] = []
        self.scores: dict[str, float] = {}
        self.at = -1
        self.outcome = ""

    def add(self, record):
        if self.failing == "add":
            raise ConnectionError("no route to host")
        self.lines.append(dict(record))

    def conclude(self, scores, step):
        self.scores, self.at = dict(scores), step

    def close(self, outcome):
        if self.failing == "close":
            raise ConnectionError("no route to host")
        self.outcome = outcome


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The parts that tracker `recorder` has seen."""
    seen: list[Recorder] = []

    def begin(run: TrackedRun) -> Recorder:
        seen.append(Recorder(run))
        return seen[-1]

    monkeypatch.setitem(TRACKERS, "recorder", TrackerKind("recorder", "Keeps it.", begin))
    return seen


def config(out: Path, **run: Any) -> LineConfig:
    return LineConfig.model_validate({"run": {"out": str(out), **run}})


def stop_at(step: int):
    return lambda at: os.kill(os.getpid(), signal.SIGTERM) if at == step else None


def test_a_run_that_is_stopped_and_goes_on_is_one_run_with_all_its_lines(tmp_path, parts):
    settings = config(tmp_path / "r50", trackers=("recorder",), project="lines")
    with pytest.raises(StoppedError):
        fit(settings, stop_at(6))
    fit(settings)
    first, second = parts
    assert [first.outcome, second.outcome] == ["stopped", "finished"]
    assert first.run.run_id == second.run.run_id and len(first.run.run_id) >= 8
    assert second.run.first_step == 7 and second.run.project == "lines"
    assert first.run.name == f"{tmp_path.name}/r50" and first.run.kind == "line"
    assert first.run.config == {"line": settings.model_dump(mode="json")}
    stored = read_metrics(tmp_path / "r50")
    assert [*first.lines, *second.lines] == stored and len(stored) == 12


def test_a_copy_without_the_id_is_another_run(tmp_path, parts):
    for name in ("one", "other"):
        fit(config(tmp_path / name, trackers=("recorder",)))
    assert parts[0].run.run_id != parts[1].run.run_id


@pytest.mark.parametrize("failing", ["add", "close"])
def test_a_tracker_that_fails_is_left_out_which_is_said_once(tmp_path, parts, monkeypatch, caplog, failing):
    broken = TrackerKind("broken", "Fails.", lambda run: Recorder(run, failing))
    monkeypatch.setitem(TRACKERS, "broken", broken)
    result = fit(config(tmp_path / "run", trackers=("broken", "recorder")))
    assert result.step == 12 and parts[0].outcome == "finished"
    assert len(parts[0].lines) == len(read_metrics(tmp_path / "run")) == 12
    warnings = [record.getMessage() for record in caplog.records if "broken" in record.getMessage()]
    assert warnings == ["tracker broken fails and is left out from here on, ConnectionError: no route to host"]


def test_a_run_that_fails_is_marked_so(tmp_path, parts):
    with pytest.raises(Exception, match="straighten it"):
        fit(config(tmp_path, trackers=("recorder",), poisoned=0, save_every=1))
    assert parts[0].outcome == "failed"


def test_scores_that_come_later_are_shown_in_the_same_run(tmp_path, parts):
    send_scores(tmp_path, "eval", {"eval/probe/50": 0.5})  # of no tracked run
    fit(config(tmp_path / "run", trackers=("recorder",)))
    send_scores(tmp_path / "run", "eval", {"eval/probe/50": 0.5})
    trained, scored = parts
    assert scored.run.run_id == trained.run.run_id
    assert (scored.scores, scored.at, scored.outcome) == ({"eval/probe/50": 0.5}, 12, "finished")


def test_a_run_without_trackers_has_no_file_of_theirs(tmp_path):
    fit(config(tmp_path))
    assert not (tmp_path / "tracking.json").exists()


def test_an_unknown_tracker_is_refused_with_the_names_there_are(tmp_path):
    with pytest.raises(ValidationError, match=r"no tracker 'wandbb'; choose from tensorboard, wandb, mlflow"):
        config(tmp_path, trackers=("wandbb",))


def test_the_older_setting_is_one_of_the_trackers():
    assert Tracking(tensorboard=True, trackers=("wandb",)).tracker_names == ("wandb", "tensorboard")
    assert Tracking(tensorboard=True, trackers=("tensorboard",)).tracker_names == ("tensorboard",)


@pytest.mark.parametrize(
    ("name", "package"), [("tensorboard", "torch.utils.tensorboard"), ("wandb", "wandb"), ("mlflow", "mlflow")]
)
def test_a_package_that_is_not_installed_is_said_before_training(tmp_path, monkeypatch, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with (
        RunFolder.open(run_settings(config(tmp_path))) as folder,
        pytest.raises(MissingPackageError, match=rf"pip install 'dtpipe\[{name}\]'"),
    ):
        folder.take_up(0, Tracking(trackers=(name,)))


def test_tensorboard_gets_the_scalars_of_each_line_and_a_resumed_run_purges_what_it_takes_again(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, lines in ((0, (2, 4, 6)), (4, (6, 8))):
        with RunFolder.open(run_settings(config(tmp_path))) as folder:
            folder.take_up(first, Tracking(tensorboard=True))
            for step in lines:
                folder.log(
                    {"step": step, "num_steps": 8, "loss": step / 2 + first, "share/data": 0.25, "advice": "none"}
                )
            folder.conclude({"score": 0.5})
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "score", "share/data"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(2, 1.0), (4, 2.0), (6, 7.0), (8, 8.0)]
    assert [(event.step, event.value) for event in events.Scalars("score")][-1] == (8, 0.5)
    assert [record["step"] for record in read_metrics(tmp_path)] == [2, 4, 6, 8]


def test_the_id_is_sealed_as_the_other_records_are(tmp_path, parts):
    fit(config(tmp_path, trackers=("recorder",)))
    text = (tmp_path / "tracking.json").read_text()
    assert json.loads(text)["id"] == parts[0].run.run_id
