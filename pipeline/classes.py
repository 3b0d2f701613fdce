"""What is said of classes that cannot be told apart, or stand on one side only."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from dtpipe.distill.downstream.labelled import LabelledSet, check_several_classes
from dtpipe.extract.sources.layouts.files import few
from dtpipe.manifests.errors import ConfigError
from dtpipe.manifests.labels import Class, Mask
from dtpipe.pipeline.labelled import LOOKED_AT


def check_scorable(train: LabelledSet, test: LabelledSet, ignore_value: int | None) -> None:
    """Refuse sets that any constant answer scores well on, and say so of masks whose classes are all ignored.

    Raises: ConfigError.
    """
    try:
        check_several_classes(train, test)
    except ConfigError as err:
        if train.kind is Mask and _holds_ignored((train, test)):
            raise ConfigError(
                f"{err}, or if the value {ignore_value}, which means 'no label' here, is one: "
                "--foreground --ignore-value null"
            ) from err
        raise


def coverage_notes(train: LabelledSet, test: LabelledSet) -> list[str]:
    """What to say of classes that stand on one side only; of very many masks or objects, that nobody has looked."""
    if num := max((len(labelled) for labelled in (train, test) if _is_unseen(labelled)), default=0):
        return [f"which classes stand on one side only is not known: {num} images are too many to read them all first"]
    what, learned, scored = "image" if train.kind is not Mask else "mask", train.find_classes(), test.find_classes()
    notes = []
    if unknown := _names((train, test), scored - learned):
        notes.append(f"no labelled {what} holds {unknown}: nobody can find that, and it counts as missed")
    if unseen := _names((train, test), learned - scored):
        notes.append(f"no held-out {what} holds {unseen}: the scores say nothing of that")
    return notes


def _is_unseen(labelled: LabelledSet) -> bool:
    return labelled.occurring is None and labelled.kind is not Class and len(labelled) > LOOKED_AT


def _names(sets: Sequence[LabelledSet], numbers: Collection[int]) -> str:
    names = max((labelled.classes.names for labelled in sets), key=len)
    return few([names[number] for number in sorted(numbers)])


def _holds_ignored(sets: Sequence[LabelledSet]) -> bool:
    masks = (labelled.target(row) for labelled in sets for row in range(len(labelled)))
    return any(isinstance(mask, Mask) and not mask.known.all() for mask in masks)
