"""No image on both sides: labelled and held-out ones are compared by their pixels, whatever their keys and number."""

from __future__ import annotations

import numpy as np

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.records.image_digests import Digests
from dtpipe.manifests.words import are, count_of
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.rivals.digests import UNUSABLE, DigestsOf


def check_apart_by_content(
    train: LabelledSet, test: LabelledSet, one_source: bool, digests_of: DigestsOf, note: Note
) -> tuple[LabelledSet, LabelledSet]:
    """Labelled images, and held-out ones that are not among them, by their pixels at the size of the task.

    Where both come from one source that was split, copies among the held-out are left out with a note, and so are
    images that cannot be read.
    Raises: ConfigError naming one where they were given apart, or when none is left.
    """
    (train, learned), (test, held_out) = (
        _usable(labelled, digests_of(labelled, which), note)
        for labelled, which in ((train, "labelled"), (test, "held-out"))
    )
    copies = np.flatnonzero(np.isin(held_out, learned))
    if not len(copies):
        return train, test
    first = int(copies[0])
    key, twin = test.keys[first], train.keys[int(np.flatnonzero(learned == held_out[first])[-1])]
    if not one_source or len(copies) == len(test):
        raise ConfigError(
            f"{len(copies)} of {count_of(len(test), 'held-out image')} {are(len(copies))} among the labelled ones: "
            f"{key} is {twin}, pixel by pixel; take one of each pair away"
        )
    note(f"left out {count_of(len(copies), 'held-out image')} that labelled ones are copies of: {key} is {twin}")
    return train, test.subset(np.setdiff1d(np.arange(len(test)), copies))


def without_copies(labelled: LabelledSet, digests_of: DigestsOf, note: Note) -> LabelledSet:
    """The first of images that are one pixel by pixel, so that none stands on both sides of a new split."""
    digests = digests_of(labelled, "all")
    _, first, group = np.unique(digests, return_index=True, return_inverse=True)
    copies = np.flatnonzero(first[group] != np.arange(len(digests)))
    if not len(copies):
        return labelled
    key, twin = (labelled.keys[int(row)] for row in (copies[0], first[group[copies[0]]]))
    note(f"left out {count_of(len(copies), 'copy', 'copies')}, since each seed splits the images anew: {key} is {twin}")
    return labelled.subset(np.setdiff1d(np.arange(len(labelled)), copies))


def _usable(labelled: LabelledSet, digests: Digests, note: Note) -> tuple[LabelledSet, Digests]:
    """The images that can be read, with their digests."""
    bad = np.flatnonzero(digests == UNUSABLE)
    if not len(bad):
        return labelled, digests
    if len(bad) == len(labelled):
        raise ConfigError(f"no image can be read, {labelled.keys[0]} for one; give others")
    note(f"left out {count_of(len(bad), 'image')} that cannot be read: {labelled.keys[int(bad[0])]} for one")
    good = np.setdiff1d(np.arange(len(labelled)), bad)
    return labelled.subset(good), digests[good]
