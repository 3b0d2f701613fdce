"""Exports load elsewhere, without dtpipe, and compute what the student computes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from dtpipe.distill.export import write as export
from dtpipe.distill.export.registry import EXPORTS
from dtpipe.distill.export.write import export_student
from dtpipe.distill.student.load import load_student
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError, DamagedDataError, ExportError, InputError
from parts.memory import write_student

ALONE = """
import sys
sys.modules["dtpipe"] = None  # importing it would raise
import torch
images = torch.load(sys.argv[1], weights_only=True)
pooled = {}
"""
EACH = """
{snippet}
with torch.no_grad():
    pooled[{name!r}] = model.eval()(images)
"""


def test_snippets_load_exports_in_a_process_without_dtpipe(tmp_path):
    """Their pooled output is the mean of the student's last level."""
    names = {
        "resnet10t": "timm",
        "resnet18": "torchvision",
        "resnet50": "torchvision",
    }  # both kinds of torchvision's blocks
    code, images = ALONE, torch.rand(2, 3, 64, 64)
    for name, layout in names.items():
        result = export_student(write_student(tmp_path / name / "last.pt", name), tmp_path / "export" / name, layout)
        assert result.untrained == ()
        code += EACH.format(snippet=result.snippet, name=name)
    torch.save(images, tmp_path / "in.pt")
    code += "torch.save(pooled, sys.argv[2])\n"
    subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "in.pt"), str(tmp_path / "out.pt")], check=True, cwd=tmp_path
    )
    pooled = torch.load(tmp_path / "out.pt", weights_only=True)
    for name in names:
        with torch.no_grad():
            expected = load_student(tmp_path / name).net(images)[-1].mean(dim=(2, 3))
        torch.testing.assert_close(pooled[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "px"),
    [
        ("convnext_atto", (64, 64)),
        ("mobilenetv3_small_050", (64, 64)),
        ("hrnet_w18_small", (64, 64)),
        ("vit_tiny_patch16_224", (64, 96)),
        ("eva02_tiny_patch14_224", (56, 70)),
        ("swin_tiny_patch4_window7_224", (64, 96)),
        ("pvt_v2_b0", (64, 96)),
    ],
)
def test_intermediates_of_the_full_model_are_the_students_levels(tmp_path, name, px):
    """Also where timm's features_only model names its weights otherwise, or is tied to one image size."""
    result = export_student(write_student(tmp_path / "last.pt", name, px), tmp_path / "export")
    options = {"img_size": px} if "224" in name else {}
    model = timm.create_model(name, num_classes=0, **options).eval()
    model.load_state_dict(load_file(result.path))
    student = load_student(tmp_path)
    images = torch.rand(2, 3, *px)
    with torch.no_grad():
        theirs = model.forward_intermediates(student.normalise(images), intermediates_only=True)
        for level in student(images):
            assert any(
                level.shape == other.shape and torch.allclose(level, other, rtol=1e-4, atol=1e-5) for other in theirs
            )
    assert all(
        part.startswith(("norm", "head", "conv_head", "fc_norm", "downsamp_modules", "final_layer"))
        for part in result.untrained
    )


def test_timms_local_dir_loader_reads_the_folder(tmp_path):
    export_student(write_student(tmp_path / "last.pt", "resnet10t"), tmp_path / "export")
    model = timm.create_model(f"local-dir:{tmp_path / 'export'}", pretrained=True, num_classes=0)
    assert torch.equal(model.conv1[0].weight, load_student(tmp_path).net.conv1[0].weight)
    assert model.pretrained_cfg["mean"] == pytest.approx([0.485, 0.456, 0.406])


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet18", "torchvision"),
        ("convnext_atto", "timm"),
        ("test_vit", "timm"),
        ("swin_tiny_patch4_window7_224", "timm"),
    ],
)
def test_load_student_reads_exports(tmp_path, name, layout):
    write_student(tmp_path / "run" / "last.pt", name)
    result = export_student(tmp_path / "run", tmp_path / "export", layout)
    trained, images = load_student(tmp_path / "run"), torch.rand(2, 3, 64, 64)
    for path in (tmp_path / "export", result.path):
        again = load_student(path)
        assert all(torch.equal(a, b) for a, b in zip(trained(images), again(images), strict=True))


