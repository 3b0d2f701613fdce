"""Run the teacher again on what a dataset holds, to compare with the stored features.

The stored image is the teacher's input and the noise is a pure function of seed and key, so neither the source nor its
decoder is needed.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.config import TeacherConfig
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.reader import FeatureDataset


class Recomputer:
    """A loaded teacher beside the dataset it made; call it with rows."""

    def __init__(self, url: str, teacher: TeacherConfig | str, device: str = "cpu", allow_incomplete: bool = False) -> None:
        """Raises: TeacherError when the teacher is not the one of the recipe; ConfigError when no images are stored."""
        from dtpipe.extract.encode import configure_torch
        from dtpipe.extract.teachers.base import load_teacher
        from dtpipe.extract.worker import check_weights

        self.dataset = FeatureDataset.open(url, allow_incomplete=allow_incomplete)
        recipe = self.dataset.recipe
        if recipe.images != "stored":
            raise ConfigError(f"{url} holds no images, so features cannot be computed again; verify it at level decode")
        wanted = TeacherConfig(path=teacher) if isinstance(teacher, str) else teacher
        taps = {_teacher_name(level.name, recipe.transform.height // level.height): level.tap for level in recipe.levels}
        same = wanted.model_copy(update={"dtype": recipe.compute.dtype, "taps": wanted.taps or taps})
        self.device = device
        configure_torch(recipe.compute)
        self.teacher = load_teacher(same, device)
        check_weights(self.teacher, recipe, same.path)

    def __call__(self, rows: Sequence[int]) -> dict[str, NDArray[np.float32]]:
        """Features of ok rows before rounding. Shapes: {level: [n, V, C, h, w]} float32."""
        from dtpipe.extract.encode import encode_rows

        dataset = self.dataset
        images = np.stack([dataset.read_image(row) for row in rows])  # [n, H, W, 3]
        keys = [dataset.keys[row] for row in rows]
        encoded = encode_rows(self.teacher, dataset.recipe, images, keys, device=self.device)
        return {name: level.float().cpu().numpy() for name, level in encoded.items()}


def _teacher_name(name: str, stride: int) -> str:
    """A stored level's name in the teacher's own frame, where strides count pixels of the teacher's image."""
    _, dot, suffix = name.partition(".")
    return f"l{stride.bit_length() - 1}{dot}{suffix}"


def recompute_rows(url: str, teacher: TeacherConfig | str, rows: Sequence[int], device: str = "cpu") -> dict[str, NDArray[np.float32]]:
    """Features of some ok rows, computed again from the stored images. Shapes: {level: [n, V, C, h, w]} float32.

    teacher: its path, or settings; the recipe says the dtype and, unless the settings name others, the taps.
    """
    return Recomputer(url, teacher, device)(rows)
