"""Whether datasets that are joined by key are of the same images, not only of the same keys.

Soft labels know their features by digest; other datasets go by some of the images that they store.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dtpipe.manifests.errors import ConfigError, DtpipeError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_images
from dtpipe.manifests.soft_labels import soft_labels_of

_COMPARED = 16  # images, spread over the rows
_MOST_APART = 2.0  # of 255, mean over an image: what two decoders make of one file


def refuse_other_images(parts: Sequence[FeatureDataset]) -> None:
    """See that parts are of the same images, as far as they say.

    Stored images are compared with those of the first part that has some. Soft labels are of one of the other parts, by
    digest; else of features whose images, where they lie, are those of the parts.
    Raises: ConfigError naming a key whose images differ, or labels whose images nothing tells; what reading raises.
    """
    features = [part for part in parts if soft_labels_of(part.recipe) is None]
    digests = [part.manifest.digest if part.manifest is not None else None for part in features]
    stored = [part for part in parts if part.recipe.images == "stored" and not part.recipe.synthesized]
    for part in stored[1:]:
        _refuse_other_pixels(stored[0], part, part)
    for part in parts:
        labels = soft_labels_of(part.recipe)
        named = None if labels is None else labels.features.get("dataset")
        if features and named is not None and None not in digests and named not in digests:
            _refuse_unknown(features, part, named)


def _refuse_unknown(features: Sequence[FeatureDataset], labels: FeatureDataset, named: str) -> None:
    """Of labels that were made of none of the features: their own features' images must be there, and the same."""
    own = _recorded(labels, named)
    with_images = [part for part in features if part.recipe.images == "stored"]
    if own is None or own.recipe.images != "stored" or not with_images:
        raise ConfigError(
            f"{labels.url} holds soft labels of other features than those it is joined with (digest {named[:16]}..), "
            "which are no longer where they were, or store no images: so images may be others under the same keys; "
            f"make labels of these (dtpipe extract --interpreter .. --from {features[0].url})"
        )
    _refuse_other_pixels(own, with_images[0], labels)


def _recorded(labels: FeatureDataset, named: str) -> FeatureDataset | None:
    """The features that labels were made of, if they still are where they were."""
    place = ((labels.plan.provenance.get("config") or {}).get("soft_labels") or {}).get("features")
    try:
        own = FeatureDataset.open(place) if isinstance(place, str) else None
    except DtpipeError:
        return None
    return own if own is not None and own.manifest is not None and own.manifest.digest == named else None


def _refuse_other_pixels(one: FeatureDataset, other: FeatureDataset, told: FeatureDataset) -> None:
    """`told`: the part that a message names beside the other."""
    pairs = [(row, other.columns.row_of(one.columns.keys[row])) for row in _spread(one.columns.ok_rows)]
    places = [(row, place) for row, place in pairs if other.columns.status[place] == "ok"]
    if not places:
        return
    first = read_images(one, [row for row, _ in places]).astype(np.int16)
    apart = np.abs(first - read_images(other, [place for _, place in places])).mean(axis=(1, 2, 3))
    if (apart > _MOST_APART).any():
        key = one.columns.keys[places[int(apart.argmax())][0]]
        remedy = "make labels of these features" if told is not other else "extract one of them again"
        raise ConfigError(
            f"{one.url} and {other.url} hold different images under equal keys, such as {key!r}; {remedy} ({told.url})"
        )


def _spread(rows: np.ndarray) -> list[int]:
    """Some of the rows, evenly spaced."""
    chosen = np.linspace(0, len(rows) - 1, min(_COMPARED, len(rows))).round().astype(np.int64)
    return [int(rows[idx]) for idx in chosen]
