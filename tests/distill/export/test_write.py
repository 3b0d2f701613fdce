"""Exports load elsewhere, without dtpipe, and compute what the student computes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from dtpipe.distill.export import write as export
from dtpipe.distill.export.registry import EXPORTS
from dtpipe.distill.export.write import export_student
from dtpipe.distill.student.load import NAMES_KEY, STUDENT_KEY, load_student
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError, DamagedDataError, ExportError, InputError
from parts.damage import flip
from parts.memory import write_student

PX = {"test_vit": (48, 64), "convnext_tiny": (32, 32)}
EXPORTED = [  # one of each kind of torchvision's blocks, a name with a tag, a model that is tied to one image size
    ("resnet10t.c3_in1k", "timm"),
    ("test_convnext", "timm"),
    ("test_vit", "timm"),
    ("resnet18", "torchvision"),
    ("resnet50", "torchvision"),
    ("convnext_tiny", "torchvision"),
]
TRANSFORMERS = """
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained({folder!r}, num_labels=5)
"""
ALONE = """
import json, sys
sys.modules["dtpipe"] = None  # importing it would raise
import torch
from safetensors.torch import load_file

def tune(model, file, px, channels=3, prefix=""):
    "What the model has of the file, and its losses on ten images of five classes."
    torch.manual_seed(0)
    weights = {prefix + name: weight for name, weight in load_file(file).items()}
    own = model.state_dict()
    other = [name for name, weight in weights.items() if not torch.equal(own[name], weight)]
    first = own[other[0]].clone() if other else None
    images, labels, losses = torch.randn(10, channels, *px), torch.arange(10) % 5, []
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-3)
    for _ in range(3):
        logits = model(images)
        loss = torch.nn.functional.cross_entropy(getattr(logits, "logits", logits), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    return {"other": other, "first": first, "new": sorted(set(own) - set(weights)), "losses": losses}

images, pooled, tuned = torch.load(sys.argv[1], weights_only=True), {}, {}
"""
POOLED = """
{snippet}
with torch.no_grad():
    pooled[{name!r}] = model.eval()(images[{name!r}])
"""
TUNED = """
{code}
tuned[{case!r}] = tune(model, {file!r}, {px!r}, {channels!r}, {prefix!r})
"""


@pytest.fixture(scope="module")
def small_export(tmp_path_factory):
    """The weights of an exported student."""
    folder = tmp_path_factory.mktemp("export")
    return export_student(write_student(folder / "last.pt", "test_resnet"), folder / "export").path


@dataclass(frozen=True)
class Elsewhere:
    """What a process without dtpipe made of the exports."""

    root: Path
    images: dict[str, torch.Tensor]
    pooled: dict[str, torch.Tensor]
    tuned: dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Elsewhere]:
    """One process for all: imports cost more than training."""
    root, code, images = tmp_path_factory.mktemp("ex ports"), ALONE, {}
    for name, layout in EXPORTED:
        px, folder = PX.get(name, (64, 64)), root / name / "export"
        result = export_student(write_student(root / name / "last.pt", name, px), folder, layout)
        assert set(result.untrained) <= {"head.norm.weight", "head.norm.bias", "norm.weight", "norm.bias"}
        images[name] = torch.rand(2, 3, *px)
        tuned = {"file": str(result.path), "px": px, "channels": 3, "prefix": ""}
        code += POOLED.format(snippet=result.snippet, name=name)
        code += TUNED.format(code=result.finetune, case=name, **tuned)
        if layout == "timm":
            grey = result.finetune.replace("num_classes=5", "num_classes=5, in_chans=1")
            code += TUNED.format(code=grey, case=f"{name} grey", **{**tuned, "channels": 1})
    folder = root / "test_convnext" / "export"
    hub = {"file": str(folder / "model.safetensors"), "px": (64, 64), "channels": 3, "prefix": "timm_model."}
    code += TUNED.format(code=TRANSFORMERS.format(folder=str(folder)), case="transformers", **hub)
    torch.save(images, root / "in.pt")
    code += "torch.save((pooled, tuned), sys.argv[2])\n"
    subprocess.run([sys.executable, "-c", code, str(root / "in.pt"), str(root / "out.pt")], check=True, cwd=root)
    yield Elsewhere(root, images, *torch.load(root / "out.pt", weights_only=True))
    shutil.rmtree(root)  # half a gigabyte


@pytest.mark.parametrize(
    "name", [name for name, _ in EXPORTED if name not in ("test_vit", "convnext_tiny", "test_convnext")]
)
def test_snippets_load_exports_in_a_process_without_dtpipe(name: str, elsewhere: Elsewhere) -> None:
    """Their pooled output is the mean of the student's last level, where no norm comes after it."""
    with torch.no_grad():
        expected = load_student(elsewhere.root / name).net(elsewhere.images[name])[-1].mean(dim=(2, 3))
    torch.testing.assert_close(elsewhere.pooled[name], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("case", "first_conv"),
    [(name, None) for name, _ in EXPORTED]
    + [("transformers", None), ("resnet10t.c3_in1k grey", "conv1.0"), ("test_convnext grey", "stem.0")]
    + [("test_vit grey", "patch_embed.proj")],
)
def test_exports_are_fine_tuned_elsewhere_on_other_classes_and_channels(
    case: str, first_conv: str | None, elsewhere: Elsewhere
) -> None:
    """All trained weights are there, those of the first convolution summed over colours; only a classifier is new."""
    tuned = elsewhere.tuned[case]
    assert {part.split(".")[-2] for part in tuned["new"]} <= {"fc", "head", "2"} and len(tuned["new"]) == 2
    assert tuned["losses"][-1] < 0.8 * tuned["losses"][0]
    assert tuned["other"] == ([f"{first_conv}.weight"] if first_conv else [])
    if first_conv:
        colour = load_file(elsewhere.root / case.removesuffix(" grey") / "export" / "model.safetensors")
        torch.testing.assert_close(tuned["first"], colour[f"{first_conv}.weight"].sum(dim=1, keepdim=True))


@pytest.mark.parametrize("name", ["resnet10t.c3_in1k", "test_vit"])
def test_timms_local_dir_loader_gives_the_levels_and_the_normalisation(name: str, elsewhere: Elsewhere) -> None:
    folder, student = elsewhere.root / name / "export", load_student(elsewhere.root / name)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, features_only=True).eval()
    with torch.no_grad():
        levels = zip(model(elsewhere.images[name]), student.net(elsewhere.images[name]), strict=True)
        assert all(torch.equal(theirs, own) for theirs, own in levels)
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    half, imagenet = [0.5, 0.5, 0.5], ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert (config["mean"], config["std"]) == ((half, half) if name == "test_vit" else imagenet)  # to the last digit


