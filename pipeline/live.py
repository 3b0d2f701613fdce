"""The teacher of a dataset, loaded again: for stochastic re-encoding, for `verify --level recompute`, for the report.

Always checked against the digest in the recipe, so that no other weights can pass for the dataset's teacher.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dtpipe.extract.config import TeacherConfig
from dtpipe.manifests.errors import ConfigError, TeacherError
from dtpipe.manifests.schema import Plan, Recipe, ViewSpec

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor

    from dtpipe.extract.teachers.base import Teacher


def pick_device(name: str) -> str:
    """`cpu` or `cuda`; auto takes the GPU there is. Raises: ConfigError when a GPU is asked for and there is none."""
    import torch

    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device cuda is asked for and torch sees no GPU; `dtpipe doctor` says why, or use --device cpu")
    return name


def recorded_teacher(plan: Plan) -> dict[str, Any]:
    """The teacher's settings as the extraction recorded them; empty when the record is gone."""
    config = plan.provenance.get("config") or {}
    teacher = config.get("teacher") if isinstance(config, Mapping) else None
    return dict(teacher) if isinstance(teacher, Mapping) else {}


class RecipeTeacher:
    """The teacher that made a dataset, on a device. `exact` also sets this process's threads and kernels to the recipe's."""

    def __init__(self, recipe: Recipe, config: TeacherConfig, device: str = "auto", exact: bool = False) -> None:
        from dtpipe.extract.encode import configure_torch
        from dtpipe.extract.teachers.base import load_teacher

        self.recipe = recipe
        self.device = pick_device(device)
        if exact:
            configure_torch(recipe.compute)
        self.teacher: Teacher = load_teacher(config, self.device)
        found, wanted = self.teacher.spec.weights_blake3, recipe.teacher.weights_blake3
        if found != wanted:
            raise TeacherError(
                f"{config.path}: these weights have digest {found[:16]}.., the dataset was made with {wanted[:16]}..; "
                f"give the teacher that made it with --teacher"
            )

    def encode(self, images: np.ndarray, keys: Sequence[str], views: Sequence[ViewSpec] | None = None) -> dict[str, Tensor]:
        """Features of stored images. Shapes: [N, H, W, 3] uint8 -> {level: (N, V, C, h, w)} on the device."""
        from dtpipe.extract.encode import encode_rows

        return encode_rows(self.teacher, self.recipe, images, keys, views=views, device=self.device)

    def live(self, images: Tensor, keys: Sequence[str], draws: Sequence[int], views: Sequence[ViewSpec]) -> dict[str, Tensor]:
        """Fresh features for training, one noise draw and view per image; see `distill.stream.LiveTeacher`.

        Shapes: images (B, 3, H, W) float32 in [-1, 1], unflipped -> {level: (B, C, h, w)} on the images' device.
        """
        import torch

        pixels = images.add(1).mul(127.5).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
        wanted = [view.model_copy(update={"draw": draw}) for view, draw in zip(views, draws, strict=True)]
        levels: dict[str, Tensor] = {}
        for view in dict.fromkeys(wanted):
            rows = [idx for idx, each in enumerate(wanted) if each == view]
            for name, features in self.encode(pixels[rows], [keys[idx] for idx in rows], [view]).items():
                out = levels.setdefault(name, features.new_zeros((len(keys), *features.shape[2:])))
                out[rows] = features[:, 0]
        return {name: features.to(images.device) for name, features in levels.items()}


def open_teacher(plan: Plan, given: Mapping[str, Any], device: str, exact: bool = False) -> RecipeTeacher:
    """The teacher of a dataset: as recorded by its extraction, with `given` settings (`path`, `kind` ..) in their place.

    Raises: ConfigError when nothing says where it is; TeacherError when it is gone or another one.
    """
    settings = {**recorded_teacher(plan), **given}
    if "path" not in settings:
        raise ConfigError("the dataset does not say where its teacher is; give it with --teacher")
    return RecipeTeacher(plan.recipe, TeacherConfig.model_validate(settings), device, exact)
