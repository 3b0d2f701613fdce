"""Weights of other projects: networks that the other library runs give the student's levels."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn
from torchvision.models.convnext import CNBlockConfig, ConvNeXt
from torchvision.models.vision_transformer import VisionTransformer

from dtpipe.distill.student.foreign import load_foreign
from dtpipe.distill.student.student import Student, StudentSpec
from dtpipe.manifests.errors import InputError

RESNET = StudentSpec("resnet18", 4, (64, 64))
IMAGES = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1


def randomised(network: nn.Module) -> nn.Module:
    """Other weights and statistics than those of any new network."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in network.state_dict().values():
            if tensor.is_floating_point():
                tensor.copy_(torch.rand(tensor.shape, generator=generator) * 0.2 + 0.05)
    return network.eval()


@pytest.fixture(scope="module")
def resnet() -> Any:
    return randomised(torchvision.models.resnet18())


def resnet_levels(network: Any, images: Tensor) -> list[Tensor]:
    """What torchvision's network gives after each stage."""
    values = network.maxpool(network.relu(network.bn1(network.conv1(images))))
    levels = []
    for stage in (network.layer1, network.layer2, network.layer3, network.layer4):
        values = stage(values)
        levels.append(values)
    return levels


def assert_levels(student: Student, levels: list[Tensor]) -> None:
    """float32 of two libraries: to 1e-5 of the largest value."""
    with torch.no_grad():
        own = student(IMAGES)
    assert [level.shape for level in own] == [level.shape for level in levels]
    for level, other in zip(own, levels, strict=True):
        assert float((level - other).abs().max()) <= 1e-5 * float(other.abs().max())


