"""How far mirrored features are from the features of the mirrored image, which `equivariant` training takes as equal.

The image and its noise are both mirrored, so that only the network's own asymmetry is measured, and no other draw.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from dtpipe.extract.encode import Rows, encode, recipe_rows
from dtpipe.extract.teachers.base import TeacherSpec
from dtpipe.manifests.check.measured import Measured, read_measured, write_measured
from dtpipe.manifests.errors import DtpipeError, ManifestError, StoreError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import count_of
from dtpipe.pipeline.live.recorded import RecipeTeacher

if TYPE_CHECKING:
    from torch import Tensor

_TINY = 1e-30  # keeps an all-zero level from dividing by zero


def flip_errors(
    opened: RecipeTeacher, images: NDArray[np.uint8], keys: Sequence[str], batch_size: int | None = None
) -> dict[str, float]:
    """By level, the mean over samples and unflipped views of |mirror(f(x)) - f(mirror(x))| / |f(mirror(x))|, L2 norms.

    Shapes: images [N, H, W, 3] uint8. An error of 1.4 is that of two unrelated features of equal size.
    """
    recipe, spec = opened.recipe, opened.teacher.spec
    views = [view for view in recipe.views if not view.flip]
    rows = recipe_rows(recipe, spec, keys, images, views)
    compute = recipe.compute.in_batches(batch_size or recipe.compute.batch_size)
    straight = encode(opened.teacher, rows, opened.device, compute).levels
    mirrored = encode(opened.teacher, _mirrored(rows, spec), opened.device, compute).levels
    return {name: _relative_error(straight[name].flip(-1), level) for name, level in mirrored.items()}


def _relative_error(level: Tensor, expected: Tensor) -> float:
    """Mean over samples and views of |level - expected| / |expected|. Shapes: (N, V, C, h, w) both."""
    error = (level.double() - expected.double()).flatten(2).norm(dim=2)  # (N, V)
    relative = error / expected.double().flatten(2).norm(dim=2).clamp_min(_TINY)
    return float(np.mean(relative.flatten().tolist()))


def _mirrored(rows: Rows, spec: TeacherSpec) -> Rows:
    """Images and the noise over their cells, mirrored."""
    assert rows.images is not None
    noise = {
        stream: values.flip(-1) if spec.noise_shapes[stream][-1] < 0 else values
        for stream, values in rows.noise.items()
    }
    return replace(rows, images=rows.images.flip(2), noise=noise)


def measure(
    opened: RecipeTeacher, dataset: FeatureDataset, images: NDArray[np.uint8], keys: Sequence[str], batch_size: int
) -> Measured:
    """Measure on some samples, and keep it beside the dataset where that can be written."""
    measured = Measured(flip_error=flip_errors(opened, images, keys, batch_size), num_samples=len(keys))
    try:
        write_measured(dataset.store, measured)
    except (StoreError, OSError):  # a dataset that may only be read: the caller has the numbers
        return measured
    return measured


def equivariant_warnings(urls: Sequence[str]) -> Iterator[str]:
    """One warning for each dataset whose features will be mirrored, with the error that was measured on it."""
    for url in urls:
        try:
            dataset = FeatureDataset.open(url, allow_incomplete=True)
            if any(view.flip for view in dataset.views):
                continue
            error = _error_sentence(url, dataset)
        except DtpipeError:  # whoever opens it to train says why
            continue
        yield f"warning: {url} stores no flipped views, and --equivariant mirrors its features instead: {error}"


def _error_sentence(url: str, dataset: FeatureDataset) -> str:
    if dataset.recipe.synthesized:
        return "how far that is from true cannot be measured, since its teacher encodes no images"
    try:
        measured = read_measured(Store(url))
    except ManifestError:
        return f"its measured.json was changed; `dtpipe verify {url} --level recompute` measures anew"
    if measured is None or not measured.flip_error:
        return f"how far that is from true is not measured yet; `dtpipe verify {url} --level recompute` does"
    return (
        f"relative error {format_errors(measured.flip_error)}, measured on {count_of(measured.num_samples, 'sample')}"
    )


def format_errors(errors: Mapping[str, float]) -> str:
    """`l2 0.31, l3 0.42`."""
    return ", ".join(f"{name} {error:.2f}" for name, error in errors.items())
