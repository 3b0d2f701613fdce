"""Which held-out images are not new: seen by the teacher or in distillation, or with their labels by an interpreter.

Images are known by their content at the size at which they were trained on, whatever their keys and paths: held-out
ones are brought to that size as training images were. What cannot be known is said.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.places import file_stamp
from dtpipe.extract.sources.registry import open_images
from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.documents import Refusal, read_object
from dtpipe.manifests.errors import BadImage, DamagedDataError, DtpipeError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.records.files import TEACHER_RECORD
from dtpipe.manifests.records.image_digests import (
    TRAIN_IMAGES,
    Digests,
    image_digest,
    read_digests,
)
from dtpipe.manifests.schema import TransformRecipe, height_width
from dtpipe.manifests.soft_labels import soft_labels_of
from dtpipe.manifests.store.store import Store
from dtpipe.manifests.words import are, count_of
from dtpipe.manifests.write.plan import load_plan
from dtpipe.pipeline.arms import Comparison
from dtpipe.pipeline.cli.console import say_nothing
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.live.recorded import recorded_soft_labels
from dtpipe.pipeline.rivals.digests import DigestStore, in_threads
from dtpipe.pipeline.sets import open_held_out
from dtpipe.pipeline.trained_on import TrainedOn


@dataclass(frozen=True)
class TrainingImages:
    """Images that something was trained on."""

    where: str
    """A clause: by whom they were seen."""
    transform: TransformRecipe
    digests: Digests
    labelled: bool = False
    """Whether their labels were used."""


@dataclass(frozen=True)
class Seen:
    """What is known of all that a run was trained on, and sentences on what is not."""

    images: tuple[TrainingImages, ...]
    unknown: tuple[str, ...] = ()


def overlap_notes(
    config: EvalConfig, comparison: Comparison, test: LabelledSet, at: TransformRecipe | None, store: DigestStore
) -> list[str]:
    """What to say of held-out images that some run of a table, its teacher or its interpreter was trained on.

    `test` has its images at `at`, or whole for None.
    """
    runs = [member.path for arm in comparison.arms for member in arm.members if member.is_run and member.path]
    notes = seen_notes(
        find_seen(runs, store), test, at, lambda recipe: open_held_out(config, recipe, say_nothing), store
    )
    others = [arm.name for arm in comparison.arms if not all(member.is_run for member in arm.members)]
    return [*notes, *(f"which images {name} was pre-trained on is not known" for name in others)]


def find_seen(runs: Sequence[str], store: DigestStore) -> Seen:
    """All that some runs and their teachers were trained on; of each dataset the digests are read or made once."""
    images: dict[str, TrainingImages] = {}
    unknown: dict[str, None] = {}
    for run in runs:
        trained_on = TrainedOn.of(run)
        if not trained_on.urls and not trained_on.live:
            unknown[f"{run} does not say which images it was trained on"] = None
        for where, read in _parts(trained_on, store):
            if where in images:
                continue
            try:
                images |= {where: part} if (part := read()) else {}
            except DtpipeError as err:
                unknown[f"held-out images are not compared with {where}: {err}"] = None
        unknown |= _teacher(trained_on, images)
    return Seen(tuple(images.values()), tuple(unknown))


def seen_notes(
    seen: Seen,
    test: LabelledSet,
    at: TransformRecipe | None,
    test_at: Callable[[TransformRecipe], LabelledSet],
    store: DigestStore,
) -> list[str]:
    """How many held-out images were seen, by whom, and what is not known.

    `test` has its images at `at`, or whole for None; `test_at` opens the same ones at another size.
    """
    notes = []
    own: dict[TransformRecipe | None, LabelledSet] = {at: test}
    keys = frozenset(test.keys)
    for images in seen.images:
        try:
            if images.transform not in own:
                whole = test_at(images.transform)
                own[images.transform] = whole.subset([row for row, key in enumerate(whole.keys) if key in keys])
        except InputError:
            if images.transform.resize != "none":
                raise
            continue  # no image has that size
        digests = store.of_set(own[images.transform], "held-out")
        if num := int(np.isin(digests, images.digests).sum()):
            part = f"{num} of {count_of(len(test), 'held-out image')} {are(num)} in {images.where}"
            how = "with their labels, so this is no held-out score" if images.labelled else "without labels"
            notes.append(f"{part}: seen there, {how}")
    return [*notes, *seen.unknown]


_Part = tuple[str, Callable[[], TrainingImages | None]]


def _parts(trained_on: TrainedOn, store: DigestStore) -> Iterator[_Part]:
    for url in trained_on.urls:
        yield f"the distillation dataset {url}", partial(_stored, url, trained_on.urls, store)
    if images := trained_on.live.get("images"):
        yield f"the images of distillation, {images}", partial(_live, trained_on, store)
    yield from _interpreters(trained_on)


def _interpreters(trained_on: TrainedOn) -> Iterator[_Part]:
    """Those that made the soft labels that a run learned from, stored or live."""
    for url in trained_on.urls if trained_on.learned_labels else ():
        try:
            plan = load_plan(Store(url))
        except DtpipeError:  # of which is said where the dataset is opened
            continue
        if labels := soft_labels_of(plan.recipe):
            path = recorded_soft_labels(plan).get("interpreter")
            where = f"the labelled images of the interpreter {path or 'of ' + url}"
            yield where, partial(_labelled, where, path, labels.head_blake3)
    if path := trained_on.interpreter:
        where = f"the labelled images of the interpreter {path}"
        yield where, partial(_labelled, where, path)


def _labelled(where: str, path: str | None, digest: str | None = None) -> TrainingImages:
    from dtpipe.distill.labels.files import load_interpreter

    if path is None:
        raise InputError("the soft labels do not say where it is")
    head = load_interpreter(path)
    if digest not in (None, head.digest):
        raise InputError(f"another interpreter is in {path} by now")
    digests = read_digests(Path(path) / TRAIN_IMAGES, "train the interpreter again")
    try:
        transform = TransformRecipe.model_validate(head.record["transform"])
    except (KeyError, ValueError) as err:
        raise InputError(f"{path} does not say at which size its images were; train the interpreter again") from err
    return TrainingImages(where, transform, digests, labelled=True)


def _stored(url: str, urls: Sequence[str], store: DigestStore) -> TrainingImages | None:
    """The images of a dataset; None where the teacher made them, or another dataset of the run has them."""
    dataset = FeatureDataset.open(url, allow_incomplete=True)
    recipe, where = dataset.recipe, f"the distillation dataset {url}"
    if recipe.synthesized:
        return None
    if recipe.images != "stored":
        if len(urls) > 1:
            return None
        raise InputError(f"{url} stores no images; give the dataset that it is joined with too")
    kept = store.of_dataset(dataset, f"held-out images are compared with {where}")
    return TrainingImages(where, recipe.transform, np.unique(kept))


def _live(trained_on: TrainedOn, store: DigestStore) -> TrainingImages | None:
    """The images that a run without a dataset was trained on, read from their source again."""
    where, transform = f"the images of distillation, {trained_on.live['images']}", trained_on.live_transform()
    if transform is None:
        raise InputError("the run does not say at which size")
    config, listing = trained_on.live_listing()
    source = open_images(config.images, None, config.source.kind)

    def digest(uri: str) -> int | None:
        with suppress(BadImage):
            return image_digest(resize_image(decode_image(source.read(uri), config.source.max_pixels), transform))
        return None

    files = "\n".join(f"{key}\0{file_stamp(uri)}" for key, uri in zip(listing.keys, listing.uris, strict=True))
    name = blake3_hex(f"{transform.model_dump_json()}/{config.images}\n{files}".encode("utf-8", "surrogatepass"))
    found = (one for one in in_threads(digest, listing.uris) if one is not None)
    kept = store.kept(found, len(listing.keys), name, f"held-out images are compared with {where}")
    return TrainingImages(where, transform, np.unique(kept))


def _teacher(trained_on: TrainedOn, images: dict[str, TrainingImages]) -> dict[str, None]:
    """Adds what the teacher says of its training images; returns sentences where it says nothing."""
    settings = trained_on.teacher().settings
    path = settings.get("path")
    if settings.get("untrained") is not None:
        return {}
    unknown: dict[str, None] = {"the images that the teacher was trained on are not known": None}
    if path is None or not (Path(path) / TEACHER_RECORD).is_file():
        return unknown
    where = f"the training images of the teacher {path}"
    try:
        digests = read_digests(Path(path) / TRAIN_IMAGES)
        images[where] = TrainingImages(where, _teacher_transform(Path(path) / TEACHER_RECORD), digests)
    except DtpipeError as err:
        return {f"{next(iter(unknown))}: {err}": None}
    return {}


def _teacher_transform(record: Path) -> TransformRecipe:
    """How a teacher's training images came to its size. Raises: DamagedDataError."""
    refusal = Refusal(DamagedDataError, "train or export the teacher again")
    settings = read_object(record, refusal).get("train_teacher")
    try:
        height, width = height_width(settings["px"])  # type: ignore[index]
        return TransformRecipe(
            resize=settings["resize"],  # type: ignore[index]
            height=height,
            width=width,
            filter=settings["filter"],  # type: ignore[index]
        )
    except (KeyError, TypeError, ValueError) as err:
        raise refusal.of(record, "does not say how images came to the teacher's size") from err
