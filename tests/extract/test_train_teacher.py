"""Training a teacher: resume equals an unbroken run, and what is written is a teacher."""

from __future__ import annotations

import json
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dtpipe.extract import train_teacher as module
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.base import load_teacher
from dtpipe.extract.teachers.ddim import alphas_cumprod
from dtpipe.extract.train_config import EXECUTION, TrainTeacherConfig
from dtpipe.extract.train_export import export_teacher, tile
from dtpipe.extract.train_state import CHECKPOINT, load_checkpoint, resume_or_start
from dtpipe.extract.train_teacher import learning_rate, train_step, train_teacher
from dtpipe.manifests.errors import ConfigError, DamagedDataError, DivergedError, InputError, PlanChangedError, StoppedError

TINY = {
    "px": 16,
    "channels": (8, 8, 16),
    "blocks": 1,
    "attention_strides": (4,),
    "head_channels": 8,
    "norm_groups": 4,
    "steps": 6,
    "batch_size": 3,
    "lr": 1e-3,
    "warmup_steps": 2,
    "ema_decay": 0.5,
    "checkpoint_every": 2,
    "log_every": 2,
    "num_samples": 3,
    "sample_steps": 2,
    "device": "cpu",
    "threads": 1,
}


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> TrainTeacherConfig:
    return TrainTeacherConfig.model_validate(TINY | {"images": str(image_folder), "out": str(tmp_path / "teacher")})


def changed(config: TrainTeacherConfig, **changes: object) -> TrainTeacherConfig:
    return TrainTeacherConfig.model_validate(config.model_dump() | changes)


def weights(config: TrainTeacherConfig) -> dict[str, torch.Tensor]:
    saved = load_checkpoint(Path(config.out) / CHECKPOINT)
    return {f"ema.{name}": value for name, value in saved["ema"].items()} | {f"unet.{name}": value for name, value in saved["unet"].items()}


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
    with pytest.raises(PlanChangedError, match=r"lr was 0\.001, is 0\.01; seed was 0, is 1"):
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
    from safetensors.torch import load_file

    found = load_file(Path(config.out) / "unet" / "diffusion_pytorch_model.safetensors")
    saved = load_checkpoint(Path(config.out) / CHECKPOINT)["ema"]
    assert all(torch.equal(value, saved[name].half()) for name, value in found.items())
    export_teacher(Path(config.out), tmp_path / "elsewhere", "float32")
    assert load_teacher(TeacherConfig(path=str(tmp_path / "elsewhere"))).spec.image_px == (16, 16)


def test_a_step_follows_the_papers_loss(config):
    """Loss, gradient clipping and AdamW of one step, restated by hand in float64."""
    images, _ = module.load_images(config)
    state = resume_or_start(config, "cpu")
    clean, timesteps, noise = module._draw_batch(config, images, 0)
    kept = np.cumprod(1 - np.linspace(1e-4, 0.02, config.timesteps))[timesteps.numpy()].reshape(-1, 1, 1, 1)
    noisy = kept**0.5 * clean.double().numpy() + (1 - kept) ** 0.5 * noise.double().numpy()
    reference = resume_or_start(config, "cpu").unet.double()
    predicted = reference(torch.from_numpy(noisy), timesteps).sample
    wanted = ((predicted - noise.double()) ** 2).mean()
    gradients = torch.autograd.grad(wanted, list(reference.parameters()))
    schedule = torch.from_numpy(alphas_cumprod({"num_train_timesteps": config.timesteps}))
    before = {name: value.detach().clone() for name, value in state.unet.named_parameters()}
    loss = train_step(config, state, images, schedule, "cpu")
    assert abs(loss - wanted.item()) < 1e-5 * wanted.item()
    scale = min(1.0, config.grad_clip / sum(float(each.square().sum()) for each in gradients) ** 0.5)
    for (name, value), gradient in zip(state.unet.named_parameters(), gradients, strict=True):
        clear = (gradient * scale).abs() > 1e-5  # AdamW's first step is lr * sign, where the gradient exceeds eps and rounding
        moved = (value.detach() - before[name])[clear].double()
        step = -learning_rate(config, 0) * (gradient * scale / ((gradient * scale).abs() + 1e-8))[clear]
        torch.testing.assert_close(moved, step, rtol=2e-2, atol=1e-7)


def test_training_learns():
    """On one image the loss falls well below one, the loss of a network that predicts nothing."""
    image = np.zeros((1, 16, 16, 3), np.uint8)
    image[:, :8] = 200
    settings = TINY | {"images": "", "out": "nowhere", "steps": 150, "batch_size": 8, "lr": 3e-3}
    config = TrainTeacherConfig.model_validate(settings)
    state = resume_or_start(config, "cpu")
    schedule = torch.from_numpy(alphas_cumprod({"num_train_timesteps": config.timesteps}))
    losses = [train_step(config, state, image, schedule, "cpu") for _ in range(config.steps)]
    assert np.mean(losses[:5]) > 0.8
    assert np.mean(losses[-20:]) < 0.35


def test_every_image_is_used_once_per_epoch(config):
    images = np.arange(8, dtype=np.uint8)[:, None, None, None] * np.ones((1, 16, 16, 3), np.uint8)
    config = changed(config, batch_size=3, flip=False)
    drawn = torch.cat([module._draw_batch(config, images, step)[0][:, 0, 0, 0] for step in range(16)])
    rows = ((drawn + 1) * 127.5).round().int().tolist()
    for epoch in range(6):
        assert sorted(rows[epoch * 8 : epoch * 8 + 8]) == list(range(8))
    assert rows[:8] != rows[8:16]


def test_flips_are_drawn_per_image(config):
    images = np.zeros((1, 16, 16, 3), np.uint8)
    images[:, :, :8] = 255
    left = torch.cat([module._draw_batch(config, images, step)[0][:, 0, 0, 0] for step in range(40)]) > 0
    assert 0.3 < left.float().mean() < 0.7


def test_learning_rate_rises_holds_and_falls(config):
    config = changed(config, steps=10, warmup_steps=2, decay_steps=4, lr=1.0)
    assert [learning_rate(config, step) for step in range(10)] == [0.5, 1, 1, 1, 1, 1, 1, 0.75, 0.5, 0.25]


def test_bad_images_are_named_and_left_out(config, image_folder):
    (image_folder / "cat" / "broken.png").write_bytes(b"no image")
    images, bad = module.load_images(config)
    assert len(images) == 8
    assert len(bad) == 1
    assert bad[0].startswith("cat/broken.png: ")


def test_a_source_without_a_readable_image_is_refused(config, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 1 images can be read; the first: a\.png"):
        train_teacher(changed(config, images=str(tmp_path / "empty")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"px": 18}, "multiple of 4"),
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
