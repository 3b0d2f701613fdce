"""Exports in the names of detectors and segmenters: each consumer that is at hand loads and trains one.

detectron2's network is written here from its published names and structure; OpenMMLab's and the ConvNeXt paper's names
are generated from theirs.
"""

from __future__ import annotations

import ast
import json
import pickle
import re
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
import torchvision
import yaml
from blake3 import blake3
from safetensors.torch import load_file

from dtpipe.distill.export.detectron2 import to_detectron2
from dtpipe.distill.export.registry import EXPORTS
from dtpipe.distill.export.torchvision_detection import to_body
from dtpipe.distill.export.write import ExportResult, export_student
from dtpipe.distill.student.foreign import load_foreign
from dtpipe.distill.student.load import load_student
from dtpipe.distill.student.student import Student, StudentSpec, build_student
from dtpipe.manifests.errors import ConfigError, DamagedDataError, ExportError, InputError
from dtpipe.pipeline.rivals.weights import read_weights_file
from parts.consumers import Detectron2ResNet, convnext_shapes, train_step
from parts.damage import flip
from parts.memory import write_student
from parts.paths import REPO

Export = Callable[[str, str], tuple[ExportResult, Student]]
TINY = ([3, 3, 9, 3], [96, 192, 384, 768])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Export]:
    """An export of a student in a layout, made once, and the student."""
    root = tmp_path_factory.mktemp("exports")

    @cache
    def checkpoint(name: str) -> Path:
        return write_student(root / name / "last.pt", name, (32, 32) if "conv" in name else (64, 64), stirred=True)

    @cache
    def export(name: str, layout: str) -> tuple[ExportResult, Student]:
        return export_student(checkpoint(name), root / f"{name} {layout}", layout), load_student(checkpoint(name))

    yield export
    shutil.rmtree(root)  # most of a gigabyte


def run_code(code: str) -> Any:
    """The `model` that printed code makes."""
    names: dict[str, Any] = {}
    exec(code, names)
    return names["model"]


def levels_of(student: Student, images: torch.Tensor) -> list[torch.Tensor]:
    """Levels of images that are normalised already."""
    with torch.no_grad():
        return [student.net(images)[idx] for idx in student.level_idxs]


def assert_equal_levels(theirs: list[torch.Tensor], own: list[torch.Tensor]) -> None:
    assert len(theirs) == len(own) == 4
    for level, other in zip(theirs, own, strict=True):
        torch.testing.assert_close(level, other, rtol=0, atol=1e-5 * float(other.abs().max()))


def test_torchvisions_mask_rcnn_has_the_levels_and_takes_a_step_on_five_classes(exported: Export) -> None:
    result, student = exported("resnet18", "torchvision-detection")
    model = run_code(result.finetune)
    images = torch.rand(2, 3, *student.spec.image_px)
    with torch.no_grad():
        assert_equal_levels(list(model.eval().backbone.body(images).values()), levels_of(student, images))
    assert tuple(model.transform.image_mean) == pytest.approx(tuple(student.mean.flatten().tolist()))
    new = set(model.state_dict()) - set(load_file(result.path))
    assert {key.split(".")[0] for key in new if not key.startswith("backbone.fpn.")} == {"rpn", "roi_heads"}
    model.transform.min_size = (64,)
    target = {
        "boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]),
        "labels": torch.tensor([4]),
        "masks": torch.ones(1, 64, 64, dtype=torch.uint8),
    }
    losses = model.train()(list(torch.rand(2, 3, 64, 64)), [target, target])
    assert set(losses) == {"loss_classifier", "loss_box_reg", "loss_mask", "loss_objectness", "loss_rpn_box_reg"}
    before = train_step(model, sum(losses.values()))
    moved = {
        name for old, (name, new) in zip(before, model.named_parameters(), strict=True) if not torch.equal(old, new)
    }
    assert {"backbone.body.conv1.weight", "roi_heads.box_predictor.cls_score.weight"} <= moved


@pytest.mark.parametrize("detector", ["FasterRCNN", "RetinaNet", "FCOS"])
def test_other_detectors_of_torchvision_take_the_backbone_that_mask_rcnn_takes(detector: str, exported: Export) -> None:
    result, student = exported("resnet18", "torchvision-detection")
    names: dict[str, Any] = {}
    exec(result.finetune.partition("model = ")[0], names)
    model = getattr(torchvision.models.detection, detector)(names["backbone"], num_classes=5)
    missing, unexpected = model.load_state_dict(load_file(result.path), strict=False)
    assert unexpected == [] and not [name for name in missing if name.startswith("backbone.body.")]
    images = torch.rand(2, 3, *student.spec.image_px)
    with torch.no_grad():
        assert_equal_levels(list(model.eval().backbone.body(images).values()), levels_of(student, images))