def moco(state: dict[str, Tensor]) -> dict[str, Any]:
    query = {f"module.encoder_q.{name}": tensor for name, tensor in state.items()}
    key = {f"module.encoder_k.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    optimizer = {"state": {0: {"momentum_buffer": torch.zeros(3)}}}
    return {"epoch": 200, "arch": "resnet18", "state_dict": {**key, **query}, "optimizer": optimizer}


def dino(state: dict[str, Tensor]) -> dict[str, Any]:
    head = {"head.mlp.0.weight": torch.zeros(4, 4)}
    student = {f"module.backbone.{name}": torch.zeros_like(tensor) for name, tensor in state.items()}
    return {"student": student | head, "teacher": {f"backbone.{name}": tensor for name, tensor in state.items()} | head}


def detectron2(state: dict[str, Tensor]) -> dict[str, Any]:
    """detectron2's tools/convert-torchvision-to-d2.py, in its words."""
    renamed = {}
    for name, tensor in state.items():
        if "num_batches_tracked" in name or name.startswith("fc."):
            continue
        key = name if "layer" in name else f"stem.{name}"
        for number in (1, 2, 3, 4):
            key = key.replace(f"layer{number}", f"res{number + 1}")
        for number in (1, 2, 3):
            key = key.replace(f"bn{number}", f"conv{number}.norm")
        renamed[key.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")] = tensor
    return {"model": renamed, "__author__": "torchvision", "matching_heuristics": True}


def mmdetection(state: dict[str, Tensor]) -> dict[str, Any]:
    return {"meta": {"epoch": 1}, "state_dict": {f"backbone.{name}": value for name, value in state.items()}}


@pytest.mark.parametrize("wrapped", [dict, moco, dino, detectron2, mmdetection, lambda state: {"module": state}])
def test_a_resnet_is_read_in_every_wrapper_and_gives_torchvisions_levels(
    wrapped: Callable[[dict[str, Tensor]], dict[str, Any]], resnet: Any
) -> None:
    foreign = load_foreign(RESNET, wrapped(resnet.state_dict()), "r18.pth")
    with torch.no_grad():
        assert_levels(foreign.student, resnet_levels(resnet, foreign.student.normalise(IMAGES)))
    assert not foreign.student.training
    assert foreign.said.startswith("r18.pth: 1")


def test_what_is_taken_and_what_is_left_out_is_said(resnet: Any) -> None:
    said = load_foreign(RESNET, dino(resnet.state_dict()), "d.pth").said
    assert said == (
        "d.pth: 120 tensors of resnet18 under 'teacher: backbone', in names of timm; left out 2 more, fc.weight for one"
    )


def test_a_convnext_of_torchvision_gives_its_levels() -> None:
    """torchvision's network in the sizes of timm's smallest, with its epsilon and its approximate GELU."""
    sizes = [CNBlockConfig(24, 32, 1), CNBlockConfig(32, 48, 2), CNBlockConfig(48, 64, 4), CNBlockConfig(64, None, 2)]
    network: Any = randomised(ConvNeXt(sizes))
    for module in network.modules():
        if isinstance(module, nn.GELU):
            module.approximate = "tanh"
        if isinstance(module, nn.LayerNorm):
            module.eps = 1e-5
    foreign = load_foreign(StudentSpec("test_convnext", 4, (64, 64)), network.state_dict(), "tv.pth")
    levels, values = [], foreign.student.normalise(IMAGES)
    with torch.no_grad():
        for idx, part in enumerate(network.features):
            values = part(values)
            if idx % 2:
                levels.append(values)
        assert_levels(foreign.student, levels)


def official_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """facebookresearch/ConvNeXt's names of timm's tensors, by the table of what each consumer expects."""
    renamed = {}
    for name, tensor in state.items():
        key = re.sub(r"^stem\.", "downsample_layers.0.", name)
        key = re.sub(r"^stages\.(\d)\.downsample\.", r"downsample_layers.\1.", key)
        key = re.sub(r"^stages\.(\d)\.blocks\.", r"stages.\1.", key)
        key = key.replace("conv_dw", "dwconv").replace("mlp.fc1", "pwconv1").replace("mlp.fc2", "pwconv2")
        renamed[re.sub(r"^head\.norm\.", "norm.", key)] = tensor
    return renamed


def mmpretrain_names(state: dict[str, Tensor]) -> dict[str, Tensor]:
    renames = [("dwconv", "depthwise_conv"), ("pwconv", "pointwise_conv")]
    names = {name: name for name in official_names(state)}
    for old, new in renames:
        names = {name: key.replace(old, new) for name, key in names.items()}
    return {f"backbone.{names[name]}": tensor for name, tensor in official_names(state).items()}


@pytest.mark.parametrize("rename", [official_names, mmpretrain_names, dict])
def test_a_convnext_is_read_in_official_mmpretrains_and_timms_names(
    rename: Callable[[dict[str, Tensor]], dict[str, Tensor]],
) -> None:
    network = randomised(timm.create_model("test_convnext", num_classes=3))
    foreign = load_foreign(StudentSpec("test_convnext", 4, (64, 64)), {"model": rename(network.state_dict())}, "c.pth")
    with torch.no_grad():
        assert_levels(foreign.student, network.forward_intermediates(foreign.student.normalise(IMAGES))[1])  # type: ignore[operator]


def test_a_vit_of_torchvision_gives_its_tokens() -> None:
    network: Any = randomised(VisionTransformer(64, 16, num_layers=6, num_heads=1, hidden_dim=64, mlp_dim=192))
    foreign = load_foreign(StudentSpec("test_vit", 4, (64, 64)), network.state_dict(), "vit.pth")
    timm_net = foreign.student.net.model  # type: ignore[union-attr]
    heads = timm_net.blocks[0].attn.num_heads  # type: ignore[union-attr]
    for layer in network.encoder.layers:
        layer.self_attention.num_heads, layer.self_attention.head_dim = heads, 64 // heads
    with torch.no_grad():
        tokens = network._process_input(foreign.student.normalise(IMAGES))
        values = torch.cat([network.class_token.expand(2, -1, -1), tokens], 1) + network.encoder.pos_embedding
        for layer in network.encoder.layers:
            values = layer(values)
        level = values[:, 1:].permute(0, 2, 1).reshape(2, 64, 4, 4)
        normed = network.encoder.ln(values)[:, 1:].permute(0, 2, 1).reshape(2, 64, 4, 4)
        own = foreign.student(IMAGES)[-1]
        difference = min(float((own - other).abs().max()) for other in (level, normed))
    assert difference <= 1e-4 * float(level.abs().max())


def test_a_file_without_some_tensors_is_refused_whole_and_counted(resnet: Any) -> None:
    state = {name: tensor for name, tensor in resnet.state_dict().items() if "layer4" not in name}
    with pytest.raises(InputError, match=r"fit 90 of the 120 tensors of resnet18 \(25 are missing, layer4\.0\.conv1"):
        load_foreign(RESNET, state, "cut.pth")


def test_weights_of_another_model_are_refused_with_their_shapes(resnet: Any) -> None:
    with pytest.raises(InputError, match=r"of resnet50 \(.*nothing was loaded; give the timm model that they are of"):
        load_foreign(StudentSpec("resnet50", 4, (64, 64)), resnet.state_dict(), "r18.pth")


def test_a_file_without_tensors_is_refused() -> None:
    with pytest.raises(InputError, match=r"x\.pth: holds no tensors by name"):
        load_foreign(RESNET, {"epoch": 3, "args": object()}, "x.pth")
