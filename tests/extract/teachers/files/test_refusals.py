"""Files that are something else than their names say: named, with what to do, wherever a teacher's file is read."""

from __future__ import annotations

import gzip
import json
import pickle
import shutil
import tarfile
from pathlib import Path

import pytest
import torch

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.files.npy import read_arrays
from dtpipe.extract.teachers.files.refusals import disguise_of
from dtpipe.extract.teachers.files.weights import read_json, read_weights
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import TeacherError
from parts.teachers import write_ddpm

LFS = f"version https://git-lfs.github.com/spec/v1\noid sha256:{'a' * 64}\nsize 1234567\n"
DISGUISES = {
    LFS: r"is a Git LFS pointer to a file of 1,234,567 bytes, .*; run `git lfs pull`",
    "/annex/objects/SHA256E-s12--ab.pt\n": "is a git-annex pointer, .*`git annex get`",
    "\n<!DOCTYPE html>\n<html><title>Sign in \n to Drive</title>"
    + "x" * 99_999: r"is a web page \('Sign in to Drive'\)",
    "<HTML><body>moved": "is a web page, not the file itself",
    '<?xml version="1.0"?><Error><Code>AccessDenied</Code></Error>': r"is an answer .* in XML \(AccessDenied\)",
    json.dumps({"error": "Invalid credentials"}): r"is a text \('\{\"error\": \"Invalid credentials\"\}'\)",
    "Invalid username or password.": r"is a text \('Invalid username or password\.'\)",
    "": "is empty; download the file itself",
}


@pytest.mark.parametrize("content", DISGUISES)
def test_what_came_in_place_of_weights_is_named(content: str, tmp_path: Path) -> None:
    for name in ("x.safetensors", "x.bin", "x.pt", "x.pkl"):
        (tmp_path / name).write_text(content)
        with pytest.raises(TeacherError, match=rf"{name}: {DISGUISES[content]}"):
            load_teacher(TeacherConfig(path=str(tmp_path / name)))
    for name in ("x.safetensors", "x.bin"):
        with pytest.raises(TeacherError, match=rf"{name}: {DISGUISES[content]}"):
            read_weights(tmp_path / name)
    (tmp_path / "x.npy").write_text(content)
    with pytest.raises(TeacherError, match=DISGUISES[content]):
        read_arrays(tmp_path / "x.npy", ("x",))


def test_a_pointer_in_any_file_of_a_folder_is_named(tmp_path: Path) -> None:
    write_ddpm(tmp_path / "whole", channels=(8, 8, 8))
    for place in ("unet/diffusion_pytorch_model.safetensors", "unet/config.json", "scheduler/scheduler_config.json"):
        folder = Path(shutil.copytree(tmp_path / "whole", tmp_path / place.replace("/", "-")))
        (folder / place).write_text(LFS)
        with pytest.raises(TeacherError, match=f"{place}: is a Git LFS pointer"):
            load_teacher(TeacherConfig(path=str(folder)))
        (folder / place).unlink()
        (folder / place).symlink_to("../blobs/gone")
        with pytest.raises(TeacherError, match=f"{place}: is a link to .*gone, which is not there"):
            load_teacher(TeacherConfig(path=str(folder)))


def test_an_error_in_place_of_settings_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"error": "Repository not found"}))
    with pytest.raises(TeacherError, match=r"config\.json: is an answer of a server .*Repository not found"):
        load_teacher(TeacherConfig(path=str(tmp_path)))


def test_an_archive_of_a_checkpoint_is_named(tmp_path: Path) -> None:
    torch.save({"a": torch.ones(1)}, tmp_path / "x.pth")
    with tarfile.open(tmp_path / "plain.tar", "w") as archive:
        archive.add(tmp_path / "x.pth", "x.pth")
    (tmp_path / "packed.tar.gz").write_bytes(gzip.compress((tmp_path / "plain.tar").read_bytes()))
    for name, packer in (("plain.tar", "tar"), ("packed.tar.gz", "gzip")):
        with pytest.raises(TeacherError, match=f"{name}: is a {packer} archive; unpack it"):
            load_teacher(TeacherConfig(path=str(tmp_path / name)))


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_a_program_in_place_of_weights_is_named(tmp_path: Path) -> None:
    torch.jit.save(torch.jit.trace(torch.nn.Identity(), torch.ones(1)), tmp_path / "x.pt")
    with pytest.raises(TeacherError, match=r"is a TorchScript program, not its weights; save the state_dict"):
        read_weights(tmp_path / "x.pt")


@pytest.mark.parametrize("kind", ["adm", "stylegan2", "biggan"])
def test_a_folder_in_place_of_a_file_is_named(kind: str, tmp_path: Path) -> None:
    with pytest.raises(TeacherError, match="is a folder; give the path of"):
        load_teacher(TeacherConfig(path=str(tmp_path), kind=kind))


def test_real_files_are_no_disguises(tmp_path: Path) -> None:
    """Otherwise a good checkpoint would be refused."""
    torch.save({"a": torch.ones(1)}, tmp_path / "zip.pt")
    torch.save({"a": torch.ones(1)}, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for protocol in range(6):
        (tmp_path / f"{protocol}.pkl").write_bytes(pickle.dumps({"a": [1, "b"]}, protocol))
    (tmp_path / "noise.bin").write_bytes(bytes(range(256)))
    assert [path.name for path in tmp_path.iterdir() if disguise_of(path) is not None] == []
    assert disguise_of(tmp_path) is None and disguise_of(tmp_path / "missing") is None


def test_damaged_settings_are_not_called_a_text(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"_class_name": ')
    with pytest.raises(TeacherError, match=r"config\.json: (?!is a text)"):
        read_json(tmp_path / "config.json")