@pytest.mark.parametrize("builder", ["fasterrcnn_resnet50_fpn", "retinanet_resnet50_fpn", "fcos_resnet50_fpn"])
def test_torchvisions_builders_of_detectors_have_the_names_of_an_export(builder: str) -> None:
    with torch.device("meta"):
        student = build_student(StudentSpec("resnet18", 4, (32, 32)))  # names go by timm's alone
        ours = timm.create_model("resnet50", num_classes=0).state_dict()
        theirs = getattr(torchvision.models.detection, builder)(weights=None, weights_backbone=None).state_dict()
    renamed = dict(pair for name, weight in ours.items() if (pair := to_body(name, weight, student)))
    body = {name: weight.shape for name, weight in theirs.items() if name.startswith("backbone.body.")}
    assert {name: weight.shape for name, weight in renamed.items()} == body


def test_a_convnext_goes_into_torchvisions_backbone_with_a_pyramid(exported: Export) -> None:
    """The printed code up to the detector, whose heads are those of a ResNet."""
    result, student = exported("convnext_tiny", "torchvision-detection")
    names: dict[str, Any] = {}
    exec(result.finetune.partition("model = ")[0], names)
    backbone = torch.nn.ModuleDict({"backbone": names["backbone"]})
    missing, unexpected = backbone.load_state_dict(load_file(result.path), strict=False)
    assert unexpected == [] and all(name.startswith("backbone.fpn.") for name in missing)
    images = torch.rand(2, 3, *student.spec.image_px)
    with torch.no_grad():
        assert_equal_levels(list(backbone.eval()["backbone"].body(images).values()), levels_of(student, images))


@pytest.mark.parametrize("head", ["deeplabv3_resnet50", "fcn_resnet50"])
def test_torchvisions_segmenters_have_the_levels_where_strides_leave_them_and_take_a_step(
    head: str, exported: Export
) -> None:
    """Their last two stages are dilated: every second and fourth position is the strided network's."""
    result, student = exported("resnet50", "torchvision-segmentation")
    code = result.finetune.replace("deeplabv3_resnet50", head)
    model, images = run_code(code).eval(), torch.rand(2, 3, 64, 64)
    stages = dict(model.backbone.named_children())
    x, outputs = images, {}
    with torch.no_grad():
        for name, stage in stages.items():
            x = outputs[name] = stage(x.clone())
    dilated = [outputs["layer1"], outputs["layer2"], outputs["layer3"][..., ::2, ::2], outputs["layer4"][..., ::4, ::4]]
    assert outputs["layer4"].shape[-1] == 8
    assert_equal_levels(dilated, levels_of(student, images))
    logits = model.train()(images)["out"]
    assert logits.shape == (2, 5, 64, 64)
    loss = torch.nn.functional.cross_entropy(logits, torch.randint(0, 5, (2, 64, 64)))
    before = train_step(model, loss)
    assert not torch.equal(before[0], next(iter(model.parameters())))


