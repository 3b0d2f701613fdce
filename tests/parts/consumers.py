"""Networks of libraries that the tests run without, written from their published names: to load exports into."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class NormedConv(nn.Conv2d):
    """detectron2's convolution, which holds its norm."""

    def __init__(self, inner: int, outer: int, size: int, stride: int = 1) -> None:
        super().__init__(inner, outer, size, stride, size // 2, bias=False)
        self.norm = nn.BatchNorm2d(outer)

    def forward(self, images: Tensor) -> Tensor:
        return self.norm(super().forward(images))


class Block(nn.Module):
    """Of two 3x3 convolutions, or 1x1, 3x3, 1x1 with the stride in the 3x3."""

    def __init__(self, inner: int, width: int, outer: int, stride: int, deep: bool) -> None:
        super().__init__()
        if deep:
            self.conv1 = NormedConv(inner, width, 1)
            self.conv2 = NormedConv(width, width, 3, stride)
            self.conv3 = NormedConv(width, outer, 1)
        else:
            self.conv1 = NormedConv(inner, width, 3, stride)
            self.conv2 = NormedConv(width, outer, 3)
        if stride > 1 or inner != outer:
            self.shortcut = NormedConv(inner, outer, 1, stride)

    def forward(self, level: Tensor) -> Tensor:
        out = self.conv2(self.conv1(level).relu())
        out = self.conv3(out.relu()) if hasattr(self, "conv3") else out
        return (out + (self.shortcut(level) if hasattr(self, "shortcut") else level)).relu()


class Detectron2ResNet(nn.Module):
    """`stem.conv1`, `res2` .. `res5`, as detectron2's modeling/backbone/resnet.py names them."""

    def __init__(self, blocks: Sequence[int], deep: bool) -> None:
        super().__init__()
        self.stem = nn.Module()
        self.stem.conv1 = NormedConv(3, 64, 7, 2)
        inner = 64
        for stage, count in enumerate(blocks):
            width = 64 << stage
            outer = 4 * width if deep else width
            layers = []
            for block in range(count):
                layers.append(Block(inner, width, outer, 2 if stage and not block else 1, deep))
                inner = outer
            setattr(self, f"res{stage + 2}", nn.Sequential(*layers))

    def forward(self, images: Tensor) -> list[Tensor]:
        levels = [nn.functional.max_pool2d(self.stem.conv1(images).relu(), 3, 2, 1)]
        for stage in range(2, 6):
            levels.append(getattr(self, f"res{stage}")(levels[-1]))
        return levels[1:]


def convnext_shapes(depths: Sequence[int], dims: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of facebookresearch/ConvNeXt's models/convnext.py, without the head."""

    def affine(name: str, *shape: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": shape, f"{name}.bias": shape[:1]}

    shapes = affine("downsample_layers.0.0", dims[0], 3, 4, 4) | affine("downsample_layers.0.1", dims[0])
    for stage in range(1, 4):
        shapes |= affine(f"downsample_layers.{stage}.0", dims[stage - 1])
        shapes |= affine(f"downsample_layers.{stage}.1", dims[stage], dims[stage - 1], 2, 2)
    for stage, (depth, dim) in enumerate(zip(depths, dims, strict=True)):
        for block in range(depth):
            name = f"stages.{stage}.{block}"
            shapes |= {f"{name}.gamma": (dim,)} | affine(f"{name}.dwconv", dim, 1, 7, 7) | affine(f"{name}.norm", dim)
            shapes |= affine(f"{name}.pwconv1", 4 * dim, dim) | affine(f"{name}.pwconv2", dim, 4 * dim)
    return shapes | affine("norm", dims[-1])


def train_step(model: nn.Module, loss: Tensor) -> list[Tensor]:
    """One step of SGD on a loss; the parameters before it."""
    before = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    loss.backward()
    optimizer.step()
    return before
