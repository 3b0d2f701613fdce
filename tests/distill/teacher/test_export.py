"""What is written as a teacher, and from which checkpoint."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dtpipe.distill.engine.checkpoint import load_checkpoint, save_checkpoint
from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.export import TRAIN_TEACHER, export_teacher, tile
from dtpipe.extract.teachers.diffusion.files import find_unet
from dtpipe.manifests.errors import ConfigError, DamagedDataError, InputError, StoreError
from parts.damage import flip
from parts.ddpm_training import draw_grey, tiny_teacher, train
from parts.disks import files_on, fill, small_disk
from parts.settings import build, changed


@pytest.fixture(scope="module")
def finished_teacher(tmp_path_factory):
    """A run folder with the teacher in it."""
    out = tmp_path_factory.mktemp("teacher")
    train(tiny_teacher(out, steps=1))
    return out


def test_a_folder_holds_the_moving_average_its_record_and_a_grid(tmp_path):
    config = tiny_teacher(tmp_path)
    result = train(config)
    saved = load_checkpoint(tmp_path / "last.pt", TRAIN_TEACHER)
    written = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved["ema"][name]) for name, value in written.items())
    assert any((saved["ema"][name] != saved["unet"][name]).any() for name in saved["ema"])
    record = json.loads((tmp_path / "train.json").read_text())
    assert record["step"] == 6
    again = {"images": config.images, "out": config.run.out, "device": "cpu", "threads": 1}
    assert build(TrainTeacherConfig, record["train_teacher"], **again) == config
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert record["loss_of_last_steps"] == pytest.approx(np.mean([line["loss"] for line in lines]), abs=1e-6)
    assert result.loss == lines[-1]["loss"]
    with Image.open(result.samples) as grid:
        assert grid.size == (32, 32)  # three samples in a grid of four
        assert grid.getpixel((0, 0)) == (100, 100, 100)


def test_a_class_conditional_teacher_says_its_classes(tmp_path):
    config = tiny_teacher(tmp_path, class_conditional=True, label_dropout=0.5, steps=2)
    result = train(config)
    assert json.loads((tmp_path / "classes.json").read_text()) == {"classes": ["cat", "dog"], "null_class": 2}
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["num_class_embeds"] == 3
    weights = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert weights["class_embedding.weight"].shape[0] == 3
    with Image.open(result.samples) as grid:
        assert grid.getpixel((0, 0)) == (102, 102, 102)  # drawn for two classes
    export_teacher(tmp_path, tmp_path / "without", draw_grey)
    plain = changed(config, label_dropout=0.0, out=str(tmp_path / "plain"))
    assert json.loads((train(plain).out / "classes.json").read_text())["null_class"] is None


def test_half_precision_weights_are_written_as_such(tmp_path):
    train(tiny_teacher(tmp_path, steps=1, dtype="float16"))
    saved = load_checkpoint(tmp_path / "last.pt", TRAIN_TEACHER)["ema"]
    written = load_file(tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved[name].half()) for name, value in written.items())
    export_teacher(tmp_path, tmp_path / "elsewhere", draw_grey, "float32")
    written = load_file(tmp_path / "elsewhere" / "unet" / "diffusion_pytorch_model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in written.items())


def test_a_checkpoint_that_is_damaged_or_of_something_else_is_named(tmp_path):
    train(tiny_teacher(tmp_path, steps=1))
    last = tmp_path / "last.pt"
    state = load_checkpoint(last, TRAIN_TEACHER)
    last.write_bytes(last.read_bytes()[:1000])
    with pytest.raises(DamagedDataError, match=r"last\.pt: the checkpoint cannot be read"):
        train(tiny_teacher(tmp_path))
    save_checkpoint(last, TRAIN_TEACHER, {**state, "config": {**state["config"], "px": "wide"}})
    with pytest.raises(DamagedDataError, match=r"last\.pt: its settings are not this version's \(px"):
        export_teacher(tmp_path, tmp_path, draw_grey)
    save_checkpoint(last, "distill", {"step": 1})
    with pytest.raises(InputError, match="not a checkpoint of dtpipe train-teacher"):
        export_teacher(tmp_path, tmp_path, draw_grey)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    train(tiny_teacher(tmp_path, steps=1))
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write the teacher"):
        export_teacher(tmp_path, tmp_path / "file" / "teacher", draw_grey)
    with pytest.raises(ConfigError, match=r"lies below .*, which is a file"):
        train(tiny_teacher(tmp_path / "file" / "teacher"))


NETWORK = "unet/diffusion_pytorch_model.safetensors"


@pytest.mark.parametrize(
    ("name", "place"), [(NETWORK, -1), (NETWORK, 40), ("unet/config.json", -5), ("scheduler/scheduler_config.json", -5)]
)
def test_a_changed_byte_of_a_written_teacher_is_found_when_it_is_loaded(tmp_path, finished_teacher, name, place):
    out = shutil.copytree(finished_teacher, tmp_path / "teacher")
    (out / "samples.png").unlink()  # a picture to look at
    assert find_unet(str(out)).image_px == (16, 16)
    flip(out / name, place)
    with pytest.raises(
        DamagedDataError, match=rf"{name}: is not the file that train\.json names; run the same"
    ) as error:
        find_unet(str(out))
    assert error.value.exit_code == 4
    (out / "train.json").unlink()  # one who changed it on purpose, and teachers of others
    flip(out / name, place)
    assert find_unet(str(out)).image_px == (16, 16)


def test_a_changed_record_of_a_teacher_is_found(tmp_path, finished_teacher):
    out = shutil.copytree(finished_teacher, tmp_path / "teacher")
    flip(out / "train.json")
    with pytest.raises(DamagedDataError, match=r"train\.json: "):
        find_unet(str(out))


def test_a_teacher_that_cannot_be_written_whole_leaves_the_one_before(tmp_path, finished_teacher):
    out = Path(shutil.copytree(finished_teacher, tmp_path / "teacher"))
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}

    def full(*_: object) -> np.ndarray:
        raise OSError(28, "No space left on device")

    with pytest.raises(StoreError, match=r"cannot write the teacher \(.*No space left.*make room"):
        export_teacher(out, out, full)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_a_teacher_on_a_full_disk_is_a_store_error(tmp_path, finished_teacher):
    with small_disk(tmp_path / "disk", 2**20) as disk:
        fill(disk, 40_000)
        with pytest.raises(StoreError, match="cannot write the teacher") as error:
            export_teacher(finished_teacher, disk / "teacher", draw_grey)
        assert error.value.exit_code == 8
        assert files_on(disk) == set()


def test_tiles_fill_rows():
    images = np.arange(3, dtype=np.uint8)[:, None, None, None] * np.ones((1, 2, 2, 3), np.uint8)
    np.testing.assert_array_equal(tile(images)[::2, ::2, 0], [[0, 1], [2, 0]])
