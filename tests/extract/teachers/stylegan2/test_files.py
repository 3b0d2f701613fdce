"""StyleGAN2 checkpoints: every published layout is read, nothing in a file is run, anything else is refused."""

from __future__ import annotations

import argparse
import pickle
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.noise import draw_noise
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.extract.teachers.stylegan2.files import read_checkpoint
from dtpipe.extract.teachers.stylegan2.network import StyleGan2Layout
from dtpipe.extract.teachers.stylegan2.teacher import StyleGan2Teacher, is_stylegan2_file, load_stylegan2_teacher
from dtpipe.manifests.errors import TeacherError
from parts import paths
from parts import stylegan2_snapshots as files
from parts.damage import Attack

FIXTURES = paths.FIXTURES / "stylegan2"
PARITY = paths.PARITY / "stylegan2_nvidia"
LAYOUT = StyleGan2Layout(
    z_dim=6,
    w_dim=5,
    num_classes=0,
    embed_dim=0,
    mapping_widths=(7, 5),
    base_px=(4, 4),
    channels=(4, 5, 3),
    conv_clamp=2.0,
    mapping_lr=0.02,
)
TENSORS: dict[str, Tensor] = files.random_weights(LAYOUT)


def loaded(path: Path, **options: Any) -> StyleGan2Teacher:
    return load_stylegan2_teacher(TeacherConfig(path=str(path), options=options))


def write(path: Path, content: Any, protocol: int = 4) -> Path:
    path.write_bytes(files.dumps(content, protocol))
    return path