def test_transformers_upernet_has_the_levels_and_takes_a_step_on_five_classes(exported: Export, monkeypatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    result, student = exported("test_resnet", "transformers")
    images = torch.rand(2, 3, 64, 64)
    alone, model = run_code(result.snippet).eval(), run_code(result.finetune)
    with torch.no_grad():
        for backbone in (alone, model.eval().backbone):
            assert_equal_levels(list(backbone(images).feature_maps), levels_of(student, images))
    assert type(alone).__name__ == "TimmBackbone"
    out = model.train()(pixel_values=images, labels=torch.randint(0, 5, (2, 64, 64)))
    assert out.logits.shape[1] == 5
    before = train_step(model, out.loss)
    assert not torch.equal(before[0], next(iter(model.parameters())))


def test_detectron2s_network_takes_the_pickle_whole_and_a_step(exported: Export) -> None:
    result, student = exported("resnet18", "detectron2")
    data = result.path.read_bytes()
    content = pickle.loads(data)
    assert (content["__author__"], content["matching_heuristics"]) == ("dtpipe", True)
    assert b"numpy._core" not in data  # which numpy has since 1.26 only
    model = Detectron2ResNet((2, 2, 2, 2), deep=False)
    model.load_state_dict({name: torch.from_numpy(array) for name, array in content["model"].items()})  # no key else
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        assert_equal_levels(model.eval()(images), levels_of(student, images))
    head = torch.nn.Linear(512, 5)
    logits = head(model.train()(images)[-1].mean((2, 3)))
    before = train_step(model, torch.nn.functional.cross_entropy(logits, torch.tensor([0, 4])))
    assert not torch.equal(before[0], next(iter(model.parameters())))


def test_detectron2s_settings_say_colours_normalisation_and_depth(exported: Export) -> None:
    """The numbers of its own tools/convert-torchvision-to-d2.py, but of a ResNet-18."""
    result, _ = exported("resnet18", "detectron2")
    settings = yaml.safe_load((result.path.parent / "detectron2.yaml").read_text())
    assert settings["INPUT"] == {"FORMAT": "RGB"}
    assert settings["MODEL"]["PIXEL_MEAN"] == [123.675, 116.28, 103.53]
    assert settings["MODEL"]["PIXEL_STD"] == [58.395, 57.12, 57.375]
    resnets = settings["MODEL"]["RESNETS"]
    assert (resnets["DEPTH"], resnets["STRIDE_IN_1X1"], resnets["RES2_OUT_CHANNELS"]) == (18, False, 64)


def test_a_resnet_50_has_the_318_arrays_of_detectron2() -> None:
    student = build_student(StudentSpec("resnet18", 4, (32, 32)))  # names go by timm's alone
    with torch.device("meta"):
        theirs = Detectron2ResNet((3, 4, 6, 3), deep=True).state_dict()
        ours = timm.create_model("resnet50", num_classes=0).state_dict()
    renamed = dict(to_detectron2(name, weight, student) for name, weight in ours.items())
    assert len(renamed) == 318
    assert {name: weight.shape for name, weight in renamed.items()} == {n: w.shape for n, w in theirs.items()}


def test_openmmlabs_resnet_has_torchvisions_names(exported: Export) -> None:
    result, student = exported("resnet18", "openmmlab")
    checkpoint = torch.load(result.path, weights_only=True)
    model = torchvision.models.resnet18()
    missing, unexpected = model.load_state_dict(checkpoint["state_dict"], strict=False)
    assert (missing, unexpected) == (["fc.weight", "fc.bias"], [])
    model.fc = torch.nn.Identity()
    images = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled = model.eval()(images)
    torch.testing.assert_close(pooled, levels_of(student, images)[-1].mean((2, 3)))


def test_official_convnext_names_load_into_timm_and_take_a_step_on_five_classes(exported: Export) -> None:
    result, student = exported("convnext_tiny", "convnext")
    weights = torch.load(result.path, weights_only=True)["model"]
    assert {name: tuple(weight.shape) for name, weight in weights.items()} == convnext_shapes(*TINY)
    model = timm.create_model(
        "convnext_tiny", pretrained=True, num_classes=5, pretrained_cfg_overlay={"file": str(result.path)}
    )
    images = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        theirs = model.eval().forward_intermediates(images, intermediates_only=True)
    assert_equal_levels(theirs, levels_of(student, images))
    loss = torch.nn.functional.cross_entropy(model.train()(images), torch.tensor([0, 4]))
    before = train_step(model, loss)
    assert not torch.equal(before[0], next(iter(model.parameters())))


def test_openmmlabs_convnext_is_what_mmpretrains_converter_makes_of_the_official(exported: Export) -> None:
    """The rule of tools/model_converters/convnext_to_mmpretrain.py, applied to the other export."""

    def convert(name: str) -> str:
        if name.startswith("stages"):
            name = name.replace("dwconv", "depthwise_conv").replace("pwconv", "pointwise_conv")
        elif name.startswith("norm"):
            name = name.replace("norm", "norm3")
        return f"backbone.{name}"

    (official, _), (theirs, _) = exported("convnext_tiny", "convnext"), exported("convnext_tiny", "openmmlab")
    weights = torch.load(official.path, weights_only=True)["model"]
    expected = {convert(name): weight for name, weight in weights.items()}
    written = torch.load(theirs.path, weights_only=True)["state_dict"]
    assert written.keys() == expected.keys()
    assert all(torch.equal(written[name], weight) for name, weight in expected.items() if "norm3" not in name)
    assert "prefix='backbone.'" in theirs.finetune


@pytest.mark.parametrize(("name", "layout"), [("resnet18", "torchvision-detection"), ("test_resnet", "transformers")])
def test_load_student_reads_exports_that_are_safetensors(name: str, layout: str, exported: Export) -> None:
    result, student = exported(name, layout)
    images = torch.rand(1, 3, 64, 64)
    again = load_student(result.path.parent)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(images), student(images), strict=True))


@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("resnet18", "torchvision-detection"),
        ("resnet18", "detectron2"),
        ("resnet18", "openmmlab"),
        ("convnext_tiny", "openmmlab"),
    ],
)
def test_the_reader_of_other_projects_weights_finds_the_student(name: str, layout: str, exported: Export) -> None:
    """`dtpipe eval --compare MODEL@FILE` reads these names by tables of its own."""
    result, student = exported(name, layout)
    again = load_foreign(student.spec, read_weights_file(result.path), "the export").student
    images = torch.rand(1, 3, *student.spec.image_px)
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(again(images), student(images), strict=True))


def test_an_export_that_is_not_read_back_says_what_to_give(exported: Export) -> None:
    result, _ = exported("resnet18", "detectron2")
    with pytest.raises(InputError, match=r"holds an export in layout detectron2, .*give the run folder"):
        load_student(result.path.parent)