def test_an_unknown_layout_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ConfigError, match=r"export.layout is 'onnx'; choose one of timm, torchvision"):
        export_student(tmp_path, tmp_path / "export", "onnx")


def test_torchvision_is_refused_for_other_students(tmp_path):
    with pytest.raises(ConfigError, match=r"resnet10t has no torchvision counterpart.*resnet18, resnet34"):
        export_student(write_student(tmp_path / "last.pt", "resnet10t"), tmp_path / "export", "torchvision")


def test_an_export_that_differs_is_refused_and_leaves_nothing(tmp_path, monkeypatch):
    checkpoint = write_student(tmp_path / "last.pt", "resnet10t")
    faithful = export.save_file

    def corrupt(weights, path, metadata):
        weights["conv1.0.weight"] = weights["conv1.0.weight"] * 1.01
        faithful(weights, path, metadata=metadata)

    monkeypatch.setattr(export, "save_file", corrupt)
    with pytest.raises(ExportError, match="differs from the student"):
        export_student(checkpoint, tmp_path / "export")
    assert list((tmp_path / "export").iterdir()) == []


def perturbed(name: str) -> Student:
    """A student in which every weight matters: nothing is left at zero, one or 1e-6 as initialisation leaves it."""
    generator = torch.Generator().manual_seed(0)
    student = build_student(StudentSpec(name, 4, (32, 32))).eval()
    for tensor in student.net.state_dict().values():
        if tensor.is_floating_point() and tensor.ndim == 1:  # biases, scales, statistics; kernels are random already
            tensor.add_(torch.rand(tensor.shape, generator=generator) + 0.25)
    return student


@pytest.mark.parametrize(
    ("name", "layout"), [("resnet18", "torchvision"), ("test_resnet", "timm"), ("test_convnext", "timm")]
)
def test_the_check_of_an_export_sees_every_tensor(tmp_path, name, layout):
    """Any trained tensor in another's place is found, not only those that reach the last level."""
    student = perturbed(name)
    weights, untrained = export.full_weights(student)
    save_file(weights, tmp_path / "model.safetensors")
    reloaded = EXPORTS[layout].reload(tmp_path / "model.safetensors", student)
    assert export.compare(student, reloaded) < 1e-3
    model = reloaded.func.__self__ if layout == "timm" else torch.nn.ModuleList(reloaded.args[0])
    unread = {tensor.data_ptr() for tensor_name, tensor in model.state_dict().items() if tensor_name in untrained}
    for tensor_name, tensor in model.state_dict().items():
        if not tensor.is_floating_point() or tensor.data_ptr() in unread:
            continue
        faithful = tensor.clone()
        tensor.copy_(faithful.flatten().roll(1).view_as(faithful) if tensor.numel() > 1 else faithful * 2)
        with pytest.raises(ExportError, match=r"differs from the student by .* at stride"):
            export.compare(student, reloaded)
            pytest.fail(tensor_name)
        tensor.copy_(faithful)
    assert export.compare(student, reloaded) < 1e-3  # all are back


def test_an_export_without_a_stage_of_a_levels_shape_is_refused():
    student = perturbed("resnet10t")
    with pytest.raises(ExportError, match="by inf at stride 8"):
        export.compare(student, lambda images: [level for level in student.net(images) if level.shape[-1] != 4])


def test_an_unknown_or_damaged_export_is_named(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match="holds no student"):
        load_student(tmp_path / "other.safetensors")
    (tmp_path / "broken.safetensors").write_bytes(b"\xff" * 100)
    with pytest.raises(DamagedDataError, match=r"broken.safetensors"):
        load_student(tmp_path / "broken.safetensors")


def test_the_weights_keep_the_names_of_the_library(tmp_path):
    result = export_student(write_student(tmp_path / "last.pt", "resnet18"), tmp_path / "export")
    assert set(load_file(result.path)) == set(timm.create_model("resnet18", num_classes=0).state_dict())
    config = json.loads((tmp_path / "export" / "config.json").read_text())
    assert config["architecture"] == "resnet18"
