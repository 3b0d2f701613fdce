"""Taps: levels found by stride, and an early stop that changes nothing."""

from __future__ import annotations

import pytest
import torch
from diffusers import UNet2DModel
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from dtpipe.extract.teachers.taps import TapReader, find_levels, level_name, named_levels
from dtpipe.manifests.errors import TeacherError
from parts.tensors import hooked


class Decoder(nn.Module):
    """A toy: strides 4, 2 and 1, two layers at stride 2, one layer that is never run."""

    def __init__(self) -> None:
        super().__init__()
        self.coarse = nn.Conv2d(3, 6, 3, stride=4, padding=1)
        self.middle = nn.ModuleList([nn.Conv2d(6, 5, 1), nn.Conv2d(5, 4, 1)])
        self.fine = nn.Conv2d(4, 2, 1)
        self.idle = nn.Conv2d(4, 2, 1)
        self.pair = Pair()
        self.up = nn.Upsample(scale_factor=2)
        self.num_fine_calls = 0

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        level = self.up(self.coarse(images))
        for layer in self.middle:
            level = layer(level)
        self.pair(level)
        self.num_fine_calls += 1
        return self.fine(self.up(level))


class Pair(nn.Module):
    def forward(self, level: torch.Tensor) -> tuple[torch.Tensor, str]:
        return level * 2, "and more"


LAYERS = ["coarse", "middle.0", "middle.1", "fine"]
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def decoder() -> Decoder:
    torch.manual_seed(0)
    return Decoder().eval()


def test_the_last_layer_of_each_stride_is_the_level(decoder):
    levels = find_levels(decoder, lambda: decoder(IMAGES), 16, LAYERS, strides=(1, 2, 4, 8))
    assert [(level.name, level.stride, level.channels, level.tap) for level in levels.values()] == [
        ("l0", 1, 2, "fine"),
        ("l1", 2, 4, "middle.1"),
        ("l2", 4, 6, "coarse"),
    ]


def test_default_strides_are_the_papers(decoder):
    assert list(find_levels(decoder, lambda: decoder(IMAGES), 16, LAYERS)) == ["l2"]


def test_early_stop_gives_the_features_of_a_whole_pass(decoder):
    taps = {"l2": "coarse", "l1": "middle.1"}
    read = TapReader(decoder, taps).read(lambda: decoder(IMAGES))
    assert decoder.num_fine_calls == 0  # the pass ended before
    whole = hooked(decoder, {path: path for path in taps.values()}, lambda: decoder(IMAGES))
    assert list(read) == ["l2", "l1"]
    for name, path in taps.items():
        assert torch.equal(read[name], whole[path])


def test_without_early_stop_the_pass_runs_to_its_end(decoder):
    TapReader(decoder, {"l2": "coarse"}).read(lambda: decoder(IMAGES), stop_early=False)
    assert decoder.num_fine_calls == 1


def test_no_hook_is_left_behind(decoder):
    TapReader(decoder, {"l2": "coarse"}).read(lambda: decoder(IMAGES))
    with pytest.raises(ZeroDivisionError):
        TapReader(decoder, {"l2": "coarse"}).read(lambda: 1 / 0)
    find_levels(decoder, lambda: decoder(IMAGES), 16, LAYERS)
    assert not any(module._forward_hooks for module in decoder.modules())
    decoder(IMAGES)
    assert decoder.num_fine_calls == 2


def test_a_module_in_a_tuple_is_read(decoder):
    read = TapReader(decoder, {"l1": "pair"}).read(lambda: decoder(IMAGES))
    assert read["l1"].shape == (2, 4, 8, 8)


def test_a_module_that_runs_twice_is_read_the_first_time():
    """As in a network that shares a layer: the pass ends there, or goes on, with the same level."""
    torch.manual_seed(0)
    shared = nn.Conv2d(3, 3, 1)
    network = nn.Sequential(shared, nn.ReLU(), shared)
    first = shared(IMAGES)
    assert not torch.equal(network(IMAGES), first)
    for stop_early in (True, False):
        assert torch.equal(TapReader(network, {"l0": "0"}).read(lambda: network(IMAGES), stop_early)["l0"], first)


def test_named_taps_say_their_stride(decoder):
    levels = named_levels(decoder, lambda: decoder(IMAGES), 16, {"l1": "middle.1", "l1.b": "middle.0"})
    assert [(level.name, level.stride, level.channels) for level in levels.values()] == [("l1", 2, 4), ("l1.b", 2, 5)]


@pytest.mark.parametrize(
    ("taps", "message"),
    [
        ({"l2": "middle.7"}, r"l2=middle\.7 is no module.*middle\.0, middle\.1"),
        ({"l2": "typo"}, r"l2=typo is no module.*coarse"),
        ({"l1": "idle"}, r"\['idle'\] are never run"),
        ({"l2": "middle.1"}, r"middle\.1 has stride 2, so it is level l1, not l2"),
    ],
)
def test_a_wrong_tap_is_named(decoder, taps, message):
    with pytest.raises(TeacherError, match=message):
        named_levels(decoder, lambda: decoder(IMAGES), 16, taps)


def test_a_tap_that_gives_no_map_is_named():
    network = nn.Sequential(nn.Flatten(), nn.Linear(48, 4))
    with pytest.raises(TeacherError, match=r"tap 1 gives a tensor of shape \(2, 4\), not a map"):
        TapReader(network, {"l2": "1"}).read(lambda: network(torch.zeros(2, 3, 4, 4)))


@pytest.mark.parametrize(("stride", "name"), [(1, "l0"), (4, "l2"), (32, "l5")])
def test_levels_are_named_by_stride(stride, name):
    assert level_name(stride) == name


@pytest.mark.parametrize("stride", [0, 3, 12])
def test_other_strides_have_no_name(stride):
    with pytest.raises(TeacherError, match="power of two"):
        level_name(stride)


def test_early_stop_saves_work():
    """In a U-Net whose finest levels are not tapped, the pass that stops is much the cheaper one."""
    torch.manual_seed(0)
    unet = UNet2DModel(
        sample_size=32, block_out_channels=(8, 8, 8, 8), layers_per_block=1, norm_num_groups=4,
        down_block_types=("DownBlock2D",) * 4, up_block_types=("UpBlock2D",) * 4,
    )  # fmt: skip
    unet.eval()
    images = torch.zeros(1, 3, 32, 32)
    reader = TapReader(unet, {"l2": "up_blocks.1.resnets.1", "l3": "up_blocks.0.resnets.1"})
    with torch.inference_mode(), FlopCounterMode(display=False) as whole:
        unet(images, 0)
    with torch.inference_mode(), FlopCounterMode(display=False) as stopped:
        reader.read(lambda: unet(images, 0))
    assert stopped.get_total_flops() < 0.6 * whole.get_total_flops()
