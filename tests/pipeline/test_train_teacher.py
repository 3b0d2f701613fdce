"""What a teacher's training is handed: images, another teacher's weights, samples; and the teacher it gives."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dtpipe.distill.teacher.config import TrainTeacherConfig
from dtpipe.distill.teacher.network import build_unet
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.sources import folder as folder_source
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ConfigError, ErrorBudgetError, InputError, TeacherError
from dtpipe.pipeline import train_teacher as module
from dtpipe.pipeline.cli.settings import load_document, validate
from dtpipe.pipeline.train_teacher import load_images, start_from, train_teacher
from parts.ddpm_training import tiny_teacher
from parts.packing import folder_files, write_zip
from parts.paths import REPO
from parts.settings import changed


@pytest.fixture
def config(image_folder: Path, tmp_path: Path) -> TrainTeacherConfig:
    return tiny_teacher(tmp_path / "teacher", images=str(image_folder))


def tiny_config(images: Path, **changes: object) -> TrainTeacherConfig:
    return tiny_teacher(images=str(images), **changes)


def test_the_settings_of_the_demos_teacher_are_those_of_today():
    document = load_document(str(REPO / "pipeline" / "demo" / "teacher" / "train.yaml"))
    document["train_teacher"] |= {"images": "scenes"}
    document["train_teacher"]["run"] |= {"out": "teacher"}
    settings = validate(document, "train_teacher")
    assert (settings.run.steps, settings.px, settings.lr) == (4200, 64, 0.0006)


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
        drawn = teacher.sample(3, config.seed, config.run.sample_steps)
        np.testing.assert_array_equal(np.asarray(grid)[:16, :16], drawn[0])


def test_a_run_that_stops_before_its_first_report_has_no_loss(config):
    result = train_teacher(changed(config, max_hours=1e-9))
    assert (result.finished, result.loss) == (False, None)


def test_a_class_conditional_teacher_draws_its_classes_in_turn(config):
    result = train_teacher(changed(config, class_conditional=True, label_dropout=0.5, steps=2))
    assert json.loads((result.out / "classes.json").read_text()) == {"classes": ["cat", "dog"], "null_class": 2}
    with Image.open(result.samples) as picture:
        grid = np.asarray(picture).astype(int)
    for idx, tile in enumerate((grid[:16, :16], grid[:16, 16:], grid[16:, :16])):
        of_one_class = TeacherConfig(path=str(result.out), options={"class_label": idx % 2})
        drawn = load_teacher(of_one_class).sample(3, config.seed, config.run.sample_steps)
        assert np.abs(tile - drawn[idx]).max() <= 1  # the class is folded into a bias there


def test_images_need_not_be_square(config):
    result = train_teacher(changed(config, px=(8, 16), resize="stretch", steps=1))
    assert load_teacher(TeacherConfig(path=str(result.out))).spec.image_px == (8, 16)
    with Image.open(result.samples) as grid:
        assert grid.size == (32, 16)


def test_training_starts_from_the_weights_of_another_teacher(config, tmp_path):
    """Of another size too. A rate near zero leaves them as they were; they are needed once."""
    first = train_teacher(config).out
    second = changed(config, out=str(tmp_path / "second"), init_from=str(first), px=8, seed=3, lr=1e-30)
    out = train_teacher(changed(second, steps=2)).out
    weights = [load_file(each / "unet" / "diffusion_pytorch_model.safetensors") for each in (first, out)]
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())
    digest = json.loads((out / "train.json").read_text())["started_from_weights_blake3"]
    assert digest == load_teacher(TeacherConfig(path=str(first))).spec.weights_blake3
    first.rename(tmp_path / "moved")
    assert train_teacher(second).finished


def test_labels_are_the_class_folders(image_folder):
    images = load_images(tiny_config(image_folder, class_conditional=True))
    assert images.keys[:2] == ("cat/001.png", "cat/003.png")
    assert images.classes == ("cat", "dog")
    assert images.labels.tolist() == [0, 0, 0, 0, 1, 1, 1, 1]  # by key: cat/001.png .. dog/006.png


def test_images_without_a_class_are_refused_by_name(image_folder):
    (image_folder / "stray.png").write_bytes((image_folder / "cat" / "001.png").read_bytes())
    with pytest.raises(
        InputError, match=r"9 of 9 images without a class, the first is cat/001\.png; put every image into a folder"
    ):
        load_images(tiny_config(image_folder, class_conditional=True))


def test_images_are_stretched_to_height_and_width(image_folder):
    images = load_images(tiny_config(image_folder, px=(8, 16), resize="stretch"))
    assert images.pixels.shape == (8, 8, 16, 3)
    with Image.open(image_folder / "cat" / "001.png") as first:
        np.testing.assert_array_equal(images.pixels[0], np.asarray(first.resize((16, 8), Image.Resampling.BICUBIC)))


def test_bad_images_are_named_and_left_out_of_pixels_and_labels(image_folder):
    whole = load_images(tiny_config(image_folder, class_conditional=True))
    (image_folder / "cat" / "004.png").write_bytes(b"no image")  # between 003 and 005
    found = load_images(tiny_config(image_folder, class_conditional=True, max_bad=1))
    np.testing.assert_array_equal(found.pixels, whole.pixels)
    assert found.labels.tolist() == whole.labels.tolist()
    assert found.keys == whole.keys
    assert len(found.bad) == 1
    assert found.bad[0].startswith("cat/004.png: ")


def test_more_bad_images_than_allowed_are_refused(image_folder):
    (image_folder / "cat" / "broken.png").write_bytes(b"no image")
    (image_folder / "dog" / "empty.png").write_bytes(b"")
    with pytest.raises(
        ErrorBudgetError,
        match=r"has 2 bad images, train_teacher\.run\.max_bad allows 1 \(cat/broken\.png: .*; dog/empty\.png: ",
    ):
        load_images(tiny_config(image_folder, max_bad=0.1))
    assert len(load_images(tiny_config(image_folder, max_bad=0.2)).bad) == 2


def test_a_source_without_a_readable_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of 1 image can be read; the first: a\.png"):
        load_images(tiny_config(tmp_path))


def test_images_that_do_not_fit_into_memory_are_refused_before_any_is_read(image_folder, monkeypatch):
    def read(*_: object) -> bytes:
        raise AssertionError("an image was read")

    monkeypatch.setattr(folder_source.FolderSource, "read", read)
    config = tiny_config(image_folder, px=1 << 20)
    with pytest.raises(
        ConfigError,
        match=r"8 images of 1048576x1048576 px would take 24576\.0 GiB of memory, .* GiB are free; use fewer",
    ):
        load_images(config)
    with pytest.raises(ConfigError, match="in each of 4 processes would take 98304"):
        load_images(config, copies=4)


@pytest.mark.parametrize(("limit", "refused"), [("6143\n", True), ("6144\n", False), ("max\n", False)])
def test_a_containers_memory_limit_counts(image_folder, tmp_path, monkeypatch, limit, refused):
    file = tmp_path / "memory.max"
    file.write_text(limit)
    monkeypatch.setattr(module, "_CGROUP_LIMIT", file)
    config = tiny_config(image_folder)  # 8 x 16 x 16 x 3 = 6144 bytes
    if refused:
        with pytest.raises(ConfigError, match="would take"):
            load_images(config)
    else:
        assert len(load_images(config).pixels) == 8


def test_images_are_decoded_by_several_threads_in_the_listings_order(image_folder, monkeypatch):
    one = load_images(tiny_config(image_folder, decode_threads=1)).pixels
    meeting = threading.Barrier(4, timeout=10)  # passes only when four images are being read at once
    read = folder_source.FolderSource.read

    def read_together(source: folder_source.FolderSource, uri: str) -> bytes:
        meeting.wait()
        return read(source, uri)

    monkeypatch.setattr(folder_source.FolderSource, "read", read_together)
    np.testing.assert_array_equal(load_images(tiny_config(image_folder, decode_threads=4)).pixels, one)


def write_teacher(path: Path, **scheduler: object) -> Path:
    from diffusers import DDPMPipeline, DDPMScheduler

    DDPMPipeline(unet=build_unet(tiny_teacher(seed=9)), scheduler=DDPMScheduler(**scheduler)).save_pretrained(path)
    return path


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"channels": (8, 16, 16)}, r"block_out_channels is \(8, 8, 16\), not \(8, 16, 16\); make them equal"),
        ({"network": "adm"}, r"downsample_type is conv, not resnet"),
        ({"attention_strides": (), "head_channels": 4}, "attention_head_dim is 8, not 4; down_block_types is"),
        ({"timesteps": 100}, "another noise schedule or target than epsilon under 100 linear steps"),
    ],
)
def test_weights_of_another_network_or_schedule_are_refused(tmp_path, changes, message):
    config = tiny_teacher(**changes)
    with pytest.raises(TeacherError, match=message):
        start_from(changed(config, init_from=str(write_teacher(tmp_path))), build_unet(config))


@pytest.mark.parametrize("scheduler", [{"prediction_type": "v_prediction"}, {"beta_schedule": "squaredcos_cap_v2"}])
def test_weights_that_predict_something_else_are_refused(tmp_path, scheduler):
    with pytest.raises(TeacherError, match="another noise schedule or target"):
        start_from(tiny_teacher(init_from=str(write_teacher(tmp_path, **scheduler))), build_unet(tiny_teacher()))


def test_damaged_or_missing_weights_to_start_from_are_named(tmp_path):
    with pytest.raises(TeacherError, match=r"google/ddpm-x: no such folder; train_teacher\.init_from names the folder"):
        start_from(tiny_teacher(init_from="google/ddpm-x"), build_unet(tiny_teacher()))
    weights = write_teacher(tmp_path) / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(TeacherError, match="not readable as weights"):
        start_from(tiny_teacher(init_from=str(tmp_path)), build_unet(tiny_teacher()))


def test_images_in_a_zip_are_those_of_the_folder(image_folder, tmp_path):
    archive = write_zip(tmp_path / "a.zip", folder_files(image_folder))
    folder, zipped = (load_images(tiny_config(path)) for path in (image_folder, archive))
    assert folder.keys == zipped.keys
    np.testing.assert_array_equal(folder.pixels, zipped.pixels)
