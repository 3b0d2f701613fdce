"""A teacher family to start from: a denoising autoencoder. Replace the network, the taps and the noise.

dtpipe extract --images photos/ --teacher weights.mine.safetensors --out features/
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor, nn

from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.teachers.arithmetic import arithmetic, storable
from dtpipe.extract.teachers.base import (
    Encoder,
    TeacherKind,
    TeacherSpec,
    check_noise,
    check_sides,
    parse_options,
)
from dtpipe.extract.teachers.files.weights import read_weights, weights_digest
from dtpipe.extract.teachers.taps import TapReader, named_levels
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.schema import StrictModel, ViewSpec

PX = 64  # of the images that it was trained on; others may be extracted too
STRIDE = 8
STREAM = "forward"  # of noise; names of one's own are allowed
TAPS = {"l2": "up.1", "l3": "down.5"}  # level: module; l2 has stride 4


class Network(nn.Module):
    """Images (B, 3, H, W) to images."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, 2, 1), nn.SiLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.SiLU()),
            *(nn.Conv2d(32, 64, 3, 2, 1), nn.SiLU()),
        )
        self.up = nn.Sequential(nn.ConvTranspose2d(64, 32, 2, 2), nn.SiLU(), nn.ConvTranspose2d(32, 3, 4, 4))

    def forward(self, images: Tensor) -> Tensor:
        return self.up(self.down(images))  # type: ignore[no-any-return]


class Options(StrictModel):
    """`-s extract.teacher.options.sigma=0.1`; what changes features belongs here, and is content of the dataset."""

    sigma: float = Field(default=0.2, ge=0, description="Standard deviation of the noise that images get.")


class MyTeacher:
    """Frozen, on its device. It draws nothing itself: noise is an argument, so batches and order change nothing."""

    def __init__(self, network: Network, spec: TeacherSpec, sigma: float, dtype: str) -> None:
        self.spec, self.network, self._sigma, self._dtype = spec, network, sigma, dtype
        self._reader = TapReader(network, {level.name: level.tap for level in spec.levels})

    def encode(self, images: Tensor, noise: Mapping[str, Tensor], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Features of images, by level; the network stops behind the last tap.

        Shapes: images (B, 3, H, W) in [-1, 1], noise["forward"] (B, V, 3, H, W) -> {level: (B, V, C, h, w)}.
        """
        check_sides(images, STRIDE)
        check_noise(noise, [STREAM], (len(images), len(views), *images.shape[1:]))
        levels: dict[str, list[Tensor]] = {level.name: [] for level in self.spec.levels}
        with arithmetic(images.device, self._dtype):
            for idx, view in enumerate(views):
                shown = images.flip(-1) if view.flip else images
                noisy = shown + self._sigma * noise[STREAM][:, idx]
                for name, level in self._reader.read(partial(self.network, noisy)).items():
                    levels[name].append(storable(level))
        return {name: torch.stack(of_views, dim=1) for name, of_views in levels.items()}


def load(config: TeacherConfig, device: str) -> MyTeacher:
    """The teacher of a file. Raises: TeacherError when its tensors are not those of the network."""
    options, network = parse_options(config, Options), Network()
    tensors = read_weights(Path(config.path), network.state_dict())  # tensors alone; code in a file is never run
    try:
        network.load_state_dict(tensors)
    except RuntimeError as err:
        raise TeacherError(f"{config.path}: weights do not fit ({' '.join(str(err).split())}); give another") from err
    network.requires_grad_(False).eval()
    with torch.inference_mode():
        levels = named_levels(network, partial(network, torch.zeros(1, 3, PX, PX)), PX, config.taps or TAPS)
    spec = TeacherSpec(
        kind=KIND.kind,
        weights_blake3=weights_digest(tensors),  # so that no other checkpoint passes for this one
        image_px=(PX, PX),
        levels=tuple(sorted(levels.values(), key=lambda level: level.stride)),
        noise_shapes={STREAM: (3, -1, -1)},  # as high and wide as the image
        options=options.model_dump(mode="json"),
    )
    return MyTeacher(network.to(device), spec, options.sigma, config.dtype)


KIND = TeacherKind(
    "my_teacher",
    "Files that end in .mine.safetensors.",
    Encoder,
    lambda path: path.endswith(".mine.safetensors"),
    load,
    Options,
)
