"""Latents that a dataset keeps beside its features, so that more draws, other timesteps and live encoding skip the VAE.

They lie in it as a level of their own, `l2.latent`, rounded to float16. A teacher that keeps latents computes from the
rounded ones, so features are the same whether its VAE ran or the latents were read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.teachers.base import TeacherSpec
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.schema import LevelSpec, Recipe

Latents = Mapping[bool, NDArray[np.generic]]
"""Moments of the posterior by flip, {flip: [C, h, w]} of one sample or {flip: [B, C, h, w]} of several."""
KEEP_LATENTS = "keep_latents"  # the option of a teacher that can read them


@dataclass(frozen=True)
class StoredLatents:
    """The latents of one dataset, for a teacher that can start from them."""

    dataset: FeatureDataset
    level: LevelSpec
    view_of_flip: Mapping[bool, int]

    @classmethod
    def find(cls, dataset: FeatureDataset, spec: TeacherSpec, recipe: Recipe) -> StoredLatents | None:
        """Those that the VAE of this teacher made of images of the same size, for all flips that `recipe` has; None
        without."""
        stored = dataset.recipe
        level = next((level for level in stored.levels if level.role == "latent"), None)
        flips = {view.flip: idx for idx, view in reversed(list(enumerate(stored.views)))}
        same = (
            spec.options.get(KEEP_LATENTS)
            and stored.teacher.weights_blake3 == spec.weights_blake3
            and stored.teacher.options.get("vae_dtype") == spec.options.get("vae_dtype")
            and stored.compute.dtype == recipe.compute.dtype
            and (stored.transform.height, stored.transform.width) == (recipe.transform.height, recipe.transform.width)
        )
        if level is None or not same or not {view.flip for view in recipe.views} <= flips.keys():
            return None
        return cls(dataset, level, flips)

    def read(self, rows: Sequence[int], flip: bool) -> NDArray[np.generic]:
        """Moments of the posterior of images, or of their mirror images, by row of the dataset. Shapes: -> [B, C, h,
        w].

        Raises: DamagedDataError as the reader does.
        """
        name, views = self.level.name, [self.view_of_flip[flip]] * len(rows)
        return self.dataset.read(rows, (name,), views, images=False)[1].decode()[name]
