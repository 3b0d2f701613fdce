"""A run folder belongs to one config and one process."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.engine import run_folder
from dtpipe.distill.engine.checkpoint import save_checkpoint
from dtpipe.distill.engine.run_folder import RunFolder, changed_fields, read_config, read_metrics
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.trainer import teacher_run
from dtpipe.distill.trainer import run_settings
from dtpipe.manifests.errors import (
    ConfigError,
    DamagedDataError,
    LockHeldError,
    PlanChangedError,
    StoreError,
)
from parts.paths import GOLDEN
from parts.settings import build, changed


def config(out, **changes) -> DistillConfig:
    return build(DistillConfig, {"datasets": ("features",), "out": str(out)}, **changes)


def test_the_resolved_config_is_written_and_read_back(tmp_path):
    with RunFolder.open(run_settings(config(tmp_path / "run", epochs=7))):
        pass
    assert DistillConfig(**read_config(tmp_path / "run")) == config(tmp_path / "run", epochs=7)


def test_another_config_is_refused_naming_the_fields(tmp_path):
    RunFolder.open(run_settings(config(tmp_path))).__exit__(None, None, None)
    with pytest.raises(PlanChangedError, match=r"\(distill.loss.at_weight: 10.0 -> 5.0; distill.lr: 0.004 -> 0.001\);"):
        RunFolder.open(run_settings(config(tmp_path, lr=1e-3, loss={"at_weight": 5})))
    assert read_config(tmp_path)["lr"] == 4e-3  # the refusal changed nothing


def test_how_it_is_carried_out_may_change(tmp_path):
    RunFolder.open(run_settings(config(tmp_path))).__exit__(None, None, None)
    other = config(
        tmp_path,
        log_every=3,
        read_threads=1,
        prefetch=1,
        keep_checkpoints=0,
        device="cpu",
        datasets=("elsewhere",),
        save_every_s=1,
    )
    with RunFolder.open(run_settings(other)):
        assert read_config(tmp_path)["run"]["log_every"] == 3
    assert changed_fields(config(tmp_path).model_dump(mode="json"), other, "distill") == []


def test_a_folder_from_before_settings_had_halves_is_gone_on_with(tmp_path):
    flat = (GOLDEN / "run_flat_config" / "config.yaml").read_text()
    (tmp_path / "config.yaml").write_text(flat)
    recorded = yaml.safe_load(flat)["distill"]
    assert recorded["log_every"] == 1  # beside the others
    config = build(DistillConfig, recorded, out=str(tmp_path), log_every=5)
    with pytest.raises(PlanChangedError, match=r"\(distill.epochs: 3 -> 4\);"):
        RunFolder.open(run_settings(changed(config, epochs=4)))
    RunFolder.open(run_settings(config)).close()
    assert read_config(tmp_path) == config.model_dump(mode="json")
    later = {"trackers", "project", "prefetch_mb", "cache", "cache_gb"}  # fields that came since
    assert DistillConfig.in_halves(recorded)["run"].keys() == config.run.model_dump().keys() - later


def test_fresh_is_refused_when_a_run_exists(tmp_path):
    RunFolder.open(run_settings(config(tmp_path / "run"), fresh=True)).__exit__(None, None, None)
    with pytest.raises(ConfigError, match="already holds a run"):
        RunFolder.open(run_settings(config(tmp_path / "run"), fresh=True))


def test_a_second_process_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    script = (
        "import os, signal, sys\n"
        "from dtpipe.distill.config import DistillConfig\n"
        "from dtpipe.distill.engine.run_folder import RunFolder\n"
        "from dtpipe.distill.trainer import run_settings\n"
        "folder = RunFolder.open(run_settings(DistillConfig(datasets=('features',), run={'out': sys.argv[1]})))\n"
        "print('held', flush=True)\n"
        "signal.pause()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path)], stdout=subprocess.PIPE, text=True) as other:
        try:
            assert other.stdout.readline() == "held\n"
            with pytest.raises(LockHeldError, match="another process"):
                RunFolder.open(run_settings(config(tmp_path)))
        finally:
            other.kill()
    with RunFolder.open(run_settings(config(tmp_path))):
        pass


def test_a_run_that_another_process_begins_between_two_looks_is_no_foreign_folder(tmp_path, monkeypatch):
    ours = run_settings(config(tmp_path / "run"))
    look, begun = run_folder.refuse_other_folder, []

    def after_another_began(other, *arguments):
        monkeypatch.setattr(run_folder, "refuse_other_folder", look)
        begun.append(RunFolder.open(other))
        look(*arguments)

    monkeypatch.setattr(run_folder, "refuse_other_folder", lambda *arguments: after_another_began(ours, *arguments))
    with pytest.raises(LockHeldError, match="another process trains in this folder"):
        RunFolder.open(ours)
    begun.pop().close()
    with RunFolder.open(ours):
        pass
    theirs = teacher_run(TrainTeacherConfig(images="images", run={"out": str(tmp_path / "theirs")}))
    monkeypatch.setattr(run_folder, "refuse_other_folder", lambda *arguments: after_another_began(theirs, *arguments))
    with pytest.raises(ConfigError, match="not the config of a run, which has a section `distill:`"):
        RunFolder.open(run_settings(config(tmp_path / "theirs")))
    begun.pop().close()


def test_metrics_of_steps_taken_again_are_dropped_with_a_line_cut_short(tmp_path):
    with RunFolder.open(run_settings(config(tmp_path))) as folder:
        for step in (10, 20, 30):
            folder.log({"step": step, "loss": 1 / step})
        with folder.metrics.open("a") as file:
            file.write('{"step": 40, "lo')
        folder.take_up(20, None)
        assert [line["step"] for line in read_metrics(tmp_path)] == [10, 20]
        folder.log({"step": 30, "loss": 0.5})
    assert [json.loads(line)["loss"] for line in folder.metrics.read_text().splitlines()] == [0.1, 0.05, 0.5]


def test_a_config_that_cannot_be_read_is_named(tmp_path):
    for text in ("- not a mapping\n", "epochs: 3\n", "distill: 3\n"):
        (tmp_path / "config.yaml").write_text(text)
        with pytest.raises(ConfigError, match=r"config\.yaml: not the config of a run"):
            RunFolder.open(run_settings(config(tmp_path)))


@pytest.mark.parametrize("torn", ['{"step": 2', "\0" * 4096, '{"ste' + "\0" * 100, '{"step": 2, "loss": 1.0}'])
def test_what_a_kill_or_a_power_cut_left_at_the_end_of_the_metrics_is_cut_off_and_said(tmp_path, torn):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1}\n{"step": 3}\n' + torn)  # as an older version wrote it, without seals
    assert read_metrics(tmp_path) == [{"step": 1}, {"step": 3}]
    with RunFolder.open(run_settings(config(tmp_path))) as folder:
        assert folder.take_up(3, None) == f"{file}: its last {len(torn)} bytes were no whole line and are cut off"
        assert folder.take_up(3, None) is None
        folder.log({"step": 4})
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 3, 4]


@pytest.mark.parametrize("garbage", ["\0\0", "[7]", '{"step": 2, "lo{"step": 3}', '{"loss": 1.0}', '{"step": "2"}', ""])
def test_garbage_between_the_lines_of_metrics_names_file_and_line(tmp_path, garbage):
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1}}\n{garbage}\n{{"step": 3}}\n')
    with pytest.raises(DamagedDataError, match=r"metrics\.jsonl, line 2 .*delete this line to go on"):
        read_metrics(tmp_path)


def test_the_settings_of_a_run_without_a_config_file_are_those_of_its_checkpoint(tmp_path):
    save_checkpoint(tmp_path / "last.pt", "distill", {"config": config(tmp_path, lr=1.0).model_dump(mode="json")})
    with pytest.raises(PlanChangedError, match=r"distill\.lr: 1\.0 -> 0\.004"):
        RunFolder.open(run_settings(config(tmp_path)))
    assert not (tmp_path / "config.yaml").exists()  # so that the settings of the run can be given again
    with RunFolder.open(run_settings(config(tmp_path, lr=1.0))):
        pass


def test_looking_for_another_run_makes_no_folder(tmp_path):
    run_settings(config(tmp_path / "run")).refuse_other()
    assert not (tmp_path / "run").exists()
    RunFolder.open(run_settings(config(tmp_path / "run"))).close()
    with pytest.raises(PlanChangedError, match=r"distill\.lr: 0\.004 -> 1\.0"):
        run_settings(config(tmp_path / "run", lr=1)).refuse_other()


def test_a_place_that_can_be_no_run_folder_is_refused_and_left_as_it_is(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    for out, words in [("file", "is a file"), ("file/run", "lies below"), ("photos", r"holds what .* \(cat.png\)")]:
        with pytest.raises(ConfigError, match=words):
            RunFolder.open(run_settings(config(tmp_path / out)))
        with pytest.raises(ConfigError, match=words):
            run_settings(config(tmp_path / out)).refuse_other()
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["cat.png", "file", "photos"]
    with pytest.raises(StoreError, match="cannot be written"):
        RunFolder.open(run_settings(config(Path("/proc/run"))))


def test_a_run_of_another_kind_is_refused(tmp_path):
    RunFolder.open(run_settings(config(tmp_path))).close()
    teacher = TrainTeacherConfig.model_validate({"images": "photos", "run": {"out": str(tmp_path)}})
    with pytest.raises(ConfigError, match="has a section `train_teacher:`"):
        RunFolder.open(teacher_run(teacher))