def test_the_record_of_an_export_has_the_digests_of_its_files_and_a_seal(exported: Export, tmp_path: Path) -> None:
    result, _ = exported("resnet18", "detectron2")
    record = json.loads((result.path.parent / "student.json").read_text())
    assert (record["layout"], record["student"]["name"]) == ("detectron2", "resnet18")
    names = ("config.json", "detectron2.yaml", "model.pkl")
    expected = {name: blake3((result.path.parent / name).read_bytes()).hexdigest() for name in names}
    assert record["files"] == expected
    (tmp_path / "student.json").write_bytes((result.path.parent / "student.json").read_bytes())
    flip(tmp_path / "student.json", 20)
    with pytest.raises(DamagedDataError, match=r"student\.json"):
        export_student(tmp_path, tmp_path, "detectron2")


def test_a_folder_with_another_layout_is_refused_and_with_the_same_replaced(tmp_path: Path) -> None:
    checkpoint = write_student(tmp_path / "last.pt", "test_resnet")
    for _ in range(2):
        export_student(checkpoint, tmp_path / "out", "timm")
    with pytest.raises(ConfigError, match=r"holds an export in layout timm; choose another --out"):
        export_student(checkpoint, tmp_path / "out", "transformers")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
        "config.json",
        "model.safetensors",
        "student.json",
    ]


@pytest.mark.parametrize(
    ("name", "layout", "words"),
    [
        ("test_resnet", "detectron2", r"no detectron2 counterpart .*resnet18"),
        ("test_resnet", "openmmlab", r"no OpenMMLab counterpart .*convnext_xlarge"),
        ("resnet18", "torchvision-segmentation", r"no DeepLab counterpart .*resnet50, resnet101"),
        ("test_convnext", "convnext", r"no ConvNeXt counterpart .*convnext_tiny"),
        ("test_vit", "transformers", r"tied to images of \(32, 48\) px.*layout timm"),
        ("swin_tiny_patch4_window7_224", "transformers", "channels last"),
    ],
)
def test_a_student_without_a_place_is_refused_before_anything_is_written(name: str, layout: str, words: str) -> None:
    px = (32, 48) if name == "test_vit" else (64, 64)
    with torch.device("meta"):
        student = build_student(StudentSpec(name, 4, px))
    with pytest.raises(ConfigError, match=words):
        EXPORTS[layout].check(student)


def test_a_wrong_name_is_found_before_anything_takes_its_place(tmp_path: Path, monkeypatch) -> None:
    """Two blocks of one shape are swapped by the renamer alone."""
    checkpoint = write_student(tmp_path / "last.pt", "resnet18", stirred=True)
    faithful = to_detectron2

    def swapped(name: str, weight: torch.Tensor, student: Student) -> tuple[str, torch.Tensor]:
        other = {"layer1.0.conv1.weight": "layer1.1.conv1.weight", "layer1.1.conv1.weight": "layer1.0.conv1.weight"}
        return faithful(other.get(name, name), weight, student)

    entry = EXPORTS["detectron2"]
    monkeypatch.setitem(EXPORTS, "detectron2", type(entry)(**{**vars(entry), "rename": swapped}))
    with pytest.raises(ExportError, match=r"differs from the student by .* at stride 4; nothing was exported"):
        export_student(checkpoint, tmp_path / "out", "detectron2")
    assert list((tmp_path / "out").iterdir()) == []


DOCUMENTED = {  # layout: the student whose code docs/exports.md shows, and the folder
    "timm": ("resnet50", "r50"),
    "torchvision": ("resnet50", "r50-tv"),
    "torchvision-detection": ("resnet50", "r50-det"),
    "torchvision-segmentation": ("resnet50", "r50-seg"),
    "detectron2": ("resnet50", "r50-d2"),
    "openmmlab": ("resnet50", "r50-mm"),
    "convnext": ("convnext_base", "cnx"),
    "transformers": ("resnet50", "r50-hf"),
    "onnx": ("resnet50", "r50-onnx"),
}


@pytest.mark.parametrize("layout", EXPORTS)
def test_the_page_on_exports_shows_what_the_command_prints(layout: str) -> None:
    name, folder = DOCUMENTED[layout]
    with torch.device("meta"):
        student = build_student(StudentSpec(name, 4, (224, 224)))
    entry, page = EXPORTS[layout], (REPO / "docs" / "exports.md").read_text()
    path = Path(folder) / entry.file
    code = entry.finetune(path, student) or entry.snippet(path, student)
    shown = re.findall(r"^```python\n(.*?)^```$", page, re.DOTALL | re.MULTILINE)
    assert ast.dump(ast.parse(code)) in [ast.dump(ast.parse(block)) for block in shown]  # quotes and line ends aside
