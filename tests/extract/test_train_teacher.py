"""Training a teacher: resume equals an unbroken run, and what is written is a teacher."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dtpipe.extract import train_teacher as module
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.extract.train_config import EXECUTION, TrainTeacherConfig
from dtpipe.extract.train_export import export_teacher, tile
from dtpipe.extract.train_state import CHECKPOINT, load_checkpoint
from dtpipe.extract.train_step import train_step
from dtpipe.extract.train_teacher import drop_lines_after, train_teacher
from dtpipe.manifests.errors import (
    ConfigError,
    DamagedDataError,
    DivergedError,
    InputError,
    LockHeldError,
    PlanChangedError,
    StoppedError,
    StoreError,
)
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.write.lock import Lock
from parts.paths import FIXTURES

TINY = json.loads((FIXTURES / "train" / "tiny.json").read_text())


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> TrainTeacherConfig:
    return TrainTeacherConfig.model_validate(TINY | {"images": str(image_folder), "out": str(tmp_path / "teacher")})


def changed(config: TrainTeacherConfig, **changes: object) -> TrainTeacherConfig:
    return TrainTeacherConfig.model_validate(config.model_dump() | changes)


def weights(config: TrainTeacherConfig) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(Path(config.out) / CHECKPOINT)
    return {f"ema.{name}": value for name, value in saved["ema"].items()} | {
        f"unet.{name}": value for name, value in saved["unet"].items()
    }


def assert_equal_weights(one: TrainTeacherConfig, other: TrainTeacherConfig) -> None:
    expected = weights(other)
    for name, value in weights(one).items():
        assert torch.equal(value, expected[name]), name


def test_the_result_is_a_teacher(config):
    seen = []
    result = train_teacher(config, seen.append)
    assert (result.finished, result.step, result.num_images, result.bad) == (True, 6, 8, ())
    assert [progress.step for progress in seen] == [2, 4, 6]
    teacher = load_teacher(TeacherConfig(path=str(result.out)))
    assert teacher.spec.image_px == (16, 16)
    assert [level.name for level in teacher.spec.levels] == ["l2"]
    with Image.open(result.samples) as grid:
        assert grid.size == (32, 32)  # three samples in a grid of four
    lines = [json.loads(line) for line in (result.out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4, 6]
    record = json.loads((result.out / "train.json").read_text())
    assert record["step"] == 6
    assert record["train_teacher"]["seed"] == 0
    again = {"images": config.images, "out": config.out, "device": "cpu", "threads": 1}
    assert TrainTeacherConfig.model_validate(record["train_teacher"] | again) == config


def test_the_teacher_holds_the_moving_average(config):
    result = train_teacher(config)
    teacher = load_teacher(TeacherConfig(path=str(result.out)))
    saved = load_checkpoint(result.out / CHECKPOINT)
    for name, value in teacher.unet.state_dict().items():
        assert torch.equal(value, saved["ema"][name])
    assert any((saved["ema"][name] != saved["unet"][name]).any() for name in saved["ema"])


@pytest.mark.parametrize(("number", "exit_code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_stopped_run_goes_the_way_of_an_unbroken_one(config, tmp_path, number, exit_code):
    unbroken = changed(config, out=str(tmp_path / "unbroken"))
    train_teacher(unbroken)

    def stop(progress):
        if progress.step == 3:
            signal.raise_signal(number)

    with pytest.raises(StoppedError, match=f"step 3 of 6: stopped by {number.name}; .*last.pt is saved") as caught:
        train_teacher(changed(config, log_every=1, checkpoint_every=100), stop)
    assert caught.value.exit_code == exit_code
    assert train_teacher(config).finished
    assert_equal_weights(config, unbroken)


def test_a_killed_run_goes_on_from_its_last_checkpoint(config, tmp_path, monkeypatch):
    unbroken = changed(config, out=str(tmp_path / "unbroken"))
    train_teacher(unbroken)

    def die(at, state, *rest):
        if state.step == 5:
            raise KeyboardInterrupt
        return train_step(at, state, *rest)

    monkeypatch.setattr(module, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(config)
    assert load_checkpoint(Path(config.out) / CHECKPOINT)["step"] == 4
    monkeypatch.undo()
    train_teacher(config)
    assert_equal_weights(config, unbroken)


def test_more_steps_continue_a_finished_teacher(config, tmp_path):
    train_teacher(changed(config, steps=4))
    result = train_teacher(config)
    assert result.step == 6
    unbroken = changed(config, out=str(tmp_path / "unbroken"))
    train_teacher(unbroken)
    assert_equal_weights(config, unbroken)


def test_a_time_limit_stops_and_still_writes(config):
    result = train_teacher(changed(config, max_hours=1e-9))
    assert not result.finished
    assert result.samples.exists()


def test_other_settings_into_the_same_folder_are_refused(config):
    train_teacher(changed(config, steps=1))
    with pytest.raises(PlanChangedError, match=r"train_teacher\.lr: 0\.001 -> 0\.01; train_teacher\.seed: 0 -> 1"):
        train_teacher(changed(config, lr=0.01, seed=1))


def test_a_damaged_checkpoint_is_named(config):
    train_teacher(changed(config, steps=1))
    path = Path(config.out) / CHECKPOINT
    path.write_bytes(path.read_bytes()[:1000])
    with pytest.raises(DamagedDataError, match=r"last\.pt: not a readable checkpoint"):
        train_teacher(config)
    torch.save({"step": 1}, path)
    with pytest.raises(DamagedDataError, match="checkpoint lacks"):
        export_teacher(Path(config.out), Path(config.out))


def test_half_precision_weights_are_written_as_such(config, tmp_path):
    train_teacher(changed(config, steps=1, dtype="float16"))
    found = load_file(Path(config.out) / "unet" / "diffusion_pytorch_model.safetensors")
    saved = load_checkpoint(Path(config.out) / CHECKPOINT)["ema"]
    assert all(torch.equal(value, saved[name].half()) for name, value in found.items())
    export_teacher(Path(config.out), tmp_path / "elsewhere", "float32")
    assert load_teacher(TeacherConfig(path=str(tmp_path / "elsewhere"))).spec.image_px == (16, 16)


def test_a_source_without_a_readable_image_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 1 images can be read; the first: a\.png"):
        train_teacher(changed(config, images=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"px": 18}, "multiple of 4"),
        ({"px": (16, 18)}, r"px is \(16, 18\); 3 resolutions need a multiple of 4"),
        ({"px": 4}, "8 or more"),
        ({"channels": (8, 8)}, "at least 3 items"),
        ({"label_dropout": 0.1}, "set class_conditional too"),
        ({"max_bad": 1.5}, "share as a fraction up to 1"),
        ({"out": "s3://bucket/teacher"}, "local or mounted folder"),
        ({"channels": (8, 10, 16)}, r"\[10\]; each must be a multiple of norm_groups"),
        ({"attention_strides": (3, 8)}, r"\[3, 8\]"),
        ({"steps": 0}, "steps"),
        ({"colour": 1}, "colour"),
    ],
)
def test_settings_that_cannot_work_are_refused(config, changes, message):
    with pytest.raises(ValueError, match=message):
        changed(config, **changes)


def test_a_gpu_that_is_not_there_is_named(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="torch sees no GPU"):
        train_teacher(changed(config, device="cuda"))


def test_float16_needs_a_gpu(config, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=r"precision is float16, which trains on a GPU only; use bfloat16"):
        train_teacher(changed(config, precision="float16"))


def test_execution_settings_are_fields():
    assert set(TrainTeacherConfig.model_fields) >= EXECUTION


def test_tiles_fill_rows():
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    np.testing.assert_array_equal(tile(images)[::2, ::2, 0], [[0, 1], [2, 0]])


def test_training_that_diverges_stops_and_writes_no_teacher(config):
    wild = changed(config, lr=1e30, warmup_steps=0, checkpoint_every=1)
    with pytest.raises(DivergedError, match=r"in step 2 the loss is .*lower train_teacher\.lr"):
        train_teacher(wild)
    assert load_checkpoint(Path(wild.out) / CHECKPOINT)["step"] == 1
    assert not (Path(wild.out) / "unet").exists()


def test_images_need_not_be_square(config):
    result = train_teacher(changed(config, px=(8, 16), resize="stretch", steps=1))
    assert load_teacher(TeacherConfig(path=str(result.out))).spec.image_px == (8, 16)
    with Image.open(result.samples) as grid:
        assert grid.size == (32, 16)


def test_one_side_of_a_square_may_be_spelled_twice(config):
    train_teacher(changed(config, px=(16, 16), steps=1))
    assert train_teacher(changed(config, steps=1)).finished


def test_a_class_conditional_teacher_says_its_classes(config):
    result = train_teacher(changed(config, class_conditional=True, label_dropout=0.5, steps=2))
    assert json.loads((result.out / "classes.json").read_text()) == {"classes": ["cat", "dog"], "null_class": 2}
    assert json.loads((result.out / "unet" / "config.json").read_text())["num_class_embeds"] == 3
    assert (
        load_file(result.out / "unet" / "diffusion_pytorch_model.safetensors")["class_embedding.weight"].shape[0] == 3
    )
    assert result.samples.exists()


def test_a_class_conditional_run_goes_the_way_of_an_unbroken_one(config, tmp_path):
    config = changed(config, class_conditional=True)
    unbroken = changed(config, out=str(tmp_path / "unbroken"))
    train_teacher(unbroken)
    train_teacher(changed(config, steps=3))
    result = train_teacher(config)
    assert_equal_weights(config, unbroken)
    assert json.loads((result.out / "classes.json").read_text()) == {"classes": ["cat", "dog"], "null_class": None}


def test_other_classes_than_the_checkpoints_are_refused(config, image_folder):
    config = changed(config, class_conditional=True)
    train_teacher(changed(config, steps=1))
    (image_folder / "dog").rename(image_folder / "hound")
    with pytest.raises(PlanChangedError, match=r"last\.pt was made with other classes, \['dog', 'hound'\] differ"):
        train_teacher(config)


def test_a_second_run_in_the_same_folder_is_refused(config):
    Path(config.out).mkdir()
    message = r"teacher is being written by process \d+ on .*; wait for it, or stop it"
    with Lock.acquire(Store(config.out)), pytest.raises(LockHeldError, match=message):
        train_teacher(config)
    assert train_teacher(config).finished


def test_the_lock_of_a_dead_process_is_taken_over(config):
    Path(config.out).mkdir()
    pid = os.fork()
    if not pid:
        Lock.acquire(Store(config.out))
        os._exit(0)  # as a kill does: nothing is released
    os.waitpid(pid, 0)
    assert train_teacher(config).finished


def test_a_run_that_lost_its_lock_writes_no_more(config):
    def take_over(progress):
        if progress.step == 2:
            next((Path(config.out) / "lock").iterdir()).unlink()

    with pytest.raises(LockHeldError, match="somebody removed the lock"):
        train_teacher(config, take_over)
    assert not (Path(config.out) / CHECKPOINT).exists()


def test_metrics_hold_each_step_once_after_a_kill(config, monkeypatch):
    def die(at, state, *rest):
        if state.step == 5:
            raise KeyboardInterrupt
        return train_step(at, state, *rest)

    config = changed(config, log_every=1)
    monkeypatch.setattr(module, "train_step", die)
    with pytest.raises(KeyboardInterrupt):
        train_teacher(config)
    monkeypatch.undo()
    metrics = Path(config.out) / "metrics.jsonl"
    assert len(metrics.read_text().splitlines()) == 5  # one more than the checkpoint
    with metrics.open("a") as file:
        file.write('{"step": 6, "lo')
    train_teacher(config)
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [1, 2, 3, 4, 5, 6]


def test_lines_past_a_step_and_broken_ones_are_dropped(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2, "lo{"step": 3}\n[7]\n{"step": 3}\n{"step": 9}\n{"step": 2}')
    drop_lines_after(path, 3)
    assert path.read_text() == '{"step": 1}\n{"step": 3}\n'


def test_training_starts_from_the_weights_of_another_teacher(config, tmp_path, monkeypatch):
    first = train_teacher(config).out
    config = changed(config, out=str(tmp_path / "second"), init_from=str(first), px=8, seed=3)
    seen = {}

    def look(at, state, *rest):
        seen.setdefault(state.step, {name: value.clone() for name, value in state.unet.state_dict().items()})
        return train_step(at, state, *rest)

    monkeypatch.setattr(module, "train_step", look)
    second = train_teacher(changed(config, steps=2)).out
    exported = load_file(first / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, exported[name]) for name, value in seen[0].items())
    digest = json.loads((second / "train.json").read_text())["started_from_weights_blake3"]
    assert digest == load_teacher(TeacherConfig(path=str(first))).spec.weights_blake3
    first.rename(tmp_path / "moved")  # the weights are needed once
    assert train_teacher(config).finished


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot make the folder"):
        train_teacher(changed(config, out=str(tmp_path / "file" / "teacher")))
