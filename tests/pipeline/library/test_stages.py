"""`dtpipe.extract`, `distill`, `evaluate` and `load_backbone` do what the commands do, and nothing ends the process."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

import dtpipe
from dtpipe.manifests.errors import ConfigError, DtpipeError, InputError, StoppedError
from dtpipe.pipeline import evaluate as evaluation
from dtpipe.pipeline.report.history import read_commands
from parts.command_line import RefusedError, said
from parts.images import write_images

SMALL = {
    "extract.shard.samples": 8,
    "extract.batch_size": 8,
    "extract.run.inline": True,
}
TINY = {"distill.regressor.width": 8, "distill.epochs": 2, "distill.run.log_every": 1}


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("stages") / "photos", 24)


@pytest.fixture(scope="module")
def features(photos: Path, ddpm: Path) -> str:
    """Extracted by the function."""
    out = photos.parent / "features"
    return dtpipe.extract(images=photos, teacher=ddpm, out=out, timesteps=[50], settings=SMALL).url


@pytest.fixture(scope="module")
def run(features: str, photos: Path) -> Path:
    """Distilled by the function."""
    settings = {"student.name": "test_resnet"}
    result = dtpipe.distill(
        features,
        out=photos.parent / "run",
        batch_size=8,
        lr=1e-3,
        settings={f"distill.{key}": value for key, value in settings.items()} | TINY,
    )
    assert result.num_steps == 6 and set(result.losses) >= {"loss", "mse", "at"}
    return result.run_dir


def test_the_function_writes_what_the_command_writes(features, photos, ddpm, tmp_path):
    flags = [word for key, value in SMALL.items() for word in ("-s", f"{key}={json.dumps(value)}")]
    said("extract", "--images", photos, "--teacher", ddpm, "--timesteps", 50, "--out", tmp_path / "other", *flags)
    digests = [
        json.loads((Path(url) / "manifest.json").read_text())["digest"] for url in (features, tmp_path / "other")
    ]
    assert digests[0] == digests[1]


def test_the_call_stands_in_the_records_as_python(features, run):
    provenance = json.loads((Path(features) / "manifest.json").read_text())["provenance"]
    assert provenance["command"].startswith("dtpipe.extract(images='") and "timesteps=[50]" in provenance["command"]
    (record,) = read_commands(run)
    assert record["command"].startswith(f"dtpipe.distill(url=['{features}'], out='{run}', batch_size=8")


def test_a_call_again_goes_on_and_finds_all_done(features, run, photos, ddpm):
    assert dtpipe.extract(photos, ddpm, photos.parent / "features", timesteps=[50], settings=SMALL).url == features
    again = dtpipe.distill(features, "test_resnet", photos.parent / "run", batch_size=8, lr=1e-3, settings=TINY)
    assert again.resumed_step == 6


def test_evaluate_gives_the_table_of_the_command_and_shows_its_scores_in_the_trackers(run, photos, monkeypatch):
    sent = []
    monkeypatch.setattr(evaluation, "send_scores", lambda *words: sent.append(words))
    small = {"eval.probe.max_iter": 3, "eval.probe.l2_grid": [0.1], "eval.probe.folds": 2}
    result = dtpipe.evaluate(run, "probe", photos, labelled=[4], seeds=1, settings=small)
    assert result.subject == "distilled" and "random initialisation" in result.to_table()
    ((value,),) = (by_seed.values() for by_seed in result.by_seed("distilled").values())
    assert sent == [(run, "eval", {"eval/probe/4": value})]
    stored = json.loads((run / "eval" / "probe.json").read_text())
    assert [score.value for score in result.scores] == [score["value"] for score in stored["scores"]]


def test_the_backbone_of_a_run_gives_its_levels_without_gradients_of_a_regressor(run):
    backbone = dtpipe.load_backbone(run)
    with torch.no_grad():
        levels = backbone(torch.zeros(2, 3, 32, 32))
    assert isinstance(backbone, torch.nn.Module) and not backbone.training
    sizes = zip(backbone.channels, backbone.strides, strict=True)
    assert [tuple(level.shape) for level in levels] == [(2, c, 32 // s, 32 // s) for c, s in sizes]


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda out: dtpipe.extract(out=out), ConfigError, r"teacher \(extract.teacher.path\) must be given"),
        (
            lambda out: dtpipe.extract("nowhere", "x", out, timestep=3),
            ConfigError,
            r"no 'timestep', did you mean timesteps\?",
        ),
        (
            lambda out: dtpipe.extract("nowhere", "x", out, settings={"extract.nose.seed": 1}),
            ConfigError,
            "unknown key",
        ),
        (lambda out: dtpipe.extract("nowhere", "x", out, px="wide"), ConfigError, "extract.transform.px"),
        (lambda out: dtpipe.extract("nowhere", "nowhere", out, inline=True), InputError, "nowhere"),
        (lambda out: dtpipe.distill("nowhere", "resnet18", out), InputError, "holds no feature dataset|no such"),
        (lambda out: dtpipe.distill(out=out), ConfigError, "must be given"),
        (lambda out: dtpipe.distill("x", "resnet18", out, config="imagenett"), ConfigError, "no such preset"),
        (lambda out: dtpipe.evaluate("nowhere", "probe", "x"), InputError, "nowhere"),
        (lambda out: dtpipe.load_backbone("nowhere"), DtpipeError, "nowhere"),
    ],
)
def test_errors_are_the_commands_own_and_leave_the_process(call, error, words, tmp_path):
    with pytest.raises(error, match=words):
        call(tmp_path / "out")


def test_a_flag_and_a_setting_of_one_key_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"extract\.transform\.px is given both"):
        dtpipe.extract("a", "b", tmp_path, px=64, settings={"extract.transform.px": 32})


def test_ctrl_c_stops_cleanly_and_the_same_call_goes_on(features, tmp_path):
    """As a notebook's kernel is interrupted: SIGINT while training, which ends the call and not the process."""
    settings = TINY | {"distill.epochs": 200}

    def interrupt() -> None:
        while not (tmp_path / "run" / "metrics.jsonl").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    watcher = threading.Thread(target=interrupt)
    watcher.start()
    with pytest.raises(StoppedError, match=r"stopped by SIGINT; .*last\.pt is saved"):
        dtpipe.distill(features, "test_resnet", tmp_path / "run", batch_size=8, lr=1e-3, settings=settings)
    watcher.join()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert (tmp_path / "run" / "last.pt").exists()


def test_notes_and_progress_go_to_stderr_as_lines_where_there_is_no_terminal(features, capfd, tmp_path):
    dtpipe.distill(features, "test_resnet", tmp_path / "run", batch_size=8, lr=1e-3, settings=TINY)
    shown = capfd.readouterr()
    assert shown.out == ""
    assert "distill: 6/6" in shown.err and "\x1b" not in shown.err


def test_a_command_line_that_is_refused_is_refused_by_the_function_with_the_same_sentence(tmp_path):
    with pytest.raises(RefusedError) as typed:
        said("distill", "nowhere", "--out", tmp_path / "run")
    with pytest.raises(DtpipeError) as called:
        dtpipe.distill("nowhere", out=tmp_path / "run")
    assert str(called.value) in " ".join(str(typed.value).split())
    assert called.value.exit_code == typed.value.exit_code
