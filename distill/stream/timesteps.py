"""Which timestep each view of a level is of: of levels joined side by side, each has those of its own dataset."""

from __future__ import annotations

from collections.abc import Iterable

from dtpipe.distill.stream.mismatched import MismatchedPairs
from dtpipe.manifests.read.join import JoinedDataset
from dtpipe.manifests.read.source import FeatureSource
from dtpipe.manifests.schema import ViewSpec


def view_timesteps(source: FeatureSource, level: str) -> tuple[int, ...]:
    """The timestep of each view of a level, stored or encoded live; 0 where the teacher sees no noise."""
    return tuple(view.timestep or 0 for view in _views(source, level))


def several_timesteps(source: FeatureSource, levels: Iterable[str]) -> bool:
    """Whether targets of one level are of more than one timestep."""
    return any(len(set(view_timesteps(source, level))) > 1 for level in levels)


def _views(source: FeatureSource, level: str) -> tuple[ViewSpec, ...]:
    if isinstance(source, MismatchedPairs):
        return _views(source.source, level)
    if not isinstance(source, JoinedDataset):
        return source.views
    places = [source.places[level, view] for view in range(len(source.views))]
    return tuple(source.parts[place.part].views[place.view] for place in places)
