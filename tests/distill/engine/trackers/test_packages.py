"""W&B offline and MLflow in files, the packages themselves: what they stored is read back by their own readers."""

from __future__ import annotations

import json
import os
import signal
import struct
from pathlib import Path
from typing import Any

import pytest

from dtpipe.distill.engine.run_folder import read_metrics
from dtpipe.distill.engine.trackers.tracking import send_scores
from dtpipe.manifests.errors import ConfigError, StoppedError, StoreError
from parts.line import LineConfig, fit

pytestmark = pytest.mark.filterwarnings("ignore")  # the packages' own


def fit_in_two_parts(out: Path, tracker: str) -> None:
    """Twelve steps with a stop after six, and a score afterwards."""
    settings = LineConfig.model_validate({"run": {"out": str(out), "trackers": (tracker,), "project": "lines"}})
    with pytest.raises(StoppedError):
        fit(settings, lambda step: os.kill(os.getpid(), signal.SIGTERM) if step == 6 else None)
    fit(settings)
    send_scores(out, "eval", {"eval/probe/50": 0.75})


def wandb_records(path: Path) -> list[Any]:
    """What a .wandb file holds: records of W&B's own protobuf in LevelDB's log format, after a header of 7 bytes.

    Source: the log format of LevelDB: blocks of 32 KiB; crc32 (4), length (2) and kind (1: whole, 2 to 4: parts).
    """
    from wandb.proto import wandb_internal_pb2

    data, at, records, parts = path.read_bytes(), 7, [], b""
    while at + 7 <= len(data):
        if (room := 32768 - at % 32768) < 7:
            at += room
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            records.append(wandb_internal_pb2.Record.FromString(parts))
            parts = b""
    return records


def test_wandb_offline_gets_lines_settings_and_scores_under_one_id(tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb", reason="W&B's client is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    fit_in_two_parts(tmp_path, "wandb")
    wandb.teardown()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 3
    assert {file.stem.removeprefix("run-") for file in files} == {
        json.loads((tmp_path / "tracking.json").read_text())["id"]
    }
    records = [record for file in files for record in wandb_records(file)]
    runs = [record.run for record in records if record.HasField("run")]
    assert {run.project for run in runs} == {"lines"} and runs[0].job_type == "line"
    lines = [
        {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in record.history.item}
        for record in records
        if record.HasField("history")
    ]
    stored = read_metrics(tmp_path)
    assert [line["step"] for line in lines] == [line["step"] for line in stored] == list(range(1, 13))
    assert [line["loss"] for line in lines] == [line["loss"] for line in stored]
    updates = [item for record in records if record.HasField("summary") for item in record.summary.update]
    assert {(item.key, item.value_json) for item in updates} >= {("eval/probe/50", "0.75")}
    settings = [item for record in records if record.HasField("config") for item in record.config.update]
    assert any(item.key == "line" and json.loads(item.value_json)["lr"] == 0.02 for item in settings)


def test_wandb_that_nobody_logged_in_to_is_said_before_training(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="W&B's client is not installed")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    with pytest.raises(ConfigError, match=r"wandb is not set up: No API key configured.*WANDB_MODE=offline"):
        fit(LineConfig.model_validate({"run": {"out": str(tmp_path / "run"), "trackers": ("wandb",)}}))
    assert read_metrics(tmp_path / "run") == []


def test_mlflow_gets_lines_settings_and_scores_in_one_run(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="MLflow's client is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    fit_in_two_parts(tmp_path / "run", "mlflow")
    client = mlflow.MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("lines").experiment_id])
    assert run.info.run_name == f"{tmp_path.name}/run" and run.info.status == "FINISHED"
    assert run.data.params["line.lr"] == "0.02" and run.data.params["line.run.project"] == "lines"
    losses = client.get_metric_history(run.info.run_id, "loss")
    stored = read_metrics(tmp_path / "run")
    assert [(metric.step, metric.value) for metric in losses] == [(line["step"], line["loss"]) for line in stored]
    assert run.data.metrics["eval/probe/50"] == 0.75
    assert client.get_metric_history(run.info.run_id, "eval/probe/50")[0].step == 12


def test_mlflow_at_a_place_that_takes_no_runs_is_said_before_training(tmp_path, monkeypatch):
    pytest.importorskip("mlflow", reason="MLflow's client is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "gopher://nowhere")
    with pytest.raises(StoreError, match=r"mlflow cannot begin: .*; see what MLFLOW_TRACKING_URI names"):
        fit(LineConfig.model_validate({"run": {"out": str(tmp_path), "trackers": ("mlflow",)}}))
