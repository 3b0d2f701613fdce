"""UPerNet has the published sizes, computes what its paper says, and starts from a regressor."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dtpipe.distill.config import RegressorConfig
from dtpipe.distill.downstream.tuned.config import HeadConfig, TuneConfig
from dtpipe.distill.downstream.tuned.heads.levels import HeadLevels
from dtpipe.distill.downstream.tuned.heads.upernet import UPerNet
from dtpipe.distill.downstream.tuned.segmentation.network import build_fcn, build_upernet
from dtpipe.distill.student.regressor import FeatureRegressor, TargetLevel
from dtpipe.distill.student.student import StudentSpec, build_student
from dtpipe.manifests.labels import ClassTable

RESNET_50 = 23_508_032  # torchvision's resnet50 without its classifier: 25,557,032 - 2,049,000
STEM, STEM_V1C = 3 * 64 * 49 + 2 * 64, (3 * 32 + 32 * 32 + 32 * 64) * 9 + 2 * (32 + 32 + 64)


def conv(channels_in: int, channels_out: int, kernel: int) -> int:
    """Parameters of a convolution and its norm."""
    return channels_in * channels_out * kernel**2 + 2 * channels_out


def upernet_by_hand(channels: tuple[int, ...], width: int, num_classes: int, aux: int) -> int:
    """mmsegmentation's UPerHead and auxiliary FCNHead, layer by layer."""
    pooling = 4 * conv(channels[-1], width, 1) + conv(channels[-1] + 4 * width, width, 3)
    laterals = sum(conv(number, width, 1) for number in channels[:-1])
    outputs = 3 * conv(width, width, 3) + conv(4 * width, width, 3) + (width + 1) * num_classes
    return pooling + laterals + outputs + conv(channels[2], aux, 3) + (aux + 1) * num_classes


def on_meta(name: str, build=build_upernet, **head):
    config = TuneConfig(steps=1, head=HeadConfig(width=512, **head))
    with torch.device("meta"):
        network = build(build_student(StudentSpec(name, 4, (512, 512))), ClassTable.numbered(150), config).eval()
        return network, network.logits(torch.zeros(2, 3, 512, 384))


def num_parameters(network: torch.nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def test_on_resnet50_it_has_the_published_sizes() -> None:
    network, logits = on_meta("resnet50c")  # mmsegmentation's ResNetV1c
    heads = upernet_by_hand((256, 512, 1024, 2048), 512, 150, aux=256)
    assert num_parameters(network) == RESNET_50 - STEM + STEM_V1C + heads == 66_516_108
    assert logits.shape == (2, 150, 128, 96)
    network, _ = on_meta("resnet50")
    assert num_parameters(network) == RESNET_50 + heads
    network, _ = on_meta("resnet50", aux_weight=0)
    assert num_parameters(network) == RESNET_50 + heads - conv(1024, 256, 3) - 257 * 150


@pytest.mark.parametrize(("name", "millions"), [("convnext_tiny", 60), ("convnext_base", 122)])
def test_on_convnext_it_has_the_sizes_of_its_table(name, millions) -> None:
    """facebookresearch/ConvNeXt, semantic_segmentation/README.md: 60M, 122M, with norms of the four outputs."""
    network, logits = on_meta(name)
    assert round(num_parameters(network) / 1e6) == millions
    assert logits.shape == (2, 150, 128, 96)
    assert [norm.weight.shape[0] for norm in network.levels.norms] == list(network.student.channels)


def test_fcn_on_resnet50_has_the_published_sizes() -> None:
    network, logits = on_meta("resnet50", build_fcn, stride=32)  # on the coarsest level, as fcn_r50 reads it
    head = conv(2048, 512, 3) + conv(512, 512, 3) + conv(2048 + 512, 512, 3) + 513 * 150
    assert num_parameters(network) == RESNET_50 + head
    assert logits.shape == (2, 150, 16, 12)
    network, logits = on_meta("resnet50", build_fcn)  # on all levels at the finest size
    joined = 256 + 512 + 1024 + 2048
    assert num_parameters(network) == RESNET_50 + conv(joined, 512, 3) + head - conv(2048, 512, 3) + (
        (joined - 2048) * 512 * 9
    )
    assert logits.shape == (2, 150, 128, 96)


def by_hand(head: UPerNet, levels: list[Tensor]) -> Tensor:
    """The decoder in the order of its paper, of plain functions."""

    def block(part, level, kernel):
        weight, norm = part[0].weight, part[1]
        out = F.conv2d(level, weight, padding=kernel // 2)
        mean, var = norm.running_mean[:, None, None], norm.running_var[:, None, None]
        return ((out - mean) / (var + norm.eps).sqrt() * norm.weight[:, None, None] + norm.bias[:, None, None]).relu()

    def up(level, like):
        return F.interpolate(level, size=like.shape[-2:], mode="bilinear", align_corners=False)

    top, pooling = levels[-1], head.laterals[-1]
    pooled = [
        up(block(branch, F.adaptive_avg_pool2d(top, s), 1), top)
        for s, branch in zip((1, 2, 3, 6), pooling.branches, strict=True)
    ]
    path = [block(pooling.join, torch.cat([top, *pooled], 1), 3)]
    for lateral, level in list(zip(head.laterals, levels[:-1], strict=False))[::-1]:
        path.insert(0, block(lateral, level, 1) + up(path[0], level))
    smooth = [block(head.outputs[str(i)], level, 3) for i, level in enumerate(path[:-1])] + [path[-1]]
    fused = block(head.fuse, torch.cat([up(level, smooth[0]) for level in smooth], 1), 3)
    return F.conv2d(fused, head.classifier.weight, head.classifier.bias)


def test_it_computes_what_its_paper_says() -> None:
    torch.manual_seed(0)
    channels = (5, 6, 7, 9)
    levels = [torch.randn(2, c, 24 >> i, 32 >> i, dtype=torch.float64) for i, c in enumerate(channels)]
    head = UPerNet(channels, 3, RegressorConfig(width=8)).double()
    head.train()(levels)  # so that norms have statistics of their own
    head.eval()
    with torch.no_grad():
        torch.testing.assert_close(head(levels), by_hand(head, levels), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_a_regressor_is_its_start(name) -> None:
    student = build_student(StudentSpec(name, 4, (64, 64)))
    targets = [TargetLevel(f"l{i}", 2**i, 3, (64 >> i, 64 >> i)) for i in (2, 3, 4, 5)]
    regressor = FeatureRegressor(student.strides, student.channels, targets, RegressorConfig(width=16))
    levels = HeadLevels(student, "batch")
    head = UPerNet(levels.channels, 2, RegressorConfig(width=16))
    state = {name: tensor for name, tensor in regressor.state_dict().items() if not name.startswith("heads.")}
    pyramid = {name for name in state if name.startswith("pyramid.")}
    levels.load_state_dict({name: state[name] for name in pyramid})
    lacking = head.load_state_dict({name: state[name] for name in state.keys() - pyramid}, strict=False)
    assert lacking.unexpected_keys == []
    assert {name.split(".")[0] for name in lacking.missing_keys} == {"fuse", "classifier"}
    assert bool(pyramid) == (name == "test_vit")
