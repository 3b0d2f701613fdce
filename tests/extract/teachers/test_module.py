"""A user's own torch module as a teacher: its class from a package in a temporary folder, its weights from a file."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.base import Encoder, Generator
from dtpipe.extract.teachers.module import load_module_teacher
from dtpipe.extract.teachers.registry import KINDS, load_teacher
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_image, read_level
from dtpipe.manifests.schema import ViewSpec
from parts.extractions import Extract
from parts.paths import SHARED
from parts.tensors import relative

FACES = SHARED / "weights" / "dcgan_faces64" / "netG.pth"
PACKAGE = "my_nets_of_a_user"
TAPS = {"l2": "main.8", "l3": "main.5", "l4": "main.2"}
NETS = '''
import torch
from torch import nn


class Generator(nn.Module):
    """DCGAN: z (B, z, 1, 1) -> (B, 3, 64, 64)."""

    def __init__(self, z=100, width=64):
        super().__init__()
        sides = [z, 8 * width, 4 * width, 2 * width, width]
        layers = []
        for idx, (inputs, outputs) in enumerate(zip(sides, sides[1:])):
            up = int(idx > 0)
            layers.append(nn.ConvTranspose2d(inputs, outputs, 4, 1 + up, up, bias=False))
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(True)]
        self.main = nn.Sequential(*layers, nn.ConvTranspose2d(width, 3, 4, 2, 1, bias=False), nn.Tanh())

    def forward(self, z):
        return self.main(z)


class WithLatent(Generator):
    def forward(self, z):
        return (super().forward(z) + 1) * 127.5, z


class Noisy(Generator):
    def forward(self, z):
        return self.main(z + torch.randn_like(z))


class NoisyAtTheEnd(Generator):
    def forward(self, z):
        return super().forward(z) + torch.randn(1, 1, 1, 1)


class Small(Generator):
    def forward(self, z):
        return super().forward(z)[:, :, :32]


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, 8, 4, 4), nn.ReLU(), nn.Conv2d(8, 16, 2, 2))
        self.head = nn.Linear(16, 2)

    def forward(self, images):
        return self.head(self.down(images).mean((2, 3)))


class Bare(nn.Conv2d):
    def __init__(self):
        super().__init__(3, 8, 4, 4)


def function():
    return 3


class Failing(nn.Module):
    def __init__(self):
        raise ValueError("no such size")
'''


@pytest.fixture
def nets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The user's package, importable during one test."""
    package = tmp_path / "site" / PACKAGE
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "nets.py").write_text(NETS)
    (package / "broken.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    import importlib

    yield importlib.import_module(f"{PACKAGE}.nets")
    for name in [name for name in sys.modules if name.startswith(PACKAGE)]:
        del sys.modules[name]


@pytest.fixture
def weights(nets: Any, tmp_path: Path) -> Path:
    """A generator of width 4 whose batch norms have seen something."""
    torch.manual_seed(0)
    network = nets.Generator(z=12, width=4)
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.momentum = None  # a plain average
    for _ in range(3):
        network(torch.randn(16, 12, 1, 1))
    torch.save(network.state_dict(), tmp_path / "generator.pt")
    return tmp_path / "generator.pt"


def settings(
    weights: Path, name: str = "Generator", taps: dict[str, str] | None = TAPS, dtype: str = "float32", **options: Any
) -> TeacherConfig:
    defaults = {
        "module": f"{PACKAGE}.nets:{name}",
        "arguments": {"z": 12, "width": 4},
        "z_shape": [12, 1, 1],
        "image_px": [64, 64],
    }
    return TeacherConfig.model_validate(
        {"path": str(weights), "kind": "module", "taps": taps, "dtype": dtype, "options": {**defaults, **options}}
    )


def load(*args: Any, **options: Any) -> Any:
    return load_module_teacher(settings(*args, **options))


def dcgan_by_hand(tensors: dict[str, torch.Tensor], z: torch.Tensor) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The generator from its weights alone, in float64: images, and what follows each rectifier."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}
    maps, levels = z.double(), {}
    for layer, name in ((0, "l4"), (3, "l3"), (6, "l2"), (9, "l1")):
        if layer == 0:
            levels["l5"] = maps
        maps = F.conv_transpose2d(
            maps, tensors[f"main.{layer}.weight"], stride=1 if layer == 0 else 2, padding=0 if layer == 0 else 1
        )
        mean, var, gain, bias = (
            tensors[f"main.{layer + 1}.{part}"][:, None, None]
            for part in ("running_mean", "running_var", "weight", "bias")
        )
        maps = ((maps - mean) / (var + 1e-5).sqrt() * gain + bias).clamp(min=0)
        levels[name] = maps
    return torch.tanh(F.conv_transpose2d(maps, tensors["main.12.weight"], stride=2, padding=1)), levels


def test_images_and_levels_are_those_of_the_formula(weights: Path) -> None:
    teacher = load(weights)
    assert isinstance(teacher, Generator) and not isinstance(teacher, Encoder)
    assert teacher.spec.noise_shapes == {"z": (12, 1, 1)}
    assert [(level.name, level.stride, level.channels, level.tap) for level in teacher.spec.levels] == [
        ("l2", 4, 8, "main.8"),
        ("l3", 8, 16, "main.5"),
        ("l4", 16, 32, "main.2"),
    ]
    z = torch.from_numpy(draw_noise(0, "key", 0, "z", (3, 12, 1, 1)))
    images, levels = teacher.synthesize({"z": z})
    wanted, wanted_levels = dcgan_by_hand(torch.load(weights, weights_only=True), z)
    assert relative(images, wanted) < 1e-5
    assert max(relative(level, wanted_levels[name]) for name, level in levels.items()) < 1e-5
    alone, _ = teacher.synthesize({"z": z[1:2]})
    assert relative(alone, wanted[1:2]) < 1e-5


@pytest.mark.skipif(not FACES.is_file(), reason="no ../shared/weights/dcgan_faces64")
def test_real_faces(nets: Any) -> None:
    teacher = load(FACES, arguments={}, z_shape=[100, 1, 1])
    z = torch.from_numpy(draw_noise(0, "key", 0, "z", (8, 100, 1, 1)))
    images, levels = teacher.synthesize({"z": z})
    wanted, wanted_levels = dcgan_by_hand(torch.load(FACES, weights_only=True), z)
    assert relative(images, wanted) < 1e-4
    assert max(relative(level, wanted_levels[name]) for name, level in levels.items()) < 1e-4
    assert [level.channels for level in teacher.spec.levels] == [128, 256, 512]
    assert float(images.std(0).mean()) > 0.2  # faces differ
    neighbours = (images[:, :, :, 1:] - images[:, :, :, :-1]).abs().mean()
    assert float(neighbours) < 0.3 * float((images - images.roll(1, 0)).abs().mean())  # and are smooth


def test_an_extracted_dataset_holds_them(weights: Path, extract: Extract) -> None:
    teacher, exact = settings(weights).model_dump(), {"samples": 3, "dtype": "float32"}
    dataset = FeatureDataset.open(extract(images=None, num_samples=5, teacher=teacher, shard=exact))
    tensors = torch.load(weights, weights_only=True)
    for row, key in enumerate(dataset.columns.keys):
        wanted, levels = dcgan_by_hand(tensors, torch.from_numpy(draw_noise(0, key, 0, "z", (1, 12, 1, 1))))
        pixels = ((wanted[0] + 1) * 127.5).round().numpy().transpose(1, 2, 0)
        assert np.abs(read_image(dataset, row) - pixels).max() <= 1
        for name in TAPS:
            np.testing.assert_allclose(read_level(dataset, name, row), levels[name][0], rtol=1e-4, atol=1e-5)
    assert dataset.recipe.teacher.options["module"] == f"{PACKAGE}.nets:Generator"


def test_a_level_is_not_overwritten_by_what_follows_in_place(weights: Path) -> None:
    z = torch.from_numpy(draw_noise(0, "key", 0, "z", (2, 12, 1, 1)))
    _, levels = load(weights, taps={"l3": "main.4", "l3.b": "main.5"}).synthesize({"z": z})
    assert float(levels["l3"].min()) < 0
    assert torch.equal(levels["l3"].clamp(min=0), levels["l3.b"])


def test_images_of_another_range_in_a_tuple(weights: Path) -> None:
    z = torch.from_numpy(draw_noise(0, "key", 0, "z", (2, 12, 1, 1)))
    plain, _ = load(weights).synthesize({"z": z})
    scaled, _ = load(weights, "WithLatent", value_range=[0, 255]).synthesize({"z": z})
    assert float((plain - scaled).abs().max()) < 1e-6


@pytest.mark.parametrize(("dtype", "limit"), [("float16", 1e-2), ("bfloat16", 5e-2)])
def test_low_precision_is_near(dtype: str, limit: float, weights: Path) -> None:
    z = torch.from_numpy(draw_noise(0, "key", 0, "z", (2, 12, 1, 1)))
    exact, found = load(weights).synthesize({"z": z}), load(weights, dtype=dtype).synthesize({"z": z})
    assert found[0].dtype == torch.float32
    assert 0 < relative(found[0], exact[0].double()) < limit
    assert all(level.dtype in (torch.float16, torch.float32) for level in found[1].values())
    assert all(relative(level, exact[1][name].double()) < limit for name, level in found[1].items())


def test_an_encoder_reads_images_in_its_own_range(nets: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    network = nets.Encoder().eval()
    save_file(network.state_dict(), tmp_path / "encoder.safetensors")
    taps, images = (
        {"l2": "down.1", "l3": "down.2"},
        torch.rand(2, 3, 32, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1,
    )
    teacher = load(
        tmp_path / "encoder.safetensors",
        "Encoder",
        taps,
        arguments={},
        z_shape=None,
        mode="encode",
        value_range=[0, 1],
        image_px=[32, 16],
    )
    ran: list[object] = []
    teacher.network.get_submodule("head").register_forward_hook(lambda *_: ran.append(1))
    found = teacher.encode(images, {}, [ViewSpec(draw=0, timestep=None, flip=flip) for flip in (False, True, False)])
    assert ran == []
    with torch.no_grad():
        for idx, shown in enumerate((images, images.flip(-1), images)):
            middle = network.down[:2]((shown + 1) / 2)
            torch.testing.assert_close(found["l2"][:, idx], middle)
            torch.testing.assert_close(found["l3"][:, idx], network.down[2](middle))
    assert isinstance(teacher, Encoder) and not isinstance(teacher, Generator)
    assert dict(teacher.spec.noise_shapes) == {}


def test_it_is_never_guessed(weights: Path) -> None:
    assert not KINDS["module"].matches(str(weights))
    with pytest.raises(TeacherError, match="no teacher family recognises"):
        load_teacher(TeacherConfig(path=str(weights)))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("Absent", {}, "cannot be made .AttributeError.*install its package"),
        ("Failing", {"arguments": {}}, "ValueError: no such size"),
        ("Generator", {"arguments": {"depth": 3}}, "unexpected keyword argument 'depth'"),
        ("function", {"arguments": {}}, "gives a int, no torch.nn.Module"),
        ("Generator", {"module": f"{PACKAGE}.broken:Generator"}, "No module named 'a_package_that_is_not_there'"),
        ("Generator", {"module": f"{PACKAGE}.none:Generator"}, "No module named"),
        ("Generator", {"arguments": {"z": 12, "width": 8}}, "weights do not fit.*size mismatch"),
        ("Generator", {"z_shape": [13, 1, 1]}, r"does not run on an input of shape \(1, 13, 1, 1\)"),
        ("Generator", {"image_px": [32, 32]}, r"gives shape \(1, 3, 64, 64\), the options say"),
        ("Small", {}, r"gives shape \(1, 3, 32, 64\), the options say"),
        ("Noisy", {}, "two results for one input"),
        ("NoisyAtTheEnd", {}, "two results for one input"),
        ("Generator", {"taps": None}, r"'extract.teacher.taps=\{l2: main.8, l3: main.5, l4: main.2\}'"),
        ("Generator", {"taps": {"l3": "main.8"}}, "has stride 4, so it is level l2"),
        ("Generator", {"taps": {"l2": "main.99"}}, "no module of the teacher"),
    ],
)
def test_what_cannot_be_used_is_said_in_a_sentence(
    name: str, options: dict[str, Any], message: str, weights: Path
) -> None:
    with pytest.raises(TeacherError, match=message) as caught:
        load(weights, name, **options)
    assert "\n" not in str(caught.value)


def test_a_level_that_is_no_whole_part_of_the_image_is_refused(nets: Any, tmp_path: Path) -> None:
    save_file(nets.Encoder().state_dict(), tmp_path / "encoder.safetensors")
    with pytest.raises(TeacherError, match="is 7x8, no whole part of 30x32 px"):
        load(
            tmp_path / "encoder.safetensors",
            "Encoder",
            {"l2": "down.1"},
            arguments={},
            z_shape=None,
            mode="encode",
            image_px=[30, 32],
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"module": "no_colon"}, r"options\.module"),
        ({"z_shape": None}, r"options\.z_shape: a module that makes images from z needs z_shape"),
        ({"mode": "encode"}, "one that takes images, mode=encode alone"),
        ({"image_px": [0, 64]}, "must be positive"),
        ({"value_range": [1, 0]}, "black less than white"),
        ({"classes": 3}, r"options\.classes"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str, weights: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        load(weights, **options)


def test_all_that_is_missing_is_said_at_once(weights: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        load_teacher(TeacherConfig(path=str(weights), kind="module", options={"width": 3}))
    for words in (
        "module must be given (Import path",
        "image_px must be given (Height",
        "z_shape: ",
        "options.width: ",
    ):
        assert words in str(caught.value)


def test_a_class_in_the_working_directory_is_found_last(weights: Path, tmp_path: Path, monkeypatch) -> None:
    """By a command, whose own folder is on the path and the user's is not."""
    (tmp_path / "net_of_this_folder.py").write_text(NETS)
    (tmp_path / "json.py").write_text("raise RuntimeError('hides the standard library')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    teacher = load(weights, module="net_of_this_folder:Generator")
    assert isinstance(teacher, Generator) and sys.path[-1] == str(tmp_path)
    assert teacher.spec == replace(load(weights).spec, options=teacher.spec.options)
    del sys.modules["net_of_this_folder"]


def test_the_whole_module_is_no_tap_to_copy(nets: Any, tmp_path: Path) -> None:
    """Its output is a map of stride 4, but it has no name."""
    torch.save(nets.Bare().state_dict(), tmp_path / "bare.pt")
    options = {"arguments": {}, "z_shape": None, "mode": "encode"}
    with pytest.raises(TeacherError, match="none of its modules has stride 4, 8, 16 or 32"):
        load(tmp_path / "bare.pt", "Bare", taps=None, **options)


def test_weights_are_only_tensors(weights: Path, tmp_path: Path) -> None:
    torch.save({"state": {"main.0.weight": torch.zeros(1)}}, tmp_path / "nested.pt")
    with pytest.raises(TeacherError, match="other things than named tensors"):
        load(tmp_path / "nested.pt")
    tensors = torch.load(weights, weights_only=True)
    tensors["main.0.weight"][0, 0, 0, 0] = float("nan")
    torch.save(tensors, tmp_path / "nan.pt")
    with pytest.raises(TeacherError, match=r"main\.0\.weight holds values that are not finite"):
        load(tmp_path / "nan.pt")
    with pytest.raises(TeacherError, match="not readable as weights"):
        load(tmp_path / "absent.pt")
