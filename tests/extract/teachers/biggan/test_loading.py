"""BigGAN checkpoints as files: which are recognised, what is refused and how that is said."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.biggan.icgan import is_icgan_path
from dtpipe.extract.teachers.biggan.teacher import is_biggan_path, load_biggan_teacher
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import ConfigError, TeacherError
from parts import biggan_cases as cases
from parts.damage import Attack

Weights = dict[str, torch.Tensor]


@pytest.fixture
def weights() -> Weights:
    tensors: Weights = cases.weights("two_vectors")
    return tensors


def load(path: Path, **options: Any) -> Any:
    return load_biggan_teacher(TeacherConfig(path=str(path), options=options))


# Which files are recognised


def test_a_checkpoint_is_recognised_in_every_container(weights, tmp_path):
    cases.save(weights, tmp_path, "zip.pth")
    torch.save(weights, tmp_path / "legacy.pth", _use_new_zipfile_serialization=False)
    save_file(weights, tmp_path / "G_ema.safetensors")
    made = []
    for name in ("zip.pth", "legacy.pth", "G_ema.safetensors"):
        assert is_biggan_path(str(tmp_path / name)) and not is_icgan_path(str(tmp_path / name))
        teacher = load_teacher(TeacherConfig(path=str(tmp_path / name), options={"class_label": 1}))
        assert teacher.spec.kind == "biggan"
        made.append(teacher.synthesize({"z": cases.latents(9)})[0])
    torch.testing.assert_close(made[1], made[0])
    torch.testing.assert_close(made[2], made[0])


def test_an_icgan_is_another_kind(tmp_path):
    path = str(cases.save(cases.weights("icgan256"), tmp_path))
    assert is_icgan_path(path) and not is_biggan_path(path)


def _not_a_zip(path: Path) -> None:
    path.write_bytes(b"PK\x03\x04" + bytes(100))


def _zip_without_pickle(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("readme.txt", "linear.weight")


def _longer_names(path: Path) -> None:
    torch.save(
        {f"{name}_g": torch.zeros(1) for name in ("linear.weight", "blocks.0.0.conv1.weight", "output_layer.2.weight")},
        path,
    )


@pytest.mark.parametrize(
    "write", [_not_a_zip, _zip_without_pickle, _longer_names, Path.mkdir, lambda path: path.write_text("")]
)
@pytest.mark.parametrize("suffix", [".pth", ".safetensors", ".txt"])
def test_other_files_are_not_taken_for_one(write: Callable[[Path], object], suffix, tmp_path):
    path = tmp_path / f"other{suffix}"
    write(path)
    assert not is_biggan_path(str(path)) and not is_icgan_path(str(path))


def test_strange_paths_are_not_taken_for_one(tmp_path):
    for path in ("", "owner/name", "s3://bucket/G_ema.pth", "a\0b.pth", str(tmp_path / "missing.pth"), "x" * 5000):
        assert not is_biggan_path(path) and not is_icgan_path(path)


# What is refused


def test_a_pickle_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    path, attack = tmp_path / "G_ema.pth", Attack(tmp_path / "executed")
    tensors = {"linear.weight": attack, "blocks.0.0.conv1.weight": 0, "output_layer.2.weight": 0}
    path.write_bytes(pickle.dumps(tensors, protocol=2))
    assert is_biggan_path(str(path))
    with pytest.raises(TeacherError, match=r"G_ema\.pth"):
        load(path)
    assert not attack.trap.exists()


def _without(name: str) -> Callable[[Weights], Weights]:
    return lambda tensors: {each: tensor for each, tensor in tensors.items() if each != name}


def _with(name: str, value: torch.Tensor) -> Callable[[Weights], Weights]:
    return lambda tensors: {**tensors, name: value}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without("blocks.1.0.conv2.u0"), r"blocks\.1\.0\.conv2\.u0 is missing, though other layers have theirs"),
        (_without("blocks.1.0.bn1.gain.u0"), r"blocks\.1\.0\.bn1\.gain\.u0 is missing"),
        (_with("blocks.1.0.conv2.u0", torch.ones(1, 3)), r"conv2\.u0 has shape \(1, 3\), its weight \(16, 16, 3, 3\)"),
        (_without("blocks.1.0.bn2.stored_var"), r"blocks\.1\.0\.bn2\.var is missing"),
        (_without("output_layer.0.gain"), r"output_layer\.0\.gain is missing"),
        (_without("blocks.0.1.theta.weight"), r"blocks\.0\.1\.theta\.u0 is unexpected"),
        (
            _without("linear.weight"),
            r"linear\.weight is missing, so this is no BigGAN generator; give a G or G_ema file",
        ),
        (_without("blocks.0.0.conv1.weight"), r"blocks\.0\.0\.conv1\.weight is missing"),
        (_without("blocks.0.0.bn1.gain.weight"), r"bn1\.gain\.weight is missing"),
        (_without("shared.weight"), r"shared\.weight is missing"),
        (_with("optimizer.step", torch.zeros(1)), r"optimizer\.step is unexpected"),
        (_with("blocks.2.0.conv1.weight", torch.ones(16, 15, 3, 3)), r"conv1\.weight has shape \(16, 15, 3, 3\)"),
        (_with("blocks.2.0.conv1.bias", torch.full((16,), torch.nan)), r"conv1\.bias holds values that are not finite"),
        (
            _with("blocks.2.0.conv1.weight", torch.zeros(16, 16, 3, 3)),
            r"conv1\.weight holds values that are not finite",
        ),
        (_with("blocks.1.0.bn1.bn.running_mean", torch.zeros(16)), r"running_mean is there in two spellings"),
        (
            _with("linear.bias", torch.zeros(256, dtype=torch.int64)),
            r"linear\.0\.bias holds values that are not finite floats",
        ),
        (_with("linear.weight", torch.ones(257, 9)), "257 outputs are no square map of 16 channels"),
        (_with("linear.weight", torch.ones(9)), r"linear\.weight has shape \(9,\)"),
        (
            _with("shared.weight", torch.ones(7, 5)),
            r"blocks take 6 numbers, which is not a class embedding \(5\).*kind=icgan",
        ),
        (
            _with("shared.weight", torch.full((7, 6), torch.inf)),
            r"shared\.weight is no table of finite class embeddings",
        ),
        (_with("blocks.0.0.conv3.weight", torch.ones(1)), "is a BigGAN-deep generator"),
    ],
)
def test_a_checkpoint_that_is_not_whole_is_refused_with_what_is_wrong(change, message, weights, tmp_path):
    path = cases.save(change(weights), tmp_path)
    with pytest.raises(TeacherError, match=message):
        load(path, bn_eps=0.01)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"class_label": 7}, "class_label is 7; .* has classes 0 to 6"),
        ({"class_label": -1}, "class_label is -1"),
        ({"class_label": "dog"}, r"extract\.teacher\.options\.class_label"),
        ({"truncation": "clamp"}, "need a threshold"),
        ({"threshold": 1.0}, "need a threshold, and none takes none"),
        ({"truncation": "truncated_normal", "threshold": 0.0}, r"extract\.teacher\.options\.threshold"),
        ({"z_scale": 0}, r"extract\.teacher\.options\.z_scale"),
        ({"resolution": 32}, "options of this teacher: .*truncation.*class_label"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, message, weights, tmp_path):
    with pytest.raises(ConfigError, match=message):
        load(cases.save(weights, tmp_path), **options)


def test_a_folder_a_missing_file_and_a_cut_one_are_refused(weights, tmp_path):
    path = cases.save(weights, tmp_path, "G_ema_best0.pth")
    with pytest.raises(TeacherError, match=r"is a folder; give the path of a G_ema file in it \(G_ema_best0\.pth\)"):
        load(tmp_path)
    with pytest.raises(TeacherError, match="there is no such file"):
        load(tmp_path / "other.pth")
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(TeacherError, match="not readable as weights"):
        load(path)
