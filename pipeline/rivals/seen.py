"""Which held-out images are not new: labelled too, or seen without labels by the teacher or in distillation.

Images are known by their content at the size at which they were trained on, whatever their keys and paths: held-out
ones are brought to that size as training images were. What cannot be known is said.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from dtpipe.distill.downstream.labelled import LabelledSet
from dtpipe.extract.sources.images import decode_image, resize_image
from dtpipe.extract.sources.registry import open_images
from dtpipe.manifests.canonical import blake3_hex
from dtpipe.manifests.documents import Refusal, read_object
from dtpipe.manifests.errors import BadImage, ConfigError, DamagedDataError, DtpipeError, InputError
from dtpipe.manifests.read.dataset import FeatureDataset
from dtpipe.manifests.read.source import read_images
from dtpipe.manifests.records.files import TEACHER_RECORD
from dtpipe.manifests.records.image_digests import (
    TRAIN_IMAGES,
    Digests,
    as_digests,
    image_digest,
    pack_digests,
    read_digests,
    short_digest,
)
from dtpipe.manifests.schema import TransformRecipe, height_width
from dtpipe.manifests.store.publish import write_whole
from dtpipe.manifests.words import are, count_of
from dtpipe.pipeline.arms import Comparison
from dtpipe.pipeline.cli.console import Note
from dtpipe.pipeline.config import EvalConfig
from dtpipe.pipeline.sets import open_held_out
from dtpipe.pipeline.trained_on import TrainedOn

KEPT_FROM = 5_000
"""Images of a dataset from which on their digests are kept beside the run, and progress is said."""
_BATCH = 256
_THREADS = 8
_Name = TypeVar("_Name")


@dataclass(frozen=True)
class UnlabelledImages:
    """Images that something was trained on without labels."""

    where: str
    """A clause: by whom they were seen."""
    transform: TransformRecipe
    digests: Digests


@dataclass(frozen=True)
class Seen:
    """What is known of all that a run was trained on, and sentences on what is not."""

    images: tuple[UnlabelledImages, ...]
    unknown: tuple[str, ...] = ()


def check_apart_by_content(train: LabelledSet, test: LabelledSet, one_source: bool, note: Note) -> LabelledSet:
    """Held-out images that are not labelled ones, by their pixels at the size of the task.

    Where both come from one source that was split, copies among the held-out are left out with a note.
    Raises: ConfigError naming one where they were given apart, or when none is left.
    """
    labelled = {digest: key for key, digest in zip(train.keys, train.digests, strict=False)}
    copies = [row for row, digest in enumerate(test.digests) if digest in labelled]
    if not copies:
        return test
    first, twin = test.keys[copies[0]], labelled[test.digests[copies[0]]]
    if not one_source or len(copies) == len(test):
        raise ConfigError(
            f"{len(copies)} of {count_of(len(test), 'held-out image')} {are(len(copies))} among the labelled ones: "
            f"{first} is {twin}, pixel by pixel; take one of each pair away"
        )
    note(f"left out {count_of(len(copies), 'held-out image')} that labelled ones are copies of: {first} is {twin}")
    return test.subset([row for row in range(len(test)) if row not in set(copies)])


def without_copies(labelled: LabelledSet, note: Note) -> LabelledSet:
    """The first of images that are one pixel by pixel, so that none stands on both sides of a new split."""
    first: dict[str, str] = {}
    twins = [first.setdefault(digest, key) for key, digest in zip(labelled.keys, labelled.digests, strict=False)]
    copies = {key: twin for key, twin in zip(labelled.keys, twins, strict=False) if twin != key}
    if not copies:
        return labelled
    key, twin = next(iter(copies.items()))
    note(f"left out {count_of(len(copies), 'copy', 'copies')}, since each seed splits the images anew: {key} is {twin}")
    return labelled.subset([row for row, key in enumerate(labelled.keys) if key not in copies])


def overlap_notes(
    config: EvalConfig, comparison: Comparison, test: LabelledSet, at: TransformRecipe | None, note: Note
) -> list[str]:
    """What to say of held-out images that some run of a table, or its teacher, was trained on without labels.

    `test` has its images at `at`, or whole for None.
    """
    runs = [member.path for arm in comparison.arms for member in arm.members if member.is_run and member.path]
    return seen_notes(find_seen(runs, note), test, at, lambda recipe: open_held_out(config, recipe, _quiet))


def _quiet(_sentence: str) -> None:
    """What is wrong with images was said when they were opened first."""


def find_seen(runs: Sequence[str], note: Note) -> Seen:
    """All that some runs and their teachers were trained on; of each dataset the digests are read or made once.

    Digests of large datasets are kept in the first run's folder.
    """
    images: dict[str, UnlabelledImages] = {}
    unknown: dict[str, None] = {}
    folder = Path(runs[0]) / "eval" / "seen" if Path(runs[0]).is_dir() else None
    for run in runs:
        trained_on = TrainedOn.of(run)
        if not trained_on.urls and not trained_on.live:
            unknown[f"{run} does not say which images it was trained on"] = None
        for where, read in _parts(trained_on, note, folder):
            if where in images:
                continue
            try:
                images |= {where: part} if (part := read()) else {}
            except DtpipeError as err:
                unknown[f"which images {where} holds is not known: {err}"] = None
        unknown |= _teacher(trained_on, images)
    return Seen(tuple(images.values()), tuple(unknown))


def seen_notes(
    seen: Seen, test: LabelledSet, at: TransformRecipe | None, test_at: Callable[[TransformRecipe], LabelledSet]
) -> list[str]:
    """How many held-out images were seen, by whom, and what is not known.

    `test` has its images at `at`, or whole for None; `test_at` opens the same ones at another size.
    """
    notes = []
    own: dict[TransformRecipe | None, LabelledSet] = {at: test}
    for images in seen.images:
        try:
            if images.transform not in own:
                own[images.transform] = test_at(images.transform)
        except InputError:
            if images.transform.resize != "none":
                raise
            continue  # no image has that size
        digests = _digests_of(own[images.transform], set(test.keys))
        if num := int(np.isin(digests, images.digests).sum()):
            part = f"{num} of {count_of(len(test), 'held-out image')} {are(num)} in {images.where}"
            notes.append(f"{part}: seen there, without labels")
    return [*notes, *seen.unknown]


def _digests_of(labelled: LabelledSet, keys: Collection[str]) -> Digests:
    """Digests of the images of some keys, computed where nobody has."""
    rows = [row for row, key in enumerate(labelled.keys) if key in keys]
    if labelled.digests:
        return np.array([short_digest(labelled.digests[row]) for row in rows], dtype=np.uint64)
    computed = _in_threads(lambda row: image_digest(labelled.image(row)), rows)
    return np.fromiter((digest for digest in computed if digest is not None), dtype=np.uint64)


_Part = tuple[str, Callable[[], UnlabelledImages | None]]


def _parts(trained_on: TrainedOn, note: Note, folder: Path | None) -> Iterator[_Part]:
    for url in trained_on.urls:
        yield f"the distillation dataset {url}", partial(_stored, url, trained_on.urls, note, folder)
    if images := trained_on.live.get("images"):
        yield f"the images of distillation, {images}", partial(_live, trained_on, note, folder)


def _stored(url: str, urls: Sequence[str], note: Note, folder: Path | None) -> UnlabelledImages | None:
    """The images of a dataset; None where the teacher made them, or another dataset of the run has them."""
    dataset = FeatureDataset.open(url, allow_incomplete=True)
    recipe, where = dataset.recipe, f"the distillation dataset {url}"
    if recipe.synthesized:
        return None
    if recipe.images != "stored":
        if len(urls) > 1:
            return None
        raise InputError(f"{url} stores no images; give the dataset that it is joined with too")
    rows = dataset.columns.ok_rows
    name = blake3_hex((dataset.manifest.digest if dataset.manifest else f"{url}/{len(rows)}").encode())

    def digests() -> Iterator[int]:
        for start in range(0, len(rows), _BATCH):
            for image in read_images(dataset, rows[start : start + _BATCH]):
                yield image_digest(image)

    return UnlabelledImages(where, recipe.transform, _kept(digests(), len(rows), name, where, note, folder))


def _live(trained_on: TrainedOn, note: Note, folder: Path | None) -> UnlabelledImages | None:
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

    name = blake3_hex(f"{transform.model_dump_json()}/{config.images}".encode() + "\n".join(listing.keys).encode())
    found = (one for one in _in_threads(digest, listing.uris) if one is not None)
    return UnlabelledImages(where, transform, _kept(found, len(listing.keys), name, where, note, folder))


def _teacher(trained_on: TrainedOn, images: dict[str, UnlabelledImages]) -> dict[str, None]:
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
        images[where] = UnlabelledImages(where, _teacher_transform(Path(path) / TEACHER_RECORD), digests)
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


def _kept(digests: Iterator[int], num: int, name: str, where: str, note: Note, folder: Path | None) -> Digests:
    """Digests from the run's folder, else made now, and kept there where there are many."""
    path = None if folder is None or num < KEPT_FROM else folder / f"{name[:32]}.blake3"
    if path is not None and path.is_file():
        with suppress(DtpipeError):
            return read_digests(path)
    made = as_digests(_told(digests, num, where, note))
    if path is not None:
        with suppress(OSError):  # they are made again the next time
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, pack_digests(made))
    return made


def _told(digests: Iterator[int], num: int, where: str, note: Note) -> Iterator[int]:
    """The same, with a word at every tenth of many."""
    for done, digest in enumerate(digests, 1):
        yield digest
        if num >= KEPT_FROM and done % max(1, num // 10) == 0:
            note(f"held-out images are compared with {where}: {done} of {num} read")


def _in_threads(digest: Callable[[_Name], int | None], names: Sequence[_Name]) -> Iterator[int | None]:
    with ThreadPoolExecutor(_THREADS, thread_name_prefix="seen") as pool:
        for start in range(0, len(names), _BATCH):
            yield from pool.map(digest, names[start : start + _BATCH])
