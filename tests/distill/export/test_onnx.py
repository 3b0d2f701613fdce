"""Exports to ONNX run in onnxruntime, at other batches and sizes, and say what they are."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from dtpipe.distill.export.registry import EXPORTS
from dtpipe.distill.export.write import ExportResult, export_student
from dtpipe.distill.student.load import load_student
from dtpipe.manifests.errors import MissingPackageError
from parts.memory import write_student


@pytest.fixture(scope="module")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> tuple[ExportResult, Path]:
    root = tmp_path_factory.mktemp("onnx")
    checkpoint = write_student(root / "last.pt", "test_resnet", (32, 32), stirred=True)
    return export_student(checkpoint, root / "out", "onnx"), checkpoint


@pytest.mark.parametrize("shape", [(1, 3, 32, 32), (3, 3, 96, 64)])
def test_levels_are_the_students_at_any_batch_and_size(shape: tuple[int, ...], resnet) -> None:
    """float32 by other kernels: 1e-4 of the largest value."""
    result, checkpoint = resnet
    student, images = load_student(checkpoint), torch.rand(shape)
    session = onnxruntime.InferenceSession(str(result.path))
    assert [output.name for output in session.get_outputs()] == ["l2", "l3", "l4", "l5"]
    with torch.no_grad():
        expected = [student.net(images)[idx].numpy() for idx in student.level_idxs]
    for level, own in zip(session.run(None, {"images": images.numpy()}), expected, strict=True):
        np.testing.assert_allclose(level, own, rtol=0, atol=1e-4 * np.abs(own).max())


def test_the_printed_code_runs_and_the_file_says_what_it_is(resnet) -> None:
    result, _ = resnet
    names: dict[str, object] = {}
    exec(result.snippet, names)
    assert names["l5"].shape == (1, 96, 1, 1)
    assert result.finetune == ""
    properties = {entry.key: json.loads(entry.value) for entry in onnx.load(result.path).metadata_props}
    assert properties["dtpipe_student"]["name"] == "test_resnet"
    assert properties["mean"] == [0.5, 0.5, 0.5]


def test_a_network_tied_to_one_size_keeps_it_and_any_batch(tmp_path: Path) -> None:
    checkpoint = write_student(tmp_path / "last.pt", "test_vit", (32, 48), stirred=True)
    result = export_student(checkpoint, tmp_path / "out", "onnx")
    session = onnxruntime.InferenceSession(str(result.path))
    batch, *shape = session.get_inputs()[0].shape
    assert isinstance(batch, str) and shape == [3, 32, 48]
    student, images = load_student(checkpoint), torch.rand(5, 3, 32, 48)
    with torch.no_grad():
        (own,) = student.net(images)[-1:]
    (level,) = session.run(None, {"images": images.numpy()})
    np.testing.assert_allclose(level, own.numpy(), rtol=0, atol=1e-4 * float(own.abs().max()))


def test_without_the_packages_the_extra_is_named(monkeypatch) -> None:
    imported = builtins.__import__

    def refuse(name: str, *args: object, **kwargs: object) -> object:
        if name == "onnxruntime":
            raise ImportError(name)
        return imported(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(MissingPackageError, match=r"pip install 'dtpipe\[onnx\]'"):
        EXPORTS["onnx"].check(None)