def same_tensors(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


@pytest.mark.parametrize("protocol", [3, 4, 5])
def test_a_snapshot_gives_its_averaged_weights_and_settings(protocol: int, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pkl", files.snapshot(TENSORS, LAYOUT), protocol)
    tensors, layout = read_checkpoint(path, ema=True)
    assert same_tensors(tensors, TENSORS) and layout == LAYOUT
    assert same_tensors(read_checkpoint(path, ema=False)[0], {name: 2 * tensor for name, tensor in TENSORS.items()})
    assert torch.equal(loaded(path, ema=False).network.synthesis.b4.const, 2 * TENSORS["synthesis.b4.const"])  # type: ignore[union-attr]


@pytest.mark.skipif(not PARITY.exists(), reason="the original's state dict is not here")
def test_a_snapshot_holds_the_originals_state_dict() -> None:
    wanted = torch.load(PARITY / "state_dict.pt", weights_only=True)
    tensors, _ = read_checkpoint(PARITY / "network-snapshot-tiny.pkl", ema=True)
    unused = {"synthesis.b4.resample_filter"} | {
        f"synthesis.b{res}.conv1.resample_filter" for res in (4, 8, 16, 32, 64)
    }
    assert same_tensors(tensors, {name: value for name, value in wanted.items() if name not in unused})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_weights_of_other_precision_become_float32(dtype: torch.dtype, tmp_path: Path) -> None:
    path = write(
        tmp_path / "x.pkl", files.snapshot({name: tensor.to(dtype) for name, tensor in TENSORS.items()}, LAYOUT)
    )
    weight = loaded(path).network.state_dict()["synthesis.b8.conv1.weight"]
    assert torch.equal(weight, TENSORS["synthesis.b8.conv1.weight"].to(dtype).float())


def test_strided_and_shared_storages_are_read(tmp_path: Path) -> None:
    """Weights in channels-last memory, and two that are parts of one storage."""
    tensors = dict(TENSORS)
    tensors["synthesis.b8.conv1.weight"] = tensors["synthesis.b8.conv1.weight"].contiguous(
        memory_format=torch.channels_last
    )
    both = torch.stack([tensors["synthesis.b8.conv1.bias"], tensors["synthesis.b8.conv0.bias"]])
    tensors |= {"synthesis.b8.conv1.bias": both[0], "synthesis.b8.conv0.bias": both[1]}
    assert same_tensors(read_checkpoint(write(tmp_path / "x.pkl", files.snapshot(tensors, LAYOUT)), True)[0], TENSORS)


def test_source_text_in_a_snapshot_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The original's snapshot, with its source text exchanged for one that leaves a file."""
    monkeypatch.chdir(tmp_path)
    data = (FIXTURES / "nvidia.pkl").read_bytes()
    start = data.index(b'raise RuntimeError("module_src was executed')
    text = data[start : data.index(b"\n", start) + 1]
    Path("x.pkl").write_bytes(data.replace(text, b"open('executed', 'w')".ljust(len(text) - 1) + b"\n"))
    assert loaded(Path("x.pkl")).spec == loaded(FIXTURES / "nvidia.pkl").spec
    assert not Path("executed").exists()


class Storage:
    """A storage whose bytes are a pickle of another thing."""

    def __init__(self, content: Any) -> None:
        self.data = b"".join(pickle.dumps(part, 2) for part in content)

    def __reduce__(self) -> Any:
        return torch.storage._load_from_bytes, (self.data,)


class Rebuilt:
    """A tensor made from any arguments."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments

    def __reduce__(self) -> Any:
        return torch._utils._rebuild_tensor_v2, self.arguments


def bombs(trap: Path) -> dict[str, Callable[[dict[str, Any]], None]]:
    """Places in a snapshot where code can be put."""
    storage = Storage([Attack(trap)] * 5)
    networks = {"noise_const": Rebuilt(storage, 0, (4, 4), (4, 1), False, {})}
    return {
        "beside the networks": lambda content: content.update(extra=Attack(trap)),
        "in the settings of the training set": lambda content: content["training_set_kwargs"].update(x=Attack(trap)),
        "in a module": lambda content: state(content).update(hook=Attack(trap)),
        "in place of a module": lambda content: state(content)["_modules"].update(synthesis=Attack(trap)),
        "in place of a tensor": lambda content: layer(content)["_buffers"].update(noise_const=Attack(trap)),
        "inside a storage": lambda content: layer(content)["_buffers"].update(networks),
        "as a shape": lambda content: layer(content)["_buffers"].update(
            noise_const=Rebuilt(storage, 0, Attack(trap), (1,), False, {})
        ),
    }


def state(content: dict[str, Any]) -> dict[str, Any]:
    return files.state_of(content)


def layer(content: dict[str, Any], *path: str) -> dict[str, Any]:
    return files.state_of(content, *path or ("synthesis", "b4", "conv1"))


@pytest.mark.parametrize("place", sorted(bombs(Path("x"))))
def test_code_in_any_place_of_a_snapshot_is_refused_and_not_run(place: str, tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    content = files.snapshot(TENSORS, LAYOUT)
    bombs(trap)[place](content)
    path = write(tmp_path / "x.pkl", content)
    assert is_stylegan2_file(str(path))
    with pytest.raises(TeacherError, match=r"x.pkl: .*(posix|nothing in it was run)"):
        loaded(path)
    assert not trap.exists()


def test_code_inside_a_storage_would_run_in_the_usual_loader(tmp_path: Path) -> None:
    """Otherwise the test above would prove nothing."""
    trap = tmp_path / "executed"
    with pytest.raises(Exception, match=r"."):
        torch.load(write_bytes(tmp_path / "s", Storage([Attack(trap)]).data), weights_only=False)
    assert trap.exists()


def write_bytes(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def test_code_in_the_storage_of_a_network_that_is_not_used_is_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    content = files.snapshot(TENSORS, LAYOUT) | {"D": Rebuilt(Storage([Attack(trap)] * 5), 0, (1,), (1,), False, {})}
    assert same_tensors(read_checkpoint(write(tmp_path / "x.pkl", content), True)[0], TENSORS)
    assert not trap.exists()


def test_code_in_a_torch_file_is_refused_and_not_run(tmp_path: Path) -> None:
    trap = tmp_path / "executed"
    torch.save({"g_ema": {"convs.0.conv.modulation.weight": torch.zeros(1)}, "args": Attack(trap)}, tmp_path / "x.pt")
    assert is_stylegan2_file(str(tmp_path / "x.pt"))
    with pytest.raises(TeacherError, match="not readable as weights"):
        loaded(tmp_path / "x.pt")
    assert not trap.exists()


def cut(name: str) -> Callable[[dict[str, Any]], None]:
    return lambda content: state(content)["_modules"].pop(name)


LAYER = ("synthesis", "b8", "conv1")
NOT_STYLEGAN2: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "resnet": (
        lambda content: layer(content, "synthesis", "b8").update(architecture="resnet"),
        "architecture 'resnet'",
    ),
    "activation": (lambda content: layer(content, *LAYER).update(activation="relu"), "activation 'relu'"),
    "no noise": (lambda content: layer(content, *LAYER).update(use_noise=False), "use_noise False"),
    "two clamps": (lambda content: layer(content, *LAYER).update(conv_clamp=7), "conv_clamp is not one number"),
    "clamp of text": (lambda content: layer(content, *LAYER).update(conv_clamp="7"), "conv_clamp is not one number"),
    "no averaged network": (lambda content: content.pop("G_ema"), "no network 'G_ema'"),
    "discriminator": (
        lambda content: content["G_ema"].call[1][0].update(class_name="Discriminator"),
        "no network 'G_ema'",
    ),
    "no synthesis": (cut("synthesis"), "synthesis.b4.const is missing"),
    "no mapping": (cut("mapping"), "mapping.fc0.weight is missing"),
    "state of text": (lambda content: content["G_ema"].call[1][0].update(state="x"), "no module"),
    "no buffers": (lambda content: layer(content, *LAYER).pop("_buffers"), "conv1 is no module"),
    "inside itself": (lambda content: state(content)["_modules"].update(again=content["G_ema"]), "twice"),
    "unknown tensor": (lambda content: state(content)["_buffers"].update(more=torch.zeros(3)), "more is unexpected"),
    "missing tensor": (lambda content: layer(content, *LAYER)["_parameters"].pop("bias"), "conv1.bias is missing"),
    "wrong shape": (
        lambda content: layer(content, *LAYER)["_parameters"].update(bias=torch.zeros(9)),
        r"has shape \(9,\)",
    ),
    "wrong rank": (
        lambda content: layer(content, *LAYER)["_parameters"].update(weight=torch.zeros(9)),
        r"has shape \(9,\)",
    ),
    "no latent": (
        lambda content: layer(content, "mapping")["_modules"].update(
            embed=files.module("FullyConnectedLayer", {"weight": torch.zeros(6, 2)}, {})
        ),
        "no latent beside the class",
    ),
    "not finite": (
        lambda content: layer(content, *LAYER)["_parameters"].update(bias=torch.full((5,), torch.nan)),
        "not finite",
    ),
    "grey": (
        lambda content: layer(content, "synthesis", "b4", "torgb")["_parameters"].update(
            weight=torch.zeros(1, 4, 1, 1)
        ),
        "images of 1 channels",
    ),
    "text for a tensor": (
        lambda content: layer(content, *LAYER)["_parameters"].update(bias="x"),
        "conv1.bias: is no tensor",
    ),
    "beyond its storage": (
        lambda content: layer(content, *LAYER)["_parameters"].update(bias=rebuilt(offset=3)),
        "conv1.bias: is no tensor of numbers",
    ),
    "endless": (
        lambda content: layer(content, *LAYER)["_parameters"].update(bias=rebuilt(size=(10**9, 10**9), stride=(0, 0))),
        "more values than the 5",
    ),
    "shape of text": (
        lambda content: layer(content, *LAYER)["_parameters"].update(bias=rebuilt(size=("5",))),
        "is no tensor of numbers",
    ),
    "storage of nothing": (
        lambda content: layer(content, *LAYER)["_parameters"].update(
            bias=Rebuilt(Storage(range(5)), 0, (5,), (1,), False, {})
        ),
        "no storage of torch",
    ),
}


def rebuilt(offset: int = 0, size: tuple[Any, ...] = (5,), stride: tuple[int, ...] = (1,)) -> Rebuilt:
    storage = torch.zeros(5).__reduce_ex__(2)[1][0]
    return Rebuilt(storage, offset, size, stride, False, {})


@pytest.mark.parametrize("case", sorted(NOT_STYLEGAN2))
def test_what_is_no_whole_stylegan2_is_refused_with_its_reason(case: str, tmp_path: Path) -> None:
    change, reason = NOT_STYLEGAN2[case]
    content = files.snapshot(TENSORS, LAYOUT)
    change(content)
    path = write(tmp_path / "x.pkl", content)
    with pytest.raises(TeacherError, match=reason) as refused:
        loaded(path)
    assert str(refused.value).startswith(str(path)) and "\n" not in str(refused.value)


def test_a_cut_file_is_refused(tmp_path: Path) -> None:
    data = (FIXTURES / "nvidia.pkl").read_bytes()
    for size in (0, 1, 100, 4000, 200_000, len(data) - 1):
        with pytest.raises(TeacherError, match=r"x.pkl: (is no whole pickle|is empty)"):
            loaded(write_bytes(tmp_path / "x.pkl", data[:size]))
    with pytest.raises(TeacherError, match="no such file"):
        loaded(tmp_path / "missing.pkl")
    (tmp_path / "x.pt").write_bytes((FIXTURES / "rosinality.pt").read_bytes()[:100_000])
    with pytest.raises(TeacherError, match="not readable as weights"):
        loaded(tmp_path / "x.pt")


def test_tensorflow_networks_give_the_same_weights(tmp_path: Path) -> None:
    layout = replace(LAYOUT, mapping_lr=0.01)
    tensors = {
        name: torch.outer(taps, taps) / 64 if name.endswith("filter") else each for name, each in TENSORS.items()
    }
    path = write(tmp_path / "x.pkl", files.tensorflow(tensors, conv_clamp=2.0))
    found, found_layout = read_checkpoint(path, ema=True)
    assert found.keys() == tensors.keys() and found_layout == layout
    for name, tensor in tensors.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)  # scales are stored without their 1
    classes = replace(LAYOUT, num_classes=3, embed_dim=5)
    conditional = files.random_weights(classes)
    path = write(
        tmp_path / "classes.pkl", files.tensorflow(conditional, label_size=3, mapping_lrmul=0.02, conv_clamp=2.0)
    )
    assert read_checkpoint(path, ema=True)[1] == classes
    assert loaded(path).spec.noise_shapes["label"] == (3,)


taps = torch.tensor([1.0, 3, 3, 1])


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"architecture": "resnet"}, "architecture' = 'resnet'"),
        ({"resample_kernel": [1, 2, 1]}, "resample_kernel' = a list"),
        ({"num_channels": 1}, "num_channels"),
        ({"label_size": 3}, "labels that are not embedded"),
        ({"fused": True}, "'fused' = True"),
        ({"conv_clamp": "x"}, "conv_clamp"),
        ({"version": 3}, "version 3"),
    ],
)
def test_other_tensorflow_networks_are_refused(settings: dict[str, Any], reason: str, tmp_path: Path) -> None:
    path = write(tmp_path / "x.pkl", files.tensorflow(TENSORS, **settings))
    with pytest.raises(TeacherError, match=f"TensorFlow network has .*{reason}.*legacy.py"):
        loaded(path)


def test_damaged_tensorflow_networks_are_refused(tmp_path: Path) -> None:
    change = {"synthesis.b4.const": torch.zeros(0, 4), "synthesis.b8.conv0.noise_const": torch.zeros(3)}
    for name, tensor in change.items():
        with pytest.raises(TeacherError, match="has shape"):
            loaded(write(tmp_path / "x.pkl", files.tensorflow(TENSORS | {name: tensor})))
    whole = files.tensorflow(TENSORS)
    for variables in (None, [1], [("dlatent_avg", "text")]):
        whole[2].variables = variables
        with pytest.raises(TeacherError, match=r"x.pkl: .*(no list of variables|no array of numbers)"):
            loaded(write(tmp_path / "x.pkl", whole))


def test_a_training_checkpoint_of_rosinality_has_flags_and_no_mean_style(tmp_path: Path) -> None:
    stored = torch.load(FIXTURES / "rosinality.pt", weights_only=True)
    doubled = {name: 2 * tensor for name, tensor in stored["g_ema"].items()}
    training = {
        "g": doubled,
        "d": {},
        "g_ema": stored["g_ema"],
        "g_optim": {"state": {}},
        "args": argparse.Namespace(size=64),
    }
    torch.save(training, tmp_path / "x.pt")
    torch.save(training, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    z = {"z": torch.from_numpy(draw_noise(5, "a", 0, "z", (2, 48)))}
    for name in ("x.pt", "old.pt"):
        assert is_stylegan2_file(str(tmp_path / name))
        made = loaded(tmp_path / name, noise_mode="const").synthesize(z)[0]
        assert torch.equal(made, loaded(FIXTURES / "rosinality.pt", noise_mode="const").synthesize(z)[0])
    assert torch.equal(loaded(tmp_path / "x.pt", ema=False).network.synthesis.b4.const[None], doubled["input.input"])  # type: ignore[union-attr]
    teacher = loaded(tmp_path / "x.pt", truncation_psi=0.5)
    draws = draw_noise(0, "w_avg", 0, "z", (4096, 48)).astype(np.float64)
    tensors, layout = read_checkpoint(tmp_path / "x.pt", ema=True)
    mean = np.mean([files.mapped(tensors, layout, row) for row in draws], axis=0)
    np.testing.assert_allclose(teacher.network.mapping.w_avg, mean, atol=1e-5)


@pytest.mark.parametrize(
    "content", [{"g": {}}, {"g_ema": [1]}, {"g_ema": {"x": "y"}}, [1], {"g_ema": {"style.1.weight": torch.zeros(2, 2)}}]
)
def test_torch_files_of_other_things_are_refused(content: Any, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "x.pt")
    with pytest.raises(TeacherError, match=r"x.pt: holds (no|other things)"):
        loaded(tmp_path / "x.pt")


def test_only_stylegan2_files_are_recognised(tmp_path: Path) -> None:
    assert is_stylegan2_file(str(FIXTURES / "nvidia.pkl")) and is_stylegan2_file(str(FIXTURES / "rosinality.pt"))
    assert is_stylegan2_file(str(write(tmp_path / "tf.pkl", files.tensorflow(TENSORS))))
    others = {"plain.pkl": {"noise": 1}, "source.pkl": {"module_src": "self.noise_strength = 'noise_strength'"}}
    assert not any(is_stylegan2_file(str(write(tmp_path / name, content))) for name, content in others.items())
    torch.save({"g_ema": {"x": torch.zeros(1)}}, tmp_path / "other.pt")
    for name, data in {
        "empty.pkl": b"",
        "empty.pt": b"",
        "text.pt": b"g_ema convs.0.conv.modulation.weight",
        "zip.pt": b"PK\x05\x06" + bytes(18),
    }.items():
        write_bytes(tmp_path / name, data)
    (tmp_path / "folder.pkl").mkdir()
    names = ("other.pt", "empty.pkl", "empty.pt", "text.pt", "zip.pt", "folder.pkl", "missing.pkl", "missing")
    assert not any(is_stylegan2_file(str(tmp_path / name)) for name in names)
    assert load_teacher(TeacherConfig(path=str(FIXTURES / "nvidia.pkl"))).spec.kind == "stylegan2"


def test_the_family_is_known_without_torch() -> None:
    code = "import sys, dtpipe.extract.teachers.stylegan2.teacher; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