@pytest.mark.parametrize("name", ["convnext_tiny", "resnet18", "test_vit"])
def test_load_student_reads_exports(name: str, elsewhere: Elsewhere) -> None:
    trained, folder = load_student(elsewhere.root / name), elsewhere.root / name / "export"
    for path in (folder, folder / "model.safetensors"):
        again = load_student(path)
        images = elsewhere.images[name]
        assert all(torch.equal(a, b) for a, b in zip(trained(images), again(images), strict=True))


def test_a_folder_in_torchvisions_names_is_not_taken_for_timms(elsewhere: Elsewhere) -> None:
    folder = elsewhere.root / "convnext_tiny" / "export"
    assert set(json.loads((folder / "config.json").read_text())) == {"input_size", "mean", "std"}
    own = set(torchvision.models.convnext_tiny().state_dict())
    assert own - set(load_file(folder / "model.safetensors")) == {"classifier.2.weight", "classifier.2.bias"}


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


def test_an_unknown_layout_is_refused_with_the_choices(tmp_path):
    with pytest.raises(ConfigError, match=r"export.layout is 'keras'; choose one of timm, torchvision, .*onnx"):
        export_student(tmp_path, tmp_path / "export", "keras")


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
    with pytest.raises(ExportError, match="differs from the student") as error:
        export_student(checkpoint, tmp_path / "export")
    assert error.value.exit_code == 10
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


def test_blocks_of_one_shape_keep_their_places_in_torchvisions_names(tmp_path):
    """The last stage of ConvNeXt has three; what its blocks add counts, as it does not right after initialisation."""
    student, path, saved = perturbed("convnext_tiny"), tmp_path / "model.safetensors", EXPORTS["torchvision"]
    weights, _ = export.full_weights(student)
    theirs = dict(saved.rename(name, weight, student) for name, weight in weights.items())
    save_file(theirs, path)
    assert export.compare(student, saved.reload(path, student)) < 1e-2
    first, second = (f"features.7.{block}.block.3.weight" for block in (0, 1))
    theirs[first], theirs[second] = theirs[second], theirs[first]
    save_file(theirs, path)
    with pytest.raises(ExportError, match="at stride 32"):
        export.compare(student, saved.reload(path, student))


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


@pytest.mark.parametrize("place", [3, 40, 200, 700, 0.4, 0.9, -1])
def test_a_changed_byte_of_an_export_is_found_when_a_student_is_loaded(tmp_path, small_export, place):
    """In its header's size, the metadata, the tensors' names, and the tensors."""
    path = tmp_path / "model.safetensors"
    shutil.copyfile(small_export, path)
    flip(path, int(place * path.stat().st_size) if isinstance(place, float) else place)
    with pytest.raises(DamagedDataError, match=r"model\.safetensors: .*; export again$") as error:
        load_student(path)
    assert error.value.exit_code == 4


def test_an_export_from_before_seals_loads(tmp_path, small_export):
    with safe_open(small_export, framework="pt") as file:
        metadata = {name: value for name, value in file.metadata().items() if name != "dtpipe_blake3"}
    assert metadata.keys() == {"format", "layout", STUDENT_KEY, NAMES_KEY}
    save_file(load_file(small_export), tmp_path / "model.safetensors", metadata=metadata)
    old, new, images = load_student(tmp_path), load_student(small_export), torch.rand(1, 3, 64, 64)
    assert all(torch.equal(a, b) for a, b in zip(old(images), new(images), strict=True))
