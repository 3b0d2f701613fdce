"""Where networks respond: mean squared activation, the paper's figures 4 and 7.

Of a diffusion teacher by block and timestep; of teacher, regressor and backbone at the view that the run's maps show.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from dtpipe.distill.config import DistillConfig
from dtpipe.distill.stream.batch import student_images
from dtpipe.extract.config import TeacherConfig
from dtpipe.extract.device import pick_device
from dtpipe.extract.encode import Sample, encode, stack_rows
from dtpipe.extract.noise import row_noise
from dtpipe.extract.teachers.base import Encoder, Teacher
from dtpipe.extract.teachers.registry import load_teacher
from dtpipe.manifests.errors import TeacherError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import ViewSpec
from dtpipe.pipeline.extractors import TEACHER
from dtpipe.pipeline.live.recorded import open_teacher
from dtpipe.pipeline.report.maps.clusters import BACKBONE, REGRESSED
from dtpipe.pipeline.report.maps.features import SeenImages
from dtpipe.pipeline.trained_on import TrainedOn, of_a_teacher

if TYPE_CHECKING:
    from torch import Tensor

Energy = NDArray[np.float32]


@dataclass(frozen=True)
class TimestepTeacher:
    """A loaded teacher that takes images and timesteps."""

    teacher: Encoder
    image_px: tuple[int, int]
    """Height and width of the images that it is given."""
    device: str

    def energies(
        self, image: NDArray[np.uint8], key: str, timesteps: Sequence[int], seed: int
    ) -> list[dict[str, Energy]]:
        """Mean over channels of the squared activations at each level, a mapping per timestep, of one noise draw.

        Shapes: image (H, W, 3), resized to the teacher's -> {level: (h, w)} of each timestep.
        """
        import torch

        spec = self.teacher.spec
        views = [ViewSpec(draw=0, timestep=timestep) for timestep in timesteps]
        sample = Sample(row_noise(seed, key, views, spec.noise_shapes, self.image_px))
        images = student_images(torch.from_numpy(image[None]).to(self.device), self.image_px)
        rows = replace(stack_rows([sample], views, levels=()), images=images)
        levels = encode(self.teacher, rows, self.device).levels
        return [{name: _energy(level[0, view]) for name, level in levels.items()} for view in range(len(views))]


def diffusion_teacher(run: Path, config: DistillConfig) -> TimestepTeacher:
    """The teacher of a run, loaded again, on the GPU where there is one.

    Raises: TeacherError when it is gone, another one, or takes no timesteps; ConfigError when nobody recorded it.
    """
    teacher, image_px, device = _load(run, config, pick_device("auto"))
    if not isinstance(teacher, Encoder) or teacher.spec.num_timesteps is None:
        raise TeacherError(f"the {teacher.spec.kind} teacher takes no timesteps; a diffusion teacher has such maps")
    return TimestepTeacher(teacher, image_px, device)


def _load(run: Path, config: DistillConfig, device: str) -> tuple[Teacher, tuple[int, int], str]:
    if config.datasets:
        dataset = FeatureDataset.open(of_a_teacher(config.datasets), allow_incomplete=True)
        opened = open_teacher(dataset.plan, {}, device)
        transform = opened.recipe.transform
        return opened.teacher, (transform.height, transform.width), opened.device
    recorded = TrainedOn.of(str(run)).teacher()
    try:
        teacher = load_teacher(TeacherConfig.model_validate(recorded.settings), device)
    except ValidationError as err:
        raise TeacherError(f"{run}: its settings name no teacher: {err.errors()[0]['msg']}") from err
    return teacher, recorded.image_px or teacher.spec.image_px, device


def _energy(level: Tensor) -> Energy:
    """Shapes: (C, h, w) -> (h, w)."""
    energy: Energy = level.float().square().mean(dim=0).cpu().numpy()
    return energy


def seen_energies(seen: SeenImages, idx: int) -> dict[str, dict[str, Energy]]:
    """Of one image, network to level to its map: the teacher's levels as the loss whitens them, the regressor's output,
    the backbone's levels.
    """
    networks = {TEACHER: seen.teacher, REGRESSED: seen.regressed, BACKBONE: seen.backbone}
    return {
        network: {name: np.square(maps[idx], dtype=np.float32).mean(axis=0) for name, maps in levels.items()}
        for network, levels in networks.items()
    }


def heat(energy: Energy) -> NDArray[np.uint8]:
    """Lowest to highest cell of one map, dark to bright. Shapes: (h, w) -> (h, w, 3) uint8."""
    from matplotlib import colormaps

    spread = float(energy.max() - energy.min())
    scaled = (energy - energy.min()) / spread if spread > 0 else np.zeros_like(energy)
    colours = np.asarray(colormaps["magma"](scaled))[..., :3]
    picture: NDArray[np.uint8] = np.rint(255 * colours).astype(np.uint8)
    return picture


def level_captions(teacher: Encoder) -> Mapping[str, str]:
    """Level to the block it is read at, finest first."""
    return {level.name: f"{level.tap}, {level.channels} channels" for level in teacher.spec.levels}
