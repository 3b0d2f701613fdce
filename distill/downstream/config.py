"""Settings of the downstream tasks, one pydantic model; nothing here is fitted to held-out images."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from dtpipe.manifests.schema import StrictModel

Positive = Annotated[float, Field(gt=0)]


class ProbeConfig(StrictModel):
    """How frozen features are scored."""

    l2_grid: tuple[Positive, ...] = Field(
        default=(1e-1, 1e-2, 1e-3),
        min_length=1,
        description="Regularisations tried, as l2/2 ||W||^2 beside the mean cross-entropy.",
    )
    l2_fallback: float = Field(
        default=1e-2, gt=0, description="Regularisation where too few images are labelled to choose one."
    )
    folds: int = Field(
        default=3, ge=2, description="Folds of the labelled images that choose level and regularisation."
    )
    max_iter: int = Field(default=50, ge=1, description="L-BFGS iterations per linear classifier.")
    k: int = Field(default=20, ge=1, description="Neighbours that vote in kNN.")
    temperature: float = Field(default=0.07, gt=0, description="A neighbour's vote weighs exp(cosine / temperature).")
    stride: int = Field(
        default=4, ge=1, description="Image px per cell of the dense read-out; masks are brought to it by majority."
    )
    max_cells: int = Field(
        default=32768, ge=1, description="Cells that a dense classifier is fitted on; more are drawn from at random."
    )
    max_select_cells: int = Field(
        default=4096, ge=1, description="Cells used to choose level and regularisation of the dense read-out."
    )
    batch_size: int = Field(default=64, ge=1, description="Images per forward pass of an extractor.")
