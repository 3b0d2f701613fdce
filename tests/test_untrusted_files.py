"""No file of others can run code: no part of dtpipe calls a loader that would, and no checkpoint layout reaches one."""

from __future__ import annotations

import ast
import pickle
import shutil
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import TeacherError
from parts import sd_pipelines
from parts.damage import Attack
from parts.paths import REPO

FILES = sorted(
    path for folder in ("manifests", "extract", "distill", "pipeline") for path in (REPO / folder).rglob("*.py")
)
FROM_OWN_PROCESS = {"distill/downstream/tuned/examples.py": ["cloudpickle.loads"]}
"""What reads only what this process sent to the workers that it started: no file, no other machine."""
RUNS_CODE = {"pickle", "cPickle", "_pickle", "marshal", "shelve", "dill", "joblib", "cloudpickle"}

WRITES = ("dump", "dumps")


def unsafe_calls(source: str) -> Iterator[str]:
    """Calls that would run what a file says, with their line; names of exceptions are no calls."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] in RUNS_CODE:
            yield f"line {node.lineno}: from {node.module}"
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        root, leaf = name.split(".")[0], name.rpartition(".")[2]
        given = {each.arg: getattr(each.value, "value", None) for each in node.keywords}
        if root in RUNS_CODE and leaf not in WRITES:
            yield f"line {node.lineno}: {name}"
        elif root == "torch" and leaf == "load" and given.get("weights_only") is not True:
            yield f"line {node.lineno}: {name} without weights_only=True"
        elif (
            root in ("np", "numpy", "npy") and leaf in ("load", "read_array") and given.get("allow_pickle") is not False
        ):
            yield f"line {node.lineno}: {name} without allow_pickle=False"
        elif name in ("yaml.unsafe_load", "yaml.full_load", "eval", "exec"):
            yield f"line {node.lineno}: {name}"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPO).as_posix())
def test_no_loader_that_runs_code_is_called(path: Path) -> None:
    calls = [call.partition(": ")[2] for call in unsafe_calls(path.read_text(encoding="utf-8"))]
    assert calls == FROM_OWN_PROCESS.get(path.relative_to(REPO).as_posix(), [])


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("torch.load(path)", True),
        ("torch.load(path, weights_only=False)", True),
        ("torch.load(path, weights_only=safe)", True),
        ("torch.load(path, weights_only=True)", False),
        ("np.load(path, allow_pickle=True)", True),
        ("np.load(path)", True),
        ("np.lib.format.read_array(file, allow_pickle=False)", False),
        ("import pickle\npickle.loads(data)", True),
        ("from pickle import loads", True),
        ("import pickle\npickle.dumps(arrays)", False),
        ("import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass", False),
        ("yaml.unsafe_load(text)", True),
        ("eval(text)", True),
        ("network.eval()", False),
    ],
)
def test_a_loader_that_runs_code_would_be_found(source: str, found: bool) -> None:
    assert bool(list(unsafe_calls(source))) == found


# Layouts of several files, each of which is a place for a pickle


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Stable Diffusion whose VAE is an autoencoder too, and the two files of a taesd."""
    root = tmp_path_factory.mktemp("checkpoints")
    sd_pipelines.save_pipeline(root / "sd")
    shutil.copytree(root / "sd" / "vae", root / "vae")
    from dtpipe.extract.teachers.vae.taesd import TinyAutoencoder

    tiny = TinyAutoencoder(4, 3, pool=False)
    (root / "taesd").mkdir()
    for part in ("encoder", "decoder"):
        torch.save(getattr(tiny, part).state_dict(), root / "taesd" / f"taesd_{part}.pth")
    return root


NETWORK = "diffusion_pytorch_model"
PLACES = {
    "unet": ("sd", f"unet/{NETWORK}.safetensors", f"unet/{NETWORK}.bin"),
    "vae of a pipeline": ("sd", f"vae/{NETWORK}.safetensors", f"vae/{NETWORK}.bin"),
    "text encoder": ("sd", "text_encoder/model.safetensors", "text_encoder/pytorch_model.bin"),
    "vae": ("vae", f"{NETWORK}.safetensors", f"{NETWORK}.bin"),
    "taesd encoder": ("taesd", "taesd_encoder.pth", "taesd_encoder.pth"),
    "taesd decoder": ("taesd", "taesd_decoder.pth", "taesd_decoder.pth"),
}


@pytest.fixture(params=PLACES)
def opened(request: pytest.FixtureRequest, checkpoints: Path, tmp_path: Path) -> tuple[Path, Path, dict[str, Any]]:
    """A copy of a checkpoint, the file in it to write in torch's format, and what belongs in that file."""
    folder, stored, pickled = PLACES[request.param]
    copy = Path(shutil.copytree(checkpoints / folder, tmp_path / folder))
    tensors = (
        load_file(copy / stored) if stored.endswith(".safetensors") else torch.load(copy / stored, weights_only=True)
    )
    (copy / stored).unlink()
    return copy, copy / pickled, tensors


def test_a_plain_file_of_tensors_is_read_there(opened: tuple[Path, Path, dict[str, Any]]) -> None:
    """Otherwise the test below could refuse for another reason."""
    folder, file, tensors = opened
    torch.save(tensors, file)
    assert load_teacher(TeacherConfig(path=str(folder))).spec.levels


@pytest.mark.parametrize("form", ["one more entry", "in place of a tensor", "torch's old format", "a bare pickle"])
def test_code_in_any_file_of_a_checkpoint_is_refused_and_not_run(
    form: str, opened: tuple[Path, Path, dict[str, Any]], tmp_path: Path
) -> None:
    folder, file, tensors = opened
    trap = tmp_path / "executed"
    first = min(tensors)
    content = {**tensors, first if form == "in place of a tensor" else "more": Attack(trap)}
    if form == "a bare pickle":
        file.write_bytes(pickle.dumps(content["more"], 4))
    else:
        torch.save(content, file, _use_new_zipfile_serialization=form != "torch's old format")
    with pytest.raises(TeacherError, match=rf"{file.name}: not readable as weights") as refused:
        load_teacher(TeacherConfig(path=str(folder)))
    assert "\n" not in str(refused.value)
    assert not trap.exists()
    with suppress(Exception):  # the same bytes do run where they are trusted
        pickle.loads(file.read_bytes()) if form == "a bare pickle" else torch.load(file, weights_only=False)
    assert trap.exists()
